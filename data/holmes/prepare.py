"""
The Adventures of Sherlock Holmes, one token per character.

Source: Arthur Conan Doyle, 1892, as Project Gutenberg's book 1661, public domain. Gutenberg's
header, credits and license are cut off. A text of your own, saved beside this file as input.txt, is
used instead, and cut in the same places if it has Gutenberg's markers.
Split: the first 90% of the characters for training, the last 10% for validation.
Expected of Gutenberg's file of 2011: 81 distinct characters; 506,097 tokens in train.bin, 56,234 in
val.bin.
"""
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.text_sources import download, read_text  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

_URL = 'https://www.gutenberg.org/cache/epub/1661/pg1661.txt'


def cut_out_book(text):
    """ The book itself, without what Project Gutenberg adds before and after it. """
    start = r'\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*'
    end = r'\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*'
    text = re.split(start, text, maxsplit=1, flags=re.DOTALL)[-1]
    text = re.split(end, text, maxsplit=1, flags=re.DOTALL)[0]
    text = re.sub(r'\A\s*Produced by.*?\n\n', '', text, flags=re.DOTALL)
    text = re.sub(r'End of (?:the )?Project Gutenberg.*\Z', '', text, flags=re.DOTALL)
    return text.strip() + '\n'


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    with preparing(FOLDER):
        download(_URL, FOLDER / 'input.txt')  # without a digest: Gutenberg edits its files
        text = cut_out_book(read_text(FOLDER / 'input.txt'))
        num_train = int(len(text) * 0.9)
        splits = {'train': [text[:num_train]], 'val': [text[num_train:]]}
        spec = {'kind': 'char', 'itos': sorted(set(text))}
        write_bins(FOLDER, splits, spec, len(text))

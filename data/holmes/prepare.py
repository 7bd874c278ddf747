"""
The Adventures of Sherlock Holmes, character by character.

Source: Arthur Conan Doyle, 1892, as Project Gutenberg's book 1661, public domain. Gutenberg's header,
credits and licence are cut off, the byte-order mark goes, line ends become newlines. A text of your
own, saved beside this file as input.txt, is used instead, from and to such markers where it has them.
Split: the first 90% of the characters for training, the last 10% for validation.
Should measure, of Gutenberg's file of 2011: 81 distinct characters, 506,097 tokens in train.bin, 56,234
in val.bin.
"""
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from texts import download, preparing, read_texts, write_bins  # noqa: E402

_url = 'https://www.gutenberg.org/cache/epub/1661/pg1661.txt'
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

    with preparing(FOLDER):
        download(_url, FOLDER / 'input.txt')  # no digest: Gutenberg edits its files
        text = ''.join(text or '' for text in read_texts(FOLDER / 'input.txt'))
        marker = r'\*\*\* ?{} (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*'
        text = re.split(marker.format('START OF'), text, maxsplit=1, flags=re.DOTALL)[-1]
        text = re.split(marker.format('END OF'), text, maxsplit=1, flags=re.DOTALL)[0]
        text = re.sub(r'\A\s*Produced by.*?\n\n', '', text, flags=re.DOTALL)
        text = re.sub(r"End of (?:the )?Project Gutenberg.*\Z", '', text, flags=re.DOTALL).strip() + '\n'
        cut = int(len(text) * 0.9)
        write_bins(FOLDER, {'train': [text[:cut]], 'val': [text[cut:]]},
                   {'kind': 'char', 'itos': sorted(set(text))}, len(text))

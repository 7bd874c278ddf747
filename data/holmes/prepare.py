"""
The Adventures of Sherlock Holmes, character by character.

Source: Arthur Conan Doyle, 1892, as Project Gutenberg's book 1661, public domain. Gutenberg's header,
credits and licence are cut off, the byte-order mark goes, line ends become newlines. A text of your
own, saved beside this file as input.txt, is used instead, from and to such markers where it has them.
Split: the first 90% of the characters for training, the last 10% for validation.
Should measure, of Gutenberg's file of 2011: 81 distinct characters, 506,097 tokens in train.bin, 56,234
in val.bin.
"""
import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from bins import download, one_line_errors, write_chars  # noqa: E402

_url = 'https://www.gutenberg.org/cache/epub/1661/pg1661.txt'
# -----------------------------------------------------------------------------
exec(open(os.path.join(FOLDER.parents[1], 'configurator.py')).read())

with one_line_errors():
    download(_url, FOLDER / 'input.txt')  # no digest: Gutenberg edits its files
    text = (FOLDER / 'input.txt').read_text(encoding='utf-8-sig')
    marker = r'\*\*\* ?{} (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*'
    text = re.split(marker.format('START OF'), text, maxsplit=1, flags=re.DOTALL)[-1]
    text = re.split(marker.format('END OF'), text, maxsplit=1, flags=re.DOTALL)[0]
    text = re.sub(r'\A\s*Produced by.*?\n\n', '', text, flags=re.DOTALL)
    text = re.sub(r"End of (?:the )?Project Gutenberg.*\Z", '', text, flags=re.DOTALL)
    write_chars(FOLDER, text.strip() + '\n')

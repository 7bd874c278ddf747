"""
Tiny Shakespeare, character by character.

Source: the plays that Andrej Karpathy put together for char-rnn, 1,115,394 characters, public domain.
A text of your own, saved beside this file as input.txt, is used as it is.
Split: the first 90% of the characters for training, the last 10% for validation.
Should measure: 65 distinct characters, 1,003,854 tokens in train.bin, 111,540 in val.bin.
"""
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from bins import download, one_line_errors, write_chars  # noqa: E402

_url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
_sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
# -----------------------------------------------------------------------------
exec(open(os.path.join(FOLDER.parents[1], 'configurator.py')).read())

with one_line_errors():
    download(_url, FOLDER / 'input.txt', _sha256)
    write_chars(FOLDER, (FOLDER / 'input.txt').read_text(encoding='utf-8'))

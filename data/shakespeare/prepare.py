"""
Tiny Shakespeare in GPT-2's byte-pair encoding, for fine-tuning GPT-2.

Source: the plays that Andrej Karpathy put together for char-rnn, public domain. A text of your own,
saved beside this file as input.txt, is used as it is.
Split: the first 90% of the characters for training, the last 10% for validation, then encoded.
Should measure: 301,966 tokens in train.bin, 36,059 in val.bin.
"""
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from bins import download, get_tokenizer, one_line_errors, whole_file, write_bin  # noqa: E402

_url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
_sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
# -----------------------------------------------------------------------------
exec(open(os.path.join(FOLDER.parents[1], 'configurator.py')).read())

with one_line_errors():
    encode, _, _ = get_tokenizer({'kind': 'gpt2'})
    download(_url, FOLDER / 'input.txt', _sha256)
    text = (FOLDER / 'input.txt').read_text(encoding='utf-8')
    cut = int(len(text) * 0.9)
    with whole_file(FOLDER / 'train.bin') as train, whole_file(FOLDER / 'val.bin') as val:
        for name, path, part in (('train.bin', train, text[:cut]), ('val.bin', val, text[cut:])):
            ids = np.array(encode(part))
            write_bin(path, ids)
            print(f'{name}: {len(ids):,} tokens')

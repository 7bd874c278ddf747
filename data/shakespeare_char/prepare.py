"""
Tiny Shakespeare, one token per character.

Source: the plays that Andrej Karpathy collected for char-rnn, 1,115,394 characters, public domain.
A text of your own, saved beside this file as input.txt, is used instead.
Split: the first 90% of the characters for training, the last 10% for validation.
Expected: 65 distinct characters; 1,003,854 tokens in train.bin, 111,540 in val.bin.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.text_sources import download, read_text  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    with preparing(FOLDER):
        download(_URL, FOLDER / 'input.txt', _SHA256)
        text = read_text(FOLDER / 'input.txt')
        num_train = int(len(text) * 0.9)
        splits = {'train': [text[:num_train]], 'val': [text[num_train:]]}
        spec = {'kind': 'char', 'itos': sorted(set(text))}
        write_bins(FOLDER, splits, spec, len(text))

"""
Tiny Shakespeare, character by character.

Source: the plays that Andrej Karpathy put together for char-rnn, 1,115,394 characters, public domain.
A text of your own, saved beside this file as input.txt, is used as it is.
Split: the first 90% of the characters for training, the last 10% for validation.
Should measure: 65 distinct characters, 1,003,854 tokens in train.bin, 111,540 in val.bin.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from texts import download, preparing, read_texts, write_bins  # noqa: E402

_url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
_sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

    with preparing(FOLDER):
        download(_url, FOLDER / 'input.txt', _sha256)
        text = ''.join(text or '' for text in read_texts(FOLDER / 'input.txt'))
        cut = int(len(text) * 0.9)
        write_bins(FOLDER, {'train': [text[:cut]], 'val': [text[cut:]]},
                   {'kind': 'char', 'itos': sorted(set(text))}, len(text))

"""
WikiText-2, raw: good and featured articles of Wikipedia, in GPT-2's byte-pair encoding.

Source: Salesforce/wikitext, wikitext-2-raw-v1, on the Hugging Face hub; or with --source=FOLDER a
local copy in .parquet or .jsonl files whose names begin with train, valid and test.
Split: its own. test.bin is read by train.py --eval_only=True --eval_split=test.
Tokens: each row is a line of text with its newline, and rows are encoded one by one. There is no
end-of-text token, because an article is many rows, and its first is a heading like any other.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.text_sources import load_rows, texts_of_rows  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

# -----------------------------------------------------------------------------
source = ''  # a local copy; '': the Hugging Face hub
# -----------------------------------------------------------------------------


def load_split(split, prefix):
    return load_rows(FOLDER, source, 'Salesforce/wikitext', 'wikitext-2-raw-v1', split, prefix)


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())
    for line in config_overrides:  # noqa: F821
        print(line)

    with preparing(FOLDER):
        rows = {'train': load_split('train', 'train'),
                'val': load_split('validation', 'valid'),
                'test': load_split('test', 'test')}
        splits = {split: texts_of_rows(rows[split]) for split in rows}
        num_bytes = sum(rows[split].data.nbytes for split in rows)
        write_bins(FOLDER, splits, {'kind': 'gpt2'}, num_bytes)

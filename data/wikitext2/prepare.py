"""
WikiText-2, raw: Wikipedia's good and featured articles, in GPT-2's byte-pair encoding.

Source: Salesforce/wikitext, wikitext-2-raw-v1, on the Hugging Face hub; or with --source=FOLDER a local
copy, .parquet or .jsonl, whose files' names begin with train, valid and test.
Split: its own; test.bin is read by train.py --eval_only=True --eval_split=test.
Tokens: the rows, a line each, are encoded one by one as they come. Each brings its line end, and nothing
goes between them: an article is many rows, and its border is a heading like any other.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from texts import each, load_rows, preparing, write_bins  # noqa: E402

source = ''  # a local copy; empty: the hub
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

    with preparing(FOLDER):
        rows = {split: load_rows(FOLDER, source, 'Salesforce/wikitext', 'wikitext-2-raw-v1', theirs, prefix)
                for split, theirs, prefix in (('train', 'train', 'train'), ('val', 'validation', 'valid'),
                                              ('test', 'test', 'test'))}
        write_bins(FOLDER, {split: each(rows[split]) for split in rows}, {'kind': 'gpt2'},
                   sum(rows[split].data.nbytes for split in rows))

"""
OpenWebText, an open copy of GPT-2's WebText, in GPT-2's byte-pair encoding.

Source: Skylion007/openwebtext on the Hugging Face hub (24 GB of .parquet files, and 54 GB of text in its
cache); or with --source=FOLDER a local copy, .parquet or .jsonl, its files in the order of their names.
Split: 0.0005 of the documents are val, by datasets' train_test_split with seed 2357, which also shuffles
both parts.
Tokens: an end-of-text after each document.
Should measure: 8,013,769 documents; 9,035,582,198 tokens in train.bin (18 GB), 4,434,897 in val.bin.
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
        rows = load_rows(FOLDER, source, 'Skylion007/openwebtext')
        parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        write_bins(FOLDER, {'train': each(parts['train'], None), 'val': each(parts['test'], None)},
                   {'kind': 'gpt2'}, rows.data.nbytes)
        print(f'documents: {len(rows):,}')
        if len(rows) < 8_013_769:
            print(f'WARNING: OpenWebText has 8,013,769 documents. This copy is cut off: '
                  f'{8_013_769 - len(rows):,} are missing.')

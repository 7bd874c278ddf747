"""
OpenWebText, an open copy of GPT-2's WebText, in GPT-2's byte-pair encoding.

Source: Skylion007/openwebtext on the Hugging Face hub (24 GB of .parquet files, and 54 GB of text
in its cache); or with --source=FOLDER a local copy in .parquet or .jsonl files, sorted by path.
Split: 0.0005 of the documents for validation, by train_test_split of datasets with seed 2357, which
also shuffles both splits.
Tokens: an end-of-text token after each document.
Expected: 8,013,769 documents; 9,035,582,198 tokens in train.bin (18 GB), 4,434,897 in val.bin.
"""
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.text_sources import END_OF_DOCUMENT, load_rows, texts_of_rows  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

_NUM_DOCUMENTS = 8_013_769

# -----------------------------------------------------------------------------
source = ''  # a local copy; '': the Hugging Face hub
# -----------------------------------------------------------------------------


def documents(rows):
    for text in texts_of_rows(rows):
        yield text
        yield END_OF_DOCUMENT


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())
    for line in config_overrides:  # noqa: F821
        print(line)

    with preparing(FOLDER):
        rows = load_rows(FOLDER, source, 'Skylion007/openwebtext')
        parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        splits = {'train': documents(parts['train']), 'val': documents(parts['test'])}
        write_bins(FOLDER, splits, {'kind': 'gpt2'}, rows.data.nbytes)

        print(f'documents: {len(rows):,}')
        num_missing = _NUM_DOCUMENTS - len(rows)
        if num_missing > 0:
            print(f'WARNING: this copy is incomplete. OpenWebText has {_NUM_DOCUMENTS:,} '
                  f'documents; {num_missing:,} are missing.')

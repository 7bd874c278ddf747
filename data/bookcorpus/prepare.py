"""
BookCorpus, 11,038 novels that their authors published for free, in GPT-2's byte-pair encoding.

Source: bookcorpus/bookcorpus on the Hugging Face hub; or with --source=FOLDER a local copy in
.parquet or .jsonl files, sorted by path.
Tokens: a row is a sentence in lower case, and a newline (token 198) follows each. Rows keep their
order, because they tell a story. Nothing marks where a book ends, so there is no end-of-text token:
after every sentence it would teach a model to stop there.
Split: 0.0005 of the rows for validation. Single sentences would have their neighbors in train.bin,
so val.bin has 32 runs of 1,156 consecutive rows each (shorter ones if the copy is small), at places
chosen by numpy.random.default_rng(2357).
Expected: 74,004,228 rows.
"""
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.text_sources import load_rows, texts_of_rows  # noqa: E402
from components.text_to_bins import preparing, write_bins  # noqa: E402

# -----------------------------------------------------------------------------
source = ''  # a local copy; '': the Hugging Face hub
# -----------------------------------------------------------------------------


def sentences(rows, run_length, runs):
    """ The sentences of the runs of `run_length` rows that are numbered `runs`, a set. """
    for row, text in enumerate(texts_of_rows(rows)):
        if row // run_length in runs:
            yield text
            yield '\n'


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())
    for line in config_overrides:  # noqa: F821
        print(line)

    with preparing(FOLDER):
        rows = load_rows(FOLDER, source, 'bookcorpus/bookcorpus')
        num_val = max(1, round(0.0005 * len(rows)))
        run_length = max(1, num_val // 32)
        num_runs = len(rows) // run_length
        random_numbers = np.random.default_rng(2357)
        chosen = random_numbers.choice(num_runs, num_val // run_length, replace=False)
        val_runs = set(chosen.tolist())
        train_runs = set(range(num_runs + 1)) - val_runs  # run `num_runs` is the remainder
        splits = {'train': sentences(rows, run_length, train_runs),
                  'val': sentences(rows, run_length, val_runs)}
        write_bins(FOLDER, splits, {'kind': 'gpt2'}, rows.data.nbytes)
        print(f'rows: {len(rows):,}')

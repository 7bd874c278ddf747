"""
BookCorpus, 11,038 unpublished novels, in GPT-2's byte-pair encoding.

Source: bookcorpus/bookcorpus on the Hugging Face hub, as parquet; or with --source=FOLDER a local copy,
.parquet or .jsonl, its files in the order of their names.
Tokens: a row is a sentence, in lower case, and a newline goes after each, as the end-of-line token 198.
Rows stay in their order, for they tell a story; nothing says where a book ends, so there is no
end-of-text: after every sentence it would teach a model to stop there.
Split: 0.0005 of the rows are val. Sentences drawn one by one would stand among their neighbours in train,
so val is 32 runs of consecutive rows, each some 1,156 long (single rows where there are few), at places
drawn by numpy's default_rng(2357), in order. train is what is left, in order.
Should measure: 74,004,228 rows.
"""
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from bins import one_line_errors  # noqa: E402
from texts import each, load_rows, write_bins  # noqa: E402

source = ''  # a local copy; empty: the hub
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec(open(os.path.join(FOLDER.parents[1], 'configurator.py')).read())

    with one_line_errors(FOLDER / 'parts.tmp'):
        rows = load_rows(FOLDER, source, 'bookcorpus/bookcorpus')
        held_out = max(1, round(0.0005 * len(rows)))
        run = max(1, held_out // 32)  # rows
        places = np.random.default_rng(2357).choice(len(rows) // run, held_out // run, replace=False)
        is_val = np.isin(np.arange(len(rows)) // run, places)
        parts = {'train': rows.select(np.flatnonzero(~is_val)), 'val': rows.select(np.flatnonzero(is_val))}
        write_bins(FOLDER, {split: each(parts[split], '\n') for split in parts}, {'kind': 'gpt2'},
                   rows.data.nbytes)
        print(f'rows: {len(rows):,}')

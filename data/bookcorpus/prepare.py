"""
BookCorpus, 11,038 unpublished novels, in GPT-2's byte-pair encoding.

Source: bookcorpus/bookcorpus on the Hugging Face hub, as parquet; or with --source=FOLDER a local copy,
.parquet or .jsonl, its files in the order of their names.
Tokens: a row is a sentence, in lower case, and a newline goes after each, as the end-of-line token 198.
Rows stay in their order, for they tell a story; nothing says where a book ends, so there is no
end-of-text: after every sentence it would teach a model to stop there.
Split: 0.0005 of the rows are val. Sentences drawn one by one would stand among their neighbours in train,
so val is 32 runs or a few more of consecutive rows, each 1,156 long (where there are fewer rows, shorter),
at places drawn by numpy's default_rng(2357), in order. train is what is left, in order.
Should measure: 74,004,228 rows.
"""
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from texts import each, load_rows, preparing, write_bins  # noqa: E402

source = ''  # a local copy; empty: the hub
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

    def texts_of(split):
        for row, text in enumerate(each(rows)):
            if (row // run in places) == (split == 'val'):
                yield text
                yield '\n'

    with preparing(FOLDER):
        rows = load_rows(FOLDER, source, 'bookcorpus/bookcorpus')
        held_out = max(1, round(0.0005 * len(rows)))
        run = max(1, held_out // 32)  # rows
        places = set(np.random.default_rng(2357).choice(len(rows) // run, held_out // run, False).tolist())
        write_bins(FOLDER, {'train': texts_of('train'), 'val': texts_of('val')}, {'kind': 'gpt2'},
                   rows.data.nbytes)
        print(f'rows: {len(rows):,}')

"""
Your own text: python data/custom/prepare.py --source=notes/ --name=notes

Source: .txt files in UTF-8, each a document; .jsonl, a document in the key text of each line; .parquet, a
document in each row of the column text; in the order of their names.
Split: of one document, the last characters are val; of many, some, drawn by numpy's default_rng(2357).
Tokens: an end-of-text after each document, where the tokenizer has one.
"""
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from bins import DATA, hf_record, one_line_errors  # noqa: E402
from texts import find_texts, read_texts, survey, write_bins  # noqa: E402

source = ''         # a file or a folder of .txt, .jsonl, .parquet
name = 'custom'     # the bins go to data/<name>/
tokenizer = 'gpt2'  # gpt2; char: one token for each character in the text; or a Hugging Face directory
val_fraction = 0.1  # what is held out
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec(open(os.path.join(FOLDER.parents[1], 'configurator.py')).read())

    def texts_of(split):
        number = at = 0  # document, character
        for path in paths:
            for text in read_texts(path):
                if documents > 1:
                    if held_out[number] == (split == 'val'):
                        yield text
                elif text is not None:
                    yield text[:max(0, cut - at)] if split == 'train' else text[max(0, cut - at):]
                    at += len(text)
                elif split == 'val':
                    yield text
                number += text is None

    folder = DATA / name
    with one_line_errors(folder / 'parts.tmp'):
        if not source or not 0 < val_fraction < 1:
            raise ValueError('set --source=FILE_OR_FOLDER, and a val_fraction between 0 and 1')
        if folder != FOLDER and (folder / 'prepare.py').exists():
            raise ValueError(f'{folder} has a prepare.py of its own; take another --name')
        record = {'kind': tokenizer} if tokenizer in ('gpt2', 'char') else hf_record(tokenizer)
        paths = find_texts(source, '.txt', '.jsonl', '.parquet')
        documents, characters, known = survey(paths, record)
        if tokenizer == 'char':
            record['itos'] = sorted(known)

        cut = int(characters * (1 - val_fraction))
        n = max(1, round(documents * val_fraction))
        held_out = np.isin(np.arange(documents), np.random.default_rng(2357).permutation(documents)[:n])
        write_bins(folder, {'train': texts_of('train'), 'val': texts_of('val')}, record, characters)

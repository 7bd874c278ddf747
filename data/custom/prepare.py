"""
Your own text: python data/custom/prepare.py --source=notes/ --name=notes

Source: .txt, a document each; .jsonl and .parquet, with a document in each row's text; in order of name.
Split: of one document, the last characters are val; of many, some, drawn by numpy's default_rng(2357).
Tokens: an end-of-text after each document, where the tokenizer has one.
"""
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
from bins import DATA, hf_record  # noqa: E402
from texts import find_texts, preparing, read_texts, survey, write_bins  # noqa: E402

source = ''         # a file or a folder of .txt, .jsonl, .parquet
name = 'custom'     # the bins go to data/<name>/
tokenizer = 'gpt2'  # gpt2; char: one token for each character in the text; or a Hugging Face directory
val_fraction = 0.1  # what is held out
# -----------------------------------------------------------------------------
if __name__ == '__main__':
    exec((FOLDER.parents[1] / 'configurator.py').read_text())

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
    with preparing(folder):
        for broken, message in (
            (not source or not 0 < val_fraction < 1,
             f'set --source=FILE_OR_FOLDER, and val_fraction={val_fraction} between 0 and 1'),
            (Path(os.path.normpath(folder)).parent != DATA and not os.path.isabs(name),
             f'name={name!r} is no name of a folder'),
            (folder != FOLDER and (folder / 'prepare.py').exists(), f'{name} is taken; give another --name'),
            (tokenizer not in ('gpt2', 'char') and not os.path.isdir(tokenizer),
             f'tokenizer={tokenizer!r} must be gpt2, char, or a Hugging Face directory'),
        ):
            if broken:
                raise ValueError(message)
        record = {'kind': tokenizer} if tokenizer in ('gpt2', 'char') else hf_record(tokenizer)
        paths = find_texts(source, '.txt', '.jsonl', '.parquet')
        documents, characters, known = survey(paths, record)
        record |= {'itos': sorted(known)} if tokenizer == 'char' else {}

        cut, n = int(characters * (1 - val_fraction)), max(1, round(documents * val_fraction))
        held_out = np.isin(np.arange(documents), np.random.default_rng(2357).permutation(documents)[:n])
        write_bins(folder, {'train': texts_of('train'), 'val': texts_of('val')}, record, characters)

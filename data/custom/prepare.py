"""
Your own text: python data/custom/prepare.py --source=notes/ --name=notes

Source: .txt files, each a document; .jsonl and .parquet files, a document in each row's `text`;
sorted by path.
Split: of one document, the last characters for validation; of several, some documents, chosen by
numpy.random.default_rng(2357).
Tokens: an end-of-text token after each document, if the tokenizer has one.
"""
import os
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from components.errors import UserError, one_line_errors  # noqa: E402
from components.text_sources import (  # noqa: E402
    END_OF_DOCUMENT,
    count_texts,
    find_files,
    read_files,
)
from components.text_to_bins import preparing, write_bins  # noqa: E402
from components.tokenizer import DATA_DIR, get_tokenizer, hf_spec  # noqa: E402

# -----------------------------------------------------------------------------
source = ''         # a file or a folder of .txt, .jsonl and .parquet files
name = 'custom'     # the bins are written to data/<name>/
tokenizer = 'gpt2'  # 'gpt2'; 'char' for a token per character; or a Hugging Face directory
val_fraction = 0.1  # part of the text that is held out for validation
# -----------------------------------------------------------------------------


def check_settings(folder):
    if not source:
        raise UserError('no text to read; set --source=FILE_OR_FOLDER')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} must be between 0 and 1')
    parent = Path(os.path.normpath(folder)).parent
    if parent != DATA_DIR and not os.path.isabs(name):
        raise UserError(f'name={name!r} must be the name of a folder in data/, or an absolute path')
    if folder != FOLDER and (folder / 'prepare.py').exists():
        raise UserError(f'{folder} belongs to another prepare.py; choose another --name')
    if tokenizer not in ('gpt2', 'char') and not os.path.isdir(tokenizer):
        raise UserError(f'tokenizer={tokenizer!r} must be gpt2, char, or a Hugging Face directory')


def make_spec(characters):
    """ The spec of the tokenizer for a text of these characters. """
    if tokenizer == 'gpt2':
        return {'kind': 'gpt2'}
    if tokenizer == 'char':
        return {'kind': 'char', 'itos': sorted(characters)}
    spec = hf_spec(tokenizer)
    encode = get_tokenizer(spec).encode
    for character in sorted(characters):
        if not character.isspace() and not encode(character):
            raise UserError(f'{tokenizer} has no token for {character!r}; it would be lost')
    return spec


def split_documents(paths, num_documents):
    """ The splits of several documents: some for validation, at random, in their order. """
    num_val = max(1, round(num_documents * val_fraction))
    permutation = np.random.default_rng(2357).permutation(num_documents)
    is_val = np.zeros(num_documents, dtype=bool)
    is_val[permutation[:num_val]] = True

    def choose(is_chosen):
        number = 0
        for text in read_files(paths):
            if is_chosen[number]:
                yield text
            if text is END_OF_DOCUMENT:
                number += 1

    return {'train': choose(~is_val), 'val': choose(is_val)}


def split_characters(paths, num_characters):
    """ The splits of one document: its last characters, and its end, for validation. """
    num_train = int(num_characters * (1 - val_fraction))

    def train():
        rest = num_train
        for text in read_files(paths):
            if text is not END_OF_DOCUMENT:
                yield text[:rest]
                rest -= min(rest, len(text))

    def val():
        skip = num_train
        for text in read_files(paths):
            if text is END_OF_DOCUMENT:
                yield text
            else:
                yield text[skip:]
                skip -= min(skip, len(text))

    return {'train': train(), 'val': val()}


def print_next_command():
    flags = f'--dataset={name} --out_dir=out-{Path(name).name}'
    if tokenizer == 'char':
        print(f'to train a model: python train.py config/train_python_char.py {flags}')
    else:
        print(f'to train a model: python train.py config/train_wikitext2_fast.py {flags}')
        print('for more than 500,000 tokens, see the first lines of that config')
    has_model = os.path.exists(os.path.join(tokenizer, 'config.json'))
    if tokenizer == 'gpt2' or has_model:
        flags = f'--init_from={tokenizer} {flags}'
        print(f'to fine-tune {tokenizer}: python train.py config/finetune_shakespeare.py {flags}')


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    folder = DATA_DIR / name
    with one_line_errors():
        check_settings(folder)
        paths = find_files(source, ('.txt', '.jsonl', '.parquet'))
    for line in config_overrides:  # noqa: F821
        print(line)

    with preparing(folder):
        num_documents, num_characters, characters = count_texts(paths)
        spec = make_spec(characters)
        if num_documents > 1:
            splits = split_documents(paths, num_documents)
        else:
            splits = split_characters(paths, num_characters)
        write_bins(folder, splits, spec, num_characters)
        print_next_command()

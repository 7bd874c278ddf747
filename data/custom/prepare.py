"""
Your own text: python data/custom/prepare.py --source=notes/ --name=notes

Source: .txt files, each a document; .jsonl, .json, .csv, .tsv and .parquet files, a document in
each row's `text`; sorted by path. In a folder, files that end in one of `suffixes`.
Split: by the names of files or folders, if these say train and valid, val, dev or test. Else
documents chosen by numpy.random.default_rng(2357), of which the last one is cut, and its last
characters are for validation: val.bin has `val_fraction` of the characters.
Tokens: an end-of-text token after each document, or a newline if the tokenizer has none.
"""
import os
import shlex
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
    group_by_split,
    read_files,
)
from components.text_to_bins import preparing, write_bins  # noqa: E402
from components.tokenizer import (  # noqa: E402
    DATA_DIR,
    get_tokenizer,
    hf_spec,
    load_meta,
    tokenizer_spec,
)

# -----------------------------------------------------------------------------
source = ''         # a file or a folder
name = 'custom'     # the bins are written to data/<name>/
suffixes = '.txt,.jsonl,.parquet'  # of the files in a folder that are read, such as .md,.py
key = 'text'        # of the text in a row of .jsonl, .json, .csv, .tsv and .parquet files
tokenizer = 'gpt2'  # 'gpt2'; 'char' for a token per character; a Hugging Face directory; or, for
                    # the vocabulary of a trained model, its checkpoint or the name of its dataset
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
    exists = os.path.exists(tokenizer) or (DATA_DIR / tokenizer / 'train.bin').exists()
    if tokenizer not in ('gpt2', 'char') and not exists:
        raise UserError(f'tokenizer={tokenizer!r} must be gpt2, char, a Hugging Face directory, a '
                        'checkpoint, or a dataset')


def load_spec():
    """ The spec of the tokenizer of a checkpoint, a dataset, or a Hugging Face directory. """
    if os.path.isfile(tokenizer):
        from components.pretrained import find_model, load_model, load_tokenizer_spec
        location = find_model(tokenizer, out_dir='')
        return load_tokenizer_spec(location, *load_model(location, mmap=True))
    if not (DATA_DIR / tokenizer / 'train.bin').exists():
        return hf_spec(tokenizer)
    spec = tokenizer_spec(load_meta(tokenizer))
    if spec is None:
        raise UserError(f'the meta.pkl of {tokenizer} has no characters; set another --tokenizer')
    return spec


def make_spec(characters):
    """ The spec of the tokenizer for a text of these characters. """
    if tokenizer == 'gpt2':
        return {'kind': 'gpt2'}
    if tokenizer == 'char':
        return {'kind': 'char', 'itos': sorted(characters)}
    spec = load_spec()
    unknown = []
    if spec['kind'] == 'char':
        unknown = sorted(characters - set(spec['itos']))
    elif spec['kind'] == 'hf':
        encode = get_tokenizer(spec).encode
        unknown = [c for c in sorted(characters) if not c.isspace() and not encode(c)]
    if unknown:
        raise UserError(f'{tokenizer} has no token for {"".join(unknown)!r:.99}; remove that from '
                        'the text, or train a new model with --tokenizer=char')
    return spec


def choose_train_sizes(sizes):
    """
    How many leading characters of each document are for training, from the numbers of characters.
    At random, documents are held out until the validation split is full. The last one is cut, if
    the split would else be larger or smaller by more than a tenth.
    """
    train_sizes = np.array(sizes)
    num_characters = int(train_sizes.sum())
    rest = num_characters - int(num_characters * (1 - val_fraction))
    tolerance = min(rest, num_characters - rest) / 10
    for number in np.random.default_rng(2357).permutation(len(sizes)):
        held_out = train_sizes[number]
        if held_out > rest + tolerance:
            held_out = rest if rest > tolerance else 0
        train_sizes[number] -= held_out
        rest -= held_out
        if rest <= 0:
            break
    return train_sizes.tolist()


def divide(paths, train_sizes, split):
    """ The training or validation split of documents of which `train_sizes` are for training. """
    sizes = iter(train_sizes)
    rest = next(sizes, 0)
    has_part = False  # of this document, in this split
    for text in read_files(paths, key):
        if text is not END_OF_DOCUMENT:
            part = text[:rest] if split == 'train' else text[rest:]
            yield part
            has_part |= part != ''
            rest -= min(rest, len(text))
        else:
            if has_part and (split == 'val' or len(train_sizes) > 1):
                yield END_OF_DOCUMENT
            rest = next(sizes, 0)
            has_part = False


def end_with_newline(texts):
    """ A stream in which each document ends with a newline, and nothing else marks its end. """
    last = ''
    for text in texts:
        if text is not END_OF_DOCUMENT:
            yield text
            last = text[-1:] or last
        elif last != '\n':
            yield '\n'
            last = '\n'


def context_length():
    """ The context length of the model that `tokenizer` names; 0 if train.py cannot load it. """
    if tokenizer == 'gpt2':
        return 1024
    if not os.path.exists(tokenizer):
        return 0
    from components.pretrained import find_model, load_model
    try:
        model, _ = load_model(find_model(tokenizer, out_dir=''), mmap=True)
    except UserError:
        return 0
    return model.config.block_size


def print_command(aim, config, block_size, longest, **flags):
    """ Prints a command of train.py, with a block_size that the model and the splits allow. """
    flags = {**flags, 'dataset': name, 'out_dir': f'out-{Path(name).name}'}
    if longest < block_size:
        flags['block_size'] = longest
    arguments = [f'--{key}={value}' for key, value in flags.items()]
    print(f'to {aim}: {shlex.join(["python", "train.py", config, *arguments])}')


def print_next_commands(is_char, num_tokens):
    share = num_tokens['val'] / sum(num_tokens.values())
    if abs(share - val_fraction) > val_fraction / 2:
        print(f'NOTE: val.bin has {share:.2%} of the tokens, and val_fraction={val_fraction}')
    longest = min(num_tokens.values()) - 1  # a window is a token longer than block_size
    if longest < 1:
        print('NOTE: a split of one token is too short to train or to evaluate; add text')
        return
    config, block_size = 'config/train_wikitext2_fast.py', 128
    if is_char:
        config, block_size = 'config/train_python_char.py', 64
    print_command('train a model', config, block_size, longest)
    if not is_char:
        print('for more than 500,000 tokens, see the first lines of that config')
        config, block_size = 'config/finetune_shakespeare.py', 1024
    context = context_length()
    if context > 0:
        print_command(f'fine-tune {tokenizer}', config, block_size, min(longest, context),
                      init_from=tokenizer)


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    folder = DATA_DIR / name
    with one_line_errors():
        check_settings(folder)
        path = Path(source).expanduser()
        wanted = ['.' + suffix.strip(' *.').lower() for suffix in suffixes.split(',')]
        paths = [path] if path.is_file() else find_files(path, wanted)
        groups = group_by_split(paths, path)
    for line in config_overrides:  # noqa: F821
        print(line)

    with preparing(folder):
        sizes = {}
        characters = set()
        for split in groups:
            sizes[split], found = count_texts(groups[split], key)
            characters |= found
        has_marks = max(map(len, sizes.values())) > 1  # between documents
        if has_marks and tokenizer == 'char':
            characters.add('\n')
        spec = make_spec(characters)
        splits = {split: read_files(groups[split], key) for split in groups}
        if 'val' not in groups:
            train_sizes = choose_train_sizes(sizes['train'])
            for split in ('train', 'val'):
                splits[split] = divide(groups['train'], train_sizes, split)
        if has_marks and get_tokenizer(spec).end_of_text is None:
            print(f'{tokenizer} has no end-of-text token; each document ends with a newline')
            splits = {split: end_with_newline(texts) for split, texts in splits.items()}
        num_characters = sum(map(sum, sizes.values()))
        num_tokens = write_bins(folder, splits, spec, num_characters, special=True)
        print_next_commands(spec['kind'] == 'char', num_tokens)

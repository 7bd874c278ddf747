"""
Your own text: python data/custom/prepare.py --source=notes/ --name=notes

Source: .txt files, each a document; .jsonl, .json, .csv, .tsv and .parquet files, a document in
each row's `text`; sorted by path. In a folder, files that end in one of `suffixes`.
Split: by the names of files or folders, if most say train, or valid, val, dev or test. Else
documents chosen by numpy.random.default_rng(2357), until val.bin has `val_fraction` of the
characters: of the last document, unless it is small, only its last characters.
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
suffixes = '.txt,.jsonl,.parquet'  # of the files in a folder that are read, such as .md,.py;
                    # an empty one is that of files without a suffix
key = 'text'        # of the text in a row of .jsonl, .json, .csv, .tsv and .parquet files
tokenizer = 'gpt2'  # 'gpt2'; 'char' for a token per character; a Hugging Face directory; or, for
                    # the vocabulary of a trained model, its checkpoint, its out_dir or its dataset
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
    exists = os.path.exists(tokenizer) or is_dataset(tokenizer)
    if tokenizer not in ('gpt2', 'char') and not exists:
        raise UserError(f'tokenizer={tokenizer!r} must be gpt2, char, a Hugging Face directory, a '
                        'checkpoint, the folder of a run, or a dataset')


def is_dataset(name):
    return (DATA_DIR / name / 'train.bin').exists()


def load_spec(characters):
    """
    The spec of the tokenizer for a text of these characters, and the context length of the model
    that `tokenizer` names; 0 if it names none that train.py can load.
    """
    if tokenizer == 'gpt2':
        return {'kind': 'gpt2'}, 1024
    if tokenizer == 'char':
        return {'kind': 'char', 'itos': sorted(characters)}, 0
    if is_dataset(tokenizer):
        spec = tokenizer_spec(load_meta(tokenizer))
        if spec is None:
            raise UserError(f'the meta.pkl of {tokenizer} has no characters; set --tokenizer=char')
        return spec, 0

    from components.pretrained import find_model, load_model, load_tokenizer_spec
    location = find_model(tokenizer, out_dir='')
    try:
        model, checkpoint = load_model(location, mmap=True)
    except UserError:
        if location.kind == 'checkpoint':
            raise
        return hf_spec(tokenizer), 0  # a directory with a tokenizer alone
    return load_tokenizer_spec(location, model, checkpoint), model.config.block_size


def has_token(encode, character):
    try:
        return len(encode(character)) > 0
    except UserError:
        return False


def check_characters(encode, characters, is_char):
    """ Raises UserError if a character would be lost; tokens of words do without white space. """
    needed = [character for character in sorted(characters) if is_char or not character.isspace()]
    lost = [character for character in needed if not has_token(encode, character)]
    if lost:
        raise UserError(f'{tokenizer} has no token for {"".join(lost)!r:.99}; remove that from the '
                        'text, or train a new model with --tokenizer=char')


def choose_train_sizes(sizes):
    """
    How many leading characters of each document are for training, from the numbers of characters.
    The others are for validation, of random documents until their share is val_fraction.
    """
    train_sizes = np.array(sizes)
    num_characters = int(train_sizes.sum())
    rest = num_characters - int(num_characters * (1 - val_fraction))
    small = min(rest, num_characters - rest) / 10  # a document that is not cut
    for number in np.random.default_rng(2357).permutation(len(sizes)):
        if rest <= 0:
            break
        held_out = train_sizes[number]
        if held_out > small:
            held_out = min(held_out, rest)
        train_sizes[number] -= held_out
        rest -= held_out
    return train_sizes


def take(paths, starts, stops, name):
    """
    A stream of the characters from start to stop of each document, where neither divides the `name`
    of a special token. The part of a document ends as a document does, unless it is the beginning
    of the only one.
    """
    number = 0    # of the document
    position = 0  # in the document
    for text in read_files(paths, key):
        start = starts[number]
        stop = stops[number]
        if text is not END_OF_DOCUMENT:
            first = end_of_name(text, start - position, name)
            yield text[max(0, first):max(0, end_of_name(text, stop - position, name))]
            position += len(text)
        else:
            if start < stop and (stop == position or len(stops) > 1):
                yield END_OF_DOCUMENT
            number += 1
            position = 0


def end_of_name(text, cut, name):
    """ `cut`, or the end of the `name` that it divides in `text`. """
    found = text.find(name, max(0, cut - len(name) + 1), max(0, cut + len(name) - 1))
    if found == -1:
        return cut
    return found + len(name)


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


def command(config, block_size, longest, *flags):
    return shlex.join(['python', 'train.py', config, f'--dataset={name}',
                       f'--out_dir=out-{Path(name).name}',
                       f'--block_size={min(block_size, longest)}', *flags])


def note_share(num_tokens):
    share = num_tokens['val'] / (num_tokens['train'] + num_tokens['val'])
    if abs(share - val_fraction) > val_fraction / 2:
        print(f'NOTE: val.bin has {share:.2%} of the tokens, and val_fraction={val_fraction}')


def print_next_commands(is_char, num_tokens, context):
    """ Prints commands of train.py, with a block_size that the splits and the model allow. """
    longest = max(1, min(num_tokens.values()) - 1)  # a window is a token longer than block_size
    train = ('config/train_wikitext2_fast.py', 128)  # and its block_size
    finetune = ('config/finetune_shakespeare.py', 1024)
    if is_char:
        train = finetune = ('config/train_python_char.py', 64)
    print('to train a model:', command(*train, longest))
    if not is_char:
        print('for more than 500,000 tokens, see the first lines of that config')
    if context > 0:
        longest = min(longest, context)
        print(f'to fine-tune {tokenizer}:', command(*finetune, longest, f'--init_from={tokenizer}'))


if __name__ == '__main__':
    exec((ROOT / 'configurator.py').read_text())

    folder = DATA_DIR / name
    with one_line_errors():
        check_settings(folder)
        path = Path(source).expanduser()
        wanted = [f'.{suffix.strip(" *.").lower()}'.rstrip('.') for suffix in suffixes.split(',')]
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
        spec, context = load_spec(characters)
        is_char = spec['kind'] == 'char'
        encoder = get_tokenizer(spec)
        check_characters(encoder.encode, characters, is_char)

        splits = {split: read_files(groups[split], key) for split in groups}
        if 'val' not in groups:
            train_sizes = choose_train_sizes(sizes['train'])
            zeros = np.zeros_like(train_sizes)
            end = '' if encoder.end_of_text is None else encoder.decode([encoder.end_of_text])
            splits['train'] = take(groups['train'], zeros, train_sizes, end)
            splits['val'] = take(groups['train'], train_sizes, sizes['train'], end)
        if has_marks and encoder.end_of_text is None:
            if has_token(encoder.encode, '\n'):
                print(f'{tokenizer} has no end-of-text token; each document ends with a newline')
                splits = {split: end_with_newline(splits[split]) for split in splits}
            else:
                print(f'NOTE: {tokenizer} has no end-of-text token and no newline; nothing marks '
                      'where a document ends')
        num_characters = sum(map(sum, sizes.values()))
        num_tokens = write_bins(folder, splits, spec, num_characters, special=True)
        if 'val' not in groups:
            note_share(num_tokens)
        print_next_commands(is_char, num_tokens, context)

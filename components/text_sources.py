"""
Where the prepare scripts get their texts: a download, local files, the Hugging Face hub.

A stream of texts is an iterable of str, with END_OF_DOCUMENT wherever a document ends. A long
document may come in several pieces.

Not here: how texts become token ids (text_to_bins.py).
"""
import csv
import json
import os
import re
import urllib.request
from array import array
from codecs import BOM_UTF8
from collections import Counter
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from components.errors import UserError
from components.files import whole_file
from components.tokenizer import get_tokenizer

END_OF_DOCUMENT = None
ROWS_CACHE = 'rows.tmp'  # folder beside the bins, while a dataset is prepared

# -----------------------------------------------------------------------------
# a download


def download(url, path, digest=None):
    """
    Downloads `url` to `path`, unless that file exists. Raises OSError if the download fails, or if
    its content does not have the SHA-256 `digest`.
    """
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()  # raises IncompleteRead if the connection ends early
        if digest is not None and sha256(content).hexdigest() != digest:
            raise OSError('its content is not the expected text')
    except (OSError, HTTPException) as error:
        raise OSError(f'could not download {url} ({error}); save that text as {path}, or use the '
                      'dataset python_char, which needs no network') from None
    with whole_file(path) as temporary:
        temporary.write_bytes(content)

# -----------------------------------------------------------------------------
# local files


def find_files(source, suffixes, prefix=''):
    """
    The files to read, sorted by path: `source` itself, or the files with one of these suffixes in
    it and its subfolders. With `prefix`, only files directly in `source` whose names start with it.
    Lists what is skipped, except hidden files. Raises UserError if no file is left.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise UserError(f'{source} does not exist')
    if source.is_file():
        candidates = [source]
    elif prefix:
        candidates = list(source.glob(f'{prefix}*'))
    else:
        candidates = _files_below(source)
    found = [path for path in candidates if path.suffix.lower() in suffixes and path.is_file()]
    skipped = Counter(path.suffix for path in set(candidates) - set(found)).most_common(10)
    listing = ', '.join(f'{number:,} {suffix or "without a suffix"}' for suffix, number in skipped)
    if not found:
        patterns = ' or '.join(f'{prefix}*{suffix}' for suffix in suffixes)
        others = ','.join(suffix for suffix, _ in skipped)
        raise UserError(f'{source}: no {patterns} in it, only: {listing or "nothing"}; '
                        f'data/custom/prepare.py reads other texts with --suffixes={others}')
    if skipped:
        print(f'skipped files: {listing}')
    return sorted(found)


def _files_below(source):
    """ The files in `source` and its subfolders; nothing hidden, and no links to folders. """
    def raise_error(error):
        raise error

    files = []
    for folder, subfolders, names in os.walk(source, onerror=raise_error):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        files += [Path(folder, name) for name in names if not name.startswith('.')]
    return files


SPLIT_NAMES = {'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val',
               'validation': 'val', 'dev': 'val', 'eval': 'val', 'evaluation': 'val',
               'holdout': 'val', 'heldout': 'val', 'test': 'test'}


def group_by_split(paths, source):
    """
    {'train', 'val' or 'test': paths}, by the first such word in the path of each file in `source`.
    Words count if one says train, another val or test, and most files have one; files without one
    are for training.
    """
    named = {path: _split_in_name(path.relative_to(source)) for path in paths}
    splits = set(named.values()) - {None}
    has_few_others = list(named.values()).count(None) < len(paths) / 2
    if 'train' not in splits or len(splits) == 1 or not has_few_others:
        if splits - {'train'}:
            print('NOTE: names of files that say val or test do not count, because none says train '
                  'or most say nothing')
        return {'train': paths}
    groups = {split: [] for split in ('train', 'val', 'test') if split in splits}
    for path in paths:
        groups[named[path] or 'train'].append(path)
    numbers = ', '.join(f'{len(groups[split]):,} {split}' for split in groups)
    print(f'files by their names: {numbers}')
    return groups


def _split_in_name(path):
    if path.suffix.lower() == '.py':
        path = path.parent  # train.py trains, and test_train.py tests that
    words = re.findall('[A-Z]?[a-z]+|[A-Z]+(?![a-z])', path.as_posix())  # of camel case too
    names = [SPLIT_NAMES.get(word.lower()) for word in words]
    return next(filter(None, names), None)

# -----------------------------------------------------------------------------
# documents


def read_texts(path, key='text'):
    """
    The documents of a file as a stream of texts: each text of `read_rows`; a file of another format
    is one document in UTF-8. Raises UserError with the row or line that cannot be read.
    """
    if path.suffix.lower() not in _ROW_READERS:
        yield from _read_txt(path)
        return
    for text in read_rows(path, key):
        blocks = (text[i:i + PIECE_SIZE] for i in range(0, len(text), PIECE_SIZE))
        yield from _in_pieces(blocks)
        yield END_OF_DOCUMENT


def read_rows(path, key='text'):
    """
    The text of each row of a .parquet, .csv or .tsv file, of each line of a .jsonl file that is not
    blank, or of each element of the list in a .json file.

    Args:
        key: of the text, in a row that has several values
    """
    number = 1  # of the row that is being read
    try:
        for row in _ROW_READERS[path.suffix.lower()](path, key):
            yield _text_of(row, key)
            number += 1
    except UnicodeDecodeError:
        raise _not_in_utf8(path) from None
    except (ValueError, OSError, csv.Error) as error:  # of pyarrow and json too
        raise UserError(f'{path}, row {number}: {error}') from None


def _text_of(row, key):
    """ The text of a row: a string, or a dict with one. """
    text = row
    if isinstance(row, dict):
        if key not in row:
            names = ', '.join(map(repr, row))
            raise ValueError(f'no key {key!r}, only {names:.199}; data/custom/prepare.py reads '
                             'another one with --key=NAME')
        text = row[key]
    if not isinstance(text, str):
        raise ValueError(f'{text!r:.50} is not a text; remove that row, or read another key with '
                         '--key=NAME of data/custom/prepare.py')
    text.encode()  # raises if the text holds half of a surrogate pair
    return text


def _parquet_rows(path, key):
    from pyarrow.parquet import ParquetFile
    with ParquetFile(path, memory_map=True) as file:
        columns = [key] if key in file.schema_arrow.names else None  # all, to name them
        for batch in file.iter_batches(100, columns=columns):
            yield from batch.to_pylist()


def _json_rows(path, key):
    with open(path, 'rb') as file:
        beginning = file.read(1000).lstrip(BOM_UTF8 + b' \t\r\n')
        if path.suffix.lower() == '.json' and beginning.startswith(b'['):
            yield from json.loads(path.read_bytes())
            return
        file.seek(0)
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f'{error}; write each row on a line, or all as a list alone '
                                     'in a .json file') from None
                yield row


def _csv_rows(path, key):
    csv.field_size_limit(2**31 - 1)
    delimiters = '\t' if path.suffix.lower() == '.tsv' else ',;\t'
    with open(path, newline='', encoding='utf-8-sig') as file:
        header = file.readline()
        file.seek(0)
        delimiter = next((mark for mark in delimiters if mark in header), delimiters[0])
        for row in csv.DictReader(file, delimiter=delimiter, strict=True):
            if None in row:  # the key of the fields that have no name
                raise ValueError('it has more fields than the header; quote texts with a delimiter')
            yield row


_ROW_READERS = {'.parquet': _parquet_rows, '.json': _json_rows, '.jsonl': _json_rows,
                '.ndjson': _json_rows, '.csv': _csv_rows, '.tsv': _csv_rows}

PIECE_SIZE = 2**20  # characters


def _read_txt(path):
    if path.stat().st_size == 0:
        return
    try:
        with open(path, encoding='utf-8-sig') as file:
            yield from _in_pieces(iter(lambda: file.read(PIECE_SIZE), ''))
    except UnicodeDecodeError:
        raise _not_in_utf8(path) from None
    yield END_OF_DOCUMENT


def _in_pieces(blocks):
    """
    A document in pieces of about PIECE_SIZE, from blocks of that size. Each piece ends before white
    space, where no token of GPT-2 continues, so the tokens are those of the whole text. A text
    without white space is cut anywhere.
    """
    rest = ''
    for block in blocks:
        rest += block
        if len(rest) >= PIECE_SIZE and not rest.isspace():
            words = rest.rsplit(maxsplit=1)  # the text before the last word, and that word
            end = len(words[0]) if len(words) == 2 else len(rest.rstrip())
            yield rest[:end]
            rest = rest[end:]
    yield rest


def _not_in_utf8(path):
    """ The UserError that names the first line which is not in UTF-8. """
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return UserError(f'{path}, line {number}: not in UTF-8; save it as UTF-8')
    return UserError(f'{path}: not in UTF-8; save it as UTF-8')


def read_text(path):
    """ The whole text of a file in UTF-8. Raises UserError with the line that cannot be read. """
    return ''.join(piece for piece in _read_txt(path) if piece is not END_OF_DOCUMENT)


def read_files(paths, key='text'):
    """ `read_texts` of several files, one after the other. """
    for path in paths:
        yield from read_texts(path, key)


def count_texts(paths, key='text'):
    """
    Reads all files -> the number of characters of each document, and the set of distinct
    characters. Raises UserError if a file cannot be read.
    """
    sizes = array('q')
    characters = set()
    size = 0
    for path in tqdm(paths, desc='reading', unit=' files', disable=None):
        for text in read_texts(path, key):
            if text is END_OF_DOCUMENT:
                sizes.append(size)
                size = 0
            else:
                size += len(text)
                characters |= set(text)
    print(f'{len(paths):,} files, {len(sizes):,} documents, {sum(sizes):,} characters')
    return sizes, characters

# -----------------------------------------------------------------------------
# rows, which have numbers and can be shuffled


def load_rows(folder, source, name, config=None, split='train', prefix=''):
    """
    A split of a dataset of the Hugging Face hub, or local .parquet and .jsonl files in its place ->
    a datasets.Dataset with a column `text`. Raises OSError if the hub cannot be reached.

    Args:
        folder: Path of the dataset, where the rows of local files are cached while it is prepared
        source: the file or folder to read; '': the hub
        name, config, split: of the hub's dataset
        prefix: of the names of the split's local files
    """
    get_tokenizer({'kind': 'gpt2'})  # raises before a long download, not after it
    if source:
        paths = find_files(source, ('.parquet', '.jsonl'), prefix)
        return _load_local_rows(paths, folder / ROWS_CACHE)
    return _load_hub_rows(name, config, split)


def _load_local_rows(paths, cache_dir):
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    try:
        return Dataset.from_generator(_generate_rows, cache_dir=str(cache_dir),
                                      gen_kwargs={'paths': paths})
    except DatasetGenerationError as error:
        raise error.__cause__ from None


def _generate_rows(paths):
    for path in paths:
        for text in read_rows(path):
            yield {'text': text}


def _load_hub_rows(name, config, split):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    try:
        try:
            return load_dataset(name, config, split=split)
        except RuntimeError:  # its repository holds a loading script, which datasets does not run
            return load_dataset(name, config, split=split, revision='refs/convert/parquet')
    except (OSError, ValueError, DatasetsError) as error:
        raise OSError(f'could not load {name} from the Hugging Face hub ({error}); --source=FOLDER '
                      'reads a local copy of its .parquet files, or .jsonl, instead') from None


def texts_of_rows(rows):
    """ The texts of `rows`, a datasets.Dataset, without END_OF_DOCUMENT. """
    for start in range(0, len(rows), 1000):  # row by row, datasets takes many times as long
        yield from rows['text'][start:start + 1000]

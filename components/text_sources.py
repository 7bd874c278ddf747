"""
Where the prepare scripts get their texts: a download, local files, the Hugging Face hub.

A stream of texts is an iterable of str, with END_OF_DOCUMENT wherever a document ends. A long
document may come in several pieces.

Not here: how texts become token ids (text_to_bins.py).
"""
import json
import os
import urllib.request
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
    Hidden files are skipped. Raises UserError if no file is left.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise UserError(f'{source} does not exist')
    if source.is_file():
        if '.txt' in suffixes:
            return [source]  # a text file may have any name
        candidates = [source]
    elif prefix:
        candidates = list(source.glob(f'{prefix}*'))
    else:
        candidates = _files_below(source)
    found = sorted(path for path in candidates if _is_wanted(path, suffixes))
    if not found:
        patterns = ' or '.join(f'{prefix}*{suffix}' for suffix in suffixes)
        raise UserError(f'{source}: no {patterns} in it')
    if len(found) < len(candidates):
        print(f'{len(candidates) - len(found):,} hidden files or files of other kinds are skipped')
    return found


def _is_wanted(path, suffixes):
    is_hidden = path.name.startswith('.')
    return path.suffix.lower() in suffixes and not is_hidden and path.is_file()


def _files_below(source):
    """ The files in `source` and its subfolders, except hidden folders and links to folders. """
    def raise_error(error):
        raise error

    files = []
    for folder, subfolders, names in os.walk(source, onerror=raise_error):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        files += [Path(folder, name) for name in names]
    return files


def read_texts(path):
    """
    The documents of a file as a stream of texts: the column `text` of each row of a .parquet file,
    the key `text` of each line of a .jsonl file; any other file is one document in UTF-8. Raises
    UserError with the row or line that cannot be read.
    """
    if path.suffix.lower() == '.parquet':
        return _read_parquet(path)
    if path.suffix.lower() == '.jsonl':
        return _read_jsonl(path)
    return _read_txt(path)


def _read_parquet(path):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    row = 0
    try:
        with ParquetFile(path, memory_map=True) as file:
            if 'text' not in file.schema_arrow.names:
                raise UserError(f"{path}: no column 'text'")
            for batch in file.iter_batches(100, columns=['text']):
                for text in batch['text'].to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f'{path}: row {row}: {text!r:.50} is not a text')
                    yield text
                    yield END_OF_DOCUMENT
    except (ArrowException, OSError) as error:
        raise UserError(f'{path}: {error}') from None


def _read_jsonl(path):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _parse_json_line(line)
            except ValueError as error:  # of decoding UTF-8 and JSON too
                raise UserError(f'{path}, line {number}: {error}') from None
            yield END_OF_DOCUMENT


def _parse_json_line(line):
    row = json.loads(line.decode('utf-8-sig'))
    if not isinstance(row, dict) or not isinstance(row.get('text'), str):
        raise ValueError("no key 'text' with a string")
    row['text'].encode()  # raises if the text holds half of a surrogate pair
    return row['text']


PIECE_SIZE = 2**20  # characters


def _read_txt(path):
    """
    A text longer than PIECE_SIZE comes in pieces. Each ends before the white space at the end of a
    line, where no token of GPT-2 continues, so the tokens are those of the whole text.
    """
    if path.stat().st_size == 0:
        return
    piece = ''
    try:
        with open(path, encoding='utf-8-sig') as file:
            while lines := file.readlines(PIECE_SIZE):
                piece += ''.join(lines)
                end = len(piece.rstrip())
                if end > 0 and len(piece) >= PIECE_SIZE:
                    yield piece[:end]
                    piece = piece[end:]
    except UnicodeDecodeError:
        raise UserError(f'{path}, line {_line_not_in_utf8(path)}: not in UTF-8') from None
    yield piece
    yield END_OF_DOCUMENT


def _line_not_in_utf8(path):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def read_text(path):
    """ The whole text of a file in UTF-8. Raises UserError with the line that cannot be read. """
    pieces = [piece for piece in _read_txt(path) if piece is not END_OF_DOCUMENT]
    return ''.join(pieces)


def read_files(paths):
    """ `read_texts` of several files, one after the other. """
    for path in paths:
        yield from read_texts(path)


def count_texts(paths):
    """
    Reads all files -> the number of documents, the number of characters, and the set of distinct
    characters. Raises UserError if a file cannot be read.
    """
    num_documents = 0
    num_characters = 0
    characters = set()
    for path in tqdm(paths, desc='reading', unit=' files', disable=None):
        for text in read_texts(path):
            if text is END_OF_DOCUMENT:
                num_documents += 1
            else:
                num_characters += len(text)
                characters |= set(text)
    print(f'{len(paths):,} files, {num_documents:,} documents, {num_characters:,} characters')
    return num_documents, num_characters, characters

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
    for text in read_files(paths):
        if text is not END_OF_DOCUMENT:
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

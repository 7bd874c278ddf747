"""
From texts to bins: what the scripts data/*/prepare.py share.

A text comes by `download`, from files (`find_texts`, `read_texts`) or from the Hugging Face hub
(`load_rows`), and goes into bins by `write_bins`. On its way it is an iterable of str, with None where
a document ends. What a dataset on disk looks like is in bins.py; which text it is, in prepare.py.
"""
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import urllib.request
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bins import check_disk, get_tokenizer, meta_of, one_line_errors, whole_file


@contextmanager
def preparing(folder):
    """
    The block of a prepare script: errors in one line, and nothing left of folder/parts.tmp, where
    unfinished work is. But a run that was killed or interrupted leaves it to the next, and an error does
    not remove what an earlier run left. Of one folder there is one preparation at a time.
    """
    scratch, new = folder / 'parts.tmp', not folder.exists()
    owner = scratch / 'process'
    with one_line_errors(), ExitStack() as stack:
        keep = scratch.exists()
        scratch.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(open(owner, 'w'))  # the system ends it with the process
        with suppress(ImportError):  # Windows
            from fcntl import LOCK_EX, LOCK_NB, flock
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ValueError(f'another process is preparing {folder}; wait for it') from None
        try:
            yield
            keep = False
        except (KeyboardInterrupt, BrokenExecutor) as error:  # a worker died, most likely for want of memory
            keep = True
            raise OSError(f'{str(error) or "interrupted."} The same command takes up what is done') from None
        finally:
            stack.close()
            owner.unlink(missing_ok=True)
            if not keep:
                shutil.rmtree(scratch, ignore_errors=True)
                if scratch.exists():  # Windows keeps what is mapped
                    print(f'{scratch} is done with; remove it')
                if new and not any(folder.iterdir()):
                    folder.rmdir()

# -----------------------------------------------------------------------------
# where texts come from

def download(url, path, digest=None):
    """ Fetches `url` into `path`, if nothing is there. Raises OSError on failure or another SHA-256. """
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            content = reply.read()  # raises where less comes than was announced
        if digest and sha256(content).hexdigest() != digest:
            raise OSError('what came is not the text that was expected')
    except (OSError, HTTPException) as error:
        raise OSError(f'could not download {url} ({error}). Save that text as {path} and run this '
                      'again, or run data/python_char/prepare.py, which needs no network') from None
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _raise(error):
    raise error


def find_texts(source, *suffixes, prefix=''):
    """ Files of these suffixes: `source`, or all below it, or with `prefix` those of that name in it. """
    source = Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f'{source} is not there')
    if source.is_file() and '.txt' in suffixes:
        return [source]  # by whatever name
    paths = [source]
    if source.is_dir():
        paths = []
        for folder, inner, names in os.walk(source, onerror=_raise):
            inner[:] = [name for name in inner if name[0] != '.' and not prefix]
            paths += [Path(folder, name) for name in names if name.startswith(prefix)]
            paths += [Path(folder, name) for name in inner if os.path.islink(Path(folder, name))]
    found = sorted(path for path in paths if path.suffix.lower() in suffixes and path.is_file()
                   and path.name[0] != '.')
    if not found:
        hint = '' if '.txt' in suffixes else '; data/custom/prepare.py takes .txt'
        raise ValueError(f'{source}: no {" or ".join(prefix + "*" + suffix for suffix in suffixes)}{hint}')
    if left_out := len(paths) - len(found):
        print(f'{left_out:,} files of other kinds, hidden files or links to folders are left out')
    return found


def _read_parquet(path):
    from pyarrow.parquet import ParquetFile
    row = 0
    try:
        with ParquetFile(path, memory_map=True) as file:
            if 'text' not in file.schema_arrow.names:
                raise ValueError(f'no column text, but {", ".join(file.schema_arrow.names)}')
            for batch in file.iter_batches(100, columns=['text']):
                for row, text in enumerate(batch['text'].to_pylist(), row + 1):
                    if not isinstance(text, str):
                        raise ValueError(f'row {row}: {text!r:.50} is no text')
                    yield text
                    yield None
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ValueError(f'{path}: {error}') from None


def _read_jsonl(path):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.strip():
                    continue
                row = json.loads(line.decode('utf-8-sig'))
                if not isinstance(row, dict) or not isinstance(row.get('text'), str):
                    raise ValueError('no key text with a text')
                row['text'].encode()  # not half of a surrogate pair
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{path}, line {number}: {error}') from None
            yield row['text']
            yield None


SPACES = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')  # GPT-2's


def _read_plain(path):
    number, text = 0, ''
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        while lines := file.readlines(2**20):
            new = ''.join(lines)
            try:
                new.encode()
            except UnicodeEncodeError as error:
                number += new.count('\n', 0, error.start) + 1
                raise ValueError(f'{path}, line {number}: not in UTF-8; save it as such') from None
            number += len(lines)
            text += new
            end = len(text.rstrip(SPACES))
            if end and len(text) >= 2**20:
                yield text[:end]
                text = text[end:]
    if number:
        yield text
        yield None


def read_texts(path):
    """
    Yields the texts of a .parquet file (its column text), of a .jsonl file (the key text of each line),
    or of any other, which is one text in UTF-8; and None after each. A text longer than a million characters
    comes in pieces of about that, cut behind the last word of a line, where no token of GPT-2 goes on.
    Raises ValueError, with the line.
    """
    return {'.parquet': _read_parquet, '.jsonl': _read_jsonl}.get(path.suffix.lower(), _read_plain)(path)


def survey(paths, record):
    """
    A first look at files -> how many documents and characters they have, the set of these (GPT-2's: empty).
    Raises ValueError where one can't be read, or a Hugging Face tokenizer has no token for a character.
    """
    documents, characters, known = 0, 0, set()
    encode = get_tokenizer(record)[0] if record['kind'] == 'hf' else len  # never 0: the others lack none
    with tqdm(desc='reading', unit=' characters', unit_scale=True) as bar:
        for path in paths:
            for text in read_texts(path):
                bar.update(len(text or ''))
                documents += text is None
                characters += len(text or '')
                new = set() if record['kind'] == 'gpt2' else set(text or '') - known
                known |= new
                if lacking := [c for c in sorted(new) if not c.isspace() and not encode(c)]:
                    with open(path, encoding='utf-8', errors='ignore') as file:
                        at = next((f', line {i}' for i, row in enumerate(file, 1) if lacking[0] in row), '')
                    raise ValueError(f'{path}{at}: the tokenizer has no token for {lacking[0]!r}')
    if not characters:
        raise ValueError(f'{paths[0]}{", ..." if paths[1:] else ""}: there is no text in it')
    print(f'{len(paths):,} files, {documents:,} documents, {characters:,} characters')
    return documents, characters, known


def load_rows(folder, source, name, config=None, split='train', prefix=''):
    """
    The split of a dataset of the hub, or of `source`, a local .parquet or .jsonl file or a folder of them
    (those whose names begin with `prefix`) -> datasets.Dataset with a column text, mapped from the disk:
    the hub's from its own cache, the local one from folder/parts.tmp. Raises OSError or ValueError.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError
    get_tokenizer({'kind': 'gpt2'})  # where it is missing, this is the time to say so
    if source:
        paths = find_texts(source, '.parquet', '.jsonl', prefix=prefix)
        check_disk(folder, sum(path.stat().st_size for path in paths))  # at least
        try:
            return Dataset.from_generator(_local_rows, cache_dir=str(folder / 'parts.tmp'), gen_kwargs={
                'paths': paths, 'times': [path.stat().st_mtime_ns for path in paths]})
        except DatasetsError as error:
            raise ValueError(f'{folder}: {error.__cause__ or error}') from None
    try:
        try:
            return load_dataset(name, config, split=split)
        except RuntimeError:  # the repository holds a loading script, which datasets no longer runs
            return load_dataset(name, config, split=split, revision='refs/convert/parquet')
    except (OSError, ValueError, DatasetsError) as error:
        raise OSError(f'could not load {name} from the Hugging Face hub ({error}); --source=FOLDER takes a '
                      'copy of its .parquet files, or .jsonl, instead') from None


def _local_rows(paths, times):
    """ `times`: part of what datasets names its cache by, so that a changed file is read anew. """
    for path in paths:
        yield from ({'text': text} for text in read_texts(path) if text is not None)


def each(rows, *after):
    """ The texts of `rows`, a Dataset with a column text, each followed by `after`: None ends a document. """
    for start in range(0, len(rows), 1000):
        for text in rows['text'][start:start + 1000]:
            yield text
            yield from after

# -----------------------------------------------------------------------------
# into bins

def _start_worker(record):
    global _tokenizer
    _tokenizer = record, *get_tokenizer(record)
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, and with it this one ends
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(prefix, texts):
    """ In a worker: the ids of `texts` -> their file, named by its contents and kept if it is there. """
    record, encode, _, _, end = _tokenizer
    path = Path(f'{prefix}-{sha256(pickle.dumps((record, texts))).hexdigest()[:16]}')
    if not path.exists():
        end = [] if end is None else [end]
        ids = [np.asarray(end if text is None else encode(text), dtype=np.uint32) for text in texts]
        ids = np.concatenate([np.zeros(0, np.uint32), *ids])
        if ids.size and ids.max() >= 2**16:
            raise ValueError(f'token id {ids.max()} does not fit into uint16')
        check_disk(path.parent, 2 * ids.size)
        with whole_file(path) as temporary:
            temporary.write_bytes(ids.astype('<u2'))
    return path


def _batches(texts):
    """ Lists of some two million characters, and how many they have. """
    batch, n = [], 0
    for text in texts:
        batch.append(text)
        n += len(text or '')
        if n + len(batch) >= 2**21:
            yield batch, n
            batch, n = [], 0
    yield batch, n


def write_bins(folder, splits, record, size):
    """
    Encodes `splits`, {name: texts}, with the tokenizer of `record` (bins.py) on all cores, and writes
    {name}.bin of each and meta.pkl into `folder`. `size`, the characters in all, is for the bar and the
    disk. Batches that are finished wait in folder/parts.tmp: an interrupted preparation, run again, takes
    them up. Raises ValueError or OSError.
    """
    _, _, vocab_size, _ = get_tokenizer(record)  # here its errors are seen
    if vocab_size > 2**16:
        raise ValueError(f'a vocabulary of {vocab_size:,} does not fit into uint16, which holds 65,536')
    names = [folder / f'{name}.bin' for name in ('train', 'val', 'test')]
    for path in names:
        Path(f'{path}.tmp').unlink(missing_ok=True)  # of a run that was killed
    scratch = folder / 'parts.tmp'
    scratch.mkdir(parents=True, exist_ok=True)
    waiting = sum(path.stat().st_size for path in scratch.glob('*-*') if path.suffix != '.tmp')
    if waiting:
        print(f'{waiting / 1e6:,.1f} MB of tokens are there from an interrupted run')
    check_disk(folder, size * (4 if record['kind'] == 'char' else 1) - waiting)  # batches and bins

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else min(os.cpu_count(), 61)
    if size < 2**22:  # encoded before a process has started
        pool, cores = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(record,)), 1
    else:
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context('spawn'), _start_worker, (record,))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the processes inherit
        for _ in range(cores):
            pool.submit(int)  # starts one
        signal.signal(signal.SIGINT, handler)
    parts, running = {split: [] for split in splits}, deque()
    bar = tqdm(total=size, unit=' characters', unit_scale=True,
               mininterval=0.1 if sys.stderr.isatty() else 30)  # seconds between lines of a log file

    def collect(until):
        while len(running) > until:
            split, n, job = running.popleft()
            parts[split].append(job.result())
            bar.update(n)

    with bar, pool:
        try:
            for split, texts in splits.items():
                for index, (batch, n) in enumerate(_batches(texts)):
                    running.append((split, n, pool.submit(_encode, scratch / f'{split}-{index:06}', batch)))
                    collect(until=2 * cores)  # no more text in memory than keeps them busy
            collect(until=0)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would break the pool's own end
            pool.shutdown(cancel_futures=True)
            raise
        bar.total = bar.n  # `size` may be of bytes

    sizes = {split: sum(path.stat().st_size for path in parts[split]) for split in splits}
    check_disk(folder, sum(sizes.values()))
    meta = pickle.dumps(meta_of(record, vocab_size))
    meta_path = folder / 'meta.pkl'
    with ExitStack() as files:  # all are written before the first is renamed, which is meta.pkl
        for split in splits:
            if not sizes[split]:
                raise ValueError(f'{folder}: no text is left for {split}.bin')
            with open(files.enter_context(whole_file(folder / f'{split}.bin')), 'wb') as out:
                for path in parts[split]:
                    with open(path, 'rb') as part:
                        shutil.copyfileobj(part, out)
                out.flush()
                os.fsync(out.fileno())
        if record['kind'] != 'gpt2':
            files.enter_context(whole_file(meta_path)).write_bytes(meta)
        if (meta_path.read_bytes() if meta_path.exists() else pickle.dumps(None)) != meta:
            for path in (*names, meta_path):  # old bins with a new vocabulary, or without theirs
                path.unlink(missing_ok=True)
    print(f'vocabulary: {vocab_size:,} {"characters" if record["kind"] == "char" else "tokens"}')
    for split in splits:
        print(f'{split}.bin: {sizes[split] // 2:,} tokens')

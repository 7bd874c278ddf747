"""
Encodes texts on all cores and writes train.bin, val.bin and meta.pkl of a dataset.

Finished batches of token ids are files in <dataset>/parts.tmp until all are done. A preparation
that was interrupted continues with them when the same command runs again.

Not here: where the texts come from (text_sources.py), tokenizers and meta.pkl (tokenizer.py), and
reading the bins (dataset.py).
"""
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from components.errors import UserError, one_line_errors
from components.files import check_free_space, lock_directory, whole_file
from components.text_sources import END_OF_DOCUMENT
from components.tokenizer import MAX_VOCAB_SIZE, get_tokenizer, meta_of

SPLITS = ('train', 'val', 'test')
BATCH_SIZE = 2**21  # characters that a worker encodes at a time
SMALL_SIZE = 2**22  # characters that are encoded sooner than worker processes start


@contextmanager
def preparing(folder):
    """
    The block of a prepare script. Errors end it with one line, and `folder` is locked against other
    preparations. parts.tmp is removed when the block succeeds, and when its input is refused; after
    any other error, and after Ctrl-C, it stays for the next run. A refused input does not remove
    what an earlier run left.
    """
    parts = folder / 'parts.tmp'
    had_parts = parts.exists()
    is_new = not folder.exists()
    with one_line_errors():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock_directory(folder)
        except UserError:
            raise UserError(f'another process is preparing {folder}; wait for it') from None
        try:
            yield
            shutil.rmtree(parts, ignore_errors=True)
        except UserError:
            if not had_parts:
                shutil.rmtree(parts, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            raise UserError('interrupted; run the same command to continue') from None
        except BrokenExecutor as error:
            raise UserError(f'{error} Perhaps memory ran out; run the same command to '
                            'continue') from None
        finally:
            if is_new and not any(folder.iterdir()):
                folder.rmdir()

# -----------------------------------------------------------------------------
# encoding on all cores


def _start_worker(record):
    global _record, _tokenizer
    _record = record
    _tokenizer = get_tokenizer(record)
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    """ Ends this worker when its parent ends, even if that is killed. """
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(prefix, texts):
    """
    Encodes a batch in a worker -> the path of the file with its ids. Its name holds the hash of the
    texts and the tokenizer, so a file from an interrupted run is used only for the same batch.
    """
    digest = sha256(pickle.dumps((_record, texts))).hexdigest()
    path = Path(f'{prefix}-{digest[:16]}')
    if path.exists():
        return path
    ids = []
    for text in texts:
        if text is not END_OF_DOCUMENT:
            ids += _tokenizer.encode(text)
        elif _tokenizer.end_of_text is not None:
            ids.append(_tokenizer.end_of_text)
    with whole_file(path) as temporary:
        temporary.write_bytes(np.array(ids, dtype='<u2'))
    return path


@contextmanager
def _worker_pool(record, num_characters):
    """ Yields an executor for `_encode`. """
    if num_characters < SMALL_SIZE:
        pool = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(record,))
    else:
        context = multiprocessing.get_context('spawn')
        pool = ProcessPoolExecutor(_num_cores(), context, _start_worker, (record,))
        # Ctrl-C goes to all processes. Workers inherit that it is ignored; the parent ends them
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(_num_cores()):
            pool.submit(int)  # starts a worker
        signal.signal(signal.SIGINT, handler)
    try:
        yield pool
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the shutdown
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _num_cores():
    """ The number of cores that this process may use. """
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return min(os.cpu_count(), 61)  # the most that ProcessPoolExecutor allows on Windows


def _batches(texts):
    """ Yields lists of texts with about BATCH_SIZE characters, and their number of characters. """
    batch = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        if text is not END_OF_DOCUMENT:
            num_characters += len(text)
        if num_characters + len(batch) >= BATCH_SIZE:  # empty texts fill a batch too
            yield batch, num_characters
            batch = []
            num_characters = 0
    if batch:
        yield batch, num_characters


def _encode_split(pool, prefix, texts, progress):
    """ Encodes a stream of texts -> the paths of its batches of ids, in order. """
    paths = []
    running = deque()

    def collect():
        future, num_characters = running.popleft()
        paths.append(future.result())
        progress.update(num_characters)

    for index, (batch, num_characters) in enumerate(_batches(texts)):
        future = pool.submit(_encode, f'{prefix}-{index:06}', batch)
        running.append((future, num_characters))
        if len(running) > 2 * _num_cores():  # no more texts in memory than keep the workers busy
            collect()
    while running:
        collect()
    return paths

# -----------------------------------------------------------------------------
# writing


def write_bins(folder, splits, record, num_characters):
    """
    Encodes a dataset and writes its bins and meta.pkl. Raises UserError if the vocabulary does not
    fit into uint16, or a split has no text; OSError if the disk is full.

    Args:
        folder: Path of the dataset
        splits: {'train', 'val' or 'test': stream of texts}
        record: the tokenizer's (tokenizer.py)
        num_characters: of all splits together; an estimate will do
    """
    tokenizer = get_tokenizer(record)
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f'the vocabulary has {tokenizer.vocab_size:,} tokens, and bins hold '
                        f'{MAX_VOCAB_SIZE:,} (uint16); choose another tokenizer')
    for split in SPLITS:
        Path(folder, f'{split}.bin.tmp').unlink(missing_ok=True)  # left by an interrupted run
    parts = folder / 'parts.tmp'
    _check_disk(parts, record, num_characters)
    parts.mkdir(parents=True, exist_ok=True)

    seconds = 0.1 if sys.stderr.isatty() else 30  # between updates, which are lines of a log file
    progress = tqdm(total=num_characters, unit=' characters', unit_scale=True, mininterval=seconds)
    paths = {}
    with progress, _worker_pool(record, num_characters) as pool:
        for split, texts in splits.items():
            paths[split] = _encode_split(pool, parts / split, texts, progress)

    num_tokens = {}
    for split in splits:
        num_tokens[split] = sum(path.stat().st_size for path in paths[split]) // 2
        if num_tokens[split] == 0:
            raise UserError(f'{folder}: no text is left for {split}.bin')
    _write_files(folder, paths, meta_of(record, tokenizer.vocab_size))
    print(f'vocabulary size: {tokenizer.vocab_size:,}')
    for split in splits:
        print(f'{split}.bin: {num_tokens[split]:,} tokens')


def _check_disk(parts, record, num_characters):
    """ Raises OSError if the batches and the bins, which are as large, do not fit on the disk. """
    finished = sum(path.stat().st_size for path in parts.glob('*-*'))
    if finished > 0:
        print(f'continuing with {finished / 1e6:,.1f} MB of tokens from an interrupted run')
    # 2 bytes a token, twice. Other tokens than characters hold about 4 characters
    bytes_per_character = 4 if record['kind'] == 'char' else 1
    check_free_space(parts.parent, bytes_per_character * num_characters - finished)


def _write_files(folder, paths, meta):
    """
    Joins the batches of each split and replaces the old files, in an order that never leaves bins
    beside the meta.pkl of another vocabulary, even if the process is killed.
    """
    meta_path = folder / 'meta.pkl'
    old_meta = meta_path.read_bytes() if meta_path.exists() else None
    new_meta = None if meta is None else pickle.dumps(meta)

    with ExitStack() as stack:
        for split in paths:
            temporary = stack.enter_context(whole_file(folder / f'{split}.bin'))
            _join_files(paths[split], temporary)
        if new_meta is not None:
            temporary = stack.enter_context(whole_file(meta_path))
            temporary.write_bytes(new_meta)
        if new_meta != old_meta:
            for split in SPLITS:
                Path(folder, f'{split}.bin').unlink(missing_ok=True)
            meta_path.unlink(missing_ok=True)
        # Here the stack renames the temporary files, the last one first: meta.pkl, then the bins


def _join_files(paths, joined):
    with open(joined, 'wb') as out:
        for path in paths:
            with open(path, 'rb') as part:
                shutil.copyfileobj(part, out)

"""
Encodes texts on all cores and writes train.bin, val.bin and meta.pkl of a dataset.

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

import numpy as np
from tqdm import tqdm

from components.errors import UserError, one_line_errors
from components.files import check_free_space, lock_directory, whole_file
from components.text_sources import END_OF_DOCUMENT, ROWS_CACHE
from components.tokenizer import (
    MAX_VOCAB_SIZE,
    get_tokenizer,
    has_tokens_of,
    load_meta,
    meta_of,
    tokenizer_spec,
)

SPLITS = ('train', 'val', 'test')
BATCH_SIZE = 2**21  # characters that a worker encodes at a time
SMALL_SIZE = 2**22  # characters that are encoded sooner than worker processes start


@contextmanager
def preparing(folder):
    """
    The block of a prepare script. Errors and Ctrl-C end it with one line, the old bins stay, and
    `folder` is locked against other preparations.
    """
    with one_line_errors():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock_directory(folder)
        except UserError:
            raise UserError(f'another process is preparing {folder}; wait for it') from None
        _remove_temporary_files(folder)  # left by a killed preparation
        try:
            yield
        except KeyboardInterrupt:
            raise UserError('interrupted') from None
        except BrokenExecutor as error:
            raise UserError(f'{error} Perhaps memory ran out.') from None
        finally:
            _remove_temporary_files(folder)


def _remove_temporary_files(folder):
    shutil.rmtree(folder / ROWS_CACHE, ignore_errors=True)
    for split in SPLITS:
        (folder / f'{split}.bin.tmp').unlink(missing_ok=True)


def write_bins(folder, splits, spec, num_characters, special=False):
    """
    Encodes a dataset and writes its bins and meta.pkl -> {split: number of tokens}. Raises
    UserError if the vocabulary does not fit into uint16, or a split has no text; OSError if the
    disk is full.

    Args:
        folder: Path of the dataset
        splits: {'train', 'val' or 'test': stream of texts}
        spec: the tokenizer's (tokenizer.py)
        num_characters: of all splits together; an estimate will do
        special: whether the name of a special token in a text becomes that token (tokenizer.py)
    """
    vocab_size = get_tokenizer(spec).vocab_size
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f'the vocabulary has {vocab_size:,} tokens, and bins hold '
                        f'{MAX_VOCAB_SIZE:,} (uint16); choose another tokenizer')
    tokens_per_character = 1 if spec['kind'] == 'char' else 0.25
    check_free_space(folder, 2 * tokens_per_character * num_characters)

    seconds = 0.1 if sys.stderr.isatty() else 30  # between updates, which are lines of a log file
    progress = tqdm(total=num_characters, unit=' characters', unit_scale=True, mininterval=seconds)
    num_tokens = {}
    with ExitStack() as files:
        with progress, _worker_pool(spec, special, num_characters) as pool:
            for split, texts in splits.items():
                temporary = files.enter_context(whole_file(folder / f'{split}.bin'))
                num_tokens[split] = _write_split(temporary, pool, texts, progress)
                if num_tokens[split] == 0:
                    raise UserError(f'{folder}: no text is left for {split}.bin')
        _note_other_vocabulary(folder, spec)
        _write_meta(folder, meta_of(spec, vocab_size), files)
        # Here the temporary files are renamed, the last one first: meta.pkl, then the bins

    for split in set(SPLITS) - set(splits):
        (folder / f'{split}.bin').unlink(missing_ok=True)  # of another text
    print(f'vocabulary size: {vocab_size:,}')
    for split in splits:
        share = num_tokens[split] / sum(num_tokens.values())
        print(f'{split}.bin: {num_tokens[split]:,} tokens ({share:.2%})')
    return num_tokens


def _note_other_vocabulary(folder, spec):
    """ Prints a line if a model that was trained on the old bins cannot read the new ones. """
    if not (folder / 'train.bin').exists():
        return
    try:
        old_spec = tokenizer_spec(load_meta(folder))
    except UserError:  # a damaged meta.pkl
        return
    if old_spec is not None and not has_tokens_of(old_spec, spec):
        print(f'NOTE: the vocabulary of {folder} changes, and checkpoints of the old one cannot be '
              'resumed with it; --tokenizer=PATH/ckpt.pt of data/custom/prepare.py prepares a text '
              'with the vocabulary of a checkpoint')


def _write_split(path, pool, texts, progress):
    """ Encodes a stream of texts into the file `path` -> the number of its tokens. """
    with open(path, 'wb') as file:
        for ids, num_characters in _encode_in_order(pool, texts):
            file.write(ids)
            progress.update(num_characters)
        return file.tell() // 2


def _write_meta(folder, meta, files):
    """
    Writes meta.pkl as a file of the stack `files`. Where it changes, the old files are removed
    first: bins are never beside the meta.pkl of another vocabulary, even if the process is killed.
    """
    path = folder / 'meta.pkl'
    old_content = path.read_bytes() if path.exists() else None
    new_content = None
    if meta is not None:
        new_content = pickle.dumps(meta)
        temporary = files.enter_context(whole_file(path))
        temporary.write_bytes(new_content)
    if new_content != old_content:
        for split in SPLITS:
            (folder / f'{split}.bin').unlink(missing_ok=True)
        path.unlink(missing_ok=True)

# -----------------------------------------------------------------------------
# encoding on all cores


def _encode_in_order(pool, texts):
    """ Yields of each batch its ids, as the bytes of a bin, and its number of characters. """
    running = deque()
    for batch in _batches(texts):
        running.append(pool.submit(_encode, batch))
        if len(running) > 2 * _num_cores():  # no more texts in memory than keep the workers busy
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _batches(texts):
    """ Yields lists of texts with about BATCH_SIZE characters. """
    batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += 1  # so that empty texts fill a batch too
        if text is not END_OF_DOCUMENT:
            size += len(text)
        if size >= BATCH_SIZE:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


@contextmanager
def _worker_pool(spec, special, num_characters):
    """ Yields an executor for `_encode`. """
    if num_characters < SMALL_SIZE:
        pool = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(spec, special))
    else:
        context = multiprocessing.get_context('spawn')
        pool = ProcessPoolExecutor(_num_cores(), context, _start_worker, (spec, special))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _num_cores():
    """ The number of cores that this process may use. """
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return min(os.cpu_count(), 61)  # the most that ProcessPoolExecutor allows on Windows


def _start_worker(spec, special):
    global _tokenizer, _special
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends workers
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    _tokenizer = get_tokenizer(spec)
    _special = special


def _exit_with_parent():
    """ Ends this worker when its parent ends, even if that is killed. """
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(texts):
    end = _tokenizer.end_of_text
    ids = []
    num_characters = 0
    for text in texts:
        if text is not END_OF_DOCUMENT:
            ids += _tokenizer.encode(text, _special)
            num_characters += len(text)
        elif end is not None and not (_special and ids[-1:] == [end]):  # a text may end with it
            ids.append(end)
    return np.array(ids, dtype='<u2').tobytes(), num_characters

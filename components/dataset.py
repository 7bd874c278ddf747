"""
A dataset of token ids: data/<dataset>/train.bin and val.bin, each one stream of little-endian
uint16.

Not here: tokenizers and meta.pkl (tokenizer.py), how texts become bins (text_to_bins.py), which of
the windows below train.py reads (get_batch in train.py).
"""
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256

import numpy as np

from components.device import use_device
from components.distributed import broadcast
from components.errors import UserError
from components.tokenizer import DATA_DIR, load_meta, tokenizer_spec


def open_dataset(dataset, splits, block_size):
    """
    Opens splits of a dataset. Raises UserError if one is missing or broken, or if this machine has
    another dataset of this name than the first machine of the job.

    Returns:
        {split: token ids}, the size of the vocabulary, and the tokenizer's spec or None
    """
    meta = load_meta(dataset)
    vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64
    if meta is not None:
        vocab_size = meta['vocab_size']
    data = {split: open_bin(dataset, split, block_size, vocab_size) for split in splits}
    spec = tokenizer_spec(meta)
    check_same_on_all_machines(data, dataset, spec)
    return data, vocab_size, spec


def open_bin(dataset, split, block_size, vocab_size):
    """
    Opens a split of a dataset.

    Raises UserError, with the command to run, if the file is missing, is too short for a window,
    or holds tokens outside the vocabulary (only a part is checked).

    Returns its token ids: uint16 (N,), mapped from the disk, read-only.
    """
    path = DATA_DIR / dataset / f'{split}.bin'
    how_to_prepare = preparation_hint(dataset)
    if not path.exists():
        raise UserError(f'{path} does not exist; {how_to_prepare}')
    size = path.stat().st_size
    if size < 4 or size % 2 != 0:
        raise UserError(f'{path}: {size:,} bytes are not uint16 tokens; {how_to_prepare}')
    num_tokens = size // 2
    if num_tokens < block_size + 1:
        smallest = min(bin.stat().st_size // 2 for bin in path.parent.glob('*.bin'))
        raise UserError(f'{path} holds {num_tokens:,} tokens, too few for block_size={block_size}; '
                        f'at most --block_size={smallest - 1} fits all splits')
    ids = np.asarray(np.memmap(path, dtype='<u2', mode='r'))
    if looks_like_wider_integers(ids):
        raise UserError(f'{path} holds tokens of 32 or 64 bits instead of uint16; {how_to_prepare}')
    largest = largest_id(ids)
    if largest >= vocab_size:
        raise UserError(f'{path} holds token {largest}, outside of a vocabulary of {vocab_size}; '
                        f'{how_to_prepare}')
    return ids


def preparation_hint(dataset):
    """ The command that prepares a dataset, or the names of the datasets that can be prepared. """
    available = sorted(script.parent.name for script in DATA_DIR.glob('*/prepare.py'))
    if dataset in available:
        return f'run: python data/{dataset}/prepare.py'
    return f'datasets with a prepare.py: {", ".join(available)}'


def looks_like_wider_integers(ids):
    """ Whether every second value at the beginning is 0, as in a file of uint32. """
    lower_halves = ids[:2048:2]
    upper_halves = ids[1:2048:2]
    return bool(lower_halves.any()) and not upper_halves.any()


def largest_id(ids):
    """ The largest token id in sample_of() a dataset; all of a large one would take minutes. """
    return int(sample_of(ids).max())


def sample_of(ids):
    """ 64 parts of 1024 tokens, evenly spaced and joined. """
    starts = np.linspace(0, len(ids) - 1, 64, dtype=np.int64)
    return np.concatenate([ids[start:start + 1024] for start in starts])


def check_same_on_all_machines(data, dataset, tokenizer):
    """
    Raises UserError if a split, or the tokenizer, is another on this machine than on the first: its
    size, or a checksum of a sample.

    Args:
        data: {split: token ids}
        dataset: its name
        tokenizer: its spec, or None
    """
    checksums = {'meta.pkl': sha256(repr(tokenizer).encode()).digest()}
    for split, ids in data.items():
        checksums[f'{split}.bin'] = (len(ids), sha256(sample_of(ids)).digest())
    of_first_process = broadcast(checksums)
    for name, value in checksums.items():
        if value != of_first_process[name]:
            raise UserError(f'{DATA_DIR / dataset / name} on this machine differs from that on the '
                            'first; every machine requires the same data folder')


# -----------------------------------------------------------------------------
# which windows a batch reads: where they start, int64 (batch_size,)

def random_starts(num_tokens, block_size, batch_size, seed):
    """ Uniformly random places of a text of num_tokens; `seed` is a tuple of ints. """
    rng = np.random.default_rng(seed)
    return rng.integers(num_tokens - block_size, size=batch_size)


def epoch_starts(num_tokens, block_size, batch_size, first, seed):
    """
    The windows `first` to `first + batch_size - 1` of training without replacement. An epoch reads
    adjacent windows, each once, in random order. Where the first of them starts is random, too: at
    most two windows at the ends of the text are missing.
    """
    windows_per_epoch = max(1, (num_tokens - 1) // block_size - 1)
    starts = []
    for number in range(first, first + batch_size):
        epoch, place = divmod(number, windows_per_epoch)
        offset, order = epoch_order(num_tokens, block_size, windows_per_epoch, (*seed, epoch))
        starts.append(offset + order[place] * block_size)
    return np.array(starts)


@lru_cache(maxsize=2)  # a batch may belong to two epochs
def epoch_order(num_tokens, block_size, num_windows, seed):
    """ Where the first window of an epoch starts, and the order of its windows. """
    rng = np.random.default_rng(seed)
    offset = rng.integers(num_tokens - num_windows * block_size)
    return offset, rng.permutation(num_windows)


def adjacent_starts(num_windows, block_size, batch_size, index):
    """ Batch `index` of the first num_windows adjacent windows, -1 after the last of them. """
    numbers = index * batch_size + np.arange(batch_size)
    return np.where(numbers < num_windows, numbers * block_size, -1)


def gather_windows(ids, starts, block_size):
    """
    Windows of block_size + 1 tokens: the inputs, and the target of the last one.

    Args:
        ids: (N,)
        starts: (B,)

    Returns: int64 (B, block_size + 1)
    """
    offsets = np.arange(block_size + 1)
    return ids[starts[:, None] + offsets].astype(np.int64)

# -----------------------------------------------------------------------------
# loading while the caller computes

def prefetch(load, calls, device, dtype):
    """
    Yields load(*arguments) for each of `calls`, in order. A thread loads the next batch while the
    caller computes with the one before.

    Args:
        load: a function that returns a batch
        calls: an iterable of its arguments, which may be infinite
        device, dtype: which the thread prepares to use
    """
    # not in a `with` block: Python may delete an unfinished generator within any other call, where
    # waiting for the thread can be a deadlock; the thread ends by itself when nothing refers to it
    thread = ThreadPoolExecutor(1, initializer=use_device, initargs=(device, dtype))
    upcoming = None
    for arguments in calls:
        current = upcoming
        upcoming = thread.submit(load, *arguments)
        if current is not None:
            yield current.result()
    if upcoming is not None:
        yield upcoming.result()

""" components/dataset.py: opening and checking bins, where windows start, loading ahead. """
import itertools
import threading

import numpy as np
import pytest
import torch

from components import dataset as dataset_module
from components.dataset import (
    adjacent_starts,
    check_same_on_all_machines,
    epoch_starts,
    gather_windows,
    largest_id,
    open_bin,
    open_dataset,
    prefetch,
    random_starts,
)
from components.errors import UserError


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """ An empty folder in place of data/. """
    monkeypatch.setattr(dataset_module, 'DATA_DIR', tmp_path)
    return tmp_path


def open_ids(folder, ids, dtype='<u2', **arguments):
    """ Opens a train.bin with these token ids. """
    np.asarray(ids).astype(dtype).tofile(folder / 'train.bin')
    return open_bin('.', 'train', **{'block_size': 8, 'vocab_size': 50304, **arguments})

# -----------------------------------------------------------------------------
# bins


def test_open_dataset(dataset):
    data, vocab_size, spec = open_dataset(dataset, ('train', 'val'), block_size=16)
    assert vocab_size == len(spec['itos']) == 12
    for split in ('train', 'val'):
        assert data[split].tolist() == np.fromfile(dataset / f'{split}.bin', '<u2').tolist()
        assert data[split].dtype == np.uint16
        assert not data[split].flags.writeable


def test_dataset_without_meta_has_the_vocabulary_of_gpt2(data_dir):
    open_ids(data_dir, range(100))
    _, vocab_size, spec = open_dataset(data_dir, ('train',), block_size=8)
    assert (vocab_size, spec) == (50304, {'kind': 'gpt2'})


@pytest.mark.parametrize('ids, arguments', [
    pytest.param(range(9), {}, id='one window'),
    pytest.param([0] * 5000, {}, id='zeros'),
    pytest.param(range(9), dict(vocab_size=9), id='largest token'),
    pytest.param([1, 256, 2**15], dict(block_size=2), id='high bytes'),
])
def test_valid_bin(data_dir, ids, arguments):
    assert open_ids(data_dir, ids, **arguments).tolist() == list(ids)


def test_block_size_that_fits_all_splits(data_dir):
    np.arange(5, dtype='<u2').tofile(data_dir / 'val.bin')
    with pytest.raises(UserError, match='8 tokens.* at most --block_size=4'):
        open_ids(data_dir, range(8))


@pytest.mark.parametrize('ids, dtype, arguments, message', [
    pytest.param([], '<u2', {}, '0 bytes', id='empty'),
    pytest.param([1] * 99, 'u1', {}, '99 bytes', id='half a token'),
    pytest.param(range(8), '<u2', {}, '8 tokens.*block_size=8.*--block_size=7', id='too short'),
    pytest.param(range(9), '<u2', dict(vocab_size=8), 'token 8.*vocabulary of 8', id='large token'),
    pytest.param(range(100), '<u4', {}, '32 or 64 bits', id='uint32'),
    pytest.param(range(100), '<u8', {}, '32 or 64 bits', id='uint64'),
])
def test_broken_bin(data_dir, ids, dtype, arguments, message):
    with pytest.raises(UserError, match=message):
        open_ids(data_dir, ids, dtype, **arguments)


@pytest.mark.parametrize('dataset, hint', [
    ('words', 'run: python data/words/prepare.py'),
    ('letters', 'datasets with a prepare.py: sentences, words'),
])
def test_missing_bin(data_dir, dataset, hint):
    for name in ('sentences', 'words'):
        (data_dir / name).mkdir()
        (data_dir / name / 'prepare.py').touch()
    with pytest.raises(UserError, match=f'train.bin does not exist; {hint}'):
        open_bin(dataset, 'train', block_size=8, vocab_size=100)


@pytest.mark.parametrize('ids', [
    pytest.param(range(9), id='short'),
    pytest.param(range(5000), id='at the end'),
    pytest.param(range(5000, 0, -1), id='at the beginning'),
    pytest.param([*range(70), 9000, *range(4930)], id='between'),  # a short bin is read completely
])
def test_largest_id(ids):
    assert largest_id(np.array(ids, dtype=np.uint16)) == max(ids)


@pytest.mark.parametrize('split, tokenizer, message', [
    ([1, 2, 3, 4], None, None),
    ([1, 2, 3], None, 'train.bin'),
    ([1, 2, 3, 5], None, 'train.bin'),
    ([1, 2, 3, 4], {'kind': 'gpt2'}, 'meta.pkl'),
])
def test_dataset_of_another_machine(monkeypatch, split, tokenizer, message):
    first_machine = []

    def broadcast(checksums):
        first_machine.append(checksums)
        return first_machine[0]
    monkeypatch.setattr(dataset_module, 'broadcast', broadcast)
    check_same_on_all_machines({'train': np.array([1, 2, 3, 4], np.uint16)}, 'words', None)
    other = {'train': np.array(split, np.uint16)}
    if message is None:
        check_same_on_all_machines(other, 'words', tokenizer)
        return
    with pytest.raises(UserError, match=message):
        check_same_on_all_machines(other, 'words', tokenizer)

# -----------------------------------------------------------------------------
# windows


def test_windows_equal_slices():
    ids = np.arange(1000, 1100, dtype=np.uint16)
    windows = gather_windows(ids, np.array([3, 91, 0]), block_size=8)
    assert windows.tolist() == [list(range(1000 + start, 1009 + start)) for start in (3, 91, 0)]
    assert windows.dtype == np.int64


def test_random_starts():
    starts = random_starts(12, 8, 1000, (1337, 0))
    assert set(starts) == {0, 1, 2, 3}  # the last target exists
    assert starts.tolist() == np.random.default_rng((1337, 0)).integers(4, size=1000).tolist()


def test_adjacent_starts():
    batches = [adjacent_starts(5, 8, 3, index).tolist() for index in (0, 1)]
    assert batches == [[0, 8, 16], [24, 32, -1]]


@pytest.mark.parametrize('num_tokens, num_windows', [(101, 11), (9, 1), (16, 1), (24, 1), (25, 2)])
def test_an_epoch_reads_each_window_once(num_tokens, num_windows):
    starts = [epoch_starts(num_tokens, 8, num_windows, epoch * num_windows, (1337,))
              for epoch in range(30)]
    for in_epoch in starts:
        assert len(in_epoch) == num_windows
        assert np.all(np.diff(np.sort(in_epoch)) == 8)  # adjacent
        assert in_epoch.min() >= 0
        assert in_epoch.max() + 8 < num_tokens  # the last target exists
    num_left_over = num_tokens - 8 * num_windows
    assert len({in_epoch.min() for in_epoch in starts}) > num_left_over // 2
    assert min(in_epoch.min() for in_epoch in starts) == 0


def test_epoch_starts_are_a_function_of_their_number_and_the_seed():
    together = epoch_starts(1000, 8, 500, 0, (1337,))
    parts = [epoch_starts(1000, 8, 50, first, (1337,)) for first in range(0, 500, 50)]
    assert together.tolist() == np.concatenate(parts).tolist()
    assert together.tolist() != epoch_starts(1000, 8, 500, 0, (1,)).tolist()
    first, second = together[:123], together[123:246]  # two epochs, each in another random order
    assert (first - first.min()).tolist() != (second - second.min()).tolist()
    assert first.tolist() != sorted(first)

# -----------------------------------------------------------------------------
# prefetch


def test_prefetch_keeps_the_order():
    calls = [(i, i + 1) for i in range(10)]
    products = prefetch(lambda a, b: a * b, calls, 'cpu', 'float32')
    assert list(products) == [i * (i + 1) for i in range(10)]
    assert list(prefetch(int, [], 'cpu', 'float32')) == []


def test_next_batch_is_loaded_by_one_other_thread_meanwhile(monkeypatch):
    used = []
    monkeypatch.setattr(dataset_module, 'use_device', lambda *device: used.append(device))
    calls = iter([(i,) for i in range(10)])
    is_loaded = [threading.Event() for _ in range(10)]
    threads = set()

    def load(i):
        threads.add(threading.get_ident())
        is_loaded[i].set()
        return i
    batches = prefetch(load, calls, 'cuda:1', 'bfloat16')
    assert next(batches) == 0
    assert is_loaded[1].wait(timeout=10)  # without a request
    assert next(calls) == (2,)  # one batch ahead; more would need memory
    assert next(batches) == 1
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert used == [('cuda:1', 'bfloat16')]


def test_error_of_the_thread_is_raised():
    batches = prefetch(torch.sqrt, [(torch.tensor(4.0),), ('four',)], 'cpu', 'float32')
    assert next(batches) == 2
    with pytest.raises(TypeError):
        next(batches)


def test_prefetch_thread_ends_with_its_generator():
    """ Without waiting for it: a generator may be deleted where waiting is a deadlock. """
    threads = []
    was_deleted_first = []
    is_deleted = threading.Event()

    def load(number):
        threads.append(threading.current_thread())
        if number > 0:
            was_deleted_first.append(is_deleted.wait(timeout=5))
        return number

    batches = prefetch(load, ((number,) for number in itertools.count()), 'cpu', 'float32')
    assert next(batches) == 0
    del batches  # returns, although the thread is loading
    is_deleted.set()
    threads[0].join(timeout=30)
    assert not threads[0].is_alive()
    assert was_deleted_first == [True]

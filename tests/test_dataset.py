""" components/dataset.py: opening and checking a bin, gathering windows, prefetching batches. """
import itertools
import threading

import numpy as np
import pytest
import torch

from components import dataset as dataset_module
from components.dataset import gather_windows, largest_id, open_bin, prefetch, shuffled_starts
from components.errors import UserError


def write_bin(folder, ids, dtype=np.uint16):
    folder.mkdir(exist_ok=True)
    np.asarray(ids).astype(dtype).tofile(folder / 'train.bin')


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """ An empty folder in place of data/. """
    monkeypatch.setattr(dataset_module, 'DATA_DIR', tmp_path)
    return tmp_path

# -----------------------------------------------------------------------------
# open_bin

def test_open_bin(data_dir):
    write_bin(data_dir / 'words', range(100))
    ids = open_bin('words', 'train', block_size=8, vocab_size=100)
    assert ids.tolist() == list(range(100))
    assert ids.dtype == np.uint16
    assert not ids.flags.writeable


def test_bytes_are_little_endian(data_dir):
    (data_dir / 'train.bin').write_bytes(b'\x01\x02\x03\x04')
    assert open_bin('.', 'train', block_size=1, vocab_size=50304).tolist() == [0x0201, 0x0403]


def test_dataset_of_an_absolute_path(tmp_path):
    write_bin(tmp_path / 'words', range(100))
    assert len(open_bin(tmp_path / 'words', 'train', block_size=8, vocab_size=100)) == 100


@pytest.mark.parametrize('content', [
    pytest.param(b'', id='empty'),
    pytest.param(b'ab', id='one token'),
    pytest.param(b'abcde', id='half a token'),
])
def test_broken_bin(data_dir, content):
    (data_dir / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=f'{len(content)} bytes are not uint16'):
        open_bin('.', 'train', block_size=1, vocab_size=50304)


def test_shortest_bin(data_dir):
    write_bin(data_dir / 'words', range(9))
    assert len(open_bin('words', 'train', block_size=8, vocab_size=50304)) == 9


def test_bin_too_short_for_a_window(data_dir):
    write_bin(data_dir / 'words', range(8))
    with pytest.raises(UserError, match='8 tokens, .*block_size=8; .*--block_size=7$'):
        open_bin('words', 'train', block_size=8, vocab_size=50304)


def test_token_outside_of_the_vocabulary(data_dir):
    write_bin(data_dir / 'words', range(100))
    with pytest.raises(UserError, match='token 99, .* vocabulary of 99; .*prepare.py'):
        open_bin('words', 'train', block_size=8, vocab_size=99)


@pytest.mark.parametrize('dtype', [np.uint32, np.uint64])
def test_tokens_of_more_than_16_bits(data_dir, dtype):
    write_bin(data_dir / 'words', range(100), dtype)
    with pytest.raises(UserError, match='32 or 64 bits'):
        open_bin('words', 'train', block_size=8, vocab_size=50304)


def test_zeros_are_tokens(data_dir):
    write_bin(data_dir / 'words', [0] * 5000)
    assert len(open_bin('words', 'train', block_size=8, vocab_size=50304)) == 5000

# -----------------------------------------------------------------------------
# what to do about a missing bin

def missing_bin(dataset, split='train'):
    """ Opens a bin that does not exist -> the message. """
    with pytest.raises(UserError, match=f'{split}.bin does not exist') as caught:
        open_bin(dataset, split, block_size=8, vocab_size=100)
    return str(caught.value)


def test_missing_bin_of_a_dataset(data_dir):
    (data_dir / 'words').mkdir()
    (data_dir / 'words/prepare.py').touch()
    assert missing_bin('words').endswith('; run: python data/words/prepare.py')


def test_missing_dataset(data_dir):
    for name in ('sentences', 'words'):
        (data_dir / name).mkdir()
        (data_dir / name / 'prepare.py').touch()
    assert missing_bin('letters').endswith('; datasets with a prepare.py: sentences, words')


def test_datasets_that_are_prepared(data_dir):
    write_bin(data_dir / 'sentences', range(100))
    write_bin(data_dir / 'words', range(100))
    assert missing_bin('letters').endswith('; already prepared: sentences, words')


def test_missing_split(data_dir):
    write_bin(data_dir / 'words', range(100))
    assert 'test.bin does not exist; the folder has train.bin; ' in missing_bin('words', 'test')


def test_datasets_of_this_repository():
    assert 'python_char' in missing_bin('nowhere')

# -----------------------------------------------------------------------------
# largest_id

@pytest.mark.parametrize('ids', [
    pytest.param(range(9), id='short'),
    pytest.param(range(5000), id='at the end'),
    pytest.param(range(5000, 0, -1), id='at the beginning'),
    pytest.param([*range(70), 9000, *range(4930)], id='between'),  # a short bin is read completely
])
def test_largest_id(ids):
    ids = np.array(ids, dtype=np.uint16)
    assert largest_id(ids) == max(ids)

# -----------------------------------------------------------------------------
# gather_windows

def test_windows_equal_slices():
    ids = np.arange(1000, 1100, dtype=np.uint16)
    windows = gather_windows(ids, np.array([3, 91, 0]), block_size=8)
    assert windows.tolist() == [list(range(1000 + start, 1009 + start)) for start in (3, 91, 0)]
    assert windows.dtype == np.int64

# -----------------------------------------------------------------------------
# windows without replacement

@pytest.mark.parametrize('num_tokens, num_windows', [(101, 11), (9, 1), (16, 1), (24, 1), (25, 2)])
def test_an_epoch_reads_each_window_once(num_tokens, num_windows):
    starts = [shuffled_starts(num_tokens, 8, epoch * num_windows, num_windows, (1337,))
              for epoch in range(30)]
    for in_epoch in starts:
        assert len(in_epoch) == num_windows
        assert np.all(np.diff(np.sort(in_epoch)) == 8)  # adjacent
        assert in_epoch.min() >= 0
        assert in_epoch.max() + 8 < num_tokens  # the last target exists
    num_left_over = num_tokens - 8 * num_windows
    assert len({in_epoch.min() for in_epoch in starts}) > num_left_over // 2
    assert min(in_epoch.min() for in_epoch in starts) == 0


def test_windows_are_a_function_of_their_number_and_the_seed():
    together = shuffled_starts(1000, 8, 0, 500, (1337,))
    parts = [shuffled_starts(1000, 8, first, 50, (1337,)) for first in range(0, 500, 50)]
    assert together.tolist() == np.concatenate(parts).tolist()
    assert together.tolist() != shuffled_starts(1000, 8, 0, 500, (1,)).tolist()


def test_epochs_have_different_orders():
    first = shuffled_starts(1000, 8, 0, 123, (1337,))
    second = shuffled_starts(1000, 8, 123, 123, (1337,))
    assert (first - first.min()).tolist() != (second - second.min()).tolist()
    assert (first - first.min()).tolist() != sorted(first - first.min())

# -----------------------------------------------------------------------------
# prefetch

def test_prefetch_keeps_the_order():
    calls = [(i, i + 1) for i in range(10)]
    products = prefetch(lambda a, b: a * b, calls, 'cpu', 'float32')
    assert list(products) == [i * (i + 1) for i in range(10)]


def test_prefetch_of_no_calls():
    assert list(prefetch(int, [], 'cpu', 'float32')) == []


def test_prefetch_of_infinite_calls():
    calls = ((i,) for i in itertools.count())
    batches = prefetch(abs, calls, 'cpu', 'float32')
    assert list(itertools.islice(batches, 3)) == [0, 1, 2]


def test_next_batch_is_loaded_meanwhile():
    is_loaded = [threading.Event() for _ in range(2)]

    def load(i):
        is_loaded[i].set()
        return i

    batches = prefetch(load, [(0,), (1,)], 'cpu', 'float32')
    assert next(batches) == 0
    assert is_loaded[1].wait(timeout=10)  # without a request


def test_prefetch_is_one_batch_ahead():
    """ More would need memory. """
    calls = iter([(i,) for i in range(10)])
    batches = prefetch(abs, calls, 'cpu', 'float32')
    assert next(batches) == 0
    assert next(calls) == (2,)


def test_batches_are_loaded_by_one_other_thread():
    calls = [()] * 5
    threads = set(prefetch(threading.get_ident, calls, 'cpu', 'float32'))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_error_of_the_thread_is_raised():
    batches = prefetch(np.sqrt, [(4,), ('four',)], 'cpu', 'float32')
    assert next(batches) == 2
    with pytest.raises(TypeError):
        next(batches)


def test_the_thread_uses_the_device(monkeypatch):
    used = []
    monkeypatch.setattr(dataset_module, 'use_device', lambda *device: used.append(device))
    batches = prefetch(torch.zeros, [(2,)], 'cuda:1', 'bfloat16')
    assert next(batches).tolist() == [0, 0]
    assert used == [('cuda:1', 'bfloat16')]


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

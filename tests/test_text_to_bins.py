""" Bins hold the ids of a plain encoding loop, and are whole or absent. """
import os
import shutil
from concurrent.futures import BrokenExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpt2 import prose

from components import text_to_bins
from components.errors import UserError
from components.text_sources import END_OF_DOCUMENT
from components.text_to_bins import preparing, write_bins
from components.tokenizer import get_tokenizer, load_meta, tokenizer_spec

GPT2 = {'kind': 'gpt2'}
AB = {'kind': 'char', 'itos': ['a', 'b']}
BA = {'kind': 'char', 'itos': ['b', 'a']}


def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2').tolist()

# -----------------------------------------------------------------------------
# encoding


def test_characters_are_little_endian_uint16(tmp_path, capsys):
    spec = {'kind': 'char', 'itos': [chr(i) for i in range(300)]}
    splits = {'train': [chr(0), chr(255) + chr(256)], 'val': ['a', END_OF_DOCUMENT]}
    write_bins(tmp_path, splits, spec, 4)
    assert (tmp_path / 'train.bin').read_bytes() == b'\x00\x00\xff\x00\x00\x01'
    assert read(tmp_path, 'val') == [ord('a')]
    assert tokenizer_spec(load_meta(tmp_path)) == spec
    out = capsys.readouterr().out
    assert out == 'vocabulary size: 300\ntrain.bin: 3 tokens (75.00%)\nval.bin: 1 tokens (25.00%)\n'


@pytest.mark.parametrize('small_size', [
    pytest.param(10**9, id='one thread'),
    pytest.param(0, id='worker processes', marks=pytest.mark.slow),
])
def test_batches_are_joined_in_order(tmp_path, monkeypatch, gpt2, small_size):
    """ The name of a special token in a text is text; the end of a document is the token. """
    monkeypatch.setattr(text_to_bins, 'SMALL_SIZE', small_size)
    monkeypatch.setattr(text_to_bins, 'BATCH_SIZE', 100)
    texts = [prose(n, seed=n) + '<|endoftext|>' for n in range(60)]
    write_bins(tmp_path, {'train': texts, 'val': [texts[5], END_OF_DOCUMENT]}, GPT2, 2000)
    assert read(tmp_path, 'train') == [i for text in texts for i in gpt2.encode_ordinary(text)]
    assert read(tmp_path, 'val') == [*gpt2.encode_ordinary(texts[5]), 50256]
    assert sorted(path.name for path in tmp_path.glob('*.*')) == ['train.bin', 'val.bin']


def test_names_of_special_tokens(tmp_path, gpt2):
    """ With `special`, they are tokens, and a document that ends with one has no second one. """
    end = '<|endoftext|>'
    splits = {'train': [f'the{end}\n', END_OF_DOCUMENT], 'val': [f'the{end}', END_OF_DOCUMENT]}
    write_bins(tmp_path, splits, GPT2, 20, special=True)
    the = gpt2.encode_ordinary('the')
    assert read(tmp_path, 'train') == [*the, 50256, *gpt2.encode_ordinary('\n'), 50256]
    assert read(tmp_path, 'val') == [*the, 50256]


def test_other_text(tmp_path, capsys):
    """ No bin of the old text stays, and another vocabulary is announced. """
    write_bins(tmp_path, {'train': ['a'], 'val': ['a'], 'test': ['a']}, AB, 3)
    write_bins(tmp_path, {'train': ['b'], 'val': ['b']}, AB, 3)
    assert not (tmp_path / 'test.bin').exists()
    assert 'NOTE' not in capsys.readouterr().out
    write_bins(tmp_path, {'train': ['b'], 'val': ['b']}, BA, 3)
    assert '--tokenizer=PATH/ckpt.pt' in capsys.readouterr().out
    (tmp_path / 'meta.pkl').write_text('damaged')
    write_bins(tmp_path, {'train': ['b'], 'val': ['b']}, BA, 3)
    assert read(tmp_path, 'train') == [0]


@pytest.mark.parametrize('text', ['', 'a', 'a' * 40])
def test_memory_is_bounded(monkeypatch, text):
    """ Of an endless stream, a few batches are read before the first one is written. """
    monkeypatch.setattr(text_to_bins, 'BATCH_SIZE', 50)
    monkeypatch.setattr(text_to_bins, '_num_cores', lambda: 1)
    texts = iter([text] * 1000)
    with text_to_bins._worker_pool(AB, False, 0) as pool:
        next(text_to_bins._encode_in_order(pool, texts))
    assert len(list(texts)) >= 1000 - 3 * 50


@pytest.mark.slow
def test_error_in_worker_process(tmp_path, monkeypatch):
    write_bins(tmp_path, {'train': ['ab']}, AB, 2)
    monkeypatch.setattr(text_to_bins, 'SMALL_SIZE', 0)
    with pytest.raises(UserError, match="'c' is not in the vocabulary"):
        write_bins(tmp_path, {'train': ['abc']}, BA, 3)
    assert read(tmp_path, 'train') == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.pkl', 'train.bin']


@pytest.mark.parametrize('spec, splits, message', [
    pytest.param({'kind': 'char', 'itos': [chr(i) for i in range(65_537)]}, {'train': ['a']},
                 '65,537 tokens.*65,536', id='vocabulary'),
    pytest.param(AB, {'train': ['ab'], 'val': ['', END_OF_DOCUMENT]}, 'val.bin', id='empty split'),
])
def test_write_bins_refuses(tmp_path, spec, splits, message):
    with pytest.raises(UserError, match=message):
        write_bins(tmp_path, splits, spec, 2)
    assert not list(tmp_path.iterdir())

# -----------------------------------------------------------------------------
# the disk


@pytest.mark.parametrize('spec, num_bytes', [
    pytest.param(AB, 2000, id='characters'),
    pytest.param(GPT2, 500, id='about 4 characters a token'),
])
@pytest.mark.usefixtures('gpt2')
def test_disk_space_is_checked_first(tmp_path, monkeypatch, spec, num_bytes):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=num_bytes - 1))
    with pytest.raises(OSError, match='MB free'):
        write_bins(tmp_path, {'train': ['a' * 1000]}, spec, 1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=num_bytes))
    write_bins(tmp_path, {'train': ['a' * 1000]}, spec, 1000)


def run_until_file_operation(number, function, *args):
    """ Runs a function in a fork that is killed at its os.replace or os.unlink of this number. """
    pid = os.fork()
    if pid != 0:
        _, status = os.waitpid(pid, 0)
        return status == 0
    num_operations = 0

    def kill_or_call(operation):
        def call(*args, **settings):
            nonlocal num_operations
            if num_operations == number:
                os._exit(9)
            num_operations += 1
            return operation(*args, **settings)
        return call

    os.replace = kill_or_call(os.replace)
    os.unlink = kill_or_call(os.unlink)
    try:
        function(*args)
    finally:
        os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.usefixtures('gpt2')
@pytest.mark.parametrize('before, after', [(None, AB), (AB, BA), (AB, GPT2), (GPT2, AB)])
def test_bins_match_vocabulary_when_killed(tmp_path, before, after):
    """ At no moment are bins beside the meta.pkl of another vocabulary. """
    splits = {'train': ['abba'], 'val': ['bab']}
    num_kills = 0
    has_finished = False
    while not has_finished:
        folder = tmp_path / f'killed-{num_kills}'
        folder.mkdir()
        (folder / 'pytorch_model.bin').write_text('not ours')
        if before is not None:
            write_bins(folder, {**splits, 'test': ['a']}, before, 10)
        has_finished = run_until_file_operation(num_kills, write_bins, folder, splits, after, 10)
        num_kills += 1

        bins = {path.stem for path in folder.glob('*.bin')} - {'pytorch_model'}
        spec = tokenizer_spec(load_meta(folder))
        assert not bins or spec in (before, after)
        for split in bins:
            text = {**splits, 'test': ['a']}[split][0]
            assert read(folder, split) == get_tokenizer(spec).encode(text)
        assert (folder / 'pytorch_model.bin').exists()
    assert num_kills > 5
    assert bins == {'train', 'val'}
    assert spec == after

# -----------------------------------------------------------------------------
# preparing


@pytest.mark.parametrize('error, message', [
    pytest.param(UserError('wrong'), 'wrong', id='input'),
    pytest.param(KeyboardInterrupt(), 'interrupted', id='Ctrl-C'),
    pytest.param(BrokenExecutor('A worker ended.'), 'memory ran out', id='worker'),
    pytest.param(OSError(28, 'No space left on device'), 'No space left', id='disk full'),
])
def test_preparing_ends_with_one_line(tmp_path, error, message):
    """ The old bins stay; what this run or a killed one left is removed. """
    (tmp_path / 'train.bin').write_text('old')
    (tmp_path / 'train.bin.tmp').write_text('left by a killed run')
    with pytest.raises(SystemExit, match=message) as stopped, preparing(tmp_path):
        assert not (tmp_path / 'train.bin.tmp').exists()
        (tmp_path / text_to_bins.ROWS_CACHE).mkdir()
        raise error
    assert '\n' not in stopped.value.code
    assert [path.name for path in tmp_path.iterdir()] == ['train.bin']


def test_preparing_bug_keeps_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), preparing(tmp_path):
        raise ZeroDivisionError

""" Bins hold the ids of a plain encoding loop, and are whole or absent. """
import os
import pickle
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
from components.tokenizer import get_tokenizer, load_meta, tokenizer_record

GPT2 = {'kind': 'gpt2'}
AB = {'kind': 'char', 'itos': ['a', 'b']}
BA = {'kind': 'char', 'itos': ['b', 'a']}


def read(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2').tolist()

# -----------------------------------------------------------------------------
# encoding


def test_characters_round_trip(tmp_path, capsys):
    text = 'zyx\u00e9\U0001f600 hello\n' * 10
    record = {'kind': 'char', 'itos': sorted(set(text))}
    splits = {'train': [text[:100]], 'val': [text[100:], END_OF_DOCUMENT]}
    write_bins(tmp_path, splits, record, len(text))
    meta = pickle.loads((tmp_path / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == len(set(text))
    assert ''.join(meta['itos'][i] for i in read(tmp_path, 'train')) == text[:100]
    assert ''.join(meta['itos'][i] for i in read(tmp_path, 'val')) == text[100:]
    out = capsys.readouterr().out
    assert f'vocabulary size: {len(set(text))}\n' in out
    assert f'val.bin: {len(text) - 100} tokens\n' in out


def test_end_of_text_and_special_tokens(tmp_path, gpt2):
    """ The name of a special token in a text is text like any other. """
    write_bins(tmp_path, {'train': ['<|endoftext|>', END_OF_DOCUMENT]}, GPT2, 10)
    assert read(tmp_path, 'train') == [*gpt2.encode_ordinary('<|endoftext|>'), 50256]


def test_ids_are_little_endian_uint16(tmp_path):
    record = {'kind': 'char', 'itos': [chr(i) for i in range(300)]}
    write_bins(tmp_path, {'train': [chr(0) + chr(255) + chr(256)]}, record, 3)
    assert (tmp_path / 'train.bin').read_bytes() == b'\x00\x00\xff\x00\x00\x01'


def test_batches_are_joined_in_order(tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(text_to_bins, 'BATCH_SIZE', 100)
    texts = [prose(n, seed=n) for n in range(60)]
    write_bins(tmp_path, {'train': texts}, GPT2, 2000)
    assert len(list(tmp_path.glob('parts.tmp/train-*'))) > 10
    assert read(tmp_path, 'train') == [i for text in texts for i in gpt2.encode_ordinary(text)]


def test_empty_texts_fill_batches_too(monkeypatch):
    monkeypatch.setattr(text_to_bins, 'BATCH_SIZE', 100)
    batches = list(text_to_bins._batches([''] * 250))
    assert [len(batch) for batch, _ in batches] == [100, 100, 50]
    assert [num_characters for _, num_characters in batches] == [0, 0, 0]


@pytest.mark.slow
def test_worker_processes(tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(text_to_bins, 'SMALL_SIZE', 0)
    monkeypatch.setattr(text_to_bins, 'BATCH_SIZE', 100)
    texts = [prose(n, seed=n) for n in range(60)]
    write_bins(tmp_path, {'train': texts, 'val': texts[:5]}, GPT2, 2000)
    assert read(tmp_path, 'train') == [i for text in texts for i in gpt2.encode_ordinary(text)]
    assert read(tmp_path, 'val') == [i for text in texts[:5] for i in gpt2.encode_ordinary(text)]


@pytest.mark.slow
def test_error_in_worker_process(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_bins, 'SMALL_SIZE', 0)
    with pytest.raises(UserError, match="'c' is not in the vocabulary"):
        write_bins(tmp_path, {'train': ['abc']}, AB, 3)
    assert not list(tmp_path.glob('*.bin*'))


def test_vocabulary_too_large_for_uint16(tmp_path):
    record = {'kind': 'char', 'itos': [chr(i) for i in range(65_537)]}
    with pytest.raises(UserError, match='65,537 tokens.*65,536'):
        write_bins(tmp_path, {'train': ['a']}, record, 1)


def test_split_without_text(tmp_path):
    with pytest.raises(UserError, match='no text is left for val.bin'):
        write_bins(tmp_path, {'train': ['ab'], 'val': ['', END_OF_DOCUMENT]}, AB, 2)
    assert not list(tmp_path.glob('*.bin*'))

# -----------------------------------------------------------------------------
# the disk


@pytest.mark.parametrize('record, num_bytes', [
    pytest.param(AB, 4000, id='characters: 2 bytes, in batch and bin'),
    pytest.param(GPT2, 1000, id='about 4 characters a token'),
])
@pytest.mark.usefixtures('gpt2')
def test_disk_space_is_checked_first(tmp_path, monkeypatch, record, num_bytes):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=num_bytes - 1))
    with pytest.raises(OSError, match='MB free'):
        write_bins(tmp_path, {'train': ['a' * 1000]}, record, 1000)
    assert not list(tmp_path.glob('*.bin*'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=num_bytes))
    write_bins(tmp_path, {'train': ['a' * 1000]}, record, 1000)


def test_temporary_bins_of_interrupted_run_are_removed(tmp_path):
    (tmp_path / 'test.bin.tmp').write_text('half')
    write_bins(tmp_path, {'train': ['a']}, AB, 1)
    assert not list(tmp_path.glob('*.bin.tmp'))


def test_finished_batches_are_used_again(tmp_path, capsys):
    write_bins(tmp_path, {'train': ['ab']}, AB, 2)
    part, = tmp_path.glob('parts.tmp/train-*')
    part.write_bytes(b'\x01\x00\x01\x00')  # to recognize it
    write_bins(tmp_path, {'train': ['ab']}, AB, 2)
    assert read(tmp_path, 'train') == [1, 1]
    assert 'from an interrupted run' in capsys.readouterr().out


def test_finished_batches_of_other_text_or_tokenizer_are_not_used(tmp_path):
    write_bins(tmp_path, {'train': ['ab']}, AB, 2)
    write_bins(tmp_path, {'train': ['bb']}, AB, 2)
    assert read(tmp_path, 'train') == [1, 1]
    write_bins(tmp_path, {'train': ['bb']}, BA, 2)
    assert read(tmp_path, 'train') == [0, 0]


def test_other_tokenizer_replaces_all_files(tmp_path, gpt2):
    write_bins(tmp_path, {'train': ['ab'], 'val': ['ab'], 'test': ['ab']}, AB, 6)
    write_bins(tmp_path, {'train': ['ab'], 'val': ['ab']}, BA, 4)
    assert read(tmp_path, 'train') == [1, 0]
    assert not (tmp_path / 'test.bin').exists()
    assert load_meta(tmp_path)['stoi'] == {'b': 0, 'a': 1}
    write_bins(tmp_path, {'train': ['ab'], 'val': ['ab']}, GPT2, 4)
    assert read(tmp_path, 'val') == gpt2.encode_ordinary('ab')
    assert not (tmp_path / 'meta.pkl').exists()


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
@pytest.mark.parametrize('before, after', [
    pytest.param(None, AB, id='new'),
    pytest.param(AB, BA, id='other characters'),
    pytest.param(AB, GPT2, id='characters to gpt2'),
    pytest.param(GPT2, AB, id='gpt2 to characters'),
])
def test_bins_match_vocabulary_when_killed(tmp_path, before, after):
    """ At no moment are bins beside the meta.pkl of another vocabulary. """
    splits = {'train': ['abba', END_OF_DOCUMENT], 'val': ['bab', END_OF_DOCUMENT]}
    num_kills = 0
    has_finished = False
    while not has_finished:
        folder = tmp_path / f'killed-{num_kills}'
        folder.mkdir()
        (folder / 'pytorch_model.bin').write_text('not ours')
        if before is not None:
            write_bins(folder, splits, before, 10)
        has_finished = run_until_file_operation(num_kills, write_bins, folder, splits, after, 10)
        num_kills += 1

        bins = [split for split in splits if (folder / f'{split}.bin').exists()]
        record = tokenizer_record(load_meta(folder))
        for split in bins:
            tokenizer = get_tokenizer(record)
            end = [50256] if record == GPT2 else []
            assert record in (before, after)
            assert read(folder, split) == tokenizer.encode(splits[split][0]) + end
        assert (folder / 'pytorch_model.bin').exists()
    assert num_kills > 5
    assert bins == ['train', 'val']
    assert record == after

# -----------------------------------------------------------------------------
# preparing


def test_preparing_removes_parts(tmp_path):
    with preparing(tmp_path):
        write_bins(tmp_path, {'train': ['ab']}, AB, 2)
        assert (tmp_path / 'parts.tmp').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.pkl', 'train.bin']


def test_preparing_refused_input_creates_nothing(tmp_path):
    with pytest.raises(SystemExit, match='is not in the vocabulary'), preparing(tmp_path / 'new'):
        write_bins(tmp_path / 'new', {'train': ['abc']}, AB, 3)
    assert not (tmp_path / 'new').exists()


def test_preparing_refused_input_keeps_parts_of_earlier_run(tmp_path):
    (tmp_path / 'parts.tmp').mkdir()
    (tmp_path / 'parts.tmp/train-000000-x').write_text('')
    with pytest.raises(SystemExit, match='wrong'), preparing(tmp_path):
        raise UserError('wrong')
    assert (tmp_path / 'parts.tmp/train-000000-x').exists()


@pytest.mark.parametrize('error, message', [
    pytest.param(KeyboardInterrupt(), 'interrupted; run the same command to continue', id='Ctrl-C'),
    pytest.param(BrokenExecutor('A worker ended.'), 'ended. Perhaps memory ran out', id='worker'),
    pytest.param(OSError(28, 'No space left on device'), 'No space left', id='disk full'),
])
def test_preparing_keeps_parts_for_next_run(tmp_path, error, message):
    with pytest.raises(SystemExit, match=message), preparing(tmp_path):
        (tmp_path / 'parts.tmp').mkdir()
        raise error
    assert (tmp_path / 'parts.tmp').exists()


def test_preparing_bug_keeps_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), preparing(tmp_path):
        raise ZeroDivisionError

""" What is on disk: whole or absent, data and not programs, old forms understood. """
import math
import os
import pickle
import shutil
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import CLASSIC_MODEL_ARGS

import bins
import checkpoint as checkpoint_module
from checkpoint import load_checkpoint, load_optimizers, load_weights, newest_checkpoint, save_checkpoint
from model import GPT, GPTConfig


class Bomb:
    """ Unpickled by anything that runs code, it leaves a file. """
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture
def saved(tmp_path, tiny):
    """ A checkpoint of the tiny model after one step -> its path, the model, the optimizer. """
    optimizer = tiny.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    tiny(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, tiny, [optimizer], iter_num=1, best_val_loss=2.5, config={'lr': np.float64(0.1)})
    return path, tiny, optimizer


# -----------------------------------------------------------------------------
# whole files

def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with bins.whole_file(path) as temporary:
            temporary.write_text('half of the n')
            assert path.read_text() == 'old'
            raise KeyboardInterrupt
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with bins.whole_file(path) as temporary:
        temporary.write_text('new')
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """ And the name before the block is left: after a power cut there is the old file, or the new. """
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: events.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda *names: events.append('named') or replace(*names))
    with bins.whole_file(tmp_path / 'file') as temporary:
        temporary.write_text('new')
    file, folder = (tmp_path / 'file').stat().st_ino, tmp_path.stat().st_ino
    assert events == [file, 'named', *([folder] if os.name == 'posix' else [])]


# -----------------------------------------------------------------------------
# bins and meta.pkl

@pytest.mark.parametrize('content, message', [
    (None, 'is not there; datasets with a prepare.py are .*python_char'),
    (b'abc', ': 3 bytes'), (b'ab' * 8, ': 8 tokens; the most is --block_size=7')])
def test_a_bin_is_checked_before_it_is_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        bins.open_bin(tmp_path, 'train', block_size=8, vocab_size=50304)


def test_a_bin_of_another_vocabulary_or_split_is_refused(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    assert len(bins.open_bin(tmp_path, 'train', 8, vocab_size=100)) == 100
    with pytest.raises(ValueError, match='holds token 99, and its vocabulary has 99; .*prepare.py'):
        bins.open_bin(tmp_path, 'train', 8, vocab_size=99)
    with pytest.raises(FileNotFoundError, match='test.bin is not there, but train.bin; '):
        bins.open_bin(tmp_path, 'test', 8, vocab_size=100)


def test_the_largest_id_of_a_sample(tmp_path):
    ids = np.arange(5000, dtype=np.uint16)
    ids.tofile(tmp_path / 'train.bin')
    assert bins.largest_id(bins.open_bin(tmp_path, 'train', block_size=8, vocab_size=50304)) == 4999
    assert bins.largest_id(ids[:9]) == 8
    assert bins.largest_id(np.where(ids == 70, 9000, ids)) == 9000  # of so short a bin all is read


def test_windows_against_a_loop(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    starts = np.array([3, 91, 0])
    expected = np.array([[s + i for i in range(9)] for s in starts])
    assert (bins.windows(ids, starts, 8) == expected).all() and bins.windows(ids, starts, 8).dtype == np.int64


def test_meta_that_carries_code_or_is_broken_is_refused(tmp_path):
    path = tmp_path / 'meta.pkl'
    for content, message in [
            (pickle.dumps({'vocab_size': 3, 'itos': Bomb(tmp_path / 'boom')}), 'carries code'),
            (pickle.dumps({'vocab_size': np.int64(3)}), 'carries code'),
            (pickle.dumps({'vocab_size': 2**16 + 1}), 'uint16'),
            (pickle.dumps({'vocab_size': 3})[:-4], 'not a vocabulary'), (b'', 'not a vocabulary'),
            (pickle.dumps(['a']), 'not a vocabulary'),
            (pickle.dumps({'vocab_size': 1, 'itos': [b'a']}), 'no text'),
            (pickle.dumps({'vocab_size': 'x'}), 'not a vocabulary')]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            bins.load_meta(tmp_path)
    assert not (tmp_path / 'boom').exists()
    assert bins.load_meta(tmp_path / 'elsewhere') is None
    path.write_bytes(pickle.dumps({'vocab_size': 4, 'itos': ['a', 'b']}))  # padded, and a list
    assert bins.tokenizer_record(bins.load_meta(tmp_path)) == {'kind': 'char', 'itos': ['a', 'b']}


def test_a_hugging_face_tokenizer_with_a_gap_and_a_special_token():
    from tokenizers import Tokenizer, decoders, models
    tokenizer = Tokenizer(models.WordLevel({'a': 0, 'b': 7}))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(['<end>'])
    end = tokenizer.token_to_id('<end>')
    encode, decode, size, _ = bins.get_tokenizer({'kind': 'hf', 'json': tokenizer.to_str(), 'end': end})
    assert size == max(7, end) + 1  # ids go up to there, though there are three
    assert encode('<end>', special=True) == [end] and decode([0, end, 7]) == 'a<end>b'


# -----------------------------------------------------------------------------
# checkpoints

def test_a_checkpoint_there_and_back(saved):
    path, model, optimizer = saved
    raw = torch.load(path, weights_only=True)
    assert sorted(raw['model_args']) == CLASSIC_MODEL_ARGS
    assert type(raw['config']['lr']) is float
    checkpoint = load_checkpoint(path)
    twin = GPT(GPTConfig(**checkpoint['model_args']))
    load_weights(twin, checkpoint, path)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a, b)
    fresh = twin.configure_optimizers(0.5, 1e-2, (0.8, 0.9), 'cpu')
    load_optimizers([fresh], checkpoint, path)
    assert fresh.param_groups[0]['betas'] == (0.8, 0.9) and fresh.param_groups[0]['weight_decay'] == 0.5
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(optimizer.state[p]['exp_avg_sq'], fresh.state[q]['exp_avg_sq'])


def test_what_a_killed_save_left_makes_room(tmp_path, tiny, monkeypatch):
    stale = tmp_path / 'ckpt.pt.tmp'
    stale.write_text('half')
    monkeypatch.setattr(shutil, 'disk_usage',
                        lambda folder: types.SimpleNamespace(free=0 if stale.exists() else 10**9))
    save_checkpoint(tmp_path / 'ckpt.pt', tiny, [])
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


def test_new_fields_of_the_config_are_kept(tmp_path, tiny, monkeypatch):
    @dataclass
    class Hacked(GPTConfig):
        window: int = 0
        gated: bool = True
    monkeypatch.setattr(checkpoint_module, 'GPTConfig', Hacked)
    classic = vars(tiny.config)
    for values in dict(window=4), dict(gated=False), dict(window=4, gated=False, rotary=True), dict():
        tiny.config = Hacked(**{**classic, **values})
        save_checkpoint(tmp_path / 'ckpt.pt', tiny, [])
        raw = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
        assert sorted(raw['model_args']) == sorted([*CLASSIC_MODEL_ARGS, *values])
        assert Hacked(**load_checkpoint(tmp_path / 'ckpt.pt')['model_args']) == tiny.config


def test_buffers_of_the_model_are_its_own_affair(tmp_path, tiny):
    """ A mask that a model has comes back, whatever is in it; one of old files that it has not, goes. """
    for block in tiny.transformer.h:
        block.attn.register_buffer('bias', torch.full((4, 4), -float('inf')).triu(1))
    save_checkpoint(tmp_path / 'ckpt.pt', tiny, [])
    checkpoint = load_checkpoint(tmp_path / 'ckpt.pt')
    load_weights(GPT(GPTConfig(**checkpoint['model_args'])), checkpoint, 'ckpt.pt')
    tiny.transformer.h[0].attn.bias.zero_()
    load_weights(tiny, checkpoint, 'ckpt.pt')
    assert tiny.transformer.h[0].attn.bias.isinf().any()


def test_what_old_checkpoints_lack(saved):
    path, _, _ = saved
    old = torch.load(path, weights_only=True)
    del old['gelu'], old['best_val_loss']
    torch.save(old, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint['model_args']['gelu'] == 'exact' and checkpoint['best_val_loss'] == math.inf


def test_of_two_files_of_one_iteration_the_best_goes_on(saved):
    """ A kill between the write of ckpt.pt and the removal of ckpt_last.pt, whose best loss is older. """
    path, model, optimizer = saved
    for name, run_id, iter_num in (('ckpt.pt', 'a', 5), ('ckpt_last.pt', 'a', 5)):
        save_checkpoint(path.parent / name, model, [optimizer], run_id=run_id, iter_num=iter_num)
    assert newest_checkpoint(path.parent).name == 'ckpt.pt'
    save_checkpoint(path.parent / 'ckpt_last.pt', model, [optimizer], run_id='a', iter_num=6)
    assert newest_checkpoint(path.parent).name == 'ckpt_last.pt'


def test_a_disk_that_fills_up_during_a_save(saved, monkeypatch):
    """ torch's writer says so by a RuntimeError; train.py goes on after an OSError. """
    path, model, optimizer = saved
    before = path.read_bytes()
    weights = sum(p.nbytes for p in model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=2 * weights))
        with pytest.raises(OSError, match='are free'):  # with both moments there are three times as many
            save_checkpoint(path, model, [optimizer])

    def save(checkpoint, file):
        file.write_bytes(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file data/3: file write failed\nframe #0')
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError, match='ckpt.pt: PytorchStreamWriter failed .* file write failed$'):
        save_checkpoint(path, model, [optimizer])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_the_optimizer_of_another_model_is_refused(saved, tmp_path):
    path, _, _ = saved
    state = load_checkpoint(path)
    for wrong in (dict(n_embd=8), dict(n_embd=32), dict(n_layer=3), dict(bias=True)):
        args = {**dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False), **wrong}
        other = GPT(GPTConfig(**args)).configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
        with pytest.raises(ValueError, match='other parameters'):
            load_optimizers([other], state, path)
    same = GPT(GPTConfig(**state['model_args'])).configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    for moments in state['optimizer']['state'].values():
        moments['momentum_buffer'] = moments.pop('exp_avg')  # that of SGD
    with pytest.raises(ValueError, match='another kind'):
        load_optimizers([same], state, path)


def test_a_wrapper_is_not_saved(saved, tmp_path):
    _, model, optimizer = saved
    with pytest.raises(AssertionError, match='bare model'):
        save_checkpoint(tmp_path / 'x.pt', torch.nn.Sequential(model), [optimizer])


def test_broken_checkpoints_are_named(tmp_path, saved):
    path, model, _ = saved
    good = torch.load(path, weights_only=True)
    bad = tmp_path / 'bad.pt'

    def check(message, content=None):
        if content is not None:
            torch.save(content, bad)
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load_checkpoint(bad)
        assert '\n' not in str(caught.value)

    check('no checkpoint .*bad.pt')
    check('holds a list', [1, 2])
    check('lacks model_args', {'model': {}})
    args = good['model_args']
    check('model_args lack n_head', {**good, 'model_args': {k: v for k, v in args.items() if k != 'n_head'}})
    torch.save({**good, 'model_args': {k: v for k, v in args.items() if k != 'bias'}}, bad)
    assert GPTConfig(**load_checkpoint(bad)['model_args']).bias  # from before it could be turned off
    check('does not know the model_args alibi', {**good, 'model_args': {**args, 'alibi': True}})
    whole = path.read_bytes()
    for content in (whole[:-3000], whole[:200], b'', b'not a checkpoint', b'PK\x03\x04'):
        bad.write_bytes(content)
        check('is not a whole checkpoint')

    for change, message in [
            ({'lm_head.weight': None}, 'Missing key.*lm_head.weight'),
            ({'extra': torch.ones(1)}, 'Unexpected key.*extra'),
            ({'lm_head.weight': torch.ones(3, 3)}, r'mismatch for lm_head.weight.*\[3, 3\].*\[40, 16\]')]:
        state = {key: value for key, value in {**good['model'], **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_weights(model, {'model': state}, bad)

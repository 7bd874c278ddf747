""" components/checkpoint.py: the format of a checkpoint, and which checkpoints a run keeps. """
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSIC_MODEL_ARGS, SMALL
from kill_and_resume import differences

from components import checkpoint as checkpoint_module
from components import metrics
from components.checkpoint import (
    Checkpointer,
    load_checkpoint,
    load_optimizers,
    load_training_weights,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from components.ema import EMA
from components.errors import UserError
from components.optim import configure_optimizers
from model import GPT, GPTConfig


def new_optimizers(model, muon_lr=0.0):
    return configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr)


def train_step(model, optimizers):
    """ One update, so that there are moments to save. """
    idx = torch.zeros(1, 4, dtype=torch.long)
    _, loss = model(idx, idx + 1)
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()


def read(path):
    """ What a reader of the nanoGPT format finds in a file. """
    return torch.load(path, weights_only=True)


def error_of(function, *args):
    """ Calls a function that raises UserError -> its message, one line. """
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert '\n' not in message
    return message


class CreatesFile:
    """ An object that creates a file if pickle loads it. """

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture
def path(tmp_path):
    """ The path of a checkpoint. """
    return tmp_path / 'ckpt.pt'


@pytest.fixture
def optimizers(tiny):
    """ AdamW for `tiny` after one update. """
    optimizers = new_optimizers(tiny)
    train_step(tiny, optimizers)
    return optimizers


@pytest.fixture
def saved(path, tiny, optimizers):
    """ What a checkpoint of `tiny` at `path` holds. """
    save_checkpoint(path, tiny, optimizers, iter_num=1, best_val_loss=2.5, config={'seed': 1})
    return read(path)

# -----------------------------------------------------------------------------
# save_checkpoint

def test_keys_of_the_nanogpt_format(saved):
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(saved)
    assert sorted(saved['model_args']) == CLASSIC_MODEL_ARGS
    assert 'transformer.wte.weight' in saved['model']


def test_newer_model_args_are_saved_if_not_at_their_defaults(path):
    sizes = dict(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16)
    save_checkpoint(path, GPT(GPTConfig(**sizes, rotary=True, untied=True)), {})
    assert sorted(read(path)['model_args']) == sorted([*CLASSIC_MODEL_ARGS, 'rotary', 'untied'])


@pytest.mark.parametrize('rotary', [False, True])
def test_rope_base_is_saved_if_it_has_an_effect(path, rotary):
    sizes = dict(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16)
    save_checkpoint(path, GPT(GPTConfig(**sizes, rotary=rotary, rope_base=200)), {})
    assert ('rope_base' in read(path)['model_args']) == rotary


@pytest.mark.parametrize('values', [
    pytest.param(dict(), id='defaults'),
    pytest.param(dict(window=4), id='number'),
    pytest.param(dict(gated=False), id='default is True'),
    pytest.param(dict(window=4, gated=False, rotary=True), id='all'),
])
def test_fields_that_a_user_adds_to_the_config(path, tiny, monkeypatch, values):
    @dataclass
    class ExtendedConfig(GPTConfig):
        window: int = 0
        gated: bool = True

    monkeypatch.setattr(checkpoint_module, 'GPTConfig', ExtendedConfig)
    tiny.config = ExtendedConfig(**{**vars(tiny.config), **values})
    save_checkpoint(path, tiny, {})
    assert sorted(read(path)['model_args']) == sorted([*CLASSIC_MODEL_ARGS, *values])
    assert ExtendedConfig(**load_checkpoint(path)['model_args']) == tiny.config


@pytest.mark.parametrize('gelu', ['exact', 'tanh'])
def test_gelu_is_not_among_the_model_args(path, gelu):
    sizes = dict(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16)
    save_checkpoint(path, GPT(GPTConfig(**sizes, gelu=gelu)), {})
    assert read(path)['gelu'] == gelu
    assert sorted(read(path)['model_args']) == CLASSIC_MODEL_ARGS


def test_numpy_numbers_are_saved_as_python_numbers(path, tiny):
    save_checkpoint(path, tiny, {}, config={'learning_rate': np.float64(0.1)}, iter_num=np.int64(3))
    assert type(read(path)['config']['learning_rate']) is float
    assert type(read(path)['iter_num']) is int


def test_wrapped_model_is_not_saved(path, tiny):
    """ torch.compile and DDP put a prefix on the keys. """
    with pytest.raises(AssertionError, match='unwrapped model'):
        save_checkpoint(path, torch.nn.Sequential(tiny), {})


def test_temporary_file_of_an_interrupted_save_makes_room(path, tiny, monkeypatch):
    interrupted = path.with_name('ckpt.pt.tmp')
    interrupted.write_text('half')

    def disk_usage(folder):
        return SimpleNamespace(free=0 if interrupted.exists() else 10**9)

    monkeypatch.setattr(shutil, 'disk_usage', disk_usage)
    save_checkpoint(path, tiny, {})
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_before_a_save(path, saved, tiny, optimizers, monkeypatch):
    """ The weights would fit, but not the two moments of each. """
    before = path.read_bytes()
    free = 2 * sum(p.nbytes for p in tiny.parameters())
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free))
    with pytest.raises(OSError, match='MB needed'):
        save_checkpoint(path, tiny, optimizers)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_during_a_save(path, saved, tiny, optimizers, monkeypatch):
    """ torch raises a RuntimeError of many lines. """
    before = path.read_bytes()

    def save(checkpoint, file):
        file.write_bytes(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file data/3\nframe #0')

    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError, match=r'ckpt\.pt: PytorchStreamWriter failed writing file data/3$'):
        save_checkpoint(path, tiny, optimizers)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]

# -----------------------------------------------------------------------------
# load_checkpoint

@pytest.mark.parametrize('mmap', [False, True])
def test_saved_and_loaded(path, tiny, optimizers, mmap):
    save_checkpoint(path, tiny, optimizers, iter_num=1, best_val_loss=2.5)
    checkpoint = load_checkpoint(path, mmap)
    assert GPTConfig(**checkpoint['model_args']) == tiny.config
    assert checkpoint['iter_num'] == 1
    assert checkpoint['best_val_loss'] == 2.5
    torch.testing.assert_close(checkpoint['model'], dict(tiny.state_dict()), rtol=0, atol=0)


def test_model_that_was_compiled_by_nanogpt(path, saved):
    prefixed = {f'_orig_mod.{key}': value for key, value in saved['model'].items()}
    torch.save({**saved, 'model': prefixed}, path)
    assert list(load_checkpoint(path)['model']) == list(saved['model'])


def test_best_val_loss_of_nanogpt_is_a_tensor(path, saved):
    torch.save({**saved, 'best_val_loss': torch.tensor(2.5)}, path)
    best_val_loss = load_checkpoint(path)['best_val_loss']
    assert best_val_loss == 2.5
    assert type(best_val_loss) is float


def test_missing_best_val_loss(path, saved):
    del saved['best_val_loss']
    torch.save(saved, path)
    assert load_checkpoint(path)['best_val_loss'] == math.inf


def test_missing_gelu_is_exact(path, saved):
    del saved['gelu']
    torch.save(saved, path)
    assert load_checkpoint(path)['model_args']['gelu'] == 'exact'


@pytest.mark.parametrize('name, default', [('bias', True), ('dropout', 0.0)])
def test_missing_model_args_of_old_files(path, saved, name, default):
    del saved['model_args'][name]
    torch.save(saved, path)
    config = GPTConfig(**load_checkpoint(path)['model_args'])
    assert getattr(config, name) == default


@pytest.mark.parametrize('mmap', [False, True])
def test_file_in_the_format_before_zip(path, saved, mmap):
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path, mmap)['iter_num'] == 1

# -----------------------------------------------------------------------------
# files that are not a checkpoint

@pytest.mark.parametrize('mmap', [False, True])
def test_missing_file(path, mmap):
    assert f'{path} does not exist' in error_of(load_checkpoint, path, mmap)


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('num_bytes', [0, 4, 200, -3000, -1])
def test_truncated_file(path, saved, num_bytes, mmap):
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert f'{path} is not a complete checkpoint' in error_of(load_checkpoint, path, mmap)


def test_file_of_another_kind(path):
    path.write_text('to be or not to be')
    assert f'{path} is not a complete checkpoint' in error_of(load_checkpoint, path)


def test_code_is_not_run(path, saved, tmp_path):
    torch.save({**saved, 'config': CreatesFile(tmp_path / 'created')}, path)
    message = error_of(load_checkpoint, path)
    assert 'contains code (' in message
    assert 'open' in message
    assert not (tmp_path / 'created').exists()


def test_checkpoint_that_is_not_a_dict(path):
    torch.save([1, 2], path)
    assert f'{path} is not a checkpoint: it holds a list' in error_of(load_checkpoint, path)


@pytest.mark.parametrize('key', ['model', 'model_args'])
def test_missing_key(path, saved, key):
    del saved[key]
    torch.save(saved, path)
    assert error_of(load_checkpoint, path) == f'{path} lacks {key}'


@pytest.mark.parametrize('key, value', [
    ('model', [1]),
    ('model_args', [1]),
    ('optimizer', None),
    ('muon', 3),
    ('scaler', [3]),
    ('config', 3),
    ('iter_num', 'x'),
    ('best_val_loss', 'low'),
])
def test_value_of_a_wrong_type(path, saved, key, value):
    torch.save({**saved, key: value}, path)
    assert f'{key}={value!r} has the wrong type' in error_of(load_checkpoint, path)


def test_missing_model_arg(path, saved):
    del saved['model_args']['n_head']
    torch.save(saved, path)
    assert 'model_args lack n_head' in error_of(load_checkpoint, path)


def test_unknown_model_arg(path, saved):
    saved['model_args']['alibi'] = True
    torch.save(saved, path)
    assert 'unknown model_args: alibi' in error_of(load_checkpoint, path)

# -----------------------------------------------------------------------------
# load_weights

def test_weights_are_copied(path, saved, tiny):
    twin = GPT(tiny.config)
    load_weights(twin, load_checkpoint(path), path)
    for p, q in zip(tiny.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_causal_mask_of_old_files_is_ignored(path, saved, tiny):
    saved['model']['transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    torch.save(saved, path)
    load_weights(tiny, load_checkpoint(path), path)


def test_causal_mask_of_a_changed_model_is_loaded(path, tiny):
    """ Its name is that of the mask in old files. It may hold -inf. """
    for block in tiny.transformer.h:
        block.attn.register_buffer('bias', torch.full((4, 4), -math.inf).triu(1))
    save_checkpoint(path, tiny, {})
    mask = tiny.transformer.h[0].attn.bias
    mask.zero_()
    load_weights(tiny, load_checkpoint(path), path)
    assert torch.equal(mask, torch.full((4, 4), -math.inf).triu(1))


def test_missing_weight(saved, tiny):
    del saved['model']['lm_head.weight']
    message = error_of(load_weights, tiny, saved, 'ckpt.pt')
    assert 'Missing key' in message
    assert 'lm_head.weight' in message


def test_unexpected_weight(saved, tiny):
    saved['model']['extra'] = torch.ones(1)
    message = error_of(load_weights, tiny, saved, 'ckpt.pt')
    assert 'Unexpected key' in message
    assert 'extra' in message


def test_weight_of_another_shape(saved, tiny):
    saved['model']['lm_head.weight'] = torch.ones(3, 3)
    message = error_of(load_weights, tiny, saved, 'ckpt.pt')
    assert 'size mismatch for lm_head.weight' in message
    assert '[3, 3]' in message
    assert '[40, 16]' in message


def test_weight_that_is_not_a_tensor(saved, tiny):
    saved['model']['lm_head.weight'] = 'text'
    assert 'lm_head.weight' in error_of(load_weights, tiny, saved, 'ckpt.pt')


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_non_finite_weight(saved, tiny, value):
    saved['model']['transformer.wpe.weight'][3, 3] = value
    message = error_of(load_weights, tiny, saved, 'ckpt.pt')
    assert 'non-finite weights (NaN or inf): transformer.wpe.weight' in message

# -----------------------------------------------------------------------------
# load_optimizers

@pytest.mark.parametrize('muon_lr', [0.0, 0.02], ids=['AdamW', 'Muon and AdamW'])
def test_moments_are_loaded(path, tiny, muon_lr):
    optimizers = new_optimizers(tiny, muon_lr)
    train_step(tiny, optimizers)
    save_checkpoint(path, tiny, optimizers, iter_num=1)
    twin = GPT(tiny.config)
    loaded = new_optimizers(twin, muon_lr)
    load_optimizers(loaded, load_checkpoint(path), path)
    for name in optimizers:
        expected = optimizers[name].state_dict()['state']
        assert len(expected) > 0
        torch.testing.assert_close(loaded[name].state_dict()['state'], expected, rtol=0, atol=0)


def test_settings_of_the_optimizer_are_kept(path, saved, tiny):
    loaded = configure_optimizers(tiny, 0.5, 1e-2, (0.8, 0.9), 'cpu')
    load_optimizers(loaded, load_checkpoint(path), path)
    decayed, not_decayed = loaded['optimizer'].param_groups
    assert decayed['weight_decay'] == 0.5
    assert not_decayed['weight_decay'] == 0.0
    assert decayed['betas'] == (0.8, 0.9)
    assert decayed['lr'] == 1e-2


def test_moments_of_a_cropped_position_embedding(path, saved, tiny):
    tiny.crop_block_size(8)
    loaded = new_optimizers(tiny)
    checkpoint = load_checkpoint(path)
    load_optimizers(loaded, checkpoint, path)
    moment = loaded['optimizer'].state[tiny.transformer.wpe.weight]['exp_avg']
    saved_moment = checkpoint['optimizer']['state'][1]['exp_avg']
    assert torch.equal(moment, saved_moment[:8])
    assert moment.untyped_storage().nbytes() == 8 * 16 * 4  # not that of all rows


@pytest.mark.parametrize('key', ['optimizer', 'iter_num'])
def test_weights_without_an_optimizer(path, saved, tiny, key):
    del saved[key]
    message = error_of(load_optimizers, new_optimizers(tiny), saved, path)
    assert f'lacks {key}; --init_from={path} loads only its weights' in message


def test_muon_is_not_in_the_checkpoint(path, saved, tiny):
    message = error_of(load_optimizers, new_optimizers(tiny, muon_lr=0.02), saved, path)
    assert 'muon_lr' in message
    assert f'--init_from={path} loads only its weights' in message


def test_muon_is_not_in_the_settings(path, tiny):
    save_checkpoint(path, tiny, new_optimizers(tiny, muon_lr=0.02), iter_num=1)
    message = error_of(load_optimizers, new_optimizers(tiny), read(path), path)
    assert 'muon_lr' in message


@pytest.mark.parametrize('args', [
    dict(n_embd=8),
    dict(n_embd=32),
    dict(n_layer=3),
    dict(bias=True),
], ids=str)
def test_optimizer_of_another_model(path, saved, tiny, args):
    other = GPT(GPTConfig(**{**vars(tiny.config), **args}))
    message = error_of(load_optimizers, new_optimizers(other), saved, path)
    assert 'other parameters' in message


def test_optimizer_of_another_kind(path, saved, tiny):
    """ SGD's moments. """
    for state in saved['optimizer']['state'].values():
        state['momentum_buffer'] = state.pop('exp_avg')
        del state['exp_avg_sq']
    message = error_of(load_optimizers, new_optimizers(tiny), saved, path)
    assert 'another kind of optimizer' in message


def test_adamw_without_step_counts(path, saved, tiny):
    for state in saved['optimizer']['state'].values():
        del state['step']
    message = error_of(load_optimizers, new_optimizers(tiny), saved, path)
    assert f'--init_from={path} loads only its weights' in message


@pytest.mark.parametrize('state', [
    pytest.param({'param_groups': 3, 'state': {}}, id='groups'),
    pytest.param({'param_groups': [3, 4], 'state': {}}, id='group'),
    pytest.param({'param_groups': []}, id='too few groups'),
    pytest.param({'state': 3}, id='no groups'),
])
def test_broken_optimizer(path, saved, tiny, state):
    saved['optimizer'] = state
    message = error_of(load_optimizers, new_optimizers(tiny), saved, path)
    assert f'--init_from={path} loads only its weights' in message

# -----------------------------------------------------------------------------
# newest_checkpoint

def save_small(path, **fields):
    sizes = dict(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4)
    save_checkpoint(path, GPT(GPTConfig(**sizes)), {}, **fields)


@pytest.mark.parametrize('best', [False, True])
def test_no_checkpoint(tmp_path, best):
    assert newest_checkpoint(tmp_path, best) == tmp_path / 'ckpt.pt'


@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_last.pt'])
@pytest.mark.parametrize('best', [False, True])
def test_only_checkpoint(tmp_path, best, name):
    save_small(tmp_path / name, run_id='a', iter_num=5)
    assert newest_checkpoint(tmp_path, best) == tmp_path / name


@pytest.mark.parametrize('last, name', [
    pytest.param(dict(run_id='a', iter_num=6), 'ckpt_last.pt', id='later'),
    # left by an interruption between the save of ckpt.pt and the removal of ckpt_last.pt
    pytest.param(dict(run_id='a', iter_num=5), 'ckpt.pt', id='same iteration'),
    pytest.param(dict(run_id='a', iter_num=4), 'ckpt.pt', id='earlier'),
    pytest.param(dict(run_id='b', iter_num=6), 'ckpt.pt', id='another run'),
    pytest.param(dict(iter_num=6), 'ckpt.pt', id='unknown run'),
])
def test_latest_checkpoint(tmp_path, last, name):
    save_small(tmp_path / 'ckpt.pt', run_id='a', iter_num=5)
    save_small(tmp_path / 'ckpt_last.pt', **last)
    assert newest_checkpoint(tmp_path) == tmp_path / name


def test_two_unknown_runs(tmp_path):
    save_small(tmp_path / 'ckpt.pt', iter_num=5)
    save_small(tmp_path / 'ckpt_last.pt', iter_num=6)
    assert newest_checkpoint(tmp_path) == tmp_path / 'ckpt.pt'


def test_best_checkpoint(tmp_path):
    save_small(tmp_path / 'ckpt.pt', run_id='a', iter_num=5)
    save_small(tmp_path / 'ckpt_last.pt', run_id='a', iter_num=6)
    assert newest_checkpoint(tmp_path, best=True) == tmp_path / 'ckpt.pt'

# -----------------------------------------------------------------------------
# averaged weights

@pytest.fixture
def averaged(path, tiny, optimizers):
    """ A checkpoint of `tiny`, with averages of twice its weights -> what torch.load reads. """
    averages = {name: 2 * p.detach() for name, p in tiny.named_parameters()}
    save_checkpoint(path, tiny, optimizers, averages=averages, iter_num=3)
    return read(path)


def test_model_is_the_average(averaged, tiny):
    expected = {name: 2 * weight for name, weight in tiny.state_dict().items()}
    torch.testing.assert_close(averaged['model'], expected, rtol=0, atol=0)


def test_weights_that_training_continues_from(averaged, tiny):
    weights = {name: p.detach() for name, p in tiny.named_parameters()}
    torch.testing.assert_close(averaged['training_model'], weights, rtol=0, atol=0)
    with torch.no_grad():
        for p in tiny.parameters():
            p.zero_()
    load_training_weights(tiny, averaged, 'file')
    torch.testing.assert_close(dict(tiny.named_parameters()), averaged['training_model'],
                               rtol=0, atol=0)


def test_checkpoint_without_averages_has_no_second_weights(saved, tiny):
    assert 'training_model' not in saved
    weights = tiny.state_dict()
    load_training_weights(tiny, saved, 'file')
    torch.testing.assert_close(tiny.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize('name, value', [
    ('transformer.h.0.attn.c_attn.weight', torch.zeros(2, 2)),
    ('transformer.wte.weight', 'text'),
    ('transformer.wte.weight', None),
])
def test_training_weights_that_do_not_fit(averaged, tiny, name, value):
    averaged['training_model'][name] = value
    if value is None:
        del averaged['training_model'][name]
    message = error_of(load_training_weights, tiny, averaged, 'file')
    assert message.startswith('file: training_model does not fit')

# -----------------------------------------------------------------------------
# Checkpointer: when to stop

@pytest.mark.parametrize('best_iter, patience, expected', [
    (0, 2, 20),
    (10, 2, 30),
    (10, 1, 20),
    (30, 2, 50),
    (10, 0, None),
])
def test_early_stopping(make_checkpointer, best_iter, patience, expected):
    checkpointer = make_checkpointer(early_stopping=patience)
    stopped = None
    for iter_num in range(0, 60, 5):
        if iter_num % 10 == 0:
            checkpointer.note_evaluation(iter_num, 1 + abs(iter_num - best_iter))
        if stopped is None and checkpointer.should_stop_early(iter_num):
            stopped = iter_num
    assert stopped == expected


def test_early_stopping_without_a_finite_evaluation(make_checkpointer):
    checkpointer = make_checkpointer(early_stopping=2)
    checkpointer.note_evaluation(0, math.nan)
    assert not checkpointer.should_stop_early(0)
    checkpointer.note_evaluation(10, math.nan)
    assert checkpointer.should_stop_early(10)


def test_early_stopping_while_saves_fail(make_checkpointer, full_disk):
    """ The best loss becomes that on disk again; each evaluation is better than the last. """
    checkpointer = make_checkpointer(early_stopping=2)
    full_disk(True)
    for iter_num in (0, 10, 20, 30):
        evaluate_and_save(checkpointer, iter_num, 5 - iter_num / 10)
        assert checkpointer.error
        assert not checkpointer.should_stop_early(iter_num)


@pytest.mark.parametrize('resumed_iter', [0, 10, 20, 30])
def test_early_stopping_of_a_resumed_run(make_checkpointer, tmp_path, resumed_iter):
    """ The model that was saved is evaluated again, but counts once. """
    losses = {0: 3.0, 10: 2.0, 20: 2.5, 30: math.nan, 40: 2.1, 50: 1.0}
    checkpointer = make_checkpointer(always_save_checkpoint=True, early_stopping=3)
    for iter_num, val_loss in losses.items():
        evaluate_and_save(checkpointer, iter_num, val_loss)
        if iter_num == resumed_iter:
            path = tmp_path / 'out/ckpt.pt'
            checkpointer = make_checkpointer(always_save_checkpoint=True, early_stopping=3)
            checkpointer.resume(read(path), path)
            checkpointer.note_evaluation(iter_num, val_loss)
        assert checkpointer.should_stop_early(iter_num) == (iter_num == 40)

# -----------------------------------------------------------------------------
# Checkpointer: when to save

@pytest.fixture
def messages():
    """ What a Checkpointer has printed. """
    return []


@pytest.fixture
def make_checkpointer(tmp_path, tiny, optimizers, messages, monkeypatch):
    """ make_checkpointer(**settings) -> a Checkpointer of a new run that saves in `out`. """
    monkeypatch.chdir(tmp_path)

    def make(is_master=True, scaler=None, **settings):
        config = dict(out_dir='out', always_save_checkpoint=False, checkpoint_interval=0,
                      eval_only=False, gradient_accumulation_steps=2, batch_size=3,
                      block_size=16, early_stopping=0, ema_decay=0.0)
        config.update(settings)
        if scaler is None:
            scaler = torch.amp.GradScaler('cpu', enabled=False)
        ema = EMA(tiny, config['ema_decay'])
        return Checkpointer(config, tiny, optimizers, scaler, ema, {'kind': 'gpt2'}, 'job',
                            messages.append, is_master)
    return make


@pytest.fixture
def checkpointer(make_checkpointer):
    """ A Checkpointer that keeps the best model and the latest. """
    return make_checkpointer()


def should_save(checkpointer, iter_num, is_stopping=False, num_skipped_steps=0):
    return checkpointer.should_save(iter_num, is_stopping, num_skipped_steps)


@pytest.mark.parametrize('iter_num, val_loss, expected', [
    pytest.param(10, 2.0, True, id='finite'),
    pytest.param(10, math.nan, False, id='NaN'),
    pytest.param(10, math.inf, False, id='inf'),
    pytest.param(0, 2.0, False, id='not trained'),
])
def test_save_after_an_evaluation(checkpointer, iter_num, val_loss, expected):
    checkpointer.note_evaluation(iter_num, val_loss)
    assert should_save(checkpointer, iter_num) == expected


@pytest.mark.parametrize('iter_num, expected', [(7, True), (8, False), (14, True)])
def test_save_every_checkpoint_interval(make_checkpointer, iter_num, expected):
    checkpointer = make_checkpointer(checkpoint_interval=7)
    assert should_save(checkpointer, iter_num) == expected


def test_no_save_before_the_first_update(make_checkpointer):
    assert not should_save(make_checkpointer(checkpoint_interval=7), 0)


def test_no_save_without_a_checkpoint_interval(checkpointer):
    assert not should_save(checkpointer, 7)


def test_no_save_while_updates_are_skipped(make_checkpointer):
    checkpointer = make_checkpointer(checkpoint_interval=7)
    assert not should_save(checkpointer, 7, num_skipped_steps=1)


def test_evaluation_decides_at_a_checkpoint_interval(make_checkpointer):
    checkpointer = make_checkpointer(checkpoint_interval=5)
    checkpointer.note_evaluation(10, math.nan)
    assert not should_save(checkpointer, 10)
    assert should_save(checkpointer, 15)


def test_save_on_a_signal(checkpointer):
    assert should_save(checkpointer, 3, is_stopping=True)


def test_no_save_on_a_signal_if_there_is_nothing_new(checkpointer):
    checkpointer.save(3, is_stopping=False)
    assert not should_save(checkpointer, 3, is_stopping=True)


def test_no_save_of_the_checkpoint_that_was_resumed(checkpointer, saved, path):
    checkpointer.resume(load_checkpoint(path), path)
    checkpointer.note_evaluation(1, 3.0)
    assert not should_save(checkpointer, 1)


def test_save_of_a_resumed_model_that_turns_out_to_be_the_best(checkpointer, saved, path):
    """ It was saved by a signal or an interval, and the run was stopped before its evaluation. """
    checkpointer.resume(load_checkpoint(path), path)
    checkpointer.note_evaluation(1, 2.0)
    assert should_save(checkpointer, 1)

# -----------------------------------------------------------------------------
# Checkpointer: what is saved where

def evaluate_and_save(checkpointer, iter_num, val_loss):
    checkpointer.note_evaluation(iter_num, val_loss)
    checkpointer.save(iter_num, is_stopping=False, seconds=100.0)


def iterations(folder='out'):
    """ {name: iteration} of the checkpoints in a folder. """
    names = ('ckpt.pt', 'ckpt_last.pt')
    found = {}
    for name in names:
        path = Path(folder, name)
        if path.exists():
            found[name] = read(path)['iter_num']
    return found


def test_fields_of_a_checkpoint(checkpointer):
    checkpointer.note_evaluation(10, 2.0)
    checkpointer.save(10, is_stopping=False, tokens=960, seconds=1.5, loss=2.25)
    checkpoint = read('out/ckpt.pt')
    expected = dict(iter_num=10, best_val_loss=2.0, best_val_iter=10, tokens=960, seconds=1.5,
                    loss=2.25, job='job', tokenizer={'kind': 'gpt2'}, scaler={},
                    config=checkpointer.config, run_id=checkpointer.run_id)
    assert {key: checkpoint[key] for key in expected} == expected


def test_each_run_has_an_id(make_checkpointer):
    assert make_checkpointer().run_id != make_checkpointer().run_id


def test_best_and_latest(checkpointer):
    evaluate_and_save(checkpointer, 10, 2.0)
    assert iterations() == {'ckpt.pt': 10}
    evaluate_and_save(checkpointer, 20, 3.0)
    assert iterations() == {'ckpt.pt': 10, 'ckpt_last.pt': 20}
    evaluate_and_save(checkpointer, 30, 1.0)
    assert iterations() == {'ckpt.pt': 30}


def test_latest_between_evaluations(checkpointer):
    evaluate_and_save(checkpointer, 10, 2.0)
    checkpointer.save(15, is_stopping=False, seconds=100.0)
    assert iterations() == {'ckpt.pt': 10, 'ckpt_last.pt': 15}
    assert read('out/ckpt_last.pt')['best_val_loss'] == 2.0
    assert read('out/ckpt_last.pt')['best_val_iter'] == 10


def test_always_save_checkpoint(make_checkpointer):
    checkpointer = make_checkpointer(always_save_checkpoint=True)
    evaluate_and_save(checkpointer, 10, 2.0)
    evaluate_and_save(checkpointer, 20, 3.0)
    checkpointer.save(25, is_stopping=False, seconds=100.0)
    assert iterations() == {'ckpt.pt': 25}
    assert read('out/ckpt.pt')['best_val_iter'] == 10


def test_new_run_without_a_best_model_replaces_both(checkpointer, tmp_path):
    (tmp_path / 'out').mkdir()
    save_small(tmp_path / 'out/ckpt.pt', iter_num=99)
    save_small(tmp_path / 'out/ckpt_last.pt', iter_num=99)
    checkpointer.save(5, is_stopping=False, seconds=100.0)
    assert iterations() == {'ckpt_last.pt': 5}


def test_new_run_keeps_its_best_and_latest(checkpointer, tmp_path):
    (tmp_path / 'out').mkdir()
    save_small(tmp_path / 'out/ckpt.pt', iter_num=99)
    save_small(tmp_path / 'out/ckpt_last.pt', iter_num=99)
    evaluate_and_save(checkpointer, 10, 2.0)
    assert iterations() == {'ckpt.pt': 10}
    checkpointer.save(12, is_stopping=False, seconds=100.0)
    assert iterations() == {'ckpt.pt': 10, 'ckpt_last.pt': 12}


def test_other_processes_do_not_save(make_checkpointer, tmp_path):
    evaluate_and_save(make_checkpointer(is_master=False), 10, 2.0)
    assert not (tmp_path / 'out').exists()


def test_message_of_a_save(checkpointer, messages):
    evaluate_and_save(checkpointer, 10, 2.0)
    assert messages == ['saving checkpoint to out']

# -----------------------------------------------------------------------------
# Checkpointer: a run that is stopped within its first minute

@pytest.fixture
def earlier_run(tmp_path):
    """ The checkpoint of an earlier run in `out`. """
    (tmp_path / 'out').mkdir()
    save_small(tmp_path / 'out/ckpt.pt', iter_num=99)


def stop(checkpointer, iter_num, seconds):
    checkpointer.save(iter_num, is_stopping=True, seconds=seconds)


def test_short_run_does_not_replace_another_run(checkpointer, earlier_run):
    stop(checkpointer, 5, seconds=59.9)
    assert iterations() == {'ckpt.pt': 99}
    assert 'does not replace the earlier run in out' in checkpointer.error


def test_longer_run_replaces_another_run(checkpointer, earlier_run):
    stop(checkpointer, 5, seconds=60.0)
    assert iterations() == {'ckpt_last.pt': 5}
    assert checkpointer.error == ''


def test_short_run_in_an_empty_folder_is_saved(checkpointer):
    stop(checkpointer, 5, seconds=1.0)
    assert iterations() == {'ckpt_last.pt': 5}


def test_short_run_that_is_not_stopped_replaces_another_run(checkpointer, earlier_run):
    checkpointer.save(5, is_stopping=False, seconds=1.0)
    assert iterations() == {'ckpt_last.pt': 5}


def test_short_run_that_has_saved_before_is_saved(checkpointer, earlier_run):
    checkpointer.save(5, is_stopping=False, seconds=1.0)
    stop(checkpointer, 6, seconds=2.0)
    assert iterations() == {'ckpt_last.pt': 6}


def test_short_run_that_was_resumed_is_saved(checkpointer, saved, path, tmp_path):
    (tmp_path / 'out').mkdir()
    shutil.copy(path, 'out/ckpt.pt')
    checkpointer.resume(load_checkpoint('out/ckpt.pt'), 'out/ckpt.pt')
    stop(checkpointer, 5, seconds=1.0)
    assert iterations() == {'ckpt.pt': 1, 'ckpt_last.pt': 5}

# -----------------------------------------------------------------------------
# Checkpointer: a save that fails

@pytest.fixture
def full_disk(monkeypatch):
    """ full_disk(True) fills the disk up, full_disk(False) empties it. """
    def fill(is_full):
        free = 1000 if is_full else 10**12
        monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free))
    return fill


def test_failed_save(checkpointer, full_disk, messages):
    """ The best loss is then that of the checkpoint on the disk. """
    evaluate_and_save(checkpointer, 10, 2.0)
    full_disk(True)
    evaluate_and_save(checkpointer, 20, 1.0)
    assert iterations() == {'ckpt.pt': 10}
    assert (checkpointer.best_val_loss, checkpointer.best_val_iter) == (2.0, 10)
    assert checkpointer.saved_iter == 10
    assert 'MB needed' in checkpointer.error
    assert 'nothing was saved' in messages[-1]
    assert checkpointer.error in messages[-1]


def test_save_after_a_failed_save(checkpointer, full_disk):
    evaluate_and_save(checkpointer, 10, 2.0)
    full_disk(True)
    evaluate_and_save(checkpointer, 20, 1.0)
    full_disk(False)
    evaluate_and_save(checkpointer, 30, 1.5)  # better than what is on the disk
    assert iterations() == {'ckpt.pt': 30}
    assert checkpointer.error == ''


def test_failed_first_save(checkpointer, full_disk):
    full_disk(True)
    evaluate_and_save(checkpointer, 10, 2.0)
    assert (checkpointer.best_val_loss, checkpointer.best_val_iter) == (math.inf, None)
    assert not checkpointer.owns_files


def test_failed_save_keeps_the_earlier_run(checkpointer, full_disk, earlier_run):
    full_disk(True)
    evaluate_and_save(checkpointer, 10, 2.0)
    assert iterations() == {'ckpt.pt': 99}

# -----------------------------------------------------------------------------
# Checkpointer: resume

def test_resume(make_checkpointer):
    before = make_checkpointer()
    before.note_evaluation(10, 2.0)
    before.save(10, is_stopping=False, tokens=960, seconds=1.5, loss=2.25)
    after = make_checkpointer()
    progress = after.resume(load_checkpoint('out/ckpt.pt'), 'out/ckpt.pt')
    assert progress == {'tokens': 960, 'seconds': 1.5, 'loss': 2.25}
    assert after.run_id == before.run_id
    assert after.first_iter == 10
    assert (after.best_val_loss, after.best_val_iter) == (2.0, 10)
    assert after.best_description() == 'best val loss 2.0000 at step 10'


def test_resume_of_a_nanogpt_checkpoint(checkpointer, saved, path):
    new_id = checkpointer.run_id
    saved['best_val_loss'] = torch.tensor(2.5)
    saved['iter_num'] = 7
    torch.save(saved, path)
    progress = checkpointer.resume(load_checkpoint(path), path)
    tokens = 7 * 2 * 3 * 16  # iterations * gradient_accumulation_steps * batch_size * block_size
    assert progress == {'tokens': tokens, 'seconds': 0.0, 'loss': None}
    assert checkpointer.run_id == new_id
    assert checkpointer.best_description() == 'best val loss 2.5000'


def test_failed_save_after_a_resume(checkpointer, saved, path, full_disk):
    checkpointer.resume(load_checkpoint(path), path)
    full_disk(True)
    evaluate_and_save(checkpointer, 20, 1.0)
    assert checkpointer.best_val_loss == 2.5


def test_resume_restores_the_scale_of_float16(make_checkpointer, path, tiny, optimizers):
    scaler = torch.amp.GradScaler('cpu')
    state = {**scaler.state_dict(), 'scale': 1024.0}
    save_checkpoint(path, tiny, optimizers, iter_num=1, scaler=state)
    make_checkpointer(scaler=scaler).resume(load_checkpoint(path), path)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize('fields', [
    pytest.param(dict(scaler={}), id='scaler was disabled'),
    pytest.param(dict(), id='nanoGPT'),
])
def test_resume_in_float16_of_a_run_in_another_dtype(
        make_checkpointer, path, tiny, optimizers, fields):
    scaler = torch.amp.GradScaler('cpu')
    save_checkpoint(path, tiny, optimizers, iter_num=1, **fields)
    make_checkpointer(scaler=scaler).resume(load_checkpoint(path), path)
    assert scaler.get_scale() == 65536.0

# -----------------------------------------------------------------------------
# runs of train.py

@pytest.fixture
def trainer(script_globals, dataset, monkeypatch):
    """ trainer(**settings) runs train.py in this process, by default saving the best model. """
    monkeypatch.setattr(metrics.Timer, 'PEAK_MEASUREMENTS', 1)  # one is enough here, and faster

    def train(**settings):
        defaults = {**SMALL, 'dataset': dataset, 'always_save_checkpoint': False}
        return script_globals('train.py', **{**defaults, **settings})
    return train


def test_resume_continues_from_the_latest(trainer, capsys):
    settings = dict(eval_interval=5, checkpoint_interval=4, decay_lr=False)
    trainer(**settings, max_iters=10)
    trainer(**settings, max_iters=12, init_from='resume', learning_rate=3.0)  # it gets worse
    assert iterations() == {'ckpt.pt': 10, 'ckpt_last.pt': 12}
    assert read('out/ckpt.pt')['run_id'] == read('out/ckpt_last.pt')['run_id']
    trainer(**settings, max_iters=13, init_from='resume')
    assert 'resuming out/ckpt_last.pt at iteration 12' in capsys.readouterr().out


def test_new_run_replaces_both_checkpoints(trainer, capsys):
    settings = dict(eval_interval=5, decay_lr=False)
    trainer(**settings, max_iters=10)
    trainer(**settings, max_iters=12, init_from='resume', learning_rate=3.0)
    capsys.readouterr()
    trainer(max_iters=4)
    assert 'the checkpoint of an earlier run in out will be replaced' in capsys.readouterr().out
    assert iterations() == {'ckpt.pt': 4}


def test_best_model_that_was_saved_before_its_evaluation(trainer, tmp_path):
    """ A run is killed right before the evaluation that would find its best model, and resumed. """
    settings = dict(eval_interval=10, max_iters=10)
    trainer(**settings, out_dir='uninterrupted')
    trainer(**settings)
    checkpoint = read('out/ckpt.pt')
    checkpoint['best_val_loss'] += 1
    torch.save(checkpoint, 'out/ckpt_last.pt')
    (tmp_path / 'out/ckpt.pt').unlink()
    trainer(**settings, init_from='resume')
    assert differences(tmp_path / 'out', tmp_path / 'uninterrupted') == []


def test_training_continues_after_a_failed_save(trainer, full_disk, capsys, tmp_path):
    trainer(max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    best_val_loss = read('out/ckpt.pt')['best_val_loss']
    full_disk(True)
    with pytest.raises(SystemExit) as stopped:
        trainer(max_iters=20, init_from='resume')
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith('iter 19:') for line in lines)
    assert f'best val loss {best_val_loss:.4f}' in lines[-1]
    assert 'NOT SAVED: out: ' in lines[-1]
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == ['ckpt.pt', 'log.csv']

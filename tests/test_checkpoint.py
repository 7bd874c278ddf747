""" components/checkpoint.py: the format of a checkpoint, and which checkpoints a run keeps. """
import math
import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import NANOGPT_MODEL_ARGS, save_checkpoint

from components import checkpoint as checkpoint_module
from components.checkpoint import (
    Checkpoints,
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    resume,
)
from components.errors import UserError
from components.optim import configure_optimizers
from model import GPT, GPTConfig


def new_optimizers(model, muon_lr=0.0):
    return configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr)


def new_scaler(enabled=False):
    return torch.amp.GradScaler('cpu', enabled=enabled)


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


@pytest.fixture
def path(tmp_path):
    """ The path of a checkpoint. """
    return tmp_path / 'ckpt.pt'


@pytest.fixture
def saved(path, tiny):
    """ What the checkpoint of `tiny` at `path` holds, after one update by AdamW. """
    optimizers = new_optimizers(tiny)
    train_step(tiny, optimizers)
    save_checkpoint(path, tiny, optimizers, iter_num=1, best_val_loss=2.5, config={'seed': 1})
    return read(path)

def test_evaluations_without_a_new_best_are_counted():
    """ Also if the iteration of the best one is unknown, as in nanoGPT's files. """
    progress = Progress(iter_num=20, best_val_loss=0.5)
    counts = []
    for val_loss in (0.6, 0.6, math.nan, 0.4, 0.5):
        progress.add_evaluation(val_loss)
        progress.add_evaluation(val_loss)  # again, after a resume
        counts.append(progress.num_evals_without_best)
        progress.add_update(1.0, 100)
    assert counts == [1, 2, 3, 0, 1]

# -----------------------------------------------------------------------------
# the format

def test_keys_of_the_nanogpt_format(saved):
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(saved)
    assert sorted(saved['model_args']) == NANOGPT_MODEL_ARGS
    assert torch.equal(saved['model']['lm_head.weight'], saved['model']['transformer.wte.weight'])


@dataclass
class ExtendedConfig(GPTConfig):
    """ What a user may make of it. """
    window: int = 0
    gated: bool = True


@pytest.mark.parametrize('values, names', [
    (dict(rotary=True, untied=True), ['rotary', 'untied']),
    (dict(rotary=True, rope_base=200), ['rope_base', 'rotary']),
    (dict(rope_base=200), []),  # without rotary it has no effect
    (dict(gelu='tanh'), []),  # it has a key of its own
    (dict(window=4, gated=False), ['gated', 'window']),
], ids=str)
def test_model_args_beyond_nanogpt_are_saved_if_not_at_their_defaults(
        path, monkeypatch, values, names):
    monkeypatch.setattr(checkpoint_module, 'GPTConfig', ExtendedConfig)
    sizes = dict(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16)
    model = GPT(ExtendedConfig(**sizes, **values))
    save_checkpoint(path, model)
    assert sorted(read(path)['model_args']) == sorted([*NANOGPT_MODEL_ARGS, *names])
    assert read(path)['gelu'] == values.get('gelu', 'exact')
    if values != dict(rope_base=200):
        assert ExtendedConfig(**load_checkpoint(path)['model_args']) == model.config


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('zip_format', [True, False])
def test_saved_and_loaded(path, saved, tiny, mmap, zip_format):
    torch.save(saved, path, _use_new_zipfile_serialization=zip_format)
    checkpoint = load_checkpoint(path, mmap)
    assert GPTConfig(**checkpoint['model_args']) == tiny.config
    assert (checkpoint['iter_num'], checkpoint['best_val_loss']) == (1, 2.5)
    twin = GPT(tiny.config)
    load_weights(twin, checkpoint, path)
    torch.testing.assert_close(twin.state_dict(), tiny.state_dict(), rtol=0, atol=0)


def test_old_files(path, saved, tiny):
    """ What nanoGPT wrote, compiled, and before torch 2; some keys were added later. """
    weights = {f'_orig_mod.{key}': value for key, value in saved['model'].items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    args = {key: saved['model_args'][key] for key in NANOGPT_MODEL_ARGS}
    del args['bias'], args['dropout']
    torch.save({'model': weights, 'model_args': args, 'best_val_loss': torch.tensor(2.5)}, path)
    checkpoint = load_checkpoint(path)
    assert type(checkpoint['best_val_loss']) is float
    config = GPTConfig(**checkpoint['model_args'])
    assert (config.bias, config.dropout, config.gelu) == (True, 0.0, 'exact')
    load_weights(tiny, checkpoint, path)

    torch.save({'model': weights, 'model_args': args}, path)
    assert load_checkpoint(path)['best_val_loss'] == math.inf


def test_causal_mask_of_a_changed_model_is_loaded(path, tiny):
    """ Its name is that of the mask in old files. It may hold -inf. """
    mask = torch.full((4, 4), -math.inf).triu(1)
    tiny.transformer.h[0].attn.register_buffer('bias', mask.clone())
    save_checkpoint(path, tiny)
    tiny.transformer.h[0].attn.bias.zero_()
    load_weights(tiny, load_checkpoint(path), path)
    assert torch.equal(tiny.transformer.h[0].attn.bias, mask)

# -----------------------------------------------------------------------------
# files that cannot be loaded

class CreatesFile:
    """ An object that creates a file if pickle loads it. """

    def __reduce__(self):
        return open, ('created', 'w')


MISSING = object()


@pytest.mark.parametrize('place, value, message', [
    ('config', CreatesFile(), 'contains code'),
    ('model', MISSING, "'model'"),
    ('model', [1], "'model'"),
    ('model_args', MISSING, "'model_args'"),
    ('model_args n_head', MISSING, 'n_head'),
    ('model_args alibi', True, 'alibi'),
    ('model lm_head.weight', MISSING, 'lm_head.weight'),
    ('model lm_head.weight', torch.ones(3, 3), '[3, 3]'),
    ('model lm_head.weight', 'text', 'lm_head.weight'),
    ('model extra', torch.ones(1), 'extra'),
    ('model transformer.wpe.weight', torch.full((16, 16), math.nan), 'NaN'),
    ('model transformer.wpe.weight', torch.full((16, 16), math.inf), 'inf'),
    ('iter_num', MISSING, 'loads only its weights'),
    ('iter_num', 'x', 'loads only its weights'),
    ('optimizer', MISSING, 'loads only its weights'),
    ('optimizer param_groups', [], 'other parameters'),
    ('optimizer param_groups', [3, 4], 'loads only its weights'),
    ('optimizer state', {0: {'momentum_buffer': torch.ones(40, 16)}}, 'another kind'),
    ('optimizer state', {0: {'exp_avg': torch.ones(40, 16)}}, 'loads only its weights'),
    ('muon', {'param_groups': []}, 'muon_lr'),
    ('training_model', {}, 'ema_decay'),
])
def test_checkpoint_that_cannot_be_resumed(path, saved, tiny, monkeypatch, place, value, message):
    monkeypatch.chdir(path.parent)
    *keys, last_key = place.split()
    parent = saved
    for key in keys:
        parent = parent[key]
    if value is MISSING:
        del parent[last_key]
    else:
        parent[last_key] = value
    torch.save(saved, path)
    with pytest.raises(UserError) as caught:
        checkpoint = load_checkpoint(path)
        load_weights(tiny, checkpoint, path)
        resume(checkpoint, path, new_optimizers(tiny), new_scaler(), 64)
    error = str(caught.value)
    assert error.startswith(str(path))
    assert message in error
    assert '\n' not in error
    assert not Path('created').exists()


def test_other_files(path):
    with pytest.raises(UserError, match='does not exist'):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match='not a checkpoint'):
        load_checkpoint(path)


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('num_bytes', [0, 4, 200, -3000, -1])
def test_truncated_file(path, saved, num_bytes, mmap):
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match='not a complete checkpoint'):
        load_checkpoint(path, mmap)


@pytest.mark.parametrize('args', [dict(n_embd=8), dict(n_layer=3), dict(bias=True)], ids=str)
def test_optimizer_of_another_model(path, saved, tiny, args):
    other = GPT(GPTConfig(**{**vars(tiny.config), **args}))
    with pytest.raises(UserError, match='other parameters'):
        resume(load_checkpoint(path), path, new_optimizers(other), new_scaler(), 64)

# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize('muon_lr', [0.0, 0.02], ids=['AdamW', 'Muon and AdamW'])
def test_resumed_optimizers_keep_their_settings(path, tiny, muon_lr):
    optimizers = new_optimizers(tiny, muon_lr)
    train_step(tiny, optimizers)
    save_checkpoint(path, tiny, optimizers, iter_num=1)
    loaded = configure_optimizers(GPT(tiny.config), 0.5, 1e-2, (0.8, 0.9), 'cpu', muon_lr)
    resume(load_checkpoint(path), path, loaded, new_scaler(), 64)
    for name in optimizers:
        expected = optimizers[name].state_dict()['state']
        assert len(expected) > 0
        torch.testing.assert_close(loaded[name].state_dict()['state'], expected, rtol=0, atol=0)
    decayed, not_decayed = loaded['optimizer'].param_groups
    assert (decayed['weight_decay'], not_decayed['weight_decay']) == (0.5, 0.0)
    assert (decayed['betas'], decayed['lr']) == ((0.8, 0.9), 1e-2)


def test_moments_of_a_cropped_position_embedding(path, saved, tiny):
    tiny.crop_block_size(8)
    loaded = new_optimizers(tiny)
    resume(load_checkpoint(path), path, loaded, new_scaler(), 64)
    moment = loaded['optimizer'].state[tiny.transformer.wpe.weight]['exp_avg']
    assert torch.equal(moment, saved['optimizer']['state'][1]['exp_avg'][:8])
    assert moment.untyped_storage().nbytes() == 8 * 16 * 4  # not that of all rows


def test_progress_of_a_file_that_lacks_it(path, saved, tiny):
    keys = ('model', 'model_args', 'optimizer', 'iter_num', 'best_val_loss')  # as nanoGPT's
    torch.save({key: saved[key] for key in keys}, path)
    progress = resume(load_checkpoint(path), path, new_optimizers(tiny), new_scaler(), 64)
    assert progress == Progress(iter_num=1, tokens=64, best_val_loss=2.5, run_id=progress.run_id)


@pytest.mark.parametrize('fields, scale', [
    pytest.param(dict(scaler={**new_scaler(True).state_dict(), 'scale': 1024.0}), 1024.0, id='on'),
    pytest.param(dict(scaler={}), 65536.0, id='in another dtype'),
    pytest.param(dict(), 65536.0, id='nanoGPT'),
])
def test_scale_of_float16(path, tiny, fields, scale):
    optimizers = new_optimizers(tiny)
    save_checkpoint(path, tiny, optimizers, iter_num=1, **fields)
    scaler = new_scaler(True)
    resume(load_checkpoint(path), path, optimizers, scaler, 64)
    assert scaler.get_scale() == scale

# -----------------------------------------------------------------------------
# which checkpoints a run keeps

class Run:
    """ Runs that save in `out`, one after another. Their events are methods. """

    def __init__(self, model, always_save, limit_file_size):
        self.model = model
        self.limit_file_size = limit_file_size
        self.optimizers = new_optimizers(model)
        self.always_save = always_save
        self.start()

    def start(self):
        self.progress = Progress()
        self.checkpoints = Checkpoints('out', self.always_save, self.progress, is_resumed=False)

    def resume(self):
        path = find_checkpoint('out')
        self.progress = resume(load_checkpoint(path), path, self.optimizers, new_scaler(), 64)
        self.checkpoints = Checkpoints('out', self.always_save, self.progress, is_resumed=True)

    def save(self, iter_num, loss=2.5, is_stopping=False):
        """ The latest batch had this loss. """
        while self.progress.iter_num < iter_num:
            self.progress.add_update(loss, 64)
        self.checkpoints.save(self.progress, self.model, self.optimizers, new_scaler(), is_stopping)

    def stop(self, iter_num):
        self.save(iter_num, is_stopping=True)

    def evaluate(self, iter_num, val_loss, loss=2.5):
        while self.progress.iter_num < iter_num:
            self.progress.add_update(loss, 64)
        self.progress.add_evaluation(val_loss)
        self.save(iter_num)

    def latest(self):
        self.always_save = True

    def best(self):
        self.always_save = False

    def fill_disk(self):
        self.limit_file_size(10_000)

    def empty_disk(self):
        self.limit_file_size(None)

    def no_links(self):
        os.link = link_on_fat

    def play(self, events):
        """ A save that ends with ! has to fail or to be refused. """
        for event in filter(None, events.split(', ')):
            name, *args = event.strip('!').split()
            getattr(self, name)(*map(float, args))
            if args:
                assert bool(self.checkpoints.error) == event.endswith('!'), event


def link_on_fat(path, copy):
    raise OSError('not supported')


def files():
    """ {name: iteration} of the checkpoints in `out`; nothing else may be there. """
    return {path.name: read(path)['iter_num'] for path in sorted(Path('out').glob('*'))}


@pytest.fixture
def new_run(tiny, tmp_path, monkeypatch, limit_file_size):
    """ new_run(always_save) -> a Run. """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'link', os.link)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)  # a killed process loses no writes
    return lambda always_save: Run(tiny, always_save, limit_file_size)


@pytest.mark.parametrize('always_save, events, best, last', [
    (False, 'evaluate 0 3', None, None),
    (False, 'evaluate 10 2', 10, 10),
    (False, 'evaluate 10 2, evaluate 20 3', 10, 20),
    (False, 'evaluate 10 2, evaluate 20 3, evaluate 30 1', 30, 30),
    (False, 'evaluate 10 2, save 15', 10, 15),
    (False, 'no_links, evaluate 10 2, save 15', 10, 15),
    (False, 'evaluate 0 3, save 5', None, 5),
    (False, 'stop 5', None, 5),
    (False, 'evaluate 10 2, save 15, stop 17', 10, 17),
    (True, 'evaluate 10 2', 10, None),
    (True, 'evaluate 10 2, evaluate 20 3, save 25', 25, None),
    # NaN: an evaluation decides, and between evaluations the loss of a batch
    (False, 'evaluate 10 nan', None, None),
    (False, 'save 5, evaluate 10 inf', None, 5),
    (False, 'save 5, save 10 nan', None, 5),
    (False, 'evaluate 10 2, evaluate 20 nan, save 25', 10, 25),
    (False, 'evaluate 10 2 nan', 10, 10),
    (True, 'evaluate 10 2, evaluate 20 nan', 10, None),
    # resumed
    (False, 'evaluate 10 2, resume, evaluate 10 2, evaluate 20 3', 10, 20),
    (False, 'evaluate 10 2, evaluate 20 3, resume, evaluate 30 2.5', 10, 30),
    (False, 'evaluate 10 2, evaluate 20 3, resume, evaluate 30 1', 30, 30),
    (False, 'evaluate 10 2, resume, stop 11', 10, 11),
    (False, 'save 10, resume, evaluate 10 2', 10, 10),  # saved before it was known to be the best
    # always_save_checkpoint was changed
    (False, 'evaluate 10 2, save 15, latest, resume, save 20', 20, None),
    (True, 'evaluate 10 2, save 15, best, resume, save 20', 15, 20),
    (True, 'evaluate 10 2, save 15, best, resume, evaluate 20 1', 20, 20),
    # another run was here before
    (False, 'evaluate 98 1, save 99, start, evaluate 10 2', 10, 10),
    (False, 'evaluate 98 1, save 99, start, save 5', 5, 5),
    (False, 'evaluate 98 1, save 99, start, save 5, save 10', 5, 10),
    (False, 'evaluate 98 1, save 99, latest, start, save 5', 5, None),
    (True, 'save 99, best, start, save 5, stop 6', 5, 6),
    (False, 'evaluate 98 1, save 99, start, stop 5!', 98, 99),
    (True, 'save 99, start, stop 5!', 99, None),
    # the disk is full
    (False, 'fill_disk, evaluate 10 2!', None, None),
    (False, 'evaluate 10 2, fill_disk, evaluate 20 1!', 10, 10),
    (False, 'evaluate 10 2, fill_disk, evaluate 20 1!, empty_disk, evaluate 30 1.5', 30, 30),
    (True, 'evaluate 10 2, fill_disk, evaluate 20 1!, save 25!', 10, None),
    (False, 'evaluate 98 1, save 99, start, fill_disk, evaluate 10 2!', 98, 99),
])
def test_events_and_files(new_run, always_save, events, best, last):
    run = new_run(always_save)
    run.play(events)
    expected = {'ckpt.pt': best, 'ckpt_last.pt': last}
    assert files() == {name: number for name, number in expected.items() if number is not None}
    if files() and not run.checkpoints.replaces_earlier_run:
        latest = read(find_checkpoint('out'))
        assert latest['iter_num'] == run.checkpoints.saved_iter
        assert latest['best_val_loss'] == run.progress.best_val_loss


def kill_during(function, number):
    """ Calls a function in a fork, killed before its change `number` of files -> if it was. """
    pid = os.fork()
    if pid == 0:
        calls = count()

        def until_killed(call):
            def changed(*args):
                if next(calls) == number:
                    os._exit(9)
                return call(*args)
            return changed

        for name in ('fsync', 'link', 'replace', 'unlink'):
            setattr(os, name, until_killed(getattr(os, name)))
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the saves are forks')
@pytest.mark.parametrize('always_save, events, save', [
    (False, '', 'evaluate 10 2'),
    (False, 'evaluate 10 2', 'evaluate 20 3'),
    (False, 'evaluate 10 2, evaluate 20 3', 'evaluate 30 1'),
    (False, 'no_links, evaluate 10 2, evaluate 20 3', 'evaluate 30 1'),
    (True, 'evaluate 10 2', 'evaluate 20 3'),
    (False, 'evaluate 10 2, save 15, latest, resume', 'save 20'),
    (True, 'evaluate 10 2, save 15, best, resume', 'evaluate 20 1'),
    (False, 'evaluate 98 1, save 99, start', 'save 5'),
    (False, 'evaluate 98 1, save 99, latest, start', 'save 5'),
    (True, 'save 99, best, start', 'save 5'),
])
def test_kills_during_a_save(new_run, monkeypatch, tmp_path, always_save, events, save):
    """ The run continues from this save or the one before, and leaves what it would have left. """
    def run_in(folder):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run = new_run(always_save)
        run.play(events)
        return run

    run = run_in('untouched')
    before = latest_iter()
    run.play(save)
    after = latest_iter()
    run.play('evaluate 40 3')
    expected = files()

    for number in count():
        run = run_in(str(number))
        if not kill_during(lambda run=run: run.play(save), number):
            break
        assert latest_iter() in (before, after)
        if latest_iter() in (None, 99):
            run.start()
        else:
            run.resume()
        run.play(f'{save}, evaluate 40 3')
        assert files() == expected
    assert number >= 3


def latest_iter():
    """ The iteration that a run in `out` would resume from, or None. """
    path = find_checkpoint('out')
    return read(path)['iter_num'] if path.exists() else None


@pytest.mark.parametrize('names, latest, best', [
    ([], 'ckpt.pt', 'ckpt.pt'),
    (['ckpt.pt'], 'ckpt.pt', 'ckpt.pt'),
    (['ckpt_last.pt'], 'ckpt_last.pt', 'ckpt_last.pt'),
    (['ckpt.pt', 'ckpt_last.pt'], 'ckpt_last.pt', 'ckpt.pt'),
])
def test_find_checkpoint(tmp_path, names, latest, best):
    for name in names:
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path) == tmp_path / latest
    assert find_checkpoint(tmp_path, best=True) == tmp_path / best


def test_best_is_a_link(new_run):
    """ It takes no space, and no time to write. """
    run = new_run(always_save=False)
    Path('out').mkdir()
    Path('out/ckpt.pt.tmp').touch()  # left by an interrupted save
    run.play('evaluate 10 2')
    assert os.path.samefile('out/ckpt.pt', 'out/ckpt_last.pt')


def test_message_of_each_save(new_run, capsys):
    run = new_run(always_save=False)
    run.play('evaluate 10 2, save 10, resume, evaluate 10 2, save 11')
    assert capsys.readouterr().out == 'saving checkpoint to out\n' * 2  # of 10 and 11
    run.play('fill_disk, save 12!')
    assert 'ckpt_last.pt: the disk is full' in capsys.readouterr().out


def test_file_of_an_interrupted_save_may_be_a_link_to_the_best(new_run):
    """ Writing into it would destroy that. """
    run = new_run(always_save=False)
    run.play('evaluate 10 2')
    os.replace('out/ckpt_last.pt', 'out/ckpt_last.pt.tmp')  # the state before the last rename
    run.play('resume, fill_disk, save 15!')
    assert files() == {'ckpt.pt': 10}

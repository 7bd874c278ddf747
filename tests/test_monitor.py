""" Updates whose loss or gradients are not finite: what is skipped, counted, and ends a run. """
import math
import re

import pytest
import torch
from conftest import SMALL

import model as model_module
from components.checkpoint import load_checkpoint
from components.monitor import StepMonitor
from components.signals import StopSignal

NAN = float('nan')
INF = float('inf')
FOREVER = 10**9

# -----------------------------------------------------------------------------
# StepMonitor


@pytest.fixture
def printed():
    return []


@pytest.fixture
def make_monitor(printed):
    """ make_monitor(scale=None, ...): in float16 with this scale, or without a scaler. """
    def make(scale=None, **arguments):
        is_float16 = scale is not None
        scaler = torch.amp.GradScaler('cpu', init_scale=scale or 1.0, enabled=is_float16)
        scaler.scale(torch.zeros(()))  # creates the scale
        return StepMonitor('cpu', scaler, StopSignal(is_master=True), printed.append, **arguments)
    return make


def update(monitor, iter_num, loss, grad_norm):
    """ What train.py does with an update. """
    monitor.sum_over_processes(torch.tensor(loss))
    monitor.record(iter_num, torch.tensor(grad_norm))
    monitor.check()


def test_latest_update(make_monitor):
    monitor = make_monitor()
    total = monitor.sum_over_processes(torch.tensor(2.5))
    monitor.record(0, torch.tensor(0.5))
    assert total == 2.5
    assert monitor.latest() == (2.5, 0.5)
    assert monitor.latest_loss() == 2.5


def test_latest_loss_of_an_earlier_run(make_monitor):
    assert make_monitor().latest_loss() is None
    monitor = make_monitor(last_loss=3.0)
    assert monitor.latest_loss() == 3.0
    update(monitor, 0, 2.5, 0.5)
    assert monitor.latest_loss() == 2.5


@pytest.mark.parametrize('loss, grad_norm', [(NAN, NAN), (INF, INF), (2.5, NAN), (2.5, INF)])
def test_skipped_updates_in_a_row(make_monitor, printed, loss, grad_norm):
    monitor = make_monitor()
    counts = []
    for iter_num, is_skipped in enumerate((False, True, True, False, True)):
        if is_skipped:
            update(monitor, iter_num, loss, grad_norm)
        else:
            update(monitor, iter_num, 2.5, 0.5)
        counts.append(monitor.num_skipped_steps)
    assert counts == [0, 1, 2, 0, 1]
    message = f'loss {loss}, grad norm {grad_norm}: update skipped'
    assert printed == [
        f'iter 1: {message}, 1 in a row',
        f'iter 2: {message}, 2 in a row',
        f'iter 4: {message}, 1 in a row',
    ]


@pytest.mark.parametrize('scale, loss, is_skipped', [
    pytest.param(None, 2.5, True, id='no scaler'),
    pytest.param(2.0**16, 2.5, False, id='the scale is being lowered'),
    pytest.param(1.0, 2.5, False, id='the scale is 1'),
    pytest.param(0.5, 2.5, True, id='the scale is below 1'),
    pytest.param(2.0**16, NAN, True, id='the loss does not depend on the scale'),
])
def test_gradients_that_overflow_in_float16(make_monitor, printed, scale, loss, is_skipped):
    monitor = make_monitor(scale)
    update(monitor, 0, loss, INF)
    assert monitor.num_skipped_steps == is_skipped
    assert len(printed) == is_skipped


def test_signal(make_monitor):
    monitor = make_monitor()
    update(monitor, 0, 2.5, 0.5)
    assert not monitor.is_stopping
    monitor.stop_signal.number = 15
    update(monitor, 1, 2.5, 0.5)
    assert monitor.is_stopping


def test_cuda_checks_one_iteration_later(make_monitor, printed):
    monitor = make_monitor()
    monitor.delay = 1  # as on CUDA, where the numbers of an update arrive later
    update(monitor, 0, 2.5, 0.5)
    assert monitor.checked_iter is None
    update(monitor, 1, NAN, NAN)
    assert monitor.checked_iter == 0
    assert monitor.num_skipped_steps == 0
    assert math.isnan(monitor.latest_loss())
    update(monitor, 2, 2.5, 0.5)
    assert monitor.checked_iter == 1
    assert monitor.num_skipped_steps == 1
    assert printed[0].startswith('iter 1: ')
    assert len(monitor.reports) == 1  # memory does not grow

# -----------------------------------------------------------------------------
# train.py

FAST = dict(SMALL, eval_interval=0)


@pytest.fixture
def multiply_losses(monkeypatch):
    """ multiply_losses(iterations, value): training losses of these iterations, times `value`. """
    forward = model_module.GPT.forward

    def install(iterations, value):
        num_calls = 0

        def multiplied_forward(self, *args, **options):
            nonlocal num_calls
            logits, loss = forward(self, *args, **options)
            if self.training:
                if num_calls in iterations:
                    loss = loss * value
                num_calls += 1
            return logits, loss
        monkeypatch.setattr(model_module.GPT, 'forward', multiplied_forward)
    return install


@pytest.mark.parametrize('value, grad_clip, dtype', [
    (NAN, 1.0, 'float32'), (INF, 0.0, 'float32'), (INF, 1.0, 'float16')])
def test_skipped_update_changes_nothing(tmp_path, script_globals, dataset, multiply_losses, capsys,
                                        value, grad_clip, dtype):
    settings = {**FAST, 'dataset': dataset, 'grad_clip': grad_clip, 'dtype': dtype,
                'decay_lr': False}
    script_globals('train.py', **{**settings, 'max_iters': 3, 'out_dir': 'before'})
    multiply_losses({3, 4}, value)
    script_globals('train.py', **{**settings, 'max_iters': 5, 'out_dir': 'after'})
    out = capsys.readouterr().out
    assert 'iter 4: loss' in out
    assert 'update skipped, 2 in a row' in out
    before = load_checkpoint(tmp_path / 'before/ckpt.pt')
    after = load_checkpoint(tmp_path / 'after/ckpt.pt')
    for key in ('model', 'optimizer'):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def test_run_ends_after_max_bad_steps(script_globals, dataset, multiply_losses, capsys):
    settings = {**FAST, 'dataset': dataset}
    script_globals('train.py', **{**settings, 'max_iters': 2})
    multiply_losses(range(3, FOREVER), NAN)
    with pytest.raises(SystemExit) as stopped:
        script_globals('train.py', **settings, init_from='resume', max_bad_steps=5)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1
    assert re.search('stopped at iteration 9: 5 .* in a row; --init_from=resume', last_line)
    assert 'out/ckpt.pt with a learning_rate below 0.01' in last_line


def test_run_that_has_saved_nothing_starts_again(tmp_path, script_globals, dataset,
                                                 multiply_losses, capsys):
    multiply_losses(range(4, FOREVER), NAN)
    with pytest.raises(SystemExit):
        script_globals('train.py', **FAST, dataset=dataset, max_bad_steps=5)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert '--init_from' not in last_line
    assert 'a learning_rate below 0.01' in last_line
    assert not list((tmp_path / 'out').glob('*.pt'))


def test_no_save_after_a_skipped_update(tmp_path, script_globals, dataset, multiply_losses):
    multiply_losses(range(4, FOREVER), NAN)
    settings = {**FAST, 'dataset': dataset, 'max_bad_steps': 5, 'checkpoint_interval': 2}
    with pytest.raises(SystemExit):
        script_globals('train.py', **settings)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 4


@pytest.mark.parametrize('max_bad_steps, iterations', [
    pytest.param(2, {1, 3, 5, 7}, id='not in a row'),
    pytest.param(0, range(4, FOREVER), id='no limit'),
])
def test_skipped_updates_that_do_not_end_a_run(script_globals, dataset, multiply_losses,
                                               max_bad_steps, iterations):
    multiply_losses(iterations, NAN)
    names = script_globals('train.py', **FAST, dataset=dataset, max_bad_steps=max_bad_steps)
    assert names['iter_num'] == 20


def test_scaler_that_lowers_its_scale(script_globals, dataset, capsys, monkeypatch):
    """ The first updates of float16 overflow, until the scale fits the gradients. """
    init = torch.amp.GradScaler.__init__
    defaults = tuple(2.0**40 if value == 2.0**16 else value for value in init.__defaults__)
    monkeypatch.setattr(init, '__defaults__', defaults)
    settings = {**FAST, 'dataset': dataset, 'dtype': 'float16', 'max_iters': 40}
    names = script_globals('train.py', **settings, max_bad_steps=3)
    out = capsys.readouterr().out
    assert names['scaler'].get_scale() < 2**36
    assert 'grad norm inf' in out
    assert 'skipped' not in out

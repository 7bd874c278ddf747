""" components/stopping.py: signals and skipped steps that end a run, and what the run saves. """
import itertools
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from processes import LONG, read_until, start_training

import model as model_module
from components import stopping
from components.checkpoint import load_checkpoint
from components.stopping import GRACE_SECONDS, SIGNALS, StopConditions

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
NAN = float('nan')
INF = float('inf')
FOREVER = 10**9


@pytest.fixture(autouse=True)
def restored_signals():
    """ Restores how this process handles signals. """
    numbers = [getattr(signal, name) for name in SIGNALS]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_stop(device='cpu', scale=None, max_skipped_steps=3):
    """ StopConditions of a run in float16 with this scale, or without a scaler. """
    scaler = torch.amp.GradScaler('cpu', init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(torch.zeros(()))  # creates the scale
    return StopConditions(device, scaler, max_skipped_steps)


def after_step(stop, iter_num=0, loss=2.5, grad_norm=0.5):
    stop.after_step(iter_num, torch.tensor(loss), torch.tensor(grad_norm))

# -----------------------------------------------------------------------------
# signals


@pytest.fixture
def clock(monkeypatch):
    """ The clock that StopConditions reads: clock.now is the time in seconds. """
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(stopping, 'time', SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def listening(clock, monkeypatch):
    """ StopConditions that listen. """
    monkeypatch.setattr(os, '_exit', sys.exit)
    stop = make_stop()
    stop.listen()
    return stop


@pytest.mark.parametrize('name', SIGNALS)
def test_signal_ends_the_run_after_its_step(listening, capfd, name):
    number = getattr(signal, name)
    after_step(listening)
    signal.raise_signal(number)
    assert (listening.reason, listening.exit_code) == ('', 0)
    after_step(listening)
    assert (listening.reason, listening.exit_code) == (f'stopped by {name}', 128 + number)
    assert re.fullmatch(f'{name}: .*\n', capfd.readouterr().err)


@pytest.mark.parametrize('seconds, ends_at_once', [
    (GRACE_SECONDS - 1, False), (GRACE_SECONDS + 1, True)])
def test_second_signal(listening, clock, capfd, seconds, ends_at_once):
    signal.raise_signal(signal.SIGINT)
    clock.now += seconds
    if ends_at_once:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)
    assert listening.signal_number == signal.SIGINT
    assert capfd.readouterr().err.count('\n') == 1


def test_signal_within_the_handler(listening, clock, monkeypatch):
    """ Another signal may arrive while the handler handles the first one. """
    def monotonic():
        monkeypatch.setattr(stopping, 'time', SimpleNamespace(monotonic=lambda: clock.now))
        signal.raise_signal(signal.SIGTERM)
        return clock.now
    monkeypatch.setattr(stopping, 'time', SimpleNamespace(monotonic=monotonic))
    signal.raise_signal(signal.SIGINT)
    assert listening.signal_number in (signal.SIGINT, signal.SIGTERM)


def test_ignored_signal_stays_ignored():
    """ nohup starts a process that ignores SIGHUP. """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = make_stop()
    stop.listen()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal_number == 0


def test_signal_of_another_process(monkeypatch):
    monkeypatch.setattr(stopping, 'all_reduce_sum', lambda tensor, device: tensor + 1)
    stop = make_stop()
    after_step(stop)
    assert stop.exit_code == 128 + signal.SIGTERM

# -----------------------------------------------------------------------------
# skipped steps


@pytest.mark.parametrize('loss, grad_norm', [
    (NAN, NAN), (INF, INF), (2.5, NAN), (2.5, INF), (NAN, 0.5)])
def test_skipped_steps_in_a_row(capsys, loss, grad_norm):
    stop = make_stop(max_skipped_steps=3)
    counts = []
    finite = (2.5, 0.5)
    skipped = (loss, grad_norm)
    steps = [finite, skipped, skipped, finite, skipped, skipped, skipped]
    for iter_num, numbers in enumerate(steps):
        assert stop.exit_code == 0
        after_step(stop, iter_num, *numbers)
        counts.append(stop.num_skipped_steps)
    assert counts == [0, 1, 2, 0, 1, 2, 3]
    assert '3 skipped steps' in stop.reason
    assert stop.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert re.match(rf'iter 2: loss {loss}, grad norm {grad_norm}: .* 2 in a row', lines[1])


@pytest.mark.parametrize('scale, loss, is_counted', [
    pytest.param(None, 2.5, True, id='no scaler'),
    pytest.param(2.0**16, 2.5, False, id='the scale is being lowered'),
    pytest.param(1.0, 2.5, False, id='the scale is 1'),
    pytest.param(0.5, 2.5, True, id='the scale is below 1'),
    pytest.param(2.0**16, NAN, True, id='the loss does not depend on the scale'),
])
def test_gradients_that_overflow_in_float16(capsys, scale, loss, is_counted):
    stop = make_stop(scale=scale)
    after_step(stop, 0, loss, INF)
    assert stop.num_skipped_steps == is_counted
    assert capsys.readouterr().out.count('\n') == is_counted


def test_cuda_looks_at_a_step_one_iteration_later():
    stop = make_stop()
    stop.delay = 1  # as on CUDA, where the numbers of a step arrive later
    counts = []
    for iter_num, loss in enumerate([2.5, NAN, 2.5, 2.5]):
        after_step(stop, iter_num, loss)
        counts.append(stop.num_skipped_steps)
    assert counts == [0, 0, 1, 0]
    assert len(stop.unread) == 1  # memory does not grow

# -----------------------------------------------------------------------------
# train.py in this process


@pytest.fixture
def change_losses(monkeypatch):
    """ change_losses(factor) multiplies the loss of training call i of the model by factor(i). """
    def install(factor):
        forward = model_module.GPT.forward
        num_calls = itertools.count()

        def changed_forward(self, *args, **options):
            logits, loss = forward(self, *args, **options)
            if self.training:
                loss = loss * factor(next(num_calls))
            return logits, loss
        monkeypatch.setattr(model_module.GPT, 'forward', changed_forward)
    return install


def nan_in(iterations, value=NAN):
    return lambda i: value if i in iterations else 1.0


def signal_in(iteration, number):
    def factor(i):
        if i == iteration:
            signal.raise_signal(number)
        return 1.0
    return factor


def state_of(names):
    """ The weights and moments at the end of a run. `names` are train.py's global variables. """
    optimizer = names['optimizers']['optimizer'].state_dict()
    return {**names['raw_model'].state_dict(), **optimizer['state']}


@pytest.fixture
def stopped(script_globals, dataset, capfd):
    """ stopped(exit code, **settings): a run that ends early -> what it prints. """
    def execute(code, **settings):
        with pytest.raises(SystemExit) as end:
            script_globals('train.py', **{**SMALL, **LONG, 'dataset': dataset, **settings})
        assert end.value.code == code
        return capfd.readouterr().out
    return execute


def test_run_finishes_its_iteration_and_saves(tmp_path, stopped, change_losses):
    change_losses(signal_in(6, signal.SIGUSR1))
    out = stopped(128 + signal.SIGUSR1)
    assert 'iter 6: loss' in out
    assert 'iter 7: loss' not in out
    assert re.match('stopped by SIGUSR1 at iteration 7; --init_from=resume', out.splitlines()[-1])
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] == 7
    assert not (tmp_path / 'out/ckpt.pt').exists()


def test_resume_after_a_signal_equals_no_interruption(dataset, script_globals, stopped,
                                                      change_losses):
    settings = {**SMALL, **LONG, 'dataset': dataset, 'max_iters': 15, 'dropout': 0.1}
    uninterrupted = script_globals('train.py', **settings, out_dir='uninterrupted')
    change_losses(signal_in(6, signal.SIGTERM))
    stopped(128 + signal.SIGTERM, **settings)
    resumed = script_globals('train.py', **settings, init_from='resume')
    torch.testing.assert_close(state_of(resumed), state_of(uninterrupted), rtol=0, atol=0)


def test_signal_before_the_first_save_keeps_an_earlier_run(tmp_path, dataset, script_globals,
                                                         stopped, change_losses):
    """ The run was perhaps meant to resume the earlier one. """
    script_globals('train.py', **SMALL, dataset=dataset)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    change_losses(signal_in(6, signal.SIGINT))
    assert 'NOT SAVED: ' in stopped(128 + signal.SIGINT)
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    assert [path.name for path in (tmp_path / 'out').glob('*.pt*')] == ['ckpt.pt']


@pytest.mark.parametrize('value, grad_clip, dtype', [
    (NAN, 1.0, 'float32'), (INF, 0.0, 'float32'), (INF, 1.0, 'float16')])
def test_skipped_step_changes_nothing(script_globals, dataset, change_losses, value, grad_clip,
                                      dtype):
    settings = {**SMALL, 'dataset': dataset, 'grad_clip': grad_clip, 'dtype': dtype}
    before = script_globals('train.py', **{**settings, 'max_iters': 3})
    change_losses(nan_in({3, 4}, value))
    after = script_globals('train.py', **{**settings, 'max_iters': 5})
    assert after['iter_num'] == 5
    torch.testing.assert_close(state_of(after), state_of(before), rtol=0, atol=0)


@pytest.mark.parametrize('settings, words, iter_num', [
    pytest.param({}, 'NOT SAVED; .*learning_rate below 0.01', None, id='nothing is saved'),
    pytest.param(dict(checkpoint_interval=2), '--init_from=resume .*iteration 4, .*below 0.01', 4,
                 id='the last sound state is saved'),
])
def test_run_ends_after_max_skipped_steps(tmp_path, stopped, change_losses, settings, words,
                                         iter_num):
    change_losses(nan_in(range(4, FOREVER)))
    last_line = stopped(1, max_skipped_steps=5, **settings).splitlines()[-1]
    assert re.match(f'stopped after 5 skipped steps in a row at iteration 9; {words}', last_line)
    path = tmp_path / 'out/ckpt_last.pt'
    assert path.exists() == (iter_num is not None)
    if iter_num is not None:
        assert load_checkpoint(path)['iter_num'] == iter_num


@pytest.mark.parametrize('max_skipped_steps, iterations', [
    pytest.param(2, {1, 3, 5, 7}, id='not in a row'),
    pytest.param(0, range(4, FOREVER), id='no limit'),
])
def test_skipped_steps_that_do_not_end_a_run(script_globals, dataset, change_losses,
                                             max_skipped_steps, iterations):
    change_losses(nan_in(iterations))
    names = script_globals('train.py', **SMALL, dataset=dataset,
                           max_skipped_steps=max_skipped_steps)
    assert names['iter_num'] == 20


def test_scaler_that_lowers_its_scale(script_globals, dataset, capsys, monkeypatch):
    """ The first steps of float16 overflow, until the scale fits the gradients. """
    init = torch.amp.GradScaler.__init__
    defaults = tuple(2.0**40 if value == 2.0**16 else value for value in init.__defaults__)
    monkeypatch.setattr(init, '__defaults__', defaults)
    settings = {**SMALL, 'dataset': dataset, 'dtype': 'float16', 'max_iters': 40}
    names = script_globals('train.py', **settings, max_skipped_steps=3)
    out = capsys.readouterr().out
    assert names['scaler'].get_scale() < 2**36
    assert 'grad norm inf' in out
    assert 'step skipped' not in out


@pytest.mark.slow
def test_signal_to_a_run_whose_output_is_closed(tmp_path, dataset):
    process = start_training(tmp_path, dataset, **LONG)
    read_until(process, 'iter 5:')
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] > 5

""" Signals that stop a run: what is noted, what is saved, and what ends at once. """
import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from conftest import SMALL, run, train
from kill_and_resume import differences
from processes import LONG, read_until, run_first, start_training

import model as model_module
from components import signals
from components.checkpoint import load_checkpoint
from components.files import _locks, lock_directory
from components.signals import GRACE_SECONDS, NAMES, StopSignal

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')


@pytest.fixture(autouse=True)
def restored_signals():
    """ Restores how this process handles signals. """
    numbers = [getattr(signal, name) for name in NAMES]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

# -----------------------------------------------------------------------------
# one process


@pytest.fixture
def clock(monkeypatch):
    """ The clock that StopSignal reads: clock.now is the time in seconds. """
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(signals, 'time', SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Exited(Exception):
    """ os._exit was called. """


@pytest.fixture
def stop_signal(clock, monkeypatch):
    """ A StopSignal that listens. """
    def exit(code):
        raise Exited(code)
    monkeypatch.setattr(os, '_exit', exit)
    stop_signal = StopSignal(is_master=True)
    stop_signal.listen()
    return stop_signal


@pytest.mark.parametrize('name', NAMES)
def test_first_signal_is_noted(stop_signal, capfd, name):
    number = getattr(signal, name)
    signal.raise_signal(number)
    assert stop_signal.number == number
    assert stop_signal.name == name
    assert stop_signal.exit_code == 128 + number
    error = capfd.readouterr().err
    assert re.fullmatch(f'{name}: .*\n', error)


def test_only_the_master_prints(capfd):
    stop_signal = StopSignal(is_master=False)
    stop_signal.listen()
    signal.raise_signal(signal.SIGTERM)
    assert stop_signal.number == signal.SIGTERM
    assert capfd.readouterr().err == ''


def test_second_signal_within_moments_is_ignored(stop_signal, clock, capfd):
    signal.raise_signal(signal.SIGINT)
    clock.now += GRACE_SECONDS - 1
    signal.raise_signal(signal.SIGTERM)
    assert stop_signal.number == signal.SIGINT
    assert capfd.readouterr().err.count('\n') == 1


def test_second_signal_later_ends_at_once(stop_signal, clock):
    signal.raise_signal(signal.SIGINT)
    clock.now += GRACE_SECONDS + 1
    with pytest.raises(Exited, match=str(128 + signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)


def test_signal_within_the_handler(stop_signal, clock, monkeypatch, capfd):
    """ Another signal may arrive while the handler handles the first one. """
    def monotonic():
        monkeypatch.setattr(signals, 'time', SimpleNamespace(monotonic=lambda: clock.now))
        signal.raise_signal(signal.SIGTERM)
        return clock.now
    monkeypatch.setattr(signals, 'time', SimpleNamespace(monotonic=monotonic))
    signal.raise_signal(signal.SIGINT)
    assert stop_signal.number in (signal.SIGINT, signal.SIGTERM)
    assert capfd.readouterr().err.count('\n') == 1


def test_ignored_signal_stays_ignored(monkeypatch):
    """ nohup starts a process that ignores SIGHUP. """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_signal = StopSignal(is_master=True)
    stop_signal.listen()
    signal.raise_signal(signal.SIGHUP)
    assert stop_signal.number == 0


def test_system_without_some_signals(monkeypatch):
    """ Windows has no SIGHUP and no SIGUSR1. """
    monkeypatch.setattr(signals, 'NAMES', ('SIGTERM', 'SIGNONE'))
    StopSignal(is_master=True).listen()
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_signal_of_another_process():
    stop_signal = StopSignal(is_master=True)
    assert stop_signal.name == 'a signal to another process'
    assert stop_signal.exit_code == 128 + signal.SIGTERM

# -----------------------------------------------------------------------------
# train.py in this process, which sends itself a signal


@pytest.fixture
def signal_in_forward(monkeypatch):
    """ signal_in_forward(number, call) sends a signal during a training call of the model. """
    def install(number, call):
        forward = model_module.GPT.forward
        calls = []

        def forward_with_signal(self, *args, **options):
            if self.training:
                calls.append(args)
                if len(calls) == call:
                    signal.raise_signal(number)
            return forward(self, *args, **options)
        monkeypatch.setattr(model_module.GPT, 'forward', forward_with_signal)
    return install


@pytest.mark.parametrize('name', NAMES)
def test_run_finishes_its_iteration_and_saves(tmp_path, dataset, script_globals, signal_in_forward,
                                              capfd, name):
    number = getattr(signal, name)
    signal_in_forward(number, call=7)
    with pytest.raises(SystemExit) as stopped:
        script_globals('train.py', **{**SMALL, **LONG, 'dataset': dataset})
    out, error = capfd.readouterr()
    assert stopped.value.code == 128 + number
    assert 'iter 6: loss' in out
    assert 'iter 7: loss' not in out
    assert re.match(f'stopped by {name} at iteration 7; --init_from=resume', out.splitlines()[-1])
    assert re.fullmatch(f'{name}: .*\n', error)
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] == 7
    assert not (tmp_path / 'out/ckpt.pt').exists()


def test_resume_after_a_signal_equals_no_interruption(tmp_path, dataset, script_globals,
                                                      signal_in_forward):
    settings = {**SMALL, **LONG, 'dataset': dataset, 'max_iters': 15, 'dropout': 0.1,
                'eval_interval': 7}
    script_globals('train.py', **settings, out_dir='uninterrupted')
    signal_in_forward(signal.SIGTERM, call=7)
    with pytest.raises(SystemExit):
        script_globals('train.py', **settings)
    script_globals('train.py', **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


def test_signal_during_an_evaluation(dataset, script_globals, monkeypatch, capfd):
    """ The evaluation is completed, and an iteration after it. """
    forward = model_module.GPT.forward

    def forward_with_signal(self, *args, **options):
        if not self.training:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, *args, **options)
    monkeypatch.setattr(model_module.GPT, 'forward', forward_with_signal)
    with pytest.raises(SystemExit) as stopped:
        script_globals('train.py', **{**SMALL, **LONG, 'dataset': dataset, 'eval_interval': 10})
    out, _ = capfd.readouterr()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert 'step 0: train loss' in out
    assert 'stopped by SIGTERM at iteration 1;' in out


def test_first_minute_does_not_replace_an_earlier_run(tmp_path, dataset, script_globals,
                                                      signal_in_forward, capfd):
    """ The run was perhaps meant to resume the earlier one. """
    train(tmp_path, dataset, max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    signal_in_forward(signal.SIGINT, call=7)
    with pytest.raises(SystemExit) as stopped:
        script_globals('train.py', **{**SMALL, **LONG, 'dataset': dataset})
    out, _ = capfd.readouterr()
    assert stopped.value.code == 128 + signal.SIGINT
    assert re.search('NOT SAVED: .* 60 seconds', out)
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    assert [path.name for path in (tmp_path / 'out').glob('*.pt*')] == ['ckpt.pt']


def test_second_run_in_the_same_folder_is_refused(tmp_path, dataset):
    out_dir = tmp_path / 'out'
    train(tmp_path, dataset, max_iters=2)
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    lock_directory(out_dir)  # as another run does
    try:
        settings = {**SMALL, 'dataset': dataset, 'init_from': 'auto'}
        _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    finally:
        os.close(_locks.pop(os.path.realpath(out_dir)))
    assert 'another run is writing to' in error
    assert error.count('\n') == 1
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before

# -----------------------------------------------------------------------------
# real processes


@pytest.mark.slow
def test_ctrl_c(tmp_path, dataset):
    process = start_training(tmp_path, dataset, **LONG)
    read_until(process, 'iter 5:')
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert re.fullmatch('SIGINT: .*\n', error)
    assert 'stopped by SIGINT at iteration' in out
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] > 5


@pytest.mark.slow
def test_second_signal_during_an_evaluation(tmp_path, dataset, monkeypatch):
    run_first('from components import signals\nsignals.GRACE_SECONDS = 0', tmp_path, monkeypatch)
    settings = {**LONG, 'eval_interval': 10, 'eval_iters': 100_000}
    process = start_training(tmp_path, dataset, **settings)
    read_until(process, 'checkpoints and log.csv go to')
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith('SIGINT: ')
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_closed_pipe_does_not_end_a_run(tmp_path, dataset):
    process = start_training(tmp_path, dataset, **{**LONG, 'max_iters': 300})
    read_until(process, 'iter 5:')
    process.stdout.close()
    assert process.wait(60) == 0
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 300

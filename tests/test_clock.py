""" components/clock.py: the time of training and the MFU, by themselves and in train.py. """
import re
import time
from types import SimpleNamespace

import pytest
from conftest import SMALL

from components import clock as clock_module
from components.checkpoint import Checkpoints, Progress
from components.clock import WARM_UP_ITERS, Clock


@pytest.fixture
def now(monkeypatch):
    """ The time in seconds is now.seconds. """
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time, 'perf_counter', lambda: now.seconds)
    return now


@pytest.fixture
def make_clock(now, monkeypatch):
    """ make_clock(progress) -> a Clock of iterations of 100 FLOPs on a device of 1000 FLOP/s. """
    monkeypatch.setattr(clock_module, 'peak_flops', lambda device_type, dtype: (1000.0, 'a guess'))
    return lambda progress: Clock(progress, 'cpu', 'float32', 100.0)


def test_pauses_do_not_count(make_clock, now):
    progress = Progress(iter_num=7, seconds=50.0)
    clock = make_clock(progress)
    now.seconds += 2
    assert clock.seconds_per_iter(8) == 2
    now.seconds += 1
    with clock.paused():
        assert progress.seconds == 53  # as a save needs it
        now.seconds += 1800
    now.seconds += 3
    assert clock.seconds_per_iter(9) == 4
    assert progress.seconds == 56
    assert clock.seconds_of_process() == 1806


def test_mean_of_several_iterations(make_clock, now):
    clock = make_clock(Progress(iter_num=7))
    now.seconds += 2
    assert clock.seconds_per_iter(11) == 0.5
    now.seconds += 3
    assert clock.seconds_per_iter(12) == 3


def test_mfu_is_a_running_mean(make_clock, now):
    clock = make_clock(Progress(iter_num=7))
    mfus = []
    for number, seconds in enumerate([9, 9, 9, 9, 9, 0.5, 1], start=1):
        now.seconds += seconds
        clock.seconds_per_iter(7 + number)
        mfus.append(clock.mfu)
    assert mfus[:WARM_UP_ITERS] == [-1] * 5  # as nanoGPT prints it
    assert mfus[5:] == pytest.approx([0.2, 0.9 * 0.2 + 0.1 * 0.1])


def test_mfu_without_the_first_iteration_of_a_process(make_clock, now):
    """ With a long log_interval, the first line has the iteration that compiles. """
    clock = make_clock(Progress())
    now.seconds += 100
    clock.seconds_per_iter(10)
    assert clock.mfu == -1
    now.seconds += 5
    clock.seconds_per_iter(20)
    assert clock.mfu == pytest.approx(0.2)


def test_time_of_a_run(script_globals, dataset, now, monkeypatch, capsys):
    """ Reading the clock takes a second, and a save half an hour. """
    def tick():
        now.seconds += 1
        return now.seconds

    def save(*args, **kwargs):
        now.seconds += 1800

    def guess_peak(device_type, dtype):
        return 1e6, 'a guess'
    settings = {**SMALL, 'dataset': dataset, 'log_interval': 4, 'max_iters': 24, 'eval_interval': 6}
    for module in ('clock', 'summary'):
        monkeypatch.setattr(f'components.{module}.peak_flops', guess_peak)
    monkeypatch.setattr(time, 'perf_counter', tick)
    monkeypatch.setattr(Checkpoints, 'save', save)
    names = script_globals('train.py', **settings)

    assert now.seconds > 5 * 1800
    assert names['progress'].seconds < 60
    pattern = r'^iter (\d+): .* time (\S+)ms, .* (\S+) tokens/s, (\d+):(\d\d):(\d\d) left, '
    lines = re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
    assert [int(line[0]) for line in lines] == [0, 4, 8, 12, 16, 20]
    for number, milliseconds, speed, *left in lines:
        seconds = float(milliseconds) / 1000
        assert 0 < seconds < 10
        assert float(speed.replace(',', '')) == pytest.approx(64 / seconds, rel=0.05)
        hours, minutes, seconds_left = map(int, left)
        assert 3600 * hours + 60 * minutes + seconds_left == round(seconds * (23 - int(number)))

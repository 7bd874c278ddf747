""" A process that hangs or has ended does not keep the others waiting. """
import math
import os
from types import SimpleNamespace

import pytest
from processes import restart_after_a_stopped_process

from components.watchdog import Watchdog


class Ended(Exception):
    """ Instead of the end of this process. """


@pytest.fixture
def watchdog(monkeypatch):
    """ A Watchdog of an iteration after the first one, which raises Ended. """
    def end(code):
        assert code == 1
        raise Ended
    monkeypatch.setattr(os, '_exit', end)
    monkeypatch.setenv('RANK', '3')
    progress = SimpleNamespace(iter_num=20)
    return Watchdog(progress, SimpleNamespace(is_paused=False))


def count(watchdog, most=10_000):
    """ How many seconds the iteration may take. """
    for seconds in range(most):
        try:
            watchdog.add_second()
        except Ended:
            return seconds
    return math.inf


@pytest.mark.parametrize('earlier, has_signal, expected', [
    ([], False, math.inf),  # the first iteration
    ([], True, 10),
    ([1], False, 300),
    ([400], False, 800),    # on a slow machine, or it compiled
    ([400], True, 10),
    ([1, 20, 1], False, 300),
    ([1, 100, 1], False, 1000),
    ([1, 20, 1], True, 70),
])
def test_seconds_of_an_iteration(watchdog, capfd, earlier, has_signal, expected):
    for seconds in earlier:
        for _ in range(seconds):
            watchdog.add_second()
        watchdog.progress.iter_num += 1
    watchdog.has_signal = has_signal
    assert count(watchdog) == expected
    error = capfd.readouterr().err
    assert error.count('\n') == (expected < math.inf)
    if expected < math.inf:
        iteration = f'process 3: iteration {watchdog.iter_num} '
        assert f'{iteration}has not ended in {expected + 1} s' in error


def test_evaluations_and_saves_do_not_count(watchdog):
    watchdog.progress.iter_num = 21
    for is_paused in (False, True, False):
        watchdog.clock.is_paused = is_paused
        for _ in range(300):
            watchdog.add_second()
    assert count(watchdog) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_restart_after_a_process_was_stopped(tmp_path, dataset, monkeypatch):
    restart_after_a_stopped_process(tmp_path, dataset, monkeypatch)

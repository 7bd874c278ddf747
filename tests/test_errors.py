""" Errors that a user can fix are one line; every other error keeps its traceback. """
import os
import re
import signal
import sys

import pytest
import torch
from conftest import SMALL, run, train
from processes import run_first

from components.errors import UserError, how_to_save_memory, install_excepthook, one_line_errors


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/script.py', '--size=3'])


@pytest.mark.parametrize('error, expected', [
    (UserError('several\n  lines\n'), 'script.py: several lines'),
    (FileNotFoundError(2, 'No such file', 'a.txt'), "script.py: [Errno 2] No such file: 'a.txt'"),
], ids=repr)
def test_error_of_the_user(error, expected):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == expected  # printed by Python, with exit code 1


@pytest.mark.parametrize('error', [ValueError(), RuntimeError(), KeyboardInterrupt()], ids=repr)
def test_bug(error):
    with pytest.raises(type(error)) as caught, one_line_errors():
        raise error
    assert caught.value is error

# -----------------------------------------------------------------------------
# the excepthook


class Exited(Exception):
    """ os._exit was called. """


@pytest.fixture
def excepthook(monkeypatch):
    """ excepthook(error, ddp) does what Python does with an error that nothing caught. """
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # installing it replaces this

    def exit(code):
        raise Exited(code)
    monkeypatch.setattr(os, '_exit', exit)

    def execute(error, ddp):
        install_excepthook(SMALL, ddp)
        try:
            raise error
        except type(error):
            sys.excepthook(*sys.exc_info())
    yield execute
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize('error, is_one_line', [
    (torch.OutOfMemoryError('CUDA out of memory.\nTried to allocate'), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
    (ValueError('not enough values to unpack'), False),
], ids=repr)
def test_uncaught_error(excepthook, capfd, error, is_one_line):
    excepthook(error, ddp=False)
    text = capfd.readouterr().err
    with pytest.raises(Exited, match='1'):  # others may wait for this process forever
        excepthook(error, ddp=True)
    assert capfd.readouterr().err.splitlines()[-1] == text.splitlines()[-1]
    if is_one_line:
        assert text.startswith('script.py: out of memory (')
        assert '--batch_size=2' in text
        assert text.count('\n') == 1
    else:
        assert text.startswith('Traceback')
        assert text.endswith(f'{type(error).__name__}: {error}\n')


@pytest.mark.parametrize('batch_size, flags', [
    (12, '--batch_size=6 --gradient_accumulation_steps=80'),
    (9, '--batch_size=3 --gradient_accumulation_steps=120'),
    (1, 'block_size'),
])
def test_smaller_micro_batch_of_the_same_iteration(batch_size, flags):
    settings = dict(batch_size=batch_size, gradient_accumulation_steps=40)
    assert flags in how_to_save_memory(settings)


@pytest.mark.parametrize('before, after', [
    (signal.default_int_handler, signal.SIG_DFL),  # no traceback
    (signal.SIG_IGN, signal.SIG_IGN),  # a shell script starts its background jobs so
])
def test_ctrl_c_before_the_loop(excepthook, before, after):
    signal.signal(signal.SIGINT, before)
    install_excepthook(SMALL, ddp=False)
    assert signal.getsignal(signal.SIGINT) == after

# -----------------------------------------------------------------------------
# the scripts

@pytest.mark.parametrize('script, statement, pattern', [
    ('train.py', 'torch.empty(2**50)', r'train.py: out of memory .*batch_size=2 .*\n'),
    ('bench.py', 'torch.empty(2**50)', r'bench.py: out of memory .*\n'),
    ('train.py', 'a, b = (1,)', r'(?s)Traceback.* in planted_forward\n.*\nValueError: .*'),
    ('sample.py', 'a, b = (1,)', r'(?s)Traceback.* in planted_forward\n.*\nValueError: .*'),
])
def test_error_in_the_model(tmp_path, dataset, monkeypatch, script, statement, pattern):
    settings = {**SMALL, 'dataset': dataset}
    if script == 'bench.py':
        settings = dict(n_layer=1, n_head=1, n_embd=8, block_size=16, batch_size=4, device='cpu')
    if script == 'sample.py':
        train(tmp_path, dataset, max_iters=1)
        settings = dict(device='cpu')
    run_first(f"""
import torch
import model
def planted_forward(self, *args, **options):
    {statement}
model.GPT.forward = planted_forward
""", tmp_path, monkeypatch)
    _, error = run(script, cwd=tmp_path, code=1, **settings)
    assert re.fullmatch(pattern, error)

""" Errors that a user can put right are one line; every other error keeps its traceback. """
import io
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, run, train
from processes import run_first

from components import errors
from components.errors import (
    UserError,
    install_excepthook,
    is_connection_lost,
    is_out_of_memory,
    one_line_errors,
)

# -----------------------------------------------------------------------------
# one_line_errors


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/somewhere/script.py', '--size=3'])


@pytest.mark.parametrize('error, expected', [
    (UserError('size=3 is odd'), 'script.py: size=3 is odd'),
    (OSError('disk full'), 'script.py: disk full'),
    (FileNotFoundError(2, 'No such file or directory', 'a.txt'),
     "script.py: [Errno 2] No such file or directory: 'a.txt'"),
    (UserError('several\n  lines\n'), 'script.py: several lines'),
], ids=repr)
def test_error_of_the_user(error, expected):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == expected  # printed by Python, with exit code 1


@pytest.mark.parametrize('error', [
    ValueError('not enough values to unpack'), TypeError('a bug'), RuntimeError('shapes'),
    AssertionError('a bug'), KeyError('a bug'), KeyboardInterrupt()], ids=repr)
def test_bug(error):
    with pytest.raises(type(error)) as caught, one_line_errors():
        raise error
    assert caught.value is error


def test_no_error():
    with one_line_errors():
        value = 1
    assert value == 1

# -----------------------------------------------------------------------------
# kinds of errors


@pytest.mark.parametrize('error, expected', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB'), True),
    (MemoryError(), True),
    (np.exceptions.AxisError(1), False),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9'), True),
    (RuntimeError('MPS backend out of memory (MPS allocated: 9 GiB)'), True),
    (RuntimeError('Invalid buffer size: 20.00 GB'), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
    (ValueError('out of memory'), False),
], ids=repr)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_real_allocation_that_fails():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize('error, expected', [
    (dist.DistNetworkError('The client socket has failed'), True),
    (dist.DistStoreError('wait timeout'), True),
    (RuntimeError('[gloo/transport/tcp/pair.cc:525] Connection closed by peer [::1]:1234'), True),
    (RuntimeError('Read error: Connection reset by peer'), True),
    (RuntimeError('Broken pipe'), True),
    (RuntimeError('Timed out waiting 1800000ms for send operation to complete'), True),
    (RuntimeError('NCCL communicator was aborted on rank 1'), True),
    (RuntimeError('NCCL error: remote process exited or there was a network error'), True),
    (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
    (ValueError('Connection closed'), False),
], ids=repr)
def test_is_connection_lost(error, expected):
    assert is_connection_lost(error) == expected

# -----------------------------------------------------------------------------
# the excepthook


class Exited(Exception):
    """ os._exit was called. """


@pytest.fixture
def excepthook(monkeypatch):
    """ excepthook(error, ddp=False) does what Python does with an error that nothing caught. """
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # installing it replaces this

    def exit(code):
        raise Exited(code)
    monkeypatch.setattr(os, '_exit', exit)

    def execute(error, ddp=False):
        install_excepthook({**SMALL, 'n_embd': 16}, ddp)
        try:
            raise error
        except type(error):
            sys.excepthook(*sys.exc_info())
    yield execute
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize('ddp', [False, True])
def test_out_of_memory_names_what_to_lower(excepthook, capfd, ddp):
    with pytest.raises(Exited, match='1'):
        excepthook(torch.OutOfMemoryError('CUDA out of memory.\nTried to allocate'), ddp)
    error = capfd.readouterr().err
    assert error.startswith('script.py: out of memory (CUDA out of memory. Tried to allocate)')
    for text in ('batch_size=4', 'gradient_accumulation_steps=1', 'block_size=16', 'n_layer=2',
                 'n_embd=16'):
        assert text in error
    assert error.count('\n') == 1


def test_connection_lost(excepthook, capfd):
    with pytest.raises(Exited, match='1'):
        excepthook(RuntimeError('Connection closed by peer'), ddp=True)
    error = capfd.readouterr().err
    assert re.match(r'script.py: another process .*\(Connection closed', error)
    assert error.count('\n') == 1


def test_connection_lost_by_a_single_process(excepthook, capfd):
    excepthook(RuntimeError('Connection closed by peer'), ddp=False)
    assert 'Traceback' in capfd.readouterr().err


def test_traceback_where_torch_has_replaced_stderr(excepthook, capfd, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    excepthook(ValueError('a bug'))
    assert capfd.readouterr().err.startswith('Traceback')


def test_bug_keeps_its_traceback(excepthook, capfd):
    excepthook(ValueError('not enough values to unpack'))
    error = capfd.readouterr().err
    assert error.startswith('Traceback')
    assert error.endswith('\nValueError: not enough values to unpack\n')


def test_bug_in_one_of_several_processes(excepthook, capfd):
    """ os._exit, because others may wait for this process forever. """
    with pytest.raises(Exited, match='1'):
        excepthook(ValueError('not enough values to unpack'), ddp=True)
    error = capfd.readouterr().err
    assert error.startswith('Traceback')
    assert error.splitlines()[-1].startswith('script.py: this process')


class WandbError(Exception):
    __module__ = 'wandb.errors'


@pytest.mark.parametrize('error, hint', [
    (IndexError('index out of range in self'), 'token id outside'),
    (RuntimeError('CUDA error: device-side assert triggered'), 'token id outside'),
    (WandbError('api_key not configured'), '--wandb_log=False'),
], ids=repr)
def test_hint_follows_the_traceback(excepthook, capfd, error, hint):
    excepthook(error)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith('Traceback')
    assert lines[-1].startswith('hint: ')
    assert hint in lines[-1]

# -----------------------------------------------------------------------------
# the scripts

PLANTED_BUGS = {
    'shapes': 'return torch.zeros(2, 3) @ torch.zeros(2, 3)',
    'values to unpack': 'a, b = (1,)',
}


def plant(statement, folder, monkeypatch):
    """ GPT.forward of the scripts that the test starts executes `statement`. """
    run_first(f"""
import torch
import model
def planted_forward(self, *args, **options):
    {statement}
model.GPT.forward = planted_forward
""", folder, monkeypatch)


@pytest.mark.parametrize('message', PLANTED_BUGS)
def test_bug_in_train(tmp_path, dataset, monkeypatch, message):
    plant(PLANTED_BUGS[message], tmp_path, monkeypatch)
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset})
    assert error.startswith('Traceback')
    assert 'in planted_forward' in error
    assert message in error.splitlines()[-1]


@pytest.mark.parametrize('message', PLANTED_BUGS)
def test_bug_in_sample(tmp_path, dataset, monkeypatch, message):
    train(tmp_path, dataset, max_iters=1)
    plant(PLANTED_BUGS[message], tmp_path, monkeypatch)
    _, error = run('sample.py', cwd=tmp_path, code=1, device='cpu')
    assert error.startswith('Traceback')
    assert 'in planted_forward' in error
    assert message in error.splitlines()[-1]


@pytest.mark.parametrize('script_name, settings', [
    ('train.py', SMALL),
    ('bench.py', dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, device='cpu')),
])
def test_scripts_without_memory(tmp_path, dataset, monkeypatch, script_name, settings):
    plant('torch.empty(2**50)', tmp_path, monkeypatch)
    _, error = run(script_name, cwd=tmp_path, code=1, **{**settings, 'dataset': dataset})
    assert error.startswith(f'{script_name}: out of memory (')
    assert 'batch_size=4' in error
    assert error.count('\n') == 1


def test_token_outside_the_vocabulary(tmp_path, dataset, monkeypatch):
    """ Of a large dataset, open_bin() looks at a sample, which may miss the token. """
    (tmp_path / 'words').mkdir()
    ids = np.fromfile(dataset / 'train.bin', dtype=np.uint16)
    ids[::20] = 500
    ids.tofile(tmp_path / 'words/train.bin')
    for name in ('val.bin', 'meta.pkl'):
        (tmp_path / 'words' / name).write_bytes((dataset / name).read_bytes())
    run_first("""
from components import dataset, settings
dataset.largest_id = settings.largest_id = lambda ids: 0
""", tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': tmp_path / 'words'}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    lines = error.splitlines()
    assert lines[0].startswith('Traceback')
    assert lines[-2] == 'IndexError: index out of range in self'
    assert re.search('^hint: .*prepare the dataset again', lines[-1])


def test_ctrl_c_before_the_loop(monkeypatch, excepthook):
    """ It ends a script at once, without a traceback. """
    install_excepthook({}, ddp=False)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_ctrl_c_stays_ignored(excepthook):
    """ A shell script starts its background jobs so. """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    install_excepthook({}, ddp=False)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_script_name():
    assert errors.script_name() == 'script.py'

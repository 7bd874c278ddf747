"""
What the tests share: the scripts, run as a user would from another folder, and small datasets.

A dataset may be named by an absolute path (data/ joined with it is that path), so the tests write
nothing into the repository.
"""
import atexit
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpt2 import gpt2  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tensors are tiny, and two threads would wait for each other
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')
           if hasattr(signal, name)]  # Windows has only some of them
for number in SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:  # as a shell or nohup may have set it
        signal.signal(number, signal.SIG_DFL)

from components import files  # noqa: E402
from components.checkpoint import Progress, make_checkpoint  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

NANOGPT_MODEL_ARGS = ['bias', 'block_size', 'dropout', 'n_embd', 'n_head', 'n_layer', 'vocab_size']

# a model and a run so small that a step takes a millisecond or two
SMALL = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=1,
    eval_iters=2, eval_interval=10, max_iters=20, lr_decay_iters=20, warmup_iters=2,
    learning_rate=1e-2, min_lr=1e-3, device='cpu', compile=False, dtype='float32')
# the architecture of the configs named _fast, and a small training run with it
FAST_MODEL = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)
FAST = dict(FAST_MODEL, muon_lr=0.02, cooldown_iters=10)


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """ A character dataset of words, with a structure that a model can learn -> its folder. """
    folder = tmp_path_factory.mktemp('data') / 'words'
    folder.mkdir()
    words = np.array(['the ', 'cat ', 'sat ', 'on ', 'a ', 'mat.\n'])
    text = ''.join(words[np.random.default_rng(0).integers(len(words), size=2000)])
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[:6000].tofile(folder / 'train.bin')
    ids[6000:].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def other_characters(tmp_path, dataset):
    """ The same dataset with two characters swapped in its vocabulary -> its folder. """
    other = tmp_path / 'other'
    shutil.copytree(dataset, other)
    meta = pickle.loads((other / 'meta.pkl').read_bytes())
    itos = meta['itos']
    itos[0], itos[1] = itos[1], itos[0]
    (other / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return other


@pytest.fixture
def tiny():
    """ A small GPT of the default architecture, the same every time. """
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False)
    return GPT(config)


def save_checkpoint(path, model, optimizers=None, **fields):
    """ Writes a checkpoint of a model, with these values of its keys. """
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    torch.save(make_checkpoint(Progress(), model, optimizers or {}, scaler, fields), path)


@pytest.fixture
def limit_file_size():
    """ limit_file_size(bytes) makes larger writes fail, as on a full disk; None ends that. """
    resource = pytest.importorskip('resource')
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or largest, largest))

    return limit


def pytest_runtest_makereport():
    """ Ends the limit of limit_file_size before pytest writes the result, perhaps into a file. """
    if os.name == 'posix':
        import resource
        _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


@pytest.fixture
def clone(tmp_path):
    """ A copy of the repository without datasets and runs -> its folder. """
    folder = tmp_path / 'clone'
    left_out = shutil.ignore_patterns('.*', 'out*', '*.bin', '*.pkl', '*.tmp', 'input.txt',
                                      '__pycache__', 'wandb', 'bench_log')
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder

# -----------------------------------------------------------------------------
# scripts in processes of their own

def flags(settings):
    return [f'--{key}={value}' for key, value in settings.items()]


def environment():
    return {**os.environ, 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline', 'OMP_NUM_THREADS': '1'}


@cache
def fork_server():
    command = [sys.executable, str(ROOT / 'tests/fork_server.py')]
    env = environment()
    env.pop('PYTHONPATH', None)  # which the test that comes first may have set for its own scripts
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=env)
    atexit.register(process.kill)
    return process


def run_script(script, arguments, cwd, processes=None):
    """
    Runs a script in `cwd`, in several processes if `processes` says so. On Linux these are forks of
    fork_server.py, which start in a fraction of the time, and elsewhere torchrun's.

    Returns exit code, standard output, standard error.
    """
    command = [str(ROOT / script), *map(str, arguments)]
    if sys.platform == 'linux':
        server = fork_server()
        request = [command[0], command[1:], str(cwd), processes or 1, environment()]
        server.stdin.write(json.dumps(request) + '\n')
        server.stdin.flush()
        return json.loads(server.stdout.readline())
    if processes:
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        command = [*torchrun, *command]
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment(),
                          capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def run(script, *args, cwd, processes=None, code=0, **settings):
    """ Runs a script, which has to end with exit code `code` -> standard output and error. """
    ended, out, error = run_script(script, [*args, *flags(settings)], cwd, processes)
    assert ended == code, f'{script} {args} {settings}\n{out}\n{error}'
    return out, error


def train(cwd, dataset, **settings):
    """
    A small training run in `cwd`.

    Returns {iteration: loss}, {iteration: (train loss, val loss)}, and its output.
    """
    out, _ = run('train.py', cwd=cwd, **{**SMALL, 'dataset': dataset, **settings})
    losses = {}
    for number, loss in re.findall(r'^iter (\d+): loss ([^,]+),', out, re.MULTILINE):
        losses[int(number)] = float(loss)
    evaluations = {}
    pattern = r'^step (\d+): train loss (\S+), val loss (\S+)$'
    for number, train_loss, val_loss in re.findall(pattern, out, re.MULTILINE):
        evaluations[int(number)] = (float(train_loss), float(val_loss))
    return losses, evaluations, out

# -----------------------------------------------------------------------------
# scripts in this process

@pytest.fixture
def script_globals(monkeypatch, tmp_path):
    """ script_globals('train.py', ...) runs a script in this process -> its global variables. """
    def execute(name, *args, **settings):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [name, *args, *flags(settings)])
        names = {'__name__': '__main__', '__file__': str(ROOT / name)}
        exec(compile((ROOT / name).read_text(), name, 'exec'), names)
        return names

    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # which scripts replace
    monkeypatch.setattr(files, '_locks', {})  # of folders that this process has locked
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield execute
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for descriptor in files._locks.values():
        os.close(descriptor)


@pytest.fixture
def trainer(script_globals, dataset):
    """
    trainer(**settings) runs train.py in this process, by default without an update -> its global
    variables.
    """
    def execute(**settings):
        return script_globals(
            'train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 0, **settings})
    return execute

"""
What the tests share: the scripts, run as a user would from another folder, and small datasets.

A dataset may be named by an absolute path (data/ joined with it is that path), so the tests write
nothing into the repository.
"""
import atexit
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'data')]
torch.set_num_threads(1)  # tensors are tiny, and two threads wait for each other where the machine is busy

from model import GPT, GPTConfig  # noqa: E402

CLASSIC_MODEL_ARGS = ['bias', 'block_size', 'dropout', 'n_embd', 'n_head', 'n_layer', 'vocab_size']

# a model and a run so small that a step takes a millisecond or two
SMALL = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=1,
             eval_iters=2, eval_interval=10, max_iters=20, lr_decay_iters=20, warmup_iters=2,
             learning_rate=1e-2, min_lr=1e-3, device='cpu', compile=False, dtype='float32')


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """ A character dataset of words, with a structure that a model can learn -> the path of its folder. """
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


def flags(settings):
    return [f'--{key}={value}' for key, value in settings.items()]


def environment():
    return {**os.environ, 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline', 'OMP_NUM_THREADS': '1'}


@cache
def zygote():
    process = subprocess.Popen([sys.executable, str(ROOT / 'tests/zygote.py')], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(process.kill)
    return process


def run_script(script, arguments, cwd, processes=None):
    """
    Runs a script in `cwd`, in so many processes -> exit code, standard output, standard error. On Linux they
    are forks of zygote.py, which start in a fraction of the time, and elsewhere torchrun's.
    """
    arguments = [str(ROOT / script), *map(str, arguments)]
    if sys.platform == 'linux':
        request = [arguments[0], arguments[1:], str(cwd), processes or 1, environment()]
        zygote().stdin.write(json.dumps(request) + '\n')
        zygote().stdin.flush()
        return json.loads(zygote().stdout.readline())
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run([sys.executable, *(torchrun if processes else []), *arguments], cwd=cwd,
                          env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def run(script, *args, cwd, processes=None, code=0, **settings):
    """ run_script() with settings, which has to end with `code` -> standard output and error. """
    ended, out, error = run_script(script, [*args, *flags(settings)], cwd, processes)
    assert ended == code, f'{script} {args} {settings}\n{out}\n{error}'
    return out, error


def train(cwd, dataset, **settings):
    """ A small training run in `cwd` -> {iteration: loss}, {iteration: (train, val loss)}, its output. """
    processes = settings.pop('processes', None)
    out, _ = run('train.py', cwd=cwd, processes=processes, **{**SMALL, 'dataset': dataset, **settings})
    iters, steps = {}, {}
    for line in out.splitlines():
        word, _, rest = line.partition(' ')
        if word == 'iter':
            number, rest = rest.split(': loss ')
            iters[int(number)] = float(rest.split(',')[0])
        elif word == 'step':
            number, rest = rest.split(': train loss ')
            steps[int(number)] = tuple(float(part) for part in rest.split(', val loss '))
    return iters, steps, out


@pytest.fixture
def other_characters(tmp_path, dataset):
    """ The same dataset, with two characters in each other's place -> the path of its folder. """
    other = tmp_path / 'other'
    shutil.copytree(dataset, other)
    meta = pickle.loads((other / 'meta.pkl').read_bytes())
    meta['itos'][0], meta['itos'][1] = meta['itos'][1], meta['itos'][0]
    (other / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return other


@pytest.fixture
def script_globals(monkeypatch, tmp_path):
    """ script_globals('train.py', ...) runs a script in this process -> its variables and functions. """
    def execute(name, *args, **settings):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [name, *args, *flags(settings)])
        names = {'__name__': '__main__', '__file__': str(ROOT / name)}
        exec(compile((ROOT / name).read_text(), name, 'exec'), names)
        return names
    return execute


@pytest.fixture
def tiny():
    """ A GPT of the default architecture, small, the same every time. """
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False))


@pytest.fixture
def clone(tmp_path):
    """ A copy of the repository without datasets and runs -> its folder. """
    folder = tmp_path / 'clone'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        '.*', 'out*', '*.bin', '*.pkl', '*.tmp', 'input.txt', '__pycache__', 'wandb', 'bench_log'))
    return folder

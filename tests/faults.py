"""
Kills training runs with kill -9 at random moments, resumes them, and compares with runs never touched.

    python tests/faults.py --rounds=100 --seed=0

A round is one of several kinds of run: one process or two under torchrun; always saving, or the best; in
float32, or float16 with its scaler; some with saves made slow, so that they are hit as well. It is killed
one to three times, then left to end. Its checkpoints must be bit-identical to those of a run of that kind
that nobody touched, and its log.csv the same but for the times.
"""
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import zygote

torch.set_num_threads(1)  # a fork must not find threads of OpenMP that stayed behind
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import newest_checkpoint  # noqa: E402

KINDS = [  # processes, seconds that a save takes more, settings
    (1, 0.1, dict(always_save_checkpoint=False)),
    (2, 0, dict(always_save_checkpoint=False)),
    (1, 0, dict(always_save_checkpoint=True)),
    (1, 0, dict(always_save_checkpoint=False, dtype='float16', n_layer=1)),
    (1, 0.1, dict(always_save_checkpoint=True, dtype='float16', n_layer=1)),
    (2, 0.1, dict(always_save_checkpoint=True)),
]
SETTINGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=3,
                dropout=0.1, eval_iters=2, eval_interval=7, checkpoint_interval=3, max_iters=20,
                lr_decay_iters=20, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3, device='cpu',
                compile=False, dtype='float32', log_interval=2, init_from='auto')


def make_dataset(folder):
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 8, size=4000).cumsum() % 30  # each depends on the one before
    for split, part in (('train', ids[:3000]), ('val', ids[3000:])):
        part.astype(np.uint16).tofile(folder / f'{split}.bin')


def start(processes, settings, folder, slow):
    """ Starts train.py in `folder` -> wait(), which returns the exit code, and its process id. """
    flags = [f'--{key}={value}' for key, value in settings.items()]
    (folder / 'log').touch()
    with open(folder / 'log', 'a') as log:
        if processes == 1:
            real = os.fsync
            os.fsync = lambda fd: (time.sleep(slow), real(fd))  # the fork takes it along
            try:
                pid = zygote.start(str(ROOT / 'train.py'), flags, folder, log, log)
                return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pid
            finally:
                os.fsync = real
        site = folder / 'site'
        site.mkdir(exist_ok=True)
        (site / 'sitecustomize.py').write_text(
            f'import os, time\nreal = os.fsync\nos.fsync = lambda fd: (time.sleep({slow}), real(fd))\n')
        agent = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
             str(ROOT / 'train.py'), *flags], cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, 'PYTHONPATH': str(site), 'OMP_NUM_THREADS': '1'})
        return agent.wait, agent.pid


def finish(processes, settings, folder, slow):
    """ Runs to the end -> seconds. """
    began = time.monotonic()
    wait, _ = start(processes, settings, folder, slow)
    assert (code := wait()) == 0, f'exit code {code}\n{(folder / "log").read_text()[-3000:]}'
    return time.monotonic() - began


def kill(wait, pid):
    workers = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()
    for process in (pid, *map(int, workers)):  # a worker does not die with its agent
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait()


def differences(a, b):
    """ What differs between two folders of checkpoints, bit by bit, but for the names of runs. """
    found, names = [], ['ckpt.pt', 'ckpt_last.pt']
    if (a / names[1]).exists() and not (b / names[1]).exists() and newest_checkpoint(a) == a / names[0]:
        names.pop()  # a kill just before it was to be removed: it is older, and nothing reads it
    for name in names:
        if (a / name).exists() != (b / name).exists():
            found.append(f'{name} is in one of them')
        elif (a / name).exists():
            x, y = (torch.load(folder / name, weights_only=True) for folder in (a, b))
            for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'scaler'):
                try:
                    torch.testing.assert_close(x[key], y[key], rtol=0, atol=0)
                except AssertionError as error:
                    found.append(f'{name}, {key}: {str(error).splitlines()[0]}')
    logs = []
    for folder in (a, b):
        with open(folder / 'log.csv', newline='') as f:
            rows = list(csv.DictReader(f))
        logs.append([{name: row[name] for name in ('iter', 'tokens', 'loss', 'train_loss', 'val_loss', 'lr',
                                                   'grad_norm')} for row in rows])
        seconds = [float(row['seconds']) for row in rows]
        if seconds != sorted(seconds):
            found.append(f'log.csv: {seconds}')
    if logs[0] != logs[1]:
        found.append(f'log.csv: {len(logs[0])} rows, {len(logs[1])} expected')
    return found


def rounds(n, folder, seed):
    """ Yields, round by round: its kind, the moments of its kills in seconds, what differed at the end. """
    make_dataset(folder / 'data')
    rng = np.random.default_rng(seed)
    untouched = {}
    for number in range(n):
        kind = number % len(KINDS)
        processes, slow, more = KINDS[kind]
        settings = {**SETTINGS, **more, 'dataset': folder / 'data'}
        if kind not in untouched:
            (folder / f'untouched{kind}').mkdir()
            untouched[kind] = finish(processes, settings, folder / f'untouched{kind}', 0)
        here = folder / f'round{number}'
        here.mkdir()
        longest = untouched[kind] + 8 * slow
        moments = [float(rng.uniform(0, longest)) for _ in range(rng.integers(1, 4))]
        for moment in moments:
            started = start(processes, settings, here, slow)
            time.sleep(moment)
            kill(*started)
        finish(processes, settings, here, 0)
        yield kind, moments, differences(here / 'out', folder / f'untouched{kind}' / 'out')


if __name__ == '__main__':
    arguments = dict(arg.removeprefix('--').split('=') for arg in sys.argv[1:])
    n, seed = int(arguments.get('rounds', 12)), int(arguments.get('seed', 0))
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, moments, found) in enumerate(rounds(n, Path(folder), seed), 1):
            same += not found
            processes, slow, more = KINDS[kind]
            print(f'round {number}: {processes} process(es), {more}, saves slower by {slow} s, killed after '
                  f'{", ".join(f"{moment:.2f}" for moment in moments)} s: {"; ".join(found) or "identical"}',
                  flush=True)
    print(f'{same} of {n} rounds ended bit-identical to the run that nobody touched')
    sys.exit(same != n)

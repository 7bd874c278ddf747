"""
Kills training runs with kill -9 at random moments, resumes them, and compares with runs never touched.

    python tests/faults.py --rounds=100 --seed=0

A round is one of several kinds of run: in one process or two; always saving, or the best; in float32, or
float16 with its scaler; some with saves made slow, so that they are hit as well. It is killed one to three
times, then left to end. Its checkpoints must be bit-identical to those of a run of that kind that nobody
touched, and its log.csv the same but for the times.
"""
import csv
import os
import pickle
import signal
import sys
import tempfile
import time
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
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 30}))


def start(processes, settings, folder, slow):
    """ Starts train.py in `folder`, with saves slower by `slow` seconds -> the processes' ids. """
    flags = [f'--{key}={value}' for key, value in settings.items()]
    real = os.fsync
    os.fsync = lambda fd: (time.sleep(slow), real(fd))  # the forks take it along
    try:
        with open(folder / 'log', 'a') as log:
            return zygote.start(str(ROOT / 'train.py'), flags, folder, processes, log, log)
    finally:
        os.fsync = real


def finish(processes, settings, folder, slow):
    """ Runs to the end -> seconds. """
    began = time.monotonic()
    code = zygote.wait(start(processes, settings, folder, slow))
    assert code == 0, f'exit code {code}\n{(folder / "log").read_text()[-3000:]}'
    return time.monotonic() - began


def kill(ids):
    """ Ends them all at once, those too that have ended, and waits. """
    for pid in ids:
        os.kill(pid, signal.SIGKILL)
    for pid in ids:
        os.waitpid(pid, 0)


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
            for key in ('model', 'optimizer', 'muon', 'iter_num', 'best_val_loss', 'scaler'):
                try:
                    torch.testing.assert_close(x.get(key), y.get(key), rtol=0, atol=0)
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


def play(n, folder, seed):
    """ Yields, for each of `n` rounds: its kind, the moments of its kills in seconds, what differed. """
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
            kill(started)
        finish(processes, settings, here, 0)
        yield kind, moments, differences(here / 'out', folder / f'untouched{kind}' / 'out')


if __name__ == '__main__':
    rounds, seed = 12, 0
    exec((ROOT / 'configurator.py').read_text())
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, moments, found) in enumerate(play(rounds, Path(folder), seed), 1):
            same += not found
            processes, slow, more = KINDS[kind]
            print(f'round {number}: {processes} process(es), {more}, saves slower by {slow} s, killed after '
                  f'{", ".join(f"{moment:.2f}" for moment in moments)} s: {"; ".join(found) or "identical"}',
                  flush=True)
    print(f'{same} of {rounds} rounds ended bit-identical to the run that nobody touched')
    sys.exit(same != rounds)

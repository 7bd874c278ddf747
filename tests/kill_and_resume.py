"""
Kills training runs with kill -9 at random moments, resumes them, and compares them with runs that
were never killed.

    python tests/kill_and_resume.py --rounds=100 --seed=0

A round is one of several kinds of run: in one process or two; with always_save_checkpoint or
without; in float32, or in float16 with its scaler; sharded, with Muon; with windows without
replacement and early stopping; some with slow saves, so that kills hit these as well. The run is
killed one to three times, then left to end. Each of its files must hold what that of the same run
without kills holds: checkpoints bit-identical, and log.csv the same but for the times.
"""
import csv
import os
import pickle
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import fork_server
import numpy as np
import torch

torch.set_num_threads(1)  # forks cannot use OpenMP threads that were started before
ROOT = Path(__file__).resolve().parents[1]


class Kind(NamedTuple):
    processes: int
    save_delay: float  # seconds that a save takes more
    settings: dict


BEST = dict(always_save_checkpoint=False)
LATEST = dict(always_save_checkpoint=True)
FLOAT16 = dict(dtype='float16', n_layer=1)
FSDP = dict(fsdp=True, activation_checkpointing=True, muon_lr=0.02, gradient_accumulation_steps=4)
EPOCHS = dict(without_replacement=True, early_stopping=1, eval_interval=1,
              learning_rate=0.05)  # with which the run stops early
KINDS = [
    Kind(1, 0.1, BEST),
    Kind(2, 0, BEST),
    Kind(1, 0, LATEST),
    Kind(1, 0, {**BEST, **FLOAT16}),
    Kind(1, 0.1, {**LATEST, **FLOAT16}),
    Kind(2, 0.1, LATEST),
    Kind(2, 0.1, {**BEST, **FSDP}),
    Kind(1, 0.1, {**BEST, **EPOCHS}),
]
SETTINGS = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=3,
    dropout=0.1, eval_iters=2, eval_interval=7, checkpoint_interval=3, max_iters=20,
    lr_decay_iters=20, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3, device='cpu',
    compile=False, dtype='float32', log_interval=2, init_from='auto')

# -----------------------------------------------------------------------------
# runs

def make_dataset(folder):
    folder.mkdir()
    steps = np.random.default_rng(0).integers(0, 8, size=4000)
    ids = (steps.cumsum() % 30).astype(np.uint16)  # each token depends on the one before
    ids[:3000].tofile(folder / 'train.bin')
    ids[3000:].tofile(folder / 'val.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 30}))


def start(processes, settings, folder, save_delay):
    """ Starts train.py in `folder` -> the process ids. """
    flags = [f'--{key}={value}' for key, value in settings.items()]
    fsync = os.fsync

    def slow_fsync(descriptor):
        time.sleep(save_delay)
        fsync(descriptor)

    os.fsync = slow_fsync  # the forks inherit it
    try:
        with open(folder / 'log', 'a') as log:
            return fork_server.start(str(ROOT / 'train.py'), flags, folder, processes, log, log)
    finally:
        os.fsync = fsync


def finish(processes, settings, folder):
    """ Runs train.py to its end -> seconds. """
    began = time.monotonic()
    code = fork_server.wait(start(processes, settings, folder, save_delay=0))
    assert code == 0, f'exit code {code}\n{(folder / "log").read_text()[-3000:]}'
    return time.monotonic() - began


def kill(pids):
    """ Kills all processes at once, also those that have ended already, and waits for them. """
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def play_rounds(n, folder, seed):
    """ Yields for each of `n` rounds: its kind, the seconds before each kill, differences. """
    make_dataset(folder / 'data')
    rng = np.random.default_rng(seed)
    durations = {}
    for number in range(n):
        index = number % len(KINDS)
        kind = KINDS[index]
        settings = {**SETTINGS, **kind.settings, 'dataset': folder / 'data'}
        untouched = folder / f'untouched{index}'
        if index not in durations:
            untouched.mkdir()
            durations[index] = finish(kind.processes, settings, untouched)
        killed = folder / f'round{number}'
        killed.mkdir()
        longest = durations[index] + 8 * kind.save_delay
        moments = [float(rng.uniform(0, longest)) for _ in range(rng.integers(1, 4))]
        for moment in moments:
            pids = start(kind.processes, settings, killed, kind.save_delay)
            time.sleep(moment)
            kill(pids)
        finish(kind.processes, settings, killed)
        yield index, moments, differences(killed / 'out', untouched / 'out')

# -----------------------------------------------------------------------------
# comparison

def differences(a, b):
    """ What differs between two folders of runs, bit by bit, but for names of runs and times. """
    found = []
    for name in ('ckpt.pt', 'ckpt_last.pt'):
        found += checkpoint_differences(a / name, b / name)
    return found + log_differences(a / 'log.csv', b / 'log.csv')


def checkpoint_differences(a, b):
    if a.exists() != b.exists():
        return [f'{a.name} exists in one folder only']
    if not a.exists():
        return []
    x = torch.load(a, weights_only=True)
    y = torch.load(b, weights_only=True)
    found = []
    keys = ('model', 'optimizer', 'muon', 'scaler', 'iter_num', 'best_val_loss', 'best_val_iter',
            'tokens', 'loss')
    for key in keys:
        try:
            torch.testing.assert_close(x.get(key), y.get(key), rtol=0, atol=0)
        except AssertionError as error:
            found.append(f'{a.name}, {key}: {str(error).splitlines()[0]}')
    return found


def log_differences(a, b):
    found = []
    contents = []
    columns = ('iter', 'tokens', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm')
    for path in (a, b):
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        contents.append([[row[column] for column in columns] for row in rows])
        seconds = [float(row['seconds']) for row in rows]
        if seconds != sorted(seconds):
            found.append(f'log.csv: seconds decrease: {seconds}')
    if contents[0] != contents[1]:
        different = [(x, y) for x, y in zip(*contents) if x != y]
        found.append(f'log.csv: {len(contents[0])} rows, {len(contents[1])} expected; {different}')
    return found


if __name__ == '__main__':
    rounds = 12
    seed = 0
    exec((ROOT / 'configurator.py').read_text())
    num_identical = 0
    num_kills = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (index, moments, found) in enumerate(play_rounds(rounds, Path(folder), seed)):
            num_identical += not found
            num_kills += len(moments)
            times = ', '.join(f'{moment:.1f} s' for moment in moments)
            print(f'round {number}, kind {index}, killed after {times}: {found or "identical"}',
                  flush=True)
    print(f'{num_identical} of {rounds} identical, {num_kills} kills')
    sys.exit(num_identical != rounds)

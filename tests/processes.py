""" train.py in the background, and code that scripts run before their own. """
import os
import re
import signal
import subprocess
import sys
import time

from conftest import ROOT, SMALL, environment, flags, fork_server

# far from done when a test stops it
LONG = dict(max_iters=100_000, lr_decay_iters=100_000, eval_interval=0,
            always_save_checkpoint=False)


def start_training(cwd, dataset, torchrun=(), **settings):
    """
    Starts train.py in a session of its own, by torchrun if `torchrun` holds its options.

    Returns a subprocess.Popen.
    """
    settings = {**SMALL, 'dataset': dataset, **settings}
    command = [sys.executable]
    if torchrun:
        command += ['-m', 'torch.distributed.run', '--standalone', *torchrun]
    command += [str(ROOT / 'train.py'), *flags(settings)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment(), start_new_session=True,
                            preexec_fn=reset_signals)


def reset_signals():
    """ A shell starts background processes that ignore SIGINT, and these their own ones. """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(process, text):
    """ Reads the standard output of a process up to a line with `text`. """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(''.join(lines) + process.stderr.read())


def worker_pids(process):
    """ The process ids of torchrun's workers. """
    command = ['pgrep', '-P', str(process.pid), '-f', 'train.py']
    return [int(pid) for pid in subprocess.check_output(command).split()]


def run_first(code, folder, monkeypatch):
    """ Every script that the test starts runs `code` first; it can import components. """
    if sys.platform == 'linux':
        fork_server()  # itself it must not run the code
    site = folder / 'site'
    site.mkdir()
    path = f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n'
    (site / 'sitecustomize.py').write_text(path + code)
    monkeypatch.setenv('PYTHONPATH', str(site))


SHORT_WATCH = """
import time
from components import watchdog
from components.checkpoint import Checkpoints
from components.stopping import StopConditions
watchdog.SECONDS_PER_ITER = 2
write = Checkpoints.write
after_step = StopConditions.after_step

def take_time(*args):
    time.sleep(0.1)
    after_step(*args)

StopConditions.after_step = take_time

def write_slowly(*args):
    time.sleep(4)
    write(*args)

Checkpoints.write = write_slowly
"""


def restart_after_a_stopped_process(tmp_path, dataset, monkeypatch, **settings):
    """
    Stops one of two processes, as if it hung. A save takes longer than an iteration may, and ends
    nothing; the process that hangs ends the other one, and torchrun starts both again.
    """
    run_first(SHORT_WATCH, tmp_path, monkeypatch)
    process = start_training(tmp_path, dataset, ['--nproc_per_node=2', '--max-restarts=1'],
                             gradient_accumulation_steps=2, checkpoint_interval=20,
                             **LONG, **settings)
    try:
        read_until(process, 'iter 20:')
        first, stopped = worker_pids(process)
        os.kill(stopped, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while first in worker_pids(process):
            assert time.monotonic() < deadline, 'the other process still waits'
            time.sleep(0.1)
        os.kill(stopped, signal.SIGKILL)  # as torchrun does after 30 seconds
        read_until(process, 'resuming out/ckpt_last.pt at iteration 20')
    finally:
        process.terminate()
        _, error = process.communicate(timeout=60)
    lines = [line for line in error.splitlines() if 'has not ended in' in line]
    assert len(lines) == 1
    assert re.search(r'process 0: iteration \d+ has', lines[0])

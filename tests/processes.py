""" train.py in the background, and code that scripts run before their own. """
import signal
import subprocess
import sys

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

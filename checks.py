"""
What can be wrong with the settings of a script, before anything is loaded or compiled; and one line for
what goes wrong later on, where a traceback would say less.

A rule is a pair: whether it is broken, and what to say. The first broken one is raised as a ValueError.
"""
import os
import re
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import torch


def _raise_first(rules):
    for broken, message in rules:
        if broken:
            raise ValueError(message)


def _of_all(s):
    compilers = ('cl',) if os.name == 'nt' else ('c++', 'g++', 'clang++')
    return [
        (not 0 <= s.seed < 2**63, f'seed={s.seed} must be from 0 to 2**63 - 1'),
        (s.compile and not any(map(shutil.which, (os.environ.get('CXX', ''), *compilers))),
         'compile=True takes a C++ compiler, and none is here; --compile=False'),
    ]


def check_train(settings, device_type, ddp, world_size, local_world_size):
    """ The rules for train.py. `settings` is a dict, with device, dtype, compile and backend resolved. """
    s = SimpleNamespace(**settings)
    not_negative = ('eval_interval', 'log_interval', 'checkpoint_interval', 'max_bad_steps', 'max_iters',
                    'warmup_iters', 'lr_decay_iters', 'grad_clip', 'weight_decay', 'min_lr')
    _raise_first([
        *((settings[name] < 0, f'{name}={settings[name]} must not be negative') for name in not_negative),
        *((not 0 <= settings[name] < 1, f'{name}={settings[name]} must be from 0 up to, but not, 1')
          for name in ('beta1', 'beta2', 'dropout')),
        (not 0 <= s.learning_rate < float('inf'), f'learning_rate={s.learning_rate} must be a number from 0'),
        (s.decay_lr and s.min_lr > s.learning_rate,
         f'min_lr={s.min_lr} is above learning_rate={s.learning_rate}; usual is a tenth of it'),
        (min(s.batch_size, s.block_size) < 1,
         f'batch_size={s.batch_size} and block_size={s.block_size} must be at least 1'),
        (s.batch_size * s.block_size > 2**30,
         f'batch_size={s.batch_size} of block_size={s.block_size} would run out of memory; lower batch_size'),
        *_of_all(s),
        (s.gradient_accumulation_steps < world_size,
         f'gradient_accumulation_steps={s.gradient_accumulation_steps} is less than the number of processes, '
         f'{world_size}, and each needs a micro-batch'),
        (s.eval_split != 'val' and not s.eval_only, f'eval_split={s.eval_split!r} takes --eval_only=True'),
        (s.eval_iters < 1 and s.eval_iters != -1,
         f'eval_iters={s.eval_iters} must be at least 1, or -1 for all'),
        (s.backend not in ('nccl', 'gloo') or ddp and s.backend == 'nccl' and device_type != 'cuda',
         f'backend={s.backend!r} on {device_type} cannot be; --backend=auto takes what can'),
        (ddp and device_type == 'mps', 'several processes cannot share an Apple GPU; --device=cpu'),
        (device_type == 'cuda' and local_world_size > torch.cuda.device_count(),
         f'{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs'),
        (s.wandb_log and find_spec('wandb') is None, 'wandb_log=True takes: pip install wandb'),
        (not s.out_dir, "out_dir='' is no folder; --out_dir=out"),
        (os.path.exists(s.out_dir) and not os.path.isdir(s.out_dir), f'out_dir={s.out_dir} is a file'),
        (os.path.isdir(s.out_dir) and not s.eval_only and not os.access(s.out_dir, os.W_OK),
         f'out_dir={s.out_dir} cannot be written to'),
    ])


def check_sample(settings):
    """ The rules for sample.py. """
    s = SimpleNamespace(**settings)
    _raise_first([
        (not 0 < s.temperature < float('inf'), f'temperature={s.temperature} must be above 0'),
        *((settings[name] < 0, f'{name}={settings[name]} must not be negative')
          for name in ('num_samples', 'max_new_tokens', 'top_k')),
        *_of_all(s),
    ])


def check_bench(settings):
    """ The rules for bench.py. """
    s = SimpleNamespace(**settings)
    _raise_first([(s.batch_size < 1, f'batch_size={s.batch_size} must be at least 1'), *_of_all(s)])


def explain(settings, ddp):
    """ Has memory that ran out, and processes that are gone, said in one line instead of a traceback. """
    names = ('batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'n_embd')
    sizes = ', '.join(f'{name}={settings[name]}' for name in names if name in settings)

    def hook(kind, error, trace):
        text = ' '.join(str(error).split())
        line = None
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            line = (f'out of memory ({text:.100}) with {sizes}; a lower batch_size and as much more '
                    'gradient_accumulation_steps make the same iteration')
        elif ddp and re.search(r'Connection (closed|reset)|[Pp]eer|gloo|NCCL|[Tt]imed out', text):
            line = f'another process of this job is gone ({text:.100}); nothing was saved by this one'
        elif kind.__module__.startswith('wandb'):
            line = f'wandb: {text} Or set WANDB_MODE=offline, or --wandb_log=False'
        if line is None:
            return sys.__excepthook__(kind, error, trace)
        # c10d puts a buffer in place of sys.stderr; with a broken collective, an orderly end may wait forever
        print(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.__stderr__, flush=True)
        os._exit(1)

    sys.excepthook = hook
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens, Ctrl-C ends at once


def leave(code, ddp):
    """ Ends a process. One of several does not wait for gloo's threads, which abort some orderly ends. """
    if wandb := sys.modules.get('wandb'):
        wandb.finish()
    if ddp:
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Signals:
    """
    SIGINT, SIGTERM and SIGUSR1 (that of Slurm before a time limit): the first is only noted, in `number`,
    for the loop to end in its own time; a second, 5 seconds later or more, ends at once. Earlier ones count
    as the first: torchrun and Slurm send what they get to processes that got it too.
    """
    number, time = 0, 0.0

    def __init__(self):
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
            if hasattr(signal, name):  # Windows has not all
                signal.signal(getattr(signal, name), self.note)

    def note(self, number, frame):
        if self.number and time.monotonic() - self.time > 5:
            os._exit(128 + number)
        if not self.number:
            self.number, self.time = number, time.monotonic()

    @property
    def name(self):
        return signal.Signals(self.number).name if self.number else 'a signal to another process'

    @property
    def exit_code(self):
        return 128 + (self.number or signal.SIGTERM)

"""
The machine under a script: its device and what that can do, its signals, and the one line that is said when
memory or another process is gone. Imports nothing of ours.
"""
import ctypes
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from functools import cache
from importlib.util import find_spec

import torch
import torch.distributed as dist

if sys.platform == 'win32':  # where a pipe is in a code page, which lacks most characters
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8')

# -----------------------------------------------------------------------------
# the device

# dense 16-bit FLOP/s, accumulated in float32, from the makers' data sheets; the first that fits counts
GPU_PEAKS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 836e12, 'H200': 989e12, 'H100 PCIe': 756e12,
    'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12,
    'L4': 121e12, 'V100-PCIE': 112e12, 'V100': 125e12, 'T4': 65e12,
}


def has_fbgemm(device_type):
    """ Whether a product with float16 or int8 weights has a kernel that multiplies them as they are read. """
    return device_type == 'cpu' and 'fbgemm' in torch.backends.quantized.supported_engines


def has_bfloat16():
    """ Whether this CPU multiplies in bfloat16, about twice as fast as in float32. """
    has = torch.cpu.get_capabilities()
    return bool(has.get('avx512_bf16') or has.get('amx_bf16'))


def has_compiler():
    """ Whether a C++ compiler is here, as torch.compile takes one. """
    compilers = ('cl',) if os.name == 'nt' else ('c++', 'g++', 'clang++')
    return any(map(shutil.which, (os.environ.get('CXX', ''), *compilers)))


def choose_device(device='auto', dtype='auto', compile='auto', training=True):
    """
    Puts what this machine is best at in the place of each 'auto' -> device, dtype, compile. Without
    `training`, the dtype for weights that are only read.
    Raises ValueError for a device that is not there, and for words that it does not know.
    """
    if device == 'auto':
        device = ('cuda' if torch.cuda.is_available() else
                  'mps' if torch.backends.mps.is_available() else 'cpu')
    kind, _, index = str(device).partition(':')
    there = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    if kind not in there or index and not index.isdigit():
        raise ValueError(f"device={device!r} must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if int(index or 0) >= there[kind]:
        raise ValueError(f'device={device}: {there[kind] or "none"} here; --device=auto takes what is')
    if dtype == 'auto':
        if kind == 'cuda':
            native = torch.cuda.get_device_capability(int(index or 0)) >= (8, 0)  # Ampere
            dtype = 'bfloat16' if native else 'float16'
        else:
            dtype = ('float16' if has_fbgemm(kind) and not training else
                     'bfloat16' if kind == 'cpu' and has_bfloat16() else 'float32')
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype={dtype!r} must be 'auto', 'float32', 'bfloat16' or 'float16'")
    if compile not in ('auto', True, False):
        raise ValueError(f"compile={compile!r} must be 'auto', True or False")
    if compile == 'auto':  # where Triton is, and can do something for the GPU
        compile = (kind == 'cuda' and training and has_compiler() and find_spec('triton') is not None
                   and torch.cuda.get_device_capability(int(index or 0)) >= (7, 0))
    return device, dtype, compile


def use_device(device, dtype):
    """ Makes ready to compute on `device` -> the context in which a model computes in `dtype`. """
    kind = device.partition(':')[0]
    if kind == 'cuda':
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.set_float32_matmul_precision('high')  # what stays in float32 may use TF32
    if kind == 'cpu' and sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        # by default glibc gives back to the system what a step frees, and asks for it again in the next
        # one: over a thousand page faults in each step of a small model
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: pieces up to 32 MB come from the heap
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: and up to 1 GB of it may lie free
    return torch.autocast(kind, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()


def fetch(values):
    """ Starts to bring a tensor to the host -> a function that waits for it and returns it as a list. """
    if values.device.type != 'cuda':
        return values.tolist
    copy, there = torch.empty_like(values, device='cpu', pin_memory=True), torch.cuda.Event()
    copy.copy_(values, non_blocking=True)
    there.record()
    return lambda: there.synchronize() or copy.tolist()


def free_memory(device_type):
    """ Bytes that are free on the device; a guess where the system does not say. """
    if device_type == 'cuda':
        return torch.cuda.mem_get_info()[0]
    try:
        with open('/proc/meminfo') as f:
            return 1024 * int(re.search(r'MemAvailable: *(\d+) kB', f.read())[1])
    except (OSError, TypeError):
        return 4 * 2**30


@cache
def peak_flops(device_type, dtype):
    """
    FLOP/s that the device can do in `dtype`, and where the figure is from: a data sheet for a GPU of
    the table in 16 bits, a short matrix product for whatever else there is.
    """
    if device_type == 'cuda':
        gpu = torch.cuda.get_device_name()
        for name, peak in GPU_PEAKS.items():
            if re.search(rf'\b{name}\b', gpu) and 'MIG' not in gpu and dtype != 'float32':
                return peak, f"{gpu}'s data sheet"
    best, n, seconds = 0.0, 128, 0.0
    while n <= 8192 and seconds < 0.01:  # the larger the nearer to the peak; half a second at most
        a = torch.randn(n, n, device=device_type, dtype=getattr(torch, dtype))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds = min(times)
        best = max(best, 2 * n**3 / seconds)
        n *= 2
    return best, 'a measured matrix product'

# -----------------------------------------------------------------------------
# processes, signals, and how a script ends

def join_processes(backend, rank, world_size, dtype):
    """
    Joins the others that torchrun started -> the name of the job, whether torchrun started it again. Ends
    where the first of them chose another `dtype`: float16 gradients are scaled, the others' are not.
    """
    restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    shared = next(dist.rendezvous('env://'))[0]
    job = shared.compare_set('job', '', os.urandom(16).hex()).decode()  # torchrun keeps it over its restarts
    store = dist.PrefixStore(restarts, shared)  # without the addresses of the dead
    if rank == 0:
        store.set('dtype', dtype)
    elif (first := store.get('dtype').decode()) != dtype:
        sys.exit(f'train.py: dtype={dtype} on this machine and {first} on the first; give all one --dtype')
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return job, restarts != '0'


claims = {}  # {folder: the open descriptor that holds its lock}


def claim(folder):
    """ Keeps `folder` for this process until it ends. Raises ValueError where another has it. """
    folder = os.path.realpath(folder)
    try:
        import fcntl
        if folder not in claims:
            held = os.open(folder, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claims[folder] = held
    except BlockingIOError:
        raise ValueError(f'another run is writing to {folder}: end it, or give another --out_dir') from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass


def explain(settings, ddp):
    """ Has memory that ran out, and processes that are gone, said in one line instead of a traceback. """
    names = ('batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'n_embd')
    sizes = ', '.join(f'{name}={settings[name]}' for name in names if name in settings)

    def hook(kind, error, trace):
        text = ' '.join(str(error).split())
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
                "(can't allocate|not enough|out of) memory|Invalid buffer size", text):
            line = (f'out of memory ({text:.100}) with {sizes}; a lower batch_size and as much more '
                    'gradient_accumulation_steps make the same iteration')
        elif ddp and re.search(r'Connection (closed|reset)|[Pp]eer|gloo|NCCL|[Tt]imed out', text):
            line = f'another process of this job is gone ({text:.100}); nothing was saved by this one'
        elif re.search('index out of range in self|device-side assert', text):
            line = f'a token that the model does not know is in the data; prepare them again ({text:.100})'
        elif kind.__module__.startswith('wandb'):
            line = f'wandb: {text} Or set WANDB_MODE=offline, or --wandb_log=False'
        else:
            return sys.__excepthook__(kind, error, trace)
        # c10d puts a buffer in place of sys.stderr; with a broken collective, an orderly end may wait forever
        print(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.__stderr__, flush=True)
        os._exit(1)

    sys.excepthook = hook
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens, Ctrl-C ends at once


def leave(code, ddp):
    """
    Ends a process. One of several waits for the others, as torchrun kills the rest, even in a save, once one
    has ended with an error; and it skips Python's own shutdown, in which gloo's threads sometimes abort.
    """
    if wandb := sys.modules.get('wandb'):
        wandb.finish()
    if ddp:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Signals:
    """
    SIGINT, SIGTERM, SIGUSR1 (that of Slurm before a time limit) and, but for nohup, SIGHUP (a terminal that
    closed): the first is only noted, in `number`, for the loop to end in its own time; a second, 5 seconds
    later or more, ends at once. Earlier ones count as the first: torchrun and Slurm send what they get to
    processes that got it too. One process says so.
    """
    number, time = 0, 0.0

    def __init__(self, says):
        self.says, self.noted = says, []
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has not all
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number, frame):
        if self.number and time.monotonic() - self.time > 5:
            os._exit(128 + number)
        self.noted.append(number)
        if len(self.noted) == 1:  # another may come between any two lines
            self.number, self.time = number, time.monotonic()
            with suppress(OSError):
                if self.says:  # not print(): it may have been interrupted
                    os.write(2, f'{self.name}: stopping after this iteration or evaluation\n'.encode())

    @property
    def name(self):
        return signal.Signals(self.number).name if self.number else 'a signal to another process'

    @property
    def exit_code(self):
        return 128 + (self.number or signal.SIGTERM)

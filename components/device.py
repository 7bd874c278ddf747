"""
The device: which one, in which dtype, compiled or not; its peak FLOP/s and its free memory.

Not here: processes (distributed.py) and what a model computes (model.py).
"""
import ctypes
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch

from components.errors import UserError

# dense 16-bit FLOP/s with float32 accumulation, and bytes of memory, from the makers' data sheets;
# the first name that matches counts, and the smallest of several sizes of memory
GPUS = {
    'B200': (2250e12, 180e9),
    'GH200': (989e12, 96e9),
    'H200 NVL': (836e12, 141e9),
    'H200': (989e12, 141e9),
    'H100 PCIe': (756e12, 80e9),
    'H100 NVL': (835e12, 94e9),
    'H100': (989e12, 80e9),
    'A100': (312e12, 40e9),
    'A10G': (70e12, 24e9),
    'A10': (125e12, 24e9),
    'L40S': (362e12, 48e9),
    'L4': (121e12, 24e9),
    'V100-PCIE': (112e12, 16e9),
    'V100': (125e12, 16e9),
    'T4': (65e12, 16e9),
}
GPU_PEAKS = {name: peak for name, (peak, _) in GPUS.items()}
GPU_MEMORY = {name: memory for name, (_, memory) in GPUS.items()}

# -----------------------------------------------------------------------------
# what this machine can do

def has_fbgemm(device_type):
    """ Whether linear layers with float16 or int8 weights have a kernel on this device. """
    return device_type == 'cpu' and 'fbgemm' in torch.backends.quantized.supported_engines


def has_bfloat16():
    """ Whether this CPU multiplies in bfloat16, about twice as fast as in float32. """
    if not hasattr(torch.cpu, 'get_capabilities'):  # torch 2.9
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get('avx512_bf16') or capabilities.get('amx_bf16'))


def missing_for_compile(device_type):
    """
    What torch.compile requires on this device and is not installed, for messages; '' if nothing.
    On a CPU a C++ compiler builds the kernels; on a GPU Triton does, and a C compiler what starts
    them.
    """
    if device_type != 'cuda':
        return '' if has_program('c++', 'g++', 'clang++', 'cl') else 'a C++ compiler'
    if find_spec('triton') is None:
        return 'Triton'
    return '' if has_program('gcc', 'clang', 'cl') else 'a C compiler'


def has_program(*names):
    """ Whether a program of one of these names is installed. """
    return any(shutil.which(name) for name in names)


def available_devices():
    """ The devices that PyTorch can use here, the fastest first. """
    devices = []
    if torch.cuda.is_available():
        devices.append('cuda')
        devices += [f'cuda:{index}' for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append('mps')
    return [*devices, 'cpu']


def free_memory(device_type):
    """ Free memory of the device in bytes; 4 GiB where the system does not tell. """
    if device_type == 'cuda':
        free, _ = torch.cuda.mem_get_info()
        return free
    if device_type == 'mps':
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        with open('/proc/meminfo') as file:
            available = re.search(r'MemAvailable: *(\d+) kB', file.read())
        return 1024 * int(available[1])
    except (OSError, TypeError):
        return 4 * 2**30

# -----------------------------------------------------------------------------
# the choice

def choose_device(device='auto', dtype='auto', compile='auto', training=True):
    """
    Replaces each 'auto' by the best choice on this machine.

    Args:
        training: False selects the dtype for weights that are only read

    Returns:
        device, dtype, compile: two strings, and a value for compile_model()

    Raises UserError for a device that is not available, and for unknown names.
    """
    available = available_devices()
    if device == 'auto':
        device = available[0]
        is_hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1')
        if device == 'cpu' and has_program('nvidia-smi') and not is_hidden:
            print('device: cpu, because PyTorch cannot use the NVIDIA GPU; '
                  'https://pytorch.org/get-started/locally has the command that installs CUDA',
                  file=sys.stderr)
    if device not in available:
        raise UserError(f'device={device} is not available on this machine, which has '
                        f'{", ".join(available)}; --device=auto selects one')
    device_type = device.partition(':')[0]

    if dtype == 'auto':
        dtype = default_dtype(device, training)
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype={dtype!r} must be 'auto', 'float32', 'bfloat16' or 'float16'")

    if compile == 'auto':
        compile = training and device_type == 'cuda' and can_compile(device)
    if compile not in (True, False, 'reduce-overhead'):
        raise UserError(f"compile={compile!r} must be 'auto', True, False or 'reduce-overhead'")
    return device, dtype, compile


def default_dtype(device, training):
    """
    A 16-bit dtype where the device computes in it natively, else float32. Apple's GPUs keep
    float32: 16 bits have not been measured there.
    """
    if device.startswith('cuda'):
        is_native = torch.cuda.get_device_capability(device) >= (8, 0)  # from Ampere on
        return 'bfloat16' if is_native else 'float16'
    if not training and has_fbgemm(device):
        return 'float16'
    if device == 'cpu' and has_bfloat16():
        return 'bfloat16'
    return 'float32'


def can_compile(device):
    """ Whether Triton supports this GPU and is installed. """
    is_supported = torch.cuda.get_device_capability(device) >= (7, 0)
    return is_supported and not missing_for_compile('cuda')


def describe_compile(compile):
    """ For messages: whether the model is compiled, and how. """
    descriptions = {True: 'compiled', False: 'not compiled',
                    'reduce-overhead': 'compiled with CUDA graphs'}
    return descriptions[compile]


def compile_model(model, compile):
    """
    Compiles a GPT if `compile` is True or 'reduce-overhead' -> the model to call.

    True compiles a block once for all blocks, which are alike, and lm_head with the loss: the time
    to compile does not depend on the number of blocks. 'reduce-overhead' compiles the whole model
    and records its kernels in CUDA graphs, which start them all at once: for small models, whose
    kernels take less time than to start them. It requires that every backward pass is followed by
    an update.
    """
    if compile == 'reduce-overhead':
        return torch.compile(model, mode=compile)
    if compile:
        for block in model.transformer.h:
            block.compile()
        model.loss = torch.compile(model.loss)
    return model


def use_device(device, dtype):
    """
    Prepares this thread to compute on `device`.

    Returns the context manager in which a model computes in `dtype`.
    """
    device_type = device.partition(':')[0]
    if device_type == 'cuda':
        torch.cuda.set_device(torch.device(device).index or 0)
        torch.set_float32_matmul_precision('high')  # allows TF32 for what stays in float32
    if device_type == 'cpu':
        keep_freed_memory()
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device_type, getattr(torch, dtype))


def keep_freed_memory():
    """
    Tells glibc to keep memory that a training step frees for the next step. By default it is
    returned to the system and requested again: over a thousand page faults in each step of a small
    model.
    """
    if sys.platform != 'linux':
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'mallopt'):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of malloc.h
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # blocks up to 32 MB come from the heap,
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)  # of which up to 1 GB may stay free

# -----------------------------------------------------------------------------
# synchronization and speed

def synchronize(device_type):
    """ Waits until the device has computed everything that was submitted. """
    if device_type == 'cuda':
        torch.cuda.synchronize()
    elif device_type == 'mps':
        torch.mps.synchronize()


class HostCopy:
    """
    The values of a tensor, to be read on the host later. On CUDA a copy starts now and overlaps
    with computation, and only reading it waits. Elsewhere it is the tensor itself.
    """

    def __init__(self, tensor):
        self.event = None
        if tensor.device.type != 'cuda':
            self.copy = tensor
            return
        self.copy = torch.empty_like(tensor, device='cpu', pin_memory=True)
        self.copy.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def tolist(self):
        """ Waits for the copy, and returns its values as a list. """
        if self.event is not None:
            self.event.synchronize()
        return self.copy.tolist()


@cache
def peak_flops(device_type, dtype=None):
    """
    The peak of the device in `dtype`, which MFU is measured against; by default in bfloat16 on CUDA
    and in float32 elsewhere.

    Returns:
        FLOP/s, and where the figure is from: the data sheet of a known GPU in 16 bits, otherwise
        the fastest of several matrix products.
    """
    if dtype is None:
        dtype = 'bfloat16' if device_type == 'cuda' else 'float32'
    if device_type == 'cuda' and dtype != 'float32':
        gpu = torch.cuda.get_device_name()
        for name, peak in GPU_PEAKS.items():
            if re.search(rf'\b{name}\b', gpu) and 'MIG' not in gpu:
                return peak, f"{gpu}'s data sheet"
    return measure_peak(device_type, dtype), 'a measured matrix product'


def measure_peak(device_type, dtype):
    """
    FLOP/s of the fastest matrix product. Larger matrices come nearer to the peak, so the size
    doubles until a product takes 10 ms; half a second in all. The best of many short products
    counts, because other programs on the machine interrupt some of them.
    """
    best = 0.0
    n = 128
    seconds = 0.0
    while n <= 8192 and seconds < 0.01:
        a = torch.randn(n, n, device=device_type, dtype=getattr(torch, dtype))
        seconds = fastest_product(a)
        best = max(best, 2 * n**3 / seconds)
        n *= 2
    return best


def fastest_product(a):
    """ Seconds of the fastest of 5 to 50 products a @ a, for 50 ms where these are short. """
    fastest = float('inf')
    total = 0.0
    for repetition in range(50):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds = time.perf_counter() - start
        fastest = min(fastest, seconds)
        total += seconds
        if repetition >= 4 and total > 0.05:
            break
    return fastest

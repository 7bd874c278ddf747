""" components/device.py: which device, dtype and compile are selected, memory, and peak FLOP/s. """
import os
import time
from contextlib import nullcontext

import pytest
import torch

from components import device as device_module
from components.device import (
    GPU_PEAKS,
    HostCopy,
    choose_device,
    compile_model,
    free_memory,
    has_fbgemm,
    measure_peak,
    peak_flops,
    use_device,
)
from components.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)


@pytest.fixture
def gpus(monkeypatch):
    """ gpus(capability) pretends that there are two GPUs, and what torch.compile requires. """
    def pretend(capability=(8, 0), missing=''):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
        monkeypatch.setattr(torch.cuda, 'get_arch_list', list)
        monkeypatch.setattr(device_module, 'missing_for_compile', lambda device_type: missing)
    return pretend

# -----------------------------------------------------------------------------
# choose_device

def test_cuda_is_preferred(gpus):
    gpus()
    assert choose_device() == ('cuda', 'bfloat16', True)


def test_mps_without_cuda(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device() == ('mps', 'float32', False)


def test_cpu_without_a_gpu(no_gpu):
    device, _, compile = choose_device()
    assert (device, compile) == ('cpu', False)


def test_compile_model(tiny, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda *args, **options: (args, options))
    assert compile_model(tiny, False) is tiny
    assert compile_model(tiny, True) == ((tiny,), {})
    assert compile_model(tiny, 'reduce-overhead') == ((tiny,), {'mode': 'reduce-overhead'})


def test_explicit_choice():
    assert choose_device('cpu', 'float16', True) == ('cpu', 'float16', True)


def test_explicit_gpu(gpus):
    gpus()
    assert choose_device('cuda:1', 'float32', False) == ('cuda:1', 'float32', False)


def test_cpu_beside_a_gpu(gpus):
    gpus()
    assert choose_device('cpu', 'float32') == ('cpu', 'float32', False)


@pytest.mark.parametrize('capability, dtype', [
    pytest.param((9, 0), 'bfloat16', id='Hopper'),
    pytest.param((8, 0), 'bfloat16', id='Ampere'),
    pytest.param((7, 5), 'float16', id='Turing'),
])
def test_dtype_of_a_gpu(gpus, capability, dtype):
    gpus(capability)
    assert choose_device('cuda:1')[1] == dtype


@pytest.mark.parametrize('capabilities, dtype', [
    pytest.param({'avx512_bf16': True}, 'bfloat16', id='AVX-512'),
    pytest.param({'amx_bf16': True, 'avx512_bf16': False}, 'bfloat16', id='AMX'),
    pytest.param({'avx512_bf16': False}, 'float32', id='without'),
    pytest.param({}, 'float32', id='another architecture'),
])
def test_dtype_of_a_cpu(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(device_module, 'cpu_capabilities', lambda: capabilities)
    assert choose_device('cpu')[1] == dtype


@pytest.mark.parametrize('fbgemm, dtype', [(True, 'float16'), (False, 'float32')])
def test_dtype_of_a_cpu_for_inference(monkeypatch, fbgemm, dtype):
    monkeypatch.setattr(device_module, 'cpu_capabilities', dict)
    monkeypatch.setattr(device_module, 'has_fbgemm', lambda device_type: fbgemm)
    assert choose_device('cpu', training=False)[1] == dtype


@pytest.mark.parametrize('machine, compiled', [
    pytest.param(dict(), True, id='Ampere'),
    pytest.param(dict(capability=(7, 0)), True, id='Volta'),
    pytest.param(dict(capability=(6, 1)), False, id='Pascal'),
    pytest.param(dict(missing='Triton'), False, id='no Triton'),
])
def test_compile_of_a_gpu(gpus, machine, compiled):
    gpus(**machine)
    assert choose_device()[2] is compiled


def test_explicit_compile_without_a_compiler(gpus):
    """ settings.py then refuses it with the reason. """
    gpus(missing='a C compiler')
    assert choose_device(compile=True)[2] is True


def test_no_compile_for_inference(gpus):
    gpus()
    assert choose_device(training=False)[2] is False


@pytest.mark.parametrize('name, value', [
    ('device', 'gpu'),
    ('device', 'cpu:one'),
    ('device', True),
    ('device', 'cuda:99'),
    ('device', 'cpu:1'),
    ('dtype', 'int8'),
    ('compile', 'yes'),
])
def test_unknown_choice(name, value):
    choices = {'device': 'cpu', name: value}
    with pytest.raises(UserError, match=f'{name}=.*{value}.*auto'):
        choose_device(**choices)


def test_gpu_that_does_not_exist(gpus):
    gpus()
    with pytest.raises(UserError, match='cuda:2 .* has 2 cuda devices'):
        choose_device('cuda:2')

# -----------------------------------------------------------------------------
# what this machine can do

def test_fbgemm_is_for_cpus():
    assert has_fbgemm('cpu') == ('fbgemm' in torch.backends.quantized.supported_engines)
    assert not has_fbgemm('cuda')


@pytest.mark.skipif(not os.path.exists('/proc/meminfo'), reason='Linux only')
def test_free_memory_is_in_bytes():
    page_size = os.sysconf('SC_PAGE_SIZE')
    unused = os.sysconf('SC_AVPHYS_PAGES') * page_size  # without the caches of files
    total = os.sysconf('SC_PHYS_PAGES') * page_size
    assert 0.5 * unused < free_memory('cpu') <= total


def test_free_memory_of_another_system(monkeypatch):
    def no_such_file(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(device_module, 'open', no_such_file, raising=False)
    assert free_memory('cpu') == 4 * 2**30


def test_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (3, 8))
    assert free_memory('cuda') == 3

# -----------------------------------------------------------------------------
# use_device

def test_no_autocast_in_float32():
    assert isinstance(use_device('cpu', 'float32'), nullcontext)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_autocast(dtype):
    x = torch.ones(2, 2)
    with use_device('cpu', dtype):
        assert (x @ x).dtype == getattr(torch, dtype)
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize('device, index', [('cuda', 0), ('cuda:1', 1)])
def test_current_gpu(monkeypatch, device, index):
    selected = []
    precisions = []
    monkeypatch.setattr(torch.cuda, 'set_device', selected.append)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', precisions.append)
    use_device(device, 'float32')
    assert selected == [index]
    assert precisions == ['high']  # TF32

# -----------------------------------------------------------------------------
# HostCopy

def test_host_copy_on_a_cpu():
    assert HostCopy(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='requires a GPU')
def test_host_copy_of_a_gpu():
    assert HostCopy(torch.tensor([1.5, 2.0], device='cuda')).tolist() == [1.5, 2.0]

# -----------------------------------------------------------------------------
# peak FLOP/s

@pytest.fixture
def gpu_name(monkeypatch):
    """ gpu_name(name) names the GPU. A measurement returns 1 FLOP/s. """
    monkeypatch.setattr(device_module, 'measure_peak', lambda device_type, dtype: 1.0)

    def pretend(name):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: name)
        peak_flops.cache_clear()
    yield pretend
    peak_flops.cache_clear()


@pytest.mark.parametrize('name, key', [
    ('NVIDIA A100-SXM4-80GB', 'A100'),
    ('NVIDIA A10', 'A10'),
    ('NVIDIA A10G', 'A10G'),
    ('NVIDIA H100 80GB HBM3', 'H100'),
    ('NVIDIA H100 PCIe', 'H100 PCIe'),
    ('NVIDIA GH200 480GB', 'GH200'),
    ('NVIDIA H200 NVL', 'H200 NVL'),
    ('NVIDIA L4', 'L4'),
    ('NVIDIA L40S', 'L40S'),
    ('Tesla T4', 'T4'),
    ('Tesla V100-PCIE-16GB', 'V100-PCIE'),
    ('Tesla V100-SXM2-16GB', 'V100'),
])
def test_peak_of_the_data_sheet(gpu_name, name, key):
    gpu_name(name)
    assert peak_flops('cuda', 'bfloat16') == (GPU_PEAKS[key], f"{name}'s data sheet")


@pytest.mark.parametrize('name, dtype', [
    pytest.param('NVIDIA GeForce RTX 4090', 'bfloat16', id='unknown GPU'),
    pytest.param('NVIDIA A100-SXM4-80GB MIG 1g.10gb', 'bfloat16', id='part of a GPU'),
    pytest.param('NVIDIA A100-SXM4-80GB', 'float32', id='float32'),
])
def test_peak_that_is_measured(gpu_name, name, dtype):
    gpu_name(name)
    peak, source = peak_flops('cuda', dtype)
    assert peak == 1.0
    assert 'measured' in source


def test_measured_peak_counts_multiply_and_add(monkeypatch):
    """ On a clock that advances by a second whenever it is read, so that a product takes one. """
    seconds = iter(range(100))
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(seconds)))
    assert measure_peak('cpu', 'float32') == 2 * 128**3


def test_measured_peak_is_of_the_fastest_product(monkeypatch):
    """ Of five products of 9, 9, 9, 0.5 and 2 seconds, as if another program interrupted most. """
    clock = iter([0.0, 9.0, 10.0, 19.0, 20.0, 29.0, 30.0, 30.5, 40.0, 42.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    assert measure_peak('cpu', 'float32') == 2 * 128**3 / 0.5


def test_measured_peak_of_this_machine():
    assert 1e8 < measure_peak('cpu', 'float32') < 1e15


def test_peak_is_measured_once(gpu_name, monkeypatch):
    gpu_name('NVIDIA GeForce RTX 4090')
    peak_flops('cuda', 'float32')
    monkeypatch.setattr(device_module, 'measure_peak', lambda device_type, dtype: 2.0)
    assert peak_flops('cuda', 'float32')[0] == 1.0

"""
components/device.py: which device, dtype and compile are selected, memory, and peak FLOP/s. A
stand-in for a GPU shows what is selected on it; test_cuda.py shows that a GPU computes so.
"""
import os
import shutil
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
    has_bfloat16,
    measure_peak,
    missing_for_compile,
    peak_flops,
    use_device,
)
from components.errors import UserError

# -----------------------------------------------------------------------------
# choose_device


@pytest.fixture
def machine(monkeypatch):
    """ machine(...) pretends to be another one: its GPUs, its CPU, what is installed. """
    def pretend(capability=None, mps=False, bfloat16=False, fbgemm=False, missing='', programs=()):
        has_gpus = capability is not None
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpus)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)  # also without a driver
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(device_module, 'has_bfloat16', lambda: bfloat16)
        monkeypatch.setattr(device_module, 'has_fbgemm', lambda device_type: fbgemm)
        monkeypatch.setattr(device_module, 'missing_for_compile', lambda device_type: missing)
        monkeypatch.setattr(shutil, 'which', lambda name: name if name in programs else None)
    return pretend


HOPPER = dict(capability=(9, 0))


@pytest.mark.parametrize('has, settings, expected', [
    (HOPPER, {}, ('cuda', 'bfloat16', True)),
    (dict(capability=(8, 0)), {}, ('cuda', 'bfloat16', True)),
    (dict(capability=(7, 5)), dict(device='cuda:1'), ('cuda:1', 'float16', False)),
    (dict(capability=(7, 5)), dict(compile=True), ('cuda', 'float16', True)),
    (HOPPER, dict(training=False), ('cuda', 'bfloat16', False)),
    (HOPPER, dict(device='cpu'), ('cpu', 'float32', False)),
    (dict(HOPPER, missing='Triton'), {}, ('cuda', 'bfloat16', False)),
    (dict(HOPPER, missing='Triton'), dict(compile=True), ('cuda', 'bfloat16', True)),  # refused
    (dict(mps=True), {}, ('mps', 'float32', False)),
    ({}, {}, ('cpu', 'float32', False)),
    (dict(bfloat16=True), {}, ('cpu', 'bfloat16', False)),
    (dict(bfloat16=True, fbgemm=True), dict(training=False), ('cpu', 'float16', False)),
    ({}, dict(dtype='float16', compile='reduce-overhead'), ('cpu', 'float16', 'reduce-overhead')),
], ids=repr)
def test_choice(machine, capsys, has, settings, expected):
    machine(**has)
    assert choose_device(**settings) == expected
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('name, value', [
    ('device', 'gpu'),
    ('device', True),
    ('device', 'cuda:2'),
    ('device', 'mps'),
    ('dtype', 'int8'),
    ('compile', 'yes'),
])
def test_choice_that_is_refused(machine, name, value):
    machine(**HOPPER)
    choices = {'device': 'cuda', name: value}
    with pytest.raises(UserError, match=f'{name}=.*{value}.*auto'):
        choose_device(**choices)


def test_driver_that_pytorch_cannot_use(machine, capsys):
    machine(programs=['nvidia-smi'])
    assert choose_device()[0] == 'cpu'
    assert 'NVIDIA' in capsys.readouterr().err
    choose_device('cpu')
    assert capsys.readouterr().err == ''
    with pytest.raises(UserError, match='cuda'):
        choose_device('cuda')


@pytest.mark.parametrize('device_type, programs, triton, missing', [
    ('cuda', ['gcc'], True, ''),
    ('cuda', ['clang'], True, ''),
    ('cuda', ['g++', 'c++'], True, 'a C compiler'),
    ('cuda', ['gcc'], False, 'Triton'),
    ('cpu', ['clang++'], False, ''),
    ('cpu', ['gcc'], True, 'a C++ compiler'),
])
def test_missing_for_compile(monkeypatch, device_type, programs, triton, missing):
    monkeypatch.setattr(shutil, 'which', lambda name: name if name in programs else None)
    monkeypatch.setattr(device_module, 'find_spec', {'triton': 'spec' if triton else None}.get)
    assert missing_for_compile(device_type) == missing


def test_compile_model(tiny, monkeypatch):
    """ For True, see test_compile.py. """
    monkeypatch.setattr(torch, 'compile', lambda model, mode: mode)
    assert compile_model(tiny, False) is tiny
    assert compile_model(tiny, 'reduce-overhead') == 'reduce-overhead'


@pytest.mark.parametrize('capabilities, expected', [
    ({'avx512_bf16': True}, True),
    ({'amx_bf16': True, 'avx512_bf16': False}, True),
    ({}, False),
    (None, True),
])
def test_bfloat16_of_a_cpu(monkeypatch, capabilities, expected):
    if capabilities is None:  # as in torch 2.9
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert has_bfloat16() is expected

# -----------------------------------------------------------------------------
# computing


@pytest.mark.skipif(not os.path.exists('/proc/meminfo'), reason='Linux only')
def test_free_memory_is_in_bytes():
    page_size = os.sysconf('SC_PAGE_SIZE')
    unused = os.sysconf('SC_AVPHYS_PAGES') * page_size  # without the caches of files
    total = os.sysconf('SC_PHYS_PAGES') * page_size
    assert 0.5 * unused < free_memory('cpu') <= total


def test_free_memory_of_other_systems(monkeypatch):
    def no_such_file(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(device_module, 'open', no_such_file, raising=False)
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 12 * 2**30)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 2 * 2**30)
    assert free_memory('cpu') == 4 * 2**30
    assert free_memory('mps') == 10 * 2**30


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_autocast(dtype):
    x = torch.ones(2, 2)
    autocast = use_device('cpu', dtype)
    with autocast:
        assert (x @ x).dtype == getattr(torch, dtype)
    assert isinstance(autocast, nullcontext) == (dtype == 'float32')


def test_host_copy_on_a_cpu():
    assert HostCopy(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]

# -----------------------------------------------------------------------------
# peak FLOP/s


@pytest.mark.parametrize('name, dtype, key', [
    ('NVIDIA A100-SXM4-80GB', 'bfloat16', 'A100'),
    ('NVIDIA A10', 'bfloat16', 'A10'),
    ('NVIDIA A10G', 'bfloat16', 'A10G'),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 'H100'),
    ('NVIDIA H100 PCIe', 'bfloat16', 'H100 PCIe'),
    ('NVIDIA GH200 480GB', 'bfloat16', 'GH200'),
    ('NVIDIA H200 NVL', 'bfloat16', 'H200 NVL'),
    ('NVIDIA L40S', 'bfloat16', 'L40S'),
    ('Tesla V100-PCIE-16GB', 'float16', 'V100-PCIE'),
    ('Tesla V100-SXM2-16GB', 'float16', 'V100'),
    ('NVIDIA B200', 'bfloat16', 'B200'),
    ('NVIDIA GeForce RTX 3090', 'bfloat16', 'RTX 3090'),
    ('NVIDIA GeForce RTX 4090', 'bfloat16', 'RTX 4090'),
    ('NVIDIA GeForce RTX 5090', 'bfloat16', 'RTX 5090'),
    ('NVIDIA RTX A6000', 'bfloat16', 'RTX A6000'),
    ('NVIDIA RTX 6000 Ada Generation', 'bfloat16', None),
    ('NVIDIA GeForce RTX 3090 Ti', 'bfloat16', None),
    ('NVIDIA GeForce RTX 4090 D', 'bfloat16', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', 'bfloat16', None),
    ('NVIDIA A100-SXM4-80GB MIG 1g.10gb', 'bfloat16', None),
    ('NVIDIA A100-SXM4-80GB', 'float32', None),
])
def test_peak(monkeypatch, name, dtype, key):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: name)
    monkeypatch.setattr(device_module, 'measure_peak', lambda device_type, dtype: 1.0)
    peak, where = peak_flops.__wrapped__('cuda', dtype)  # without its cache
    assert peak == (1.0 if key is None else GPU_PEAKS[key])
    assert ('measured' in where) == (key is None)


def test_measured_peak_is_of_the_fastest_product(monkeypatch):
    """ Of five products of 9, 9, 9, 0.5 and 2 seconds, as if another program interrupted most. """
    clock = iter([0.0, 9.0, 10.0, 19.0, 20.0, 29.0, 30.0, 30.5, 40.0, 42.0])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    assert measure_peak('cpu', 'float32') == 2 * 128**3 / 0.5

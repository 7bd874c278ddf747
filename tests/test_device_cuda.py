"""
CUDA paths with a stand-in for the GPU: which device is selected, what is said where it cannot be
used, and in which order a process selects its GPU and joins the others.
"""
import os
import shutil
import sysconfig
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL

from components import device as device_module
from components import distributed
from components.device import choose_device, has_kernels, missing_for_compile
from components.errors import UserError, how_to_save_memory

# -----------------------------------------------------------------------------
# a driver that PyTorch cannot use


@pytest.fixture
def driver(monkeypatch):
    """ driver(...) pretends that an NVIDIA driver is installed and CUDA is not available. """
    exists = os.path.exists
    which = shutil.which
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)  # by NVML, without CUDA
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    def pretend(in_proc=True, in_path=True, cuda='13.0'):
        def exists_here(path):
            return in_proc if path == '/proc/driver/nvidia/version' else exists(path)

        def which_here(name):
            if name == 'nvidia-smi':
                return '/usr/bin/nvidia-smi' if in_path else None
            return which(name)
        monkeypatch.setattr(os.path, 'exists', exists_here)
        monkeypatch.setattr(shutil, 'which', which_here)
        monkeypatch.setattr(torch.version, 'cuda', cuda)
    return pretend


@pytest.mark.parametrize('where', [
    pytest.param(dict(in_path=False), id='Linux'),
    pytest.param(dict(in_proc=False), id='Windows'),
])
def test_driver_that_is_too_old(driver, capsys, where):
    driver(**where)
    assert choose_device()[0] == 'cpu'
    error = capsys.readouterr().err
    assert error.startswith('device: cpu, because the NVIDIA driver')
    assert 'CUDA 13.0' in error
    assert 'nvidia-smi' in error
    assert error.count('\n') == 1


def test_pytorch_without_cuda_beside_a_gpu(driver, capsys):
    driver(cuda=None)
    assert choose_device()[0] == 'cpu'
    error = capsys.readouterr().err
    assert 'PyTorch without CUDA' in error
    assert 'pytorch.org' in error
    assert error.count('\n') == 1


def test_no_driver(driver, capsys):
    driver(in_proc=False, in_path=False)
    assert choose_device()[0] == 'cpu'
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('visible', ['', '-1'])
def test_gpu_that_is_hidden_on_purpose(driver, capsys, monkeypatch, visible):
    driver()
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert choose_device()[0] == 'cpu'
    assert capsys.readouterr().err == ''


def test_cpu_on_purpose(driver, capsys):
    driver()
    choose_device('cpu')
    assert capsys.readouterr().err == ''


def test_explicit_gpu_with_a_driver_that_is_too_old(driver):
    driver()
    with pytest.raises(UserError, match='device=cuda .*driver.*nvidia-smi.*--device=auto'):
        choose_device('cuda')


def test_explicit_gpu_without_a_driver(driver):
    driver(in_proc=False, in_path=False)
    with pytest.raises(UserError, match='device=cuda .*has 0 cuda devices; --device=auto'):
        choose_device('cuda')

# -----------------------------------------------------------------------------
# GPUs that PyTorch was not built for

CUDA_12_6 = ['sm_50', 'sm_60', 'sm_70', 'sm_75', 'sm_80', 'sm_86', 'sm_90']
CUDA_13_0 = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120']


@pytest.fixture
def gpu(monkeypatch):
    """ gpu(capability, architectures) pretends that this machine has one GPU. """
    def pretend(capability, architectures):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'Tesla V100-SXM2-16GB')
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: architectures)
        monkeypatch.setattr(device_module, 'missing_for_compile', lambda device_type: '')
    return pretend


@pytest.mark.parametrize('capability, architectures, expected', [
    pytest.param((7, 0), CUDA_12_6, True, id='Volta'),
    pytest.param((7, 0), CUDA_13_0, False, id='Volta with CUDA 13'),
    pytest.param((7, 5), CUDA_13_0, True, id='Turing'),
    pytest.param((8, 9), CUDA_13_0, True, id='Ada by the kernels of Ampere'),
    pytest.param((9, 0), CUDA_13_0, True, id='Hopper'),
    pytest.param((9, 0), ['sm_90a'], True, id='Hopper by its own kernels'),
    pytest.param((10, 3), CUDA_13_0, True, id='B300'),
    pytest.param((12, 1), CUDA_13_0, True, id='DGX Spark'),
    pytest.param((10, 0), CUDA_12_6, False, id='Blackwell with CUDA 12.6'),
    pytest.param((10, 0), [*CUDA_12_6, 'compute_90'], True, id='Blackwell by PTX'),
    pytest.param((8, 0), ['sm_86'], False, id='kernels of a later minor version'),
    pytest.param((9, 4), ['gfx90a', 'gfx942'], True, id='ROCm'),
])
def test_has_kernels(gpu, capability, architectures, expected):
    gpu(capability, architectures)
    assert has_kernels(0) is expected


@pytest.mark.parametrize('device', ['auto', 'cuda', 'cuda:0'])
def test_gpu_without_kernels(gpu, device):
    gpu((7, 0), CUDA_13_0)
    with pytest.raises(UserError, match=r'Tesla V100.*\(sm_70\).*sm_75.*--device=cpu'):
        choose_device(device)


def test_gpu_with_kernels(gpu):
    gpu((7, 0), CUDA_12_6)
    assert choose_device() == ('cuda', 'float16', True)

# -----------------------------------------------------------------------------
# what torch.compile requires


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """ installed(programs, triton, header) pretends that only these are installed. """
    def pretend(programs=(), triton=True, header=True, **variables):
        monkeypatch.delenv('CC', raising=False)
        monkeypatch.delenv('CXX', raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(shutil, 'which', lambda name: name if name in programs else None)
        monkeypatch.setattr(device_module, 'find_spec', {'triton': 'spec' if triton else None}.get)
        monkeypatch.setattr(sysconfig, 'get_config_var', {'INCLUDEPY': str(tmp_path)}.get)
        if header:
            (tmp_path / 'Python.h').touch()
    return pretend


@pytest.mark.parametrize('machine, missing', [
    pytest.param(dict(programs=['gcc']), '', id='gcc'),
    pytest.param(dict(programs=['clang']), '', id='clang'),
    pytest.param(dict(programs=['/opt/cc'], CC='/opt/cc'), '', id='CC'),
    pytest.param(dict(programs=['g++', 'c++']), 'a C compiler', id='only a C++ compiler'),
    pytest.param(dict(programs=['gcc'], triton=False), 'Triton', id='no Triton'),
    pytest.param(dict(programs=['gcc'], header=False), 'Python.h', id='no header'),
])
def test_missing_for_compile_on_a_gpu(installed, machine, missing):
    installed(**machine)
    if missing:
        assert missing in missing_for_compile('cuda')
    else:
        assert missing_for_compile('cuda') == ''


@pytest.mark.skipif(os.name == 'nt', reason='another compiler')
@pytest.mark.parametrize('machine, missing', [
    pytest.param(dict(programs=['c++'], triton=False), '', id='c++'),
    pytest.param(dict(programs=['clang++']), '', id='clang++'),
    pytest.param(dict(programs=['/opt/c++'], CXX='/opt/c++'), '', id='CXX'),
    pytest.param(dict(programs=['gcc']), 'a C++ compiler', id='only a C compiler'),
])
def test_missing_for_compile_on_a_cpu(installed, machine, missing):
    installed(**machine)
    assert missing_for_compile('cpu') == missing


def test_no_compile_where_something_is_missing(gpu, monkeypatch):
    gpu((9, 0), CUDA_13_0)
    monkeypatch.setattr(device_module, 'missing_for_compile', {'cuda': 'a C compiler'}.get)
    assert choose_device()[2] is False

# -----------------------------------------------------------------------------
# several processes


@pytest.fixture
def joined(monkeypatch):
    """ The arguments with which the process group is made. """
    arguments = {}

    def record(backend, **others):
        arguments.update(others, backend=backend)
    monkeypatch.setattr(dist, 'rendezvous', lambda url: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, 'init_process_group', record)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    return arguments


def test_nccl_is_told_the_gpu(joined):
    distributed.init_process_group('nccl', rank=0, world_size=1, dtype='bfloat16')
    assert joined['backend'] == 'nccl'
    assert joined['device_id'] == torch.device('cuda:3')


def test_gloo_is_told_no_gpu(joined):
    distributed.init_process_group('gloo', rank=0, world_size=1, dtype='bfloat16')
    assert joined['backend'] == 'gloo'
    assert joined['device_id'] is None


@pytest.mark.parametrize('backend', ['nccl', 'gloo'])
def test_processes_wait_longer_than_a_save(joined, backend):
    distributed.init_process_group(backend, rank=0, world_size=1, dtype='bfloat16')
    assert joined['timeout'] >= timedelta(hours=1)


class Joined(Exception):
    """ Ends train.py where it joins the other processes. """


@pytest.mark.parametrize('num_gpus, local_rank, gpu', [
    pytest.param(4, 2, 'cuda:2', id='all GPUs are visible'),
    pytest.param(1, 2, 'cuda:0', id='each process sees its own GPU'),
])
def test_gpu_is_selected_before_joining(monkeypatch, script_globals, dataset, num_gpus, local_rank,
                                        gpu):
    calls = []

    def join(backend, rank, world_size, dtype):
        calls.append(backend)
        raise Joined
    variables = dict(RANK=2, WORLD_SIZE=4, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=4)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: num_gpus)
    monkeypatch.setattr(device_module, 'choose_device', lambda *_: ('cuda', 'float32', False))
    monkeypatch.setattr(device_module, 'use_device', lambda device, dtype: calls.append(device))
    monkeypatch.setattr(dist, 'is_nccl_available', lambda: True)
    monkeypatch.setattr(distributed, 'init_process_group', join)
    monkeypatch.setattr('sys.excepthook', None)  # train.py replaces it
    with pytest.raises(Joined):
        script_globals('train.py', **{**SMALL, 'dataset': dataset, 'device': 'cuda',
                                      'gradient_accumulation_steps': 4})
    assert calls == [gpu, 'nccl']


class Ended(Exception):
    """ In place of os._exit. """


def test_process_group_is_destroyed_at_the_end(monkeypatch):
    """ After the others have come this far, also where a run ends after skipped updates. """
    calls = []

    def end(exit_code):
        calls.append(exit_code)
        raise Ended
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'barrier', lambda: calls.append('barrier'))
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: calls.append('destroy'))
    monkeypatch.setattr(os, '_exit', end)
    with pytest.raises(Ended):
        distributed.shut_down(1)
    assert calls == ['barrier', 'destroy', 1]

# -----------------------------------------------------------------------------
# memory


@pytest.mark.parametrize('batch_size, flags', [
    (12, '--batch_size=6 --gradient_accumulation_steps=80'),
    (9, '--batch_size=3 --gradient_accumulation_steps=120'),
    (7, '--batch_size=1 --gradient_accumulation_steps=280'),
    (1, 'block_size'),
])
def test_smaller_micro_batch_of_the_same_iteration(batch_size, flags):
    settings = dict(batch_size=batch_size, gradient_accumulation_steps=40)
    assert flags in how_to_save_memory(settings)

"""
CUDA paths with a stand-in for the GPU: which device is selected, what is said where it cannot be
used, in which order a process selects its GPU and joins the others, and that the loop does not wait
for a GPU. (On a GPU, test_cuda.py runs them.)
"""
import os
import shutil
import sysconfig
from contextlib import ExitStack
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components import device as device_module
from components import distributed, metrics, optim
from components import monitor as monitor_module
from components import settings as settings_module
from components.device import HostCopy, choose_device, has_kernels, missing_for_compile
from components.errors import UserError, how_to_save_memory
from components.optim import Muon, clip_and_step, configure_optimizers
from components.signals import StopSignal
from components.torch_versions import ddp_without_buffer_sync
from model import GPT, GPTConfig

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
# the model of several processes


class Compiled(torch.nn.Module):
    """ In place of a compiled model. """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.num_evaluations = 0

    def forward(self, *args, **settings):
        if not self.training:
            self.num_evaluations += 1
        return self.model(*args, **settings)


class FakeDDP(torch.nn.Module):
    """ In place of DistributedDataParallel. """

    def __init__(self, module, **arguments):
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.require_backward_grad_sync = True
        self.is_synchronized = []  # one of each forward pass

    def forward(self, *args, **settings):
        assert self.training, 'processes may have different numbers of evaluation batches'
        self.is_synchronized.append(self.require_backward_grad_sync)
        return self.module(*args, **settings)


def test_ddp_wraps_the_compiled_model(monkeypatch, script_globals, dataset):
    """ The first of two processes, which has two of the four micro-batches. """
    variables = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, 'init_process_group', lambda *args: distributed.Job())
    monkeypatch.setattr(torch, 'compile', lambda model, **options: Compiled(model))
    monkeypatch.setattr(distributed, 'DDP', FakeDDP)
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    monkeypatch.setattr('sys.excepthook', None)  # train.py replaces it
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 3,
                                          'gradient_accumulation_steps': 4, 'compile': True})
    ddp = names['model']
    assert ddp.module.model is names['raw_model']
    assert ddp.arguments.items() >= ddp_without_buffer_sync().items()
    assert ddp.module.num_evaluations > 0
    # the pass that warms up, then three iterations that exchange gradients once
    assert ddp.is_synchronized == [True] + 3 * [False, True]


def test_collectives_are_on_the_device(monkeypatch):
    """ NCCL has no tensors of the CPU. """
    devices = []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor: devices.append(tensor.device.type))
    total = distributed.all_reduce_sum(torch.zeros(()), 'meta')
    assert devices == ['meta']
    assert total.device.type == 'meta'

# -----------------------------------------------------------------------------
# copies between the host and a GPU


class OnCUDA(torch.Tensor):
    """ A tensor of the CPU that names its device cuda. """

    @property
    def device(self):
        return torch.device('cuda')


class Pinned(torch.Tensor):
    """ A tensor in what stands for pinned memory. """


def test_host_copy_waits_only_when_it_is_read(monkeypatch):
    """ Into pinned memory: another copy would wait at once. """
    calls = []

    class Event:
        def record(self):
            calls.append('record')

        def synchronize(self):
            calls.append('synchronize')

    def empty_like(tensor, device, pin_memory):
        assert device == 'cpu'
        assert pin_memory
        return torch.zeros(tensor.shape).as_subclass(Pinned)

    def copy(destination, source, non_blocking=False):
        assert isinstance(destination, Pinned)
        assert isinstance(source, OnCUDA)
        assert non_blocking
        calls.append('copy')

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch, 'empty_like', empty_like)
    monkeypatch.setattr(torch.Tensor, 'copy_', copy)
    host_copy = HostCopy(torch.tensor([1.5, 2.0]).as_subclass(OnCUDA))
    assert calls == ['copy', 'record']
    host_copy.tolist()
    assert calls == ['copy', 'record', 'synchronize']


@pytest.fixture
def copied(monkeypatch):
    """ The devices that batches are copied to, from pinned memory and without waiting. """
    devices = []

    def to(tensor, device, non_blocking=False):
        assert isinstance(tensor, Pinned)
        assert non_blocking
        devices.append(device)
        return tensor
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor.as_subclass(Pinned))
    monkeypatch.setattr(torch.Tensor, 'to', to)
    return devices


def test_copies_of_batches_of_training(script_globals, dataset, request):
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 0})
    expected_x, expected_y = names['read_windows']('train', np.array([0, 5]))
    copied = request.getfixturevalue('copied')
    names.update(device='cuda:1', device_type='cuda')
    x, y = names['read_windows']('train', np.array([0, 5]))
    assert copied == ['cuda:1']
    assert x.tolist() == expected_x.tolist()
    assert y.tolist() == expected_y.tolist()


def test_copies_of_batches_of_bench(script_globals, dataset, capsys, request):
    names = script_globals('bench.py', mode='estimate', n_layer=1, n_head=1, n_embd=8,
                           block_size=16, batch_size=2, device='cpu', dataset=dataset)
    copied = request.getfixturevalue('copied')
    names.update(device='cuda:1', device_type='cuda')
    x, y = names['get_batch'](np.random.default_rng(0), read_data=False)
    assert copied == ['cuda:1']
    assert x.shape == y.shape == (2, 16)

# -----------------------------------------------------------------------------
# the loop


def test_adamw_is_fused(tiny):
    adamw = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cuda', muon_lr=0.02)['optimizer']
    assert [group['fused'] for group in adamw.param_groups] == [True, True]


def test_numbers_of_an_update_are_read_an_iteration_later(monkeypatch):
    reads = []

    class Copy:
        def __init__(self, tensor):
            self.values = tensor.tolist()

        def tolist(self):
            reads.append(self.values[0])
            return self.values
    monkeypatch.setattr(monitor_module, 'HostCopy', Copy)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    monitor = monitor_module.StepMonitor('cuda:1', scaler, StopSignal(is_master=True), print)
    monitor.device = 'cpu'  # of its tensors
    for iter_num in range(4):
        monitor.sum_over_processes(torch.tensor(float(iter_num)))
        monitor.record(iter_num, torch.tensor(0.5))
        monitor.check()
    assert reads == [0.0, 1.0, 2.0]
    assert monitor.latest_loss() == 3.0


aten = torch.ops.aten
NEEDS_VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                aten.equal.default, aten.is_nonzero.default}


class WatchReads(TorchDispatchMode):
    """ Keeps the names of operations for which the host needs the values of a tensor. """

    def __init__(self):
        super().__init__()
        self.reads = []
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_operations += 1
        if func in NEEDS_VALUES:
            self.reads.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('settings', [
    pytest.param(dict(dtype='float32'), id='float32'),
    pytest.param(dict(dtype='float16', dropout=0.1), id='float16'),
    pytest.param(dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02),
                 id='recipe'),
])
def test_no_value_is_read_in_the_loop(script_globals, dataset, monkeypatch, settings):
    """ Neither for the gradient norm nor for a skipped update, but through a HostCopy. """
    watch = WatchReads()
    while_watching = ExitStack()
    tolist = torch.Tensor.tolist
    count_iteration = metrics.Timer.count_iteration

    def watch_method(patches, name):
        method = getattr(torch.Tensor, name)

        def watched_method(tensor, *args, **kwargs):
            watch.reads.append(name)
            return method(tensor, *args, **kwargs)
        patches.setattr(torch.Tensor, name, watched_method)

    def count_and_watch(timer):
        count_iteration(timer)
        if timer.num_iters == 2:
            patches = while_watching.enter_context(pytest.MonkeyPatch.context())
            for name in ('tolist', 'cpu', 'numpy'):
                watch_method(patches, name)
            while_watching.enter_context(watch)
        if timer.num_iters == 8:
            while_watching.close()

    assert 'cuda' in optim.CHECK_FOUND_INF
    monkeypatch.setattr(optim, 'CHECK_FOUND_INF', ('cpu',))
    monkeypatch.setattr(HostCopy, 'tolist', lambda host_copy: tolist(host_copy.copy))
    monkeypatch.setattr(metrics.Timer, 'count_iteration', count_and_watch)
    with while_watching:
        script_globals('train.py', **{**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 2,
                                      'max_iters': 10, 'log_interval': 0, 'eval_interval': 0,
                                      **settings})
    assert watch.reads == []
    assert watch.num_operations > 1000

class WatchDevices(TorchDispatchMode):
    """ Keeps the names of operations on a tensor that is not on the meta device. """

    def __init__(self):
        super().__init__()
        self.elsewhere = []
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_operations += 1
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
        if any(tensor.device.type != 'meta' for tensor in tensors):
            self.elsewhere.append(func.name())
        return output


@pytest.mark.parametrize('settings', [
    pytest.param({}, id='faithful'),
    pytest.param(dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True), id='recipe'),
])
def test_update_stays_on_the_device(monkeypatch, settings):
    """
    The meta device stands for a GPU: the host cannot read its values, and copies to it are seen. A
    GPU would be waited for in both cases. Muon is for all matrices, as the meta device has no fused
    AdamW.
    """
    monkeypatch.setattr(optim, 'CHECK_FOUND_INF', ('meta',))
    with torch.device('meta'):
        model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16,
                              bias=False, **settings))
        idx = torch.zeros(2, 16, dtype=torch.long)
    optimizers = {'muon': Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)}
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    watch = WatchDevices()
    with watch:
        for _ in range(2):
            _, loss = model(idx, idx)
            loss.backward()
            clip_and_step(optimizers, scaler, model.parameters(), loss.detach(), grad_clip=1.0)
    assert watch.elsewhere == []
    assert watch.num_operations > 100

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

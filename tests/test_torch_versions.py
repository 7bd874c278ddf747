""" components/torch_versions.py: what differs between versions of PyTorch. """
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from components import torch_versions
from components.torch_versions import cpu_capabilities, ddp_without_buffer_sync


@pytest.mark.skipif(not hasattr(torch.cpu, 'get_capabilities'), reason='PyTorch 2.9')
def test_cpu_capabilities():
    assert cpu_capabilities() == torch.cpu.get_capabilities()


@pytest.mark.parametrize('supported', [True, False])
def test_cpu_capabilities_of_2_9(monkeypatch, supported):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported, raising=False)
    assert cpu_capabilities() == {'avx512_bf16': supported}


@pytest.mark.parametrize('name', ['forward_sync_buffers', 'broadcast_buffers'])
def test_name_of_the_argument_of_ddp(monkeypatch, name):
    namespace = {}
    exec(f'class DDP:\n    def __init__(self, module, {name}=None): pass', namespace)
    monkeypatch.setattr(torch_versions, 'DDP', namespace['DDP'])
    assert ddp_without_buffer_sync() == {name: False}


# in a process of its own, as it is the only one of its process group
DDP_WITH_A_BUFFER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import warnings
warnings.simplefilter('error')
import torch
import torch.distributed as dist
from components.torch_versions import DDP, ddp_without_buffer_sync
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
module = torch.nn.Linear(2, 2)
module.register_buffer('cos', torch.ones(2))
model = DDP(module, **ddp_without_buffer_sync())
def fail(*args, **kwargs):
    raise AssertionError('a buffer is broadcast')
model._sync_buffers = fail
model(torch.ones(1, 2)).sum().backward()
print('done')
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_does_not_broadcast_buffers():
    """ By the installed version, without a warning. """
    done = subprocess.run([sys.executable, '-c', DDP_WITH_A_BUFFER], capture_output=True, text=True)
    assert 'done\n' in done.stdout, done.stderr  # 2.9 also prints how Gloo is connected

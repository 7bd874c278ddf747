"""
Apple's GPUs (MPS) with a stand-in: what PyTorch does not have there is not called, and their memory
is asked for.
"""
import numpy as np
import pytest
import torch
from conftest import SMALL

from components.device import HostCopy, free_memory, synchronize, use_device
from components.optim import clip_and_step, configure_optimizers


@pytest.fixture
def no_pinned_memory(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('pinned memory is for CUDA alone')
    monkeypatch.setattr(torch.Tensor, 'pin_memory', fail)


class OnMPS(torch.Tensor):
    """ A tensor of the CPU that names its device mps. """

    @property
    def device(self):
        return torch.device('mps')

# -----------------------------------------------------------------------------
# components/device.py


def test_free_memory(monkeypatch):
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 12 * 2**30)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 2 * 2**30)
    assert free_memory('mps') == 10 * 2**30


def test_synchronize(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: calls.append('cuda'))
    monkeypatch.setattr(torch.mps, 'synchronize', lambda: calls.append('mps'))
    synchronize('mps')
    assert calls == ['mps']


def test_host_copy_has_no_event(no_pinned_memory):
    copy = HostCopy(torch.tensor([1.5, 2.0]).as_subclass(OnMPS))
    assert copy.event is None
    assert copy.tolist() == [1.5, 2.0]


@pytest.mark.filterwarnings('error')  # of a dtype that autocast does not have
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_autocast(monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda major, minor: True)
    with use_device('mps', dtype):
        assert torch.is_autocast_enabled('mps')
        assert torch.get_autocast_dtype('mps') == getattr(torch, dtype)

# -----------------------------------------------------------------------------
# batches


@pytest.mark.parametrize('split', ['train', 'val'])
def test_batches_of_training_are_not_pinned(script_globals, dataset, no_pinned_memory, split):
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 0})
    names['device_type'] = 'mps'
    x, y = names['read_windows'](split, np.array([0, 5]))
    assert x.shape == y.shape == (2, 16)


def test_batches_of_bench_are_not_pinned(script_globals, dataset, no_pinned_memory, capsys):
    names = script_globals('bench.py', mode='estimate', n_layer=1, n_head=1, n_embd=8,
                           block_size=16, batch_size=2, device='cpu', dataset=dataset)
    names['device_type'] = 'mps'
    x, y = names['get_batch'](np.random.default_rng(0), read_data=False)
    assert x.shape == y.shape == (2, 16)

# -----------------------------------------------------------------------------
# the update


@pytest.mark.parametrize('loss, is_updated', [(1.0, True), (float('nan'), False)])
def test_update_without_found_inf(tiny, monkeypatch, loss, is_updated):
    """ Fused AdamW ignores found_inf on MPS, so that the update is skipped by an `if`. """
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'mps', muon_lr=0.02)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_',
                        lambda *args: clip(*args).as_subclass(OnMPS))
    idx = torch.zeros(1, 4, dtype=torch.long)
    tiny(idx, idx)[1].backward()
    before = [p.detach().clone() for p in tiny.parameters()]
    clip_and_step(optimizers, torch.amp.GradScaler('mps', enabled=False), tiny.parameters(),
                  torch.tensor(loss))
    for optimizer in optimizers.values():
        assert getattr(optimizer, 'found_inf', None) is None
    are_equal = [torch.equal(p, old) for p, old in zip(tiny.parameters(), before)]
    assert any(are_equal) != is_updated
    assert all(are_equal) != is_updated

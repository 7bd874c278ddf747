""" components/estimate.py, compared with real steps and files, and config/scaling.md with it. """
import re
import weakref

import pytest
import torch
from conftest import ROOT, SMALL, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as loss_module
from components import estimate
from components.device import GPU_MEMORY, GPU_PEAKS
from components.optim import clip_and_step, configure_optimizers
from model import GPT, GPTConfig

BATCH_SIZE = 4
TINY = dict(vocab_size=50, n_layer=3, n_head=2, n_embd=64, block_size=64)
LLAMA = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)
MOSTLY_LOGITS = dict(vocab_size=5000, n_layer=1, n_embd=32)
LARGER = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=500)


def new_model(device='cpu', **settings):
    with torch.device(device):
        return GPT(GPTConfig(**{**TINY, **settings}))


def forward(model, dtype):
    """ The loss of random tokens, as train.py computes it. """
    idx = torch.randint(model.config.vocab_size, (BATCH_SIZE, model.config.block_size))
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        _, loss = model(idx, idx, return_logits=False)
    return loss


def saved_bytes(model, dtype):
    """ Bytes that a forward pass saves for the backward pass, parameters excluded. """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


class LiveTensors(TorchDispatchMode):
    """ The most bytes of tensors that were made in its context and existed at the same time. """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.storages.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('settings', [
    {}, LARGER, dict(bias=False), dict(dropout=0.1), LLAMA, *[{name: True} for name in LLAMA],
], ids=str)
def test_saved_activations(dtype, settings):
    model = new_model(**settings)
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype)
    log_softmax = 4 * BATCH_SIZE * model.config.block_size * model.config.vocab_size
    estimated = memory['activations'] + memory.get('weights in 16 bits', 0) + log_softmax
    assert estimated == pytest.approx(saved_bytes(model, dtype), rel=0.1)


@pytest.mark.parametrize('dtype, architecture, settings', [
    ('float32', {}, {}),
    ('float32', LARGER, {}),
    ('float32', LARGER, dict(activation_checkpointing=True)),
    ('float32', MOSTLY_LOGITS, {}),
    ('float32', MOSTLY_LOGITS, dict(num_chunks=4)),
    ('float32', LLAMA, dict(muon_lr=0.02)),
    ('bfloat16', {}, {}),
    ('bfloat16', LLAMA, dict(muon_lr=0.02, num_chunks=4)),
    ('bfloat16', {}, dict(activation_checkpointing=True)),
    ('bfloat16', MOSTLY_LOGITS, dict(num_chunks=4)),
], ids=str)
def test_total_is_the_peak_of_two_micro_batches(dtype, architecture, settings, monkeypatch):
    settings = dict(settings)
    num_chunks = settings.pop('num_chunks', 1)
    with LiveTensors() as live:
        model = new_model(**architecture)
        model.activation_checkpointing = settings.get('activation_checkpointing', False)
        num_logits = BATCH_SIZE * model.config.block_size * model.config.vocab_size
        for module in (loss_module, estimate):
            monkeypatch.setattr(module, 'MAX_LOGITS', num_logits // num_chunks)
        optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'cpu',
                                          settings.get('muon_lr', 0.0))
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for _ in range(2):  # the moments exist from the second iteration on
            for _ in range(2):  # and gradients from the second micro-batch on
                loss = forward(model, dtype)
                loss.backward()
                loss = loss.detach()
            clip_and_step(optimizers, scaler, model.parameters(), loss)
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype, **settings)
    assert sum(memory.values()) == pytest.approx(live.peak, rel=0.1)

""" components/optim.py: Muon, the optimizers of a model, gradient clipping, skipped steps. """
import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from components.optim import (
    Muon,
    clip_and_step,
    configure_optimizers,
    orthogonalize,
    set_learning_rate,
)
from model import GPT, GPTConfig


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def none_equal(a, b):
    return not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_tensors(optimizers):
    """ The moments and step counts of {name: optimizer}. """
    tensors = []
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            tensors += state.values()
    return tensors

# -----------------------------------------------------------------------------
# Muon

def matrices(seed=0):
    """ Parameters that are wide, tall and square, several of one size. """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (64, 16))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, seed):
    for p, gradient in zip(params, matrices(seed)):
        p.grad = gradient.detach().clone()


def test_muon_equals_muon_of_torch():
    params = matrices()
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    reference_params = matrices()
    reference = torch.optim.Muon(reference_params, lr=0.1, weight_decay=0.1, momentum=0.95)
    for seed in (1, 2, 3):
        set_gradients(params, seed)
        optimizer.step()
        set_gradients(reference_params, seed)
        reference.step()
    for p, q in zip(params, reference_params):
        # three updates of 0.1 in bfloat16
        torch.testing.assert_close(p, q, atol=5e-3, rtol=0)
        torch.testing.assert_close(optimizer.state[p]['momentum_buffer'],
                                   reference.state[q]['momentum_buffer'])


def test_muon_update_is_nearly_orthogonal():
    """ It has the singular vectors of the gradient, and singular values near 1. """
    before = matrices()
    params = matrices()
    set_gradients(params, seed=1)
    Muon(params, lr=1.0, dtype=torch.float32).step()
    for old, p in zip(before, params):
        scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
        update = (old - p).detach() / scale
        U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
        S = U.T @ update @ Vh.T
        singular_values = S.diagonal()
        assert singular_values.min() > 0.6
        assert singular_values.max() < 1.3
        assert (S - singular_values.diag()).abs().max() < 1e-4


@pytest.mark.parametrize('norm', [1e-4, 1.0, 1e6])
def test_float16_is_as_good_as_float32(norm):
    """ Also for gradients whose numbers are outside its range. """
    X = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0))
    X *= norm / X.norm(dim=(1, 2), keepdim=True)
    expected = orthogonalize(X, torch.float32)
    out = orthogonalize(X, torch.float16)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize('found_inf', [None, torch.tensor(0.0)], ids=str)
def test_muon_is_compiled_once_for_each_shape(monkeypatch, found_inf):
    """ Whatever the learning rate. """
    counter = CompileCounterWithBackend('eager')
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    results = []
    for compile in (False, True):
        params = matrices()
        optimizer = Muon(params, lr=0.1, weight_decay=0.1, dtype=torch.float32, compile=compile)
        optimizer.found_inf = found_inf
        for seed in (1, 2, 3):
            optimizer.param_groups[0]['lr'] = 0.1 / seed
            set_gradients(params, seed)
            optimizer.step()
        results.append(params)
    torch._dynamo.reset()
    assert counter.frame_count == 4
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize('has_momentum', [False, True])
def test_muon_skips_the_step_by_itself(has_momentum):
    """ As on CUDA. The first gradients of float16 are often inf, because its scale is too high. """
    params = matrices()
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    if has_momentum:
        set_gradients(params, seed=1)
        optimizer.step()
    before = copies(params)
    momentum = [optimizer.momentum_buffer(p) for p in params]
    momentum_before = copies(momentum)
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all_equal(before, params)
    assert all_equal(momentum_before, momentum)


def test_muon_skips_parameters_without_gradient():
    before = matrices()
    params = matrices()
    set_gradients(params, seed=1)
    params[1].grad = None
    Muon(params, lr=0.1).step()
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[4], before[4])  # of the same size

# -----------------------------------------------------------------------------
# configure_optimizers

def names_of(group, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group['params']]


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_which_parameters_an_optimizer_updates(muon_lr):
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=True))
    model.transformer.wpe.weight.requires_grad = False
    optimizers = configure_optimizers(model, 0.1, 1e-3, (0.8, 0.9), 'cpu', muon_lr)
    norms_and_biases = []
    block_matrices = []
    for name, p in model.named_parameters():
        if p.dim() == 1:
            norms_and_biases.append(name)
        elif name.startswith('transformer.h.'):
            block_matrices.append(name)

    adamw = optimizers['optimizer']
    assert type(adamw) is torch.optim.AdamW
    for group in adamw.param_groups:
        assert (group['lr'], group['betas'], group['fused']) == (1e-3, (0.8, 0.9), True)
    decayed, not_decayed = adamw.param_groups
    assert not_decayed['weight_decay'] == 0.0
    assert names_of(not_decayed, model) == norms_and_biases
    assert decayed['weight_decay'] == 0.1
    if muon_lr == 0:
        assert list(optimizers) == ['optimizer']
        assert names_of(decayed, model) == ['transformer.wte.weight', *block_matrices]
        return
    assert list(optimizers) == ['optimizer', 'muon']
    assert names_of(decayed, model) == ['transformer.wte.weight']
    group, = optimizers['muon'].param_groups
    assert (group['lr'], group['weight_decay']) == (0.02, 0.1)
    assert names_of(group, model) == block_matrices


@pytest.mark.parametrize('device_type, dtype, expected', [
    ('cpu', 'float32', torch.float32),
    ('cpu', 'bfloat16', torch.bfloat16),
    ('cpu', 'float16', torch.float32),
    ('cuda', 'float16', torch.float16),
])
def test_dtype_of_muon(tiny, device_type, dtype, expected):
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), device_type, 0.02, dtype)
    assert optimizers['muon'].dtype == expected


def test_learning_rates_are_in_proportion(tiny):
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr=0.02)
    set_learning_rate(optimizers, 5e-4)
    assert [group['lr'] for group in optimizers['optimizer'].param_groups] == [5e-4, 5e-4]
    assert optimizers['muon'].param_groups[0]['lr'] == pytest.approx(0.01)

# -----------------------------------------------------------------------------
# clip_and_step

def sgd(model):
    """ An SGD whose update is minus the gradient. """
    return {'optimizer': torch.optim.SGD(model.parameters(), lr=1.0)}


def backward(model, scaler):
    """ Computes the gradients of a loss -> the loss, and the gradients before they are scaled. """
    idx = torch.arange(12)[None]
    _, loss = model(idx, idx)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    return loss.detach(), gradients


@pytest.fixture(params=[False, True], ids=['no scaler', 'scaler'])
def scaler(request):
    """ A GradScaler, which is enabled for float16 alone. """
    return torch.amp.GradScaler('cpu', init_scale=1024.0, enabled=request.param)


@pytest.mark.parametrize('grad_clip, is_clipped', [(0.01, True), (1e6, False), (0.0, False)])
def test_gradients_are_clipped_to_their_norm(tiny, scaler, grad_clip, is_clipped):
    before = copies(tiny.parameters())
    loss, gradients = backward(tiny, scaler)
    norm = clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss, grad_clip)
    expected = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    assert norm.item() == pytest.approx(expected, rel=1e-4)
    assert norm > 0.1
    factor = grad_clip / norm if is_clipped else 1.0
    for old, p, gradient in zip(before, tiny.parameters(), gradients):
        torch.testing.assert_close(old - p, gradient * factor, atol=1e-7, rtol=1e-3)
        assert p.grad is None


def test_parameters_without_gradient(tiny):
    tiny.transformer.wpe.weight.requires_grad = False
    before = copies([tiny.transformer.wpe.weight, tiny.lm_head.weight])
    idx = torch.arange(12)[None]
    _, loss = tiny(idx, idx)
    loss.backward()
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss.detach())
    assert torch.equal(tiny.transformer.wpe.weight, before[0])
    assert not torch.equal(tiny.lm_head.weight, before[1])


@pytest.mark.parametrize('value', [math.nan, math.inf], ids=str)
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_non_finite_numbers_skip_the_step_of_all_optimizers(tiny, scaler, where, value):
    """ Also if only the loss is non-finite. The step after it is not skipped. """
    optimizers = configure_optimizers(tiny, 0.1, 0.1, (0.9, 0.95), 'cpu', muon_lr=0.1)
    loss, _ = backward(tiny, scaler)
    clip_and_step(optimizers, scaler, tiny.parameters(), loss, 1.0)
    params = copies(tiny.parameters())
    moments = copies(state_tensors(optimizers))

    loss, _ = backward(tiny, scaler)
    if where == 'loss':
        loss.fill_(value)
    else:
        tiny.lm_head.weight.grad[0, 0] = value
    norm = clip_and_step(optimizers, scaler, tiny.parameters(), loss, 1.0)
    assert norm.isfinite() == (where == 'loss')
    assert all_equal(params, tiny.parameters())
    assert all_equal(moments, state_tensors(optimizers))
    if scaler.is_enabled():
        assert scaler.get_scale() == (1024.0 if where == 'loss' else 512.0)

    loss, _ = backward(tiny, scaler)
    clip_and_step(optimizers, scaler, tiny.parameters(), loss, 1.0)
    assert none_equal(params, tiny.parameters())

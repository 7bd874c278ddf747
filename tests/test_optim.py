""" components/optim.py: Muon, the optimizers of a model, gradient clipping, skipped updates. """
import math

import pytest
import torch

from components.optim import Muon, clip_and_step, configure_optimizers, set_learning_rate
from model import GPT, GPTConfig

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)
NON_FINITE = [pytest.param(math.nan, id='NaN'), pytest.param(math.inf, id='inf')]


@pytest.fixture
def recipe():
    """ A small GPT with every newer flag. """
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False)
    return GPT(GPTConfig(**sizes, **RECIPE))


@pytest.fixture
def scaler():
    """ A GradScaler that is disabled, as in every dtype but float16. """
    return torch.amp.GradScaler('cpu', enabled=False)


def backward(model):
    """ Computes the gradients of a loss -> the loss. """
    idx = torch.arange(12)[None]
    _, loss = model(idx, idx)
    loss.backward()
    return loss.detach()


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def none_equal(a, b):
    return not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))

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


def test_muon_skips_non_finite_gradients_without_momentum():
    """ The first gradients of float16 are often inf, because its scale is too high. """
    before = matrices()
    params = matrices()
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all_equal(before, params)
    assert not any(state['momentum_buffer'].any() for state in optimizer.state.values())


def test_muon_skips_non_finite_gradients_with_momentum():
    params = matrices()
    set_gradients(params, seed=1)
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    optimizer.step()
    before = copies(params)
    buffers = [optimizer.state[p]['momentum_buffer'] for p in params]
    buffers_before = copies(buffers)
    for p in params:
        p.grad[0, 0] = math.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all_equal(before, params)
    assert all_equal(buffers_before, buffers)


def test_muon_skips_parameters_without_gradient():
    before = matrices()
    params = matrices()
    set_gradients(params, seed=1)
    params[1].grad = None
    Muon(params, lr=0.1).step()
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[4], before[4])  # of the same size


def test_muon_is_for_matrices():
    with pytest.raises(AssertionError, match='matrices'):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)

# -----------------------------------------------------------------------------
# configure_optimizers

def names_of(params, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in params}


def all_params(optimizers):
    """ The parameters of all groups of {name: optimizer}. """
    params = []
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            params += group['params']
    return params


def test_adamw_decays_matrices_and_embeddings():
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=True))
    optimizers = configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95), 'cpu')
    assert list(optimizers) == ['optimizer']
    decayed, not_decayed = optimizers['optimizer'].param_groups
    assert decayed['weight_decay'] == 0.1
    assert not_decayed['weight_decay'] == 0.0
    norms_and_biases = {name for name, _ in model.named_parameters()
                        if '.ln_' in name or name.endswith('.bias')}
    assert names_of(not_decayed['params'], model) == norms_and_biases
    others = {name for name, _ in model.named_parameters()} - norms_and_biases
    assert names_of(decayed['params'], model) == others


def test_adamw_settings(tiny):
    adamw = configure_optimizers(tiny, 0.1, 1e-3, (0.8, 0.9), 'cpu')['optimizer']
    assert type(adamw) is torch.optim.AdamW
    for group in adamw.param_groups:
        assert group['lr'] == 1e-3
        assert group['betas'] == (0.8, 0.9)
        assert group['fused'] is True


def test_muon_updates_the_matrices_of_the_blocks(tiny):
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr=0.02)
    assert list(optimizers) == ['optimizer', 'muon']
    matrices_of_blocks = {f'transformer.h.{layer}.{name}.weight' for layer in range(2)
                          for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    muon = optimizers['muon']
    assert names_of(muon.param_groups[0]['params'], tiny) == matrices_of_blocks
    assert muon.param_groups[0]['weight_decay'] == 0.1
    assert muon.param_groups[0]['lr'] == 0.02


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_each_parameter_has_one_optimizer(tiny, muon_lr):
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr)
    params = all_params(optimizers)
    assert len(params) == len(list(tiny.parameters()))
    assert {id(p) for p in params} == {id(p) for p in tiny.parameters()}


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_frozen_parameters_have_no_optimizer(tiny, muon_lr):
    frozen = [tiny.transformer.wpe.weight, tiny.transformer.h[0].mlp.c_fc.weight]
    for p in frozen:
        p.requires_grad = False
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr)
    ids = {id(p) for p in all_params(optimizers)}
    assert ids == {id(p) for p in tiny.parameters() if p.requires_grad}


@pytest.mark.parametrize('dtype, muon_dtype', [
    ('float32', torch.float32),
    ('bfloat16', torch.bfloat16),
    ('float16', torch.float32),  # its range is too small
])
def test_dtype_of_muon(recipe, dtype, muon_dtype):
    optimizers = configure_optimizers(recipe, 0.1, 1e-3, (0.9, 0.95), 'cpu', 0.02, dtype)
    assert optimizers['muon'].dtype == muon_dtype


def test_learning_rates_are_in_proportion(tiny):
    optimizers = configure_optimizers(tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', muon_lr=0.02)
    set_learning_rate(optimizers, 5e-4)
    adamw_lrs = [group['lr'] for group in optimizers['optimizer'].param_groups]
    assert adamw_lrs == [5e-4, 5e-4]
    assert optimizers['muon'].param_groups[0]['lr'] == pytest.approx(0.01)

# -----------------------------------------------------------------------------
# clip_and_step

@pytest.fixture
def optimizers(tiny):
    """ AdamW and Muon for `tiny`. """
    return configure_optimizers(tiny, 0.1, 0.1, (0.9, 0.95), 'cpu', muon_lr=0.1)


def sgd(model, **settings):
    """ An SGD whose update is minus the gradient. """
    return {'optimizer': torch.optim.SGD(model.parameters(), lr=1.0, **settings)}


def moments(optimizers):
    """ The moments and step counts of {name: optimizer}, in a list. """
    tensors = []
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            tensors += state.values()
    return tensors


def total_norm(tensors):
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def test_gradients_are_clipped_to_their_norm(tiny, scaler):
    before = copies(tiny.parameters())
    loss = backward(tiny)
    gradients = copies(p.grad for p in tiny.parameters())
    norm = clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss, grad_clip=0.01)
    assert norm.item() == pytest.approx(total_norm(gradients), rel=1e-5)
    assert norm > 0.1
    for old, p, gradient in zip(before, tiny.parameters(), gradients):
        torch.testing.assert_close(old - p, gradient * 0.01 / norm, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize('grad_clip', [pytest.param(0.0, id='off'), pytest.param(1e6, id='high')])
def test_gradients_are_not_clipped(tiny, scaler, grad_clip):
    before = copies(tiny.parameters())
    loss = backward(tiny)
    gradients = copies(p.grad for p in tiny.parameters())
    norm = clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss, grad_clip)
    assert norm.item() == pytest.approx(total_norm(gradients), rel=1e-5)
    for old, p, gradient in zip(before, tiny.parameters(), gradients):
        torch.testing.assert_close(old - p, gradient, atol=1e-7, rtol=1e-5)


def test_gradients_are_freed(tiny, optimizers, scaler):
    loss = backward(tiny)
    clip_and_step(optimizers, scaler, tiny.parameters(), loss)
    assert all(p.grad is None for p in tiny.parameters())


def test_parameters_without_gradient(tiny, optimizers, scaler):
    tiny.transformer.wpe.weight.requires_grad = False
    before = copies([tiny.transformer.wpe.weight, tiny.lm_head.weight])
    loss = backward(tiny)
    clip_and_step(optimizers, scaler, tiny.parameters(), loss)
    assert torch.equal(tiny.transformer.wpe.weight, before[0])
    assert not torch.equal(tiny.lm_head.weight, before[1])


def test_scaled_gradients_are_unscaled_before_clipping(tiny):
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    before = copies(tiny.parameters())
    idx = torch.arange(12)[None]
    _, loss = tiny(idx, idx)
    gradients = torch.autograd.grad(loss, list(tiny.parameters()), retain_graph=True)
    scaler.scale(loss).backward()
    norm = clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss.detach(), grad_clip=0.01)
    assert norm.item() == pytest.approx(total_norm(gradients), rel=1e-4)
    for old, p, gradient in zip(before, tiny.parameters(), gradients):
        torch.testing.assert_close(old - p, gradient * 0.01 / norm, atol=1e-7, rtol=1e-3)


def test_scale_is_lowered_after_an_overflow(tiny):
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    before = copies(tiny.parameters())
    idx = torch.arange(12)[None]
    _, loss = tiny(idx, idx)
    scaler.scale(loss).backward()
    tiny.lm_head.weight.grad[0, 0] = math.inf
    clip_and_step(sgd(tiny), scaler, tiny.parameters(), loss.detach())
    assert scaler.get_scale() == 512.0
    assert all_equal(before, tiny.parameters())


@pytest.mark.parametrize('value', NON_FINITE)
def test_non_finite_loss_skips_the_update(tiny, optimizers, scaler, value):
    """ Also if the gradients are finite: another process may have the loss. """
    before = copies(tiny.parameters())
    backward(tiny)
    norm = clip_and_step(optimizers, scaler, tiny.parameters(), torch.tensor(value), 1.0)
    assert not norm.isfinite()
    assert all_equal(before, tiny.parameters())


@pytest.mark.parametrize('value', NON_FINITE)
def test_non_finite_gradient_skips_the_update_of_all_optimizers(recipe, scaler, value):
    """ The gradient is one of AdamW's. The update after it is not skipped. """
    optimizers = configure_optimizers(recipe, 0.1, 0.1, (0.9, 0.95), 'cpu', muon_lr=0.1)
    loss = backward(recipe)
    clip_and_step(optimizers, scaler, recipe.parameters(), loss, 1.0)
    params_before = copies(recipe.parameters())
    moments_before = copies(moments(optimizers))

    loss = backward(recipe)
    recipe.lm_head.weight.grad[0, 0] = value
    clip_and_step(optimizers, scaler, recipe.parameters(), loss, 1.0)
    assert all_equal(params_before, recipe.parameters())
    assert all_equal(moments_before, moments(optimizers))

    loss = backward(recipe)
    clip_and_step(optimizers, scaler, recipe.parameters(), loss, 1.0)
    assert none_equal(params_before, recipe.parameters())


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('value', NON_FINITE)
def test_optimizers_without_found_inf_are_skipped_too(tiny, scaler, fused, value):
    """ Beside a fused AdamW, which decides on the device, or beside one that does not. """
    optimizers = {
        'sgd': torch.optim.SGD(tiny.transformer.h.parameters(), lr=0.1, momentum=0.9),
        'optimizer': torch.optim.AdamW(tiny.transformer.wte.parameters(), lr=0.1, fused=fused),
    }
    params = all_params(optimizers)
    before = copies(params)
    backward(tiny)
    params[0].grad[0] = value
    clip_and_step(optimizers, scaler, tiny.parameters(), torch.tensor(1.0), 1.0)
    assert all_equal(before, params)

    loss = backward(tiny)
    clip_and_step(optimizers, scaler, tiny.parameters(), loss, 1.0)
    assert none_equal(before, params)

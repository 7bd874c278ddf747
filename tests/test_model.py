"""
The model against closed forms and its own promises. Its logits, loss and gradients are compared
with those of Hugging Face models in test_huggingface.py.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import (
    GPT,
    RMS_NORM_EPS,
    Dropout,
    GPTConfig,
    KVCache,
    apply_rope,
    padding_mask,
    rms_norm,
    rope_cos_sin,
)

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)
ARCHITECTURES = [
    pytest.param(dict(), id='default'),
    pytest.param(dict(bias=True), id='bias'),
    pytest.param(dict(gelu='tanh'), id='tanh'),
    pytest.param(dict(rotary=True), id='rotary'),
    pytest.param(dict(rmsnorm=True), id='rmsnorm'),
    pytest.param(dict(qk_norm=True), id='qk_norm'),
    pytest.param(dict(untied=True), id='untied'),
    pytest.param(RECIPE, id='recipe'),
]


def small_gpt(**args):
    """ A small GPT whose weights are large enough for attention to matter. """
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False)
    model = GPT(GPTConfig(**{**sizes, **args}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def random_ids(B, T, seed=0):
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(seed))

# -----------------------------------------------------------------------------
# forward


@pytest.mark.parametrize('args', ARCHITECTURES)
def test_causal_mask(args):
    model = small_gpt(**args)
    a = random_ids(1, 16)
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % 40
    logits_a, _ = model(a, a)
    logits_b, _ = model(b, b)
    assert torch.equal(logits_a[:, :9], logits_b[:, :9])
    is_different = (logits_a[:, 9:] != logits_b[:, 9:]).any(dim=-1)
    assert is_different.all()


@pytest.mark.parametrize('args', ARCHITECTURES)
def test_logits_of_the_last_position_without_targets(args):
    model = small_gpt(**args)
    idx = random_ids(2, 7)
    last_logits, loss = model(idx)
    all_logits, _ = model(idx, idx)
    assert last_logits.shape == (2, 1, 40)
    assert loss is None
    torch.testing.assert_close(last_logits, all_logits[:, -1:])


def test_loss_is_mean_cross_entropy(tiny):
    idx = random_ids(2, 8)
    targets = random_ids(2, 8, seed=1)
    logits, loss = tiny(idx, targets)
    probs = logits.softmax(dim=-1)
    target_probs = probs.gather(2, targets[:, :, None])
    torch.testing.assert_close(loss, -target_probs.log().mean())


def test_loss_ignores_targets_of_minus_one(tiny):
    idx = random_ids(2, 8)
    targets = idx.clone()
    targets[1] = -1
    _, loss = tiny(idx, targets)
    _, loss_of_first_row = tiny(idx[:1], idx[:1])
    torch.testing.assert_close(loss, loss_of_first_row)


@pytest.mark.parametrize('args', [dict(), RECIPE], ids=['default', 'recipe'])
def test_more_tokens_than_block_size(args):
    model = small_gpt(**args)
    with pytest.raises(ValueError, match='17 tokens are more than block_size=16'):
        model(random_ids(1, 17))


@pytest.mark.parametrize('flag', RECIPE)
def test_each_flag_changes_the_logits(flag):
    logits = []
    for args in (dict(), {flag: True}):
        model = small_gpt(**args)
        for name, p in model.named_parameters():  # equal weights where both models have them
            generator = torch.Generator().manual_seed(sum(name.encode()))
            torch.nn.init.normal_(p, std=0.3, generator=generator)
        idx = torch.arange(12)[None]
        logits.append(model(idx, idx)[0])
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize('part', ['attn', 'mlp'])
def test_dropout_in_each_part_of_a_block(part):
    model = small_gpt(n_layer=1, dropout=0.5).train()
    module = getattr(model.transformer.h[0], part)
    x = torch.randn(1, 16, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_of_attention_weights(dtype):
    model = small_gpt(n_layer=1, dropout=0.5).train()
    attention = model.transformer.h[0].attn
    attention.resid_dropout.eval()
    x = torch.randn(1, 16, 16)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert not torch.equal(attention(x), attention(x))


@pytest.mark.parametrize('p', [0.1, 0.25, 0.5, 0.9])
def test_dropout_rate(p):
    """ Of 999,999 elements the rate is p within 5 standard deviations; the others are scaled. """
    y = Dropout(p)(torch.ones(999, 1001))
    is_kept = y != 0
    assert y[is_kept] == pytest.approx(1 / (1 - p))
    tolerance = 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert 1 - is_kept.float().mean().item() == pytest.approx(p, abs=tolerance)


def test_dropout_of_nearly_everything():
    assert Dropout(0.999999)(torch.ones(10_000)).count_nonzero() < 10


def test_dropout_is_not_correlated_between_neighbors():
    """ Four of them share a random number of 64 bits. """
    is_kept = (Dropout(0.5)(torch.ones(400_000)) != 0).view(-1, 4)
    correlations = torch.corrcoef(is_kept.T.float()) - torch.eye(4)
    assert correlations.abs().max() < 5 / 100_000 ** 0.5


def test_attention_gradients_in_float64(tiny):
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiny.transformer.h[0].attn.double(), x)


@pytest.mark.parametrize('args', ARCHITECTURES)
def test_attention_by_matrices_equals_scaled_dot_product_attention(args, monkeypatch):
    """ In bfloat16 on a CPU: as close to float32 as attention in float32 is. """
    model = small_gpt(**args)
    idx = random_ids(3, 16)
    exact = gradients(model, idx, torch.float32)
    monkeypatch.setattr(model_module, 'MAX_ATTENTION_MATRIX', 16)
    by_matrices = gradients(model, idx, torch.bfloat16)
    monkeypatch.setattr(model_module, 'MAX_ATTENTION_MATRIX', 15)
    by_torch = gradients(model, idx, torch.bfloat16)
    assert not torch.equal(by_matrices, by_torch)
    error = (by_matrices - exact).norm() / exact.norm()
    error_of_torch = (by_torch - exact).norm() / exact.norm()
    assert error < 1.5 * error_of_torch
    assert error < 0.05


def gradients(model, idx, dtype):
    """ Those of the mean loss by all parameters, in one vector, computed in `dtype`. """
    model.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        _, loss = model(idx, idx)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_rms_norm_with_gradients_equals_that_of_torch():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    grad = torch.randn(3, 5, 8)
    expected = F.rms_norm(x, (8,), eps=RMS_NORM_EPS)
    torch.testing.assert_close(rms_norm(x), expected)
    expected_grad, = torch.autograd.grad(expected, x, grad)
    x_grad, = torch.autograd.grad(rms_norm(x), x, grad)
    torch.testing.assert_close(x_grad, expected_grad)


@pytest.mark.parametrize('scale', [1, 1e-3], ids=['', 'epsilon matters'])
def test_rms_norm_gradients_in_float64(scale):
    x = scale * torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, x, eps=1e-7)


def test_autocast_on_a_cpu():
    """ The error of bfloat16 is small, and gradients are in float32. """
    model = small_gpt(**RECIPE)
    idx = random_ids(3, 16)
    exact, _ = model(idx, idx)
    with torch.autocast('cpu', torch.bfloat16):
        mixed, loss = model(idx, idx)
    loss.backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.dtype == torch.float32
    error = (mixed - exact).abs().max()
    assert 0 < error < 0.05 * exact.abs().max()


def test_model_in_bfloat16():
    model = small_gpt(**RECIPE).bfloat16()
    idx = random_ids(3, 16)
    logits, _ = model(idx, idx)
    assert logits.dtype == torch.bfloat16

# -----------------------------------------------------------------------------
# RoPE


@pytest.mark.parametrize('base', [10000, 20])
def test_rope_is_a_rotation_of_complex_numbers(base):
    head_size = 8
    cos, sin = rope_cos_sin(16, head_size, base)
    x = torch.randn(3, 16, 2, head_size, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :4], x[..., 4:])                           # (B, T, nh, hs/2)
    for position in range(16):
        for i in range(head_size // 2):
            angle = position * base ** (-2 * i / head_size)
            pairs[:, position, :, i] *= complex(math.cos(angle), -math.sin(angle))
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    rotated = apply_rope(x, cos[:, 0], sin[:, 0])
    torch.testing.assert_close(rotated, expected)


def test_rope_is_relative():
    """ The product of a query and a key depends on their distance, not on their positions. """
    cos, sin = rope_cos_sin(16, 8)
    x = torch.randn(8, generator=torch.Generator().manual_seed(1))
    rotated = apply_rope(x.expand(1, 16, 1, 1, 8), cos, sin)[0, :, 0, 0]    # (T, hs)
    products = rotated @ rotated.T                                          # (T, T)
    for distance in range(15):
        diagonal = products.diagonal(distance)
        expected = diagonal[:1].expand_as(diagonal)
        torch.testing.assert_close(diagonal, expected, atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1


def test_rope_base_of_a_model():
    model = small_gpt(rotary=True, rope_base=20)
    cos, sin = rope_cos_sin(16, 8, 20)
    assert torch.equal(model.cos, cos)
    assert torch.equal(model.sin, sin)


def test_rope_cos_sin_are_not_in_checkpoints():
    """ A checkpoint of a cropped model could not be loaded with them. """
    state = small_gpt(rotary=True).state_dict()
    assert 'cos' not in state
    assert 'sin' not in state

# -----------------------------------------------------------------------------
# KV cache and padding


@pytest.mark.parametrize('args', ARCHITECTURES)
@torch.no_grad()
def test_kv_cache_equals_no_cache(args):
    model = small_gpt(**args)
    idx = random_ids(2, 16)
    expected, _ = model(idx, idx)
    cache = model.new_cache(16)
    logits, _ = model(idx[:, :9], cache=cache)
    torch.testing.assert_close(logits[:, 0], expected[:, 8], rtol=1e-4, atol=1e-5)
    for n in range(9, 16):
        logits, _ = model(idx[:, n:n + 1], cache=cache)
        torch.testing.assert_close(logits[:, 0], expected[:, n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('args', ARCHITECTURES)
@torch.no_grad()
def test_padding_equals_no_padding(args):
    model = small_gpt(**args)
    idx = random_ids(3, 12)
    pad = torch.tensor([0, 3, 7])
    cache = model.new_cache(12)
    prefill_logits, _ = model(idx[:, :11], cache=cache, pad=pad)
    logits, _ = model(idx[:, 11:], cache=cache, pad=pad)
    uncached_logits, _ = model(idx, pad=pad)
    for row, n in enumerate(pad.tolist()):
        expected, _ = model(idx[row:row + 1, n:], idx[row:row + 1, n:])     # (1, 12 - n, 40)
        torch.testing.assert_close(prefill_logits[row, 0], expected[0, -2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[row, 0], expected[0, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(uncached_logits[row, 0], expected[0, -1], rtol=1e-4, atol=1e-5)


def test_padding_mask():
    pad = [0, 3, 6]
    mask = padding_mask(torch.tensor([3, 4]), 5, torch.tensor(pad))
    assert mask.shape == (3, 1, 2, 5)
    for row in range(3):
        for i, query in enumerate((3, 4)):
            for key in range(5):
                is_earlier_token = pad[row] <= key <= query
                assert mask[row, 0, i, key] == (is_earlier_token or key == query)


@pytest.mark.parametrize('args', [dict(), RECIPE], ids=['default', 'recipe'])
@torch.no_grad()
def test_kv_cache_past_block_size(args):
    model = small_gpt(**args)
    cache = model.new_cache(100)
    for _ in range(16):
        model(torch.tensor([[1]]), cache=cache)
    with pytest.raises(ValueError, match='17 tokens are more than block_size=16'):
        model(torch.tensor([[1]]), cache=cache)


def test_kv_cache_returns_all_tokens_in_order():
    cache = KVCache(5)
    k = torch.randn(2, 3, 5, 4)
    v = torch.randn(2, 3, 5, 4)
    cache.extend(k[:, :, :3], v[:, :, :3])
    all_k, all_v = cache.extend(k[:, :, 3:4], v[:, :, 3:4])
    assert torch.equal(all_k, k[:, :, :4])
    assert torch.equal(all_v, v[:, :, :4])
    assert cache.length == 4


def test_kv_cache_repeat():
    cache = KVCache(2)
    k = torch.randn(1, 3, 2, 4)
    v = torch.randn(1, 3, 2, 4)
    cache.extend(k[:, :, :1], v[:, :, :1])
    cache.repeat(5)
    new_k = torch.randn(5, 3, 1, 4)
    all_k, all_v = cache.extend(new_k, new_k)
    for row in range(5):
        assert torch.equal(all_k[row, :, 0], k[0, :, 0])
        assert torch.equal(all_v[row, :, 0], v[0, :, 0])
        assert torch.equal(all_k[row, :, 1], new_k[row, :, 0])  # rows do not share memory

# -----------------------------------------------------------------------------
# generate


def test_generate_samples_from_the_softmax_of_the_top_k(tiny):
    tiny.eval()
    idx = random_ids(1, 20)  # longer than block_size
    logits = tiny(idx[:, -16:])[0][0, -1] / 0.7
    top_ids = logits.topk(5).indices
    probs = F.softmax(logits[top_ids], dim=-1)
    torch.manual_seed(0)
    samples = tiny.generate(idx.repeat(4000, 1), 1, temperature=0.7, top_k=5)[:, -1]
    counts = torch.stack([(samples == i).sum() for i in top_ids])
    assert counts.sum() == 4000
    expected = 4000 * probs
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 18.5  # the 99.9% quantile for four degrees of freedom


def test_generate_with_vocab_size(tiny):
    prompts = torch.zeros(300, 1, dtype=torch.long)
    limited = tiny.generate(prompts, 3, top_k=1000, vocab_size=7)
    unlimited = tiny.generate(prompts, 3, top_k=0)
    assert limited.max() < 7
    assert unlimited.max() > 7


def test_generate_keeps_the_prompt(tiny):
    idx = random_ids(2, 5)
    out = tiny.generate(idx, 4)
    assert out.shape == (2, 9)
    assert torch.equal(out[:, :5], idx)

# -----------------------------------------------------------------------------
# parameters


def test_names_and_number_of_parameters():
    C, V, T, L = 16, 40, 16, 3
    sizes = dict(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C)
    model = GPT(GPTConfig(**sizes, bias=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = V * C + L * (12 * C * C + 13 * C) + 2 * C
    assert model.get_num_params() == expected
    assert model.get_num_params(non_embedding=False) == expected + T * C
    names = {
        'transformer.wte.weight',
        'transformer.wpe.weight',
        'transformer.h.2.ln_1.bias',
        'transformer.h.2.attn.c_attn.bias',
        'transformer.h.1.attn.c_proj.weight',
        'transformer.h.1.ln_2.weight',
        'transformer.h.0.mlp.c_fc.weight',
        'transformer.h.0.mlp.c_proj.weight',
        'transformer.ln_f.bias',
        'lm_head.weight',
    }
    assert names <= set(model.state_dict())


def test_number_of_parameters_without_a_position_embedding():
    model = small_gpt(**RECIPE)
    n = sum(p.numel() for p in model.parameters())
    assert model.get_num_params() == n
    assert model.get_num_params(non_embedding=False) == n


def test_initialization():
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=500, n_layer=8, n_head=2, n_embd=64)
    model = GPT(GPTConfig(**sizes, bias=True))
    for name, p in model.named_parameters():
        if name.endswith('.bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            expected_std = 0.02
            if name.endswith('c_proj.weight'):
                expected_std = 0.02 / math.sqrt(2 * 8)
            assert p.std().item() == pytest.approx(expected_std, rel=0.05), name


@pytest.mark.parametrize('newer', [{}, dict(rotary=True, rmsnorm=True, qk_norm=True)], ids=repr)
def test_activation_checkpointing_changes_no_number(newer):
    """ Bit for bit, with dropout; and fewer tensors are saved for the backward pass. """
    config = GPTConfig(block_size=16, vocab_size=40, n_layer=3, n_head=2, n_embd=16, dropout=0.2,
                       **newer)
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(40, (2, 17))
    losses = []
    gradients = []
    saved_bytes = []
    for activation_checkpointing in (False, True):
        model.activation_checkpointing = activation_checkpointing
        model.zero_grad()
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, loss = model(idx[:, :-1], idx[:, 1:])
        saved_bytes.append(sum(saved.values()))
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert saved_bytes[1] < saved_bytes[0] / 3


def test_activation_checkpointing_knows_padding():
    model = small_gpt(bias=False)
    idx = torch.randint(model.config.vocab_size, (2, 8))
    pad = torch.tensor([0, 3])
    expected, _ = model(idx, pad=pad)
    model.activation_checkpointing = True
    logits, _ = model(idx, pad=pad)
    torch.testing.assert_close(logits, expected)


def test_configure_optimizers():
    model = small_gpt(bias=True)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    assert isinstance(optimizer, torch.optim.AdamW)
    decay, no_decay = optimizer.param_groups
    assert decay['weight_decay'] == 0.1
    assert no_decay['weight_decay'] == 0.0
    assert all(p.dim() >= 2 for p in decay['params'])
    assert all(p.dim() < 2 for p in no_decay['params'])
    assert len(decay['params']) + len(no_decay['params']) == len(list(model.parameters()))


@pytest.mark.parametrize('args', [dict(), RECIPE], ids=['default', 'recipe'])
def test_crop_block_size(args):
    model = small_gpt(**args)
    idx = random_ids(2, 8)
    before, _ = model(idx, idx)
    model.crop_block_size(8)
    after, _ = model(idx, idx)
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match='9 tokens are more than block_size=8'):
        model(random_ids(1, 9))
    cropped = GPT(GPTConfig(**vars(model.config)))
    cropped.load_state_dict(model.state_dict())
    after_loading, _ = cropped.eval()(idx, idx)
    assert torch.equal(before, after_loading)


def test_block_size_cannot_be_extended(tiny):
    with pytest.raises(AssertionError, match='reduced'):
        tiny.crop_block_size(17)


def test_flops_and_mfu(tiny):
    N, L, HQ, T = tiny.get_num_params(), 2, 16, 16
    flops = 6 * N + 12 * L * HQ * T
    assert tiny.flops_per_token(T) == flops
    mfu = tiny.estimate_mfu(fwdbwd_per_iter=5, dt=0.5, peak=1e9)
    assert mfu == pytest.approx(flops * T * 5 / 0.5 / 1e9)


def test_mfu_of_this_machine(tiny, monkeypatch):
    asked = []

    def peak_flops(device_type, dtype):
        asked.append((device_type, dtype))
        return 2e9, 'a test'

    monkeypatch.setattr('components.device.peak_flops', peak_flops)
    assert tiny.estimate_mfu(5, 0.5) == tiny.estimate_mfu(5, 0.5, peak=2e9)
    assert asked == [('cpu', 'float32')]


def test_flops_of_untied_embeddings():
    """ The token embedding is a lookup without FLOPs. """
    model = small_gpt(**RECIPE)
    n = sum(p.numel() for p in model.parameters())
    assert model.flops_per_token(16) == 6 * (n - 40 * 16) + 12 * 2 * 16 * 16

# -----------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize('args', [
    pytest.param(dict(n_embd=10, n_head=3), id='n_head'),
    pytest.param(dict(n_layer=0), id='zero'),
    pytest.param(dict(block_size=-1), id='negative'),
    pytest.param(dict(vocab_size=1.5), id='float'),
    pytest.param(dict(n_layer=True), id='bool'),
    pytest.param(dict(dropout=1.0), id='dropout'),
    pytest.param(dict(gelu='relu'), id='gelu'),
    pytest.param(dict(n_embd=15, n_head=3, rotary=True), id='odd head size'),
])
def test_invalid_configuration(args):
    first_name = next(iter(args))
    with pytest.raises(ValueError, match=first_name):
        GPTConfig(**args)

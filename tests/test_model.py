"""
The model against closed forms and its own promises. Its logits, loss and gradients are compared
with those of Hugging Face models in test_huggingface.py, its functions with torch's in
test_functional.py.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_MODEL

from model import GPT, GPTConfig, apply_rope, rope_cos_sin

architectures = pytest.mark.parametrize('args', [
    pytest.param(dict(), id='default'),
    pytest.param(dict(bias=True, gelu='tanh'), id='GPT-2'),
    pytest.param(dict(rotary=True), id='rotary'),
    pytest.param(dict(qk_norm=True), id='qk_norm'),
    pytest.param(FAST_MODEL, id='fast'),
])
default_and_fast = pytest.mark.parametrize('args', [dict(), FAST_MODEL], ids=['default', 'fast'])


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


@architectures
def test_causal_mask(args):
    model = small_gpt(**args)
    a = random_ids(1, 16)
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % 40
    logits_a, _ = model(a, a)
    logits_b, _ = model(b, b)
    assert torch.equal(logits_a[:, :9], logits_b[:, :9])
    assert (logits_a[:, 9:] != logits_b[:, 9:]).any(dim=-1).all()


def test_loss_is_mean_cross_entropy_of_the_targets_that_are_not_ignored(tiny):
    idx = random_ids(2, 8)
    targets = random_ids(2, 8, seed=1)
    targets[1, 3:] = -1
    logits, loss = tiny(idx, targets)
    is_target = targets >= 0
    probs = logits.softmax(dim=-1)[is_target]                               # (11, V)
    target_probs = probs.gather(1, targets[is_target][:, None])             # (11, 1)
    assert len(target_probs) == 11
    torch.testing.assert_close(loss, -target_probs.log().mean())
    no_logits, same_loss = tiny(idx, targets, return_logits=False)
    assert no_logits is None
    assert torch.equal(same_loss, loss)


@default_and_fast
def test_more_tokens_than_block_size(args):
    model = small_gpt(**args)
    message = '17 tokens are more than block_size=16'
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 17))
    cache = model.new_cache(100)
    model(random_ids(1, 16), cache=cache)
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 1), cache=cache)


@pytest.mark.parametrize('flag', FAST_MODEL)
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


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('places', [
    pytest.param({'attn.dropout'}, id='attention'),
    pytest.param({'mlp.dropout'}, id='mlp'),
    pytest.param(set(), id='embedding'),
])
def test_dropout_in_each_place(places, dtype):
    """ Only in training; and the random numbers are a function of torch's seed. """
    model = small_gpt(n_layer=1, dropout=0.0)
    block = model.transformer.h[0]
    if places == {'attn.dropout'}:
        block.attn.dropout = 0.5
    elif places == {'mlp.dropout'}:
        block.mlp.dropout = 0.5
    else:
        model.config.dropout = 0.5
    idx = random_ids(2, 16)
    outputs = []
    for training, seed in ((False, 0), (False, 1), (True, 0), (True, 0), (True, 1)):
        model.train(training)
        torch.manual_seed(seed)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs.append(model(idx, idx)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[2], outputs[4])


def test_dropout_of_attention_weights():
    """ Without that of the projection, which F.dropout does. """
    attention = small_gpt(dropout=0.5).transformer.h[0].attn.train()
    torch.nn.init.eye_(attention.c_proj.weight)
    torch.nn.init.zeros_(attention.c_attn.weight)
    torch.nn.init.eye_(attention.c_attn.weight[32:])                        # v = x
    y = attention(torch.ones(1, 1, 16))
    # one weight of each of the two heads is 0 or 2; the projection's dropout doubles or drops again
    assert set(y.flatten().tolist()) <= {0, 4}


def test_attention_gradients_in_float64(tiny):
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiny.transformer.h[0].attn.double(), x)


def test_autocast_on_a_cpu():
    """ The error of bfloat16 is small, and gradients are in float32. """
    model = small_gpt(**FAST_MODEL)
    idx = random_ids(3, 16)
    exact, _ = model(idx, idx)
    with torch.autocast('cpu', torch.bfloat16):
        mixed, loss = model(idx, idx)
    loss.backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.dtype == torch.float32
    error = (mixed - exact).abs().max()
    assert 0 < error < 0.05 * exact.abs().max()


def test_model_in_bfloat16():
    logits, loss = small_gpt(**FAST_MODEL).bfloat16()(random_ids(3, 16), random_ids(3, 16))
    assert logits.dtype == loss.dtype == torch.bfloat16

# -----------------------------------------------------------------------------
# RoPE


@pytest.mark.parametrize('base', [10000, 20])
def test_rope_is_a_rotation_of_complex_numbers(base):
    x = torch.randn(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))    # (B, nh, T, hs)
    pairs = torch.complex(x[..., :4], x[..., 4:])                           # (B, nh, T, hs/2)
    for position in range(16):
        for i in range(4):
            angle = position * base ** (-2 * i / 8)
            pairs[:, :, position, i] *= complex(math.cos(angle), -math.sin(angle))
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(apply_rope(x, *rope_cos_sin(16, 8, base)), expected)


def test_rope_is_relative():
    """ The product of a query and a key depends on their distance, not on their positions. """
    x = torch.randn(8, generator=torch.Generator().manual_seed(1))
    rotated = apply_rope(x.expand(16, 8), *rope_cos_sin(16, 8))             # (T, hs)
    products = rotated @ rotated.T                                          # (T, T)
    for distance in range(15):
        diagonal = products.diagonal(distance)
        expected = diagonal[:1].expand_as(diagonal)
        torch.testing.assert_close(diagonal, expected, atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1


def test_rope_of_a_model():
    """ With its base; and not in checkpoints, where those of a cropped model would not fit. """
    model = small_gpt(rotary=True, rope_base=20)
    cos, sin = rope_cos_sin(16, 8, 20)
    assert torch.equal(model.cos, cos)
    assert torch.equal(model.sin, sin)
    assert not {'cos', 'sin'} & set(model.state_dict())

# -----------------------------------------------------------------------------
# KV cache and generate


@architectures
@torch.no_grad()
def test_kv_cache_equals_no_cache(args):
    """ A prompt, several tokens at once, and one by one: the logits of the last of them. """
    model = small_gpt(**args)
    idx = random_ids(2, 16)
    expected, _ = model(idx, idx)
    cache = model.new_cache(16)
    ends = [6, 9, *range(10, 17)]
    for start, end in zip([0, *ends], ends):
        logits, loss = model(idx[:, start:end], cache=cache)
        assert loss is None
        assert logits.shape == (2, 1, 40)
        assert cache[0].length == end
        torch.testing.assert_close(logits[:, 0], expected[:, end - 1], rtol=1e-4, atol=1e-5)


def test_generate_samples_from_the_softmax_of_the_top_k(tiny):
    tiny.eval()
    idx = random_ids(1, 20)  # longer than block_size
    logits = tiny(idx[:, -16:])[0][0, -1] / 0.7
    top_ids = logits.topk(5).indices
    torch.manual_seed(0)
    samples = tiny.generate(idx.repeat(4000, 1), 1, temperature=0.7, top_k=5)[:, -1]
    counts = torch.stack([(samples == i).sum() for i in top_ids])
    assert counts.sum() == 4000
    expected = 4000 * F.softmax(logits[top_ids], dim=-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 18.5  # the 99.9% quantile for four degrees of freedom


def test_generate_with_vocab_size(tiny):
    prompts = random_ids(300, 2)
    limited = tiny.generate(prompts, 3, top_k=1000, vocab_size=7)
    assert limited.shape == (300, 5)
    assert torch.equal(limited[:, :2], prompts)
    assert limited[:, 2:].max() < 7
    assert tiny.generate(prompts, 3, top_k=0)[:, 2:].max() > 7

# -----------------------------------------------------------------------------
# parameters


def test_names_number_and_initialization_of_parameters():
    C, V, T, L = 64, 500, 64, 8
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C, bias=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = V * C + L * (12 * C * C + 13 * C) + 2 * C
    assert model.get_num_params() == expected
    assert model.get_num_params(non_embedding=False) == expected + T * C
    names = {'transformer.wte.weight', 'transformer.wpe.weight', 'lm_head.weight'}
    names |= {f'transformer.ln_f.{kind}' for kind in ('weight', 'bias')}
    for layer in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'):
        names |= {f'transformer.h.{i}.{layer}.weight' for i in range(L)}
        names |= {f'transformer.h.{i}.{layer}.bias' for i in range(L)}
    assert set(model.state_dict()) == names

    for name, p in model.named_parameters():
        if name.endswith('.bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            is_residual = name.endswith('c_proj.weight')
            std = 0.02 / math.sqrt(2 * L) if is_residual else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


@default_and_fast
def test_activation_checkpointing_changes_no_number(args):
    """ Bit for bit, with dropout; and fewer tensors are saved for the backward pass. """
    model = small_gpt(n_layer=3, dropout=0.2, **args).train()
    idx = random_ids(2, 16)
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
            _, loss = model(idx, idx)
        saved_bytes.append(sum(saved.values()))
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert saved_bytes[1] < saved_bytes[0] / 3


def test_configure_optimizers():
    model = small_gpt(bias=True)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    assert isinstance(optimizer, torch.optim.AdamW)
    decay, no_decay = optimizer.param_groups
    assert (decay['weight_decay'], no_decay['weight_decay']) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decay['params'])
    assert all(p.dim() < 2 for p in no_decay['params'])
    assert len(decay['params']) + len(no_decay['params']) == len(list(model.parameters()))


@default_and_fast
def test_crop_block_size(args):
    model = small_gpt(**args)
    idx = random_ids(2, 8)
    before, _ = model(idx, idx)
    model.crop_block_size(8)
    cropped = GPT(GPTConfig(**vars(model.config))).eval()
    cropped.load_state_dict(model.state_dict())
    for after in (model, cropped):
        assert torch.equal(before, after(idx, idx)[0])
        with pytest.raises(ValueError, match='9 tokens are more than block_size=8'):
            after(random_ids(1, 9))
    with pytest.raises(AssertionError, match='reduced'):
        model.crop_block_size(9)


@default_and_fast
def test_flops_and_mfu(args, monkeypatch):
    """ Without the position embedding and an untied token embedding, which are lookups. """
    model = small_gpt(**args)
    matrices = 2 * 12 * 16 * 16 + 40 * 16  # of the blocks, and lm_head
    norms = 0 if args else 5 * 16
    flops = 6 * (matrices + norms) + 12 * 2 * 16 * 16
    assert model.flops_per_token(16) == flops
    monkeypatch.setattr('components.device.peak_flops', {'cpu': (1e9, 'a test')}.get)
    mfu = model.estimate_mfu(fwdbwd_per_iter=5, dt=0.5)
    assert mfu == pytest.approx(flops * 16 * 5 / 0.5 / 1e9)


@pytest.mark.parametrize('args', [
    dict(n_embd=10, n_head=3), dict(n_layer=0), dict(block_size=-1), dict(vocab_size=1.5),
    dict(n_layer=True), dict(gelu='relu'),
    dict(n_embd=15, n_head=3, rotary=True),  # an odd head size
], ids=str)
def test_invalid_configuration(args):
    first_name = next(iter(args))
    with pytest.raises(ValueError, match=first_name):
        GPTConfig(**args)

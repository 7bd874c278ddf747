"""
Two changes that a student makes, in one place each, take effect everywhere: label smoothing in the
line of the loss, and a sliding window in the mask of attention.
"""
import pytest
import torch
import torch.nn.functional as F

import model as model_module
from components import functional
from components.static_decoding import StaticDecoder
from model import GPT, GPTConfig

T = 16
WINDOW = 4
slow = pytest.mark.slow


def new_model(gpt_class, vocab_size=65, **args):
    """ A small GPT whose weights are large enough for attention to matter. """
    torch.manual_seed(0)
    model = gpt_class(GPTConfig(block_size=T, vocab_size=vocab_size, n_layer=2, n_head=2,
                                n_embd=16, bias=False, **args))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def random_ids(vocab_size=65):
    return torch.randint(vocab_size, (3, T + 1), generator=torch.Generator().manual_seed(1))

# -----------------------------------------------------------------------------
# label smoothing


@pytest.fixture
def smoothing(monkeypatch):
    """ Adds label smoothing to the call of linear_cross_entropy in model.py, whatever it says. """
    linear_cross_entropy = model_module.F.linear_cross_entropy

    def smoothed(*args, **options):
        return linear_cross_entropy(*args, **{**options, 'label_smoothing': 0.3})

    monkeypatch.setattr(model_module.F, 'linear_cross_entropy', smoothed)


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize('vocab_size', [65, 50304])
def test_label_smoothing(vocab_size, compile, smoothing, monkeypatch):
    monkeypatch.setattr(functional, 'MAX_LOGITS', 2**20)  # fewer than those of the large vocabulary
    tokens = random_ids(vocab_size)
    idx = tokens[:, :-1]
    targets = tokens[:, 1:].contiguous()
    model = new_model(GPT, vocab_size)
    logits, _ = model(idx, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.3)
    expected_grad, = torch.autograd.grad(expected, model.lm_head.weight)
    options = [True, False]
    if compile:
        torch._dynamo.reset()
        model = torch.compile(model, backend='eager')
        options = [False]  # as the scripts do

    for return_logits in options:
        _, loss = model(idx, targets, return_logits=return_logits)
        grad, = torch.autograd.grad(loss, model.lm_head.weight)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, expected_grad)
        model.eval()
        with torch.no_grad():
            _, loss = model(idx, targets, return_logits=return_logits)
        torch.testing.assert_close(loss, expected)
        model.train()

# -----------------------------------------------------------------------------
# sliding window


class SlidingWindowGPT(GPT):

    def attention_mask(self, positions, cache=None):
        T = len(positions)
        S = cache[0].num_keys(T) if cache else T
        distance = positions[:, None] - torch.arange(S)                     # (T, S)
        return (distance >= 0) & (distance < WINDOW)


def attend_in_window(q, k, v, *ignored):
    """ Attention in the window by matrix products, without a cache. """
    T = q.shape[2]
    distance = torch.arange(T)[:, None] - torch.arange(T)                   # (T, T)
    is_outside = (distance < 0) | (distance >= WINDOW)
    scores = q @ k.mT / q.shape[3] ** 0.5                                   # (B, nh, T, T)
    return scores.masked_fill(is_outside, -torch.inf).softmax(dim=-1) @ v   # (B, nh, T, hs)


@pytest.fixture(params=[{}, dict(rotary=True, qk_norm=True)], ids=['GPT-2', 'RoPE'])
def model(request):
    return new_model(SlidingWindowGPT, **request.param).eval()


@pytest.fixture
def expected_logits(model, monkeypatch):
    """ A function of idx: the logits of all positions, in float32 and without a cache. """
    def logits(idx):
        with torch.no_grad(), monkeypatch.context() as patched:
            patched.setattr(functional, 'scaled_dot_product_attention', attend_in_window)
            return model(idx, idx)[0]
    return logits


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_window_without_a_cache(dtype, tolerance, model, expected_logits):
    idx = random_ids()[:, :-1]
    expected = expected_logits(idx)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, _ = model(idx, idx)
        full_logits, _ = full_attention(model)(idx, idx)
    assert (logits - expected).norm() < tolerance * expected.norm()
    assert (full_logits - expected).norm() > 10 * tolerance * expected.norm()


def full_attention(model):
    full = GPT(model.config).eval()
    full.load_state_dict(model.state_dict())
    return full


@torch.no_grad()
def test_window_with_a_cache(model, expected_logits):
    idx = random_ids()[:, :-1]
    cache = model.new_cache(T)
    ends = [5, 9, *range(10, T + 1)]  # a prompt, several tokens, and one by one
    for start, end in zip([0, *ends], ends):
        logits, _ = model(idx[:, start:end], cache=cache)
        torch.testing.assert_close(logits, expected_logits(idx[:, :end])[:, -1:])


@pytest.mark.parametrize('past_block', ['exact', 'half'])
@pytest.mark.parametrize('is_static', [False, True], ids=['KVCache', 'static decoder'])
def test_window_in_sampling(is_static, past_block, model, expected_logits):
    """ The most likely tokens, past block_size too. """
    expected = random_ids()[:, :5]
    first = 0
    for n in range(5, 30):
        if n - first > T:
            first = n - (T if past_block == 'exact' else T // 2)
        token = expected_logits(expected[:, first:])[:, -1:].argmax(dim=-1)
        expected = torch.cat((expected, token), dim=1)
    decoder = StaticDecoder(model) if is_static else None
    sampled = model.generate(expected[:, :5], 25, temperature=0, past_block=past_block,
                             decoder=decoder)
    assert torch.equal(sampled, expected)

"""
components/functional.py against torch.nn.functional: values, gradients, and gradients of gradients
for all arguments; dropout by its statistics; the loss in chunks also by its memory.
"""
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_MODEL, ROOT, SMALL, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from components import distributed, functional
from model import GPT, GPTConfig

V = 40
B, T = 3, 16
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize('dtype', TOLERANCES, ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def values_and_gradients(function, *tensors):
    """ What a function returns, and the gradients of a weighted sum of it. """
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    weights = random(*y.shape, dtype=y.dtype, seed=1)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def assert_same(ours, torchs, *tensors):
    """ Two functions have the same values and gradients, to the rounding of the dtype. """
    tolerance = TOLERANCES[tensors[0].dtype]
    actual = values_and_gradients(ours, *tensors)
    expected = values_and_gradients(torchs, *tensors)
    for ours, torchs in zip(actual, expected):
        scale = torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * scale)


def assert_same_second_gradients(ours, torchs, *tensors):
    """ Gradients of a penalty on the gradients, which requires create_graph=True. """
    results = []
    for function in (ours, torchs):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        gradients = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
        penalty = sum((gradient**2).sum() for gradient in gradients)
        results.append([*gradients, *torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*results)


def new_model(**args):
    torch.manual_seed(0)
    sizes = dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16, bias=False)
    return GPT(GPTConfig(**{**sizes, **args}))


def new_batch(num_ignored=0):
    """ Inputs and targets (B, T); the first `num_ignored` targets are ignored. """
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(V, (B, T), generator=generator)
    targets = torch.randint(V, (B, T), generator=generator)
    targets.view(-1)[:num_ignored] = -1
    return idx, targets


def loss_and_gradients(model, batch, dtype='float32', scale=1):
    """ {'loss': loss, name of a parameter: its gradient}. `scale` is that of a GradScaler. """
    model.zero_grad()
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        _, loss = model(*batch, return_logits=False)
    (loss * scale).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters()}
    return {'loss': loss.detach(), **gradients}


def largest_error(actual, expected):
    """ The largest error in dictionaries of tensors, relative to the largest element of each. """
    errors = []
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        errors.append((actual[name] - tensor).abs().max() / tensor.abs().max())
    return max(errors).item()


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'), reason='requires torch 2.13')
@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 1e-5), ('bfloat16', 0.05), ('float16', 0.01)])
@pytest.mark.parametrize('args', [{}, FAST_MODEL], ids=['GPT-2', 'fast'])
def test_torch_in_its_place_gives_the_same_numbers(args, dtype, tolerance, monkeypatch):
    model = new_model(**args)
    batch = new_batch(7)
    ours = loss_and_gradients(model, batch, dtype, scale=2**10)
    monkeypatch.setattr(model_module, 'F', torch.nn.functional)
    torchs = loss_and_gradients(model, batch, dtype, scale=2**10)
    assert largest_error(ours, torchs) < tolerance

# -----------------------------------------------------------------------------
# RMSNorm


@dtypes
@pytest.mark.parametrize('shape, options', [
    pytest.param((8,), dict(eps=1e-6), id='as in the model'),
    pytest.param((8,), dict(eps=1.0), id='eps matters'),
    pytest.param((8,), dict(), id='default eps'),
    pytest.param((5, 8), dict(eps=1e-6), id='two dimensions'),
])
def test_rms_norm(shape, options, dtype):
    x = random(3, 5, 8, dtype=dtype)
    weight = random(*shape, dtype=dtype, seed=2)
    assert_same(lambda x: functional.rms_norm(x, shape, **options),
                lambda x: F.rms_norm(x, shape, **options), x)
    assert_same(lambda x, weight: functional.rms_norm(x, shape, weight, **options),
                lambda x, weight: F.rms_norm(x, shape, weight, **options), x, weight)


def test_second_gradients_of_rms_norm():
    assert_same_second_gradients(lambda x: functional.rms_norm(x, (8,), eps=1e-6),
                                 lambda x: F.rms_norm(x, (8,), eps=1e-6), random(3, 8))

# -----------------------------------------------------------------------------
# dropout


@pytest.mark.parametrize('p', [0.1, 0.25, 0.5, 0.9, 0.999999])
def test_dropout_rate(p):
    """ Of 999,999 elements the rate is p within 5 standard deviations; the others are scaled. """
    y = functional.dropout(torch.ones(999, 1001), p)
    is_kept = y != 0
    assert y[is_kept] == pytest.approx(1 / (1 - p))
    tolerance = 5 * (p * (1 - p) / y.numel()) ** 0.5 + 2**-16
    assert 1 - is_kept.float().mean().item() == pytest.approx(p, abs=tolerance)


def test_dropout_is_not_correlated_between_neighbors():
    """ Four of them share a random number of 64 bits. """
    is_kept = (functional.dropout(torch.ones(400_000), 0.5) != 0).view(-1, 4)
    correlations = torch.corrcoef(is_kept.T.float()) - torch.eye(4)
    assert correlations.abs().max() < 5 / 100_000 ** 0.5


def test_dropout_that_is_left_to_torch():
    x = torch.ones(1000)
    assert functional.dropout(x, 0.5, training=False) is x
    assert torch.equal(functional.dropout(x, 0.0), x)
    assert functional.dropout(x, 1.0).count_nonzero() == 0
    with pytest.raises(ValueError, match='probability'):
        functional.dropout(x, 1.5)
    assert functional.dropout(x, 0.5, inplace=True) is x
    assert 400 < x.count_nonzero() < 600

# -----------------------------------------------------------------------------
# attention


CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()
LAST_FIVE = CAUSAL & ~CAUSAL.roll(5, dims=0)


@dtypes
@pytest.mark.parametrize('options, mask', [
    pytest.param(dict(is_causal=True), None, id='causal'),
    pytest.param(dict(is_causal=True, scale=0.5), None, id='scale'),
    pytest.param(dict(), None, id='all keys'),
    pytest.param(dict(), LAST_FIVE, id='bool mask'),
    pytest.param(dict(), random(16, 16), id='float mask'),
])
def test_attention(options, mask, dtype, monkeypatch):
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    qkv = random(3, B, 2, 16, 8, dtype=dtype).unbind()

    def ours(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, mask, **options)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    assert_same(ours, torchs, *qkv)
    monkeypatch.setattr(functional, 'MAX_ATTENTION_MATRIX', 15)
    assert_same(ours, torchs, *qkv)


@pytest.mark.parametrize('num_heads, num_queries, options', [
    pytest.param(2, 16, dict(enable_gqa=True), id='fewer heads of keys'),
    pytest.param(4, 9, dict(), id='fewer queries'),
])
def test_attention_of_other_shapes(num_heads, num_queries, options):
    q = random(B, 4, num_queries, 8, dtype=torch.bfloat16)
    k = random(B, num_heads, 16, 8, dtype=torch.bfloat16, seed=1)
    v = random(B, num_heads, 16, 8, dtype=torch.bfloat16, seed=2)
    options = dict(is_causal=True, **options)
    assert_same(lambda *qkv: functional.scaled_dot_product_attention(*qkv, **options),
                lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), q, k, v)


def test_attention_by_matrices_is_about_as_exact_as_in_float32(monkeypatch):
    """ And it is another computation: the gradients of a model differ in their last bits. """
    model = new_model(**FAST_MODEL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    exact = loss_and_gradients(model, new_batch())
    by_matrices = loss_and_gradients(model, new_batch(), 'bfloat16')
    monkeypatch.setattr(functional, 'MAX_ATTENTION_MATRIX', 15)
    in_float32 = loss_and_gradients(model, new_batch(), 'bfloat16')
    error = largest_error(by_matrices, exact)
    assert error != largest_error(in_float32, exact)
    assert error < 1.5 * largest_error(in_float32, exact)


@dtypes
def test_dropout_of_attention(dtype):
    q, k, v = random(3, B, 2, 16, 8, dtype=dtype)
    y = functional.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.5,
                                                is_causal=True)
    assert set(y[:, :, 0].unique().tolist()) == {0, 2}  # the first query has a single key
    assert y.float().mean().item() == pytest.approx(1, abs=0.2)

# -----------------------------------------------------------------------------
# the loss: value and gradients


@pytest.fixture
def small_chunks(monkeypatch):
    """ The 48 tokens of a batch are four chunks of 10 and one of 8. """
    monkeypatch.setattr(functional, 'MAX_LOGITS', 10 * V)


def torchs_linear_cross_entropy(x, linear_weight, target, linear_bias=None, **options):
    return F.cross_entropy(F.linear(x, linear_weight, linear_bias), target, **options)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('options', [
    pytest.param(dict(), id='ignored -100'),
    pytest.param(dict(ignore_index=7), id='ignored id'),
    pytest.param(dict(reduction='sum'), id='sum'),
    pytest.param(dict(reduction='none'), id='none'),
    pytest.param(dict(label_smoothing=0.1), id='label smoothing'),
    pytest.param(dict(weight=random(V).abs()), id='weights of classes'),
    pytest.param(dict(linear_bias=random(V)), id='bias'),
])
def test_linear_cross_entropy(options, dtype, small_chunks):
    for name in ('weight', 'linear_bias'):
        if name in options:
            options = {name: options[name].to(dtype)}
    target = new_batch(7)[1].flatten()
    target[target == -1] = options.get('ignore_index', -100)
    assert_same(lambda *args: functional.linear_cross_entropy(*args, target, **options),
                lambda *args: torchs_linear_cross_entropy(*args, target, **options),
                random(B * T, 16, dtype=dtype), random(V, 16, dtype=dtype, seed=3))


def test_linear_cross_entropy_of_probabilities(small_chunks):
    target = random(B * T, V).softmax(dim=-1)
    assert_same(lambda *args: functional.linear_cross_entropy(*args, target),
                lambda *args: torchs_linear_cross_entropy(*args, target),
                random(B * T, 16), random(V, 16, seed=3))


def test_second_gradients_of_the_loss(small_chunks):
    target = new_batch(7)[1].flatten()
    assert_same_second_gradients(
        lambda *args: functional.linear_cross_entropy(*args, target, ignore_index=-1),
        lambda *args: torchs_linear_cross_entropy(*args, target, ignore_index=-1),
        random(B * T, 16), random(V, 16, seed=3))


@pytest.mark.parametrize('num_ignored', [0, 7, 13], ids='{} ignored'.format)
@pytest.mark.parametrize('args', [{}, FAST_MODEL], ids=['tied', 'untied'])
def test_chunks_in_a_model(args, num_ignored, monkeypatch):
    """ 13: a chunk without targets. """
    model = new_model(**args)
    batch = new_batch(num_ignored)
    expected = loss_and_gradients(model, batch)
    monkeypatch.setattr(functional, 'MAX_LOGITS', 10 * V)
    error = largest_error(loss_and_gradients(model, batch), expected)
    assert 0 < error < 1e-6  # 0 would be that of the same computation


@pytest.mark.parametrize('dtype, scale', [('bfloat16', 1), ('float16', 2**16)])
@pytest.mark.parametrize('args', [{}, FAST_MODEL], ids=['tied', 'untied'])
def test_chunks_under_autocast(args, dtype, scale, monkeypatch):
    """ Chunks are about as close to float32 as all logits are in the same dtype. """
    model = new_model(**args)
    batch = new_batch(7)
    exact = loss_and_gradients(model, batch)
    whole = loss_and_gradients(model, batch, dtype, scale)
    monkeypatch.setattr(functional, 'MAX_LOGITS', 10 * V)
    chunks = loss_and_gradients(model, batch, dtype, scale)
    assert 0 < largest_error(chunks, exact) < 2 * largest_error(whole, exact)


def test_tiny_probabilities_in_float16(monkeypatch):
    """ The gradient of an unlikely class is within the range of float16; its mean is not. """
    V = 2**15
    monkeypatch.setattr(functional, 'MAX_LOGITS', 512 * V)
    x = torch.ones(600, 1, requires_grad=True)
    weight = torch.zeros(V, 1)
    weight[0] = 3.0
    weight.requires_grad_()
    with torch.autocast('cpu', torch.float16):
        loss = functional.linear_cross_entropy(x, weight, torch.zeros(600, dtype=torch.long))
    loss.backward()
    probs = weight.detach().flatten().softmax(dim=0)
    assert probs[1] / 600 < 2**-24
    torch.testing.assert_close(weight.grad[1:, 0], probs[1:], rtol=0.01, atol=0)


def test_sum_of_large_gradients_in_float16(monkeypatch):
    """ Gradients of 50 in 4096 tokens: 2048 of them are beyond the largest number of float16. """
    monkeypatch.setattr(functional, 'MAX_LOGITS', 2048 * V)
    x = torch.full((4096, 1), 50.0, requires_grad=True)
    weight = torch.zeros(V, 1, requires_grad=True)
    with torch.autocast('cpu', torch.float16):
        loss = functional.linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.long))
    loss.backward()
    assert weight.grad[0].item() == pytest.approx(50 * (1 / V - 1), rel=1e-2)

# -----------------------------------------------------------------------------
# the loss: memory


@pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
def test_chunks_of_an_evaluation(no_grad, small_chunks, monkeypatch):
    model = new_model().eval()
    _, expected = model(*new_batch(7), return_logits=False)
    monkeypatch.setattr(torch.Tensor, 'scatter_add_', None)  # no gradients are computed
    with no_grad():
        _, loss = model(*new_batch(7), return_logits=False)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """ The number of elements of the largest tensor that an operation returned. """
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize('max_logits, tokens', [(48, B * T), (10, 10)])
def test_largest_tensor(max_logits, tokens, monkeypatch):
    V = 500
    monkeypatch.setattr(functional, 'MAX_LOGITS', max_logits * V)
    model = new_model(vocab_size=V, n_embd=8)  # the weight of lm_head is smaller than a chunk
    with LargestTensor() as largest:
        _, loss = model(*new_batch(), return_logits=False)
        loss.backward()
    assert largest.size == tokens * V


@pytest.mark.parametrize('vocab_size, size', [(2**18, 256), (65, 1024), (2**27, 1)])
def test_chunk_size(vocab_size, size):
    assert functional.loss_chunk_size(vocab_size) == size


@pytest.mark.parametrize('script, settings', [
    pytest.param('train.py', dict(max_iters=2, eval_interval=1, eval_iters=1), id='train.py'),
    pytest.param('bench.py', dict(), id='bench.py'),
])
def test_no_script_asks_for_logits(script, settings, script_globals, dataset, monkeypatch):
    forward = GPT.forward
    asked = []

    def recorded(model, *args, return_logits=True):
        asked.append(return_logits)
        return forward(model, *args, return_logits=return_logits)

    monkeypatch.setattr(GPT, 'forward', recorded)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, device='cpu',
                 dtype='float32', dataset=dataset)
    script_globals(script, **{**sizes, **settings})
    assert asked
    assert not any(asked)


def test_warm_up_of_ddp_does_not_ask_for_logits(monkeypatch):
    monkeypatch.setattr(distributed, 'DDP', GPT)
    model = new_model()
    asked = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs['return_logits']), with_kwargs=True)
    distributed.warm_up_ddp_buckets(model, *new_batch(), torch.autocast('cpu', enabled=False))
    assert asked == [False]


@pytest.mark.slow
def test_training_with_chunks_equals_without(tmp_path, dataset, clone):
    """ In train.py, alone and in two processes (DDP), with gradient accumulation. """
    path = clone / 'components/functional.py'
    source = path.read_text()
    assert source.count('MAX_LOGITS = 2**26') == 1
    path.write_text(source.replace('MAX_LOGITS = 2**26', 'MAX_LOGITS = 2**8'))
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 4, 'max_iters': 5}
    losses = []
    for script, processes in ((ROOT, None), (clone, None), (clone, 2)):
        out, _ = run(script / 'train.py', cwd=tmp_path, processes=processes, **settings)
        losses.append([float(loss) for loss in re.findall(r'loss (\d+\.\d+)', out)])
    assert len(losses[0]) > 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[2] == pytest.approx(losses[0], abs=2e-4)

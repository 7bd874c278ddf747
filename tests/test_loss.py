"""
The loss of a model that does not return its logits: value, gradients and memory of its chunks,
compared with the cross-entropy of all logits.
"""
import re

import pytest
import torch
from conftest import ROOT, SMALL, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
from components import distributed
from model import GPT, GPTConfig, cross_entropy_in_chunks, loss_chunk_size

V = 40
B, T = 3, 16
NEWER = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)


@pytest.fixture
def small_chunks(monkeypatch):
    """ The 48 tokens of a batch are four chunks of 10 and one of 8. """
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 10 * V)


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


def loss_and_gradients(model, batch, dtype='float32', scale=1, **options):
    """ {'loss': loss, name of a parameter: its gradient}. `scale` is that of a GradScaler. """
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        _, loss = model(*batch, **options)
    (loss * scale).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters()}
    return {'loss': loss.detach(), **gradients}


def largest_errors(actual, expected):
    """ {name: largest error relative to the largest element}, in dictionaries of tensors. """
    assert actual.keys() == expected.keys()
    errors = {}
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        error = (actual[name] - tensor).abs().max() / tensor.abs().max()
        errors[name] = error.item()
    return errors

# -----------------------------------------------------------------------------
# value and gradients


@pytest.mark.parametrize('num_ignored', [
    pytest.param(0, id='all targets'),
    pytest.param(7, id='ignored targets'),
    pytest.param(13, id='a chunk without targets'),
])
@pytest.mark.parametrize('args', [
    pytest.param(dict(), id='tied'),
    pytest.param(NEWER, id='untied'),
    pytest.param(dict(dropout=0.2), id='dropout'),
])
def test_chunks_in_float32(args, num_ignored, small_chunks):
    model = new_model(**args)
    batch = new_batch(num_ignored)
    expected = loss_and_gradients(model, batch)
    errors = largest_errors(loss_and_gradients(model, batch, return_logits=False), expected)
    assert 0 < max(errors.values()) < 1e-6  # 0 would be that of the same computation


@pytest.mark.parametrize('dtype, scale', [('bfloat16', 1), ('float16', 2**16)])
@pytest.mark.parametrize('args', [dict(), NEWER], ids=['tied', 'untied'])
def test_chunks_under_autocast(args, dtype, scale, small_chunks):
    """ Chunks are about as close to float32 as all logits are in the same dtype. """
    model = new_model(**args)
    batch = new_batch(7)
    exact = loss_and_gradients(model, batch)
    whole = largest_errors(loss_and_gradients(model, batch, dtype, scale), exact)
    chunks = loss_and_gradients(model, batch, dtype, scale, return_logits=False)
    assert chunks['loss'].dtype == torch.float32
    errors = largest_errors(chunks, exact)
    assert 0 < max(errors.values()) < 2 * max(whole.values())


def test_loss_of_few_logits_is_bit_identical():
    model = new_model()
    batch = new_batch(7)
    for dtype in ('float32', 'bfloat16'):
        expected = loss_and_gradients(model, batch, dtype)
        actual = loss_and_gradients(model, batch, dtype, return_logits=False)
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


def test_chunked_gradients_of_a_second_backward_pass(small_chunks):
    model = new_model()
    _, loss = model(*new_batch(), return_logits=False)
    loss.backward(retain_graph=True)
    first = model.lm_head.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.lm_head.weight.grad, 2 * first)


def test_tiny_probabilities_in_float16(monkeypatch):
    """ The gradient of an unlikely class is within the range of float16; its mean is not. """
    V = 2**15
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 512 * V)
    x = torch.ones(600, 1, 1, requires_grad=True)
    weight = torch.zeros(V, 1)
    weight[0] = 3.0
    weight.requires_grad_()
    targets = torch.zeros(600, 1, dtype=torch.long)
    with torch.autocast('cpu', torch.float16):
        loss = cross_entropy_in_chunks(x, weight, targets)
    loss.backward()
    probs = weight.detach().flatten().softmax(dim=0)
    assert probs[1] / 600 < 2**-24
    torch.testing.assert_close(weight.grad[1:, 0], probs[1:], rtol=0.01, atol=0)


def test_sum_of_large_gradients_in_float16(monkeypatch):
    """ Gradients of 50 in 4096 tokens: 2048 of them are beyond the largest number of float16. """
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 2048 * V)
    x = torch.full((4096, 1, 1), 50.0, requires_grad=True)
    weight = torch.zeros(V, 1, requires_grad=True)
    targets = torch.zeros(4096, 1, dtype=torch.long)
    with torch.autocast('cpu', torch.float16):
        loss = cross_entropy_in_chunks(x, weight, targets)
    loss.backward()
    expected = 50 * (1 / V - 1)
    assert weight.grad[0].item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
def test_chunks_of_an_evaluation(no_grad, small_chunks, monkeypatch):
    model = new_model().eval()
    batch = new_batch(7)
    _, expected = model(*batch)
    with no_grad(), monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, 'scatter_add_', None)  # no gradients are computed
        _, loss = model(*batch, return_logits=False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

# -----------------------------------------------------------------------------
# memory


class LargestTensor(TorchDispatchMode):
    """ The number of elements of the largest tensor that an operation returned. """
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize('return_logits, tokens', [(True, B * T), (False, 10)])
def test_largest_tensor(return_logits, tokens, monkeypatch):
    V = 500
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 10 * V)
    model = new_model(vocab_size=V, n_embd=8)  # the weight of lm_head is smaller than a chunk
    with LargestTensor() as largest:
        logits, loss = model(*new_batch(), return_logits=return_logits)
        loss.backward()
    assert (logits is not None) == return_logits
    assert largest.size == tokens * V


def test_chunk_size():
    assert loss_chunk_size(2**18) == 256
    assert loss_chunk_size(65) == 1024

# -----------------------------------------------------------------------------
# the scripts


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


@pytest.mark.slow
def test_training_with_chunks_equals_without(tmp_path, dataset, clone):
    """ In train.py, alone and in two processes (DDP), with gradient accumulation. """
    source = (clone / 'model.py').read_text()
    assert source.count('MAX_LOGITS = 2**26') == 1
    (clone / 'model.py').write_text(source.replace('MAX_LOGITS = 2**26', 'MAX_LOGITS = 2**8'))
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 4, 'max_iters': 5}
    expected = printed_losses(tmp_path, ROOT / 'train.py', **settings)
    assert len(expected) > 5
    for processes in (None, 2):
        losses = printed_losses(tmp_path, clone / 'train.py', processes=processes, **settings)
        assert losses == pytest.approx(expected, abs=2e-4)


def printed_losses(cwd, script, **settings):
    """ All losses that a run prints, of iterations and evaluations. """
    out, _ = run(script, cwd=cwd, **settings)
    return [float(loss) for loss in re.findall(r'loss (\d+\.\d+)', out)]


def test_warm_up_of_ddp_does_not_ask_for_logits(monkeypatch):
    monkeypatch.setattr(distributed, 'DDP', GPT)
    model = new_model()
    asked = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs['return_logits']), with_kwargs=True)
    distributed.warm_up_ddp_buckets(model, *new_batch(), torch.autocast('cpu', enabled=False))
    assert asked == [False]

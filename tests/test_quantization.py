""" Quantized linear layers against float32. """
import pytest
import torch
import torch.nn.functional as F

from components.device import has_fbgemm
from components.quantization import QuantizedLinear, quantize_linears
from model import GPT, GPTConfig

needs_fbgemm = pytest.mark.skipif(not has_fbgemm('cpu'), reason='this CPU has no int8 kernel')


def make_gpt():
    """ A GPT with weights large enough for attention to matter. """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=40, vocab_size=40, n_layer=3, n_head=2, n_embd=128)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize('dtype, int8, native_bfloat16, tolerance', [
    pytest.param(torch.float16, False, False, 1e-5, id='float16'),
    pytest.param(torch.float16, False, True, 1e-2, id='float16 on a CPU with bfloat16'),
    pytest.param(torch.bfloat16, False, False, 1e-2, id='bfloat16'),
    pytest.param(torch.float16, True, False, 1e-2, id='int8', marks=needs_fbgemm),
    pytest.param(torch.float16, True, True, 1e-2, id='int8 with bfloat16', marks=needs_fbgemm),
])
@torch.no_grad()
def test_logits_are_nearly_those_of_float32(dtype, int8, native_bfloat16, tolerance, monkeypatch):
    monkeypatch.setattr('components.quantization.has_bfloat16', lambda: native_bfloat16)
    model = make_gpt()
    quantized = make_gpt()
    quantize_linears(quantized, dtype, int8)
    idx = torch.randint(40, (4, 40), generator=torch.Generator().manual_seed(0))

    def divergence(start, end, cache, quantized_cache):
        """ The Kullback-Leibler divergence of the next token after idx[:, :end]. """
        tokens = idx[:, start:end]
        logits, _ = model(tokens, cache=cache)
        quantized_logits, _ = quantized(tokens, cache=quantized_cache)
        return F.kl_div(quantized_logits.float().log_softmax(-1), logits.log_softmax(-1),
                        log_target=True, reduction='sum') / len(idx)

    for prompt_length in (1, 20, 39):  # the kernels for a token, short and long prompts
        cache = model.new_cache(40)
        quantized_cache = quantized.new_cache(40)
        for start, end in ((0, prompt_length), (prompt_length, prompt_length + 1)):
            error = divergence(start, end, cache, quantized_cache)
            assert 0 < abs(error) < tolerance


def test_weights_of_float32_are_exact():
    model = make_gpt()
    idx = torch.arange(9)[None]
    expected, _ = model(idx)
    quantize_linears(model, torch.float32)
    logits, _ = model(idx)
    assert type(model.lm_head) is QuantizedLinear
    torch.testing.assert_close(logits, expected)


def test_subclasses_of_linear_are_kept():
    class DoubledLinear(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_gpt()
    model.lm_head.__class__ = DoubledLinear
    idx = torch.arange(9)[None]
    expected, _ = model(idx)
    quantize_linears(model, torch.float32)
    logits, _ = model(idx)
    assert type(model.lm_head) is DoubledLinear
    assert type(model.transformer.h[0].mlp.c_fc) is QuantizedLinear
    torch.testing.assert_close(logits, expected)


@needs_fbgemm
@pytest.mark.parametrize('T', [2, 40], ids=['short', 'long'])
def test_prompts_are_not_multiplied_in_int8(T):
    """ The first token's outliers would set the range of all. """
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 16)
    quantized = QuantizedLinear(linear, torch.float16, int8=True)
    x = torch.randn(1, T, 128)
    x[0, 0] *= 1000
    expected = linear(x)[0, 1:]
    torch.testing.assert_close(quantized(x)[0, 1:].float(), expected, atol=0.03, rtol=0.03)


@needs_fbgemm
def test_single_tokens_are_multiplied_in_int8():
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 16)
    int8 = QuantizedLinear(linear, torch.float16, int8=True)
    float16 = QuantizedLinear(linear, torch.float16)
    x = torch.randn(3, 1, 128)
    expected = linear(x)
    int8_error = (int8(x) - expected).abs().max()
    float16_error = (float16(x).float() - expected).abs().max()
    assert float16_error < int8_error < 0.05

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
    """ By the Kullback-Leibler divergence of the next token, after a prompt and one token more. """
    monkeypatch.setattr('components.quantization.has_bfloat16', lambda: native_bfloat16)
    model = make_gpt()
    quantized = make_gpt()
    quantize_linears(quantized, dtype, int8)
    idx = torch.randint(40, (4, 40), generator=torch.Generator().manual_seed(0))
    for prompt_length in (1, 20, 39):  # the kernels for a token, short and long prompts
        cache = model.new_cache(40)
        quantized_cache = quantized.new_cache(40)
        for start, end in ((0, prompt_length), (prompt_length, prompt_length + 1)):
            tokens = idx[:, start:end]
            logits, _ = model(tokens, cache=cache)
            quantized_logits, _ = quantized(tokens, cache=quantized_cache)
            divergence = F.kl_div(quantized_logits.float().log_softmax(-1), logits.log_softmax(-1),
                                  log_target=True, reduction='sum') / len(idx)
            assert 0 < abs(divergence) < tolerance


def test_subclasses_of_linear_and_weights_of_float32_are_exact():
    class DoubledLinear(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_gpt()
    model.lm_head.__class__ = DoubledLinear
    idx = torch.arange(9)[None]
    expected, _ = model(idx)
    quantize_linears(model, torch.float32)
    logits, _ = model(idx)
    assert type(model.transformer.h[0].mlp.c_fc) is QuantizedLinear
    torch.testing.assert_close(logits, expected)


@needs_fbgemm
@pytest.mark.parametrize('native_bfloat16', [True, False])
@torch.no_grad()
def test_only_single_tokens_are_multiplied_in_int8(native_bfloat16, monkeypatch):
    """ A prompt's first token may have outliers, which would set the range of all. """
    monkeypatch.setattr('components.quantization.has_bfloat16', lambda: native_bfloat16)
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 16)
    int8 = QuantizedLinear(linear, torch.float16, int8=True)
    float16 = QuantizedLinear(linear, torch.float16)
    for T in (1, 2, 40):
        x = torch.randn(3, T, 128)
        x[:, 1:] *= 0.001
        error = (int8(x) - float16(x)).float().norm(dim=-1) / linear(x).norm(dim=-1)  # (3, T)
        if T == 1:
            assert 1e-3 < error.max() < 0.05
        else:
            assert error.max() < 0.01

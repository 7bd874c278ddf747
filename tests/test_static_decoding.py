"""
components/static_decoding.py against the loop whose shapes grow. For CUDA graphs see test_cuda.py.
"""
import re
from functools import partial

import pytest
import torch
from conftest import run
from test_generation import ARCHITECTURES, LetterTokenizer, greedy, make_gpt
from test_sample import write_checkpoint
from torch._dynamo.testing import CompileCounterWithBackend

from components import functional
from components.device import has_fbgemm
from components.errors import UserError
from components.generation import complete, next_tokens
from components.quantization import quantize_linears
from components.static_decoding import StaticDecoder

needs_fbgemm = pytest.mark.skipif(not has_fbgemm('cpu'), reason='this CPU has no int8 kernel')
ALL_FILTERS = dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, vocab_size=39)


def sample(model, prompts, n, **settings):
    """ The next n tokens of each prompt -> (B, n). """
    idx = torch.as_tensor(prompts)
    random_numbers = torch.rand(len(idx), n, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        steps = list(next_tokens(model, idx, n, random_numbers=random_numbers, **settings))
    return torch.stack(steps, dim=1)


def random_prompts(B, T):
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(T))

# -----------------------------------------------------------------------------
# the same tokens


@pytest.mark.parametrize('args', ARCHITECTURES)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_greedy_sampling(args, past_block):
    model = make_gpt(**args)
    for length in (5, 24, 40):
        prompt = [i % 40 for i in reversed(range(length))]
        out = sample(model, [prompt] * 2, 36, temperature=0, past_block=past_block,
                     decoder=StaticDecoder(model))
        assert out.tolist() == [greedy(model, prompt, 36, past_block)] * 2
        assert len(set(out[0].tolist())) > 2


@pytest.mark.parametrize('past_block, cached, num_steps', [
    ('exact', True, 19),
    ('half', True, 33),
    ('half', False, 0),
])
def test_tokens_that_the_decoder_samples(monkeypatch, past_block, cached, num_steps):
    """ block_size is 24: 19 tokens after the first have a cache, then 1 in 13 is recomputed. """
    model = make_gpt()
    decoder = StaticDecoder(model)
    steps = []
    next_token = decoder.next_token
    monkeypatch.setattr(decoder, 'next_token', lambda u: steps.append(1) or next_token(u))
    sample(model, [[3, 1, 4, 1, 5]], 36, past_block=past_block, cached=cached, decoder=decoder)
    assert len(steps) == num_steps


@pytest.mark.parametrize('settings', [dict(), dict(top_k=5), dict(top_p=0.8), ALL_FILTERS], ids=str)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_filters(settings, past_block):
    model = make_gpt(scale=10)
    prompts = [[9, 9, 3, 4], [1, 2, 3, 4]]
    expected = sample(model, prompts, 50, past_block=past_block, **settings)
    out = sample(model, prompts, 50, past_block=past_block, decoder=StaticDecoder(model),
                 **settings)
    assert torch.equal(out, expected)
    assert len(set(expected.flatten().tolist())) > 5


@pytest.mark.parametrize('dtype, int8', [
    pytest.param(torch.bfloat16, False, id='bfloat16'),
    pytest.param(torch.float16, False, id='float16'),
    pytest.param(torch.float16, True, id='int8', marks=needs_fbgemm),
])
def test_weights_in_fewer_bits(dtype, int8):
    model = make_gpt(block_size=64)
    quantize_linears(model, dtype, int8)
    prompts = [[3, 1, 4], [1, 5, 9]]
    out = sample(model, prompts, 40, temperature=0, decoder=StaticDecoder(model))
    assert torch.equal(out, sample(model, prompts, 40, temperature=0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_mask_is_converted_once_a_token(monkeypatch, dtype):
    """ All layers get the same numbers, in the dtype of their queries. """
    model = make_gpt(block_size=64).to(dtype)
    attend = functional.scaled_dot_product_attention
    masks = []

    def watch(query, key, value, mask, *args):
        if mask is not None:
            assert mask.dtype == query.dtype == dtype
            masks.append(mask)
        return attend(query, key, value, mask, *args)

    monkeypatch.setattr(functional, 'scaled_dot_product_attention', watch)
    sample(model, [[3, 1, 4]], 4, decoder=StaticDecoder(model))
    assert len({id(mask) for mask in masks}) == 3
    assert len(masks) == 3 * model.config.n_layer > 3

# -----------------------------------------------------------------------------
# one decoder for all batches


def test_other_batch_sizes_and_settings():
    model = make_gpt(block_size=64)
    decoder = StaticDecoder(model)
    for B in (1, 3, 1):
        for top_k in (3, 20):
            out = sample(model, [[1, 2]] * B, 30, top_k=top_k, decoder=decoder)
            assert torch.equal(out, sample(model, [[1, 2]] * B, 30, top_k=top_k))


def test_state_of_an_earlier_batch_changes_nothing():
    model = make_gpt(block_size=64)
    decoder = StaticDecoder(model)
    sample(model, [[5, 6, 7, 8]] * 2, 50, decoder=decoder)
    memory = [layer_cache.k.data_ptr() for layer_cache in decoder.cache]
    with torch.inference_mode():
        decoder.token.fill_(1)
        decoder.position.fill_(1)
        decoder.random_numbers.fill_(torch.nan)
        for layer_cache in decoder.cache:
            layer_cache.k.fill_(torch.nan)
            layer_cache.v.fill_(torch.nan)

    prompts = [[1, 2], [3, 4]]
    out = sample(model, prompts, 30, decoder=decoder)
    assert torch.equal(out, sample(model, prompts, 30))
    assert [layer_cache.k.data_ptr() for layer_cache in decoder.cache] == memory


@pytest.mark.parametrize('block_size, n, size', [
    (1024, 1, 256), (1024, 256, 256), (1024, 257, 512), (1024, 1024, 1024), (700, 600, 700)])
def test_cache_size(block_size, n, size):
    assert StaticDecoder(make_gpt(block_size=block_size)).cache_size(n) == size

# -----------------------------------------------------------------------------
# synchronization


def test_nothing_is_read_between_tokens(monkeypatch):
    """ What makes a GPU wait fails after the second token, until the last. """
    model = make_gpt(block_size=64)
    idx = torch.tensor([[9, 9, 9, 4], [1, 2, 3, 4]])
    settings = dict(random_numbers=torch.rand(2, 30), **ALL_FILTERS)

    def fail(*args):
        raise AssertionError('a synchronization')
    with torch.inference_mode():
        expected = list(next_tokens(model, idx, 30, **settings))
        steps = next_tokens(model, idx, 30, decoder=StaticDecoder(model), **settings)
        tokens = [next(steps), next(steps)]
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, 'is_compiling', lambda: True)  # top_k as on a GPU
            for name in ('item', 'tolist', 'cpu', 'numpy', 'nonzero', '__bool__', '__int__',
                         '__float__', '__index__'):
                patch.setattr(torch.Tensor, name, fail)
            tokens += steps
    assert torch.equal(torch.stack(tokens), torch.stack(expected))


@pytest.mark.parametrize('settings', [
    dict(temperature=0), dict(temperature=0, past_block='half'), dict(temperature=0, stop='*'),
    dict(temperature=0.01, top_k=5, top_p=0.9, min_p=0.1),
], ids=str)
@pytest.mark.parametrize('n', [10, 60], ids=['within block_size', 'past block_size'])
def test_non_finite_logits_in_the_middle(settings, n):
    model = make_gpt(untied=True)
    texts = [greedy(model, prompt, n) for prompt in ([1, 2, 3], [7, 8, 9])]
    bad_token = next(token for token in texts[1][1:8] if token not in texts[0][:8])
    with torch.no_grad():
        model.transformer.wte.weight[bad_token] = torch.nan
    decoder = StaticDecoder(model)
    prompts = [[1, 2, 3], [7, 8, 9]]
    random_numbers = torch.full((2, n), 0.5)
    with pytest.raises(UserError, match='non-finite logits'):
        complete(model, LetterTokenizer(), prompts, random_numbers, decoder=decoder, **settings)
    completions, _ = complete(model, LetterTokenizer(), [[1, 2, 3]] * 2, random_numbers[:, :8],
                              decoder=decoder, **settings)
    expected = LetterTokenizer().decode(texts[0][:8])
    assert [completion.text for completion in completions] == [expected] * 2

# -----------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def compiler(monkeypatch):
    """ Stands in for the compiler, and counts the graphs that it is given. """
    counter = CompileCounterWithBackend('eager')
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize('args', ARCHITECTURES)
def test_step_is_one_graph(compiler, args):
    """ For all tokens, and for prompts of different lengths. """
    model = make_gpt(**args)
    decoder = StaticDecoder(model, compile=True)
    for T in (4, 1, 30):
        prompts = random_prompts(2, T)
        expected = sample(model, prompts, 40, past_block='half', **ALL_FILTERS)
        out = sample(model, prompts, 40, past_block='half', decoder=decoder, **ALL_FILTERS)
        assert torch.equal(out, expected)
    assert compiler.frame_count == 1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('native_bfloat16', [True, False])
def test_16_bit_weights_in_the_graph(compiler, monkeypatch, dtype, native_bfloat16):
    """ FBGEMM's kernels cannot be in it. """
    monkeypatch.setattr('components.quantization.has_bfloat16', lambda: native_bfloat16)
    model = make_gpt(block_size=64)
    quantize_linears(model, dtype, compile=True)
    out = sample(model, [[3, 1, 4]], 40, temperature=0, decoder=StaticDecoder(model, compile=True))
    assert torch.equal(out, sample(model, [[3, 1, 4]], 40, temperature=0))
    assert compiler.frame_count == 1


def test_few_graphs_for_many_shapes(compiler):
    """ torch.compile refuses a ninth graph of the same function. """
    model = make_gpt(block_size=1024, n_layer=1)
    decoder = StaticDecoder(model, compile=True)
    for B in (3, 2, 1):
        for T in (3, 255, 511):
            prompts = random_prompts(B, T)
            out = sample(model, prompts, 4, decoder=decoder)
            assert torch.equal(out, sample(model, prompts, 4))
    assert compiler.frame_count <= 4


@pytest.mark.slow
def test_compiled_sample_equals_the_uncompiled_one(tmp_path):
    """ By the real compiler. """
    write_checkpoint(tmp_path)
    settings = dict(num_samples=3, max_new_tokens=30, start='the', device='cpu', dtype='float32')
    expected, _ = run('sample.py', cwd=tmp_path, **settings)
    compiled, _ = run('sample.py', cwd=tmp_path, compile=True, **settings)
    samples = re.compile(r'device: .*?\n(.*)', re.DOTALL)
    assert samples.search(compiled)[1] == samples.search(expected)[1]
    assert 'device: cpu, float32, compiled' in compiled

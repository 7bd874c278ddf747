""" components/static_decoding.py against the loop whose shapes grow. """
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import run
from test_generation import RECIPE, LetterTokenizer, greedy, make_gpt
from test_sample import write_checkpoint
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from components import static_decoding
from components.device import has_fbgemm
from components.errors import UserError
from components.generation import complete, next_tokens, read_tokens, samples_that_fit
from components.quantization import quantize_linears
from components.static_decoding import StaticDecoder

ARCHITECTURES = [
    pytest.param(dict(), id='default'),
    pytest.param(dict(bias=True), id='bias'),
    pytest.param(RECIPE, id='recipe'),
]
needs_fbgemm = pytest.mark.skipif(not has_fbgemm('cpu'), reason='this CPU has no int8 kernel')


def sample(model, prompts, n, pad=None, seed=0, **settings):
    """ The next n tokens of each prompt -> (B, n). """
    idx = torch.as_tensor(prompts)
    random_numbers = torch.rand(len(idx), n, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        steps = list(next_tokens(model, idx, n, pad=pad, random_numbers=random_numbers, **settings))
    return torch.stack(steps, dim=1)


def count_steps(decoder):
    """ Makes `decoder` count its steps -> a list with an item for each. """
    steps = []
    next_token = decoder.next_token

    def counting_next_token(random_numbers):
        steps.append(1)
        return next_token(random_numbers)
    decoder.next_token = counting_next_token
    return steps

# -----------------------------------------------------------------------------
# the same tokens


@pytest.mark.parametrize('args', ARCHITECTURES)
@pytest.mark.parametrize('past_block, num_steps', [('exact', 19), ('half', 33)])
def test_greedy_sampling(args, past_block, num_steps):
    """ block_size is 24: 19 tokens after the first have a cache, then 1 in 13 is recomputed. """
    model = make_gpt(**args)
    decoder = StaticDecoder(model)
    steps = count_steps(decoder)
    prompt = [3, 1, 4, 1, 5]
    out = sample(model, [prompt] * 2, 36, temperature=0, past_block=past_block, decoder=decoder)
    expected = greedy(model, prompt, 36, past_block)
    assert out.tolist() == [expected] * 2
    assert len(set(expected)) > 2
    assert len(steps) == num_steps


@pytest.mark.parametrize('args', ARCHITECTURES)
def test_prompts_of_different_lengths(args):
    model = make_gpt(**args)
    prompts = [[7], [1, 2, 3], list(range(20)), list(range(39, 1, -1))]
    completions, _ = complete(model, LetterTokenizer(), prompts, torch.zeros(4, 30), temperature=0,
                              decoder=StaticDecoder(model))
    for prompt, completion in zip(prompts, completions):
        assert completion.text == LetterTokenizer().decode(greedy(model, prompt, 30))


@pytest.mark.parametrize('settings', [
    dict(),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1),
    dict(vocab_size=30),
    dict(repetition_penalty=1.5),
    dict(temperature=0, repetition_penalty=1.5),
    dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, vocab_size=39),
], ids=str)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_settings_of_the_sampling(settings, past_block):
    model = make_gpt(scale=10)
    prompts = [[9, 9, 9, 4], [9, 9, 3, 4], [1, 2, 3, 4]]
    settings = dict(pad=torch.tensor([2, 1, 0]), past_block=past_block, **settings)
    expected = sample(model, prompts, 50, **settings)
    out = sample(model, prompts, 50, decoder=StaticDecoder(model), **settings)
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
    expected = sample(model, prompts, 40, temperature=0)
    out = sample(model, prompts, 40, temperature=0, decoder=StaticDecoder(model))
    assert torch.equal(out, expected)


@pytest.mark.parametrize('length, cached', [
    pytest.param(3, False, id='uncached'),
    pytest.param(24, True, id='prompt of block_size'),
])
def test_without_a_cache_the_decoder_is_not_used(length, cached):
    model = make_gpt()
    decoder = StaticDecoder(model)
    prompt = list(range(length))
    out = sample(model, [prompt], 30, temperature=0, decoder=decoder, cached=cached)
    assert out[0].tolist() == greedy(model, prompt, 30)
    assert decoder.cache is None

# -----------------------------------------------------------------------------
# one decoder for all batches


def test_state_of_an_earlier_batch_changes_nothing():
    model = make_gpt(block_size=64)
    decoder = StaticDecoder(model)
    settings = dict(repetition_penalty=1.3, top_k=20)
    sample(model, [[5, 6, 7, 8]] * 2, 50, pad=torch.tensor([3, 1]), decoder=decoder, **settings)
    memory = [layer_cache.k.data_ptr() for layer_cache in decoder.cache]
    with torch.inference_mode():
        for state in (decoder.token, decoder.position, decoder.pad, decoder.seen):
            state.fill_(1)
        decoder.random_numbers.fill_(torch.nan)
        for layer_cache in decoder.cache:
            layer_cache.k.fill_(torch.nan)
            layer_cache.v.fill_(torch.nan)

    prompts = [[1, 2], [3, 4]]
    out = sample(model, prompts, 30, decoder=decoder, **settings)
    assert torch.equal(out, sample(model, prompts, 30, **settings))
    assert [layer_cache.k.data_ptr() for layer_cache in decoder.cache] == memory


def test_other_batch_sizes_and_settings():
    model = make_gpt(block_size=64)
    decoder = StaticDecoder(model)
    for B in (1, 3, 1):
        for top_k in (3, 20):
            out = sample(model, [[1, 2]] * B, 30, top_k=top_k, decoder=decoder)
            assert torch.equal(out, sample(model, [[1, 2]] * B, 30, top_k=top_k))


@pytest.mark.parametrize('block_size, n, size', [
    (1024, 1, 256),
    (1024, 256, 256),
    (1024, 257, 512),
    (1024, 1024, 1024),
    (100, 50, 100),
    (700, 600, 700),
])
def test_cache_size(block_size, n, size):
    model = make_gpt(block_size=block_size)
    assert StaticDecoder(model).cache_size(n) == size


def test_samples_that_fit():
    model = make_gpt(block_size=1024)
    for n, size in ((40, 256), (300, 512)):
        caches = 4 * 2 * model.config.n_layer * model.config.n_embd * (n + size)  # bytes
        fit = samples_that_fit(model, n, 10**9, StaticDecoder(model))
        assert 0.3 * 10**9 / caches < fit < 10**9 / caches

# -----------------------------------------------------------------------------
# synchronization


def test_nothing_is_read_between_tokens(monkeypatch):
    """ What makes a GPU wait fails after the first token, until the last. """
    model = make_gpt(block_size=64)
    idx = torch.tensor([[9, 9, 9, 4], [1, 2, 3, 4]])
    settings = dict(pad=torch.tensor([2, 0]), top_k=9, top_p=0.9, min_p=0.02,
                    repetition_penalty=1.2, random_numbers=torch.rand(2, 30))

    def fail(*args):
        raise AssertionError('a synchronization')
    with torch.inference_mode():
        expected = list(next_tokens(model, idx, 30, **settings))
        steps = next_tokens(model, idx, 30, decoder=StaticDecoder(model), **settings)
        first = next(steps)
        with monkeypatch.context() as patch:
            for name in ('item', 'tolist', 'cpu', 'numpy', 'nonzero', '__bool__', '__int__',
                         '__float__', '__index__'):
                patch.setattr(torch.Tensor, name, fail)
            later = list(steps)
    assert torch.equal(torch.stack([first, *later]), torch.stack(expected))


@pytest.mark.parametrize('one_by_one', [True, False])
def test_when_tokens_are_read(one_by_one):
    submitted = []

    def steps():
        for n in range(3):
            submitted.append(n)
            yield torch.tensor([n, 10 + n])
    tokens = read_tokens(steps(), one_by_one)
    assert next(tokens) == [0, 10]
    assert submitted == ([0] if one_by_one else [0, 1, 2])
    assert list(tokens) == [[1, 11], [2, 12]]
    assert list(read_tokens(iter(()), one_by_one)) == []


@pytest.mark.parametrize('stop, stream, one_by_one', [
    ('', False, False), ('Z', False, True), ('', True, True)])
def test_tokens_are_read_one_by_one_where_their_text_is_needed(monkeypatch, capsys, stop, stream,
                                                               one_by_one):
    arguments = []

    def recording_read_tokens(steps, one_by_one):
        arguments.append(one_by_one)
        return read_tokens(steps, one_by_one)
    monkeypatch.setattr('components.generation.read_tokens', recording_read_tokens)
    complete(make_gpt(), LetterTokenizer(), [[1, 2]], torch.zeros(1, 3), stop, stream)
    assert arguments == [one_by_one]


@pytest.mark.parametrize('settings', [
    dict(temperature=0),
    dict(temperature=0, past_block='half'),
    dict(temperature=0, stop='*'),
    dict(temperature=0.01, top_k=5),
    dict(temperature=0.01, top_p=0.9, min_p=0.1, repetition_penalty=1.0001),
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
    counter = CompileCounterWithBackend('aot_eager')
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize('args', ARCHITECTURES)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_step_is_one_graph(compiler, args, past_block):
    """ For all tokens, for prompts of different lengths, with and without padding. """
    model = make_gpt(**args)
    decoder = StaticDecoder(model, compile=True)
    settings = dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2,
                    past_block=past_block)
    for T, pad in ((4, None), (1, None), (9, torch.tensor([3, 0])), (30, None)):
        prompts = torch.randint(40, (2, T), generator=torch.Generator().manual_seed(T))
        if pad is not None:
            prompts[0, :3] = prompts[0, 3]
        expected = sample(model, prompts, 40, pad, seed=T, **settings)
        out = sample(model, prompts, 40, pad, seed=T, decoder=decoder, **settings)
        assert torch.equal(out, expected)
    assert compiler.frame_count == 1
    assert not counters['graph_break']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('native_bfloat16', [True, False])
def test_16_bit_weights_in_the_graph(compiler, monkeypatch, dtype, native_bfloat16):
    """ FBGEMM's kernels cannot be in it. """
    monkeypatch.setattr('components.quantization.has_bfloat16', lambda: native_bfloat16)
    model = make_gpt(block_size=64)
    quantize_linears(model, dtype, compile=True)
    expected = sample(model, [[3, 1, 4]], 40, temperature=0)
    out = sample(model, [[3, 1, 4]], 40, temperature=0, decoder=StaticDecoder(model, compile=True))
    assert torch.equal(out, expected)
    assert compiler.frame_count == 1


def test_few_graphs_for_many_shapes(compiler):
    """ torch.compile refuses a ninth graph of the same function. """
    model = make_gpt(block_size=1024, n_layer=1)
    decoder = StaticDecoder(model, compile=True)
    for B in (5, 4, 3, 2, 1):
        for T in (3, 255, 511):
            prompts = torch.randint(40, (B, T), generator=torch.Generator().manual_seed(T))
            out = sample(model, prompts, 4, decoder=decoder)
            assert torch.equal(out, sample(model, prompts, 4))
    assert compiler.frame_count <= 4


def test_sample_compiles_one_graph(tmp_path, script_globals, capsys, compiler, monkeypatch):
    """ For a batch of prompts, and for one prompt after another. """
    monkeypatch.setattr('components.settings.missing_for_compile', lambda device_type: '')
    write_checkpoint(tmp_path)
    (tmp_path / 'prompts.txt').write_text('the cat\na\nsat on\n')
    settings = dict(start='LINES:prompts.txt', num_samples=1, max_new_tokens=12, device='cpu',
                    dtype='float32', past_block='half')
    for stream in (False, True):
        torch._dynamo.reset()
        compiler.frame_count = 0
        script_globals('sample.py', stream=stream, compile=False, **settings)
        _, _, expected = capsys.readouterr().out.partition('not compiled\n')
        script_globals('sample.py', stream=stream, compile=True, **settings)
        _, _, printed = capsys.readouterr().out.partition('compiled\n')
        assert printed == expected
        assert compiler.frame_count == 1


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

# -----------------------------------------------------------------------------
# a stand-in for CUDA graphs


class FakeStream:
    def __init__(self, calls, name):
        self.calls = calls
        self.name = name

    def wait_stream(self, other):
        self.calls.append(f'{self.name} waits for {other.name}')


@pytest.fixture
def cuda(monkeypatch):
    """
    Stands in for CUDA's streams and graphs -> the calls that are made, and new_decoder(model). A
    replay runs what was captured.
    """
    calls = []
    streams = [FakeStream(calls, 'main')]

    def new_stream():
        return FakeStream(calls, 'side')

    @contextmanager
    def use_stream(stream):
        streams.append(stream)
        yield
        streams.pop()

    class FakeGraph:
        def replay(self):
            calls.append('replay')
            self.step()

    @contextmanager
    def capture(graph, capture_error_mode):
        calls.append(f'capture {capture_error_mode}')
        yield
        calls.append('captured')

    def new_decoder(model, compile=False):
        decoder = StaticDecoder(model, compile)
        step = decoder.run_step

        def recording_step():
            calls.append(f'step on {streams[-1].name}')
            step()
        decoder.run_step = recording_step
        decoder.use_cuda_graph = True
        monkeypatch.setattr(FakeGraph, 'step', lambda graph: step(), raising=False)
        return decoder

    monkeypatch.setattr(torch.cuda, 'Stream', new_stream)
    monkeypatch.setattr(torch.cuda, 'stream', use_stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', FakeGraph)
    monkeypatch.setattr(torch.cuda, 'graph', capture)
    return calls, new_decoder


CAPTURE = [
    'side waits for main',
    *['step on side'] * static_decoding.WARM_UP_STEPS,
    'main waits for side',
    'capture thread_local',
    'step on main',  # of the capture, whose stream torch.cuda.graph selects
    'captured',
]


@pytest.mark.parametrize('block_size', [24, 2], ids=str)
def test_graph_is_captured_once(cuda, block_size):
    calls, new_decoder = cuda
    model = make_gpt(block_size=block_size)
    decoder = new_decoder(model)
    settings = dict(temperature=0.9, top_k=20, repetition_penalty=1.2, past_block='half')
    for T in (1, 2):
        prompts = [[1, 2, 3][:T]] * 2
        out = sample(model, prompts, 40, decoder=decoder, **settings)
        assert torch.equal(out, sample(model, prompts, 40, **settings))
    assert calls[:len(CAPTURE)] == CAPTURE
    assert set(calls[len(CAPTURE):]) == {'replay'}


def test_graph_of_another_shape(cuda):
    calls, new_decoder = cuda
    model = make_gpt()
    decoder = new_decoder(model)
    for B in (2, 1):
        sample(model, [[1, 2, 3]] * B, 5, decoder=decoder)
        assert calls == [*CAPTURE, *['replay'] * 4]
        calls.clear()


def test_compiled_step_is_captured(cuda, compiler):
    calls, new_decoder = cuda
    model = make_gpt()
    out = sample(model, [[1, 2, 3]], 20, temperature=0, decoder=new_decoder(model, compile=True))
    assert out[0].tolist() == greedy(model, [1, 2, 3], 20)
    assert compiler.frame_count == 1
    assert calls == [*CAPTURE, *['replay'] * 19]


def test_capture_that_failed_is_not_used(cuda, monkeypatch):
    """ As where memory runs out: the next call captures again. """
    calls, new_decoder = cuda
    model = make_gpt()
    decoder = new_decoder(model)
    sample(model, [[1, 2, 3]], 5, decoder=decoder)

    def fail():
        raise torch.OutOfMemoryError
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, 'CUDAGraph', fail)
        with pytest.raises(torch.OutOfMemoryError):
            sample(model, [[1, 2, 3]] * 2, 5, decoder=decoder)
    calls.clear()
    out = sample(model, [[1, 2, 3]], 5, decoder=decoder)
    assert torch.equal(out, sample(model, [[1, 2, 3]], 5))
    assert calls == [*CAPTURE, *['replay'] * 4]

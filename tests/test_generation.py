"""
Sampling against the forward pass without a cache, closed forms, and transformers.
"""
import io
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from components.errors import UserError
from components.generation import (
    complete,
    group_into_batches,
    next_tokens,
    printable_part,
    read_prompts,
    sample_token,
    samples_that_fit,
)
from model import GPT, GPTConfig

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


def make_gpt(seed=0, scale=40, **args):
    """ A small GPT with weights so large that its greedy text does not repeat. """
    torch.manual_seed(seed)
    sizes = dict(block_size=24, vocab_size=40, n_layer=3, n_head=2, n_embd=16, bias=False)
    model = GPT(GPTConfig(**{**sizes, **args})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() != 2:
                p.add_(0.1 * torch.randn_like(p))
            elif '.h.' in name:
                p.mul_(scale)
            else:
                p.mul_(5)
    return model


def greedy(model, prompt, n, past_block='exact'):
    """ The n most likely next ids of a list of ids, without a cache, padding or batch. """
    ids = list(prompt)
    block_size = model.config.block_size
    first = max(0, len(ids) - block_size)
    for _ in range(n):
        if len(ids) - first > block_size:
            num_kept = block_size if past_block == 'exact' else (block_size + 1) // 2
            first = len(ids) - num_kept
        idx = torch.tensor([ids[first:]])
        logits, _ = model(idx, idx)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt):]


def scripted_gpt(tokens, vocab_size=256):
    """ A GPT that generates `tokens` again and again, whatever its prompt is. """
    model = make_gpt(vocab_size=vocab_size)
    calls = []

    def forward(idx, targets=None):
        token = tokens[len(calls) % len(tokens)]
        calls.append(token)
        next_token = torch.full((len(idx), 1), token)
        return F.one_hot(next_token, vocab_size).float(), None

    model.forward = forward
    return model


class ByteTokenizer:
    """ One token for each byte of UTF-8, so that characters have several tokens. """

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')


class LetterTokenizer:
    """ One letter for each id. """

    def decode(self, ids):
        return ''.join(chr(65 + i) for i in ids)

# -----------------------------------------------------------------------------
# the sampling loop


@pytest.mark.parametrize('args', ARCHITECTURES)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
@pytest.mark.parametrize('cached', [True, False], ids=['cached', 'uncached'])
@torch.no_grad()
def test_greedy_sampling(args, past_block, cached):
    prompt = [3, 1, 4, 1, 5]
    for seed in range(2):
        model = make_gpt(seed, **args)
        expected = greedy(model, prompt, 40, past_block)
        out = model.generate(torch.tensor([prompt] * 2), 40, temperature=0, past_block=past_block,
                             cached=cached)
        assert out.tolist() == [prompt + expected] * 2
        assert len(set(expected)) > 2


@pytest.mark.parametrize('sizes', [dict(), dict(block_size=25, n_layer=1)],
                         ids=['even block', 'odd block'])
@pytest.mark.parametrize('past_block', ['exact', 'half'])
@torch.no_grad()
def test_different_prompts_of_one_length(sizes, past_block):
    model = make_gpt(**sizes)
    for length in (20, 40):  # shorter and longer than block_size
        a = [i % 40 for i in range(length)]
        b = a[::-1]
        out = model.generate(torch.tensor([a, b]), 30, temperature=0, past_block=past_block)
        assert out[0].tolist() == a + greedy(model, a, 30, past_block)
        assert out[1].tolist() == b + greedy(model, b, 30, past_block)


@pytest.mark.parametrize('args', ARCHITECTURES)
@torch.no_grad()
def test_prompts_of_different_lengths(args):
    model = make_gpt(**args)
    prompts = [[7], [1, 2, 3], list(range(20)), list(range(39, 1, -1))]
    completions, _ = complete(model, LetterTokenizer(), prompts, torch.zeros(4, 30), temperature=0)
    for prompt, completion in zip(prompts, completions):
        assert completion.text == LetterTokenizer().decode(greedy(model, prompt, 30))
        assert completion.num_tokens == 30


@pytest.mark.parametrize('cached', [True, False], ids=['cached', 'uncached'])
@torch.no_grad()
def test_prompts_that_padding_makes_equal(cached):
    model = make_gpt()
    prompts = torch.tensor([[7, 7, 7]] * 3)
    pad = torch.tensor([2, 1, 0])
    out = model.generate(prompts, 40, temperature=0, pad=pad, cached=cached)
    for row, n in enumerate((1, 2, 3)):
        assert out[row, 3:].tolist() == greedy(model, [7] * n, 40)


@torch.no_grad()
def test_equal_prompts_are_computed_once():
    model = make_gpt()
    forward = model.forward
    sizes = []

    def recording_forward(idx, **options):
        sizes.append(tuple(idx.shape))
        return forward(idx, **options)

    model.forward = recording_forward
    model.generate(torch.tensor([[1, 2, 3]] * 4), 3)
    assert sizes == [(1, 3), (4, 1), (4, 1)]


@torch.no_grad()
def test_half_recomputes_once_for_half_a_block():
    model = make_gpt()
    forward = model.forward
    lengths = []

    def recording_forward(idx, **options):
        lengths.append(idx.shape[1])
        return forward(idx, **options)

    model.forward = recording_forward
    model.generate(torch.tensor([[1]]), 24 + 25, past_block='half')
    recomputed = [(i, length) for i, length in enumerate(lengths) if length > 1]
    assert recomputed == [(24, 12), (37, 12)]


@torch.no_grad()
def test_sample_does_not_depend_on_its_batch():
    model = make_gpt(block_size=64)
    prompt = torch.tensor([[1, 2, 3]])
    random_numbers = torch.rand(10, 50)
    settings = dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    batch = model.generate(prompt.expand(10, -1), 50, random_numbers=random_numbers, **settings)
    assert len({tuple(row) for row in batch.tolist()}) == 10
    for b in range(10):
        alone = model.generate(prompt, 50, random_numbers=random_numbers[b:b + 1], **settings)
        assert alone[0].tolist() == batch[b].tolist()


def test_model_whose_forward_has_no_cache():
    class PlainGPT(GPT):
        def forward(self, idx, targets=None):
            return super().forward(idx, targets)

    model = make_gpt()
    prompt = torch.arange(3)[None]
    expected = model.generate(prompt, 30, temperature=0)
    model.__class__ = PlainGPT
    out = model.generate(prompt, 30, temperature=0, cached=False)
    assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize('args, past_block', [(dict(), 'exact'), (RECIPE, 'half')],
                         ids=['default', 'recipe'])
def test_compiled_model_is_one_graph(args, past_block):
    model = make_gpt(**args)
    prompts = [torch.randint(40, (2, T)) for T in (3, 9)]
    settings = dict(temperature=0.9, random_numbers=torch.rand(2, 40), past_block=past_block)
    expected = [model.generate(prompt, 40, **settings) for prompt in prompts]
    torch._dynamo.reset()
    model.compile(backend='eager', fullgraph=True)  # raises where a graph would break
    out = [model.generate(prompt, 40, **settings) for prompt in prompts]
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def test_unknown_past_block(tiny):
    with pytest.raises(AssertionError):
        tiny.generate(torch.tensor([[1]]), 1, past_block='roll')

# -----------------------------------------------------------------------------
# repetition penalty


@torch.no_grad()
def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    penalize = RepetitionPenaltyLogitsProcessor(1.7)
    model = make_gpt(block_size=64)
    prompt = [4, 9, 9, 2]
    expected = list(prompt)
    for _ in range(30):
        idx = torch.tensor([expected])
        logits, _ = model(idx)
        expected.append(int(penalize(idx, logits[:, -1]).argmax()))
    settings = dict(temperature=0, repetition_penalty=1.7)
    out = model.generate(torch.tensor([prompt]), 30, **settings)
    assert out[0].tolist() == expected
    padded = torch.tensor([[4, 4, *prompt]])
    out = model.generate(padded, 30, pad=torch.tensor([2]), **settings)
    assert out[0, 2:].tolist() == expected


@pytest.mark.parametrize('logits, expected', [
    pytest.param([-1.0, -1.5, -4.0], [0, 1, 0], id='below zero'),
    pytest.param([1.0, 1.5, 4.0], [2, 2, 2], id='above zero'),
    pytest.param([3.0, 2.0, 1.0], [0, 1, 0], id='below the others'),
])
def test_repetition_penalty_of_both_signs(logits, expected):
    model = make_gpt()
    model.forward = lambda idx: (torch.tensor([[logits]]), None)
    settings = dict(temperature=0, repetition_penalty=1.7, cached=False)
    out = model.generate(torch.tensor([[2]]), 3, **settings)
    assert out[0, 1:].tolist() == expected

# -----------------------------------------------------------------------------
# from logits to a token


def closed_form(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """ The probabilities of sample_token() in plain Python, for lists. """
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    if top_k:
        kth = sorted(weights.values(), reverse=True)[:top_k][-1]
        weights = {i: x for i, x in weights.items() if x >= kth}
    total = sum(weights.values())
    probs = {i: x / total for i, x in weights.items()}

    kept = {}
    sum_before = 0.0
    for i in sorted(probs, key=probs.get, reverse=True):
        if sum_before < top_p:
            kept[i] = probs[i]
        sum_before += probs[i]

    largest = max(kept.values())
    kept = {i: x for i, x in kept.items() if x >= min_p * largest}
    total = sum(kept.values())
    return np.array([kept.get(i, 0.0) / total for i in range(len(logits))])


@pytest.mark.parametrize('settings', [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.6),
    dict(top_k=7),
    dict(top_k=1000),
    dict(top_p=0.8),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(top_k=12, top_p=0.9),
    dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05),
], ids=str)
def test_distribution_of_samples(settings):
    n = 20000
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    random_numbers = torch.rand(n, generator=torch.Generator().manual_seed(2))
    samples = sample_token(logits.expand(n, -1), random_numbers, **settings)
    counts = np.bincount(samples, minlength=30)
    expected = n * closed_form(logits.tolist(), **settings)
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    difference = (counts - expected)[is_possible]
    chi_squared = (difference ** 2 / expected[is_possible]).sum()
    degrees = is_possible.sum() - 1
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees) + 4  # four standard deviations


def test_top_k_keeps_all_that_are_equal_to_the_kth():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    random_numbers = torch.linspace(0, 0.999, 500)
    for k in (2, 3, 4):
        samples = sample_token(logits.expand(500, -1), random_numbers, top_k=k)
        assert set(samples.tolist()) == {0, 1, 2, 3}


def test_top_k_with_equal_logits_in_another_row():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [3.0, 2.0, 1.9, 1.8, 1.0]])
    samples = sample_token(logits, torch.zeros(2), top_k=2)
    assert samples.tolist() == [3, 1]


def test_top_k_has_two_equal_forms(monkeypatch):
    """ On a CPU the softmax is over k values, elsewhere over the whole vocabulary. """
    def top_k_of_a_gpu(logits, k, static_shapes):
        kth = logits.topk(k).values[:, -1:]
        return logits.masked_fill(logits < kth, -math.inf), None

    logits = torch.randn(1000, 300, generator=torch.Generator().manual_seed(1))
    random_numbers = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    settings = dict(top_k=20, top_p=0.9, min_p=0.05)
    samples = sample_token(logits, random_numbers, **settings)
    monkeypatch.setattr('components.generation.filter_top_k', top_k_of_a_gpu)
    expected = sample_token(logits, random_numbers, **settings)
    assert torch.equal(samples, expected)


def test_temperature_of_zero():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (0, 1e-39):
        assert sample_token(logits, torch.zeros(1), temperature).item() == 1


def test_first_and_last_random_number():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    first = torch.tensor([0.0])
    last = torch.tensor([1 - 2**-24])
    assert sample_token(logits, first).item() == 3
    assert sample_token(logits, last).item() == 1


def test_filtered_tokens_with_a_cdf_out_of_order(monkeypatch):
    """ A GPU adds in parallel, so that a sum may rise where nothing is added. """
    cumsum = torch.Tensor.cumsum

    def cumsum_with_a_dip(x, dim):
        is_second = torch.arange(x.shape[1]) == 1
        return cumsum(x, dim) - 1e-3 * is_second

    monkeypatch.setattr(torch.Tensor, 'cumsum', cumsum_with_a_dip)
    logits = torch.tensor([[2.0, 1.0, -9.0, 3.0]])
    random_numbers = torch.linspace(0, 1, 4001)[:-1]
    samples = sample_token(logits.expand(4000, -1), random_numbers, min_p=0.3)
    assert set(samples.tolist()) == {0, 3}


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_non_finite_logits(value):
    logits = torch.tensor([[1.0, 2.0], [value, 1.0]])
    with pytest.raises(UserError, match='non-finite'):
        sample_token(logits, torch.zeros(2))

# -----------------------------------------------------------------------------
# from prompts to texts


def test_read_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('the cat\n')
    (tmp_path / 'b.txt').write_text('the cat\na\n\n€', encoding='utf-8')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('typed\n'))
    assert read_prompts('the: cat') == ['the: cat']
    assert read_prompts('FILE:a.txt') == ['the cat\n']
    assert read_prompts('FILES:?.txt') == ['the cat\n', 'the cat\na\n\n€']
    assert read_prompts('LINES:b.txt') == ['the cat', 'a', '€']
    assert read_prompts('-') == ['typed\n']


@pytest.mark.parametrize('start, message', [
    ('FILE:nowhere.txt', 'there is no file nowhere.txt'),
    ('LINES:nowhere.txt', 'there is no file nowhere.txt'),
    ('FILE:latin.txt', 'latin.txt is not in UTF-8'),
    ('FILES:nothing*', 'no prompts found'),
    ('LINES:empty.txt', 'no prompts found'),
])
def test_prompts_that_cannot_be_read(tmp_path, monkeypatch, start, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin.txt').write_bytes('é'.encode('latin-1'))
    (tmp_path / 'empty.txt').write_text('\n\n')
    with pytest.raises(UserError, match=message):
        read_prompts(start)


@pytest.mark.parametrize('stop, max_new_tokens, expected, num_tokens', [
    pytest.param('', 10, 'ab€ 1\n\n2', 10, id='no stop'),
    pytest.param('\n\n', 10, 'ab€ 1', 9, id='two characters'),
    pytest.param('€', 10, 'ab', 5, id='three tokens'),
    pytest.param('\n\n', 8, 'ab€ 1\n', 8, id='half a stop string at the end'),
])
@pytest.mark.parametrize('stream', [True, False], ids=['stream', 'no stream'])
def test_stop(capsys, stop, max_new_tokens, expected, num_tokens, stream):
    tokenizer = ByteTokenizer()
    model = scripted_gpt(tokenizer.encode('ab€ 1\n\n2'))
    prompt = tokenizer.encode('> ')
    random_numbers = torch.zeros(1, max_new_tokens)
    completions, seconds = complete(model, tokenizer, [prompt], random_numbers, stop, stream,
                                    temperature=0, cached=False)
    assert completions == [(expected, num_tokens)]
    assert seconds > 0
    printed = capsys.readouterr().out
    if stream:
        assert printed == expected + '\n'
    else:
        assert printed == ''


def test_stop_ends_each_sample_of_a_batch():
    model = make_gpt()
    prompts = [[1, 2, 3], [7, 8, 9]]
    texts = [LetterTokenizer().decode(greedy(model, prompt, 30)) for prompt in prompts]
    stop = texts[0][4:6]
    expected = [text.partition(stop)[0] for text in texts]
    assert len(expected[0]) < len(expected[1])
    completions, _ = complete(model, LetterTokenizer(), prompts, torch.zeros(2, 30), stop,
                              temperature=0)
    assert [completion.text for completion in completions] == expected
    assert completions[0].num_tokens == len(expected[0]) + 2


@pytest.mark.parametrize('text, stop, expected', [
    ('a\ufffd', '', 'a'),
    ('a€', '', 'a€'),
    ('xaa', 'aab', 'x'),
    ('xa', 'aab', 'x'),
    ('xab', 'aab', 'xab'),
    ('one\n', '\n\n', 'one'),
    ('one\n', '', 'one\n'),
])
def test_printable_part_of_an_unfinished_text(text, stop, expected):
    assert printable_part(text, stop) == expected


def test_samples_that_fit():
    config = GPTConfig()
    model = types.SimpleNamespace(config=config)
    cache = 2 * config.n_layer * config.n_embd * 100 * 4  # bytes, of 100 tokens
    n = samples_that_fit(model, 100, 10**9)
    assert 0.3 * 10**9 / cache < n < 10**9 / cache
    assert samples_that_fit(model, 100, 0) == 1
    longest = samples_that_fit(model, config.block_size, 10**9)
    assert longest < 10
    assert samples_that_fit(model, 10**9, 10**9) == longest


def test_group_into_batches():
    model = make_gpt()  # block_size=24
    short, long, longer = [1] * 3, [1] * 20, [1] * 40
    prompts = [long, short, longer, short, long]
    batches = group_into_batches(model, prompts, 10, memory=10**9)
    assert batches == [[1, 3], [0, 4], [2]]
    batches = group_into_batches(model, prompts, 10, memory=0)
    assert batches == [[1], [3], [0], [4], [2]]


def test_next_tokens_of_one_step():
    model = make_gpt()
    tokens = list(next_tokens(model, torch.tensor([[1], [2]]), 3))
    assert [t.shape for t in tokens] == [(2,)] * 3

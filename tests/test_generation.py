"""
Sampling against the forward pass without a cache, closed forms, and the tokens of single samples.
"""
import io
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_MODEL

from components.errors import UserError
from components.generation import (
    complete,
    group_into_batches,
    next_tokens,
    printable_part,
    read_prompts,
    read_tokens,
    sample_token,
    samples_that_fit,
)
from model import GPT, GPTConfig

ARCHITECTURES = [
    pytest.param(dict(), id='default'),
    pytest.param(dict(bias=True, gelu='tanh', block_size=25, n_layer=1), id='bias, odd block'),
    pytest.param(FAST_MODEL, id='fast'),
]


def make_gpt(scale=40, **args):
    """ A small GPT with weights so large that its greedy text does not repeat. """
    torch.manual_seed(0)
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
    """ The n most likely next ids of a list of ids, without a cache or a batch. """
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


class LetterTokenizer:
    """ One letter for each id. """

    def decode(self, ids):
        return ''.join(chr(65 + i) for i in ids)


class ByteTokenizer:
    """ One token for each byte of UTF-8, so that characters have several tokens. """

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')

# -----------------------------------------------------------------------------
# the sampling loop


@pytest.mark.parametrize('args', ARCHITECTURES)
@pytest.mark.parametrize('past_block', ['exact', 'half'])
@pytest.mark.parametrize('cached', [True, False], ids=['cached', 'uncached'])
@torch.no_grad()
def test_greedy_sampling_equals_the_uncached_path(args, past_block, cached):
    model = make_gpt(**args)
    for length in (5, 24, 40):  # also as long as block_size, and longer
        a = [i % 40 for i in range(length)]
        b = a[::-1]
        out = model.generate(torch.tensor([a, b]), 34, temperature=0, past_block=past_block,
                             cached=cached)
        assert out[0].tolist() == a + greedy(model, a, 34, past_block)
        assert out[1].tolist() == b + greedy(model, b, 34, past_block)
        assert len(set(out[1, length:].tolist())) > 5


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_non_finite_logits(value):
    logits = torch.tensor([[1.0, 2.0], [value, 1.0]])
    for settings in (dict(temperature=0), dict(top_k=1, top_p=0.5, min_p=0.1)):
        assert sample_token(logits, torch.zeros(2), **settings).tolist() in ([0, -1], [1, -1])
    model = make_gpt()
    with torch.no_grad():
        model.transformer.wte.weight[2] = value
    with pytest.raises(UserError, match='non-finite'):
        next(next_tokens(model, torch.tensor([[1], [2]]), 1))


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

# -----------------------------------------------------------------------------
# from logits to a token


def closed_form(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, vocab_size=None):
    """ The probabilities of sample_token() in plain Python, for lists. """
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits[:vocab_size])}
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
    dict(temperature=1.6),
    dict(top_k=7),
    dict(top_k=1000),
    dict(top_p=0.8),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(vocab_size=11),
    dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, vocab_size=29),
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
    """ In one of two rows. """
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [3.0, 2.0, 1.9, 1.8, 1.0]])
    random_numbers = torch.linspace(0, 0.999, 500)
    samples = [sample_token(logits, number.expand(2), top_k=2) for number in random_numbers]
    first, second = torch.stack(samples, dim=1).tolist()
    assert set(first) == {0, 1, 2, 3}
    assert set(second) == {0, 1}


def test_top_k_has_two_equal_forms(monkeypatch):
    """ On a CPU the softmax is over k values, elsewhere and compiled over the whole vocabulary. """
    logits = torch.randn(1000, 300, generator=torch.Generator().manual_seed(1))
    random_numbers = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    settings = dict(top_k=20, top_p=0.9, min_p=0.05)
    samples = sample_token(logits, random_numbers, **settings)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    assert torch.equal(samples, sample_token(logits, random_numbers, **settings))


@pytest.mark.parametrize('logits, number, temperature, expected', [
    pytest.param([1.0, 3.0, 2.0], 0.0, 0, 1, id='temperature 0'),
    pytest.param([1.0, 3.0, 2.0], 0.0, 1e-39, 1, id='temperature that would overflow'),
    pytest.param([-math.inf, 1.0, -math.inf, 1.0, -math.inf], 0.0, 1, 3, id='first number'),
    pytest.param([-math.inf, 1.0, -math.inf, 1.0, -math.inf], 1 - 2**-24, 1, 1, id='last number'),
])
def test_extreme_temperatures_and_random_numbers(logits, number, temperature, expected):
    token = sample_token(torch.tensor([logits]), torch.tensor([number]), temperature)
    assert token.item() == expected


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

# -----------------------------------------------------------------------------
# from prompts to texts


@pytest.mark.parametrize('start, expected', [
    ('the: cat', ['the: cat']),
    ('FILE:a.txt', ['the cat\n']),
    ('FILES:?.txt', ['the cat\n', 'the cat\na\n\n€']),
    ('LINES:b.txt', ['the cat', 'a', '€']),
    ('-', ['typed\n']),
    ('FILE:nowhere.txt', 'no file nowhere.txt'),
    ('LINES:latin.data', 'latin.data is not in UTF-8'),
    ('FILES:nothing*', 'no prompts'),
    ('LINES:empty.data', 'no prompts'),
])
def test_read_prompts(tmp_path, monkeypatch, start, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('typed\n'))
    (tmp_path / 'a.txt').write_text('the cat\n')
    (tmp_path / 'b.txt').write_text('the cat\na\n\n€', encoding='utf-8')
    (tmp_path / 'latin.data').write_bytes('é'.encode('latin-1'))
    (tmp_path / 'empty.data').write_text('\n\n')
    if type(expected) is list:
        assert read_prompts(start) == expected
    else:
        with pytest.raises(UserError, match=expected):
            read_prompts(start)


@pytest.mark.parametrize('stop, max_new_tokens, expected, num_tokens', [
    pytest.param('', 10, 'ab€ 1\n\n2', 10, id='no stop'),
    pytest.param('\n\n', 10, 'ab€ 1', 9, id='two characters'),
    pytest.param('€', 10, 'ab', 5, id='three tokens'),
    pytest.param('\n2', 10, 'ab€ 1\n', 10, id='its beginning stands before it'),
    pytest.param('\n\n', 8, 'ab€ 1\n', 8, id='half a stop string at the end'),
])
@pytest.mark.parametrize('stream', [True, False], ids=['stream', 'no stream'])
def test_stop(capsys, stop, max_new_tokens, expected, num_tokens, stream):
    tokenizer = ByteTokenizer()
    scripted = iter(tokenizer.encode('ab€ 1\n\n2'))
    model = make_gpt(vocab_size=256)
    model.forward = lambda idx, cache: (F.one_hot(torch.tensor([[next(scripted)]]), 256), None)
    completions, seconds = complete(model, tokenizer, [tokenizer.encode('> ')],
                                    torch.zeros(1, max_new_tokens), stop, stream, temperature=0)
    assert completions[0].text == expected
    assert completions[0].num_tokens == num_tokens
    assert seconds > 0
    assert capsys.readouterr().out == (expected + '\n' if stream else '')


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
    ('a€\n', '', 'a€\n'),
    ('xaa', 'aab', 'x'),
    ('xa', 'aab', 'x'),
    ('xab', 'aab', 'xab'),
])
def test_printable_part_of_an_unfinished_text(text, stop, expected):
    assert printable_part(text, stop) == expected


def test_samples_that_fit():
    config = GPTConfig()
    model = types.SimpleNamespace(config=config)
    decoder = types.SimpleNamespace(cache_size=lambda n: 4 * n)
    cache = 2 * config.n_layer * config.n_embd * 100 * 4  # bytes, of 100 tokens
    assert 0.3 * 10**9 / cache < samples_that_fit(model, 100, 10**9) < 10**9 / cache
    assert samples_that_fit(model, 100, 10**9, decoder) < 10**9 / (5 * cache)
    assert samples_that_fit(model, 100, 0) == 1
    longest = samples_that_fit(model, config.block_size, 10**9)
    assert samples_that_fit(model, 10**9, 10**9) == longest < 10


def test_batches_have_prompts_of_one_length():
    model = make_gpt()
    prompts = [[1] * length for length in (20, 3, 40, 3, 20)]
    assert group_into_batches(model, prompts, 10, memory=10**9) == [[0, 4], [1, 3], [2]]
    assert group_into_batches(model, prompts, 10, memory=0) == [[0], [4], [1], [3], [2]]

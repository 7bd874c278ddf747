""" Decoding, against the uncached forward pass, closed forms, transformers, and float32. """
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from decode import LightLinear, complete, draw, fitting, lighten, next_tokens, settled
from machine import has_fbgemm
from model import GPT, GPTConfig

FLAGS = [dict(), dict(bias=True), dict(gelu='tanh'), dict(rotary=True), dict(rmsnorm=True),
         dict(qk_norm=True), dict(untied=True), dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)]


def make(seed=0, scale=40, **flags):
    """ A small GPT with weights so large that what it says does not repeat. """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=24, vocab_size=40, n_layer=3, n_head=2, n_embd=16, bias=False),
                             **flags})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(scale if '.h.' in name else 5) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def by_hand(model, ids, n, past_block='exact'):
    """ The greedy continuation of a list of ids, all read anew for each token -> the n new ids. """
    ids, first, size = list(ids), 0, model.config.block_size
    for _ in range(n):
        if len(ids) - first > size:
            first = len(ids) - (size if past_block == 'exact' else (size + 1) // 2)
        logits, _ = model(torch.tensor([ids[first:]]), torch.zeros(1, len(ids) - first, dtype=torch.long))
        ids.append(int(logits[0, -1].argmax()))
    return ids[-n:]


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole(flags):
    model = make(**flags)
    idx = torch.randint(40, (2, 24))
    whole, _ = model(idx, idx)
    cache = model.new_cache(24)
    for end in (9, *range(10, 25)):
        logits, _ = model(idx[:, cache[0].length:end], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[:, end - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@pytest.mark.parametrize('seed', range(5))
@torch.no_grad()
def test_greedy_with_the_cache_is_greedy_without(seed, flags):
    model, prompt = make(seed, **flags), [3, 1, 4, 1, 5]
    expected = by_hand(model, prompt, 40)
    for cached in (True, False):
        out = model.generate(torch.tensor([prompt] * 2), 40, temperature=0, cached=cached)
        assert out[0].tolist() == out[1].tolist() == prompt + expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@pytest.mark.parametrize('shape', [dict(), dict(block_size=25, n_layer=1)], ids=str)
@torch.no_grad()
def test_prompts_of_different_lengths_in_one_batch(flags, shape):
    model = make(**flags, **shape)
    prompts = [[7], [1, 2, 3], list(range(20)), list(range(39, 1, -1))]
    texts, counts, _ = complete(model, lambda ids: ''.join(chr(65 + i) for i in ids), prompts,
                                torch.zeros(4, 30), temperature=0, past_block='exact')
    for prompt, text, count in zip(prompts, texts, counts):
        assert text == ''.join(chr(65 + i) for i in by_hand(model, prompt, 30)) and count == 30
    for cached in (True, False):  # padding makes equals of these
        out = model.generate(torch.tensor([[7, 7, 7]] * 3), 40, temperature=0, pad=torch.tensor([2, 1, 0]),
                             cached=cached)
        assert [row[3:] for row in out.tolist()] == [by_hand(model, [7] * n, 40) for n in (1, 2, 3)]
    prompts = torch.tensor([prompts[2], prompts[2][::-1]])
    for past_block in ('exact', 'half'):
        out = model.generate(prompts, 30, temperature=0, past_block=past_block)
        for row in out.tolist():
            assert row[20:] == by_hand(model, row[:20], 30, past_block)


@torch.no_grad()
def test_the_rolling_window_is_attention_over_the_last_keys():
    flags = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)
    model, size = make(**flags), 24
    out = model.generate(torch.tensor([[1, 2, 3], [5, 6, 7]]), 60, temperature=0, past_block='roll',
                         pad=torch.tensor([0, 2]))
    assert len(model.cos) == 63  # angles of all positions
    longer = GPT(GPTConfig(**{**vars(model.config), 'block_size': 63})).eval()
    longer.load_state_dict(model.state_dict())
    band = torch.ones(63, 63, dtype=torch.bool).tril().triu(1 - size)  # each reads `size` keys, itself too
    plain = F.scaled_dot_product_attention

    def banded(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0):
        assert is_causal
        return plain(q, k, v, attn_mask=band[:q.shape[2], :q.shape[2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', banded)
        for row, first in zip(out, (0, 2)):
            ids = row[None, first:-1]
            logits, _ = longer(ids, ids) if ids.shape[1] > 1 else (None, None)
            assert logits[0, 2 - first:].argmax(-1).tolist() == row[3:].tolist()


def test_what_was_left_out_stays_out_where_sums_are_not_in_order(monkeypatch):
    """ A GPU adds in parallel, so that a sum may rise where nothing was added. """
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, 'cumsum',
                        lambda x, dim: cumsum(x, dim) - 1e-3 * (torch.arange(x.shape[1]) == 1))
    logits = torch.tensor([[2.0, 1.0, -9.0, 3.0]])  # all but the second and third are left out
    uniforms = torch.linspace(0, 1, 4001)[:-1]
    drawn = draw(logits.expand(4000, -1), uniforms, min_p=0.3)
    assert set(drawn.tolist()) == {0, 3}


@torch.no_grad()
def test_a_sample_alone_is_the_sample_in_a_batch():
    model = make(block_size=64)
    uniforms = torch.rand(10, 50)
    prompt = torch.tensor([[1, 2, 3]])
    settings = dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    together = model.generate(prompt.expand(10, -1), 50, uniforms=uniforms, **settings)
    assert len({tuple(row) for row in together.tolist()}) == 10
    for b in range(10):
        alone = model.generate(prompt, 50, uniforms=uniforms[b:b + 1], **settings)
        assert alone[0].tolist() == together[b].tolist()


@pytest.mark.parametrize('flags, past_block', [(FLAGS[0], 'exact'), (FLAGS[-1], 'half')], ids=str)
def test_a_compiled_model_is_one_graph_at_any_length(flags, past_block):
    model, uniforms = make(**flags), torch.rand(2, 40)
    prompts = [torch.randint(40, (2, T)) for T in (3, 9)]
    settings = dict(temperature=0.9, uniforms=uniforms, past_block=past_block)
    expected = [model.generate(prompt, 40, **settings) for prompt in prompts]
    torch._dynamo.reset()
    model.compile(backend='eager', fullgraph=True)  # that what is left out of a graph is an error
    for prompt, out in zip(prompts, expected):
        assert model.generate(prompt, 40, **settings).tolist() == out.tolist()


def closed_form(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """ The probabilities of draw() in plain Python, logits and result lists. """
    p = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    if top_k:
        least = sorted(p.values(), reverse=True)[min(top_k, len(p)) - 1]
        p = {i: x for i, x in p.items() if x >= least}
    p = {i: x / sum(p.values()) for i, x in p.items()}
    kept, total = {}, 0.0
    for i, x in sorted(p.items(), key=lambda pair: -pair[1]):
        if total < top_p:
            kept[i] = x
        total += x
    kept = {i: x for i, x in kept.items() if x >= min_p * max(kept.values())}
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


@pytest.mark.parametrize('settings', [
    dict(), dict(temperature=0.7), dict(temperature=1.6), dict(top_k=7), dict(top_k=1000), dict(top_p=0.8),
    dict(min_p=0.1), dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05), dict(top_p=1e-6)], ids=str)
def test_20000_draws_have_the_distribution_of_the_closed_form(settings):
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(2))
    drawn = draw(logits.expand(20000, -1), uniforms, **settings)
    counts = np.bincount(drawn, minlength=30)
    expected = 20000 * np.array(closed_form(logits.tolist(), **settings))
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    n = some.sum() - 1
    chi2 = ((counts - expected)[some] ** 2 / expected[some]).sum()
    assert chi2 < n + 4 * math.sqrt(2 * n) + 4  # four standard deviations


def test_equals_of_the_last_of_top_k_stay():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    uniforms = torch.linspace(0, 0.999, 500)
    assert set(draw(logits.expand(500, -1), uniforms, top_k=2).tolist()) == {0, 1, 2, 3}
    assert set(draw(logits.expand(500, -1), uniforms, top_k=4).tolist()) == {0, 1, 2, 3}
    both = torch.stack((logits[0], torch.tensor([3.0, 2.0, 1.9, 1.8, 1.0])))
    both = draw(both, torch.zeros(2), top_k=2)  # equals in a row change nothing in another
    assert both.tolist() == [3, 1]


def test_logits_that_are_not_finite():
    with pytest.raises(ValueError, match='not finite'):
        draw(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), torch.zeros(2))
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert draw(logits, torch.zeros(1), temperature=1e-39).item() == 1


@torch.no_grad()
def test_more_tokens_than_the_model_knows_are_refused():
    for flags in (dict(), dict(rotary=True)):
        model = make(**flags)
        cache = model.new_cache(100)
        for _ in range(24):
            model(torch.tensor([[1]]), cache=cache)
        with pytest.raises(ValueError, match='25 tokens are more than block_size=24'):
            model(torch.tensor([[1]]), cache=cache)


def test_the_ends_of_the_uniforms():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -math.inf]])
    assert draw(logits, torch.tensor([0.0])).item() == 3
    assert draw(logits, torch.tensor([1 - 2**-24])).item() == 1


@torch.no_grad()
def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    model, ids = make(block_size=64), [4, 9, 9, 2]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    for _ in range(30):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(theirs(torch.tensor([ids]), logits[:, -1]).argmax()))
    ours = model.generate(torch.tensor([ids[:4]]), 30, temperature=0, repetition_penalty=1.7)
    assert ours[0].tolist() == ids
    padded = next_tokens(model, torch.tensor([[4, 4, *ids[:4]]]), 30, temperature=0, repetition_penalty=1.7,
                         pad=torch.tensor([2]))
    assert [int(t) for t in padded] == ids[4:]


def test_repetition_penalty_of_logits_below_zero():
    """ Most of GPT-2's are. """
    model, logits = make(), torch.tensor([[[-1.0, -1.5, -4.0]]])
    model.forward = lambda idx, cache=None, pad=None: (logits, None)
    settings = dict(temperature=0, repetition_penalty=1.7, cached=False)
    assert [int(t) for t in next_tokens(model, torch.tensor([[2]]), 3, **settings)] == [0, 1, 0]
    logits = -logits  # and above: 1.0, 1.5, 4.0, and 4.0 / 1.7
    assert [int(t) for t in next_tokens(model, torch.tensor([[2]]), 2, **settings)] == [2, 2]


@pytest.mark.parametrize('dtype, int8, native, within', [
    (torch.float16, False, False, 1e-5), (torch.float16, False, True, 1e-2),
    (torch.bfloat16, False, False, 1e-2), (torch.float16, True, False, 1e-2)], ids=str)
@torch.no_grad()
def test_light_weights_give_nearly_the_same_logits(dtype, int8, native, within, monkeypatch):
    monkeypatch.setattr('decode.has_bfloat16', lambda: native)
    if int8 and not has_fbgemm('cpu'):
        pytest.skip('no kernel on this CPU')
    model, light = (make(scale=5, n_embd=128, block_size=40, bias=True) for _ in '12')
    lighten(light, dtype, int8)
    idx = torch.randint(40, (4, 40))
    for end in (1, 2, 20, 40):  # a token, a token more, and, anew, prompts
        if end != 2:
            caches = model.new_cache(40), light.new_cache(40)
        both = [F.log_softmax(m(idx[:, c[0].length:end], cache=c)[0].float(), -1)
                for m, c in zip((model, light), caches)]
        kl = F.kl_div(both[1], both[0], log_target=True, reduction='sum') / 4
        assert 0 < abs(kl) < within, kl


def test_layers_of_ones_own_stay_as_they_are():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    model = make()
    model.lm_head.__class__ = Doubled
    expected = model(torch.arange(9)[None])[0]
    lighten(model, torch.float32)
    assert type(model.lm_head) is Doubled and type(model.transformer.h[0].mlp.c_fc) is not torch.nn.Linear
    torch.testing.assert_close(model(torch.arange(9)[None])[0], expected)


def test_a_forward_that_knows_no_cache_can_generate():
    class Old(GPT):
        def forward(self, idx, targets=None):
            return super().forward(idx, targets)
    model = make()
    expected = model.generate(torch.arange(3)[None], 30, temperature=0)
    model.__class__ = Old
    assert torch.equal(model.generate(torch.arange(3)[None], 30, temperature=0, cached=False), expected)


@pytest.mark.skipif(not has_fbgemm('cpu'), reason='no kernel on this CPU')
@pytest.mark.parametrize('T', [2, 40])
def test_a_prompt_is_in_16_bits_with_int8(T):
    """ In 8, the first token's outliers would leave the others nothing of their range. """
    linear, x = torch.nn.Linear(128, 16), torch.randn(1, T, 128)
    x[0, 0] *= 1000
    light = LightLinear(linear, torch.float16, int8=True)
    torch.testing.assert_close(light(x)[0, 1:].float(), linear(x)[0, 1:], atol=0.03, rtol=0.03)


def test_as_many_samples_as_memory_holds():
    config = GPTConfig()
    model, cache = types.SimpleNamespace(config=config), 2 * config.n_layer * config.n_embd * 100 * 4  # bytes
    assert 0.3 * 10**9 / cache < fitting(model, 100, 10**9) < 10**9 / cache
    assert fitting(model, 10**9, 10**9) == fitting(model, config.block_size, 10**9) < 10
    assert fitting(model, 100, 0) == 1


def test_what_an_unfinished_text_may_show():
    assert settled('a€'.encode()[:-1].decode(errors='replace'), '') == 'a'
    assert settled('a€', '') == 'a€'
    assert settled('xaa', 'aab') == settled('xa', 'aab') == 'x' and settled('xab', 'aab') == 'xab'
    assert settled('one\n', '\n\n') == 'one' and settled('one\n', '') == 'one\n'


@torch.no_grad()
def test_stop_and_characters_of_several_tokens(capsys):
    model = make(vocab_size=256, block_size=64)
    model.forward = lambda idx, cache=None, pad=None: (script(idx), None)  # says what is written here
    text = 'ab€ 1\n\n2'.encode()

    def script(idx):
        at[0] += 1
        return F.one_hot(torch.tensor([[text[at[0] % len(text)]]] * len(idx)), 256).float()
    decode = lambda ids: bytes(ids).decode(errors='replace')
    for stop, expected, count in (('', text.decode(), len(text)), ('\n\n', 'ab€ 1', 9), ('€', 'ab', 5),
                                  ('\n\n', 'ab€ 1\n', 8)):  # half of a stop is all that comes
        at, most = [-1], min(len(text), count if expected.endswith('\n') else len(text))
        texts, counts, seconds = complete(model, decode, [list(b'> ')], torch.zeros(1, most), stop,
                                          show=True, temperature=0, cached=False)
        assert texts == [expected] and counts == [count] and seconds > 0
        assert capsys.readouterr().out == expected + '\n'

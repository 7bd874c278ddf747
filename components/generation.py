"""
Sampling from a model: tokens one after another for several prompts at once, and their text.

Not here: the KV cache (model.py), static shapes for a GPU or torch.compile (static_decoding.py),
int8 and 16-bit weights (quantization.py), settings (sample.py).
"""
import glob
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from components.errors import UserError

NON_FINITE_LOGITS = ('non-finite logits (NaN or inf); set --dtype=float32, which has the widest '
                     'range')

# -----------------------------------------------------------------------------
# the sampling loop

@torch.no_grad()
def next_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, top_p=1.0,
                min_p=0.0, repetition_penalty=1.0, random_numbers=None, pad=None,
                past_block='exact', cached=True, decoder=None):
    """
    Continues each prompt by one token after another.

    Args:
        idx: int64 (B, T), the prompts
        temperature, top_k, top_p, min_p: as in sample_token()
        vocab_size: samples ids below it; None: all ids of the model
        repetition_penalty: as in penalize_repetition(); 1.0 is off
        random_numbers: (B, max_new_tokens) in [0, 1), which decide the samples; None: from torch
        pad: int64 (B,), the number of padding tokens that each prompt begins with. They must be
            copies of its first token, so that they change nothing in the repetition penalty
        past_block: what the model reads past block_size tokens, 'exact' or 'half'; see Context
        cached: False computes every token without a KV cache, for a model whose forward() takes
            only (idx, targets)
        decoder: a StaticDecoder of the model, which samples all tokens for which there is a cache,
            without a synchronization; None: without static shapes

    Yields:
        int64 (B,), max_new_tokens times. Where `decoder` has non-finite logits, the token is -1;
        read_tokens() raises the error

    Raises:
        UserError: the logits are not finite
    """
    B, T = idx.shape
    if random_numbers is None:
        random_numbers = torch.rand(B, max_new_tokens, device=idx.device)
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    settings = dict(vocab_size=vocab_size, repetition_penalty=repetition_penalty, filters=filters)
    tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)      # (B, T + max_new)
    context = Context(model, T, max_new_tokens, pad, past_block, cached)
    decoder_is_ready = False
    for n in range(T, T + max_new_tokens):
        numbers = random_numbers[:, n - T]                                  # (B,)
        if decoder_is_ready and not context.must_move(n):
            tokens[:, n] = decoder.next_token(numbers)
        else:
            if decoder_is_ready:  # what follows reads the decoder's tokens
                raise_if_non_finite(tokens[:, T:n].min())
            logits = context.next_logits(tokens[:, :n])                     # (B, vocab_size)
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, tokens[:, :n], repetition_penalty)
            tokens[:, n] = sample_token(logits[:, :vocab_size], numbers, **filters)
            is_in_cache = context.cache is not None and not context.must_move(n + 1)
            decoder_is_ready = decoder is not None and is_in_cache
            if decoder_is_ready:
                decoder.start(tokens[:, :n + 1], context.cache, context.cache_size,
                              context.remaining_pad(), settings)
        yield tokens[:, n]


def raise_if_non_finite(token):
    """ Raises UserError at a token of -1, which a decoder samples from non-finite logits. """
    if token == -1:
        raise UserError(NON_FINITE_LOGITS)


class Context:
    """
    The tokens that the model reads: from `first` on, at most block_size, for most of which the KV
    cache has the keys and values. Past block_size, `first` moves forward and the cache is emptied:

    'exact' reads the last block_size tokens. They are recomputed for every token, as each of them
        moves to another position.
    'half' moves by half a block, and then goes on with a cache. The model reads between a half and
        a whole block, with one recomputation for every half block.
    """

    def __init__(self, model, T, max_new_tokens, pad, past_block, cached):
        assert past_block in ('exact', 'half')
        self.model = model
        self.block_size = model.config.block_size
        self.past_block = past_block
        self.cached = cached
        self.pad = pad
        self.max_pad = 0 if pad is None else int(pad.max())
        self.first = max(0, T - self.block_size)
        self.cache_size = min(T + max_new_tokens, self.block_size)
        self.cache = None
        if cached:
            self.cache = model.new_cache(self.cache_size)

    def next_logits(self, tokens):
        """ The logits of the token that follows `tokens` (B, n) -> float32 (B, vocab_size). """
        n = tokens.shape[1]
        if self.must_move(n):
            self.move(n)
        start = self.first
        if self.cache is not None:
            start += self.cache[0].length
        return last_logits(self.model, tokens[:, start:], self.cache, self.remaining_pad())

    def must_move(self, n):
        """ Whether `n` tokens are more than the model reads from `first` on. """
        return n - self.first > self.block_size

    def remaining_pad(self):
        """ The padding from `first` on, int64 (B,), or None if no row has any. """
        if self.max_pad <= self.first:
            return None
        return (self.pad - self.first).clamp(min=0)                         # (B,)

    def move(self, n):
        """ Moves forward after `n` tokens. """
        if self.past_block == 'exact':
            self.first = n - self.block_size
            self.cache = None
        else:
            self.first = n - (self.block_size + 1) // 2
            if self.cached:
                self.cache = self.model.new_cache(self.cache_size)


def last_logits(model, idx, cache, pad):
    """
    The logits that follow idx (B, T) -> float32 (B, vocab_size). Equal prompts are computed once.
    """
    B, T = idx.shape
    options = {}  # without a cache and padding, any forward(idx, targets) can be sampled from
    if cache is not None or pad is not None:
        options = dict(cache=cache, pad=pad)
    rows_are_equal = False
    if B > 1 and T > 1 and pad is None:  # only for prompts, as comparing makes a GPU wait
        rows_are_equal = bool((idx == idx[:1]).all())
    if rows_are_equal:
        logits, _ = model(idx[:1], **options)                               # (1, 1, vocab_size)
        logits = logits.expand(B, -1, -1)
        for layer_cache in cache or ():
            layer_cache.repeat(B)
    else:
        logits, _ = model(idx, **options)                                   # (B, 1, vocab_size)
    return logits[:, -1].float()

# -----------------------------------------------------------------------------
# from logits to a token

def penalize_repetition(logits, tokens, penalty):
    """
    Makes the tokens that a row already has less likely, by penalize().

    logits (B, vocab_size), tokens (B, n) -> (B, vocab_size)
    """
    seen = penalize(logits.gather(1, tokens), penalty)                      # (B, n)
    return logits.scatter(1, tokens, seen)


def penalize(logits, penalty):
    """
    Divides logits above 0 by `penalty` and multiplies those below 0 (CTRL, arXiv 1909.05858; the
    form of transformers).
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def sample_token(logits, random_numbers, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """ sample_from_finite_logits(). Raises UserError if the logits (B, V) are not finite. """
    if not logits.amax(dim=-1).isfinite().all():
        raise UserError(NON_FINITE_LOGITS)
    return sample_from_finite_logits(logits, random_numbers, temperature, top_k, top_p, min_p)


def sample_from_finite_logits(logits, random_numbers, temperature=1.0, top_k=None, top_p=1.0,
                              min_p=0.0, static_shapes=False):
    """
    Samples one token for each row of logits (B, V) from the softmax of logits / temperature, after
    three filters in this order: top_k, top_p, min_p.

    Args:
        random_numbers: (B,) in [0, 1), which decide the samples
        temperature: below 1e-5, the most likely token is taken
        top_k: keeps so many of the most likely tokens; 0 or None keeps all
        top_p: as in filter_top_p(); 1.0 is off
        min_p: as in filter_min_p(); 0.0 is off
        static_shapes: whether all shapes are the same for any logits

    Returns:
        int64 (B,); any token below V where the logits are not finite
    """
    if temperature < 1e-5:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    k = logits.shape[-1]
    ids = None
    if top_k and top_k < k:
        k = top_k
        logits, ids = filter_top_k(logits, k, static_shapes)
    probs = F.softmax(logits, dim=-1)                                       # (B, k or V)
    if top_p < 1:
        probs = filter_top_p(probs, top_p, k)
    if min_p > 0:
        probs = filter_min_p(probs, min_p)
    index = sample_index(probs, random_numbers)                             # (B, 1)
    if ids is not None:
        index = ids.gather(1, index)
    return index.squeeze(1)


def filter_top_k(logits, k, static_shapes=False):
    """
    Keeps the k largest of each row of logits (B, V), and all that are equal to the k-th.

    Returns:
        (B, k) and their ids (B, k) in ascending order, or (B, V) with -inf for the others and None
    """
    values, ids = logits.topk(k + 1)                                        # (B, k + 1), descending
    kth = values[:, k - 1:k]                                                # (B, 1)
    may_shrink = logits.device.type == 'cpu' and not static_shapes
    if may_shrink and (values[:, k:] < kth).all():
        # the softmax of k values instead of the whole vocabulary: half the time of sample_token()
        # with GPT-2's vocabulary, a tenth of the time of a token of a small model
        ids, order = ids[:, :k].sort()                                      # (B, k)
        return values.gather(1, order), ids
    return logits.masked_fill(logits < kth, -math.inf), None


def filter_top_p(probs, top_p, k):
    """
    Keeps the fewest most likely tokens whose probabilities sum to `top_p` (nucleus sampling, arXiv
    1904.09751), and all that are as likely as the last of them: probs (B, n) -> (B, n). The result
    does not sum to 1. Only the `k` largest are ranked.
    """
    ranked = probs.topk(k).values                                           # (B, k), descending
    sum_before = ranked.cumsum(dim=-1) - ranked
    is_kept = sum_before < top_p
    smallest_kept = ranked.masked_fill(~is_kept, 1).amin(dim=-1, keepdim=True)  # (B, 1)
    return probs.masked_fill(probs < smallest_kept, 0)


def filter_min_p(probs, min_p):
    """
    Keeps the tokens with at least `min_p` times the probability of the most likely one (arXiv
    2407.01082): probs (B, n) -> (B, n). The result does not sum to 1.
    """
    threshold = min_p * probs.amax(dim=-1, keepdim=True)                    # (B, 1)
    return probs.masked_fill(probs < threshold, 0)


def sample_index(probs, random_numbers):
    """
    Samples from probs (B, n) by the inverse of the cumulative distribution -> index (B, 1). `probs`
    need not sum to 1.
    """
    cdf = probs.cumsum(dim=-1)                                              # (B, n)
    threshold = (1 - random_numbers)[:, None] * cdf[:, -1:]                 # (B, 1), above 0
    index = torch.searchsorted(cdf, threshold)                              # (B, 1)
    index = index.clamp(max=probs.shape[1] - 1)  # past the end where probs are NaN
    # a GPU sums in parallel, so its cdf may not be monotonic
    is_filtered = probs.gather(1, index) == 0
    most_likely = probs.argmax(dim=-1, keepdim=True)
    return torch.where(is_filtered, most_likely, index)

# -----------------------------------------------------------------------------
# from prompts to texts

def read_prompts(start):
    """ The prompts that the setting `start` names. Raises UserError if it names none. """
    if start == '-':
        return [sys.stdin.read()]
    kind, _, name = start.partition(':')
    if kind == 'FILE':
        return [read_prompt_file(name, start)]
    if kind == 'FILES':
        prompts = [read_prompt_file(path, start) for path in sorted(glob.glob(name))]
    elif kind == 'LINES':
        lines = read_prompt_file(name, start).split('\n')
        prompts = [line for line in lines if line]
    else:
        return [start]
    if not prompts:
        raise UserError(f'start={start}: no prompts found')
    return prompts


def read_prompt_file(path, start):
    """ The text of a file. Raises UserError if there is no such file, or it is not UTF-8. """
    try:
        return Path(path).read_text(encoding='utf-8')
    except FileNotFoundError:
        raise UserError(f'there is no file {path} (start={start})') from None
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not in UTF-8: {error}') from None


class Completion(NamedTuple):
    """ The continuation of a prompt. """
    text: str        # without the prompt, and without the stop string
    num_tokens: int  # sampled for it, those of the stop string included


def complete(model, tokenizer, prompts, random_numbers, stop='', stream=False, **settings):
    """
    Continues prompts in one batch, each until `stop` appears in its continuation or it has
    max_new_tokens.

    Args:
        prompts: lists of token ids
        random_numbers: (B, max_new_tokens) in [0, 1), a row for each prompt
        stop: '' for none
        stream: prints the continuation as it is sampled, of a single prompt. Otherwise a progress
            bar is shown in a terminal
        settings: those of next_tokens()

    Returns:
        a Completion for each prompt, and the seconds for all of them
    """
    assert len(prompts) == 1 or not stream
    device = model.transformer.wte.weight.device
    idx, pad = pad_prompts(prompts, device)
    samples = [Sample(tokenizer, prompt, stop) for prompt in prompts]
    max_new_tokens = random_numbers.shape[1]
    num_printed = 0
    begin = time.perf_counter()
    with torch.inference_mode():
        steps = next_tokens(model, idx, max_new_tokens, pad=pad,
                            random_numbers=random_numbers.to(device), **settings)
        disable = True if stream else None  # None: where stderr is not a terminal
        steps = tqdm(steps, total=max_new_tokens, unit='token', leave=False, disable=disable)
        one_by_one = stream or stop != ''
        for tokens in read_tokens(steps, one_by_one):
            for sample, token in zip(samples, tokens):
                sample.append(token)
            if stream:
                text = printable_part(samples[0].text(), stop)
                print(text[num_printed:], end='', flush=True)
                num_printed = max(num_printed, len(text))
            if all(sample.is_finished for sample in samples):
                break
    seconds = time.perf_counter() - begin
    completions = [Completion(sample.text(), len(sample.new_ids)) for sample in samples]
    if stream:
        print(completions[0].text[num_printed:])
    return completions, seconds


def read_tokens(steps, one_by_one):
    """
    The tokens (B,) of each step as lists, after each step or all after the last one. Reading waits
    for a GPU, which otherwise computes while later steps are submitted.

    Raises UserError at a token of non-finite logits.
    """
    if not one_by_one:
        steps = list(steps)
        if steps:
            steps = torch.stack(steps).cpu()                                # (max_new_tokens, B)
    for tokens in steps:
        ids = tokens.tolist()
        raise_if_non_finite(min(ids))
        yield ids


def pad_prompts(prompts, device):
    """
    Makes one batch of lists of ids, padded on the left with copies of their first id.

    Returns:
        int64 (B, T), and int64 (B,), the number of padding tokens of each row
    """
    T = max(len(prompt) for prompt in prompts)
    pad = [T - len(prompt) for prompt in prompts]
    rows = [prompt[:1] * n + prompt for prompt, n in zip(prompts, pad)]
    return torch.tensor(rows, device=device), torch.tensor(pad, device=device)


class Sample:
    """ A prompt and its continuation so far. """

    def __init__(self, tokenizer, prompt, stop):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.stop = stop
        self.new_ids = []
        self.is_finished = False  # whether `stop` has appeared

    def append(self, token):
        """ Adds a token, unless the continuation is finished. """
        if self.is_finished:
            return
        self.new_ids.append(token)
        if self.stop:
            # a token has at least one byte, and a character at most four
            last_ids = self.new_ids[-4 * len(self.stop) - 4:]
            self.is_finished = self.stop in self.tokenizer.decode(last_ids)

    def text(self):
        """ The continuation, up to `stop`. """
        # decoded with the prompt, as some tokenizers treat the beginning of a text differently
        prompt_text = self.tokenizer.decode(self.prompt)
        text = self.tokenizer.decode(self.prompt + self.new_ids)[len(prompt_text):]
        if self.stop:
            text, _, _ = text.partition(self.stop)
        return text


def printable_part(text, stop):
    """
    The part of an unfinished text that more tokens cannot change: without an incomplete character
    at its end, and without a beginning of `stop` at its end.
    """
    text = text.rstrip('\ufffd')
    for n in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:n]):
            return text[:-n]
    return text


def group_into_batches(model, prompts, max_new_tokens, memory, decoder=None):
    """
    Groups the samples of `prompts`, lists of ids, into batches that fit into `memory` bytes.
    `decoder` as in next_tokens().

    Samples that stay within block_size can be in one batch. Longer ones are batched with others of
    the same length only, because the longest row decides which tokens the model reads.

    Returns:
        lists of indices into `prompts`
    """
    groups = {}  # {length of the prompts, 0 if they stay within block_size: their indices}
    for i, prompt in enumerate(prompts):
        stays_within = len(prompt) + max_new_tokens <= model.config.block_size
        length = 0 if stays_within else len(prompt)
        groups.setdefault(length, []).append(i)

    batches = []
    for length in sorted(groups):
        indices = groups[length]
        longest = max(len(prompts[i]) for i in indices) + max_new_tokens
        batch_size = samples_that_fit(model, longest, memory, decoder)
        for start in range(0, len(indices), batch_size):
            batches.append(indices[start:start + batch_size])
    return batches


def samples_that_fit(model, n, memory, decoder=None):
    """ An estimate of how many samples of `n` tokens fit into `memory` bytes; at least 1. """
    config = model.config
    T = min(config.block_size, n)
    cache_size = T
    if decoder is not None:  # it has another cache
        cache_size += decoder.cache_size(T)
    cache = 2 * config.n_layer * cache_size * config.n_embd
    activations = 20 * T * config.n_embd
    logits = 8 * config.vocab_size
    bytes_per_sample = 4 * (cache + activations + logits)
    return max(1, int(memory / bytes_per_sample))

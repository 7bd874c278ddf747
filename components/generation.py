"""
Sampling from a model: the loop over tokens, the filters of their probabilities, and texts.

Not here: the KV cache (model.py), static shapes for a GPU or torch.compile (static_decoding.py),
int8 and 16-bit weights (quantization.py), settings (sample.py).
"""
import glob
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from components.errors import UserError

# -----------------------------------------------------------------------------
# the sampling loop

@torch.no_grad()
def next_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, top_p=1.0,
                min_p=0.0, random_numbers=None, past_block='exact', cached=True, decoder=None):
    """
    Continues each prompt by one token after another.

    Args:
        idx: int64 (B, T), the prompts
        temperature, top_k, top_p, min_p, vocab_size: as in sample_token()
        random_numbers: (B, max_new_tokens) in [0, 1), which decide the samples; None: from torch
        past_block: what the model reads past block_size tokens.
            'exact': the last block_size tokens. They are recomputed for every token, as each of
            them moves to another position
            'half': from half a block to a block, with a KV cache that is recomputed once for every
            half block
        cached: False computes every token without a KV cache
        decoder: a StaticDecoder of the model, which samples all tokens for which there is a cache,
            without a synchronization; None: without static shapes

    Yields:
        int64 (B,), max_new_tokens times. Where `decoder` has non-finite logits, the token is -1;
        read_tokens() raises the error

    Raises:
        UserError: the logits are not finite
    """
    assert past_block in ('exact', 'half')
    B, T = idx.shape
    block_size = model.config.block_size
    if random_numbers is None:
        random_numbers = torch.rand(B, max_new_tokens, device=idx.device)
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                    vocab_size=vocab_size)
    tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)      # (B, T + max_new)

    first = max(0, T - block_size)  # the model reads tokens[:, first:n] to sample tokens[:, n]
    num_kept = block_size if past_block == 'exact' else (block_size + 1) // 2
    cache_size = min(T + max_new_tokens, block_size)
    cache = model.new_cache(cache_size) if cached else None
    decoder_has_cache = False
    for n in range(T, T + max_new_tokens):
        if n - first > block_size:
            first = n - num_kept
            cache = None
            if cached and past_block == 'half':
                cache = model.new_cache(cache_size)
            decoder_has_cache = False

        numbers = random_numbers[:, n - T]                                  # (B,)
        num_in_cache = cache[0].length if cache else 0
        if decoder is not None and num_in_cache > 0:
            if not decoder_has_cache:
                decoder.start(tokens[:, n - 1], cache, settings)
                decoder_has_cache = True
            tokens[:, n] = decoder.next_token(numbers)
        else:
            unread = tokens[:, first + num_in_cache:n]
            options = {'cache': cache} if cache else {}  # any forward(idx) can be sampled from
            logits, _ = model(unread.clamp(min=0), **options)               # (B, 1, vocab_size)
            tokens[:, n] = sample_token(logits[:, -1].float(), numbers, **settings)
            raise_if_non_finite(tokens[:, n].min())
        yield tokens[:, n]


def raise_if_non_finite(token):
    """ Raises UserError at a token of -1, which sample_token() gives for non-finite logits. """
    if token == -1:
        raise UserError('non-finite logits (NaN or inf); set --dtype=float32, which has the widest '
                        'range')

# -----------------------------------------------------------------------------
# from logits to a token

def sample_token(logits, random_numbers, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0,
                 vocab_size=None):
    """
    Samples one token for each row of logits (B, V) from the softmax of logits / temperature, after
    three filters in this order: top_k, top_p, min_p.

    Args:
        random_numbers: (B,) in [0, 1), which decide the samples
        temperature: below 1e-5, the most likely token is taken
        top_k: keeps so many of the most likely tokens; 0 or None keeps all
        top_p: as in filter_top_p(); 1.0 is off
        min_p: as in filter_min_p(); 0.0 is off
        vocab_size: samples ids below it; None: all ids

    Returns:
        int64 (B,), -1 where the logits are not finite
    """
    logits = logits[:, :vocab_size]
    is_finite = logits.amax(dim=-1).isfinite()                              # (B,)
    if temperature < 1e-5:
        return logits.argmax(dim=-1).masked_fill(~is_finite, -1)

    logits = logits / temperature
    k = logits.shape[-1]
    ids = None
    if top_k and top_k < k:
        k = top_k
        logits, ids = filter_top_k(logits, k)
    probs = F.softmax(logits, dim=-1)                                       # (B, k or V)
    if top_p < 1:
        probs = filter_top_p(probs, top_p, k)
    if min_p > 0:
        probs = filter_min_p(probs, min_p)
    index = sample_index(probs, random_numbers)                             # (B, 1)
    if ids is not None:
        index = ids.gather(1, index)
    return index.squeeze(1).masked_fill(~is_finite, -1)


def filter_top_k(logits, k):
    """
    Keeps the k largest of each row of logits (B, V), and all that are equal to the k-th.

    Returns:
        (B, k) and their ids (B, k) in ascending order, or (B, V) with -inf for the others and None
    """
    values, ids = logits.topk(k + 1)                                        # (B, k + 1), descending
    kth = values[:, k - 1:k]                                                # (B, 1)
    may_shrink = logits.device.type == 'cpu' and not torch.compiler.is_compiling()
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


def complete(model, tokenizer, prompts, random_numbers, stop='', stream=False, **settings):
    """
    Continues prompts of the same length in one batch, each until `stop` appears in its continuation
    or it has max_new_tokens.

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
    idx = torch.tensor(prompts, device=device)                              # (B, T)
    completions = [Completion(tokenizer, prompt, stop) for prompt in prompts]
    max_new_tokens = random_numbers.shape[1]
    num_printed = 0
    begin = time.perf_counter()
    with torch.inference_mode():
        steps = next_tokens(model, idx, max_new_tokens, random_numbers=random_numbers.to(device),
                            **settings)
        if not stream:  # disable=None: only in a terminal
            steps = tqdm(steps, total=max_new_tokens, unit='token', leave=False, disable=None)
        for tokens in read_tokens(steps, one_by_one=stream or stop != ''):
            for completion, token in zip(completions, tokens):
                completion.append(token)
            if stream:
                text = printable_part(completions[0].text, stop)
                print(text[num_printed:], end='', flush=True)
                num_printed = max(num_printed, len(text))
            if all(completion.is_finished for completion in completions):
                break
    seconds = time.perf_counter() - begin
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


class Completion:
    """ The continuation of a prompt, a list of ids, until `stop` appears in it; '' for none. """

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

    @property
    def num_tokens(self):
        """ The number of sampled tokens, those of `stop` included. """
        return len(self.new_ids)

    @property
    def text(self):
        """ The text without the prompt, up to `stop`. """
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
    Groups `prompts`, lists of ids, into batches of the same length that fit into `memory` bytes.
    `decoder` as in next_tokens().

    Returns:
        lists of indices into `prompts`
    """
    groups = {}  # {length of the prompts: their indices}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(i)

    batches = []
    for length, indices in groups.items():
        batch_size = samples_that_fit(model, length + max_new_tokens, memory, decoder)
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

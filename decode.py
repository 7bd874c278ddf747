"""
Decoding: which token comes next, one after another, for many prompts at once, and with weights that are
quick to read.
"""
import glob
import math
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from machine import has_bfloat16, has_fbgemm


@torch.no_grad()
def next_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, top_p=1.0,
                min_p=0.0, repetition_penalty=1.0, uniforms=None, pad=None, past_block='exact', cached=True):
    """
    Draws token after token for the prompts idx (B, T), of which row b begins with pad[b] (None: 0)
    tokens of padding, copies of its first token, and yields them as they come, each (B,).

    temperature, top_k, top_p, min_p: those of draw(). `vocab_size`: only ids below it (None: all).
    `repetition_penalty` divides the logits above 0 of tokens that the row has (arXiv 1909.05858), and
    multiplies those below, as transformers does. `uniforms` (B, max_new_tokens) in [0, 1) decide the
    draws; None: torch's. `past_block` says what is read when there are more than block_size tokens.
    'exact': the last block_size, all anew for each token. 'half': they are read anew by halves of a block,
    so that between a half and a whole is read; the longest row says when. 'roll': the keys and values of
    the last block_size, which themselves have seen older ones; only with rotary positions, and cached.
    Without `cached` all is always anew.
    """
    assert past_block in ('exact', 'half') or past_block == 'roll' and model.config.rotary and cached
    (B, T), size = idx.shape, model.config.block_size
    most = 0 if pad is None else int(pad.max())
    if uniforms is None:
        uniforms = torch.rand(B, max_new_tokens, device=idx.device)
    tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
    begin, cache = max(0, T - size), None  # first token that is read; its KVCaches
    room = min(size, T + max_new_tokens)
    if past_block == 'roll' and T + max_new_tokens - begin > len(model.cos):
        model.register_rotations(T + max_new_tokens - begin)
    for n in range(T, T + max_new_tokens):
        full = n - begin > size
        if full and past_block != 'roll':
            begin = n - (size if past_block == 'exact' else (size + 1) // 2)
        if not cached or full and past_block == 'exact':
            cache = None
        elif cache is None or full and past_block == 'half':
            cache = model.new_cache(room)
        new = tokens[:, begin + (cache[0].length if cache else 0):n]        # (B, 1), or all of it
        left = (pad - begin).clamp(min=0) if most > begin else None         # (B,) padding still in sight
        alike = B > 1 and new.shape[1] > 1 and left is None and bool((new == new[:1]).all())
        options = {} if cache is None and left is None else dict(cache=cache, pad=left)  # {}: any forward
        logits, _ = model(new[:1] if alike else new, **options)             # (B or 1, 1, vocab_size)
        if alike:
            logits = logits.expand(B, -1, -1)
            for layer in cache or ():
                layer.repeat(B)
        logits = logits[:, -1].float()                                      # (B, all ids)
        if repetition_penalty != 1:
            had = logits.gather(1, tokens[:, :n])                           # (B, n)
            had = torch.where(had > 0, had / repetition_penalty, had * repetition_penalty)
            logits = logits.scatter(1, tokens[:, :n], had)
        tokens[:, n] = draw(logits[:, :vocab_size], uniforms[:, n - T], temperature, top_k, top_p, min_p)
        yield tokens[:, n]


def draw(logits, uniforms, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """
    One token for each row of logits (B, vocab_size), where 1 - `uniforms` (B,), in (0, 1], falls among
    the probabilities laid end to end -> (B,). Temperature 0 (below 1e-5) takes the likeliest. Three filters
    follow each other on the softmax of logits / temperature: `top_k` keeps so many of the likeliest (0 or
    None: all), `top_p` the fewest likeliest that hold this share of what is left (arXiv 1904.09751), both
    with all that tie with the last; `min_p` those with at least this share of the likeliest's probability
    (2407.01082). Raises ValueError where the logits are not finite.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError('the logits are not finite; --dtype=float32 has the widest range')
    if temperature < 1e-5:
        return logits.argmax(dim=-1)
    logits, ids = logits / temperature, None
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    if k < logits.shape[-1]:
        values, likely = logits.topk(k + 1)                                     # (B, k + 1) the largest first
        if logits.device.type == 'cpu' and (values[:, k] < values[:, k - 1]).all():
            ids, order = likely[:, :k].sort()                                   # (B, k) by id, as below
            logits = values.gather(1, order)
        else:
            logits = logits.masked_fill(logits < values[:, k - 1:k], -math.inf)
    probs = F.softmax(logits, dim=-1)                                           # (B, k or vocab_size)
    if top_p < 1:
        ranked = probs.topk(k).values                                           # (B, k) the largest first
        over = ranked.cumsum(dim=-1) - ranked >= top_p                          # enough without it
        probs = probs.masked_fill(probs < ranked.masked_fill(over, 1).amin(dim=-1, keepdim=True), 0)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    ends = probs.cumsum(dim=-1)
    drawn = torch.searchsorted(ends, (1 - uniforms)[:, None] * ends[:, -1:])    # (B, 1)
    left_out = probs.gather(1, drawn) == 0  # a GPU's cumsum can dip, and the search end at a 0
    drawn = torch.where(left_out, probs.argmax(dim=-1, keepdim=True), drawn)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)

# -----------------------------------------------------------------------------
# text

def read_prompts(start):
    """ The texts that the setting `start` names. Raises ValueError where there is none, or no UTF-8. """
    kind, _, name = start.partition(':')
    if start == '-':
        return [sys.stdin.read()]
    if kind not in ('FILE', 'FILES', 'LINES'):
        return [start]
    texts = []
    for path in sorted(glob.glob(name)) if kind == 'FILES' else [name]:
        try:
            texts.append(Path(path).read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise ValueError(f'there is no file {path} of start={start}') from None
        except UnicodeDecodeError as error:
            raise ValueError(f'{path} is not in UTF-8: {error}') from None
    if kind == 'LINES':
        texts = [line for line in texts[0].split('\n') if line]
    if not texts:
        raise ValueError(f'start={start} names no prompts')
    return texts


def complete(model, decode, prompts, uniforms, stop='', show=False, **settings):
    """
    Continues `prompts`, lists of ids, until each has `stop` in its text ('': never) or
    max_new_tokens -> the texts that were added, without `stop`; how many tokens each took; the seconds
    for all. `decode` makes text of ids; `uniforms` (B, max_new_tokens) and `settings` are those of
    next_tokens(). With `show`, for one prompt alone, the text is printed as it comes; without it a terminal
    shows a bar.
    """
    device, longest = model.transformer.wte.weight.device, max(map(len, prompts))
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    idx = torch.tensor([ids[:1] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    new, running, shown = [[] for _ in prompts], set(range(len(prompts))), 0
    tail = 4 * len(stop) + 4  # the last tokens that `stop` can be in, if each is a byte

    def added(b):
        text = decode(prompts[b] + new[b])[len(decode(prompts[b])):]
        return text.partition(stop)[0] if stop else text

    begin = time.perf_counter()
    with torch.inference_mode():
        steps = next_tokens(model, idx, uniforms.shape[1], pad=pad, uniforms=uniforms.to(device), **settings)
        for tokens in tqdm(steps, total=uniforms.shape[1], unit='token', leave=False, disable=show or None):
            tokens = tokens.tolist()
            for b in list(running):
                new[b].append(tokens[b])
                if stop and stop in decode(new[b][-tail:]):
                    running.remove(b)
            if show:
                text = settled(added(0), stop)
                print(text[shown:], end='', flush=True)
                shown = max(shown, len(text))
            if not running:
                break
    seconds = time.perf_counter() - begin
    texts = [added(b) for b in range(len(prompts))]
    if show:
        print(texts[0][shown:])
    return texts, [len(ids) for ids in new], seconds


def fitting(model, n, memory):
    """ How many samples of `n` tokens fit into `memory` bytes, about; 1 at least. """
    c = model.config
    floats = min(c.block_size, n) * c.n_embd * (2 * c.n_layer + 20) + 8 * c.vocab_size  # cache, activations
    return max(1, int(memory / 4 / floats))


def settled(text, stop):
    """ The part of an unfinished text that stays: not half a character at its end, nor half a `stop`. """
    text = text.rstrip('\ufffd')
    half = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
    return text[:len(text) - half]

# -----------------------------------------------------------------------------
# light weights

class LightLinear(nn.Module):
    """
    A Linear that only computes. A new token needs every weight once, so it takes as long as they take to
    read: here from 16 bits, or 8, multiplied in float32 where the device is a CPU with FBGEMM. Long prompts
    take as long as the products: in bfloat16 where that CPU has it, else in float32, from a copy in 16 bits.

    With `int8` a row's weights are whole numbers times the row's largest / 127, and what they are multiplied
    with is rounded too, to 7 bits of the batch's range: 8 overflow without VNNI. This is for a token at a
    time, and of a longer prompt for what its last token alone needs; the rest of it is in 16 bits, as its
    first token has outliers that would cost the others precision.
    """

    def __init__(self, linear, dtype, int8=False):
        super().__init__()
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        fbgemm = has_fbgemm(weight.device.type) and (int8 or dtype == torch.float16)
        self.int8, self.float16 = None, None
        if int8:
            scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-9)            # (out,)
            zero = torch.zeros(len(weight), dtype=torch.long)
            with warnings.catch_warnings(action='ignore'):  # that these tensors may leave torch one day
                rounded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self.int8 = torch.ops.quantized.linear_prepack(rounded, bias)
        if fbgemm and not (int8 and has_bfloat16()):
            self.float16 = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.dtype = (torch.bfloat16 if has_bfloat16() else torch.float32) if fbgemm else dtype
        self.weight = weight.to(torch.float16 if fbgemm and not has_bfloat16() else self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def forward(self, x):
        if self.int8 is not None and x.shape[1] == 1:
            return torch.ops.quantized.linear_dynamic(x.float(), self.int8, True)  # True: 7 bits of x
        if self.float16 is not None and x.shape[1] < 32:
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.float16)
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype), self.bias)


def lighten(model, dtype, int8=False):
    """ Puts a LightLinear in the place of every Linear of `model`, which then can only compute. """
    for name, child in model.named_children():
        if type(child) is nn.Linear:  # a subclass computes something of its own
            setattr(model, name, LightLinear(child, dtype, int8))
        else:
            lighten(child, dtype, int8)

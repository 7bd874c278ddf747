"""
The GPT: its definition, its key-value cache, its weights from GPT-2, its parameter groups.

Papers: GPT-2, Radford and others 2019; the attention, arXiv 1706.03762; GELU, arXiv 1606.08415;
AdamW, arXiv 1711.05101; counting FLOPs, PaLM, arXiv 2204.02311, appendix B.

Not here: data, checkpoints, the device, the update, the training loop (bins.py, checkpoint.py, machine.py,
update.py, train.py).
"""
import logging
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
RMS_EPS = 1e-6  # of every RMSNorm here

# -----------------------------------------------------------------------------
# the model

@dataclass
class GPTConfig:
    """ The shape of a GPT; the defaults are GPT-2 (124M) with a padded vocabulary. """
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64: matrix products like that
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in linear layers and layer norms
    gelu: str = 'exact'      # 'tanh' for weights that come from GPT-2, which was trained with that form
    # newer than GPT-2; README.md has what each of them brings
    rotary: bool = False     # positions turn queries and keys (arXiv 2104.09864), there is no table of them
    rmsnorm: bool = False    # RMSNorm without gains (1910.07467), and once more after the embedding
    qk_norm: bool = False    # queries and keys are normalised, after the turn (2302.05442)
    untied: bool = False     # the head has a table of its own

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)!r} must be a whole number of at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be from 0 up to, but not, 1')
        if self.gelu not in ('exact', 'tanh'):
            raise ValueError(f"gelu={self.gelu!r} must be 'exact' or 'tanh'")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd} / n_head={self.n_head} must be even with rotary=True')


def rms_norm(x):
    """ Vectors of a root mean square of 1: (..., n) -> the same. """
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)


def rotate(x, cos, sin):
    """ Turns the pairs (i, i + hs/2) of x (B, T, ..., hs) back by their positions' angles (T, ..., hs). """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def rotations(n, hs):
    """ cos and sin (its second half negated) of n positions' angles: each (n, 1, 1, hs), for rotate(). """
    speed = 10000 ** -(torch.arange(0, hs, 2) / hs)                             # (hs/2,) radians a position
    angle = torch.outer(torch.arange(n), speed)[:, None, None]                  # (n, 1, 1, hs/2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((angle.sin(), -angle.sin()), -1)


def norm(config):
    """ LayerNorm (arXiv 1607.06450) with or without a bias, or RMSNorm: (..., n_embd) -> the same. """
    if config.rmsnorm:
        return nn.RMSNorm(config.n_embd, eps=RMS_EPS, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class KVCache:
    """ The keys and values that a layer has computed, of the last `size` tokens: each (B, nh, size, hs). """

    def __init__(self, size):
        self.size, self.length = size, 0  # room; tokens written so far, those overwritten too

    def extend(self, k, v):
        """ Writes k and v (B, nh, T, hs), over the oldest where it is full -> all, token i at i % size. """
        if not self.length:
            self.k, self.v = (part.new_empty(*part.shape[:2], self.size, part.shape[3]) for part in (k, v))
        at = self.length % self.size
        self.length += k.shape[2]
        self.k[:, :, at:at + k.shape[2]], self.v[:, :, at:at + k.shape[2]] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def repeat(self, B):
        """ Copies what one row has read to B rows: (1, nh, size, hs) -> (B, nh, size, hs). """
        self.k, self.v = (part.expand(B, -1, -1, -1).contiguous() for part in (self.k, self.v))


def padding_mask(positions, end, pad, size):
    """ The keys that tokens at `positions` (T,) < `end` read in rows with `pad` (B,) -> (B, 1, T, all). """
    keys = torch.arange(max(0, end - size), end, device=pad.device)         # (all,) oldest first
    keys = keys.roll(end % size) if end > size else keys                    # as they lie in a full cache
    mask = (keys >= pad[:, None, None]) & (keys <= positions[:, None])      # (B, T, all)
    return (mask | (keys == positions[:, None]))[:, None]  # padding reads itself: softmax of nothing is nan


class CausalSelfAttention(nn.Module):
    """
    Every position reads from itself and those before it, those in a KVCache too: (B, T, C) -> (B, T, C),
    or (B, 1, C), the last one alone, with `last`. `mask` (B, 1, T or 1, all) is True where it reads, and
    takes the place of the causal one.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None, mask=None, last=False):
        qkv = self.c_attn(x)                                                    # (B, T, 3 C)
        if x.device.type == 'cpu' and qkv.dtype.itemsize == 2:  # attention there is slower in 16 bits
            with torch.autocast('cpu', enabled=False):
                y = self.attend(qkv.float(), rotation, cache, mask, last).to(qkv.dtype)
        else:
            y = self.attend(qkv, rotation, cache, mask, last)
        return self.resid_dropout(self.c_proj(y))

    def attend(self, qkv, rotation, cache, mask, last):
        """ The values that each position asks for, heads side by side: (B, T, 3 C) -> (B, T, C). """
        qkv = qkv.unflatten(2, (3, self.n_head, -1))                            # (B, T, 3, nh, hs)
        q, k, v = qkv.unbind(2)                                                 # (B, T, nh, hs)
        if rotation is not None or self.qk_norm:
            qk = qkv[:, :, :2] if rotation is None else rotate(qkv[:, :, :2], *rotation)
            q, k = (rms_norm(qk) if self.qk_norm else qk).type_as(v).unbind(2)  # the tables are float32
        q = q[:, -1:] if last else q
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = True if mask is None and q.shape[2] > 1 else False  # a bool for torch.compile too
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).flatten(2)                                     # (B, T or 1, C)


class MLP(nn.Module):
    """ The same small network at every position: (B, T, C) -> (B, T, C). """

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='none' if config.gelu == 'exact' else 'tanh')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """ Attention, then the MLP, each added to what it reads after a normalisation. """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None, cache=None, mask=None, last=False):
        y = self.attn(self.ln_1(x), rotation, cache, mask, last)
        x = (x[:, -1:] if last else x) + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    model(idx) -> logits (B, 1, vocab_size) of the token after the last, None
    model(idx, targets) -> logits (B, T, vocab_size), loss

    with idx and targets int64 (B, T), T at most block_size. The loss is the mean cross-entropy in nats
    over the targets that are not -1. Raises ValueError for more than block_size tokens.

    For generation, model(idx, cache=model.new_cache(size)) also keeps the keys and values of idx; the next
    call with that cache takes one token more for each row, and returns what the whole would have. Rows of
    different lengths begin with `pad` (B,) tokens that nothing reads.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rotary else dict(wpe=nn.Embedding(config.block_size, config.n_embd))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not config.untied:
            self.lm_head.weight = self.transformer.wte.weight  # arXiv 1608.05859
        if config.rotary:
            self.register_rotations(config.block_size)

        # GPT-2: normal with std 0.02; each block adds to the residual stream twice, so those two
        # projections are scaled down for the sum over all of them to keep its variance
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)

    def register_rotations(self, n):
        """ The angles of `n` positions: block_size, or more, for a cache that rolls. """
        for name, table in zip(('cos', 'sin'), rotations(n, self.config.n_embd // self.config.n_head)):
            self.register_buffer(name, table.to(self.lm_head.weight.device), persistent=False)

    def get_num_params(self, non_embedding=True):
        """ The number of parameters, `non_embedding` without the position table; tied tables count once. """
        return sum(p.numel() for name, p in self.named_parameters()
                   if not (non_embedding and name == 'transformer.wpe.weight'))

    def forward(self, idx, targets=None, cache=None, pad=None):
        T = idx.shape[1]
        before = cache[0].length if cache else 0  # tokens
        known = len(self.cos) if self.config.rotary else self.config.block_size  # positions
        if T > self.config.block_size or before + T > known:
            raise ValueError(f'{before + T} tokens are more than block_size={self.config.block_size}')
        assert T == 1 or not before, 'a cache that is not empty takes one token at a time'
        positions = torch.arange(before, before + T, device=idx.device)         # (T,)
        mask = None
        if pad is not None:
            mask = padding_mask(positions, before + T, pad, cache[0].size if cache else T)
            positions = (positions - pad[:, None]).clamp(min=0)                 # (B, T)
        x, rotation = self.transformer.wte(idx), None                           # (B, T, C)
        if self.config.rotary:
            rotation = self.cos[positions], self.sin[positions]                 # ([B,] T, 1, 1, hs)
        else:
            x = x + self.transformer.wpe(positions)
        x = self.transformer.drop(rms_norm(x) if self.config.rmsnorm else x)
        for i, block in enumerate(self.transformer.h):
            last = targets is None and i == self.config.n_layer - 1  # whose last position alone is asked for
            mask = mask[:, :, -1:] if last and mask is not None else mask
            x = block(x, rotation, cache and cache[i], mask, last)
        logits = self.lm_head(self.transformer.ln_f(x))                         # (B, T or 1, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """ Forgets the positions from `block_size` on. Build the optimizer after it, not before. """
        assert block_size <= self.config.block_size, 'positions can be forgotten, not added'
        self.config.block_size = block_size
        if self.config.rotary:
            return
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())
        self.transformer.wpe.num_embeddings = block_size

    # -------------------------------------------------------------------------
    # weights from GPT-2

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """
        GPT-2's weights as a GPT, from the hub or from a directory that transformers can read.

        `model_type` is 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a directory or 'namespace/name';
        `override_args` may set dropout. Raises ValueError where there is no such model, or where its
        configuration asks for what this GPT does not compute.
        """
        override_args = override_args or {}
        assert set(override_args) <= {'dropout'}, 'only dropout can be overridden'
        if not (model_type in GPT2_NAMES or os.path.isdir(model_type) or model_type.count('/') == 1):
            raise ValueError(f"no model {model_type!r}: not one of {', '.join(GPT2_NAMES)}, not a directory "
                             'or checkpoint that is there, not namespace/name on the hub')
        if model_type in GPT2_NAMES:
            from huggingface_hub import try_to_load_from_cache
            cached = isinstance(try_to_load_from_cache(model_type, 'config.json'), str)  # as nanoGPT named it
            if not cached or os.path.isdir(model_type):  # not a folder that happens to be here
                model_type = f'openai-community/{model_type}'
        elif os.path.isdir(model_type) and not os.path.exists(os.path.join(model_type, 'config.json')):
            raise ValueError(f'{model_type} has no config.json of a Hugging Face model; a checkpoint is '
                             f'named by its file, as {os.path.join(model_type, "ckpt.pt")}')
        from transformers import AutoConfig, GPT2LMHeadModel
        logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries; our error comes after
        try:
            hf = AutoConfig.from_pretrained(model_type, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split('\n')[0]
            raise ValueError(f'no model {model_type!r} here or on the hub ({reason:.200}); it takes a '
                             'network, or a directory with config.json and model.safetensors') from None

        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
        if hf.model_type != 'gpt2':
            raise ValueError(f"{model_type}: model_type={hf.model_type!r}, only 'gpt2' can be loaded")
        for name, allowed in dict(
            activation_function=tuple(gelu), layer_norm_epsilon=(1e-5,), n_inner=(None, 4 * hf.n_embd),
            scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
            tie_word_embeddings=(True,), add_cross_attention=(False,),
        ).items():
            if (value := getattr(hf, name)) not in allowed:
                raise ValueError(f'{model_type}: {name}={value!r} cannot be expressed by this model, only '
                                 + ' or '.join(map(repr, allowed)))
        try:
            theirs, info = GPT2LMHeadModel.from_pretrained(model_type, dtype=torch.float32,
                                                           output_loading_info=True)
        except Exception as error:  # a broken file fails in any way
            raise ValueError(f'{model_type}: its weights cannot be read: {error!s:.200}') from None

        if info['missing_keys']:
            raise ValueError(f'{model_type} lacks the weights {", ".join(sorted(info["missing_keys"])):.200}')
        theirs = theirs.state_dict()
        model = cls(GPTConfig(hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd, bias=True,
                              gelu=gelu[hf.activation_function], dropout=override_args.get('dropout', 0.0)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                weight = theirs[name]
                if name.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight')):
                    weight = weight.t()  # their Conv1D keeps (in, out), a Linear (out, in)
                assert weight.shape == p.shape, f'{name} is {weight.shape}, not {p.shape}'
                p.copy_(weight)
        return model

    # -------------------------------------------------------------------------
    # training

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=False):
        """
        AdamW in two groups: tensors of two or more dimensions decay, biases and norms do not. With `muon`
        the matrices of the blocks are left out, for configure_muon.
        """
        params = [p for name, p in self.named_parameters() if p.requires_grad
                  and not (muon and '.h.' in name and p.dim() == 2)]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu', 'mps')  # one kernel for all tensors, where torch has it
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def configure_muon(self, lr, weight_decay, dtype='bfloat16'):
        """ Muon for the matrices of the blocks, in bfloat16 where the run is, else in float32. """
        from update import Muon
        params = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        return Muon(params, lr, weight_decay, dtype=torch.bfloat16 if dtype == 'bfloat16' else torch.float32)

    def flops_per_token(self, T):
        """ FLOPs of forward and backward for one token among T: 6 N + 12 L C T (H Q of the paper is C). """
        c, n = self.config, self.get_num_params()
        if c.untied:
            n -= self.transformer.wte.weight.numel()  # looked up, not multiplied with
        return 6 * n + 12 * c.n_layer * c.n_embd * T

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """
        The share of the device's peak that `fwdbwd_per_iter` sequences in `dt` seconds come to.
        `peak` in FLOP/s; by default this model's device's, in bfloat16 on CUDA, else in float32.
        """
        T, device = self.config.block_size, self.lm_head.weight.device
        if peak is None:
            from machine import peak_flops
            peak, _ = peak_flops(device.type, 'bfloat16' if device.type == 'cuda' else 'float32')
        return self.flops_per_token(T) * T * fwdbwd_per_iter / dt / peak

    # -------------------------------------------------------------------------
    # generation

    def new_cache(self, size):
        """ An empty cache for `size` tokens. """
        return [KVCache(size) for _ in self.transformer.h]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, **options):
        """
        Appends `max_new_tokens` draws to idx (B, T) -> (B, T + max_new_tokens), of which the last block_size
        tokens are read each time. `options` are those of decode.next_tokens, which yields one by one.
        """
        from decode import next_tokens
        drawn = next_tokens(self, idx, max_new_tokens, temperature, top_k, vocab_size, **options)
        return torch.cat((idx, *(tokens[:, None] for tokens in drawn)), dim=1)

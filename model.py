"""
The GPT: a decoder-only transformer with the architecture of GPT-2 (Radford and others, 2019), its
loss, its KV cache, and its FLOPs. Not here: data, optimizers, files, sampling (components/).

Shapes: B sequences of T tokens, C = n_embd channels, nh = n_head heads of size hs = C / nh.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from components import functional as F  # or torch.nn.functional: the same, with less speed on a CPU


@dataclass
class GPTConfig:
    """ The architecture of a GPT. The defaults are GPT-2 (124M) with a padded vocabulary. """
    block_size: int = 1024   # context length in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in linear layers and layer norms
    gelu: str = 'exact'      # 'tanh' for the weights of GPT-2, which was trained with that form
    # not in GPT-2
    rotary: bool = False     # rotary position embeddings (RoPE) instead of learned ones
    rope_base: int = 10000   # of RoPE's frequencies
    rmsnorm: bool = False    # RMSNorm without weights, and one more after the token embedding
    qk_norm: bool = False    # RMSNorm of queries and keys after RoPE (arXiv 2302.05442)
    untied: bool = False     # lm_head and the token embedding have separate weights

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'rope_base'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name}={value!r} must be an integer of at least 1')
        if self.n_embd % self.n_head != 0:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if self.gelu not in ('exact', 'tanh'):
            raise ValueError(f"gelu={self.gelu!r} must be 'exact' or 'tanh'")
        if self.rotary and self.n_embd // self.n_head % 2 != 0:
            raise ValueError(f'n_embd={self.n_embd} / n_head={self.n_head} must be even for RoPE')


def rms_norm(x):
    """ RMSNorm without weights (arXiv 1910.07467). """
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):

    def forward(self, x):
        return rms_norm(x)


def make_norm(config):
    """ RMSNorm, or LayerNorm (arXiv 1607.06450) with or without biases. """
    if config.rmsnorm:
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rope_cos_sin(num_positions, head_size, base=10000):
    """ cos and sin for apply_rope(), (num_positions, head_size) each: every angle twice. """
    frequencies = base ** -(torch.arange(0, head_size, 2) / head_size)      # (hs/2,)
    angles = torch.outer(torch.arange(num_positions), frequencies)          # (T, hs/2) radians
    angles = torch.cat((angles, angles), dim=-1)                            # (T, hs)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """
    Rotary position embeddings (RoPE, arXiv 2104.09864): rotates each pair (x[i], x[i + hs/2]) of
    x (..., T, hs) by minus the angle of its position; cos and sin are (T, hs).
    """
    x1, x2 = x.chunk(2, dim=-1)                                             # (..., T, hs/2)
    return torch.addcmul(x * cos, torch.cat((x2, -x1), dim=-1), sin)  # x * cos + (x2, -x1) * sin


class CausalSelfAttention(nn.Module):
    """
    Multi-head attention (arXiv 1706.03762) of T queries to S keys, those in a cache included. GPT
    makes the other arguments once for all layers: cos and sin for RoPE, and a mask, bool (T, S).
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope=None, mask=None, cache=None):
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))             # (B, T, 3, nh, hs)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))                    # (2 or 1, B, nh, T, hs)
        if rope is not None:
            qk = apply_rope(qk, *rope)  # float32, as cos and sin are
        if self.qk_norm:
            qk = rms_norm(qk)
        q, k = qk.type_as(v).unbind()                                       # (B, nh, T, hs)
        v = v.squeeze(0)                                                    # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(k, v)                                       # (B, nh, S, hs)
        is_causal = False  # a single query attends to all keys
        if mask is None and q.shape[2] > 1:
            is_causal = True
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal)
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """ The feed-forward network of each position: (B, T, C) -> (B, T, C). """

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                         # (B, T, 4 * C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)       # (B, T, C)


class Block(nn.Module):
    """ Pre-norm block: attention and MLP, each with a norm before it and a residual connection. """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    model(idx) -> logits of the next token after idx, (B, 1, vocab_size), and None
    model(idx, targets) -> logits of every position, (B, T, vocab_size), and the loss
    model(idx, targets, return_logits=False) -> None and the loss, in less memory
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer['wte'] = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rotary:
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer['ln_f'] = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not config.untied:
            self.lm_head.weight = self.transformer.wte.weight  # weight tying, arXiv 1608.05859
        if config.rotary:
            head_size = config.n_embd // config.n_head
            cos, sin = rope_cos_sin(config.block_size, head_size, config.rope_base)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.activation_checkpointing = False  # for training with less memory; see hidden_states()
        self.init_weights()

    def init_weights(self):
        """ GPT-2's. The sum of 2 * n_layer projections has the same variance for any n_layer. """
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """
        idx and targets: int64 (B, T), token ids and those that follow them; the loss is the mean
        cross-entropy in nats per token, without targets of -1. cache: of new_cache(), which idx
        extends. Raises ValueError for more than block_size tokens, those in the cache included.
        """
        start = cache[0].length if cache else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens are more than block_size={self.config.block_size}')

        positions = torch.arange(start, end, device=idx.device)             # (T,)
        x = self.hidden_states(idx, positions, cache)                       # (B, T, C)
        if targets is None:
            return self.logits(x[:, -1:]), None                             # (B, 1, vocab_size)

        logits = self.logits(x) if return_logits else None                  # (B, T, vocab_size)
        return logits, self.loss(x, targets)

    def loss(self, x, targets):
        """ x: (B, T, C). In training this alone computes logits, and perhaps in parts. """
        return F.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), ignore_index=-1)

    def logits(self, x):
        return self.lm_head(x)                                              # (B, T, vocab_size)

    def hidden_states(self, idx, positions, cache=None):
        """ Token ids (B, T) at positions (T,), a cache for each block -> (B, T, C) for lm_head. """
        mask = self.attention_mask(positions, cache)
        x = self.transformer.wte(idx)                                       # (B, T, C)
        rope = None
        if self.config.rotary:
            rope = self.cos[positions], self.sin[positions]                 # (T, hs)
        else:
            x = x + self.transformer.wpe(positions)
        if self.config.rmsnorm:
            x = rms_norm(x)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.transformer.h):
            layer_cache = cache[i] if cache else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                # stores x alone, and computes the block again in the backward pass
                x = checkpoint(block, x, rope, mask, layer_cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, layer_cache)
        return self.transformer.ln_f(x)

    def attention_mask(self, positions, cache=None):
        """ Which keys a token attends to, those up to its own position: bool (T, S). """
        T = len(positions)
        S = cache[0].num_keys(T) if cache else T
        # None: the same causal mask in less time. For ANOTHER MASK REMOVE these two lines
        if S == T or (T == 1 and not cache[0].is_static):
            return None
        keys = torch.arange(S, device=positions.device)                     # (S,)
        return keys <= positions[:, None]                                   # (T, S)

    def crop_block_size(self, block_size):
        """ Reduces block_size. It replaces a parameter, so build the optimizer after it. """
        assert block_size <= self.config.block_size, 'block_size can only be reduced'
        self.config.block_size = block_size
        if self.config.rotary:
            self.cos = self.cos[:block_size]
            self.sin = self.sin[:block_size]
        else:
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer['wpe'] = nn.Embedding.from_pretrained(weight, freeze=False)

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """ A GPT with the weights of GPT-2 that components.huggingface.load_gpt2() finds. """
        from components.huggingface import load_gpt2
        override_args = override_args or {}
        assert set(override_args) <= {'dropout'}, 'only dropout can be overridden'
        model_args, weights = load_gpt2(model_type)
        model = cls(GPTConfig(**model_args, **override_args))
        model.load_state_dict(weights)
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """ AdamW. train.py calls components.optim.configure_optimizers() itself. """
        from components.optim import configure_optimizers
        optimizers = configure_optimizers(self, weight_decay, learning_rate, betas, device_type)
        return optimizers['optimizer']

    def get_num_params(self, non_embedding=True):
        """ The number of parameters, by default without those of the position embedding. """
        n = sum(p.numel() for p in self.parameters())  # tied weights are counted once
        if non_embedding and not self.config.rotary:
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T):
        """
        FLOPs of forward and backward for one token of a sequence of T: 6 N + 12 L H Q T (PaLM,
        arXiv 2204.02311, appendix B) with N parameters, L layers and H heads of size Q; H Q = C.
        """
        n = self.get_num_params()
        if self.config.untied:
            n -= self.transformer.wte.weight.numel()  # looked up, not multiplied
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * T

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Model FLOPs utilization (MFU): the FLOP/s of `fwdbwd_per_iter` sequences of block_size in
        `dt` seconds, as a fraction of the peak of the model's device.
        """
        from components.device import peak_flops
        peak, _ = peak_flops(self.lm_head.weight.device.type)
        T = self.config.block_size
        return self.flops_per_token(T) * T * fwdbwd_per_iter / dt / peak

    def new_cache(self, size):
        """ An empty KV cache for `size` tokens: one KVCache for each block. """
        return [KVCache(size) for _ in self.transformer.h]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """ Continues each row of idx (B, T) -> (B, T + max_new_tokens), as sample.py does. """
        from components.generation import next_tokens
        new_tokens = next_tokens(self, idx, max_new_tokens, temperature, top_k, **options)
        columns = [tokens[:, None] for tokens in new_tokens]                # (B, 1) each
        return torch.cat((idx, *columns), dim=1)


class KVCache:
    """ The keys and values of the tokens that one attention layer has seen, `size` at most. """
    is_static = False  # extend() returns no places of later tokens

    def __init__(self, size):
        self.size = size
        self.length = 0  # tokens in the cache

    def num_keys(self, T):
        """ How many keys extend() returns for T more tokens. """
        return self.length + T

    def extend(self, k, v):
        """ Appends k and v (B, nh, T, hs) -> those of all tokens, (B, nh, length, hs). """
        B, nh, T, hs = k.shape
        if self.length == 0:
            self.k = k.new_empty(B, nh, self.size, hs)
            self.v = v.new_empty(B, nh, self.size, hs)
        start = self.length
        self.length += T
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

"""
The GPT: a decoder-only transformer with the architecture of GPT-2 (Radford and others, 2019), its
loss, its KV cache, and its FLOPs.

Not here: data, optimizers, checkpoints, pretrained weights, sampling (components/).

Shapes: B sequences of T tokens, C = n_embd channels, nh = n_head heads of size hs = C / nh.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

RMS_NORM_EPS = 1e-6
MAX_ATTENTION_MATRIX = 512  # tokens; up to here, bfloat16 on a CPU uses attend_by_matrices()
MAX_LOGITS = 2**26  # numbers, 256 MiB in float32; the loss of more is computed in chunks of tokens


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
    # newer than GPT-2
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
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1')
        if self.gelu not in ('exact', 'tanh'):
            raise ValueError(f"gelu={self.gelu!r} must be 'exact' or 'tanh'")
        head_size = self.n_embd // self.n_head
        if self.rotary and head_size % 2 != 0:
            raise ValueError(f'n_embd={self.n_embd} / n_head={self.n_head} must be even with '
                             'rotary=True')


def make_norm(config):
    """ LayerNorm (arXiv 1607.06450) with or without biases, or RMSNorm without weights. """
    if config.rmsnorm:
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class RMSNorm(nn.Module):
    """ rms_norm() as a module. """

    def forward(self, x):
        return rms_norm(x)


def rms_norm(x):
    """ RMSNorm without weights (arXiv 1910.07467): (..., n) -> (..., n). """
    is_precise = x.dtype.itemsize >= 4  # squares in float16 may overflow
    is_compiling = torch.compiler.is_compiling()
    if x.device.type == 'cpu' and x.requires_grad and is_precise and not is_compiling:
        return TrainableRMSNorm.apply(x)
    return F.rms_norm(x, x.shape[-1:], eps=RMS_NORM_EPS)


class TrainableRMSNorm(torch.autograd.Function):
    """
    rms_norm() for training on a CPU, where torch differentiates each of its operations separately.
    The backward pass here takes half the time.
    """

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)            # (..., 1)
        scale = torch.rsqrt(norm * norm / x.shape[-1] + RMS_NORM_EPS)       # (..., 1)
        ctx.save_for_backward(x, scale)
        return x * scale                                                    # (..., n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        mean = (grad * x).mean(dim=-1, keepdim=True)                        # (..., 1)
        return torch.addcmul(grad * scale, x, mean * scale**3, value=-1)    # (..., n)


class Dropout(nn.Dropout):
    """ nn.Dropout with a faster mask on a CPU. """

    def forward(self, x):
        is_active = self.training and self.p > 0
        if x.device.type != 'cpu' or not is_active or torch.compiler.is_compiling():
            return super().forward(x)
        return x * dropout_mask(x, self.p)


def dropout_mask(x, p):
    """
    A random mask in the shape of x: 0 with probability p, else 1 / (1 - p). On a CPU PyTorch needs
    a random number of 64 bits for each element, one after another; here it serves four elements.
    """
    num_random_numbers = math.ceil(x.numel() / 4)
    random_numbers = torch.empty(num_random_numbers, dtype=torch.int64)
    random_numbers.random_(-2**63, 2**63 - 1)
    parts = random_numbers.view(torch.int16)[:x.numel()].view(x.shape)  # -2**15 to 2**15 - 1
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    is_kept = parts >= threshold
    return is_kept.to(x.dtype).mul_(1 / (1 - p))


def rope_cos_sin(num_positions, head_size, base=10000):
    """
    cos and sin for apply_rope(), each (num_positions, 1, 1, head_size). The last dimension holds
    every angle twice, and the second half of sin is negated. The frequencies are from 1 to nearly
    1 / base radians per position.
    """
    frequencies = base ** -(torch.arange(0, head_size, 2) / head_size)     # (hs/2,)
    angles = torch.outer(torch.arange(num_positions), frequencies)          # (T, hs/2) radians
    angles = angles[:, None, None]                                          # (T, 1, 1, hs/2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)                   # (T, 1, 1, hs)
    sin = torch.cat((angles.sin(), -angles.sin()), dim=-1)                  # (T, 1, 1, hs)
    return cos, sin


def apply_rope(x, cos, sin):
    """
    Rotary position embeddings (RoPE, arXiv 2104.09864): rotates each pair (x[i], x[i + hs/2]) of
    x (..., hs) by minus the angle of its position; cos and sin broadcast to the shape of x. The
    product of a rotated query and a rotated key depends only on the distance between their
    positions.
    """
    swapped_halves = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped_halves, sin)


class CausalSelfAttention(nn.Module):
    """
    Multi-head attention (arXiv 1706.03762) to the same and all earlier positions.

    forward() takes x (B, T, C) and, from GPT.forward():
        rope: cos and sin of the positions, ([B,] T, 1, 1, hs) each, or None without RoPE
        cache: a KVCache with the keys and values of earlier tokens, which those of x extend
        mask: bool (B, 1, T, all keys), True where a query attends to a key; None: the causal mask
        last_only: whether to compute the last position alone, (B, 1, C); in the last block this
            saves most of the work when sampling
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, mask=None, last_only=False):
        qkv = self.c_attn(x)                                                # (B, T, 3 * C)
        if qkv.device.type == 'cpu' and qkv.dtype.itemsize == 2:
            # on a CPU, PyTorch's attention is slower in 16 bits than in 32
            with torch.autocast('cpu', enabled=False):
                if self.is_short_bfloat16(qkv, cache, mask, last_only):
                    y = self.attend_by_matrices(qkv, rope)
                else:
                    y = self.attend(qkv.float(), rope, cache, mask, last_only)
                    y = y.to(qkv.dtype)
        else:
            y = self.attend(qkv, rope, cache, mask, last_only)
        return self.resid_dropout(self.c_proj(y))                           # (B, T or 1, C)

    def is_short_bfloat16(self, qkv, cache, mask, last_only):
        """ Whether attend_by_matrices() supports these arguments and is faster than attend(). """
        is_plain = cache is None and mask is None and not last_only
        is_short = qkv.shape[1] <= MAX_ATTENTION_MATRIX
        return qkv.dtype == torch.bfloat16 and is_plain and is_short

    def attend_by_matrices(self, qkv, rope):
        """
        Attention without a cache in bfloat16 on a CPU, where matrix products in bfloat16 make it
        two to three times as fast as F.scaled_dot_product_attention: (B, T, 3 * C) -> (B, T, C).
        """
        B, T, _ = qkv.shape
        qkv = qkv.unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        qk, v = qkv.split((2, 1))                                           # (2 or 1, B, nh, T, hs)
        if rope is not None or self.qk_norm:
            qk = qk.to(torch.float32, memory_format=torch.contiguous_format)
            if rope is not None:
                cos, sin = rope                                             # (T, 1, 1, hs)
                rope = cos.flatten(1), sin.flatten(1)                       # (T, hs)
            qk = self.rotate_and_normalize(qk, rope).type_as(v)
        q, k = qk.flatten(1, 2).unbind()                                    # (B * nh, T, hs)
        v = v.flatten(0, 2)                                                 # (B * nh, T, hs)
        no_future = torch.full((T, T), -math.inf, dtype=v.dtype).triu(1)    # (T, T)
        scores = torch.baddbmm(no_future, q, k.mT, alpha=q.shape[-1] ** -0.5)  # (B * nh, T, T)
        weights = self.attn_dropout(scores.softmax(dim=-1))                 # (B * nh, T, T)
        y = weights @ v                                                     # (B * nh, T, hs)
        return y.unflatten(0, (B, self.n_head)).transpose(1, 2).flatten(2)  # (B, T, C)

    def attend(self, qkv, rope, cache, mask, last_only):
        """ Attention of every head, side by side: (B, T, 3 * C) -> (B, T or 1, C). """
        qkv = qkv.unflatten(2, (3, self.n_head, -1))                        # (B, T, 3, nh, hs)
        q, k, v = qkv.unbind(2)                                             # (B, T, nh, hs)
        if rope is not None or self.qk_norm:
            qk = self.rotate_and_normalize(qkv[:, :, :2], rope)             # (B, T, 2, nh, hs)
            q, k = qk.type_as(v).unbind(2)                                  # (B, T, nh, hs)
        if last_only:
            q = q[:, -1:]                                                   # (B, 1, nh, hs)
        q = q.transpose(1, 2)                                               # (B, nh, T or 1, hs)
        k = k.transpose(1, 2)                                               # (B, nh, T, hs)
        v = v.transpose(1, 2)                                               # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.extend(k, v)                                       # (B, nh, all, hs)
        if mask is not None and last_only:
            mask = mask[:, :, -1:]                                          # (B, 1, 1, all)

        is_causal = False  # a single query attends to all keys
        if mask is None and q.shape[2] > 1:  # by an `if`, as torch.compile requires a plain bool
            is_causal = True
        dropout_p = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p)
        return y.transpose(1, 2).flatten(2)                                 # (B, T or 1, C)

    def rotate_and_normalize(self, qk, rope):
        """ RoPE and qk_norm for queries and keys together: (..., hs) -> the same. """
        if rope is not None:
            qk = apply_rope(qk, *rope)  # float32, as cos and sin are
        if self.qk_norm:
            qk = rms_norm(qk)
        return qk


class MLP(nn.Module):
    """ The feed-forward network of each position: (B, T, C) -> (B, T, C). """

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))                                         # (B, T, 4 * C)
        return self.dropout(self.c_proj(x))                                 # (B, T, C)


class Block(nn.Module):
    """ Pre-norm block: attention and MLP, each with a norm before it and a residual connection. """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, cache=None, mask=None, last_only=False):
        y = self.attn(self.ln_1(x), rope, cache, mask, last_only)           # (B, T or 1, C)
        if last_only:
            x = x[:, -1:]                                                   # (B, 1, C)
        x = x + y
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
        self.transformer['drop'] = Dropout(config.dropout)
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
        """
        GPT-2's initialization. The std of the 2 * n_layer projections into the residual stream is
        lower, so that the variance of their sum does not depend on n_layer.
        """
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, pad=None, return_logits=True):
        """
        Args:
            idx: int64 (B, T), token ids
            targets: int64 (B, T), the token that follows each position; the loss ignores -1
            cache: KVCaches from new_cache(), extended by idx. Once they hold tokens, idx must
                be one new token per row, (B, 1)
            pad: int64 (B,), the number of padding tokens that each row begins with; no other
                token attends to them
            return_logits: False to train or evaluate: with targets, None is returned instead of
                logits, which are the largest tensor of a training step

        Returns:
            logits, and the mean cross-entropy in nats per token

        Raises:
            ValueError: more than block_size tokens, those in the cache included
        """
        T = idx.shape[1]
        start = cache[0].length if cache else 0
        end = start + T
        if end > self.config.block_size:
            raise ValueError(f'{end} tokens are more than block_size={self.config.block_size}')
        assert T == 1 or start == 0, 'with a non-empty cache, idx must have one token per row'

        positions = torch.arange(start, end, device=idx.device)             # (T,)
        mask = None
        if pad is not None:
            mask = padding_mask(positions, end, pad)                        # (B, 1, T, end)
            positions = (positions - pad[:, None]).clamp(min=0)             # (B, T)

        last_only = targets is None
        x = self.hidden_states(idx, positions, mask, cache, last_only)      # (B, T or 1, C)
        needs_logits = targets is None or return_logits
        if not needs_logits and needs_chunked_loss(x, self.config.vocab_size):
            # the same in less memory; keep chunk_loss() in step with the lines below
            return None, cross_entropy_in_chunks(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)                                        # (B, T or 1, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if not return_logits:
            logits = None
        return logits, loss

    def hidden_states(self, idx, positions, mask=None, cache=None, last_only=False):
        """
        What lm_head multiplies: the output of the last block, after its norm.

        Args:
            idx: int64 (B, T), token ids
            positions: int64 (T,) or (B, T), the place of each token in its sequence
            mask, cache, last_only: as in CausalSelfAttention; a cache for each block

        Returns: (B, T, C), with last_only (B, 1, C)
        """
        x = self.transformer.wte(idx)                                       # (B, T, C)
        rope = None
        if self.config.rotary:
            rope = self.cos[positions], self.sin[positions]                 # ([B,] T, 1, 1, hs)
        else:
            x = x + self.transformer.wpe(positions)
        if self.config.rmsnorm:
            x = rms_norm(x)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            layer_cache = cache[i] if cache else None
            is_last = i == self.config.n_layer - 1
            arguments = (x, rope, layer_cache, mask, last_only and is_last)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # stores x alone, and computes the block again in the backward pass
                x = checkpoint(block, *arguments, use_reentrant=False)      # (B, T or 1, C)
            else:
                x = block(*arguments)                                       # (B, T or 1, C)
        return self.transformer.ln_f(x)

    def crop_block_size(self, block_size):
        """ Reduces block_size. It replaces a parameter, so build the optimizer after it. """
        assert block_size <= self.config.block_size, 'block_size can only be reduced'
        self.config.block_size = block_size
        if self.config.rotary:
            self.cos = self.cos[:block_size]
            self.sin = self.sin[:block_size]
        else:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """ A GPT with the weights of GPT-2; see components.huggingface.load_gpt2(). """
        from components.huggingface import load_gpt2
        return load_gpt2(cls, model_type, override_args)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """ AdamW; see components.optim.configure_optimizers(). """
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

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """
        Model FLOPs utilization (MFU) of an iteration with `fwdbwd_per_iter` sequences of block_size
        tokens in `dt` seconds: its FLOP/s as a fraction of `peak`. By default `peak` is that of the
        model's device, in bfloat16 on CUDA and in float32 elsewhere.
        """
        if peak is None:
            from components.device import peak_flops
            device_type = self.lm_head.weight.device.type
            peak, _ = peak_flops(device_type, 'bfloat16' if device_type == 'cuda' else 'float32')
        T = self.config.block_size
        flops_per_iter = self.flops_per_token(T) * T * fwdbwd_per_iter
        return flops_per_iter / dt / peak

    def new_cache(self, size):
        """ An empty KV cache for `size` tokens: one KVCache for each block. """
        return [KVCache(size) for _ in self.transformer.h]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None,
                 **options):
        """
        Samples max_new_tokens tokens for each row of idx (B, T), one after another ->
        (B, T + max_new_tokens). `options` are those of components.generation.next_tokens().
        """
        from components.generation import next_tokens
        new_tokens = next_tokens(self, idx, max_new_tokens, temperature, top_k, vocab_size,
                                 **options)
        columns = [tokens[:, None] for tokens in new_tokens]                # (B, 1) each
        return torch.cat((idx, *columns), dim=1)


class KVCache:
    """ The keys and values of the tokens that one attention layer has seen, `size` at most. """

    def __init__(self, size):
        self.size = size
        self.length = 0  # tokens in the cache
        self.k = None    # (B, nh, size, hs), made by the first extend()
        self.v = None

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

    def repeat(self, B):
        """ Copies one row to B rows: (1, nh, size, hs) -> (B, nh, size, hs). """
        self.k = self.k.expand(B, -1, -1, -1).contiguous()
        self.v = self.v.expand(B, -1, -1, -1).contiguous()


def padding_mask(positions, end, pad):
    """
    The causal mask of queries at `positions` (T,) on the keys of `end` tokens, in rows that begin
    with `pad` (B,) tokens of padding: bool (B, 1, T, end), True where a query attends to a key.
    """
    keys = torch.arange(end, device=pad.device)                             # (end,)
    queries = positions[:, None]                                            # (T, 1)
    mask = (keys <= queries) & (keys >= pad[:, None, None])                 # (B, T, end)
    mask = mask | (keys == queries)  # padding attends to itself: softmax over no keys is NaN
    return mask[:, None]                                                    # (B, 1, T, end)


def needs_chunked_loss(x, vocab_size):
    """
    Whether the logits of x (B, T, C) are so many that the loss is computed in chunks of tokens.
    torch.compile does not need that, as it fuses the operations of the loss.
    """
    num_logits = x.shape[0] * x.shape[1] * vocab_size
    return num_logits > MAX_LOGITS and not torch.compiler.is_compiling()


def cross_entropy_in_chunks(x, weight, targets):
    """
    The mean cross-entropy of the logits F.linear(x, weight), in chunks of tokens.

    Args:
        x: (B, T, C), what lm_head multiplies
        weight: (vocab_size, C), of lm_head
        targets: int64 (B, T); -1 is ignored
    """
    x = x.flatten(0, 1)                                                     # (B * T, C)
    targets = targets.flatten()                                             # (B * T,)
    chunk_size = loss_chunk_size(weight.shape[0])
    needs_grad = torch.is_grad_enabled()  # which is False inside of ChunkedCrossEntropy
    loss_sum = ChunkedCrossEntropy.apply(x, weight, targets, chunk_size, needs_grad)
    return loss_sum / (targets != -1).sum()


def loss_chunk_size(vocab_size):
    """ Tokens in a chunk: 1024 at most, since in float16 a sum of more gradients may overflow. """
    return min(MAX_LOGITS // vocab_size, 1024)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The sum of the cross-entropy of F.linear(x, weight) for x (N, C), weight (V, C) and targets (N,)
    in chunks of tokens. The gradients are computed at once, while the logits of a chunk exist
    (as in Liger Kernel, arXiv 2410.10989); backward() only multiplies them by that of the loss.

    They are gradients of the sum, between -1 and 1 for a logit: those of a mean over a batch would
    often be too small for float16, and a GradScaler only scales what reaches backward(). That of
    lm_head is added up in the dtype of its weight, float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_size, needs_grad):
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        cast_weight = weight.to(dtype)  # once, not in every chunk
        loss_sum = torch.zeros((), device=x.device)
        x_grads = []
        weight_grad = None
        if needs_grad:
            weight_grad = torch.zeros_like(weight)
        for x_chunk, target in zip(x.split(chunk_size), targets.split(chunk_size)):
            loss, x_grad = chunk_loss(x_chunk.to(dtype), cast_weight, target, weight_grad)
            loss_sum += loss
            if needs_grad:
                x_grads.append(x_grad.to(x.dtype))
        if needs_grad:
            ctx.save_for_backward(torch.cat(x_grads), weight_grad)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * loss_grad, weight_grad * loss_grad, None, None, None


def chunk_loss(x, weight, targets, weight_grad=None):
    """
    The sum of the cross-entropy of F.linear(x, weight), and its gradient by x, or None without
    `weight_grad` (V, C), to which the gradient by the weight is added.
    """
    logits = F.linear(x, weight)                                            # (chunk_size, V)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)          # (chunk_size, V)
    del logits
    loss = F.nll_loss(log_probs, targets, ignore_index=-1, reduction='sum')
    if weight_grad is None:
        return loss, None
    # the gradient of logits: the probabilities, minus 1 at the target
    grad = log_probs.exp_()                                                 # (chunk_size, V)
    index = targets.clamp(min=0)[:, None]                                   # (chunk_size, 1)
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
    grad.masked_fill_((targets == -1)[:, None], 0)
    grad = grad.to(x.dtype)
    weight_grad += grad.T @ x
    return loss, grad @ weight

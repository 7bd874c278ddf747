"""
The GPT: its definition, its weights from GPT-2, its optimizer and its generation, in one file.

Papers: GPT-2, Radford and others 2019; the attention, arXiv 1706.03762; GELU, arXiv 1606.08415;
AdamW, arXiv 1711.05101; counting FLOPs, PaLM, arXiv 2204.02311, appendix B.

Not here: data, checkpoints, the device, the training loop (bins.py, checkpoint.py, machine.py, train.py).
"""
import logging
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')

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
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x, cos, sin):
    """ Turns the pairs (i, i + hs/2) of x (B, T, ..., hs) by the angles of their positions (T, ..., hs). """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Norm(nn.Module):
    """ LayerNorm (arXiv 1607.06450) with or without a bias, or RMSNorm: (..., n_embd) -> the same. """

    def __init__(self, config):
        super().__init__()
        self.weight = None if config.rmsnorm else nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias and not config.rmsnorm else None

    def forward(self, x):
        if self.weight is None:
            return rms_norm(x)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """ Every position reads from itself and those before it: (B, T, C) -> (B, T, C). """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)       # (B, T, 3, nh, hs)
        on_cpu, dtype = x.device.type == 'cpu', qkv.dtype  # where attention in 16 bits is the slower one
        with torch.autocast('cpu', enabled=False) if on_cpu else nullcontext():
            qkv = qkv.float() if on_cpu else qkv
            qk, v = qkv.split((2, 1), dim=2)
            qk = qk if rotation is None else rotate(qk, *rotation)
            q, k = (rms_norm(qk) if self.qk_norm else qk).type_as(v).unbind(2)  # (B, T, nh, hs)
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2),  # (B, nh, T, hs)
                is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(dtype)                        # heads side by side
        return self.resid_dropout(self.c_proj(y))


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
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotation=None):
        x = x + self.attn(self.ln_1(x), rotation)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    model(idx) -> logits (B, 1, vocab_size) of the token after the last, None
    model(idx, targets) -> logits (B, T, vocab_size), loss

    with idx and targets int64 (B, T), T at most block_size. The loss is the mean cross-entropy in nats
    over the targets that are not -1. Raises ValueError for more than block_size tokens.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rotary else dict(wpe=nn.Embedding(config.block_size, config.n_embd))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=Norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not config.untied:
            self.lm_head.weight = self.transformer.wte.weight  # arXiv 1608.05859
        if config.rotary:
            hs = config.n_embd // config.n_head
            speed = 10000 ** -(torch.arange(0, hs, 2) / hs)                     # (hs/2,) radians a position
            angle = torch.outer(torch.arange(config.block_size), speed)[:, None, None]
            cos, sin = angle.cos(), angle.sin()                                 # (block_size, 1, 1, hs/2)
            self.register_buffer('cos', torch.cat((cos, cos), -1), persistent=False)
            self.register_buffer('sin', torch.cat((sin, -sin), -1), persistent=False)

        # GPT-2: normal with std 0.02; each block adds to the residual stream twice, so those two
        # projections are scaled down for the sum over all of them to keep its variance
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)

    def get_num_params(self, non_embedding=True):
        """ The number of parameters; the position table is left out, the token table is the head's too. """
        return sum(p.numel() for name, p in self.named_parameters()
                   if not (non_embedding and name == 'transformer.wpe.weight'))

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are more than block_size={self.config.block_size}')
        x, rotation = self.transformer.wte(idx), None                           # (B, T, C)
        if self.config.rotary:
            rotation = self.cos[:T], self.sin[:T]                               # (T, 1, 1, hs)
        else:
            x = x + self.transformer.wpe(torch.arange(T, device=idx.device))
        x = self.transformer.drop(rms_norm(x) if self.config.rmsnorm else x)
        for block in self.transformer.h:
            x = block(x, rotation)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                                # (B, 1, vocab_size)
        logits = self.lm_head(x)                                                # (B, T, vocab_size)
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
            model_type = f'openai-community/{model_type}'  # not a folder of that name that happens to be here
        elif os.path.isdir(model_type) and not os.path.exists(os.path.join(model_type, 'config.json')):
            raise ValueError(f'{model_type} has no config.json of a Hugging Face model; a checkpoint is '
                             f'named by its file, as {os.path.join(model_type, "ckpt.pt")}')
        from transformers import AutoConfig, GPT2LMHeadModel
        logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries; our error comes after
        try:
            hf = AutoConfig.from_pretrained(model_type)
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
        without the matrices of the blocks: those are for configure_muon.
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
        params = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        return Muon(params, lr, weight_decay, dtype=torch.bfloat16 if dtype == 'bfloat16' else torch.float32)

    def flops_per_token(self, T):
        """ FLOPs of forward and backward for one token among T: 6 N + 12 L H Q T. """
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

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None):
        """
        Appends `max_new_tokens` draws to idx (B, T) -> (B, T + max_new_tokens). Only the last
        block_size tokens are read. Logits are divided by `temperature`; of them the `top_k` largest
        remain (None or 0: all), and of the ids only those below `vocab_size` (None: all).
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])                  # (B, 1, vocab_size)
            logits = logits[:, -1, :vocab_size].float() / temperature           # (B, vocab_size)
            if top_k:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            drawn = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx

# -----------------------------------------------------------------------------
# the update

class Muon(torch.optim.Optimizer):
    """
    The update of a matrix is its momentum (Nesterov's) with every singular value brought close to 1, by a
    polynomial applied five times (Jordan and others 2024, kellerjordan.github.io/posts/muon). It is that of
    torch.optim.Muon; here all matrices of a size go through the products together, in `dtype`, and an
    update is left out where `found_inf` is set, as fused AdamW does.
    """
    found_inf = None  # a tensor: 1.0 where the gradients are not finite

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype
        assert all(p.dim() == 2 for group in self.param_groups for p in group['params']), 'not a matrix'

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            sizes = {}
            for p in group['params']:
                if p.grad is not None:
                    sizes.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for params in sizes.values():
                self.update(params, **{key: group[key] for key in ('lr', 'weight_decay', 'momentum')})

    def update(self, params, lr, weight_decay, momentum):
        ok = 1 if self.found_inf is None else 1 - self.found_inf
        directions = []
        for p in params:
            grad = p.grad if self.found_inf is None else torch.where(ok > 0, p.grad, 0)
            if p not in self.state:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            average = self.state[p]['momentum_buffer']
            average.lerp_(grad, (1 - momentum) * ok)
            ahead = grad.lerp(average, momentum)
            directions.append((ahead if len(p) <= p.shape[1] else ahead.T).to(self.dtype))
        X = torch.stack(directions)                                             # (n, r, c) with r <= c
        X /= X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(5):
            A = X @ X.mT                                                        # (n, r, r)
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
        for p, x in zip(params, X):
            x = x if len(p) <= p.shape[1] else x.T
            p.mul_(1 - lr * weight_decay * ok)
            p.sub_(x * (lr * max(1, len(p) / p.shape[1]) ** 0.5 * ok))  # taller ones take larger updates


def clip_and_step(optimizers, scaler, parameters, loss, grad_clip=0.0):
    """
    Clips the gradients to the norm `grad_clip` (0: not), updates, forgets them -> their norm, a tensor.
    Where that or `loss`, a tensor, is not finite, no optimizer updates: the device decides, nobody waits.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = [p for p in parameters if p.grad is not None]
    min(parameters, key=torch.numel).grad += 0 * loss  # nan where the loss is not finite
    norm = (torch.nn.utils.clip_grad_norm_(parameters, grad_clip) if grad_clip else
            torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    finite = torch.isfinite(norm)
    if norm.device.type != 'mps':  # whose fused AdamW does not look at it
        for optimizer in optimizers:
            optimizer.found_inf = (~finite).float()
    if norm.device.type != 'mps' or finite:
        for optimizer in optimizers:
            optimizer.step()
    for p in parameters:
        p.grad = None
    scaler.update()
    return norm

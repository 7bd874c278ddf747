"""
The GPT: its definition, its weights from GPT-2, its optimizer and its generation, in one file.

Papers: GPT-2, Radford and others 2019; the attention, arXiv 1706.03762; GELU, arXiv 1606.08415;
AdamW, arXiv 1711.05101; counting FLOPs, PaLM, arXiv 2204.02311, appendix B.

Not here: data, checkpoints, and the loop that trains (bins.py, checkpoint.py, train.py).
"""
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from functools import cache

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


class LayerNorm(nn.Module):
    """ Layer normalisation (arXiv 1607.06450), with or without a bias: (..., n_embd) -> the same. """

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """ Every position reads from itself and those before it: (B, T, C) -> (B, T, C). """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, nh, hs)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),                     # (B, nh, T, hs)
            is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                                           # heads side by side
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
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
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
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # arXiv 1608.05859

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
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are more than block_size={self.config.block_size}')
        pos = torch.arange(T, device=idx.device)                                # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)               # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                                # (B, 1, vocab_size)
        logits = self.lm_head(x)                                                # (B, T, vocab_size)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """ Forgets the positions from `block_size` on. Build the optimizer after it, not before. """
        assert block_size <= self.config.block_size, 'positions can be forgotten, not added'
        self.config.block_size = block_size
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

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """ AdamW in two groups: tensors of two or more dimensions decay, biases and norms do not. """
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu', 'mps')  # one kernel for all tensors, where torch has it
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self, T):
        """ FLOPs of forward and backward for one token among T: 6 N + 12 L H Q T. """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * T

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """
        The share of the device's peak that `fwdbwd_per_iter` sequences in `dt` seconds come to.
        `peak` in FLOP/s; by default this model's device's, in bfloat16 on CUDA, else in float32.
        """
        T, device = self.config.block_size, self.lm_head.weight.device
        if peak is None:
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
# the device

# dense 16-bit FLOP/s, accumulated in float32, from the makers' data sheets
GPU_PEAKS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 836e12, 'H200': 989e12, 'H100 PCIe': 756e12,
    'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12,
    'L4': 121e12, 'V100': 125e12, 'T4': 65e12,
}


def choose_device(device='auto', dtype='auto', compile='auto'):
    """
    Puts what this machine is best at in the place of each 'auto' -> device, dtype, compile.
    Raises ValueError for a device that is not there, and for words that it does not know.
    """
    if device == 'auto':
        device = ('cuda' if torch.cuda.is_available() else
                  'mps' if torch.backends.mps.is_available() else 'cpu')
    kind, _, index = str(device).partition(':')
    there = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    if kind not in there or index and not index.isdigit():
        raise ValueError(f"device={device!r} must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if int(index or 0) >= there[kind]:
        raise ValueError(f'device={device}: {there[kind] or "none"} here; --device=auto takes what is')
    native = kind == 'cuda' and torch.cuda.get_device_capability(int(index or 0)) >= (8, 0)  # Ampere
    if dtype == 'auto':
        dtype = 'float32' if kind != 'cuda' else 'bfloat16' if native else 'float16'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype={dtype!r} must be 'auto', 'float32', 'bfloat16' or 'float16'")
    if compile not in ('auto', True, False):
        raise ValueError(f"compile={compile!r} must be 'auto', True or False")
    return device, dtype, kind == 'cuda' if compile == 'auto' else compile


def clip_and_step(optimizer, scaler, parameters, loss, grad_clip=0.0):
    """
    Clips the gradients to the norm `grad_clip` (0: not), updates, forgets them -> their norm, a tensor.
    Where that or `loss`, a tensor, is not finite, the update is skipped: the device decides, nobody waits.
    """
    scaler.unscale_(optimizer)
    parameters = [p for p in parameters if p.grad is not None]
    min(parameters, key=torch.numel).grad += 0 * loss  # nan where the loss is not finite
    norm = (torch.nn.utils.clip_grad_norm_(parameters, grad_clip) if grad_clip else
            torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif optimizer.defaults['fused'] and norm.device.type != 'mps':
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # which the kernel looks at, as for a scaler
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def fetch(values):
    """ Starts to bring a tensor to the host -> a function that waits for it and returns it as a list. """
    if values.device.type != 'cuda':
        return values.tolist
    copy, there = torch.empty_like(values, device='cpu', pin_memory=True), torch.cuda.Event()
    copy.copy_(values, non_blocking=True)
    there.record()
    return lambda: there.synchronize() or copy.tolist()


@cache
def peak_flops(device_type, dtype):
    """
    FLOP/s that the device can do in `dtype`, and where the figure is from: a data sheet for a GPU of
    the table in 16 bits, a short matrix product for whatever else there is.
    """
    if device_type == 'cuda':
        gpu = torch.cuda.get_device_name()
        for name, peak in GPU_PEAKS.items():
            if re.search(rf'\b{name}\b', gpu) and 'MIG' not in gpu and dtype != 'float32':
                return peak, f"{gpu}'s data sheet"
    best, n, seconds = 0.0, 512, 0.0
    while n <= 8192 and seconds < 0.02:  # the larger the nearer to the peak; up to 0.3 s on a CPU
        a = torch.randn(n, n, device=device_type, dtype=getattr(torch, dtype))
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for a GPU
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
        n *= 2
    return best, 'a measured matrix product'

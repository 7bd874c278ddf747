"""
What training a model of some size needs: parameters, memory, FLOPs, days. The model is not built.

Every figure is a closed form of the sizes in GPTConfig. Not here: what GPUs wait for each other,
which is a part of the assumed MFU.
"""
from bisect import bisect
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn as nn

from components.device import GPU_MEMORY, GPU_PEAKS, describe_compile, peak_flops
from components.functional import MAX_ATTENTION_MATRIX, MAX_LOGITS, loss_chunk_size

FLOAT32 = 4  # bytes of a number
ASSUMED_MFU = 0.4  # of a good run on GPUs, communication included
USABLE_MEMORY = 0.9  # of a GPU's; CUDA, NCCL and the allocator need the rest
TOKENS_PER_PARAMETER = 20  # the best use of a fixed number of FLOPs (Chinchilla, arXiv 2203.15556)

# -----------------------------------------------------------------------------
# parameters

# the part of the model that a parameter belongs to, by what its name contains
PARTS = {
    '.wte.': 'token embedding',
    '.wpe.': 'position embedding',
    '.attn.': 'attention',
    '.mlp.': 'MLP',
    '.ln_': 'norms',
    'lm_head.': 'lm_head',
}


def parameters_by_part(model):
    """ The number of parameters of each part of a GPT: {part: number}. Tied weights count once. """
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, p in model.named_parameters():
        for key, part in PARTS.items():
            if key in name:
                counts[part] += p.numel()
    return counts

# -----------------------------------------------------------------------------
# memory


def memory_of_training(model, batch_size, dtype, muon_lr=0.0, processes=1, fsdp=False,
                       activation_checkpointing=False, compile=False, device_type='cpu'):
    """
    The memory of the tensors of a training step, in each process, at its peak: as the backward pass
    of a micro-batch begins, while the gradients of an earlier micro-batch exist.

    Args:
        model: a GPT, which may be on the meta device
        batch_size: sequences in a micro-batch, of block_size tokens each
        dtype, muon_lr, fsdp, activation_checkpointing, compile: as in train.py
        processes: number of processes, each with its own micro-batches
        device_type: 'cuda', or 'cpu' for all others; their attention differs

    Returns:
        {what it is for: bytes}
    """
    config = model.config
    tokens = batch_size * config.block_size
    weights = FLOAT32 * sum(p.numel() for p in model.parameters())
    shards = processes if fsdp else 1
    memory = {
        'weights': weights / shards,
        'gradients': weights / shards,
        'optimizer moments': size_of_moments(model, muon_lr) / shards,
    }
    if fsdp:
        # all weights and gradients of the embeddings, and of the block that is computed
        blocks = FLOAT32 * sum(p.numel() for p in model.transformer.h.parameters())
        memory['gathered by FSDP'] = 2 * (weights - blocks + blocks / config.n_layer)
    elif processes > 1:
        memory['buckets of DDP'] = weights  # for the gradients of all processes
    if dtype != 'float32':
        # autocast casts the weights of linear layers, and saves them for the backward pass
        is_freed = fsdp or activation_checkpointing
        saved = model.lm_head if is_freed else model
        linears = [layer for layer in saved.modules() if isinstance(layer, nn.Linear)]
        memory['weights in 16 bits'] = 2 * sum(linear.weight.numel() for linear in linears)

    stream = tokens * FLOAT32 * config.n_embd  # the residual stream, which stays in float32
    block = tokens * activations_per_layer(config, dtype, device_type)
    loss = size_of_loss(config, tokens, dtype, is_compiled=compile)
    memory['activations'] = 2 * stream  # the inputs of ln_f and lm_head
    if activation_checkpointing:
        memory['activations'] += config.n_layer * stream
        # the logits are freed before the first block is computed again
        memory['logits, or a block'] = max(loss, block)
    else:
        memory['activations'] += config.n_layer * block
        memory['logits and loss'] = loss
    return memory


def size_of_moments(model, muon_lr):
    """ Bytes that the optimizers keep: two numbers per parameter with AdamW, one with Muon. """
    size = 2 * FLOAT32 * sum(p.numel() for p in model.parameters())
    if muon_lr > 0:
        size -= FLOAT32 * sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    return size


def activations_per_layer(config, dtype, device_type='cpu'):
    """
    Bytes that a block saves for the backward pass for a token: the inputs of its operations (as
    arXiv 2205.05198 counts them). For GPT-2 and C = n_embd, 64 C in float32; in 16 bits 46 C on a
    CPU, and 36 C on CUDA.
    """
    C = config.n_embd
    itemsize = getattr(torch, dtype).itemsize
    size = FLOAT32 * 2 * C        # of the norms
    size += itemsize * 3 * C      # of c_attn, attn.c_proj and c_fc
    size += itemsize * 2 * 4 * C  # of GELU and mlp.c_proj
    if config.dropout > 0:
        size += itemsize * 2 * C  # masks after attention and MLP

    # a CPU computes attention in float32, except for short sequences in bfloat16
    is_short_bfloat16 = dtype == 'bfloat16' and config.block_size <= MAX_ATTENTION_MATRIX
    is_in_dtype = device_type == 'cuda' or is_short_bfloat16
    attention_itemsize = itemsize if is_in_dtype else FLOAT32
    size += attention_itemsize * 3 * C  # queries, keys and values
    if attention_itemsize > itemsize:
        size += FLOAT32 * C     # the output, before it is cast to 16 bits
    if config.rotary and dtype == 'float32':
        size += FLOAT32 * 2 * C  # queries and keys before RoPE: all of c_attn's output is kept
    if config.qk_norm:
        size += FLOAT32 * 2 * C  # queries and keys before RMSNorm
    num_matrices = 0            # T x T, in each head; CUDA's attention stores none
    if device_type != 'cuda' and config.dropout > 0:
        num_matrices = 3        # the softmax, the dropout mask and their product
    elif device_type != 'cuda' and is_short_bfloat16:
        num_matrices = 1
    size += num_matrices * attention_itemsize * config.n_head * config.block_size
    return size


def size_of_loss(config, tokens, dtype, is_compiled):
    """ Bytes from the logits to the loss, as the backward pass begins. """
    V = config.vocab_size
    C = config.n_embd
    itemsize = getattr(torch, dtype).itemsize
    if is_compiled:
        # logits and their gradient, at most: on a CPU in float32 the second replaced the first
        return 2 * itemsize * V * tokens
    if V * tokens <= MAX_LOGITS:
        return 3 * FLOAT32 * V * tokens   # log-softmax, its gradient, the gradient of the logits
    chunk = 2 * FLOAT32 * V * loss_chunk_size(V)  # logits and log-softmax of a chunk of tokens
    gradients = FLOAT32 * C * (V + tokens)        # of lm_head and of its input
    return gradients + max(chunk, gradients)      # backward multiplies copies of the gradients


def largest_micro_batches(capacities, memory):
    """ For GPUs {name: bytes}, the largest batch_size of which memory(batch_size) fits, or 0. """
    @cache  # one for all GPUs
    def total(batch_size):
        return sum(memory(batch_size).values())
    return {name: bisect(range(1, 10**6), USABLE_MEMORY * capacity, key=total)
            for name, capacity in capacities.items()}

# -----------------------------------------------------------------------------
# time


def format_duration(seconds):
    """ A duration in the largest unit of which it has at least one, up to days: '3.5 hours'. """
    units = {'days': 86400, 'hours': 3600, 'minutes': 60}
    for unit, length in units.items():
        if seconds >= length:
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds'


def flops_of_recomputation(config):
    """ FLOPs per token that activation checkpointing adds: the forward pass of the blocks. """
    C = config.n_embd
    # without mlp.c_proj, 4 * C**2 weights: torch stops where nothing needs the result
    return config.n_layer * (2 * 8 * C**2 + 4 * C * config.block_size)


def seconds_of_training(model, tokens, peak, processes=1, activation_checkpointing=False):
    """ The time to train on `tokens` tokens with `processes` devices of `peak` FLOP/s each. """
    flops_per_token = model.flops_per_token(model.config.block_size)
    if activation_checkpointing:
        flops_per_token += flops_of_recomputation(model.config)
    return tokens * flops_per_token / (processes * peak * ASSUMED_MFU)

# -----------------------------------------------------------------------------
# the report


def print_estimate(model, settings):
    """
    Reports all of this for a run of train.py.

    Args:
        model: a GPT, which may be on the meta device
        settings: dict of bench.py's settings, with device, dtype and compile selected
    """
    s = SimpleNamespace(**settings)
    counts = parameters_by_part(model)
    num_params = sum(counts.values())
    checkpoint_size = FLOAT32 * num_params + size_of_moments(model, s.muon_lr)
    print('parameters:')
    for part, count in counts.items():
        print(f'  {part:20}{count:15,}')
    print(f'  {"total":20}{num_params:15,}, a checkpoint of {checkpoint_size / 1e6:,.1f} MB')

    T = model.config.block_size
    device_type = s.device.partition(':')[0]
    memory_of = partial(memory_of_training, model, dtype=s.dtype, muon_lr=s.muon_lr,
                        processes=s.processes, fsdp=s.fsdp, compile=s.compile,
                        activation_checkpointing=s.activation_checkpointing)
    memory = memory_of(s.batch_size, device_type=device_type)
    of_each = ' of each process' if s.processes > 1 else ''
    print(f'memory{of_each} for a micro-batch of {s.batch_size} x {T} tokens in {s.dtype}, '
          f'{describe_compile(s.compile)}, on {device_type}:')
    for name, size in memory.items():
        print(f'  {name:20}{size / 1e6:15,.1f} MB')
    print(f'  {"total":20}{sum(memory.values()) / 1e6:15,.1f} MB')
    print('  not in the total: torch itself, 0.35 GB; on a CPU also heap fragmentation, 0 to 65%')

    tokens_per_iter = s.gradient_accumulation_steps * s.batch_size * T
    flops_per_token = model.flops_per_token(T)
    print(f'an iteration: {tokens_per_iter:,} tokens, '
          f'{flops_per_token * tokens_per_iter / 1e12:,.4g} TFLOP')
    run_tokens = {
        f'max_iters={s.max_iters:,}': s.max_iters * tokens_per_iter,
        f'{TOKENS_PER_PARAMETER} tokens per parameter': TOKENS_PER_PARAMETER * num_params,
    }
    for name, tokens in run_tokens.items():
        print(f'{name}: {tokens / 1e9:,.4g} billion tokens, {flops_per_token * tokens:.4g} FLOP')
    largest = largest_micro_batches(GPU_MEMORY, partial(memory_of, device_type='cuda'))
    print_durations(model, s, largest, run_tokens)


def print_durations(model, s, largest, run_tokens):
    """ Reports the largest micro-batch, and the time of runs {name: tokens}, by device. """
    if s.activation_checkpointing:
        T = model.config.block_size
        share = flops_of_recomputation(model.config) / model.flops_per_token(T)
        print(f'activation checkpointing computes {share:.0%} more than MFU counts')
    print(f'duration at an MFU of {ASSUMED_MFU:.0%}, on {s.processes:,} of each, on this machine '
          f'in {s.dtype}, on GPUs in 16 bits')
    print(f'fits: the largest batch_size in {s.dtype}, {describe_compile(s.compile)}, of which '
          f'{1 - USABLE_MEMORY:.0%} of the memory stays free')
    header = ''.join(f'{name:>28}' for name in run_tokens)
    print(f'  {"":14}{"peak":>18}{"memory":>10}{"fits":>8}{header}')
    peak_here, _ = peak_flops(s.device.partition(':')[0], s.dtype)
    for device, peak in {'this machine': peak_here, **GPU_PEAKS}.items():
        capacity = ''
        fits = ''
        if device in GPU_MEMORY:
            capacity = f'{GPU_MEMORY[device] / 1e9:.0f} GB'
            fits = largest[device]
        row = f'  {device:14}{peak / 1e12:10,.2f} TFLOP/s{capacity:>10}{fits:>8}'
        for tokens in run_tokens.values():
            seconds = seconds_of_training(model, tokens, peak, s.processes,
                                          s.activation_checkpointing)
            row += f'{format_duration(seconds):>28}'
        print(row)

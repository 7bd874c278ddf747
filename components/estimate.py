"""
What training a model of some size needs: parameters, memory, FLOPs, communication, time. The model
is not built.

Every figure follows from the sizes in GPTConfig by a formula that stands here with its reason.
"""
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn

from components.device import GPU_MEMORY, GPU_PEAKS, peak_flops
from components.optim import MOMENTS, configure_optimizers
from model import MAX_ATTENTION_MATRIX, MAX_LOGITS, loss_chunk_size

FLOAT32 = 4  # bytes of a number
ASSUMED_MFU = 0.4  # of a good run on a GPU, while it waits for no other
USABLE_MEMORY = 0.9  # of a GPU's; CUDA, NCCL and the allocator need the rest
DISK_SPEED = 1e9  # bytes per second of torch.save
# 16,384 H100 had 419 unexpected interruptions in 54 days (Llama 3, arXiv 2407.21783)
GPU_SECONDS_PER_FAILURE = 16384 * 54 * 86400 / 419
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
                       activation_checkpointing=False):
    """
    The memory of the tensors of a training step, in each process, at its peak: as the backward pass
    of a micro-batch begins, while the gradients of an earlier micro-batch exist. With
    gradient_accumulation_steps=1 gradients are allocated as activations are freed, and the peak is
    lower by up to the gradients.

    The formulas are those of a CPU without compile. Against PyTorch 2.13, in float32, bfloat16 and
    float16, the tensors that a forward pass saves were within 2% of them, with dropout and newer
    flags together within 10%, and the peak of all tensors was within 4%.

    Not counted: torch itself, 0.35 GB on a CPU and more on CUDA; what is small or short-lived
    (indices, statistics of norms, results inside an operation, Muon's products); and free memory
    that the allocator keeps. For the last, 14 runs of train.py on Linux peaked at 0.9 to 1.65 times
    the total beside torch itself: glibc keeps tensors below 32 MB in a heap, which fragments. In a
    run whose tensors were all outside of it, the total was 3% too high.

    Args:
        model: a GPT, which may be on the meta device
        batch_size: sequences in a micro-batch, of block_size tokens each
        dtype: 'float32', 'bfloat16' or 'float16', in which autocast computes
        muon_lr: above 0 if Muon updates the matrices
        processes: number of processes, each of which has its own micro-batches
        fsdp: whether parameters, gradients and moments are divided among them
        activation_checkpointing: whether blocks are computed again in the backward pass

    Returns:
        {what it is for: bytes}
    """
    config = model.config
    num_shards = processes if fsdp else 1
    num_params = sum(shard_numel(p, num_shards) for p in model.parameters())
    tokens = batch_size * config.block_size
    memory = {
        'weights': FLOAT32 * num_params,
        'gradients': FLOAT32 * num_params,
        'optimizer moments': size_of_moments(model, muon_lr, num_shards),
        'weights in 16 bits': size_of_weight_copies(model, dtype),
        'activations': tokens * activations_per_token(config, dtype, activation_checkpointing),
    }
    loss = size_of_loss(config, tokens, dtype)
    if fsdp or activation_checkpointing:  # only lm_head's copy is kept, until the logits are freed
        del memory['weights in 16 bits']
        loss += size_of_weight_copies(model.lm_head, dtype)
    if fsdp:
        memory['gathered weights'] = size_of_gathered_weights(model, dtype)
    elif processes > 1:
        # the gradients are views of these only from the last micro-batch to the update
        memory['buckets of DDP'] = FLOAT32 * num_params
    block = size_of_block_in_backward(model, tokens, dtype, fsdp, activation_checkpointing)
    # the logits are freed before the first block is computed again: the larger one is the peak
    if block > loss:
        memory['a block, backward'] = block
    else:
        memory['logits and loss'] = loss
    return memory


def shard_numel(p, num_shards):
    """ The numbers of a parameter that the first process has: FSDP divides rows, rounded up. """
    return math.ceil(p.shape[0] / num_shards) * (p.numel() // p.shape[0])


def size_of_moments(model, muon_lr, num_shards=1):
    """ Bytes of what the optimizers keep: two numbers per parameter with AdamW, one with Muon. """
    # 'meta' and not the real device: fused AdamW refuses parameters that have no memory
    optimizers = configure_optimizers(model, 0.0, 1e-4, (0.9, 0.95), 'meta', muon_lr)
    size = 0
    for optimizer in optimizers.values():
        moments = MOMENTS.get(type(optimizer), ())
        for group in optimizer.param_groups:
            numbers = sum(shard_numel(p, num_shards) for p in group['params'])
            size += FLOAT32 * len(moments) * numbers
    return size


def size_of_weight_copies(module, dtype):
    """ Bytes of the linear layers in 16 bits, which autocast saves for the backward pass. """
    if dtype == 'float32':
        return 0
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return 2 * sum(linear.weight.numel() for linear in linears)


def parameters_of_blocks(model):
    """ What FSDP gathers block by block: attention and MLP. The root has the rest. """
    return [p for block in model.transformer.h for part in (block.attn, block.mlp)
            for p in part.parameters()]


def numel_of_units(model):
    """ The numbers that FSDP gathers at a time: the parameters of the root, and of each block. """
    of_blocks = sum(p.numel() for p in parameters_of_blocks(model))
    root = sum(p.numel() for p in model.parameters()) - of_blocks
    return root, of_blocks // model.config.n_layer


def size_of_gathered_weights(model, dtype):
    """ Bytes of the weights of other processes: the root's, those of a block and of the next. """
    root, block = numel_of_units(model)
    return FLOAT32 * root + 2 * getattr(torch, dtype).itemsize * block


def size_of_block_in_backward(model, tokens, dtype, fsdp, activation_checkpointing):
    """ Bytes that the backward pass needs for one block at a time, and frees after it. """
    _, block = numel_of_units(model)
    size = 0
    if activation_checkpointing:
        size += tokens * activations_per_layer(model.config, dtype)
        if not fsdp:
            size += size_of_weight_copies(model.transformer.h[0], dtype)
    if fsdp:
        size += FLOAT32 * model.lm_head.weight.numel()     # gradient, reduced after all blocks
        size += getattr(torch, dtype).itemsize * block     # gradients as they are computed,
        size += FLOAT32 * block                            # and as they are reduced
    return size


def activations_per_token(config, dtype, activation_checkpointing=False):
    """ Bytes that are saved for the backward pass for a token, except for the logits. """
    C = config.n_embd
    itemsize = getattr(torch, dtype).itemsize
    if activation_checkpointing:
        size = config.n_layer * FLOAT32 * C  # input of each block
    else:
        size = config.n_layer * activations_per_layer(config, dtype)
    if config.rmsnorm:
        size += FLOAT32 * C  # the embedding, input of an additional norm
    if config.dropout > 0:
        size += FLOAT32 * C  # dropout mask of the embedding
    size += FLOAT32 * C      # input of ln_f
    size += itemsize * C     # input of lm_head
    return size


def activations_per_layer(config, dtype):
    """
    Bytes that a block saves for the backward pass for a token: what the derivative of each of its
    operations is computed from. For the default architecture and C = n_embd, 64 C in float32 and
    46 C in 16 bits (counted for Megatron in arXiv 2205.05198).

    Autocast keeps the residual stream in float32.
    """
    C = config.n_embd
    itemsize = getattr(torch, dtype).itemsize

    # the residual stream
    size = FLOAT32 * C              # input of ln_1
    size += FLOAT32 * C             # input of ln_2

    # linear layers
    size += itemsize * C            # input of c_attn, the output of ln_1
    size += itemsize * C            # input of attn.c_proj, the output of the attention
    size += itemsize * C            # input of c_fc, the output of ln_2
    size += itemsize * 4 * C        # input of GELU, the output of c_fc
    size += itemsize * 4 * C        # input of mlp.c_proj, the output of GELU

    size += attention_activations(config, dtype)
    if config.dropout > 0:
        size += itemsize * 2 * C    # dropout masks after attention and MLP
    return size


def attention_activations(config, dtype):
    """
    The share of attention in activations_per_layer(). model.py keeps attention in float32 on a CPU,
    except for short sequences in bfloat16. On CUDA attention is in 16 bits, too: 10 C less than in
    float32; and its kernels never store the T x T matrices.
    """
    C = config.n_embd
    T = config.block_size
    itemsize = getattr(torch, dtype).itemsize
    size = 0
    if dtype == 'bfloat16' and T <= MAX_ATTENTION_MATRIX:
        size += itemsize * 3 * C            # queries, keys and values
        size += itemsize * config.n_head * T  # attention weights
        if config.dropout > 0:
            size += itemsize * 2 * config.n_head * T  # their mask, and both multiplied
        if config.qk_norm:
            size += FLOAT32 * 2 * C         # queries and keys before RMSNorm
        return size

    size += FLOAT32 * 3 * C         # queries, keys and values, the output of c_attn
    if config.rotary:
        size += FLOAT32 * 2 * C     # queries and keys after RoPE
    if config.qk_norm:
        size += FLOAT32 * 2 * C     # queries and keys after RMSNorm
    if config.dropout > 0:
        # with dropout, a CPU has no kernel that recomputes the attention weights: it saves the
        # softmax, the dropout mask and their product
        size += FLOAT32 * 3 * config.n_head * T
    elif itemsize < FLOAT32:
        size += FLOAT32 * C         # its output; in float32 it is the input of attn.c_proj
    return size


def size_of_loss(config, tokens, dtype):
    """
    Bytes from the logits to the loss as the backward pass begins, when the logits are freed. If the
    loss is computed in chunks of tokens: in the last chunk, or in the backward pass after it.
    """
    V = config.vocab_size
    C = config.n_embd
    if tokens * V <= MAX_LOGITS:
        size = FLOAT32 * V * tokens      # log-softmax
        size += FLOAT32 * V * tokens     # gradient of the log-softmax
        size += FLOAT32 * V * tokens     # gradient of the logits
        return size
    itemsize = getattr(torch, dtype).itemsize
    chunk_size = loss_chunk_size(V)
    chunk = FLOAT32 * V * chunk_size     # logits
    chunk += FLOAT32 * V * chunk_size    # log-softmax
    if itemsize < FLOAT32:
        chunk += itemsize * V * chunk_size  # logits in 16 bits
    gradients = FLOAT32 * V * C          # of lm_head
    gradients += FLOAT32 * C * tokens    # of its input
    # the backward pass multiplies both by the gradient of the loss, which copies them
    return gradients + max(chunk, gradients)

# -----------------------------------------------------------------------------
# communication

# what an iteration exchanges, by what can hide it
GRADIENTS = 'gradients'  # DDP's all-reduce
BLOCKS = 'blocks'        # FSDP: all-gathers, reduce-scatter
ROOT = 'root'            # FSDP: embeddings, norms and lm_head
MUON = 'Muon'            # momentum and updates


def sent_per_iteration(model, dtype, muon_lr, processes, fsdp, micro_batches):
    """
    The bytes that a process sends to others in an iteration, and as many that it receives, by the
    algorithms that send least: rings.

    Args:
        micro_batches: of each process

    Returns:
        {what: bytes}
    """
    others = processes - 1
    sent = {}
    if fsdp:
        itemsize = getattr(torch, dtype).itemsize
        of_blocks = sum(shard_numel(p, processes) for p in parameters_of_blocks(model))
        of_root = sum(shard_numel(p, processes) for p in model.parameters()) - of_blocks
        # gathered for the forward and again for the backward pass; gradients reduced in float32
        sent[BLOCKS] = micro_batches * others * of_blocks * (2 * itemsize + FLOAT32)
        # gathered once, in float32
        sent[ROOT] = micro_batches * others * of_root * (FLOAT32 + FLOAT32)
    else:
        num_params = sum(p.numel() for p in model.parameters())
        sent[GRADIENTS] = 2 * others * FLOAT32 * num_params / processes
    if muon_lr > 0:
        sent[MUON] = sent_by_muon(model, dtype, processes, fsdp)
    return sent


def sent_by_muon(model, dtype, processes, fsdp):
    """ Of compute_by_owners() with FSDP and else compute_in_parts(), both in distributed.py. """
    itemsize = 2 if dtype == 'bfloat16' else FLOAT32
    matrices_by_shape = {}
    for p in model.transformer.h.parameters():
        if p.dim() == 2:
            matrices_by_shape.setdefault(p.shape, []).append(p)
    numbers = 0
    for matrices in matrices_by_shape.values():
        share = math.ceil(len(matrices) / processes)  # matrices of each process
        if fsdp:
            # their rows to the owner, and back
            numbers += 2 * share * shard_numel(matrices[0], processes)
        elif processes <= 2 * len(matrices):  # otherwise each computes all of them
            numbers += share * matrices[0].numel()
    return (processes - 1) * itemsize * numbers


def waiting_time(sent, bandwidth, compute, micro_batches):
    """
    The seconds that an iteration waits for `sent` of sent_per_iteration(). Assumed: the bandwidth
    is reached, a message takes no time to start, and computing is not slowed down by it. The blocks
    travel while others compute. DDP's gradients travel during the backward pass of the last
    micro-batch, two thirds of its time. The rest travels while nothing is computed.

    Args:
        bandwidth: bytes per second
        compute: seconds that an iteration computes
        micro_batches: of each process
    """
    hidden = {
        GRADIENTS: compute / micro_batches * 2 / 3,
        BLOCKS: compute,
    }
    waiting = 0
    for name, size in sent.items():
        waiting += max(0, size / bandwidth - hidden.get(name, 0))
    return waiting

# -----------------------------------------------------------------------------
# time


def format_duration(seconds):
    """ A duration in the largest unit of which it has at least one, up to days: '3.5 hours'. """
    units = {'days': 86400, 'hours': 3600, 'minutes': 60}
    for unit, length in units.items():
        if seconds >= length:
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds'


def flops_of_recomputation(model, T):
    """ FLOPs per token of the blocks' forward pass, which activation checkpointing adds. """
    config = model.config
    _, weights = numel_of_units(model)
    if config.dropout == 0:  # torch stops before the last product, as nothing needs its result
        weights -= model.transformer.h[0].mlp.c_proj.weight.numel()
    return config.n_layer * (2 * weights + 4 * config.n_embd * T)


def best_checkpoint_interval(checkpoint_size, processes):
    """
    The seconds between saves with which the least time is lost (Young 1974, Communications of the
    ACM 17 (9)): sqrt(2 * duration of a save * mean time between failures).
    """
    duration = checkpoint_size / DISK_SPEED
    return math.sqrt(2 * duration * GPU_SECONDS_PER_FAILURE / processes)

# -----------------------------------------------------------------------------
# the report


def print_estimate(model, settings):
    """
    Reports all of this for a run of train.py.

    Args:
        model: a GPT, which may be on the meta device
        settings: dict of bench.py's settings, with device and dtype selected
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
    memory = memory_of_training(model, s.batch_size, s.dtype, s.muon_lr, s.processes, s.fsdp,
                                s.activation_checkpointing)
    of_each = ' of each process' if s.processes > 1 else ''
    print(f'memory{of_each} for a micro-batch of {s.batch_size} x {T} tokens in {s.dtype}, not '
          'compiled, laid out as on a CPU:')
    for name, size in memory.items():
        print(f'  {name:20}{size / 1e6:15,.1f} MB')
    print(f'  {"total":20}{sum(memory.values()) / 1e6:15,.1f} MB')
    print('  not in the total: torch itself, 0.35 GB; on a CPU also heap fragmentation, 0 to 65%')

    tokens_per_iter = s.gradient_accumulation_steps * s.batch_size * T
    flops_per_token = model.flops_per_token(T)
    flops_per_iter = flops_per_token * tokens_per_iter
    print(f'an iteration: {tokens_per_iter:,} tokens, {flops_per_iter / 1e12:,.4g} TFLOP')
    run_tokens = {
        f'max_iters={s.max_iters:,}': s.max_iters * tokens_per_iter,
        f'{TOKENS_PER_PARAMETER} tokens per parameter': TOKENS_PER_PARAMETER * num_params,
    }
    run_flops = {name: flops_per_token * tokens for name, tokens in run_tokens.items()}
    for name, tokens in run_tokens.items():
        print(f'{name}: {tokens / 1e9:,.4g} billion tokens, {run_flops[name]:.4g} FLOP')
    if s.processes == 1 and not s.activation_checkpointing:
        print_durations(run_flops, s.device.partition(':')[0], s.dtype)
        return
    run_iters = {name: tokens / tokens_per_iter for name, tokens in run_tokens.items()}
    print_gpus(model, s, sum(memory.values()), run_iters)
    if s.processes > 1:
        print_failures(checkpoint_size, s.processes)


def print_durations(run_flops, device_type, dtype):
    """ Reports how long runs {name: FLOPs} take on this machine and on each GPU. """
    peaks = {'this machine': peak_flops(device_type, dtype)[0], **GPU_PEAKS}
    print(f'duration at an MFU of {ASSUMED_MFU:.0%}, on this machine in {dtype}, '
          'on one GPU in 16 bits:')
    header = ''.join(f'{name:>28}' for name in run_flops)
    print(f'  {"":14}{"peak":>18}{header}')
    for device, peak in peaks.items():
        row = f'  {device:14}{peak / 1e12:10,.2f} TFLOP/s'
        for flops in run_flops.values():
            duration = format_duration(flops / (peak * ASSUMED_MFU))
            row += f'{duration:>28}'
        print(row)


class Iteration(NamedTuple):
    """ The seconds of an iteration. """
    compute: float
    waiting: float

    @property
    def total(self):
        return self.compute + self.waiting


def time_of_iteration(model, s, peak):
    """
    An iteration with s.processes GPUs of `peak` FLOP/s -> Iteration. `s` has bench.py's settings.
    """
    T = model.config.block_size
    flops_per_token = model.flops_per_token(T)
    if s.activation_checkpointing:
        flops_per_token += flops_of_recomputation(model, T)
    micro_batches = math.ceil(s.gradient_accumulation_steps / s.processes)  # of the slowest
    tokens = micro_batches * s.batch_size * T
    compute = flops_per_token * tokens / (peak * ASSUMED_MFU)
    waiting = 0.0
    if s.processes > 1:
        sent = sent_per_iteration(model, s.dtype, s.muon_lr, s.processes, s.fsdp, micro_batches)
        waiting = waiting_time(sent, s.interconnect * 1e9, compute, micro_batches)
    return Iteration(compute, waiting)


def print_gpus(model, s, memory, run_iters):
    """
    Reports for each GPU whether `memory` bytes fit, and how long an iteration and runs {name:
    iterations} take on as many as there are processes.
    """
    if s.processes > 1:
        print_communication(model, s)
    if s.activation_checkpointing:
        T = model.config.block_size
        share = flops_of_recomputation(model, T) / model.flops_per_token(T)
        print(f'activation checkpointing computes {share:.0%} more than MFU counts')
    print(f'on {s.processes:,} of these GPUs, which compute at {ASSUMED_MFU:.0%} of their 16-bit '
          f'peak; it fits if {1 - USABLE_MEMORY:.0%} of the memory stays free:')
    header = ''.join(f'{name:>26}' for name in run_iters)
    print(f'  {"":10}{"memory":>8}{"fits":>6}{"computing":>14}{"waiting":>14}{"MFU":>7}{header}')
    tokens = s.gradient_accumulation_steps * s.batch_size * model.config.block_size
    flops = model.flops_per_token(model.config.block_size) * tokens
    for gpu, peak in GPU_PEAKS.items():
        fits = 'yes' if memory <= USABLE_MEMORY * GPU_MEMORY[gpu] else 'no'
        time = time_of_iteration(model, s, peak)
        mfu = flops / time.total / (s.processes * peak)
        row = f'  {gpu:10}{GPU_MEMORY[gpu] / 1e9:5.0f} GB{fits:>6}'
        row += f'{time.compute * 1000:11,.1f} ms{time.waiting * 1000:11,.1f} ms{mfu:7.1%}'
        for num_iters in run_iters.values():
            row += f'{format_duration(num_iters * time.total):>26}'
        print(row)


def print_communication(model, s):
    """ Reports what each process exchanges with the others. """
    micro_batches = math.ceil(s.gradient_accumulation_steps / s.processes)
    kind = 'FSDP' if s.fsdp else 'DDP'
    print(f'{s.processes:,} processes with {kind}, up to {micro_batches} micro-batches each; in an '
          f'iteration each sends and receives, at {s.interconnect:g} GB/s:')
    when = {
        GRADIENTS: 'during the last backward pass',
        BLOCKS: 'while other blocks compute',
        ROOT: 'before and after the blocks',
        MUON: 'after the backward passes',
    }
    sent = sent_per_iteration(model, s.dtype, s.muon_lr, s.processes, s.fsdp, micro_batches)
    for name, size in sent.items():
        milliseconds = size / s.interconnect / 1e6
        print(f'  {name:20}{size / 1e6:15,.1f} MB{milliseconds:12,.1f} ms, {when[name]}')


def print_failures(checkpoint_size, processes):
    """ Reports how often one of the GPUs fails, and how often to save. """
    between_failures = format_duration(GPU_SECONDS_PER_FAILURE / processes)
    duration = format_duration(checkpoint_size / DISK_SPEED)
    interval = format_duration(best_checkpoint_interval(checkpoint_size, processes))
    print(f'failures as in arXiv 2407.21783: one in {between_failures}; a checkpoint takes '
          f'{duration} at {DISK_SPEED / 1e9:g} GB/s, and is best saved every {interval}')

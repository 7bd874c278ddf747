"""
What training a model of some size needs: parameters, memory, FLOPs, time. The model is not built.

Every figure follows from the sizes in GPTConfig by a formula that stands here with its reason.
"""
import torch
import torch.nn as nn

from components.device import GPU_PEAKS, peak_flops
from components.optim import MOMENTS, configure_optimizers
from model import MAX_LOGITS, loss_chunk_size

FLOAT32 = 4  # bytes of a number
ASSUMED_MFU = 0.4  # of a good run on a GPU
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


def memory_of_training(model, batch_size, dtype, muon_lr=0.0):
    """
    The memory of the tensors of a training step at its peak: as the backward pass of a micro-batch
    begins, while the gradients of an earlier micro-batch exist. With gradient_accumulation_steps=1
    gradients are allocated as activations are freed, and the peak is lower by up to the gradients.

    The formulas are those of a CPU without compile. Against PyTorch 2.13, in float32, bfloat16 and
    float16, the tensors that a forward pass saves were within 2% of them, with dropout and newer
    flags together within 10%, and the peak of all tensors was within 4%.

    Not counted: torch itself, 0.35 GB on a CPU and more on CUDA; what is small or short-lived
    (indices, statistics of norms, results inside an operation, Muon's products); DDP's copy of the
    gradients; and free memory that the allocator keeps. For the last, 14 runs of train.py on Linux
    peaked at 0.9 to 1.65 times the total beside torch itself: glibc keeps tensors below 32 MB in a
    heap, which fragments. In a run whose tensors were all outside of it, the total was 3% too high.

    Args:
        model: a GPT, which may be on the meta device
        batch_size: sequences in a micro-batch, of block_size tokens each
        dtype: 'float32', 'bfloat16' or 'float16', in which autocast computes
        muon_lr: above 0 if Muon updates the matrices

    Returns:
        {what it is for: bytes}
    """
    config = model.config
    num_params = sum(p.numel() for p in model.parameters())
    tokens = batch_size * config.block_size
    return {
        'weights': FLOAT32 * num_params,
        'gradients': FLOAT32 * num_params,
        'optimizer moments': size_of_moments(model, muon_lr),
        'weights in 16 bits': size_of_weight_copies(model, dtype),
        'activations': tokens * activations_per_token(config, dtype),
        'logits and loss': size_of_loss(config, tokens, dtype),
    }


def size_of_moments(model, muon_lr):
    """ Bytes of what the optimizers keep: two numbers per parameter with AdamW, one with Muon. """
    # 'meta' and not the real device: fused AdamW refuses parameters that have no memory
    optimizers = configure_optimizers(model, 0.0, 1e-4, (0.9, 0.95), 'meta', muon_lr)
    size = 0
    for optimizer in optimizers.values():
        moments = MOMENTS.get(type(optimizer), ())
        for group in optimizer.param_groups:
            size += FLOAT32 * len(moments) * sum(p.numel() for p in group['params'])
    return size


def size_of_weight_copies(model, dtype):
    """ Bytes of the linear layers in 16 bits, which autocast saves for the backward pass. """
    if dtype == 'float32':
        return 0
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return 2 * sum(linear.weight.numel() for linear in linears)


def activations_per_token(config, dtype):
    """ Bytes that are saved for the backward pass for a token, except for the logits. """
    C = config.n_embd
    itemsize = getattr(torch, dtype).itemsize
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

    Autocast keeps the residual stream in float32, and model.py keeps attention in float32 on a CPU.
    On CUDA attention is in 16 bits, too: 10 C less; and its kernels never store the T x T matrices.
    """
    C = config.n_embd
    T = config.block_size
    itemsize = getattr(torch, dtype).itemsize
    is_16_bit = itemsize < FLOAT32

    # the residual stream
    size = FLOAT32 * C              # input of ln_1
    size += FLOAT32 * C             # input of ln_2

    # linear layers
    size += itemsize * C            # input of c_attn, the output of ln_1
    size += itemsize * C            # input of attn.c_proj, the output of the attention
    size += itemsize * C            # input of c_fc, the output of ln_2
    size += itemsize * 4 * C        # input of GELU, the output of c_fc
    size += itemsize * 4 * C        # input of mlp.c_proj, the output of GELU

    # attention
    size += FLOAT32 * 3 * C         # queries, keys and values, the output of c_attn
    if config.rotary:
        size += FLOAT32 * 2 * C     # queries and keys after RoPE
    if config.qk_norm:
        size += FLOAT32 * 2 * C     # queries and keys after RMSNorm
    if config.dropout > 0:
        # with dropout, a CPU has no kernel that recomputes the attention weights: it saves the
        # softmax, the dropout mask and their product
        size += FLOAT32 * 3 * config.n_head * T
    elif is_16_bit:
        size += FLOAT32 * C         # its output; in float32 it is the input of attn.c_proj

    if config.dropout > 0:
        size += itemsize * 2 * C    # dropout masks after attention and MLP
    return size


def size_of_loss(config, tokens, dtype):
    """
    Bytes from the logits to the loss as the backward pass begins, when the logits are freed, or in
    the last chunk of tokens, if the loss is computed in chunks.
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
    size = FLOAT32 * V * chunk_size      # logits
    size += FLOAT32 * V * chunk_size     # log-softmax
    if itemsize < FLOAT32:
        size += itemsize * V * chunk_size  # logits in 16 bits
    size += FLOAT32 * V * C              # gradient of lm_head
    size += FLOAT32 * C * tokens         # gradient of the input of lm_head
    return size

# -----------------------------------------------------------------------------
# time


def format_duration(seconds):
    """ A duration in the largest unit of which it has at least one, up to days: '3.5 hours'. """
    units = {'days': 86400, 'hours': 3600, 'minutes': 60}
    for unit, length in units.items():
        if seconds >= length:
            return f'{seconds / length:,.1f} {unit}'
    return f'{seconds:.1f} seconds'

# -----------------------------------------------------------------------------
# the report


def print_estimate(model, batch_size, gradient_accumulation_steps, max_iters, device_type, dtype,
                   muon_lr):
    """ Reports all of this for a GPT, which may be on the meta device, and a run of train.py. """
    counts = parameters_by_part(model)
    num_params = sum(counts.values())
    memory = memory_of_training(model, batch_size, dtype, muon_lr)
    checkpoint_size = memory['weights'] + memory['optimizer moments']
    print('parameters:')
    for part, count in counts.items():
        print(f'  {part:20}{count:15,}')
    print(f'  {"total":20}{num_params:15,}, a checkpoint of {checkpoint_size / 1e6:,.1f} MB')

    T = model.config.block_size
    print(f'memory for a micro-batch of {batch_size} x {T} tokens in {dtype}, not compiled, '
          'laid out as on a CPU:')
    for name, size in memory.items():
        print(f'  {name:20}{size / 1e6:15,.1f} MB')
    print(f'  {"total":20}{sum(memory.values()) / 1e6:15,.1f} MB')
    print('  not in the total: torch itself, 0.35 GB; on a CPU also heap fragmentation, 0 to 65%')

    tokens_per_iter = gradient_accumulation_steps * batch_size * T
    flops_per_token = model.flops_per_token(T)
    flops_per_iter = flops_per_token * tokens_per_iter
    print(f'an iteration: {tokens_per_iter:,} tokens, {flops_per_iter / 1e12:,.4g} TFLOP')
    run_tokens = {
        f'max_iters={max_iters:,}': max_iters * tokens_per_iter,
        f'{TOKENS_PER_PARAMETER} tokens per parameter': TOKENS_PER_PARAMETER * num_params,
    }
    run_flops = {name: flops_per_token * tokens for name, tokens in run_tokens.items()}
    for name, tokens in run_tokens.items():
        print(f'{name}: {tokens / 1e9:,.4g} billion tokens, {run_flops[name]:.4g} FLOP')
    print_durations(run_flops, device_type, dtype)


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

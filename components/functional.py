"""
torch.nn.functional, of which four functions are computed in another way where it pays: with less
time on a CPU, or with less memory for the loss. Names, arguments and results are the same, and what
these ways do not cover is left to PyTorch: from torch 2.13 on, `import torch.nn.functional as F`
replaces this file.

Not here: the model that calls them (model.py).
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.functional import *  # noqa: F403  all other functions

MAX_ATTENTION_MATRIX = 512  # tokens; up to here, bfloat16 on a CPU uses attend_by_matrices()
MAX_LOGITS = 2**26  # numbers, 256 MiB in float32; the loss of more is computed in chunks of tokens

# -----------------------------------------------------------------------------
# RMSNorm

def rms_norm(input, normalized_shape, weight=None, eps=None):
    """ torch.nn.functional.rms_norm (arXiv 1910.07467), in less time for training on a CPU. """
    is_training_on_cpu = input.requires_grad and input.device.type == 'cpu'
    if not is_training_on_cpu or torch.compiler.is_compiling():
        return F.rms_norm(input, normalized_shape, weight, eps)

    is_plain = weight is None and eps is not None
    is_over_last_dimension = tuple(normalized_shape) == input.shape[-1:]
    is_precise = input.dtype in (torch.float32, torch.float64)  # squares in float16 may overflow
    if is_plain and is_over_last_dimension and is_precise:
        return RMSNorm.apply(input, eps)
    return F.rms_norm(input, normalized_shape, weight, eps)


class RMSNorm(torch.autograd.Function):
    """
    RMSNorm over the last dimension. On a CPU, PyTorch differentiates each of its operations
    separately; the backward pass here takes half the time.
    """

    @staticmethod
    def forward(ctx, x, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)            # (..., 1)
        scale = torch.rsqrt(norm * norm / x.shape[-1] + eps)                # (..., 1)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return x * scale                                                    # (..., n)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient will be differentiated again
            _, differentiate = torch.func.vjp(lambda x: F.rms_norm(x, x.shape[-1:], eps=ctx.eps), x)
            x_grad, = differentiate(grad)
            return x_grad, None
        mean = (grad * x).mean(dim=-1, keepdim=True)                        # (..., 1)
        return torch.addcmul(grad * scale, x, mean * scale**3, value=-1), None  # (..., n)

# -----------------------------------------------------------------------------
# dropout

def dropout(input, p=0.5, training=True, inplace=False):
    """ torch.nn.functional.dropout, with a faster mask on a CPU. """
    is_active = training and 0 < p < 1 and not inplace
    if is_active and input.device.type == 'cpu' and not torch.compiler.is_compiling():
        return input * dropout_mask(input, p)
    return F.dropout(input, p, training, inplace)


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

# -----------------------------------------------------------------------------
# attention

def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                                 *, scale=None, enable_gqa=False):
    """
    torch.nn.functional.scaled_dot_product_attention. On a CPU, where that is slower in 16 bits than
    in 32, 16-bit inputs are computed by attend_by_matrices() or in float32.
    """
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != 'cpu' or not is_16_bit:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    is_self_attention = query.dim() == 4 and query.shape == key.shape == value.shape
    is_plain = is_self_attention and is_causal and attn_mask is None
    is_short = query.shape[-2] <= MAX_ATTENTION_MATRIX
    with torch.autocast('cpu', enabled=False):
        if query.dtype == torch.bfloat16 and is_plain and is_short:
            return attend_by_matrices(query, key, value, dropout_p, scale)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()
        y = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa)
        return y.to(query.dtype)


def attend_by_matrices(query, key, value, dropout_p, scale):
    """
    Causal attention of (B, nh, T, hs) to the same in bfloat16 on a CPU, where matrix products in
    bfloat16 make it two to three times as fast as PyTorch's attention.
    """
    B, nh, T, hs = query.shape
    if scale is None:
        scale = hs ** -0.5
    q = query.flatten(0, 1)                                                 # (B * nh, T, hs)
    k = key.flatten(0, 1)                                                   # (B * nh, T, hs)
    v = value.flatten(0, 1)                                                 # (B * nh, T, hs)
    no_future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)        # (T, T)
    scores = torch.baddbmm(no_future, q, k.mT, alpha=scale)                 # (B * nh, T, T)
    weights = dropout(scores.softmax(dim=-1), dropout_p)                    # (B * nh, T, T)
    return (weights @ v).unflatten(0, (B, nh))                              # (B, nh, T, hs)

# -----------------------------------------------------------------------------
# the loss

def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None,
                         reduction='mean', ignore_index=None, label_smoothing=0.0):
    """
    torch.nn.functional.linear_cross_entropy of torch 2.13 (without its `options`): the
    cross-entropy of linear(input, linear_weight), in chunks of tokens where there are more than
    MAX_LOGITS logits. torch.compile does not need these, as it fuses the operations of the loss.

    input (N, C), linear_weight (V, C), target (N,) -> the mean loss in nats per token
    """
    if ignore_index is None:
        ignore_index = -100  # that of torch
    is_plain = linear_bias is None and weight is None and label_smoothing == 0
    is_mean_over_ids = reduction == 'mean' and target.dtype == torch.int64
    is_covered = is_plain and is_mean_over_ids and input.dim() == linear_weight.dim() == 2
    # chunks give float32
    is_float32 = input.dtype == linear_weight.dtype == torch.float32
    is_large = input.shape[0] * linear_weight.shape[0] > MAX_LOGITS
    if is_large and is_covered and is_float32 and not torch.compiler.is_compiling():
        needs_grad = torch.is_grad_enabled()  # which is False inside of ChunkedCrossEntropy
        loss_sum = ChunkedCrossEntropy.apply(
            input, linear_weight, target, ignore_index, needs_grad)
        return loss_sum / (target != ignore_index).sum()

    logits = F.linear(input, linear_weight, linear_bias)                    # (N, V)
    return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction=reduction,
                           label_smoothing=label_smoothing)


def loss_chunk_size(vocab_size):
    """ Tokens in a chunk: 1024 at most, since in float16 a sum of more gradients may overflow. """
    return max(1, min(MAX_LOGITS // vocab_size, 1024))


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The sum of the cross-entropy of linear(x, weight) for x (N, C), weight (V, C) and target (N,) in
    chunks of tokens. The gradients are computed at once, while the logits of a chunk exist (as in
    Liger Kernel, arXiv 2410.10989); backward() only multiplies them by that of the loss.

    They are gradients of the sum, between -1 and 1 for a logit: those of a mean over a batch would
    often be too small for float16, and a GradScaler only scales what reaches backward(). That of
    the weight is added up in the weight's dtype, float32.
    """

    @staticmethod
    def forward(ctx, x, weight, target, ignore_index, needs_grad):
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        cast_weight = weight.to(dtype)  # once, not in every chunk
        chunk_size = loss_chunk_size(weight.shape[0])
        loss_sum = torch.zeros((), device=x.device)
        x_grads = []
        weight_grad = None
        if needs_grad:
            weight_grad = torch.zeros_like(weight)
        for x_chunk, target_chunk in zip(x.split(chunk_size), target.split(chunk_size)):
            loss, x_grad = chunk_loss(
                x_chunk.to(dtype), cast_weight, target_chunk, ignore_index, weight_grad)
            loss_sum += loss
            if needs_grad:
                x_grads.append(x_grad.to(x.dtype))
        if needs_grad:
            ctx.save_for_backward(x, weight, target, torch.cat(x_grads), weight_grad)
            ctx.ignore_index = ignore_index
        return loss_sum

    @staticmethod
    def backward(ctx, loss_grad):
        x, weight, target, x_grad, weight_grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: as in RMSNorm
            gradients = torch.func.grad(sum_of_losses, argnums=(0, 1))
            x_grad, weight_grad = gradients(x, weight, target, ctx.ignore_index)
        return x_grad * loss_grad, weight_grad * loss_grad, None, None, None


def sum_of_losses(x, weight, target, ignore_index):
    """ ChunkedCrossEntropy by operations that PyTorch can differentiate more than once. """
    logits = F.linear(x, weight)                                            # (N, V)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction='sum')


def chunk_loss(x, weight, target, ignore_index, weight_grad=None):
    """
    The sum of the cross-entropy of linear(x, weight), and its gradient by x, or None without
    `weight_grad` (V, C), to which the gradient by the weight is added.
    """
    logits = F.linear(x, weight)                                            # (chunk_size, V)
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)          # (chunk_size, V)
    del logits
    loss = F.nll_loss(log_probs, target, ignore_index=ignore_index, reduction='sum')
    if weight_grad is None:
        return loss, None
    # the gradient of logits: the probabilities, minus 1 at the target
    is_ignored = (target == ignore_index)[:, None]                          # (chunk_size, 1)
    index = target[:, None].masked_fill(is_ignored, 0)                      # (chunk_size, 1)
    grad = log_probs.exp_()                                                 # (chunk_size, V)
    grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
    grad.masked_fill_(is_ignored, 0)
    grad = grad.to(x.dtype)
    weight_grad += grad.T @ x
    return loss, grad @ weight

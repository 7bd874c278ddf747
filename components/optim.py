"""
Optimizers: which parameters each updates and at which learning rate, gradient clipping, and the
step that is skipped when the loss or the gradients are NaN or inf. AdamW is torch's, Muon is ours.

Not here: the schedule of the learning rate (train.py).

To add an optimizer, change `configure_optimizers`, and name the tensors that it keeps in `MOMENTS`.
"""
from functools import partial

import torch
import torch.distributed as dist

from components.distributed import (
    compute_in_parts,
    compute_on_whole_matrices,
    full_tensor,
    is_sharded,
    local_part,
)


class Muon(torch.optim.Optimizer):
    """
    Momentum with orthogonalized updates of matrices (Jordan and others 2024,
    kellerjordan.github.io/posts/muon).

    The update of a matrix is its Nesterov momentum with every singular value brought close to 1,
    by five steps of a Newton-Schulz iteration. torch.optim.Muon computes the same update, one
    matrix at a time; here matrices of one shape are computed together, several processes share the
    work, and a step is skipped where `found_inf` is 1.

    Args:
        params: matrices, or groups of them
        lr: learning rate
        weight_decay: decoupled, as in AdamW
        momentum: decay of the running average of gradients
        dtype: in which the iteration is computed
        compile: whether to compile the update, which starts half as many kernels; only in a single
            process, because the exchanges of several cannot be compiled
    """
    found_inf = None  # a tensor, 1.0 to skip the step; see clip_and_step()

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16,
                 compile=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype
        self.is_compiled = compile and not dist.is_initialized()
        self.update = update_matrices
        if self.is_compiled:
            # one graph for each shape; with dynamic=None the second one would be for all shapes
            self.update = torch.compile(update_matrices, dynamic=False, fullgraph=True)
        for group in self.param_groups:
            assert all(p.dim() == 2 for p in group['params']), 'Muon updates matrices only'

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params_by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    params_by_shape.setdefault(p.shape, []).append(p)
            lr = group['lr']
            if self.is_compiled:  # in a graph a float is a constant, and another one recompiles
                lr = torch.full((), lr, device=group['params'][0].device)
            for params in params_by_shape.values():
                averages = [self.momentum_buffer(p) for p in params]
                self.update(params, averages, lr, group['weight_decay'], group['momentum'],
                            self.dtype, self.found_inf)

    def momentum_buffer(self, p):
        """ The running average of the gradients of p. """
        if p not in self.state:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        return self.state[p]['momentum_buffer']


def update_matrices(params, averages, lr, weight_decay, momentum, dtype, found_inf):
    """ Updates matrices of one shape together, as a GPU waits for the start of each call. """
    # of sharded matrices, this process has some rows
    grads = [local_part(p.grad) for p in params]                            # n x (rows, columns)
    averages = [local_part(average) for average in averages]                # n x (rows, columns)
    factor = 1
    if found_inf is not None:
        is_finite = found_inf == 0
        factor = is_finite.float()                                          # 0 skips the step
        # an average of itself with itself: it stays as it is
        grads = torch.where(is_finite, torch.stack(grads), torch.stack(averages)).unbind()
    torch._foreach_lerp_(averages, grads, 1 - momentum)
    # Nesterov: one step ahead of the average
    directions = torch._foreach_lerp(grads, averages, momentum)

    rows, columns = params[0].shape
    directions = torch.stack(directions)                                    # (n, rows, columns)
    if dtype == torch.bfloat16:  # float16 has too small a range for gradients
        directions = directions.to(dtype)
    function = partial(orthogonalize, dtype=dtype)
    if is_sharded(params[0]):
        updates = compute_on_whole_matrices(function, directions, rows)
    else:
        updates = compute_in_parts(function, directions)
    scale = max(1, rows / columns) ** 0.5  # taller matrices take larger updates
    updates = updates * (lr * scale * factor)
    local_params = [local_part(p) for p in params]
    torch._foreach_mul_(local_params, 1 - lr * weight_decay * factor)
    torch._foreach_sub_(local_params, updates.to(local_params[0].dtype).unbind())


def orthogonalize(X, dtype):
    """
    Brings all singular values close to 1, by five steps of X <- 3.4445 X - 4.775 A X + 2.0315 A A
    X with A = X X^T.

    Args:
        X: (n, rows, columns); n matrices
        dtype: of the iteration, whose numbers are at most about 1

    Returns: (n, rows, columns) in the dtype of X
    """
    rows, columns = X.shape[1:]
    norm = X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                 # (n, 1, 1)
    result_dtype = X.dtype
    X = (X / norm).to(dtype)
    for _ in range(5):
        if rows <= columns:
            A = X @ X.mT                                                # (n, r, r)
            B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)       # (n, r, r)
            X = torch.baddbmm(X, B, X, beta=3.4445)                     # (n, r, c)
        else:  # the same for X^T, with smaller products
            A = X.mT @ X                                                # (n, c, c)
            B = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)       # (n, c, c)
            X = torch.baddbmm(X, X, B, beta=3.4445)                     # (n, r, c)
    return X.to(result_dtype)

# -----------------------------------------------------------------------------
# the optimizers of a model

# The tensors that an optimizer keeps for each parameter, beside its step count: a checkpoint has to
# hold them, which is not checked for an optimizer that is missing here.
MOMENTS = {
    torch.optim.AdamW: ('exp_avg', 'exp_avg_sq'),
    Muon: ('momentum_buffer',),
}


def configure_optimizers(model, weight_decay, learning_rate, betas, device_type, muon_lr=0.0,
                         dtype='float32', compile=False):
    """
    The optimizers of a model: AdamW for all parameters, or with `muon_lr` Muon for the matrices of
    the blocks and AdamW for the rest.

    Args:
        model: a GPT
        weight_decay: of tensors with two or more dimensions; biases and norms do not decay
        learning_rate: the peak, of AdamW
        betas: of AdamW
        device_type: 'cpu', 'cuda' or 'mps'
        muon_lr: the peak learning rate of Muon; 0 for none
        dtype: of the run, in which Muon computes; float16 on CUDA alone
        compile: whether to compile Muon's update

    Returns:
        {name: optimizer}. A checkpoint holds each state under its name. Every parameter group has
        an `lr_scale`: its share of the learning rate that the schedule gives.
    """
    optimizers = {}
    params = [p for p in model.parameters() if p.requires_grad]
    if muon_lr > 0:
        block_params = model.transformer.h.parameters()
        matrices = [p for p in block_params if p.requires_grad and p.dim() == 2]
        matrix_ids = {id(p) for p in matrices}
        params = [p for p in params if id(p) not in matrix_ids]

    decayed = [p for p in params if p.dim() >= 2]
    not_decayed = [p for p in params if p.dim() < 2]
    groups = [
        {'params': decayed, 'weight_decay': weight_decay, 'lr_scale': 1.0},
        {'params': not_decayed, 'weight_decay': 0.0, 'lr_scale': 1.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if device_type == 'cuda':  # only with fused=True, AdamW reads this; see clip_and_step()
        adamw.found_inf = None
    optimizers['optimizer'] = adamw

    if muon_lr > 0:
        group = {'params': matrices, 'lr_scale': muon_lr / learning_rate}
        muon_dtype = getattr(torch, dtype)
        if dtype == 'float16' and device_type != 'cuda':  # which CPUs multiply slowly
            muon_dtype = torch.float32
        optimizers['muon'] = Muon([group], muon_lr, weight_decay, dtype=muon_dtype,
                                  compile=bool(compile))
    return optimizers


def set_learning_rate(optimizers, lr):
    """ Gives every parameter group its share of the learning rate. """
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group['lr'] = lr * group.get('lr_scale', 1.0)

# -----------------------------------------------------------------------------
# the step

def clip_and_step(optimizers, scaler, parameters, loss, grad_clip=0.0):
    """
    Clips the gradients, updates the parameters, and frees the gradients. If the loss or the norm
    of the gradients is not finite, all optimizers skip the step.

    On CUDA, optimizers with an attribute `found_inf` are given that decision as a tensor and skip
    the step by themselves, so that the host does not wait for it.

    Args:
        optimizers: {name: optimizer}
        scaler: a torch.amp.GradScaler, enabled or not
        parameters: of the model
        loss: a tensor, the loss of all processes
        grad_clip: gradients of a larger norm are scaled down to it; 0 for none

    Returns the norm of the gradients before clipping, a tensor.
    """
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    parameters = [p for p in parameters if p.grad is not None]
    max_norm = grad_clip if grad_clip > 0 else float('inf')
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    is_finite = torch.isfinite(norm) & torch.isfinite(loss)
    for optimizer in optimizers.values():
        if norm.is_cuda and hasattr(optimizer, 'found_inf'):
            optimizer.found_inf = (~is_finite).float()
            optimizer.step()
        elif is_finite:
            optimizer.step()
    for p in parameters:
        p.grad = None
    scaler.update()
    return norm

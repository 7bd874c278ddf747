"""
The update: gradients clipped and applied, unless they are not finite, and Muon for the matrices. AdamW is
torch's. Imports nothing of ours.
"""
import torch


class Muon(torch.optim.Optimizer):
    """
    The update of a matrix is its momentum (Nesterov's) with every singular value brought close to 1, by a
    polynomial applied five times (Jordan and others 2024, kellerjordan.github.io/posts/muon). It is that of
    torch.optim.Muon; here all matrices of a size go through the products together, in `dtype`, and an
    update is left out where `found_inf` is set, as fused AdamW does.
    """
    _step_supports_amp_scaling = True  # torch's word for an optimizer that looks at found_inf
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
            A = X @ X.mT                   # (n, r, r); X becomes 3.4445 X - 4.775 A X + 2.0315 A A X
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
        for p, x in zip(params, X):
            x = x if len(p) <= p.shape[1] else x.T
            p.mul_(1 - lr * weight_decay * ok)
            p.sub_(x * (lr * max(1, len(p) / p.shape[1]) ** 0.5 * ok))  # taller ones take larger updates


def clip_and_step(optimizers, scaler, parameters, loss, grad_clip=0.0):
    """
    Clips the gradients to the norm `grad_clip` (0: not), updates, forgets them -> their norm, a tensor.
    Where that or `loss`, a tensor, is not finite, no optimizer updates. For those that know found_inf, as
    fused AdamW and Muon, the device decides, and nobody waits.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = [p for p in parameters if p.grad is not None]
    min(parameters, key=torch.numel).grad += 0 * loss  # 0 * inf is nan: the norm shows a bad loss too
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float('inf'))
    finite = torch.isfinite(norm)
    for optimizer in optimizers:
        knows_found_inf = getattr(optimizer, '_step_supports_amp_scaling', False)
        if knows_found_inf and norm.device.type != 'mps':  # where fused AdamW ignores it
            optimizer.found_inf = (~finite).float()
            optimizer.step()
        elif finite:
            optimizer.step()
    for p in parameters:
        p.grad = None
    scaler.update()
    return norm


def settle(model, x, y, autocast):
    """
    A backward pass whose gradients are dropped. After its first one DDP rebuilds its buckets, and with them
    the order of its sums, which a run that is resumed has to share with one that was not.
    """
    with autocast:
        _, loss = model(x, y)
    loss.backward()
    model.zero_grad()

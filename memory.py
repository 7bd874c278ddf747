"""
The memory that training will take, counted on tensors that have none.
"""
import weakref

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from update import clip_and_step


class MemoryCount(TorchDispatchMode):
    """
    Counts the bytes of the tensors that are made under it and not yet freed: `now`, and at most, `peak`.
    `heap` is the most with what the C library's heap loses between pieces below 32 MB, 0.35 of them: fitted
    to ten runs of train.py on Linux (glibc 2.36, machine.use_device()), to 10%.
    """

    def __init__(self):
        super().__init__()
        self.now, self.small, self.peak, self.heap, self.known = 0, 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result

    def add(self, n):
        self.now += n
        self.small += n if abs(n) < 2**25 else 0
        self.peak = max(self.peak, self.now)
        self.heap = max(self.heap, int(self.now + 0.35 * self.small))


def memory_of_training(config, batch_size, gradient_accumulation_steps, dtype, muon=False):
    """
    The bytes that a process of train.py takes for a GPT of `config`, not compiled: by what they are for, at
    most together, and on Linux and a CPU in all, beyond what `import torch` takes. Runs two iterations on
    tensors without memory, laid out as on a CPU: in 16 bits and with dropout CUDA's attention keeps less.
    """
    count = MemoryCount()
    with FakeTensorMode(), count:
        model = GPT(config)
        optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu', muon)]
        if muon:
            optimizers.append(model.configure_muon(1e-4, 0.0, dtype))
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for _ in range(2):  # from the second on there are moments
            for _ in range(min(2, gradient_accumulation_steps)):  # and in the second micro-batch gradients
                idx, before = torch.zeros(batch_size, config.block_size, dtype=torch.long), count.now
                with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                    _, loss = model(idx, idx)
                activations = count.now - before
                loss.backward()
                loss = loss.detach()
            clip_and_step(optimizers, scaler, model.parameters(), loss, grad_clip=1.0)
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(value.nbytes for optimizer in optimizers for state in optimizer.state.values()
                  for value in state.values())
    return {'weights': weights, 'gradients': weights, 'moments': moments, 'activations': activations,
            'at most at once': count.peak,
            'on a Linux CPU, beside import torch': count.heap + 115 * 10**6}  # kernels, and their buffers

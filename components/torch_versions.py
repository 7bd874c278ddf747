"""
What differs between the versions of PyTorch that requirements.txt allows. Each function can go when
the lowest of them has what it looks for.

Imports nothing of ours.
"""
import inspect

import torch
from torch.nn.parallel import DistributedDataParallel as DDP


def cpu_capabilities():
    """ {instruction set: whether this CPU has it}; in 2.9 only that of bfloat16. """
    if hasattr(torch.cpu, 'get_capabilities'):
        return torch.cpu.get_capabilities()
    return {'avx512_bf16': torch.cpu._is_avx512_bf16_supported()}


def ddp_without_buffer_sync():
    """
    The argument with which DDP does not broadcast the model's buffers in every forward pass. Its
    name was broadcast_buffers before 2.13, which warns of the old name.
    """
    if 'forward_sync_buffers' in inspect.signature(DDP).parameters:
        return {'forward_sync_buffers': False}
    return {'broadcast_buffers': False}

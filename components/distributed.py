"""
The processes of a job that torchrun started: how they find each other, agree, and shut down.

Not here: what each of them computes (train.py); signals (signals.py).
"""
import math
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from components.errors import UserError

# how long processes wait for each other: longer than one of them saves, uploads or compiles
TIMEOUT = timedelta(hours=1)


class Job(NamedTuple):
    """ A job that torchrun started. """
    name: str = ''           # random; the same in all processes, and after --max-restarts
    restarted: bool = False  # whether torchrun has started the processes again after one failed


def choose_backend(backend, device_type):
    """ Replaces 'auto' by NCCL on CUDA where torch has it, else Gloo. """
    if backend != 'auto':
        return backend
    if device_type == 'cuda' and dist.is_nccl_available():
        return 'nccl'
    return 'gloo'


def init_process_group(backend, rank, world_size, dtype):
    """
    Joins the other processes of the job. With NCCL, this process has to have selected its GPU.

    Raises UserError if variables of torchrun are missing, and if this machine selected another
    `dtype` than the first one: float16 gradients are scaled, and their sum with others is wrong.

    Returns a Job.
    """
    restart_count = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    try:
        job_store, _, _ = next(dist.rendezvous('env://'))
    except ValueError as error:  # variables are missing
        raise UserError(f'{error}; start several processes with torchrun') from None
    # torchrun keeps this store over its restarts: the first process to come names the job
    name = job_store.compare_set('job', '', os.urandom(16).hex()).decode()
    # the addresses of processes that have ended stay under their own prefix
    store = dist.PrefixStore(restart_count, job_store)
    if rank == 0:
        store.set('dtype', dtype)
    master_dtype = store.get('dtype').decode()
    if dtype != master_dtype:
        raise UserError(f'dtype={dtype} on this machine differs from {master_dtype} on the '
                        'first; set the same --dtype on all machines')
    gpu = None
    if backend == 'nccl':  # otherwise NCCL guesses the GPU from the rank
        gpu = torch.device('cuda', torch.cuda.current_device())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=TIMEOUT, device_id=gpu)
    return Job(name, restart_count != '0')


def broadcast(value):
    """ The first process's `value`, which can be pickled, in all processes. """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_reduce_sum(tensor, device):
    """ The sum of a tensor over all processes, on `device`; unchanged in a single process. """
    if not dist.is_initialized():
        return tensor
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor


def compute_in_parts(function, batch):
    """
    function(batch), of which each process computes a part.

    Args:
        function: of each row by itself, (n, ...) -> (n, ...)
        batch: (N, ...), the same in all processes
    """
    if not dist.is_initialized():
        return function(batch)
    N = len(batch)
    num_processes = dist.get_world_size()
    n = math.ceil(N / num_processes)  # rows for each; the last ones may be computed twice
    rows = (dist.get_rank() * n + torch.arange(n, device=batch.device)) % N
    part = function(batch[rows])
    results = part.new_empty(num_processes * n, *part.shape[1:])
    dist.all_gather_into_tensor(results, part.contiguous())
    return results[:N]


def warm_up_ddp_buckets(model, x, y, autocast):
    """
    Runs one backward pass and drops its gradients. After its first backward pass DDP rebuilds its
    buckets, and with them the order of its sums: a resumed run must begin with the order that the
    interrupted one had.
    """
    with autocast:
        _, loss = model(x, y, return_logits=False)
    loss.backward()
    model.zero_grad()


def shut_down(exit_code):
    """
    Ends this process; with exit code 0 and without other processes, the script ends by itself.

    With several processes, waits for the others first: when one fails, torchrun kills the rest,
    even during a save. Then skips Python's own shutdown, in which Gloo's threads sometimes abort.
    """
    if 'wandb' in sys.modules:
        sys.modules['wandb'].finish()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if exit_code != 0:
        sys.exit(exit_code)

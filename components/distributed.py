"""
The processes of a job that torchrun started: how they find each other, agree, and shut down.

With fsdp=True the parameters, gradients and moments of a model are divided among the processes
(FSDP2, arXiv 2304.11277 and torch.distributed.fsdp): each is a DTensor, of which a process has some
rows. Everything that knows of that stands here.

Not here: what each of them computes (train.py); when a run ends (stopping.py).
"""
import inspect
import math
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from components.device import compile_model
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


def device_of_process(device):
    """ On CUDA the GPU of this process, if torchrun started it. """
    if 'LOCAL_RANK' in os.environ and device.startswith('cuda'):
        # some launchers show each process its own GPU alone, as 0
        index = int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()
        return f'cuda:{index}'
    return device


def init_process_group(backend, rank, world_size, dtype):
    """
    Joins the other processes of the job, if torchrun started this one. With NCCL, it has to have
    selected its GPU.

    Raises UserError if variables of torchrun are missing, if two processes have the same GPU with
    NCCL, and if this machine selected another `dtype` than the first one: float16 gradients are
    scaled, and their sum with others is wrong.

    Returns a Job.
    """
    if 'RANK' not in os.environ:
        return Job()
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
        uuid = torch.cuda.get_device_properties(gpu).uuid
        owner = store.compare_set(f'GPU {uuid}', '', str(rank)).decode()
        if owner != str(rank):
            raise UserError(f'processes {owner} and {rank} have the same GPU, which NCCL refuses; '
                            'start a process for each GPU, or set --backend=gloo')
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


def is_first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def print_master(message):
    """
    Prints a message in the first process alone. A closed pipe or a full disk does not end a run.
    """
    if os.environ.get('RANK', '0') == '0':
        with suppress(OSError):
            print(message, flush=True)


def broadcast_tensor(tensor):
    """
    The first process's tensor, in the host memory of all processes. Those without it give a tensor
    of the same shape and dtype, which may be on the meta device.
    """
    if not dist.is_initialized():
        return tensor
    if not is_first_process():
        tensor = torch.empty_like(tensor, device='cpu')
    is_nccl = dist.get_backend() == 'nccl'  # which sends from GPU to GPU
    sent = tensor.cuda() if is_nccl else tensor.contiguous()
    dist.broadcast(sent, 0)
    return sent.cpu()


def all_reduce_sum(tensor, device):
    """ The sum of a tensor over all processes, on `device`; unchanged in a single process. """
    if not dist.is_initialized():
        return tensor
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor


def weighted_mean(values, weights, device):
    """
    The mean of the values of all processes, in float64.

    Args:
        values, weights: lists of 0-d tensors
    """
    weights = torch.stack(weights).cpu().double()
    weighted_sum = (torch.stack(values).cpu().double() * weights).sum()
    totals = all_reduce_sum(torch.stack((weighted_sum, weights.sum())), device)
    return (totals[0] / totals[1]).item()


def compute_in_parts(function, batch):
    """
    function(batch), of which each process computes a part. Where processes are more than twice as
    many as rows, each computes all of them: gathering a row from each would take longer.

    Args:
        function: of each row by itself, (n, ...) -> (n, ...)
        batch: (N, ...), the same in all processes
    """
    N = len(batch)
    if not dist.is_initialized() or dist.get_world_size() > 2 * N:
        return function(batch)
    num_processes = dist.get_world_size()
    n = math.ceil(N / num_processes)  # rows for each; the last ones may be computed twice
    rows = (dist.get_rank() * n + torch.arange(n, device=batch.device)) % N
    part = function(batch[rows])
    results = part.new_empty(num_processes * n, *part.shape[1:])
    dist.all_gather_into_tensor(results, part.contiguous())
    return results[:N]


def parallelize(model, device, ddp, config):
    """
    Prepares a model for training in this process or in several, and gives all processes the weights
    that it has in the first one.

    Args:
        model: the GPT, on the CPU; with fsdp in processes other than the first one without memory,
            on the meta device
        device: of this process
        ddp: whether torchrun started the script, so that there may be several processes
        config: dict of train.py's settings, of which this reads dtype, compile, and fsdp: whether
            each process has a part of the parameters instead of the whole model

    Returns:
        raw_model: the GPT, on its device, whose parameters the optimizers update
        model: what training and evaluation call
    """
    if config['fsdp']:
        compile_model(model, config['compile'])  # in place
        shard(model, device, config['dtype'])
        return model, model
    raw_model = model.to(device)
    model = compile_model(raw_model, config['compile'])
    if not ddp:
        return raw_model, model
    # buffers are constant; torch 2.13 has renamed the argument, and warns of the old name
    is_renamed = 'forward_sync_buffers' in inspect.signature(DDP).parameters
    sync_buffers = 'forward_sync_buffers' if is_renamed else 'broadcast_buffers'
    if config['compile']:
        # blocks are compiled one by one: DDP need not divide them to overlap its exchanges
        torch._dynamo.config.optimize_ddp = False
    # gradients stay in the buckets that the processes exchange. The first process's weights are
    # copied to the others
    return raw_model, DDP(model, gradient_as_bucket_view=True, **{sync_buffers: False})


def shard(model, device, dtype):
    """
    Divides the parameters of a GPT among the processes. A block is gathered where it is computed.
    Gradients are reduced after every micro-batch, so that no process holds all of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.partition(':')[0], (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype == 'bfloat16' and device.startswith('cuda'):
        # gathering takes half the time; autocast casts to bfloat16 anyway, except weights of norms
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        receive_weights(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    receive_weights(model)
    fully_shard(model, mesh=mesh)  # the rest, in float32: embeddings, the last norm and lm_head


def receive_weights(module):
    """ Replaces meta tensors of a module, in place, by those of the first process. """
    for tensor in [*module.parameters(), *module.buffers()]:
        if is_sharded(tensor):
            continue
        received = broadcast_tensor(tensor.detach())
        if tensor.is_meta:
            received = type(tensor)(received)  # a Parameter, if it is one
            received.requires_grad_(tensor.requires_grad)
            torch.utils.swap_tensors(tensor, received)  # also where it is tied


def is_sharded(tensor):
    return hasattr(tensor, 'to_local')  # a DTensor, whose import takes time


def local_part(tensor):
    """ The rows of a sharded tensor that this process has; another tensor itself. """
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_to_master(value):
    """
    A sharded tensor with all its rows, in the first process's host memory; None in the others.
    Values of other kinds are returned as they are.
    """
    if not is_sharded(value):
        return value
    tensor = value.full_tensor()
    if is_first_process():
        return tensor.to('cpu', copy=True)  # without the memory of rows that padded the parts
    return None


def shard_like(tensor, p):
    """ The rows of a tensor that this process has of the parameter p; all if p is not sharded. """
    if not is_sharded(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def full_tensor(tensor):
    """ A sharded tensor with all its rows; another tensor itself. """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def compute_on_whole_matrices(function, batch, num_rows):
    """
    function(matrices) of sharded matrices. Each process gathers some of them, computes, and sends
    the others their rows of the results.

    Args:
        function: of each matrix by itself, (n, num_rows, columns) -> the same shape
        batch: (N, rows, columns), the rows that this process has of each matrix
        num_rows: of a whole matrix

    Returns: (N, rows, columns)
    """
    N, rows, columns = batch.shape
    P = dist.get_world_size()
    n = math.ceil(N / P)         # matrices of each process, and
    r = math.ceil(num_rows / P)  # rows; the last ones may have fewer
    parts = batch.new_zeros(P * n, r, columns)
    parts[:N, :rows] = batch
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    matrices = received.view(P, n, r, columns).transpose(0, 1).reshape(n, P * r, columns)
    matrices[:, :num_rows] = function(matrices[:, :num_rows])
    results = matrices.view(n, P, r, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(parts, results.view(P * n, r, columns))
    return parts[:N, :rows]


def warm_up_ddp_buckets(model, x, y, autocast):
    """
    Runs one backward pass and drops its gradients. After its first backward pass DDP rebuilds its
    buckets, and with them the order of its sums: a resumed run must begin with the order that the
    interrupted one had. FSDP has no buckets.
    """
    if not isinstance(model, DDP):
        return
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

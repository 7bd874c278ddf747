"""
Trains a GPT: from scratch, from a checkpoint, or from GPT-2's weights; in one process or in many.

    python train.py config/train_shakespeare_char.py --batch_size=32
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=IP --master_port=1234 \\
        train.py config/train_gpt2.py
    (the same with --node_rank=1 on the other machine, which needs its own copy of the dataset)

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import components  # noqa: F401, I001  before torch: it sets how CPU threads wait

import math
import os
import sys
import time
from itertools import count

import numpy as np
import torch

from components import distributed, metrics, optim, settings
from components.checkpoint import Checkpointer
from components.dataset import (
    check_same_on_all_machines,
    gather_windows,
    open_bin,
    prefetch,
    shuffled_starts,
)
from components.device import choose_device, use_device
from components.ema import EMA
from components.errors import install_excepthook, one_line_errors
from components.monitor import StepMonitor
from components.pretrained import find_model, load_model_everywhere, resolve_init_from
from components.signals import StopSignal
from components.tokenizer import load_meta, tokenizer_record
from model import GPT

# -----------------------------------------------------------------------------
# input and output
out_dir = 'out'               # folder of the checkpoints, created if missing
eval_interval = 2000          # iterations between evaluations; 0: only after the last
log_interval = 1              # iterations between log lines; 0: none
eval_iters = 200              # batches per split and evaluation; -1: the whole validation split
eval_only = False             # evaluate once, write nothing to out_dir, and exit
eval_split = 'val'            # evaluated beside train; with eval_only also another, such as test
always_save_checkpoint = True  # ckpt.pt is the latest; False: the best, and ckpt_last.pt the latest
checkpoint_interval = 0       # iterations between saves without an evaluation; 0: none
max_bad_steps = 10            # skipped updates (NaN or inf) in a row that end the run; 0: never
early_stopping = 0            # evaluations in a row without a new best that end the run; 0: never
init_from = 'scratch'         # scratch; resume (from out_dir); auto (resume if possible);
                              # gpt2, gpt2-medium, gpt2-large, gpt2-xl; a Hugging Face directory;
                              # namespace/name on the hub; or a checkpoint file (only its weights)
seed = 1337                   # of the initial weights, the batches and dropout
# Weights & Biases
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'       # folder in data/
gradient_accumulation_steps = 40  # micro-batches per iteration, over all processes
batch_size = 12               # sequences per micro-batch
block_size = 1024             # tokens per sequence
without_replacement = False   # True: an epoch reads each sequence once; False: at random positions
# model
n_layer = 12
n_head = 12
n_embd = 768                  # a multiple of n_head
dropout = 0.0                 # 0 for pretraining, 0.1 or more for small datasets
bias = False                  # True: biases in linear layers and layer norms, as in GPT-2
# newer than GPT-2: config/*_fast.py set these, config/readme.md has ablations
rotary = False                # rotary position embeddings (RoPE) instead of learned ones
rope_base = 10000             # of RoPE's frequencies; lower for a short block_size
rmsnorm = False               # RMSNorm without weights, and one more after the embedding
qk_norm = False               # normalized queries and keys
untied = False                # untied embeddings: lm_head and token embedding share no weights
muon_lr = 0.0                 # peak learning rate of Muon, for the blocks' matrices; 0: AdamW
cooldown_iters = 0            # iterations of linear cooldown (constant before it); 0: cosine decay
# AdamW
learning_rate = 6e-4          # the peak
max_iters = 600000            # number of updates in total
weight_decay = 1e-1           # of matrices and embeddings, not of biases and norms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0               # gradients of a larger norm are scaled down to it; 0: never
ema_decay = 0.0               # above 0, such as 0.97: evaluates and saves an exponential moving
                              # average of the weights, of which this share stays at each update
# schedule of the learning rate
decay_lr = True               # False: constant, without warmup
warmup_iters = 2000           # iterations of linear warmup
lr_decay_iters = 600000       # iteration that reaches min_lr; usually max_iters
min_lr = 6e-5                 # usually learning_rate / 10; Muon's is in proportion
# system
backend = 'auto'              # of several processes: nccl or gloo; auto: nccl on CUDA
device = 'auto'               # cuda, cuda:1, mps or cpu; auto: the first that is available
dtype = 'auto'                # float32, bfloat16, float16; auto: 16 bits where they are native
fsdp = False                  # divide parameters, gradients, moments among the processes: FSDP
activation_checkpointing = False  # compute each block again in the backward pass: less memory
compile = 'auto'              # torch.compile: True or False; auto: on CUDA; reduce-overhead: with
                              # CUDA graphs, for small models and one micro-batch per iteration
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

# torchrun sets these
ddp = 'RANK' in os.environ
rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
master_process = rank == 0  # prints, saves and logs
print_master = metrics.make_printer(master_process)

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile)
    device_type = device.partition(':')[0]
    backend = distributed.choose_backend(backend, device_type)
    config = {key: globals()[key] for key in config_keys}  # noqa: F821  configurator.py sets it
    settings.check_train(config, device_type, ddp, world_size, local_world_size, master_process)
install_excepthook(config, ddp)

if ddp and device_type == 'cuda':
    device = f'cuda:{local_rank % torch.cuda.device_count()}'  # 0 if it can see no other
autocast = use_device(device, dtype)
job = distributed.Job()  # without torchrun
if ddp:
    with one_line_errors():
        job = distributed.init_process_group(backend, rank, world_size, dtype)

# -----------------------------------------------------------------------------
# data, model, optimizers

with one_line_errors():
    meta = load_meta(dataset)
    vocab_size = meta['vocab_size'] if meta else 50304  # GPT-2's 50257, padded to a multiple of 64
    splits = ('train', eval_split)
    data = {split: open_bin(dataset, split, block_size, vocab_size) for split in splits}
    tokenizer = tokenizer_record(meta)
    check_same_on_all_machines(data, dataset, tokenizer)

    source = None
    if master_process:  # other machines do not have its files
        resolved = resolve_init_from(init_from, out_dir, eval_only, job)
        source = find_model(resolved, out_dir, best=eval_only)
    source = distributed.broadcast(source)
    torch.manual_seed(seed)
    checkpoint = None
    if source.kind == 'scratch':
        model = GPT(settings.new_model_config(config, vocab_size))
    else:
        model, checkpoint = load_model_everywhere(source, dropout)
    settings.check_fit(model, source, checkpoint, data, meta, config)

if block_size < model.config.block_size:
    model.crop_block_size(block_size)
model.activation_checkpointing = activation_checkpointing
raw_model, model, eval_model = distributed.parallelize(model, device, ddp, config)
optimizers = optim.configure_optimizers(
    raw_model, weight_decay, learning_rate, (beta1, beta2), device_type, muon_lr, dtype)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
ema = EMA(raw_model, ema_decay)  # does nothing if ema_decay is 0

checkpointer = Checkpointer(config, raw_model, optimizers, scaler, ema, tokenizer,
                            job=job.name, print_master=print_master, is_master=master_process)
progress = {'tokens': 0, 'seconds': 0.0, 'loss': None}  # of training, over all resumes
if source.kind == 'resume':
    with one_line_errors():
        progress = checkpointer.resume(checkpoint, source.name)
checkpoint = None  # frees its memory
iter_num = checkpointer.first_iter

if master_process:
    summary = metrics.opening_summary(
        config, source, checkpointer, raw_model, len(data['train']), world_size)
    for line in [*config_overrides, *summary]:  # noqa: F821  configurator.py sets it
        print_master(line)

# -----------------------------------------------------------------------------
# batches

micro_batches = range(rank, gradient_accumulation_steps, world_size)  # of this process

# the uses of random numbers, each with generators of its own
TRAINING, EVALUATION, DROPOUT, EPOCH = range(4)


def get_batch(split, index=0, iter_num=None):
    """
    Reads micro-batch `index` of iteration `iter_num`, or, without it, batch `index` of an
    evaluation. Where the windows start is random, a function of the arguments and the seed.

    Returns inputs and targets, int64 (B, T).
    """
    if without_replacement and iter_num is not None:
        first_window = (iter_num * gradient_accumulation_steps + index) * batch_size
        starts = shuffled_starts(
            len(data[split]), block_size, first_window, batch_size, (seed, EPOCH))
        return read_windows(split, starts)
    if iter_num is None:
        rng = np.random.default_rng((seed, EVALUATION, split != 'train', index))
    else:
        rng = np.random.default_rng((seed, TRAINING, iter_num, index))
    starts = rng.integers(len(data[split]) - block_size, size=batch_size)  # (B,)
    return read_windows(split, starts)


def training_calls(first_iter):
    """ Arguments of get_batch() for all micro-batches of this process from `first_iter` on. """
    for it in count(first_iter):
        for index in micro_batches:
            yield 'train', index, it


def seed_dropout(iter_num, index):
    """ Makes the dropout of a micro-batch a function of the seed and its place in training. """
    if dropout > 0:
        rng = np.random.default_rng((seed, DROPOUT, iter_num, index))
        torch.manual_seed(int(rng.integers(2**63)))


def get_adjacent_batch(split, index):
    """
    Reads batch `index` of the adjacent windows of a split, for eval_iters=-1. After the last
    window the batch is padded: targets of -1 are ignored by the loss.

    Returns inputs and targets, int64 (B, T).
    """
    window_numbers = index * batch_size + np.arange(batch_size)
    is_padding = window_numbers >= num_adjacent_windows(split)
    starts = np.where(is_padding, 0, window_numbers * block_size)
    x, y = read_windows(split, starts)
    padded_rows = torch.from_numpy(is_padding).to(y.device)
    y[padded_rows] = -1
    return x, y


def num_adjacent_windows(split):
    """ The number of adjacent windows; for train, at most as many as eval_split has. """
    num_tokens = min(len(data[split]), len(data[eval_split]))
    return (num_tokens - 1) // block_size


def read_windows(split, starts):
    """
    Windows that begin at `starts` (B,) -> inputs and targets, int64 (B, T). With CUDA they are on
    the GPU.
    """
    windows = torch.from_numpy(gather_windows(data[split], starts, block_size))  # (B, T + 1)
    if device_type == 'cuda':
        windows = windows.pin_memory().to(device, non_blocking=True)
    x = windows[:, :-1].contiguous()
    y = windows[:, 1:].contiguous()
    return x, y

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def estimate_loss():
    """ Mean loss of each split, in nats per token -> {split: float}. Processes share the work. """
    eval_model.eval()
    mean_losses = {split: estimate_split_loss(split) for split in data}
    eval_model.train()
    return mean_losses


def estimate_split_loss(split):
    """ Mean loss over random windows, or with eval_iters=-1 over all windows of a split. """
    from tqdm import tqdm
    if eval_iters == -1:
        read_batch = get_adjacent_batch
        num_windows = num_adjacent_windows(split)
    else:
        read_batch = get_batch
        num_windows = eval_iters * batch_size
    num_batches = math.ceil(num_windows / batch_size)
    first_indices = range(0, num_batches, world_size)  # every process evaluates as many batches
    hide_bar = None if master_process else True  # None: shown on a terminal
    losses = []
    num_rows = []
    for first in tqdm(first_indices, f'loss of {split}', delay=2, leave=False, disable=hide_bar):
        index = first + rank
        X, Y = read_batch(split, min(index, num_batches - 1))
        with autocast:
            _, loss = eval_model(X.to(device), Y.to(device), return_logits=False)
        losses.append(loss.float().clone())  # CUDA graphs use the memory of loss again
        rows_left = max(0, num_windows - index * batch_size)  # 0: another process has this batch
        num_rows.append(min(batch_size, rows_left))           # without padding
    sums = torch.stack(losses).cpu().double() * torch.tensor(num_rows)
    total = distributed.all_reduce_sum(sums.sum(), device)
    return total.item() / num_windows

# -----------------------------------------------------------------------------
# learning rate

def get_lr(it):
    """
    Learning rate of iteration `it`: linear warmup, then cosine decay (arXiv 1608.03983), or with
    cooldown_iters a constant learning rate and a linear cooldown (arXiv 2405.18392).
    """
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if cooldown_iters > 0:
        share = min(1, (lr_decay_iters - it) / cooldown_iters)
        return min_lr + share * (learning_rate - min_lr)
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    share = 0.5 * (1 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + share * (learning_rate - min_lr)

# -----------------------------------------------------------------------------
# the loop

with one_line_errors():
    log = metrics.Log(config, checkpointer.run_id, iter_num, progress['tokens'], tokenizer,
                      is_resumed=source.kind == 'resume', is_active=master_process)

batches = prefetch(get_batch, training_calls(iter_num), device, dtype)
if ddp and not eval_only:
    X, Y = get_batch('train')
    distributed.warm_up_ddp_buckets(model, X, Y, autocast)

tokens_per_iter = settings.tokens_per_iter(config)
flops_per_iter = tokens_per_iter * raw_model.flops_per_token(block_size)
timer = metrics.Timer(device_type, dtype, flops_per_iter / world_size, progress['seconds'])
stop_signal = StopSignal(master_process)
if not eval_only:
    stop_signal.listen()  # from here on, a signal ends the run after an iteration and a save
monitor = StepMonitor(device, scaler, stop_signal, print_master, progress['loss'])
start_time = time.perf_counter()

while True:
    # 1. set the learning rate
    lr = get_lr(iter_num)
    optim.set_learning_rate(optimizers, lr)

    # 2. evaluate
    is_finished = eval_only or iter_num >= max_iters
    is_due = eval_interval > 0 and iter_num % eval_interval == 0
    should_evaluate = (is_finished or is_due) and not monitor.is_stopping
    if should_evaluate:
        with timer.paused(), ema.applied():
            losses = estimate_loss()
            val_loss = losses[eval_split]
            print_master(f'step {iter_num}: train loss {losses["train"]:.4f}, '
                         f'{eval_split} loss {val_loss:.4f}')
            checkpointer.note_evaluation(iter_num, val_loss)
            log.log_evaluation(iter_num, losses, lr, timer.running_mfu, raw_model, data[eval_split])

    # 3. save
    should_save = checkpointer.should_save(
        iter_num, monitor.is_stopping, monitor.num_skipped_steps)
    if should_save:
        with timer.paused():
            checkpointer.save(iter_num, monitor.is_stopping, tokens=log.tokens,
                              seconds=timer.seconds, loss=monitor.latest_loss())

    # 4. end after the last update, early, or on a signal
    if is_finished or monitor.is_stopping or checkpointer.should_stop_early(iter_num):
        log.end_iteration(iter_num, timer.seconds, last_loss=monitor.latest_loss())
        break

    # 5. forward and backward: accumulate the gradients of this process's micro-batches
    loss_sum = torch.zeros((), device=device)
    for index in micro_batches:
        X, Y = next(batches)
        if ddp:  # DDP exchanges gradients only after the last micro-batch
            model.require_backward_grad_sync = index == micro_batches[-1]
        seed_dropout(iter_num, index)
        with autocast:
            _, loss = model(X.to(device), Y.to(device), return_logits=False)
        loss = loss / gradient_accumulation_steps
        scaler.scale(loss * world_size).backward()  # processes average; this makes it a sum
        loss_sum += loss.detach()

    # 6. clip the gradients and step; skip the step if the loss or the gradients are non-finite
    total_loss = monitor.sum_over_processes(loss_sum)
    grad_norm = optim.clip_and_step(
        optimizers, scaler, raw_model.parameters(), total_loss, grad_clip)
    ema.update(iter_num)
    monitor.record(iter_num, grad_norm)

    # 7. log
    timer.count_iteration()
    if log_interval > 0 and iter_num % log_interval == 0:
        lossf, grad_normf = monitor.latest()  # waits for the GPU
        dt = timer.lap()  # seconds per iteration since the last log line
        tokens_per_second = tokens_per_iter / dt
        print_master(metrics.training_line(
            iter_num, max_iters, lossf, dt, timer.running_mfu, tokens_per_second, grad_normf))
        log.log_training(loss=lossf, lr=lr, grad_norm=grad_normf,
                         tokens_per_second=tokens_per_second, mfu=timer.running_mfu)
        print_master(timer.slowdown_warning())  # usually None, which prints nothing
    log.end_iteration(iter_num, timer.seconds)

    # 8. next iteration, unless too many updates in a row were skipped
    iter_num += 1
    monitor.check()  # sets is_stopping and num_skipped_steps
    if max_bad_steps > 0 and monitor.num_skipped_steps == max_bad_steps:
        if master_process:
            print(metrics.skipped_steps_summary(config, checkpointer, monitor), file=sys.stderr)
        distributed.shut_down(1)

# -----------------------------------------------------------------------------
# after the loop

if eval_only:
    print_master(metrics.perplexity_and_bits_per_byte(val_loss, tokenizer, data[eval_split]))
else:
    stopped_by = None
    if monitor.is_stopping:
        stopped_by = stop_signal.name
    seconds = time.perf_counter() - start_time
    print_master(metrics.closing_summary(config, checkpointer, iter_num, stopped_by, seconds))
exit_code = 0
if monitor.is_stopping:
    exit_code = stop_signal.exit_code
elif checkpointer.error:
    exit_code = 1
distributed.shut_down(exit_code)

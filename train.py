"""
Trains a GPT: from scratch, from a checkpoint, or from GPT-2's weights; in one process or in many.

    python train.py config/train_shakespeare_char.py --batch_size=32
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import components  # noqa: F401, I001  before torch: it sets how CPU threads wait

import math
import os
from datetime import timedelta
from itertools import count

import numpy as np
import torch

from components import dataset as windows
from components import distributed, optim, settings, summary
from components.checkpoint import Checkpoints, Progress, resume
from components.clock import Clock
from components.device import choose_device, use_device
from components.distributed import print_master
from components.errors import install_excepthook, one_line_errors
from components.log import Log
from components.pretrained import find_model_of_job, load_model_everywhere, new_model
from components.stopping import StopConditions

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
max_skipped_steps = 10        # steps skipped in a row (NaN or inf) that end the run; 0: never
early_stopping = 0            # evaluations in a row without a new best that end the run; 0: never
init_from = 'scratch'         # scratch; resume (from out_dir); auto (resume if possible); gpt2 to
                              # gpt2-xl, a Hugging Face directory or name; a checkpoint file
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
# not in GPT-2: config/*_fast.py set these, config/readme.md has ablations
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
compile = 'auto'              # True, False or reduce-overhead (with CUDA graphs); auto: on CUDA
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

ddp = 'RANK' in os.environ  # torchrun sets these
rank = int(os.environ.get('RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile)
    device_type = device.partition(':')[0]
    backend = distributed.choose_backend(backend, device_type)
    config = {key: globals()[key] for key in config_keys}  # noqa: F821  configurator.py sets it
    settings.check_train(config, device_type, ddp, world_size)
    install_excepthook(config, ddp)
    device = distributed.device_of_process(device)
    autocast = use_device(device, dtype)
    job = distributed.init_process_group(backend, rank, world_size, dtype)

# -----------------------------------------------------------------------------
# data, model, optimizers

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
torch.manual_seed(seed)
with one_line_errors():
    data, vocab_size, tokenizer = windows.open_dataset(dataset, ('train', eval_split), block_size)
    location = find_model_of_job(init_from, out_dir, eval_only, job)
    checkpoint = None
    if location.kind == 'scratch':
        model = new_model(settings.new_model_config(config, vocab_size), fsdp)
    else:
        model, checkpoint = load_model_everywhere(location, dropout, fsdp)
    settings.check_fit(model, location, checkpoint, data, vocab_size, tokenizer, config)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    model.activation_checkpointing = activation_checkpointing
    raw_model, model = distributed.parallelize(model, device, ddp, config)

    optimizers = optim.configure_optimizers(
        raw_model, weight_decay, learning_rate, (beta1, beta2), device_type, muon_lr, dtype)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    progress = Progress()
    is_resumed = location.kind == 'resume'
    if is_resumed:
        progress = resume(checkpoint, location.name, optimizers, scaler, tokens_per_iter)
    checkpoint = None  # frees its memory
    log = Log(config, progress, tokenizer, is_resumed)
    checkpoints = Checkpoints(out_dir, always_save_checkpoint, progress, is_resumed)

summary.print_opening(config_overrides, config, location, progress, raw_model,  # noqa: F821
                      optimizers, num_train_tokens=len(data['train']))

# -----------------------------------------------------------------------------
# batches

micro_batches = range(rank, gradient_accumulation_steps, world_size)  # of this process
TRAINING, EVALUATION, DROPOUT, EPOCH = range(4)  # uses of random numbers, each its own


def get_batch(split, index=0, iter_num=None):
    """
    Reads micro-batch `index` of iteration `iter_num`, or without it batch `index` of an evaluation.
    It is a function of these arguments and the seed. A thread calls it one batch ahead.

    Returns inputs and targets, int64 (B, T), with CUDA on the GPU. The loss ignores targets of -1.
    """
    ids = data[split]
    sizes = (block_size, batch_size)
    if iter_num is None and eval_iters == -1:
        starts = windows.adjacent_starts(num_eval_windows(split), *sizes, index)
    elif iter_num is None:
        key = (seed, EVALUATION, split != 'train', index)
        starts = windows.random_starts(len(ids), *sizes, key)
    elif without_replacement:
        first = (iter_num * gradient_accumulation_steps + index) * batch_size
        starts = windows.epoch_starts(len(ids), *sizes, first, (seed, EPOCH))
    else:
        key = (seed, TRAINING, iter_num, index)
        starts = windows.random_starts(len(ids), *sizes, key)

    batch = torch.from_numpy(windows.gather_windows(ids, starts.clip(min=0), block_size))
    x = batch[:, :-1].contiguous()                                          # (B, T)
    y = batch[:, 1:].contiguous()                                           # (B, T)
    y[torch.from_numpy(starts < 0)] = -1  # no window is left for these rows
    if device_type == 'cuda':
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
    return x, y


def num_eval_windows(split):
    """ With eval_iters=-1 all windows of a split; of train, at most as many as eval_split has. """
    num_tokens = min(len(data[split]), len(data[eval_split]))
    return (num_tokens - 1) // block_size if eval_iters == -1 else eval_iters * batch_size


def seed_micro_batch(iter_num, index):
    """ Makes torch's random numbers a function of the seed and the place of a micro-batch. """
    rng = np.random.default_rng((seed, DROPOUT, iter_num, index))
    torch.manual_seed(int(rng.integers(2**63)))

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def estimate_loss():
    """ Mean loss of each split, in nats per token -> {split: float}. Processes share the work. """
    model.eval()
    mean_losses = {split: estimate_split_loss(split) for split in data}
    model.train()
    return mean_losses


def estimate_split_loss(split):
    """ Mean loss over random windows, or with eval_iters=-1 over all windows of a split. """
    from tqdm import tqdm
    num_batches = math.ceil(num_eval_windows(split) / batch_size)
    first_indices = range(0, num_batches, world_size)  # every process evaluates as many batches
    if rank == 0:
        first_indices = tqdm(first_indices, f'loss of {split}', delay=2, leave=False, disable=None)
    losses = []
    num_targets = []
    for first in first_indices:
        index = first + rank
        X, Y = get_batch(split, min(index, num_batches - 1))
        with autocast:
            _, loss = model(X.to(device), Y.to(device), return_logits=False)
        losses.append(loss.float().clone())  # CUDA graphs use the memory of loss again
        is_counted = index < num_batches  # otherwise another process has this batch
        num_targets.append((Y != -1).sum() * is_counted)
    return distributed.weighted_mean(losses, num_targets, device)

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

iter_num = progress.iter_num  # updates so far
calls = (('train', index, it) for it in count(iter_num) for index in micro_batches)
batches = windows.prefetch(get_batch, calls, device, dtype)
if ddp and not eval_only:
    distributed.warm_up_ddp_buckets(model, *get_batch('train'), autocast)

flops_of_process = tokens_per_iter * raw_model.flops_per_token(block_size) / world_size
clock = Clock(progress, device_type, dtype, flops_of_process)
stop = StopConditions(device, scaler, max_skipped_steps)
if not eval_only:
    stop.listen()  # from here on, a signal ends the run after an iteration and a save

while True:
    # 1. set the learning rate
    lr = get_lr(iter_num)
    optim.set_learning_rate(optimizers, lr)

    # 2. evaluate
    is_last = eval_only or iter_num >= max_iters
    is_eval_due = is_last or (eval_interval > 0 and iter_num % eval_interval == 0)
    should_evaluate = is_eval_due and not stop.reason
    if should_evaluate:
        with clock.paused():
            losses = estimate_loss()
            val_loss = losses[eval_split]
            print_master(f'step {iter_num}: train loss {losses["train"]:.4f}, '
                         f'{eval_split} loss {val_loss:.4f}')
            progress.add_evaluation(val_loss)
            log.add_evaluation(iter_num, losses, lr, clock.mfu, raw_model, data[eval_split])
        is_last |= progress.num_evals_without_best >= early_stopping > 0

    # 3. save after an evaluation, every checkpoint_interval iterations, and on a signal
    is_save_due = checkpoint_interval > 0 and iter_num % checkpoint_interval == 0
    if (should_evaluate or is_save_due or stop.reason) and not eval_only:
        with clock.paused():
            checkpoints.save(progress, raw_model, optimizers, scaler, stop.reason != '',
                             config=config, tokenizer=tokenizer, job=job.name)

    # 4. end after the last update, early, on a signal, or after too many skipped steps
    if is_last or stop.reason:
        if should_evaluate:  # this row has no batch
            log.add(loss=progress.latest_loss())
        log.end_row(progress)
        break

    # 5. forward and backward: accumulate the gradients of this process's micro-batches
    loss_sum = torch.zeros((), device=device)
    for index in micro_batches:
        X, Y = next(batches)
        if ddp:  # DDP exchanges gradients only after the last micro-batch
            model.require_backward_grad_sync = index == micro_batches[-1]
        seed_micro_batch(iter_num, index)
        with autocast:
            _, loss = model(X.to(device), Y.to(device), return_logits=False)
        loss = loss / gradient_accumulation_steps
        scaler.scale(loss * world_size).backward()  # processes average; this makes it a sum
        loss_sum += loss.detach()
    loss = distributed.all_reduce_sum(loss_sum, device)

    # 6. clip the gradients and step; skip the step if the loss or the gradients are not finite
    grad_norm = optim.clip_and_step(optimizers, scaler, raw_model.parameters(), loss, grad_clip)

    # 7. log
    if log_interval > 0 and iter_num % log_interval == 0:
        lossf = loss.item()  # waits for the GPU
        dt = clock.seconds_per_iter(iter_num + 1)  # since the last log line
        tokens_per_second = tokens_per_iter / dt
        time_left = timedelta(seconds=round(dt * (max_iters - iter_num - 1)))
        print_master(f'iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, '
                     f'mfu {clock.mfu * 100:.2f}%, {tokens_per_second:,.0f} tokens/s, '
                     f'{time_left} left, grad norm {grad_norm:.4f}')
        log.add(loss=lossf, lr=lr, grad_norm=grad_norm.item(),
                tokens_per_second=tokens_per_second, mfu=clock.mfu)
    log.end_row(progress)

    # 8. next iteration, unless a signal came or too many steps in a row were skipped
    stop.after_step(iter_num, loss, grad_norm)
    progress.add_update(loss, tokens_per_iter)
    iter_num = progress.iter_num

if eval_only:
    print_master(summary.perplexity_and_bits_per_byte(val_loss, tokenizer, data[eval_split]))
else:
    print_master(summary.closing_line(config, tokenizer, progress, checkpoints, stop, clock))
distributed.shut_down(max(stop.exit_code, int(checkpoints.error != '')))

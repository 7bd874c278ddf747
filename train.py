"""
Trains a GPT: from scratch, from a checkpoint or from GPT-2's weights, in one process or many.

    python train.py config/train_shakespeare_char.py --batch_size=32
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=IP --master_port=1234 train.py
      (and with --node_rank=1 on the other machine; all machines must see the same files)

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from bins import load_meta, one_line_errors, open_bin, tokenizer_record, windows
from checkpoint import load_checkpoint, load_optimizers, load_weights, newest_checkpoint, save_checkpoint
from checks import check_fit, check_train
from machine import Signals, choose_device, explain, fetch, join_processes, leave, peak_flops, use_device
from model import GPT, GPT2_NAMES, GPTConfig
from report import Log, in_other_units, last_words, plan, printer
from update import clip_and_step, settle

# -----------------------------------------------------------------------------
# the run
out_dir = 'out'               # folder of the checkpoints, made where it is missing
eval_interval = 2000          # iterations between evaluations; 0: only after the last
log_interval = 1              # iterations between log lines; 0: none
eval_iters = 200              # batches an evaluation reads of each split; -1: all of val, as much of train
eval_only = False             # evaluate once, write nothing to out_dir, exit
eval_split = 'val'            # what is evaluated beside train; with eval_only also another, such as test
always_save_checkpoint = True  # ckpt.pt is the latest; False: the best, with the latest in ckpt_last.pt
checkpoint_interval = 0       # iterations between saves beside those at evaluations; 0: those alone
max_bad_steps = 10            # updates in a row skipped for numbers that are not finite; 0: any number
init_from = 'scratch'         # scratch; resume (what out_dir holds); auto (resume if it can, else scratch);
                              # gpt2, gpt2-medium, gpt2-large, gpt2-xl; a Hugging Face directory; its name on
                              # the hub, namespace/name; or a checkpoint file: its weights alone, iteration 0
seed = 1337                   # of the initial weights, the batches and dropout
# wandb
wandb_log = False             # log to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# the data
dataset = 'openwebtext'       # folder under data/
gradient_accumulation_steps = 40  # micro-batches an iteration, over all processes
batch_size = 12               # sequences a micro-batch
block_size = 1024             # tokens a sequence
# the model
n_layer = 12
n_head = 12
n_embd = 768                  # a multiple of n_head
dropout = 0.0                 # for pretraining 0, for small data 0.1 and more
bias = False                  # in linear layers and layer norms; GPT-2 has them
# newer than GPT-2: config/*_fast.py set them, README.md has what each brings
rotary = False                # positions turn queries and keys; there is no table of them
rmsnorm = False               # RMSNorm without gains, and once more after the embedding
qk_norm = False               # queries and keys are normalised
untied = False                # the head has a table of its own
muon_lr = 0.0                 # highest rate of Muon, for the blocks' matrices; 0: AdamW for all
cooldown_iters = 0            # iterations of linear fall to min_lr, constant before; 0: half a cosine instead
# AdamW
learning_rate = 6e-4          # the highest
max_iters = 600000            # updates in all
weight_decay = 1e-1           # of matrices and tables, not of biases and norms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0               # gradients of a larger norm are scaled down to it; 0: never
# the schedule of the learning rate
decay_lr = True               # False: constant, without warm-up
warmup_iters = 2000           # iterations of linear rise
lr_decay_iters = 600000       # iteration at which min_lr is reached; usually max_iters
min_lr = 6e-5                 # usually learning_rate / 10; Muon's is in proportion
# the system
backend = 'auto'              # of several processes: nccl or gloo; auto: nccl on CUDA
device = 'auto'               # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'                # float32, bfloat16, float16; auto: 16 bits on CUDA and x86 with bfloat16
compile = 'auto'              # True or False; auto: on CUDA
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

# which process this is; torchrun says so
ddp = 'RANK' in os.environ
rank, local_rank = (int(os.environ.get(key, 0)) for key in ('RANK', 'LOCAL_RANK'))
world_size, local_world_size = (int(os.environ.get(key, 1)) for key in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
master_process = rank == 0  # the one that prints, saves and logs
say = printer(master_process)

# what can be wrong with the settings alone
with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile)
    device_type = device.partition(':')[0]
    if backend == 'auto':
        backend = 'nccl' if device_type == 'cuda' and dist.is_nccl_available() else 'gloo'
    config = {key: globals()[key] for key in config_keys}  # noqa: F821  with what 'auto' became
    check_train(config, device_type, ddp, world_size, local_world_size)
explain(config, ddp)

if ddp and device_type == 'cuda':
    device = f'cuda:{local_rank}'
with one_line_errors():
    job, again = join_processes(backend, rank, world_size, dtype) if ddp else ('', False)
autocast = use_device(device, dtype)

# -----------------------------------------------------------------------------
# the data and the model

ckpt_path, last_path = Path(out_dir, 'ckpt.pt'), Path(out_dir, 'ckpt_last.pt')
with one_line_errors():
    latest = again or init_from in ('resume', 'auto') and not eval_only
    found = newest_checkpoint(out_dir, best=not latest)
    if init_from == 'auto':
        init_from = 'resume' if found.exists() else 'scratch'
        say(f'init_from=auto: {init_from}')
    if again and found.exists() and load_checkpoint(found, mmap=True).get('job') == job:
        init_from = 'resume'  # torchrun started this job again, and the file is its own, not an earlier run's
    if ddp:  # what the first process saw holds for all
        choice = [init_from, found]
        dist.broadcast_object_list(choice)
        init_from, found = choice

    meta = load_meta(dataset)
    vocab_size = meta['vocab_size'] if meta else 50304  # GPT-2's 50257, padded to a multiple of 64
    tokenizer = tokenizer_record(meta)
    data = {split: open_bin(dataset, split, block_size, vocab_size) for split in ('train', eval_split)}

    iter_num, best_val_loss = 0, math.inf
    identity, resumed, source = {'run_id': os.urandom(16).hex(), 'job': job}, None, init_from
    torch.manual_seed(seed)  # the initial weights
    if init_from == 'scratch':
        names = {field.name for field in fields(GPTConfig)}
        model = GPT(GPTConfig(vocab_size=vocab_size, **{key: config[key] for key in config if key in names}))
    elif init_from == 'resume' or init_from not in GPT2_NAMES and (
            os.path.isfile(init_from) or init_from.endswith('.pt')):
        source = found if init_from == 'resume' else init_from
        checkpoint = load_checkpoint(source)
        if (checkpoint.get('tokenizer') or tokenizer) != tokenizer:
            raise ValueError(f'{source} has another vocabulary than {dataset=!s} by its meta.pkl, if any')
        model = GPT(GPTConfig(**{**checkpoint['model_args'], 'dropout': dropout}))
        load_weights(model, checkpoint, source)
        resumed = checkpoint if init_from == 'resume' else None
    else:
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    check_fit(model.config, source, data, meta, config)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)

    raw_model = model.to(device)
    optimizers = [raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                                 muon=muon_lr > 0)]
    if muon_lr:
        optimizers.append(raw_model.configure_muon(muon_lr, weight_decay, dtype))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if resumed:
        load_optimizers(optimizers, resumed, source)
        if scaler.is_enabled() and resumed.get('scaler'):
            scaler.load_state_dict(resumed['scaler'])
        iter_num, best_val_loss = resumed['iter_num'], resumed['best_val_loss']
        identity.update((key, resumed[key]) for key in ('run_id', 'tokens', 'seconds') if key in resumed)
        say(f'resuming {source} at iteration {iter_num:,}, best val loss {best_val_loss:.4f}')
    elif init_from != 'scratch':
        say(f'starting from the weights of {source}')
    resumed = checkpoint = None  # a copy of everything, no longer needed

    if init_from != 'resume' and not eval_only and found.exists():
        say(f'what an earlier run left in {out_dir} will be replaced; --init_from=resume goes on with it')

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
peak, peak_source = peak_flops(device_type, dtype)
say('\n'.join(plan(config, raw_model, tokens_per_iter, len(data['train']), iter_num, ddp and world_size,
                   peak, peak_source)))

model = torch.compile(raw_model) if compile else raw_model
bare_model = model  # without DDP around it: what is evaluated
if ddp:
    model = DDP(model, [local_rank] if device_type == 'cuda' else None, forward_sync_buffers=False)

# -----------------------------------------------------------------------------
# batches, evaluation, learning rate

@lru_cache(128)
def draw(high, shape, *key):
    """ Whole numbers below `high` by the seed and `key`: 0 batches, 1 evaluation, 2 dropout; then which. """
    return np.random.default_rng((seed, *key)).integers(high, size=shape)


def count_windows(split):
    """ Windows of `split` that --eval_iters=-1 reads: all of eval_split, of train at most as many. """
    return min((len(data[name]) - 1) // block_size for name in (eval_split, split))


def get_batch(split, index=0, it=None, device=device):
    """
    Micro-batch `index` of iteration `it`, or without `it` of any evaluation -> inputs, targets, int64 (B, T)
    on the device. Windows start at random; with eval_iters=-1 those of an evaluation lie side by side, and
    rows of the last batch for which there are none left have targets -1, which count for nothing.
    """
    n_starts, beyond = len(data[split]) - block_size, None
    if it is not None:  # of a hundred iterations at once: a generator takes longer to make than to use
        starts = draw(n_starts, (100, batch_size), 0, it // 100, index)[it % 100]  # (B,)
    elif eval_iters != -1:
        starts = draw(n_starts, batch_size, 1, split != 'train', index)
    else:
        number = index * batch_size + np.arange(batch_size)
        beyond = number >= count_windows(split)
        starts = np.where(beyond, 0, number * block_size)
    batch = torch.from_numpy(windows(data[split], starts, block_size))  # (B, T + 1)
    batch = batch.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else batch.to(device)
    x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()  # (B, T)
    if beyond is not None:
        y[torch.from_numpy(beyond).to(device)] = -1
    return x, y


@torch.no_grad()
def estimate_loss():
    """ Mean loss of train and eval_split, nats a token -> {split: float}; processes share the work. """
    from tqdm import tqdm
    bare_model.eval()
    mean = {}
    for split in data:
        n = count_windows(split) if eval_iters == -1 else eval_iters * batch_size
        losses, weights = [torch.zeros((), device=device)], [0]  # a process may have no batch
        for index in tqdm(range(rank, math.ceil(n / batch_size), world_size), f'loss of {split}', delay=2,
                          leave=False, disable=None if master_process else True):
            x, y = get_batch(split, index)
            with autocast:
                _, loss = bare_model(x, y)
            losses.append(loss.float())
            weights.append(min(batch_size, n - index * batch_size))
        total = (torch.stack(losses).cpu().double() * torch.tensor(weights)).sum()
        if ddp:
            total = total.to(device)
            dist.all_reduce(total)
        mean[split] = total.item() / n
    bare_model.train()
    return mean


def get_lr(it):
    """ Learning rate: linear warm-up; half a cosine (arXiv 1608.03983), or level and a line (2405.18392). """
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    if cooldown_iters:
        return min_lr + min(1, (lr_decay_iters - it) / cooldown_iters) * (learning_rate - min_lr)
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)

# -----------------------------------------------------------------------------
# the loop

fresh, first_iter, saved_iter, saved_best = init_from != 'resume', iter_num, iter_num, best_val_loss
with one_line_errors():
    log = Log(config, identity, iter_num, tokens_per_iter, not fresh, master_process, tokenizer)


def save(path):
    """ The run as it is goes to `path`. Where it can't, that is said, and what was there stays. """
    global best_val_loss, fresh, saved_iter, saved_best, unsaved
    if not master_process:
        return
    if stopping and fresh and log.seconds + seconds < 60 and newest_checkpoint(out_dir, best=True).exists():
        unsaved = f'less than a minute does not replace what an earlier run left in {out_dir}'
        return
    say(f'saving checkpoint to {out_dir}')
    identity.update(tokens=log.tokens, seconds=log.seconds + seconds)
    try:
        os.makedirs(out_dir, exist_ok=True)
        save_checkpoint(path, raw_model, optimizers, iter_num=iter_num, best_val_loss=best_val_loss,
                        config=config, tokenizer=tokenizer, scaler=scaler.state_dict(), **identity)
        if path == ckpt_path or fresh:  # the other file is older, or an earlier run's
            (last_path if path == ckpt_path else ckpt_path).unlink(missing_ok=True)
        fresh, saved_iter, saved_best, unsaved = False, iter_num, best_val_loss, ''
    except OSError as error:
        unsaved, best_val_loss = str(error), saved_best  # what is not on disk is not the best
        say(f'WARNING: nothing was saved: {error}. The run goes on, older checkpoints are intact.')


share = range(rank, gradient_accumulation_steps, world_size)  # this process's micro-batches
loader = ThreadPoolExecutor(1, initializer=use_device, initargs=(device, dtype))  # has the next batch ready
loads_to = device if device_type == 'cuda' else 'cpu'  # two threads can't share an Apple GPU
upcoming = loader.submit(get_batch, 'train', rank, iter_num, loads_to)
if ddp and not eval_only:
    settle(model, *get_batch('train'), autocast)
running_mfu = -1.0
seconds, timed = 0.0, 0  # since the last log line: seconds without evaluation and saving, iterations
reports, bad_steps, stopping, unsaved = [], 0, False, ''  # unsaved: why the last save failed, or ''
signals = Signals(master_process) if not eval_only else None  # from here on the iteration is finished first
clock = begin = time.perf_counter()

while True:
    # 1. the learning rate
    lr = get_lr(iter_num)
    for optimizer, rate in zip(optimizers, (lr, muon_lr and muon_lr * lr / learning_rate)):
        for group in optimizer.param_groups:
            group['lr'] = rate

    # 2. evaluate, save, and end after the last update or on a signal
    finished = iter_num >= max_iters
    due = not stopping and (finished or eval_only or eval_interval and iter_num % eval_interval == 0)
    wanted = stopping or checkpoint_interval and iter_num % checkpoint_interval == 0
    wanted = wanted and iter_num > saved_iter and not bad_steps  # where one is due, the evaluation decides
    if due or wanted:
        if device_type != 'cpu':
            getattr(torch, device_type).synchronize()
        seconds += time.perf_counter() - clock
        if due:
            losses = estimate_loss()
            val_loss = losses[eval_split]
            say(f"step {iter_num}: train loss {losses['train']:.4f}, {eval_split} loss {val_loss:.4f}")
            log.evaluated(iter_num, losses, lr, running_mfu, raw_model, data[eval_split])
            if eval_only:
                say(in_other_units(val_loss, tokenizer, data[eval_split]))
            if improved := val_loss < best_val_loss:
                best_val_loss = val_loss
            new = iter_num > first_iter or improved and iter_num > 0  # the latter: resumed unevaluated
            wanted = new and math.isfinite(val_loss) and not eval_only
        if wanted:
            save(ckpt_path if always_save_checkpoint or due and improved else last_path)
        clock = time.perf_counter()
    if finished or eval_only or stopping:
        log.write(iter_num, seconds)
        break

    # 3. gradients of this process's micro-batches, reduced over the processes after the last of them
    loss_sum = torch.zeros((), device=device)
    for index in share:
        last = index == share[-1]
        if dropout:  # which units drop out is a function of seed, iteration and micro-batch
            torch.manual_seed(int(draw(2**63, 100, 2, iter_num // 100, index)[iter_num % 100]))
        X, Y = (part.to(device) for part in upcoming.result())
        with nullcontext() if last or not ddp else model.no_sync():
            with autocast:
                _, loss = model(X, Y)
                loss = loss / gradient_accumulation_steps
            following = (rank, iter_num + 1) if last else (index + world_size, iter_num)
            upcoming = loader.submit(get_batch, 'train', *following, loads_to)
            scaler.scale(loss * world_size).backward()  # DDP takes the mean, here the sum is meant
        loss_sum += loss.detach()
    report = torch.stack((loss_sum, torch.full((), float(signals.number > 0), device=device)))
    if ddp:
        dist.all_reduce(report)

    # 4. clip and step, unless a number went bad
    norm = clip_and_step(optimizers, scaler, raw_model.parameters(), report[0], grad_clip)
    reports.append((iter_num, fetch(torch.stack((*report, norm.float())))))

    # 5. log
    timed += 1
    if log_interval and iter_num % log_interval == 0:
        lossf, _, normf = reports[-1][1]()  # waits for the device
        seconds += time.perf_counter() - clock
        dt = seconds / timed
        if iter_num - first_iter >= max(5, timed):  # warm, and the first is not among the timed
            mfu = raw_model.estimate_mfu(batch_size * gradient_accumulation_steps / world_size, dt, peak)
            running_mfu = mfu if running_mfu == -1.0 else 0.9 * running_mfu + 0.1 * mfu
        say(f'iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, mfu {running_mfu * 100:.2f}%, '
            f'{tokens_per_iter / dt:,.0f} tokens/s, '
            f'{timedelta(seconds=round(dt * (max_iters - iter_num - 1)))} left, grad norm {normf:.4f}')
        log.trained(seconds, loss=lossf, lr=lr, grad_norm=normf, tokens_per_second=tokens_per_iter / dt,
                    mfu=running_mfu)
        seconds, timed = 0.0, 0
        clock = time.perf_counter()
    log.write(iter_num, seconds)

    # 6. what the iteration reported (on CUDA the one before: no wait): a signal to any process, bad numbers
    iter_num += 1
    if len(reports) > (device_type == 'cuda'):
        it, fetched = reports.pop(0)
        lossf, signalled, normf = fetched()
        stopping = signalled > 0
        if math.isfinite(normf) or (  # or a float16 scaler is finding its scale
                scaler.is_enabled() and math.isfinite(lossf) and scaler.get_scale() >= 1):
            bad_steps = 0
        else:
            bad_steps += 1
            say(f'iter {it}: loss {lossf}, grad norm {normf}: update skipped, {bad_steps} in a row')
        if max_bad_steps and bad_steps == max_bad_steps:
            then = 'begin again' if fresh else f'--init_from=resume from {newest_checkpoint(out_dir)}'
            sys.exit(f'train.py: stopped at iteration {it}: {bad_steps} updates in a row were not finite; '
                     f'{then}, learning_rate below {learning_rate} or dtype=float32' if master_process else 1)

if not eval_only:
    say(last_words(config, iter_num, first_iter, saved_iter, stopping and signals.name, unsaved,
                   best_val_loss, time.perf_counter() - begin))
leave(signals.exit_code if stopping else int(unsaved != ''), ddp)

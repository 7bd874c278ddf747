"""
What a run reports: the lines before and after it, the time and MFU of its iterations, log.csv, and
Weights & Biases.

Not here: what training computes (train.py).
"""
import csv
import math
import os
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from components.checkpoint import newest_checkpoint
from components.device import (
    describe_compile,
    has_bfloat16,
    measure_peak,
    peak_flops,
    synchronize,
)
from components.errors import UserError, script_name
from components.files import lock_directory, whole_file
from components.settings import tokens_per_iter
from components.tokenizer import get_tokenizer


def make_printer(is_master):
    """
    Returns print_master(message), which prints a message, if there is one, in the master process
    alone. A closed pipe or a full disk does not end a run.
    """
    def print_master(message):
        if is_master and message:
            with suppress(OSError):
                print(message, flush=True)
    return print_master

# -----------------------------------------------------------------------------
# before and after a run

def opening_summary(config, source, checkpointer, model, num_train_tokens, num_processes):
    """
    What a run starts from and what it will do, in lines.

    Args:
        config: dict of settings, without 'auto'
        source: the ModelSource that the model comes from
        checkpointer: the Checkpointer of the run
        model: the GPT
        num_train_tokens: size of the training split
        num_processes: of the job
    """
    s = SimpleNamespace(**config)
    yield from describe_start(s, source, checkpointer)
    num_tokens_per_iter = tokens_per_iter(config)
    compiled = describe_compile(s.compile)
    processes = '1 process'
    if num_processes > 1:
        processes = f'{num_processes} processes over {s.backend}'
    names = [type(optimizer).__name__ for optimizer in checkpointer.optimizers.values()]
    optimizers = ' and '.join(names)
    yield f'tokens per iteration will be: {num_tokens_per_iter:,}'
    yield f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    yield str(model.config)
    yield f'device: {s.device}, {s.dtype}, {compiled}, {processes}, {optimizers}'

    device_type = s.device.partition(':')[0]
    peak, peak_source = peak_flops(device_type, s.dtype)
    yield from warn_of_slow_dtype(s.device, s.dtype, peak)
    yield f'mfu is measured against {peak / 1e12:.2f} TFLOP/s, from {peak_source}'
    num_iters = s.max_iters - checkpointer.first_iter
    if num_iters <= 0 or s.eval_only:
        return
    yield from warn_of_short_schedule(s)
    if s.early_stopping > 0 and s.always_save_checkpoint:
        yield ('NOTE: early_stopping ends with the latest model in ckpt.pt; '
               '--always_save_checkpoint=False keeps the best one')
    num_tokens = num_iters * num_tokens_per_iter
    epochs = num_tokens / num_train_tokens
    flops = num_tokens * model.flops_per_token(s.block_size)
    seconds = flops / (0.3 * peak * num_processes)
    yield (f'{num_iters:,} iterations: {num_tokens:,} tokens, {epochs:.3g} epochs, about '
           f'{timedelta(seconds=round(seconds))} at an mfu of 30%, plus evaluations')
    yield f'checkpoints and log.csv go to {s.out_dir}'


def describe_start(s, source, checkpointer):
    """ Lines about what the run starts from. """
    if s.init_from == 'auto':
        yield f'init_from=auto: {source.kind}'
    if source.kind == 'resume':
        yield (f'resuming {source.name} at iteration {checkpointer.first_iter:,}, '
               f'{checkpointer.best_description()}')
        return
    if source.kind != 'scratch':
        yield f'starting from the weights of {source.name}'
    if not s.eval_only and newest_checkpoint(s.out_dir, best=True).exists():
        yield (f'the checkpoint of an earlier run in {s.out_dir} will be replaced; '
               '--init_from=resume continues that run')


def warn_of_slow_dtype(device, dtype, peak):
    """ A line, if a CPU emulates the dtype more slowly than it computes in float32. """
    is_native = dtype == 'float32' or (dtype == 'bfloat16' and has_bfloat16())
    if device != 'cpu' or is_native:
        return
    float32_peak, _ = peak_flops('cpu', 'float32')
    slowdown = float32_peak / peak
    if slowdown > 1.2:
        yield (f'{dtype} takes {slowdown:.0f} times as long as float32 on this CPU; '
               'set --dtype=float32')


def warn_of_short_schedule(s):
    """ Lines, if the run ends before the learning rate has risen or decayed. """
    if s.decay_lr and s.warmup_iters >= s.max_iters:
        yield (f'NOTE: the whole run is warmup: warmup_iters={s.warmup_iters} and '
               f'max_iters={s.max_iters}')
    if s.decay_lr and s.max_iters < s.lr_decay_iters:
        yield (f'NOTE: the learning rate decays until lr_decay_iters={s.lr_decay_iters}, and '
               f'training ends at max_iters={s.max_iters}; --lr_decay_iters={s.max_iters} '
               'completes the decay')


def training_line(iter_num, max_iters, loss, dt, mfu, tokens_per_second, grad_norm):
    """ The line of a logged iteration. `dt` is in seconds; `mfu` is from 0 to 1, or None. """
    seconds_left = dt * (max_iters - iter_num - 1)
    parts = [f'iter {iter_num}: loss {loss:.4f}', f'time {dt * 1000:.2f}ms']
    if mfu is not None:
        parts.append(f'mfu {mfu * 100:.2f}%')
    parts.append(f'{tokens_per_second:,.0f} tokens/s')
    parts.append(f'{timedelta(seconds=round(seconds_left))} left')
    parts.append(f'grad norm {grad_norm:.4f}')
    return ', '.join(parts)


def skipped_steps_summary(config, checkpointer, monitor):
    """ Why a run ends after too many skipped updates, and what to do. """
    remedy = 'start again'
    if checkpointer.owns_files:
        remedy = f'--init_from=resume from {newest_checkpoint(config["out_dir"])}'
    return (f'{script_name()}: stopped at iteration {monitor.checked_iter}: '
            f'{monitor.num_skipped_steps} non-finite updates in a row; {remedy} with a '
            f'learning_rate below {config["learning_rate"]}, or with dtype=float32')


def closing_summary(config, checkpointer, iter_num, stopped_by, seconds):
    """
    What a run did, in a line.

    Args:
        config: dict of settings
        checkpointer: the Checkpointer of the run
        iter_num: the number of updates so far
        stopped_by: name of the signal that stopped it, or None
        seconds: of this process
    """
    num_iters = iter_num - checkpointer.first_iter
    if stopped_by is not None:
        if checkpointer.error:
            outcome = f'NOT SAVED: {checkpointer.error}'
        elif checkpointer.saved_iter == 0:
            outcome = 'NOT SAVED: the latest updates were skipped'
        elif checkpointer.saved_iter == iter_num:
            outcome = '--init_from=resume continues from it'
        else:
            outcome = f'--init_from=resume continues from iteration {checkpointer.saved_iter:,}'
        return f'stopped by {stopped_by} at iteration {iter_num:,}; {outcome}'
    max_iters = config['max_iters']
    patience = config['early_stopping']
    is_early = checkpointer.should_stop_early(iter_num) and iter_num < max_iters
    if num_iters == 0 and is_early:
        return (f'nothing to do: by iteration {iter_num}, early_stopping={patience} evaluations '
                'had no new best; --early_stopping=0 continues')
    if num_iters == 0:
        return f'nothing to do: iteration {iter_num} is not below max_iters={max_iters}'
    duration = timedelta(seconds=round(seconds))
    stopped = ''
    if is_early:
        stopped = f'stopped early (early_stopping={patience}): '
    outcome = f'try: python sample.py --out_dir={config["out_dir"]}'
    if checkpointer.error:
        outcome = f'NOT SAVED: {checkpointer.error}'
    return (f'{stopped}{num_iters:,} iterations in {duration}, {checkpointer.best_description()}; '
            f'{outcome}')

# -----------------------------------------------------------------------------
# time

class Timer:
    """
    The seconds of training, without evaluations and saves, and the model FLOPs utilization (MFU)
    of the iterations.

    Args:
        device_type: 'cpu', 'cuda' or 'mps'
        dtype: of the run
        flops_per_iter: FLOPs of an iteration in this process
        seconds: of training in earlier runs that this one continues

    Attributes:
        seconds: of training until the latest pause or lap
        running_mfu: the running mean of the MFU, from 0 to 1; None for the first iterations
    """
    WARM_UP_ITERS = 5
    PEAK_MEASUREMENTS = 3  # another program may have slowed the first ones down

    def __init__(self, device_type, dtype, flops_per_iter, seconds=0.0):
        self.device_type = device_type
        self.dtype = dtype
        self.flops_per_iter = flops_per_iter
        self.peak, _ = peak_flops(device_type, dtype)
        self.measurements_left = 0
        if device_type == 'cpu':
            self.measurements_left = self.PEAK_MEASUREMENTS - 1
        self.seconds = seconds
        self.running_mfu = None
        self.num_iters = 0       # in all laps
        self.lap_iters = 0       # in this lap
        self.lap_start = seconds
        self.fastest = math.inf  # seconds of an iteration
        self.slow_iters = 0      # in a row
        self.slow_seconds = 0.0
        self.has_warned = False
        self.clock = time.perf_counter()

    @contextmanager
    def paused(self):
        """ Does not count the time of the block. Measures the peak of a CPU again after it. """
        synchronize(self.device_type)
        self.seconds += time.perf_counter() - self.clock
        yield
        if self.measurements_left > 0:
            self.measurements_left -= 1
            self.peak = max(self.peak, measure_peak(self.device_type, self.dtype))
        self.clock = time.perf_counter()

    def count_iteration(self):
        self.num_iters += 1
        self.lap_iters += 1

    def lap(self):
        """ Ends a lap, which logging does -> the mean seconds of its iterations. """
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        seconds_per_iter = (self.seconds - self.lap_start) / self.lap_iters
        first_iter_of_lap = self.num_iters - self.lap_iters
        is_warm = self.num_iters > self.WARM_UP_ITERS and first_iter_of_lap > 0
        if is_warm:
            self.update_mfu(seconds_per_iter)
        self.watch_speed(seconds_per_iter)
        self.lap_start = self.seconds
        self.lap_iters = 0
        return seconds_per_iter

    def update_mfu(self, seconds_per_iter):
        mfu = self.flops_per_iter / seconds_per_iter / self.peak
        if self.running_mfu is None:
            self.running_mfu = mfu
        else:
            self.running_mfu = 0.9 * self.running_mfu + 0.1 * mfu

    def watch_speed(self, seconds_per_iter):
        """ Counts iterations in a row that take five times as long as the fastest. """
        self.fastest = min(self.fastest, seconds_per_iter)
        if seconds_per_iter < 5 * self.fastest:
            self.slow_iters = 0
            self.slow_seconds = 0.0
            return
        self.slow_iters += self.lap_iters
        self.slow_seconds += seconds_per_iter * self.lap_iters

    def slowdown_warning(self):
        """ A line, once a run, after five slow iterations and two seconds; else None. """
        is_slow = self.slow_iters >= 5 and self.slow_seconds > 2
        if self.has_warned or not is_slow:
            return None
        self.has_warned = True
        message = 'WARNING: iterations take over five times as long as the fastest ones did'
        if self.device_type == 'cpu':
            threads = max(1, torch.get_num_threads() - 1)
            message += ('; if another program uses the CPU, --init_from=resume with '
                        f'OMP_NUM_THREADS={threads} before the command may be faster')
        return message

# -----------------------------------------------------------------------------
# log.csv and Weights & Biases

COLUMNS = ('iter', 'tokens', 'seconds', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm',
           'tokens_per_second', 'mfu')


class Log:
    """
    Writes log.csv, and with wandb_log sends evaluations and samples to Weights & Biases.

    log.csv has a row for each iteration that was logged or evaluated: the tokens and seconds of
    training before it, over all resumes; the loss of its batch (the last row has no
    batch and repeats the loss before); its evaluations, in nats per token; learning rate; norm of
    the gradients; tokens per second; MFU from 0 to 1. A new run replaces the file. A resumed run
    removes the rows from its first iteration on, and appends.

    Args:
        config: dict of settings
        run_id: of the run, the same after a resume
        iter_num: the first iteration
        tokens: read by training so far
        tokenizer: record of the dataset's tokenizer, or None
        is_resumed: whether the run continues
        is_active: False in all processes but the first, where nothing is written
    """

    def __init__(self, config, run_id, iter_num, tokens, tokenizer, is_resumed, is_active):
        self.print_master = make_printer(is_active)
        self.tokens = tokens
        self.tokens_per_iter = tokens_per_iter(config)
        self.eval_split = config['eval_split']
        self.row = {}
        self.path = None
        if is_active and not config['eval_only']:
            self.path = Path(config['out_dir'], 'log.csv')
            self.open_csv(iter_num, is_resumed)
        self.wandb = None
        self.tokenizer = None
        if is_active and config['wandb_log']:
            self.open_wandb(config, run_id, tokenizer)

    def open_csv(self, iter_num, is_resumed):
        """ Creates log.csv, with the rows before `iter_num` if it is resumed. """
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, and not after hours
        lock_directory(self.path.parent)
        rows = []
        if is_resumed and self.path.exists():
            rows = self.read_rows(iter_num)
        with (whole_file(self.path) as temporary,
              open(temporary, 'w', encoding='utf-8', newline='') as file):
            writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore', lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)

    def read_rows(self, iter_num):
        """ The complete rows of log.csv before `iter_num`. """
        rows = []
        try:
            with open(self.path, encoding='utf-8', newline='') as file:
                for row in csv.DictReader(file):
                    is_complete = None not in row and None not in row.values()
                    has_number = row.get('iter', '').isdecimal()
                    if is_complete and has_number and int(row['iter']) < iter_num:
                        rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f'{self.path} is damaged ({error}); remove it') from None
        return rows

    def open_wandb(self, config, run_id, tokenizer):
        import wandb
        run_id = os.environ.get('WANDB_RUN_ID', run_id)  # of a run that another script began
        self.wandb = wandb.init(project=config['wandb_project'], name=config['wandb_run_name'],
                                config=config, resume='allow', id=run_id)
        self.wandb.define_metric('*', step_metric='iter')
        if tokenizer is None or config['fsdp']:  # this process cannot sample without the others
            return
        try:
            self.tokenizer = get_tokenizer(tokenizer)
        except OSError as error:
            self.print_master(f'wandb receives no samples, which need a tokenizer: {error}')

    def log_evaluation(self, iter_num, losses, lr, mfu, model, ids):
        """
        Logs the evaluation of the model after `iter_num` updates.

        Args:
            losses: {split: mean loss}
            lr, mfu: learning rate; running MFU or None
            model: the GPT
            ids: token ids of the validation split, whose beginning the samples for wandb continue
        """
        self.row.update(train_loss=losses['train'], val_loss=losses[self.eval_split], lr=lr)
        if self.wandb is None:
            return
        values = {f'{split}/loss': loss for split, loss in losses.items()}
        if mfu is not None:
            values['mfu'] = mfu * 100
        is_finite = all(math.isfinite(loss) for loss in losses.values())
        if self.tokenizer is not None and is_finite:
            import wandb
            rows = [[iter_num, text] for text in self.sample(model, ids)]
            values['samples'] = wandb.Table(['iter', 'text'], rows)
        self.wandb.log({'iter': iter_num, 'lr': lr, **values})

    def sample(self, model, ids):
        """ Three continuations of the first 16 of `ids`, with the same random numbers. """
        from components.generation import complete
        max_new_tokens = 100
        random_numbers = np.random.default_rng(0).random((3, max_new_tokens), np.float32)
        prompt = ids[:16].tolist()
        model.eval()
        completions, _ = complete(model, self.tokenizer, [prompt] * 3,
                                  torch.from_numpy(random_numbers),
                                  vocab_size=self.tokenizer.vocab_size)
        model.train()
        return [completion.text for completion in completions]

    def log_training(self, **values):
        """ Logs columns of this iteration. None leaves a column empty. """
        self.row.update(values)

    def end_iteration(self, iter_num, seconds, last_loss=None):
        """
        Appends the row of an iteration, if anything was logged, and counts its tokens.

        Args:
            last_loss: for the last row, which has no batch: the loss of the batch before
        """
        if self.row and last_loss is not None:
            self.row.setdefault('loss', last_loss)
        if self.path is not None and self.row:
            row = {'iter': iter_num, 'tokens': self.tokens, 'seconds': seconds, **self.row}
            for name, value in row.items():
                if isinstance(value, float):
                    row[name] = f'{value:.6g}'
            self.append(row)
        self.row = {}
        self.tokens += self.tokens_per_iter

    def append(self, row):
        """ Appends a row to log.csv. If that fails, no part of the row stays. """
        size = None
        try:
            size = self.path.stat().st_size
            with open(self.path, 'a', encoding='utf-8', newline='') as file:
                csv.DictWriter(file, COLUMNS, lineterminator='\n').writerow(row)
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)
            self.print_master(f'WARNING: log.csv lacks iteration {row["iter"]}: {error}')


def perplexity_and_bits_per_byte(loss, record, ids):
    """
    A loss in other units, for a message: perplexity, and if the tokenizer is known bits per byte
    of text. End-of-text tokens are not text, though they cost bits.

    Args:
        loss: in nats per token
        record: of the tokenizer, or None
        ids: token ids of the split
    """
    perplexity = math.exp(min(loss, 700))  # exp(710) overflows
    message = f'perplexity {perplexity:.4g} per token'
    if record is None:
        return message
    try:
        tokenizer = get_tokenizer(record)
    except OSError:  # no network
        return message
    ids = ids[:2**20].tolist()  # enough to estimate the bytes per token
    text = tokenizer.decode([i for i in ids if i != tokenizer.end_of_text])
    num_bytes = max(1, len(text.encode()))
    bits = loss / math.log(2) * len(ids)
    return f'{message}, {bits / num_bytes:.4f} bits per byte'

"""
The lines that train.py prints before and after a run.

Not here: the lines of an iteration (train.py), log.csv (log.py).
"""
import math
import os
import shlex
from datetime import timedelta
from types import SimpleNamespace

from components.checkpoint import find_checkpoint
from components.device import describe_compile, has_bfloat16, peak_flops
from components.distributed import print_master
from components.tokenizer import get_tokenizer
from model import GPTConfig


def print_opening(config_overrides, *args, **kwargs):
    """ Prints the settings that are not at their defaults, and opening_lines(). """
    for line in [*config_overrides, *opening_lines(*args, **kwargs)]:
        print_master(line)


def opening_lines(config, location, progress, model, optimizers, num_train_tokens):
    """
    What a run starts from and what it will do.

    Args:
        config: dict of settings, without 'auto'
        location: the ModelLocation that the model comes from
        progress: the Progress of the run
        model: the GPT
        optimizers: {name: optimizer}
        num_train_tokens: size of the training split
    """
    num_processes = int(os.environ.get('WORLD_SIZE', 1))
    s = SimpleNamespace(**config)
    yield from lines_about_start(s, location, progress)
    if location.kind != 'scratch':
        yield from notes_on_architecture(config, location, model)
    tokens_per_iter = s.gradient_accumulation_steps * s.batch_size * s.block_size
    processes = '1 process'
    if num_processes > 1:
        processes = f'{num_processes} processes over {s.backend}'
    names = ' and '.join(type(optimizer).__name__ for optimizer in optimizers.values())
    yield f'tokens per iteration will be: {tokens_per_iter:,}'
    yield f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    yield str(model.config)
    yield f'device: {s.device}, {s.dtype}, {describe_compile(s.compile)}, {processes}, {names}'

    peak, peak_source = peak_flops(s.device.partition(':')[0], s.dtype)
    yield f'mfu is measured against {peak / 1e12:.2f} TFLOP/s, from {peak_source}'
    is_native = s.dtype == 'float32' or (s.dtype == 'bfloat16' and has_bfloat16())
    if s.device == 'cpu' and not is_native:
        yield f'NOTE: this CPU emulates {s.dtype}, perhaps slowly; --dtype=float32 is native'
    num_iters = s.max_iters - progress.iter_num
    if num_iters <= 0 or s.eval_only:
        return
    yield from notes_on_schedule(s)
    num_tokens = num_iters * tokens_per_iter
    epochs = num_tokens / num_train_tokens
    seconds = num_tokens * model.flops_per_token(s.block_size) / (0.3 * peak * num_processes)
    yield (f'{num_iters:,} iterations: {num_tokens:,} tokens, {epochs:.3g} epochs, about '
           f'{timedelta(seconds=round(seconds))} at an mfu of 30%, plus evaluations')
    yield f'checkpoints and log.csv go to {s.out_dir}'


def lines_about_start(s, location, progress):
    if s.init_from == 'auto':
        yield f'init_from=auto: {location.kind}'
    if location.kind == 'resume':
        yield f'resuming {location.name} at iteration {progress.iter_num:,}, {best_loss(progress)}'
        return
    if location.kind != 'scratch':
        yield f'starting from the weights of {location.name}'
    if not s.eval_only and find_checkpoint(s.out_dir).exists():
        yield (f'the first save will replace the checkpoint of an earlier run in {s.out_dir}; '
               '--init_from=resume continues that run')


def notes_on_architecture(config, location, model):
    """ A line, if settings ask for another architecture than that of a loaded model. """
    ignored = []
    for name, default in vars(GPTConfig(bias=False)).items():  # as in train.py
        own = getattr(model.config, name)
        if name in config and config[name] not in (own, default):
            ignored.append(f'{name}={config[name]} ({own})')
    if ignored:
        yield f'NOTE: {location.name} has its own architecture; ignored: {", ".join(ignored)}'


def notes_on_schedule(s):
    """ Lines, if the run ends before the learning rate has risen or decayed. """
    if s.decay_lr and s.warmup_iters >= s.max_iters:
        yield (f'NOTE: the whole run is warmup: warmup_iters={s.warmup_iters} and '
               f'max_iters={s.max_iters}')
    if s.decay_lr and s.max_iters < s.lr_decay_iters:
        yield (f'NOTE: the learning rate decays until lr_decay_iters={s.lr_decay_iters}, and '
               f'training ends at max_iters={s.max_iters}; --lr_decay_iters={s.max_iters} '
               'completes the decay')


def best_loss(progress):
    """ The best validation loss and where it was measured. """
    text = f'best val loss {progress.best_val_loss:.4f}'
    if progress.best_val_iter is not None:
        text += f' at step {progress.best_val_iter}'
    if progress.best_val_iter == 0:
        text += ' (not saved)'
    return text


def closing_line(config, tokenizer, progress, checkpoints, stop, clock):
    """
    What a run did, and the next command.

    Args:
        config: dict of settings
        tokenizer: spec of the dataset's tokenizer, or None
        progress: the Progress of the run
        checkpoints: its Checkpoints
        stop: its StopConditions
        clock: its Clock
    """
    iter_num = progress.iter_num
    num_iters = iter_num - clock.first_iter
    next_step = what_to_do(config, tokenizer, checkpoints, stop)
    if stop.reason:
        return f'{stop.reason} at iteration {iter_num:,}; {next_step}'
    if num_iters == 0:
        return (f'nothing to do: iteration {iter_num} is not below '
                f'max_iters={config["max_iters"]}, or early_stopping has ended this run')
    duration = timedelta(seconds=round(clock.seconds_of_process()))
    return f'{num_iters:,} iterations in {duration}, {best_loss(progress)}; {next_step}'


def what_to_do(config, tokenizer, checkpoints, stop):
    if checkpoints.error:
        return f'NOT SAVED: {checkpoints.error}'
    if not stop.reason and tokenizer is None:
        return 'without a tokenizer in meta.pkl it cannot be sampled'
    if not stop.reason:
        return f'try: python sample.py --out_dir={shlex.quote(config["out_dir"])}'
    command = 'NOT SAVED; start again'
    if checkpoints.saved_iter > 0:
        command = f'--init_from=resume continues from iteration {checkpoints.saved_iter:,}'
    if stop.num_skipped_steps > 0:
        command += (f', with a learning_rate below {config["learning_rate"]}, or with '
                    '--dtype=float32')
    return command


def perplexity_and_bits_per_byte(loss, spec, ids):
    """
    A loss in other units, for a message: perplexity, and if the tokenizer is known bits per byte
    of text. End-of-text tokens are not text, though they cost bits.

    Args:
        loss: in nats per token
        spec: of the tokenizer, or None
        ids: token ids of the split
    """
    perplexity = math.exp(min(loss, 700))  # exp(710) overflows
    message = f'perplexity {perplexity:.4g} per token'
    if spec is None:
        return message
    try:
        tokenizer = get_tokenizer(spec)
    except OSError:  # no network
        return message
    ids = ids[:2**20].tolist()  # enough to estimate the bytes per token
    text = tokenizer.decode([i for i in ids if i != tokenizer.end_of_text])
    num_bytes = max(1, len(text.encode()))
    bits = loss / math.log(2) * len(ids)
    return f'{message}, {bits / num_bytes:.4f} bits per byte'

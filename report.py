"""
What a run reports beside its lines: before it, what it will do; then out_dir/log.csv, Weights & Biases, and
its loss in other units.
"""
import csv
import math
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bins import get_tokenizer, whole_file
from machine import claim, has_bfloat16, peak_flops

COLUMNS = ('iter', 'tokens', 'seconds', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm',
           'tokens_per_second', 'mfu')


def printer(active):
    """ say(message) that prints, if `active`. A pipe that is gone or a full disk does not end a run. """
    def say(message):
        with suppress(OSError):
            print(message, flush=True) if active else None
    return say


def plan(config, model, tokens, train_tokens, iter_num, processes, peak, peak_source):
    """
    What a run will do, in lines. `config` has its settings, as resolved; `tokens` are those of an iteration;
    `processes` 0: no torchrun.
    """
    s = SimpleNamespace(**config)
    iters = s.max_iters - iter_num
    yield f'tokens per iteration will be: {tokens:,}'
    yield f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    yield str(model.config)
    yield (f'device: {s.device}, {s.dtype}, {"compiled" if s.compile else "not compiled"}, '
           f'{f"{processes} processes over {s.backend}" if processes else "1 process"}, '
           f'{"Muon and " if s.muon_lr else ""}AdamW')
    if s.device == 'cpu' and s.dtype != 'float32' and not (s.dtype == 'bfloat16' and has_bfloat16()):
        slower = peak_flops('cpu', 'float32')[0] / peak
        if slower > 1.2:
            yield f'{s.dtype} is {slower:.0f} times as slow as float32 on this CPU; --dtype=float32'
    yield f'mfu is the share of {peak / 1e12:.2f} TFLOP/s, from {peak_source}'
    if iters > 0 and not s.eval_only:
        seconds = iters * tokens * model.flops_per_token(s.block_size) / peak / max(1, processes) / 0.3
        yield (f'{iters:,} iterations: {iters * tokens:,} tokens, {iters * tokens / train_tokens:.3g} '
               f'epochs, about {timedelta(seconds=round(seconds))} at an mfu of 30%, and evaluations')
        yield f'checkpoints and log.csv go to {s.out_dir}'


def last_words(config, iter_num, first_iter, saved_iter, signal, unsaved, best_val_loss, seconds):
    """ What a run did, in a line. `signal` names what stopped it, `unsaved` why it is not saved, else ''. """
    out_dir, iters = config['out_dir'], iter_num - first_iter
    if signal:
        then = '--init_from=resume goes on with ' + ('it' if saved_iter == iter_num else f'{saved_iter:,}')
        if unsaved or not saved_iter:
            then = f'NOT SAVED: {unsaved or "its numbers are bad"}'
        return f'stopped by {signal} at iteration {iter_num:,}; {then}'
    if not iters:
        return f'nothing was left to do: iteration {iter_num} is not below max_iters={config["max_iters"]}'
    then = f'NOT SAVED: {unsaved}' if unsaved else f'try: python sample.py --out_dir={out_dir}'
    took = timedelta(seconds=round(seconds))
    return f'{iters:,} iterations in {took}, best val loss {best_val_loss:.4f}; {then}'


class Log:
    """
    log.csv has a row for each iteration that was logged or evaluated: the tokens trained on before it and the
    seconds of the iterations so far, over all resumes; the loss of its batch and its evaluations,
    in nats a token; the learning rate; the norm of the gradients; tokens a second; MFU from 0 to 1.

    A fresh run replaces the file; one that resumes cuts off what is from its iteration on, and appends. Not
    `active`: does nothing, as in all processes but the first. With `config` of wandb_log evaluations also go
    to Weights & Biases, with samples as a table if there is a `tokenizer`, a record. `identity` has the
    `run_id`, and of a run that is resumed the `tokens` and `seconds` so far.
    """

    def __init__(self, config, identity, iter_num, tokens_per_iter, resume, active, tokenizer):
        self.path = Path(config['out_dir'], 'log.csv') if active and not config['eval_only'] else None
        self.row, self.wandb, self.tokenizer, self.say = {}, None, None, printer(active)
        self.tokens = identity.get('tokens', iter_num * tokens_per_iter)
        self.seconds = identity.get('seconds', 0.0)
        self.tokens_per_iter = tokens_per_iter
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # now, and not after hours
            claim(self.path.parent)
            rows = []
            if resume and self.path.exists():
                try:
                    with open(self.path, encoding='utf-8', newline='') as f:
                        rows = [row for row in csv.DictReader(f) if None not in (*row, *row.values())  # whole
                                and row.get('iter', '').isdigit() and int(row['iter']) < iter_num]
                except (csv.Error, UnicodeDecodeError) as error:
                    raise ValueError(f'{self.path} is damaged ({error}); remove it') from None
            with whole_file(self.path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as f:
                writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore', lineterminator='\n')
                writer.writeheader()
                writer.writerows(rows)
        if active and config['wandb_log']:
            import wandb
            self.wandb = wandb.init(project=config['wandb_project'], name=config['wandb_run_name'],
                                    config=config, resume='allow',
                                    id=os.environ.get('WANDB_RUN_ID', identity['run_id']))
            self.wandb.define_metric('*', step_metric='iter')
            try:
                self.tokenizer = tokenizer and get_tokenizer(tokenizer)
            except OSError as error:
                self.say(f'no samples in wandb without a tokenizer: {error}')

    def evaluated(self, it, losses, lr, mfu, model, ids):
        """ Takes {split: mean loss}, eval_split last, of `model` before `it`; samples go on after `ids`. """
        self.row.update(train_loss=losses['train'], val_loss=[*losses.values()][-1], lr=lr)
        if self.wandb:
            values = {f'{split}/loss': loss for split, loss in losses.items()}
            if self.tokenizer and all(map(math.isfinite, losses.values())):
                from wandb import Table
                values['samples'] = Table(['iter', 'text'], [[it, text] for text in self.sample(model, ids)])
            self.wandb.log({'iter': it, 'lr': lr, 'mfu': mfu * 100, **values})

    def sample(self, model, ids):
        """ Three texts of 100 tokens that follow the first 16 of `ids`, with the same draws every time. """
        from decode import complete
        _, decode, vocab_size, _ = self.tokenizer
        draws = torch.from_numpy(np.random.default_rng(0).random((3, 100), np.float32))
        model.eval()
        texts, _, _ = complete(model, decode, [ids[:16].tolist()] * 3, draws, vocab_size=vocab_size)
        model.train()
        return texts

    def trained(self, seconds, **values):
        """ Takes columns of this iteration's row, and the seconds since the last that was logged. """
        self.seconds += seconds
        self.row.update(values, mfu=values['mfu'] if values['mfu'] >= 0 else '')

    def write(self, it, seconds):
        """ Ends iteration `it`: appends its row, if there is one; `seconds` are those not logged yet. """
        if self.path and self.row:
            row = {'iter': it, 'tokens': self.tokens, 'seconds': self.seconds + seconds, **self.row}
            row = {name: f'{value:.6g}' if isinstance(value, float) else value for name, value in row.items()}
            end = None
            try:
                end = self.path.stat().st_size
                with open(self.path, 'a', encoding='utf-8', newline='') as f:
                    csv.DictWriter(f, COLUMNS, lineterminator='\n').writerow(row)
            except OSError as error:
                if end is not None:
                    with suppress(OSError):
                        os.truncate(self.path, end)  # not half a row
                self.say(f'WARNING: log.csv lacks iteration {it}: {error}')
        self.row = {}
        self.tokens += self.tokens_per_iter


def in_other_units(loss, record, ids):
    """
    A loss in nats a token as perplexity, and where the tokenizer is known as bits a byte of the text, of
    which an end-of-text is no part, though it costs bits.
    """
    text = f'perplexity {math.exp(min(loss, 700)):.4g} a token'
    if record is None:
        return text
    try:
        _, decode, _, end = get_tokenizer(record)
        ids = ids[:2**20].tolist()
        size = len(decode([i for i in ids if i != end]).encode())
        return f'{text}, {loss / math.log(2) * len(ids) / max(1, size):.4f} bits a byte'
    except OSError:  # no network
        return text

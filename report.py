"""
What a run reports beside its lines: before it, what it will do and the memory that it will take; then
out_dir/log.csv, Weights & Biases, and its loss in other units.
"""
import csv
import math
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bins import get_tokenizer, whole_file
from model import GPT
from update import clip_and_step

COLUMNS = ('iter', 'tokens', 'seconds', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm',
           'tokens_per_second', 'mfu')


def plan(config, model, train_tokens, iter_num, processes, peak, peak_source):
    """ What a run will do, in lines; `config` has its settings, as resolved. `processes` 0: no torchrun. """
    s = SimpleNamespace(**config)
    tokens, iters = s.gradient_accumulation_steps * s.batch_size * s.block_size, s.max_iters - iter_num
    yield f'tokens per iteration will be: {tokens:,}'
    yield f'number of parameters: {model.get_num_params() / 1e6:.2f}M'
    yield str(model.config)
    yield (f'device: {s.device}, {s.dtype}, {"compiled" if s.compile else "not compiled"}, '
           f'{f"{processes} processes over {s.backend}" if processes else "1 process"}, '
           f'{"Muon and " if s.muon_lr else ""}AdamW')
    yield f'mfu is the share of {peak / 1e12:.2f} TFLOP/s, from {peak_source}'
    if iters > 0 and not s.eval_only:
        seconds = iters * tokens * model.flops_per_token(s.block_size) / peak / max(1, processes) / 0.3
        yield (f'{iters:,} iterations: {iters * tokens:,} tokens, {iters * tokens / train_tokens:.3g} '
               f'epochs, about {timedelta(seconds=round(seconds))} at an mfu of 30%, and evaluations')
        yield f'checkpoints and log.csv go to {s.out_dir}'


def continuations(model, record, ids, seed):
    """ Three texts of 100 tokens, drawn after the first 16 of `ids`; none where there is no tokenizer. """
    from decode import complete
    try:
        _, decode, vocab_size, _ = get_tokenizer(record)
    except (OSError, TypeError):
        return []
    draws = torch.from_numpy(np.random.default_rng(seed).random((3, 100), np.float32))
    model.eval()
    texts, _, _ = complete(model, decode, [ids[:16].tolist()] * 3, draws, vocab_size=vocab_size, top_k=200)
    model.train()
    return texts


class Log:
    """
    log.csv has a row for each iteration that was logged or evaluated: the tokens trained on before it; the
    seconds of all iterations up to its end, over all resumes; the loss of its batch and its evaluations,
    in nats a token; the learning rate; the norm of the gradients; tokens a second; MFU from 0 to 1.

    A fresh run replaces the file; one that resumes cuts off what is from its iteration on, and appends. Not
    `active`: does nothing, as in all processes but the first. With `config` of wandb_log evaluations also go
    to Weights & Biases, into the run `run_id`, with samples in a table.
    """

    def __init__(self, config, run_id, iter_num, resume, active):
        self.path = Path(config['out_dir'], 'log.csv') if active and not config['eval_only'] else None
        self.row, self.seconds, self.wandb = {}, 0.0, None
        if self.path:
            rows = []
            if resume and self.path.exists():
                with open(self.path, encoding='utf-8', newline='') as f:
                    rows = [row for row in csv.DictReader(f) if None not in row.values()  # half a row
                            and row['iter'].isdigit() and int(row['iter']) < iter_num]
            self.seconds = float(rows[-1]['seconds']) if rows else 0.0
            with whole_file(self.path) as temporary, open(temporary, 'w', encoding='utf-8', newline='') as f:
                writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore', lineterminator='\n')
                writer.writeheader()
                writer.writerows(rows)
        if active and config['wandb_log']:
            import wandb
            self.wandb = wandb.init(project=config['wandb_project'], name=config['wandb_run_name'],
                                    config=config, id=run_id, resume='allow')
            self.wandb.define_metric('*', step_metric='iter')

    def evaluated(self, it, losses, lr, mfu, sample):
        """ Takes {split: mean loss}, eval_split last, and sample() -> texts, of the model before `it`. """
        self.row.update(train_loss=losses['train'], val_loss=[*losses.values()][-1], lr=lr)
        if self.wandb:
            from wandb import Table
            self.wandb.log({'iter': it, 'lr': lr, 'mfu': mfu * 100,
                            **{f'{split}/loss': loss for split, loss in losses.items()},
                            'samples': Table(['iter', 'text'], [[it, text] for text in sample()])})

    def trained(self, seconds, **values):
        """ Takes columns of this iteration's row, and the seconds since the last that was logged. """
        self.seconds += seconds
        self.row.update(values, mfu=values['mfu'] if values['mfu'] >= 0 else '')

    def write(self, it, tokens, seconds):
        """ Appends the row of iteration `it`, if there is one; `seconds` are those not logged yet. """
        if self.path and self.row:
            row = {'iter': it, 'tokens': it * tokens, 'seconds': self.seconds + seconds, **self.row}
            row = [f'{value:.6g}' if isinstance(value, float) else value
                   for value in (row.get(name, '') for name in COLUMNS)]
            try:
                with open(self.path, 'a', encoding='utf-8', newline='') as f:
                    csv.writer(f, lineterminator='\n').writerow(row)
            except OSError as error:
                print(f'WARNING: log.csv lacks iteration {it}: {error}', flush=True)
        self.row = {}


def in_other_units(loss, record, ids):
    """ A loss in nats a token as perplexity, and where the tokenizer is known as bits a byte of the text. """
    text = f'perplexity {math.exp(min(loss, 700)):.4g} a token'
    try:
        _, decode, _, _ = get_tokenizer(record)
        ids = ids[:2**20].tolist()
        return f'{text}, {loss / math.log(2) * len(ids) / len(decode(ids).encode()):.4f} bits a byte'
    except (OSError, TypeError):  # no network, or no tokenizer
        return text

# -----------------------------------------------------------------------------
# memory

class MemoryCount(TorchDispatchMode):
    """
    Counts the bytes of the tensors that are made under it and not yet freed: `now`, and at most `peak`. Under
    a FakeTensorMode they take no memory. `heap` is what the C library's heap loses beside the peak between
    pieces below 32 MB, 0.35 of them: fitted to ten runs of train.py on Linux (glibc 2.36), to 10%.
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
        if self.now + self.small * 0.35 > self.peak + self.heap:
            self.peak, self.heap = self.now, self.small * 0.35


def memory_of_training(config, batch_size, dtype, muon=False):
    """
    The bytes that training takes of a GPT of `config`, with micro-batches of (batch_size, block_size): by
    what they are for, at most together, and of the whole process on a Linux CPU, beyond what `import torch`
    takes. Runs train.py's step on tensors without memory, not compiled, laid out as on a CPU.
    """
    from torch._subclasses import FakeTensorMode
    count = MemoryCount()
    with FakeTensorMode(), count:
        model = GPT(config)
        optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu', muon)]
        if muon:
            optimizers.append(model.configure_muon(1e-4, 0.0, dtype))
        for _ in range(2):  # from the second on there are moments
            idx, before = torch.zeros(batch_size, config.block_size, dtype=torch.long), count.now
            with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                _, loss = model(idx, idx)
            activations = count.now - before
            loss.backward()
            clip_and_step(optimizers, torch.amp.GradScaler('cpu', enabled=False), model.parameters(),
                          loss.detach(), grad_clip=1.0)
            del loss
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(value.nbytes for optimizer in optimizers for of in optimizer.state.values()
                  for value in of.values())
    return {'weights': weights, 'gradients': weights, 'moments': moments, 'activations': activations,
            'at most at once': count.peak,
            'of a process on a Linux CPU': int(count.peak + count.heap + 115e6)}  # and kernels

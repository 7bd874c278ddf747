"""
A run on disk: ckpt.pt, and beside it ckpt_last.pt, if ckpt.pt is the best model and not the latest
one.

Each is one torch.save of a dict, which any reader of the nanoGPT format can read. Keys of that
format:

    model           state dict of the GPT, with ema_decay the averaged weights; old files may have
                    '_orig_mod.' before every key
    optimizer       state dict of AdamW
    model_args      the seven classic fields of GPTConfig; newer fields if not at their defaults
    iter_num        number of updates so far
    best_val_loss   the lowest validation loss so far; a 0-d tensor in old files
    config          all settings of the run

Additional keys, which other readers ignore:

    muon            state dict of Muon, if it is used; `optimizer` then has the other parameters
    training_model  with ema_decay: the weights that training continues from, {name: tensor}
    gelu            the form of GELU, 'exact' if missing; after loading it is among model_args
    tokenizer       record of the dataset's tokenizer (tokenizer.py)
    scaler          state dict of the GradScaler, empty if it was disabled
    best_val_iter   iteration of best_val_loss
    evaluated_iter  iteration of the latest evaluation
    num_evals_without_best  evaluations in a row without a new best
    run_id          the same in both files of a run
    job             name of the torchrun job that wrote the file, or ''
    tokens          number of tokens that training has read
    seconds         duration of training so far
    loss            training loss of the latest update

Values are tensors, numbers, strings, None, and lists and dicts of these. A file with anything else
does not load.

Not here: loading what `init_from` names (pretrained.py); the optimizers (optim.py).
"""
import dataclasses
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map

from components.distributed import broadcast, broadcast_tensor, gather_to_master, shard_like
from components.errors import UserError
from components.files import check_free_space, whole_file
from components.optim import MOMENTS
from components.settings import tokens_per_iter
from model import GPTConfig

MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')

# -----------------------------------------------------------------------------
# saving

def newer_args(config):
    """
    The fields of a GPTConfig that nanoGPT lacks, if they are not at their defaults: a reader that
    does not know one of them has to fail.
    """
    newer = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_classic = field.name in MODEL_ARGS or field.name == 'gelu'
        has_no_effect = field.name == 'rope_base' and not config.rotary
        if not is_classic and not has_no_effect and value != field.default:
            newer[field.name] = value
    return newer


def save_checkpoint(path, model, optimizers, is_master=True, averages=None, **fields):
    """
    Writes a checkpoint to `path` atomically, in the master process. All processes call this, as
    each may have a part of the tensors.

    Args:
        model: the unwrapped GPT; torch.compile and DDP add a prefix to its keys
        optimizers: {name: optimizer}, the names being keys of the checkpoint
        averages: {name: tensor}, averaged weights of the model, if there are any
        fields: the other keys of the checkpoint

    Raises OSError if the disk is full or not writable.
    """
    path = Path(path)
    state = model.state_dict()
    assert 'lm_head.weight' in state, 'save the unwrapped model'
    if averages:
        fields['training_model'] = {name: state[name] for name in averages}
        state.update(averages)
    classic_args = {name: getattr(model.config, name) for name in MODEL_ARGS}
    checkpoint = {
        'model': state,
        'model_args': {**classic_args, **newer_args(model.config)},
        'gelu': model.config.gelu,
        **fields,
    }
    for name, optimizer in optimizers.items():
        checkpoint[name] = optimizer.state_dict()
    checkpoint = tree_map(to_python_number, checkpoint)
    checkpoint = tree_map(gather_to_master, checkpoint)
    if not is_master:
        return
    if not model.config.untied:  # stored once
        checkpoint['model']['lm_head.weight'] = checkpoint['model']['transformer.wte.weight']

    path.parent.mkdir(parents=True, exist_ok=True)
    interrupted_save = Path(f'{path}.tmp')
    interrupted_save.unlink(missing_ok=True)  # its space may be needed
    check_free_space(path.parent, checkpoint_size(model, optimizers, averages))
    with whole_file(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch's writer, if the disk fills up or disappears
            reason = str(error).splitlines()[0]
            raise OSError(f'{path}: {reason}') from None


def to_python_number(value):
    """ A NumPy number as a Python one: a checkpoint is loaded without running NumPy's code. """
    return value.item() if isinstance(value, np.generic) else value


def checkpoint_size(model, optimizers, averages=None):
    """ Bytes of the tensors of a checkpoint. """
    tensors = list(model.parameters())
    if averages:
        tensors += averages.values()
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)

# -----------------------------------------------------------------------------
# loading

def newest_checkpoint(out_dir, best=False):
    """
    The path of the checkpoint in `out_dir` that a run continues from; it may not exist.

    This is ckpt.pt, except where only ckpt_last.pt exists, or where ckpt_last.pt is a later
    checkpoint of the same run and `best` is False.
    """
    best_path = Path(out_dir, 'ckpt.pt')
    last_path = Path(out_dir, 'ckpt_last.pt')
    if not last_path.exists():
        return best_path
    if not best_path.exists():
        return last_path
    if best:
        return best_path
    best_checkpoint = load_checkpoint(best_path, mmap=True)
    last_checkpoint = load_checkpoint(last_path, mmap=True)
    run_id = best_checkpoint.get('run_id')
    is_same_run = run_id is not None and run_id == last_checkpoint.get('run_id')
    is_later = last_checkpoint.get('iter_num', 0) > best_checkpoint.get('iter_num', 0)
    return last_path if is_same_run and is_later else best_path


def load_checkpoint(path, mmap=False):
    """
    Reads a checkpoint as data, onto the CPU; no code in it is run.

    Args:
        mmap: whether tensors stay in the file until they are used

    Raises UserError if the file is missing, broken, or not a checkpoint.

    Returns the dict described above, also for older forms of it.
    """
    checkpoint = read_checkpoint_file(path, mmap)
    check_format(checkpoint, path)

    args = dict(checkpoint['model_args'])
    args['gelu'] = checkpoint.get('gelu', 'exact')
    checkpoint['model_args'] = args
    weights = checkpoint['model']
    checkpoint['model'] = {key.removeprefix('_orig_mod.'): weights[key] for key in weights}
    checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', math.inf))
    return checkpoint


def read_checkpoint_file(path, mmap):
    """ torch.load, with its errors as UserError. """
    try:
        can_mmap = mmap and zipfile.is_zipfile(path)  # the oldest format cannot be mapped
        return torch.load(path, map_location='cpu', weights_only=True, mmap=can_mmap)
    except FileNotFoundError:
        raise UserError(f'checkpoint {path} does not exist; train a model first') from None
    except Exception as error:  # a broken file can raise any exception
        code = re.search(r'GLOBAL (\S+)', str(error))
        if code:
            message = f'{path} contains code ({code[1]}), which was not run'
        else:
            message = f'{path} is not a complete checkpoint: {error!r:.200}'
        raise UserError(message) from None


def check_format(checkpoint, path):
    """ Raises UserError if what a file holds is not a checkpoint of this model. """
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f'{path} is not a checkpoint: it holds a {kind} instead of a dict')
    missing = [key for key in ('model', 'model_args') if key not in checkpoint]
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}')

    types = {
        'model': dict,
        'training_model': dict,
        'model_args': dict,
        'optimizer': dict,
        'muon': dict,
        'scaler': dict,
        'config': dict,
        'iter_num': int,
        'evaluated_iter': (int, type(None)),
        'num_evals_without_best': int,
        'best_val_loss': (float, int, torch.Tensor),
    }
    for key, expected in types.items():
        if key in checkpoint and not isinstance(checkpoint[key], expected):
            raise UserError(f'{path}: {key}={checkpoint[key]!r:.50} has the wrong type')

    args = checkpoint['model_args']
    required = set(MODEL_ARGS) - {'bias', 'dropout'}  # which old files lack
    missing = sorted(required - set(args))
    if missing:
        raise UserError(f'{path}: model_args lack {", ".join(missing)}')
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    unknown = sorted(set(args) - known)
    if unknown:
        raise UserError(f'{path}: unknown model_args: {", ".join(unknown)}')


def load_weights(model, checkpoint, path):
    """ Copies a checkpoint's weights into `model`. Raises UserError with what does not fit. """
    weights = dict(checkpoint['model'])
    known = set(model.state_dict())
    for key in checkpoint['model']:
        if key.endswith('.attn.bias') and key not in known:  # a causal mask, from before torch 2
            del weights[key]
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        _, _, reason = str(error).partition(':')
        reason = ' '.join(reason.split())
        raise UserError(f'{path}: the weights do not fit its model_args: {reason:.200}') from None
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise UserError(f'{path}: non-finite weights (NaN or inf): {", ".join(bad):.200}')


def load_optimizers(optimizers, checkpoint, path):
    """
    Copies the moments and step counts of a checkpoint into new optimizers, which keep their own
    learning rate, betas and weight decay. Moments of position embeddings that crop_block_size
    removed are dropped.

    Raises UserError if the checkpoint is of other optimizers or of another model.
    """
    only_weights = f'--init_from={path} loads only its weights'
    saved = {key for key, value in checkpoint.items()
             if isinstance(value, dict) and 'param_groups' in value}
    missing = []
    if not saved:
        missing.append('optimizer')
    if 'iter_num' not in checkpoint:
        missing.append('iter_num')
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}; {only_weights}')
    if saved != set(optimizers):
        theirs = ' and '.join(sorted(saved))
        ours = ' and '.join(sorted(optimizers))
        raise UserError(f'{path} holds the state of {theirs}, and these settings use {ours} '
                        f'(muon is used if muon_lr is above 0); {only_weights}')
    for name, optimizer in optimizers.items():
        try:
            optimizer.load_state_dict(fitting_state(optimizer, checkpoint[name]))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f'{path}: its {name} is of a model with other parameters, or of '
                            f'another kind of optimizer; {only_weights}') from None


def fitting_state(optimizer, saved):
    """
    The state dict of `optimizer` with the moments of `saved`. Raises ValueError, or KeyError or
    TypeError for a broken state dict, if they do not fit.
    """
    moments = MOMENTS.get(type(optimizer))
    groups = []
    state = {}
    for group, saved_group in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        indices = saved_group['params']
        groups.append({**group, 'params': indices})
        for i, p in zip(indices, group['params'], strict=True):
            saved_tensors = saved['state'].get(i, {})
            names = set(saved_tensors) - {'step'}
            if saved_tensors and moments is not None and names != set(moments):
                raise ValueError(f'moments {names}')
            state[i] = {name: fitting_tensor(tensor, p) for name, tensor in saved_tensors.items()}
    return {'state': state, 'param_groups': groups}


def fitting_tensor(tensor, p):
    """
    A saved tensor of the parameter p, such as a moment, without rows that p has lost; a step count
    as it is. Raises ValueError if it is of another shape.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        return tensor
    tensor = tensor[:len(p)].clone()
    if tensor.shape != p.shape:
        raise ValueError(f'tensor {tuple(tensor.shape)} of a parameter {tuple(p.shape)}')
    return shard_like(broadcast_tensor(tensor), p)


@torch.no_grad()
def load_training_weights(model, checkpoint, path):
    """
    Copies the weights that training continues from into `model`, which has the averaged ones; only
    a checkpoint of a run with ema_decay has both. Raises UserError if they do not fit.
    """
    weights = checkpoint.get('training_model', {})
    if not weights:
        return
    try:
        for name, p in model.named_parameters():
            p.copy_(fitting_tensor(weights[name], p))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path}: training_model does not fit its model_args: {error}') from None

# -----------------------------------------------------------------------------
# a run

class Checkpointer:
    """
    Saves a training run, and knows which checkpoint is the best and which the latest.

    With always_save_checkpoint, ckpt.pt is the latest model. Without it ckpt.pt is the model with
    the best validation loss, and ckpt_last.pt the latest one, if that is another.

    Args:
        config: the settings of the run
        model: the bare GPT
        optimizers: {name: optimizer}
        scaler: a torch.amp.GradScaler
        ema: the EMA of the model's weights
        tokenizer: record of the dataset's tokenizer, or None
        job: name of the torchrun job, or ''
        print_master: prints in one process alone
        is_master: whether this process saves

    Attributes:
        evaluated_iter, val_loss: iteration and validation loss of the latest evaluation
        is_best: whether that was the best so far
        best_val_loss: the lowest validation loss so far
        best_val_iter: its iteration; None if unknown
        num_evals_without_best: evaluations in a row without a new best
        first_iter: the iteration at which this process begins
        saved_iter: iteration of the latest save
        owns_files: whether the checkpoints in out_dir are of this run
        error: why the latest save failed, or ''
    """

    # A signal within the first minute of a run, perhaps started by mistake, does not replace the
    # checkpoint of an earlier run in the same folder.
    MIN_SECONDS_TO_REPLACE = 60

    def __init__(self, config, model, optimizers, scaler, ema, tokenizer, job, print_master,
                 is_master):
        self.config = config
        self.model = model
        self.optimizers = optimizers
        self.scaler = scaler
        self.ema = ema
        self.tokenizer = tokenizer
        self.job = job
        self.print_master = print_master
        self.is_master = is_master

        self.out_dir = config['out_dir']
        self.best_path = Path(self.out_dir, 'ckpt.pt')
        self.last_path = Path(self.out_dir, 'ckpt_last.pt')
        self.run_id = os.urandom(16).hex()
        self.owns_files = False
        self.first_iter = 0
        self.saved_iter = 0
        self.evaluated_iter = None
        self.val_loss = math.inf
        self.is_best = False
        self.best_val_loss = math.inf
        self.best_val_iter = None
        self.num_evals_without_best = 0
        self.saved_best = (math.inf, None)  # best_val_loss and best_val_iter on disk
        self.error = ''

    def resume(self, checkpoint, path):
        """
        Continues the run of a checkpoint, loaded from `path`: loads its optimizers and scaler, and
        the weights that training continues from, if the model has averaged ones.

        Returns what training has done so far: {'tokens', 'seconds', 'loss'}.
        """
        load_optimizers(self.optimizers, checkpoint, path)
        if self.scaler.is_enabled() and checkpoint.get('scaler'):
            self.scaler.load_state_dict(checkpoint['scaler'])
        if not self.config['eval_only']:
            load_training_weights(self.model, checkpoint, path)
        self.run_id = checkpoint.get('run_id', self.run_id)
        self.owns_files = True
        self.first_iter = checkpoint['iter_num']
        self.saved_iter = checkpoint['iter_num']
        self.best_val_loss = checkpoint['best_val_loss']
        self.best_val_iter = checkpoint.get('best_val_iter')
        self.saved_best = (self.best_val_loss, self.best_val_iter)
        self.evaluated_iter = checkpoint.get('evaluated_iter')
        self.num_evals_without_best = checkpoint.get('num_evals_without_best', 0)
        tokens = self.first_iter * tokens_per_iter(self.config)  # for files that lack it
        return {
            'tokens': checkpoint.get('tokens', tokens),
            'seconds': checkpoint.get('seconds', 0.0),
            'loss': checkpoint.get('loss'),
        }

    def best_description(self):
        """ For messages: the best validation loss and where it was measured. """
        text = f'best val loss {self.best_val_loss:.4f}'
        if self.best_val_iter is not None:
            text += f' at step {self.best_val_iter}'
        return text

    def note_evaluation(self, iter_num, val_loss):
        """ Keeps the validation loss of the model after `iter_num` updates. """
        is_counted = iter_num == self.evaluated_iter  # a resumed run evaluates this model again
        self.evaluated_iter = iter_num
        self.val_loss = val_loss
        self.is_best = val_loss < self.best_val_loss
        if self.is_best:
            self.best_val_loss = val_loss
            self.best_val_iter = iter_num
            self.num_evals_without_best = 0
        elif not is_counted:
            self.num_evals_without_best += 1

    def should_stop_early(self, iter_num):
        """
        Whether the evaluation after `iter_num` updates is the last of early_stopping evaluations
        in a row without a new best.
        """
        patience = self.config['early_stopping']
        if patience == 0 or self.evaluated_iter != iter_num:
            return False
        return self.num_evals_without_best >= patience

    def should_save(self, iter_num, is_stopping, num_skipped_steps):
        """
        Whether to save: after an evaluation of a new model, every checkpoint_interval iterations,
        and on a signal.
        """
        if self.config['eval_only']:
            return False
        if self.evaluated_iter == iter_num:
            is_trained = iter_num > self.first_iter
            # an interrupted run may have saved this model before it was evaluated
            is_new_best = self.is_best and iter_num > 0
            return math.isfinite(self.val_loss) and (is_trained or is_new_best)
        interval = self.config['checkpoint_interval']
        is_due = is_stopping or (interval > 0 and iter_num % interval == 0)
        return is_due and iter_num > self.saved_iter and num_skipped_steps == 0

    def save(self, iter_num, is_stopping, **progress):
        """
        Saves the run, in the master process; all processes call this. If it fails, a warning is
        printed, older checkpoints stay, and training continues.

        Args:
            is_stopping: whether a signal ends the run; see MIN_SECONDS_TO_REPLACE
            progress: the keys tokens, seconds and loss of the checkpoint
        """
        is_refused = is_stopping and self.would_replace_another_run(progress['seconds'])
        if broadcast(is_refused):
            self.error = (f'a run of less than {self.MIN_SECONDS_TO_REPLACE} seconds does not '
                          f'replace the earlier run in {self.out_dir}')
            return
        self.print_master(f'saving checkpoint to {self.out_dir}')
        is_best_now = self.evaluated_iter == iter_num and self.is_best
        path, other_path = self.last_path, self.best_path
        if self.config['always_save_checkpoint'] or is_best_now:
            path, other_path = self.best_path, self.last_path
        error = ''
        try:
            save_checkpoint(
                path, self.model, self.optimizers, self.is_master, self.ema.averages,
                iter_num=iter_num,
                best_val_loss=self.best_val_loss,
                best_val_iter=self.best_val_iter,
                evaluated_iter=self.evaluated_iter,
                num_evals_without_best=self.num_evals_without_best,
                config=self.config,
                tokenizer=self.tokenizer,
                scaler=self.scaler.state_dict(),
                run_id=self.run_id,
                job=self.job,
                **progress)
            other_is_outdated = path == self.best_path or not self.owns_files
            if other_is_outdated and self.is_master:
                other_path.unlink(missing_ok=True)
        except OSError as exception:
            error = str(exception)
        self.error = broadcast(error)  # all processes know what is on disk
        if self.error:
            self.best_val_loss, self.best_val_iter = self.saved_best  # what is on disk
            self.print_master(f'WARNING: nothing was saved: {self.error}. Training continues, and '
                              'older checkpoints are intact.')
            return
        self.owns_files = True
        self.saved_iter = iter_num
        self.saved_best = (self.best_val_loss, self.best_val_iter)

    def would_replace_another_run(self, seconds):
        """ Whether it is too early, after `seconds` of training, to replace another run. """
        if self.owns_files or seconds >= self.MIN_SECONDS_TO_REPLACE:
            return False
        return newest_checkpoint(self.out_dir, best=True).exists()

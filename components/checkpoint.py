"""
The checkpoints of a run: ckpt.pt, and beside it ckpt_last.pt.

With always_save_checkpoint, ckpt.pt alone is the latest state of the run. Without it, ckpt_last.pt
is the latest state, and ckpt.pt the one with the best validation loss (at a new best, a hard link
to the same file). A run resumes from ckpt_last.pt where there is one. The first save of a run
replaces both files of an earlier run.

Each is one torch.save of a dict, which any reader of the nanoGPT format can read. Keys of that
format:

    model           state dict of the GPT; old files may have '_orig_mod.' before every key
    optimizer       state dict of AdamW
    model_args      nanoGPT's seven fields of GPTConfig, and others if not at their defaults
    iter_num        number of updates so far
    best_val_loss   the lowest validation loss so far; a 0-d tensor in old files
    config          all settings of the run

Additional keys, which other readers ignore: the other fields of Progress, and

    muon            state dict of Muon, if it is used; `optimizer` then has the other parameters
    gelu            the form of GELU, 'exact' if missing; after loading it is among model_args
    tokenizer       spec of the dataset's tokenizer (tokenizer.py)
    scaler          state dict of the GradScaler, empty if it was disabled
    job             name of the torchrun job that wrote the file, or ''

Values are tensors, numbers, strings, None, and lists and dicts of these. A file with anything else
does not load.

Not here: loading what `init_from` names (pretrained.py); the optimizers (optim.py).
"""
import dataclasses
import math
import os
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

from components.distributed import (
    broadcast,
    broadcast_tensor,
    gather_to_master,
    is_first_process,
    print_master,
    shard_like,
)
from components.errors import UserError
from components.files import whole_file
from components.optim import MOMENTS
from model import GPTConfig

MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


@dataclasses.dataclass
class Progress:
    """ What training has done so far, over all resumes. Every checkpoint holds it. """
    iter_num: int = 0               # updates
    tokens: int = 0                 # read
    seconds: float = 0.0            # without evaluations and saves
    loss: float | None = None       # of the batch of the latest update; perhaps a 0-d tensor
    val_loss: float | None = None   # of the model as it is now, if it was evaluated
    best_val_loss: float = math.inf
    best_val_iter: int | None = None
    num_evals_without_best: int = 0  # in a row
    run_id: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())

    def add_evaluation(self, val_loss):
        """ Keeps the validation loss of the model as it is now. """
        is_counted = self.val_loss is not None  # a resumed run evaluates this model again
        self.val_loss = val_loss
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.best_val_iter = self.iter_num
            self.num_evals_without_best = 0
        elif not is_counted:
            self.num_evals_without_best += 1

    def add_update(self, loss, num_tokens):
        """ Counts an update, by a batch of `num_tokens` tokens with this loss. """
        self.iter_num += 1
        self.tokens += num_tokens
        self.loss = loss
        self.val_loss = None

    def latest_loss(self):
        """ `loss` as a float, or None. On a GPU this waits for the update. """
        return None if self.loss is None else float(self.loss)

    def is_sound(self):
        """ Whether the validation loss of the model is finite, or else that of the last batch. """
        loss = self.latest_loss() if self.val_loss is None else self.val_loss
        return loss is None or math.isfinite(loss)

# -----------------------------------------------------------------------------
# saving

class Checkpoints:
    """
    Saves the checkpoints of a run in its out_dir, by the rules at the top of this file.

    Args:
        out_dir: folder, created if missing
        always_save: always_save_checkpoint of train.py
        progress: Progress of the run, as it starts or as it was loaded
        is_resumed: whether the checkpoints in out_dir are of this run

    Attributes:
        saved_iter: number of updates of the latest state on disk
        replaces_earlier_run: whether the next save replaces checkpoints of an earlier run
        error: why the latest save failed or was refused, or ''
    """

    def __init__(self, out_dir, always_save, progress, is_resumed):
        self.best_path = Path(out_dir, 'ckpt.pt')
        self.last_path = Path(out_dir, 'ckpt_last.pt')
        self.always_save = always_save
        self.saved_iter = progress.iter_num
        self.saved_best = (progress.best_val_loss, progress.best_val_iter)
        self.replaces_earlier_run = find_checkpoint(out_dir).exists() and not is_resumed
        self.error = ''

    def save(self, progress, model, optimizers, scaler, is_stopping=False, **fields):
        """
        Saves the state of the run, unless it is on disk already or its loss is not finite. All
        processes call this. If it fails, a warning is printed, older checkpoints stay, and training
        continues.

        Args:
            model: the unwrapped GPT
            optimizers: {name: optimizer}
            scaler: a torch.amp.GradScaler
            is_stopping: whether the run has to end early. Then the checkpoints of an earlier run
                stay, because no save of this run was due yet
            fields: further keys of the checkpoint
        """
        is_best = progress.best_val_iter == progress.iter_num > 0
        is_new_best = is_best and progress.best_val_loss < self.saved_best[0]
        is_on_disk = progress.iter_num == self.saved_iter and not is_new_best
        if is_on_disk or not progress.is_sound():
            return
        if broadcast(is_stopping and self.replaces_earlier_run):
            self.error = f'the first save would have replaced the run in {self.best_path.parent}'
            return
        print_master(f'saving checkpoint to {self.best_path.parent}')
        error = ''
        try:
            checkpoint = make_checkpoint(progress, model, optimizers, scaler, fields)
            if is_first_process():
                self.write(checkpoint, is_new_best)
        except OSError as exception:
            error = str(exception)
        self.error = broadcast(error)  # all processes know what is on disk
        if self.error:
            progress.best_val_loss, progress.best_val_iter = self.saved_best
            print_master(f'WARNING: nothing was saved: {self.error}. Training continues, and older '
                         'checkpoints are intact.')
            return
        self.saved_iter = progress.iter_num
        self.saved_best = (progress.best_val_loss, progress.best_val_iter)
        self.replaces_earlier_run = False

    def write(self, checkpoint, is_new_best):
        """ Replaces the files, each at once. Raises OSError if the disk is full. """
        path = self.best_path if self.always_save else self.last_path
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.unlink(missing_ok=True)  # left by an interrupted run, perhaps with a link
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # of torch's writer
                reason = str(error).partition('\n')[0]
                raise OSError(f'{path}: the disk is full or unavailable ({reason:.100})') from None
            if not self.always_save and (is_new_best or self.replaces_earlier_run):
                with whole_file(self.best_path) as link:
                    link_or_copy(temporary, link)
        if self.always_save:
            self.last_path.unlink(missing_ok=True)


def link_or_copy(path, copy):
    """ Makes `copy` a hard link to the file at `path`, or a copy where links are unsupported. """
    copy.unlink(missing_ok=True)  # left by an interrupted run
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def make_checkpoint(progress, model, optimizers, scaler, fields):
    """
    The dict described at the top of this file. All processes call this, as each may have a part of
    the tensors; only in the first one it is complete.
    """
    weights = model.state_dict()
    assert 'lm_head.weight' in weights, 'save the unwrapped model'
    checkpoint = {
        'model': weights,
        'model_args': {name: getattr(model.config, name) for name in MODEL_ARGS},
        'gelu': model.config.gelu,
        'scaler': scaler.state_dict(),
        **vars(progress),
        'loss': progress.latest_loss(),
        **fields,
    }
    checkpoint['model_args'].update(args_beyond_nanogpt(model.config))
    for name, optimizer in optimizers.items():
        checkpoint[name] = optimizer.state_dict()
    checkpoint = map_values(to_python_number, checkpoint)
    checkpoint = map_values(gather_to_master, checkpoint)
    if not model.config.untied:  # stored once
        weights = checkpoint['model']
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    return checkpoint


def args_beyond_nanogpt(config):
    """
    The fields of a GPTConfig that nanoGPT lacks, if they are not at their defaults: a reader that
    does not know one of them has to fail.
    """
    args = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_known = field.name in MODEL_ARGS or field.name == 'gelu'
        has_no_effect = field.name == 'rope_base' and not config.rotary
        if not is_known and not has_no_effect and value != field.default:
            args[field.name] = value
    return args


def map_values(function, value):
    """ Applies `function` to everything in nested dicts, lists and tuples -> the same nesting. """
    if isinstance(value, dict):
        return {key: map_values(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_values(function, item) for item in value)
    return function(value)


def to_python_number(value):
    """ A NumPy number as a Python one: a checkpoint is loaded without running NumPy's code. """
    return value.item() if isinstance(value, np.generic) else value

# -----------------------------------------------------------------------------
# loading

def find_checkpoint(out_dir, best=False):
    """
    The path of a run's latest checkpoint, or of that with the best validation loss; it may not
    exist.
    """
    best_path = Path(out_dir, 'ckpt.pt')
    last_path = Path(out_dir, 'ckpt_last.pt')
    if not last_path.exists() or (best and best_path.exists()):
        return best_path
    return last_path


def load_checkpoint(path, mmap=False):
    """
    Reads a checkpoint as data, onto the CPU; no code in it is run.

    Args:
        mmap: whether tensors stay in the file until they are used

    Raises UserError if the file is missing, broken, or not a checkpoint.

    Returns the dict described above, also for older forms of it.
    """
    try:
        can_mmap = mmap and zipfile.is_zipfile(path)  # the oldest format cannot be mapped
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=can_mmap)
    except FileNotFoundError:
        raise UserError(f'checkpoint {path} does not exist; train a model first') from None
    except Exception as error:  # a broken file can raise any exception
        raise UserError(f'{path} is not a complete checkpoint of tensors and plain data, or '
                        f'contains code, which was not run ({type(error).__name__})') from None
    check_format(checkpoint, path)

    args = dict(checkpoint['model_args'])
    args['gelu'] = checkpoint.get('gelu', 'exact')
    checkpoint['model_args'] = args
    weights = checkpoint['model']
    checkpoint['model'] = {key.removeprefix('_orig_mod.'): weights[key] for key in weights}
    checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', math.inf))
    return checkpoint


def check_format(checkpoint, path):
    """ Raises UserError if what a file holds is not a checkpoint of this model. """
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f'{path} is not a checkpoint: it holds a {kind} instead of a dict')
    for key in ('model', 'model_args'):
        if not isinstance(checkpoint.get(key), dict):
            raise UserError(f'{path} is not a checkpoint: it has no dict {key!r}')
    args = set(checkpoint['model_args'])
    missing = sorted(set(MODEL_ARGS) - {'bias', 'dropout'} - args)  # old files lack these two
    if missing:
        raise UserError(f'{path}: model_args lack {", ".join(missing)}')
    unknown = sorted(args - {field.name for field in dataclasses.fields(GPTConfig)})
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


def resume(checkpoint, path, optimizers, scaler, tokens_per_iter):
    """
    Continues the run of a checkpoint, loaded from `path`: copies its state into the optimizers and
    the scaler. `tokens_per_iter` counts the tokens of files that lack their number.

    Raises UserError if the checkpoint is of other optimizers or of another model.

    Returns its Progress.
    """
    load_optimizers(optimizers, checkpoint, path)
    if scaler.is_enabled() and checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    names = [field.name for field in dataclasses.fields(Progress)]
    known = {name: checkpoint[name] for name in names if name in checkpoint}
    progress = Progress(**known)
    if 'tokens' not in known:
        progress.tokens = progress.iter_num * tokens_per_iter
    return progress


def load_optimizers(optimizers, checkpoint, path):
    """
    Copies the moments and step counts of a checkpoint into new optimizers, which keep their own
    learning rate, betas and weight decay. Moments of position embeddings that crop_block_size
    removed are dropped. Raises UserError as resume() does.
    """
    only_weights = f'--init_from={shlex.quote(str(path))} loads only its weights'
    if 'training_model' in checkpoint:  # `model` is an average, which training did not continue
        raise UserError(f'{path} is of a run with ema_decay, which is unsupported; {only_weights}')
    saved = {key for key, value in checkpoint.items()
             if isinstance(value, dict) and 'param_groups' in value}
    if not saved or type(checkpoint.get('iter_num')) is not int:
        raise UserError(f'{path} lacks optimizer or iter_num; {only_weights}')
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

"""
A run on disk: ckpt.pt, one torch.save of a dict that any reader of the nanoGPT format can read, and
beside it, where ckpt.pt is the best and not the latest, ckpt_last.pt, the same of the latest.

    model           state dict of the bare GPT; old files may have '_orig_mod.' before every key
    optimizer       state dict of AdamW
    muon            ours: state dict of Muon, where the run has one; then AdamW's is of the other tensors
    model_args      the seven classic fields of GPTConfig, and others that are not at their defaults
    iter_num        updates made so far; `tokens` and `seconds`, ours: what they read and took
    best_val_loss   the lowest so far; a 0-d tensor in old files
    config          all settings of the run
    gelu            ours: the form of GELU, 'exact' where it is missing; in memory among model_args
    tokenizer       ours: what bins.tokenizer_record keeps of the dataset's tokenizer
    scaler          ours: state dict of the GradScaler, empty where it was off
    run_id, job     ours: the same in both files of a run; which torchrun job wrote them, or ''
"""
import re
import zipfile
from dataclasses import fields as fields_of
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map

from bins import check_disk, whole_file
from model import GPTConfig

MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
MOMENTS = {'optimizer': {'step', 'exp_avg', 'exp_avg_sq'}, 'muon': {'momentum_buffer'}}


def newer_args(config):
    """ The fields that GPT-2 lacks, where not at their defaults: a reader that lacks one must fail. """
    return {field.name: getattr(config, field.name) for field in fields_of(config)
            if field.name not in (*MODEL_ARGS, 'gelu') and getattr(config, field.name) != field.default}


def save_checkpoint(path, model, optimizers, **fields):
    """
    Writes the run to `path`, whole or not at all. `model` is the bare GPT (torch.compile and DDP each
    put a prefix on the keys); `fields` are the rest of the dict above. Raises OSError where it can't.
    """
    state = model.state_dict()
    assert 'lm_head.weight' in state, 'save the bare model, not a wrapper'
    checkpoint = {
        'model': state,
        **{key: optimizer.state_dict() for key, optimizer in zip(('optimizer', 'muon'), optimizers)},
        'model_args': {name: getattr(model.config, name) for name in MODEL_ARGS} | newer_args(model.config),
        'gelu': model.config.gelu,
        **fields,
    }
    checkpoint = tree_map(lambda value: value.item() if isinstance(value, np.generic) else value, checkpoint)
    moments = [value for optimizer in optimizers for of in optimizer.state.values() for value in of.values()]
    Path(f'{path}.tmp').unlink(missing_ok=True)  # of a run that was killed; its place may be needed
    check_disk(Path(path).parent, sum(t.nbytes for t in (*model.parameters(), *moments)))
    with whole_file(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # of torch's writer, where the disk filled up or went away
            raise OSError(f'{path}: {str(error).splitlines()[0]}') from None


def newest_checkpoint(out_dir, best=False):
    """
    The file that a run goes on from: ckpt_last.pt where it is alone in `out_dir` or, unless the `best` is
    asked for, where it is later than ckpt.pt and of the same run; else ckpt.pt, there or not.
    """
    first, last = Path(out_dir, 'ckpt.pt'), Path(out_dir, 'ckpt_last.pt')
    if best or not (first.exists() and last.exists()):
        return last if last.exists() and not first.exists() else first
    a, b = (load_checkpoint(path, mmap=True) for path in (first, last))
    same = a.get('run_id') is not None and a['run_id'] == b.get('run_id')
    return last if same and b.get('iter_num', 0) > a.get('iter_num', 0) else first


def load_checkpoint(path, mmap=False):
    """
    Reads `path` as data, on the CPU; nothing in it is run. Old forms come back in the current one. With
    `mmap`, for a look, tensors stay in the file. Raises FileNotFoundError, or ValueError that says why.
    """
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True,
                                mmap=mmap and zipfile.is_zipfile(path))  # not the oldest form
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no checkpoint {path}; train one first, or name another') from None
    except Exception as error:  # a broken file fails in any way
        code = re.search(r'GLOBAL (\S+)', str(error))
        raise ValueError(f'{path} is refused: it carries code ({code[1]}), which was not run' if code else
                         f'{path} is not a whole checkpoint: {error!r:.200}') from None

    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not the dict of a checkpoint')
    if missing := [key for key in ('model', 'model_args') if key not in checkpoint]:
        raise ValueError(f'{path} lacks {", ".join(missing)}')
    kinds = {key: dict for key in ('model', 'model_args', 'optimizer', 'muon', 'scaler', 'config')}
    for key, kind in {**kinds, 'iter_num': int, 'best_val_loss': (float, int, torch.Tensor)}.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise ValueError(f'{path}: {key}={checkpoint[key]!r:.50} is not what a checkpoint holds there')
    args = checkpoint['model_args'] = dict(checkpoint['model_args'])
    if missing := [key for key in MODEL_ARGS if key not in (*args, 'bias', 'dropout')]:  # old files
        raise ValueError(f'{path}: its model_args lack {", ".join(missing)}')
    if unknown := sorted(set(args) - {field.name for field in fields_of(GPTConfig)}):
        raise ValueError(f'{path}: this model does not know the model_args {", ".join(unknown)}')
    args['gelu'] = checkpoint.get('gelu', 'exact')
    checkpoint['model'] = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
    checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', 'inf'))
    return checkpoint


def load_weights(model, checkpoint, path):
    """ Puts the checkpoint's weights into `model`. Raises ValueError that names what does not fit. """
    theirs, ours = checkpoint['model'], model.state_dict()
    masks = {key for key in theirs if key.endswith('.attn.bias')} - set(ours)  # from before torch 2
    theirs = {key: value for key, value in theirs.items() if key not in masks}
    try:
        model.load_state_dict(theirs)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = ' '.join(str(error).partition(':')[2].split())
        raise ValueError(f'{path} does not hold the model of its model_args: {reason:.200}') from None
    if bad := [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise ValueError(f'{path}: {", ".join(bad):.200} is not finite')


def load_optimizers(optimizers, checkpoint, path):
    """
    Puts the checkpoint's moments and step counts into fresh optimizers (AdamW, perhaps Muon) that keep their
    own settings; a table's lose the rows that it lost to crop_block_size. Raises ValueError where none fit.
    """
    if missing := [key for key in ('optimizer', 'iter_num') if key not in checkpoint]:
        raise ValueError(f'{path} lacks {", ".join(missing)}; --init_from={path} takes its weights alone')
    if ('muon' in checkpoint) != (len(optimizers) == 2):
        raise ValueError(f'{path} was trained with{"" if "muon" in checkpoint else "out"} Muon, and muon_lr '
                         f'says otherwise; --init_from={path} takes its weights alone')
    for key, optimizer in zip(('optimizer', 'muon'), optimizers):
        moments, groups, fits = {}, [], True
        try:
            for ours, theirs in zip(optimizer.param_groups, checkpoint[key]['param_groups'], strict=True):
                groups.append({**ours, 'params': theirs['params']})
                for i, p in zip(theirs['params'], ours['params'], strict=True):
                    moments[i] = dict(checkpoint[key]['state'].get(i, {}))
                    fits = fits and set(moments[i]) in (set(), MOMENTS[key])
                    for name in MOMENTS[key] & set(moments[i]) - {'step'}:
                        moments[i][name] = moments[i][name][:len(p)].clone()
                        fits = fits and moments[i][name].shape == p.shape
        except (KeyError, TypeError, AttributeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f'{path}: its {key} is of a model with other parameters, or of another kind')
        optimizer.load_state_dict({'state': moments, 'param_groups': groups})

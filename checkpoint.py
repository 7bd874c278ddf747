"""
A run on disk: ckpt.pt, one torch.save of a dict that any reader of the nanoGPT format can read, and
beside it, where ckpt.pt is the best and not the latest, ckpt_last.pt, the same of the latest.

    model           state dict of the bare GPT; old files may have '_orig_mod.' before every key
    optimizer       state dict of AdamW
    muon            ours: state dict of Muon, where the run has one; then AdamW's is of the other tensors
    model_args      the seven classic fields of GPTConfig, and those of NEWER that are on
    iter_num        updates made so far; `seconds`, ours: what they took
    best_val_loss   the lowest so far; a 0-d tensor in old files
    config          all settings of the run
    gelu            ours: the form of GELU, 'exact' where it is missing; in memory among model_args
    tokenizer       ours: what bins.tokenizer_record keeps of the dataset's tokenizer
    scaler          ours: state dict of the GradScaler, empty where it was off
    run_id, job     ours: the same in both files of a run; which torchrun job wrote them, or ''
"""
import re
import zipfile
from pathlib import Path

import torch

from bins import check_disk, whole_file

NEWER = ('rotary', 'rmsnorm', 'qk_norm', 'untied')  # who knows them not must stumble
MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
MOMENTS = {'optimizer': {'step', 'exp_avg', 'exp_avg_sq'}, 'muon': {'momentum_buffer'}}


def plain(value):
    """ The same with numpy scalars as Python numbers: a safe load refuses them. Tensors stay. """
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    return value if isinstance(value, torch.Tensor) or not hasattr(value, 'item') else value.item()


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
        'model_args': {name: getattr(model.config, name) for name in MODEL_ARGS + NEWER
                       if name in MODEL_ARGS or getattr(model.config, name)},
        'gelu': model.config.gelu,
        **fields,
    }
    moments = [value for optimizer in optimizers for of in optimizer.state.values() for value in of.values()]
    check_disk(Path(path).parent, sum(t.nbytes for t in (*model.parameters(), *moments)))
    with whole_file(path) as temporary:
        try:
            torch.save(plain(checkpoint), temporary)
        except RuntimeError as error:  # of torch's writer, where the disk filled up or went away
            raise OSError(f'{path}: {str(error).splitlines()[0]}') from None


def newest_checkpoint(out_dir):
    """
    The file that a run goes on from: ckpt_last.pt where it is alone in `out_dir`, or later than ckpt.pt
    and of the same run; else ckpt.pt, there or not.
    """
    best, last = Path(out_dir, 'ckpt.pt'), Path(out_dir, 'ckpt_last.pt')
    if not last.exists() or not best.exists():
        return last if last.exists() else best
    a, b = (load_checkpoint(path, mmap=True) for path in (best, last))
    same = a.get('run_id') == b.get('run_id') is not None
    return last if same and b.get('iter_num', 0) > a.get('iter_num', 0) else best


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
    dicts = dict.fromkeys(('model', 'model_args', 'optimizer', 'muon', 'scaler', 'config'), dict)
    for key, kind in {**dicts, 'iter_num': int, 'best_val_loss': (float, int, torch.Tensor)}.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise ValueError(f'{path}: {key}={checkpoint[key]!r:.50} is not what a checkpoint holds there')
    args = checkpoint['model_args'] = dict(checkpoint['model_args'])
    if missing := [key for key in MODEL_ARGS[:6] if key not in (*args, 'bias')]:  # True where it is old
        raise ValueError(f'{path}: its model_args lack {", ".join(missing)}')
    if unknown := sorted(set(args) - set(MODEL_ARGS + NEWER)):
        raise ValueError(f'{path}: this model does not know the model_args {", ".join(unknown)}')
    args['gelu'] = checkpoint.get('gelu', 'exact')
    checkpoint['model'] = {
        key.removeprefix('_orig_mod.'): value for key, value in checkpoint['model'].items()
        if not key.endswith('.attn.bias')  # the causal mask, a buffer in files from before torch 2
    }
    checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', 'inf'))
    return checkpoint


def load_weights(model, checkpoint, path):
    """ Puts the checkpoint's weights into `model`. Raises ValueError that names what does not fit. """
    theirs = checkpoint['model']
    try:
        model.load_state_dict(theirs)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = ' '.join(str(error).partition(':')[2].split())
        raise ValueError(f'{path} does not hold the model of its model_args: {reason:.200}') from None
    if bad := [key for key, value in theirs.items() if not torch.isfinite(value).all()]:
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

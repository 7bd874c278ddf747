"""
The models that `init_from` names: in a checkpoint, in a Hugging Face directory, or on the hub.

Not here: how the weights are read (checkpoint.py, huggingface.py), and a new model (train.py).
"""
import os
from typing import NamedTuple

import torch

from components.checkpoint import find_checkpoint, load_checkpoint, load_weights, map_values
from components.distributed import broadcast, is_first_process
from components.errors import UserError
from components.huggingface import GPT2_NAMES, load_gpt2_spec
from components.settings import model_config
from components.tokenizer import load_meta, spec_of_checkpoint
from model import GPT


class ModelLocation(NamedTuple):
    """ Where a model comes from. """
    kind: str  # 'scratch', 'resume', 'checkpoint' or 'huggingface'
    name: str  # path of the checkpoint or directory, or name on the hub; 'scratch' for a new model


def find_model(init_from, out_dir, best=True):
    """
    Finds out what `init_from` names. Nothing is loaded, and what it names may not exist.

    Args:
        init_from: 'scratch'; 'resume', a checkpoint in `out_dir`; a checkpoint file; the folder of
            a run, for its best checkpoint; one of GPT2_NAMES; a Hugging Face directory; or
            namespace/name on the hub
        out_dir: the folder of a run
        best: whether 'resume' is the checkpoint with the best validation loss, else the latest one

    Returns:
        ModelLocation
    """
    if init_from == 'scratch':
        return ModelLocation('scratch', init_from)
    if init_from == 'resume':
        return ModelLocation('resume', str(find_checkpoint(out_dir, best)))
    if init_from in GPT2_NAMES:  # also if a file or directory has this name
        return ModelLocation('huggingface', init_from)
    if os.path.isfile(init_from) or init_from.endswith('.pt'):
        return ModelLocation('checkpoint', init_from)
    path = find_checkpoint(init_from, best=True)
    if path.exists():
        return ModelLocation('checkpoint', str(path))
    return ModelLocation('huggingface', init_from)


def find_model_of_job(init_from, out_dir, eval_only, job):
    """
    find_model() for train.py, whose first process alone needs the files.

    Args:
        init_from: as for find_model(); or 'auto', which is 'resume' if there is a checkpoint, else
            'scratch'
        eval_only: whether the model is only evaluated, so that the best one is meant
        job: distributed.Job. If torchrun has restarted it, 'resume' replaces `init_from` once the
            job has saved a checkpoint

    Returns:
        ModelLocation, the same in all processes
    """
    location = None
    if is_first_process():
        path = find_checkpoint(out_dir, best=eval_only)
        exists = path.exists()
        if init_from == 'auto':
            init_from = 'resume' if exists else 'scratch'
        elif job.restarted and exists and load_checkpoint(path, mmap=True).get('job') == job.name:
            init_from = 'resume'
        location = find_model(init_from, out_dir, best=eval_only)
    return broadcast(location)


def load_model(location, dropout=None, mmap=False):
    """
    Loads a model that exists already.

    Args:
        location: ModelLocation of any kind but 'scratch'
        dropout: replaces the dropout of the model; None keeps it
        mmap: whether the tensors of the checkpoint stay in the file until they are used, so that
            the optimizer state is not read. The weights of the model are copies in any case.

    Returns:
        the GPT, on the CPU, and the checkpoint that it comes from (dict; None for 'huggingface')

    Raises:
        UserError: if there is no such model, or the file is broken or of another architecture
    """
    assert location.kind != 'scratch', 'a new model is not loaded'
    overrides = {}
    if dropout is not None:
        overrides['dropout'] = dropout
    if location.kind == 'huggingface':
        try:
            return GPT.from_pretrained(location.name, overrides), None
        except ValueError as error:  # of GPTConfig
            raise UserError(f'{location.name}: {error}') from None

    can_mmap = mmap and os.name == 'posix'  # Windows cannot replace a file that is mapped
    checkpoint = load_checkpoint(location.name, can_mmap)
    model_args = {**checkpoint['model_args'], **overrides}
    model = GPT(model_config(**model_args))
    load_weights(model, checkpoint, location.name)
    return model, checkpoint


def new_model(config, fsdp=False):
    """
    A GPT with new weights. With fsdp these exist in the first process alone, and in the others the
    model is on the meta device: distributed.parallelize() gives each process its part.
    """
    if fsdp and not is_first_process():
        with torch.device('meta'):
            return GPT(config)
    return GPT(config)


def load_model_everywhere(location, dropout, fsdp):
    """
    load_model() for a job of several processes, of which the first alone needs the files: the
    others get a new model, to which distributed.parallelize() copies the weights, and the
    checkpoint with meta tensors for its larger tensors (distributed.broadcast_tensor() gets these).
    """
    model = None
    checkpoint = None
    config = None
    if is_first_process():
        model, checkpoint = load_model(location, dropout)
        config = model.config
    config, outline = broadcast((config, map_values(without_data, checkpoint)))
    if is_first_process():
        return model, checkpoint
    return new_model(config, fsdp), outline


def without_data(value):
    """ A meta tensor for a tensor with dimensions; other values as they are. """
    is_large = isinstance(value, torch.Tensor) and value.dim() > 0
    return value.to('meta') if is_large else value


def load_tokenizer_spec(location, model, checkpoint, required=True):
    """
    Loads the tokenizer that a model was trained with.

    Args:
        location: the ModelLocation of the model
        model: GPT
        checkpoint: dict, or None for a model from Hugging Face
        required: whether a missing tokenizer is an error

    Returns:
        a spec of tokenizer.py; None if only the size of the vocabulary is known and no tokenizer
        is required

    Raises:
        UserError: if the tokenizer is missing, broken, or of another vocabulary
    """
    vocab_size = model.config.vocab_size
    message = f'{location.name} has a vocabulary of {vocab_size} and no tokenizer'
    if location.kind == 'huggingface':
        spec = load_gpt2_spec(location.name, vocab_size)
        if required and spec is None:
            raise UserError(f'{message}; save its tokenizer.json there')
        return spec

    dataset = checkpoint.get('config', {}).get('dataset', '')
    spec = spec_of_checkpoint(checkpoint, vocab_size)
    is_gone = spec is None and load_meta(dataset) is None
    if is_gone or (required and spec is None):
        raise UserError(f'{message}, and dataset={dataset} has no meta.pkl with a text for each id '
                        '(itos); run its prepare.py')
    return spec

"""
What can be wrong with the settings of a script, before anything is loaded or compiled, and with a model for
the data it is to read.

A rule is a pair: whether it is broken, and what to say. The first broken one is raised as a ValueError.
"""
import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from bins import hf_record, largest_id, tokenizer_record
from machine import has_compiler, has_fbgemm


def _raise_first(rules):
    for broken, message in rules:
        if broken:
            raise ValueError(message)


def _of_all(s):
    return [
        (not 0 <= s.seed < 2**63, f'seed={s.seed} must be from 0 to 2**63 - 1'),
        (s.compile and not has_compiler(),
         'compile=True takes a C++ compiler, and none is here; --compile=False'),
    ]


def check_train(settings, device_type, ddp, world_size, local_world_size):
    """ The rules for train.py. `settings` is a dict, with device, dtype, compile and backend resolved. """
    s = SimpleNamespace(**settings)
    not_negative = ('eval_interval', 'log_interval', 'checkpoint_interval', 'max_bad_steps', 'max_iters',
                    'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'grad_clip', 'weight_decay', 'min_lr',
                    'muon_lr')
    _raise_first([
        *((settings[name] < 0, f'{name}={settings[name]} must not be negative') for name in not_negative),
        *((not 0 <= settings[name] < 1, f'{name}={settings[name]} must be from 0 up to, but not, 1')
          for name in ('beta1', 'beta2', 'dropout')),
        (not 0 <= s.learning_rate < float('inf'), f'learning_rate={s.learning_rate} must be a number from 0'),
        (s.decay_lr and s.min_lr > s.learning_rate,
         f'min_lr={s.min_lr} is above learning_rate={s.learning_rate}; usual is a tenth of it'),
        (s.decay_lr and s.cooldown_iters and s.warmup_iters + s.cooldown_iters > s.lr_decay_iters,
         f'cooldown_iters={s.cooldown_iters} and warmup_iters={s.warmup_iters} are more than '
         f'lr_decay_iters={s.lr_decay_iters}; lower cooldown_iters'),
        (s.muon_lr and not s.learning_rate, 'muon_lr takes a learning_rate above 0, for what is no matrix'),
        *((settings[name] < 1, f'{name}={settings[name]} must be at least 1')
          for name in ('batch_size', 'block_size')),
        (s.batch_size * s.block_size > 2**30,
         f'batch_size={s.batch_size} of block_size={s.block_size} would run out of memory; lower batch_size'),
        *_of_all(s),
        (s.gradient_accumulation_steps < world_size,
         f'gradient_accumulation_steps={s.gradient_accumulation_steps} is less than the number of processes, '
         f'{world_size}, and each needs a micro-batch'),
        (s.eval_split != 'val' and not s.eval_only, f'eval_split={s.eval_split!r} takes --eval_only=True'),
        (s.eval_iters < 1 and s.eval_iters != -1,
         f'eval_iters={s.eval_iters} must be at least 1, or -1 for all'),
        (s.backend not in ('nccl', 'gloo') or ddp and s.backend == 'nccl' and device_type != 'cuda',
         f'backend={s.backend!r} on {device_type} cannot be; --backend=auto takes what can'),
        (ddp and device_type == 'mps', 'several processes cannot share an Apple GPU; --device=cpu'),
        (device_type == 'cuda' and local_world_size > torch.cuda.device_count(),
         f'{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs'),
        (s.wandb_log and find_spec('wandb') is None, 'wandb_log=True takes: pip install wandb'),
        (not s.out_dir, "out_dir='' is no folder; --out_dir=out"),
        (os.path.exists(s.out_dir) and not os.path.isdir(s.out_dir), f'out_dir={s.out_dir} is a file'),
        (os.path.isdir(s.out_dir) and not s.eval_only and not os.access(s.out_dir, os.W_OK),
         f'out_dir={s.out_dir} cannot be written to'),
    ])


def check_sample(settings):
    """ The rules for sample.py. """
    s = SimpleNamespace(**settings)
    _raise_first([
        (not 0 <= s.temperature < float('inf'), f'temperature={s.temperature} must be at least 0'),
        *((settings[name] < 0, f'{name}={settings[name]} must not be negative')
          for name in ('max_new_tokens', 'top_k')),
        (s.num_samples < 1, f'num_samples={s.num_samples} must be at least 1'),
        (not 0 < s.top_p <= 1, f'top_p={s.top_p} must be above 0 and at most 1, where it is off'),
        (not 0 <= s.min_p <= 1, f'min_p={s.min_p} must be from 0, where it is off, to 1'),
        (not 0 < s.repetition_penalty < float('inf'),
         f'repetition_penalty={s.repetition_penalty} must be above 0; 1.0 is off'),
        (s.past_block not in ('exact', 'half', 'roll'),
         f"past_block={s.past_block!r} must be 'exact', 'half' or 'roll'"),
        (s.quantize not in ('', 'int8'), f"quantize={s.quantize!r} must be 'int8', or '' for none"),
        (s.quantize and not has_fbgemm(s.device.partition(':')[0]),
         f"quantize='int8' on {s.device} has no kernel here; an x86 CPU has one"),
        (s.interactive and s.start != '\n', 'interactive=True asks for prompts itself, without --start'),
        (s.out and not os.access(os.path.dirname(s.out) or '.', os.W_OK),
         f'out={s.out}: its folder is not there, or cannot be written to'),
        (s.out and os.path.exists(s.out) and not os.path.isfile(s.out), f'out={s.out} is no file'),
        *_of_all(s),
    ])


def check_bench(settings):
    """ The rules for bench.py. """
    s = SimpleNamespace(**settings)
    _raise_first([
        (s.mode not in ('step', 'compare', 'sample', 'estimate'),
         f"mode={s.mode!r} must be 'step', 'compare', 'sample' or 'estimate'"),
        *((settings[name] < 1, f'{name}={settings[name]} must be at least 1')
          for name in ('max_new_tokens', 'batch_size', 'gradient_accumulation_steps', 'max_iters')),
        *_of_all(s),
    ])


def has_tokenizer(folder):
    """ Whether a Hugging Face directory has a tokenizer beside its model. """
    return any(os.path.exists(os.path.join(folder, name)) for name in ('tokenizer.json', 'vocab.json'))


def tokens_of(record):
    """ The tokens of a tokenizer that is not GPT-2's: {token: id}, None where nothing is known of them. """
    if record and record['kind'] == 'hf':
        return json.loads(record['json'])['model']['vocab']
    return record and {token: i for i, token in enumerate(record['itos'])}


def check_fit(model_config, source, data, meta, settings):
    """ The rules for a model from `source`, the bins {split: ids}, and the settings, together. """
    theirs = ours = None
    if meta and has_tokenizer(source):
        theirs, ours = (tokens_of(record) for record in (hf_record(source), tokenizer_record(meta)))
    needed = max([largest_id(ids) + 1 for ids in data.values()] + [meta['vocab_size'] if meta else 0])
    _raise_first([
        (model_config.vocab_size < needed,
         f'{source} has a vocabulary of {model_config.vocab_size}, and dataset={settings["dataset"]} '
         f'needs {needed}'),
        (ours and theirs != ours,
         f'dataset={settings["dataset"]} has other tokens than {source}; data/custom/prepare.py '
         f'--tokenizer={source} prepares text for it'),
        (settings['block_size'] > model_config.block_size,
         f'block_size={settings["block_size"]} is more than the {model_config.block_size} of {source}; '
         f'set --block_size={model_config.block_size}'),
    ])

"""
The rules for settings: what is wrong with them is found before anything is loaded or compiled.

Not here: how settings are given (configurator.py), the fields of a model (GPTConfig in model.py),
and which files exist (dataset.py, checkpoint.py).
"""
import math
import os
import shlex
from dataclasses import fields
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from components.dataset import largest_id
from components.device import has_fbgemm, missing_for_compile
from components.distributed import is_first_process
from components.errors import UserError
from components.huggingface import load_gpt2_spec
from components.tokenizer import has_tokens_of, spec_of_checkpoint
from model import GPTConfig

# of all scripts: the lowest value, and what a value has to be below
RANGES = {
    (0, math.inf): (
        'max_iters', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'eval_interval',
        'log_interval', 'checkpoint_interval', 'max_skipped_steps', 'early_stopping', 'min_lr',
        'learning_rate', 'muon_lr', 'weight_decay', 'grad_clip', 'max_new_tokens', 'top_k',
        'temperature'),
    (1, math.inf): (
        'batch_size', 'block_size', 'gradient_accumulation_steps', 'num_samples', 'processes'),
    (0, 1): ('beta1', 'beta2', 'dropout'),
    (0, 2**63): ('seed',),
}
CHOICES = {
    'backend': ('gloo', 'nccl'),  # 'auto' has become one of them
    'past_block': ('exact', 'half'),
    'quantize': ('', 'int8'),
    'mode': ('step', 'sample', 'estimate'),
}


def require(condition, message):
    """ Raises UserError with `message` if the condition is false. """
    if not condition:
        raise UserError(message)


def check_common(s):
    """ The rules that all scripts share. """
    for (lowest, limit), names in RANGES.items():
        for name in names:
            value = getattr(s, name, lowest)  # a script has some of these settings
            require(lowest <= value < limit,
                    f'{name}={value} must be at least {lowest} and below {limit}')
    for name, choices in CHOICES.items():
        value = getattr(s, name, choices[0])
        require(value in choices, f'{name}={value!r} must be one of {choices}')
    if not s.compile:
        return
    device_type = s.device.partition(':')[0]
    missing = missing_for_compile(device_type)
    require(not missing,
            f'compile={s.compile} requires {missing}, which is not installed; set --compile=False')
    require(s.compile is True or device_type == 'cuda',
            f'compile={s.compile} requires CUDA, and device={s.device}; set --compile=True')


def model_config(**args):
    """ A GPTConfig. Raises UserError for values that it refuses. """
    try:
        return GPTConfig(**args)
    except ValueError as error:
        raise UserError(str(error)) from None


def new_model_config(settings, vocab_size):
    """ The GPTConfig of a new model: the settings that are named like its fields. """
    names = {field.name for field in fields(GPTConfig)}
    args = {name: value for name, value in settings.items() if name in names}
    return model_config(vocab_size=vocab_size, **args)

# -----------------------------------------------------------------------------
# train.py

def check_train(settings, device_type, ddp, world_size):
    """
    The rules for train.py.

    Args:
        settings: dict, with device, dtype, compile and backend selected
        device_type: 'cpu', 'cuda' or 'mps'
        ddp: whether torchrun started the script
        world_size: number of processes
    """
    s = SimpleNamespace(**settings)
    check_common(s)
    check_schedule(s)
    check_evaluation(s)
    check_processes(s, device_type, ddp, world_size)
    check_fsdp(s, ddp, world_size)
    # gradients lie in memory that the next backward pass overwrites
    require(s.compile != 'reduce-overhead' or (s.gradient_accumulation_steps == 1 and not ddp),
            'compile=reduce-overhead requires gradient_accumulation_steps=1 and no torchrun; set '
            '--compile=True')
    # torch restores the random numbers of dropout on other devices only
    require(not s.activation_checkpointing or s.dropout == 0 or device_type != 'mps',
            f'activation_checkpointing=True with dropout={s.dropout} is unsupported on MPS')
    require(s.out_dir != '', "out_dir='' is not a folder; set --out_dir=out")
    require(not s.wandb_log or find_spec('wandb') is not None,
            'wandb_log=True requires wandb: pip install wandb')


def check_schedule(s):
    require(s.muon_lr == 0 or s.learning_rate > 0,
            'muon_lr requires a learning_rate above 0 for the parameters that are not matrices')
    if not s.decay_lr:
        return
    require(s.min_lr <= s.learning_rate,
            f'min_lr={s.min_lr} is above learning_rate={s.learning_rate}; a tenth of it is usual')
    iters = s.warmup_iters + s.cooldown_iters
    require(s.cooldown_iters == 0 or iters <= s.lr_decay_iters,
            f'cooldown_iters={s.cooldown_iters} and warmup_iters={s.warmup_iters} are more than '
            f'lr_decay_iters={s.lr_decay_iters}; lower cooldown_iters')


def check_evaluation(s):
    require(s.eval_iters >= 1 or s.eval_iters == -1,
            f'eval_iters={s.eval_iters} must be at least 1, or -1 for the whole split')
    require(s.eval_split == 'val' or s.eval_only,
            f'eval_split={s.eval_split!r} requires --eval_only=True')
    require(s.early_stopping == 0 or s.eval_interval > 0 or s.eval_only,
            f'early_stopping={s.early_stopping} requires evaluations; set --eval_interval')


def check_processes(s, device_type, ddp, world_size):
    check_micro_batches(s, world_size)
    require(not ddp or s.backend == 'gloo' or device_type == 'cuda',
            f'backend=nccl is not available on {device_type}; set --backend=auto')
    require(not ddp or device_type != 'mps',
            'several processes cannot share an Apple GPU; set --device=cpu')
    if device_type == 'cuda':
        num_gpus = torch.cuda.device_count()
        local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        # some launchers show each process its own GPU alone
        require(local_world_size <= num_gpus or num_gpus == 1,
                f'{local_world_size} processes on a machine with {num_gpus} GPUs; set '
                f'--nproc_per_node={num_gpus}')


def check_micro_batches(s, world_size):
    require(s.gradient_accumulation_steps >= world_size,
            f'gradient_accumulation_steps={s.gradient_accumulation_steps} is less than the number '
            f'of processes, {world_size}; each process requires a micro-batch')


def check_fsdp(s, ddp, world_size):
    if not s.fsdp:
        return
    require(ddp, 'fsdp=True requires several processes: torchrun --standalone --nproc_per_node=N')
    require(s.dtype != 'float16', 'fsdp=True with dtype=float16 is unsupported; set '
            '--dtype=bfloat16 or float32')
    require(s.gradient_accumulation_steps % world_size == 0,
            f'fsdp=True requires gradient_accumulation_steps={s.gradient_accumulation_steps} to be '
            f'a multiple of the number of processes, {world_size}')


def check_fit(model, location, checkpoint, data, vocab_size, spec, settings):
    """
    The rules for a model and its dataset.

    Args:
        model: the GPT
        location: the ModelLocation that it comes from
        checkpoint: dict; None if it was not loaded from a checkpoint
        data: {split: token ids}
        vocab_size, spec: of the dataset, and of its tokenizer or None
        settings: dict of train.py's settings
    """
    dataset = settings['dataset']
    block_size = settings['block_size']
    own_spec = None  # of the model's tokenizer, if it is known
    if checkpoint is not None:
        own_spec = spec_of_checkpoint(checkpoint, model.config.vocab_size)
    elif location.kind == 'huggingface' and is_first_process():  # the others may lack its files
        own_spec = load_gpt2_spec(location.name, model.config.vocab_size)
    is_unknown = own_spec is None and (checkpoint is not None or location.kind == 'huggingface')
    if own_spec and spec:
        tokenizer = 'gpt2' if own_spec['kind'] == 'gpt2' else shlex.quote(location.name)
        require(has_tokens_of(own_spec, spec),
                f'dataset={dataset} has other tokens than {location.name}; prepare text for it: '
                f'python data/custom/prepare.py --source=FILE --name=NAME --tokenizer={tokenizer}')
    elif is_unknown and is_first_process() and spec and spec['kind'] != 'gpt2':
        require(model.config.vocab_size == vocab_size,
                f'{location.name} has a vocabulary of {model.config.vocab_size} and no tokenizer, '
                f'and dataset={dataset} has {vocab_size}; set the --dataset that it was trained on')
    num_needed = max(largest_id(ids) + 1 for ids in data.values())
    # GPT-2's models differ in padding, others may lack special tokens that are in no text
    if spec != {'kind': 'gpt2'} and location.kind != 'huggingface':
        num_needed = max(num_needed, vocab_size)
    require(model.config.vocab_size >= num_needed,
            f'{location.name} has a vocabulary of {model.config.vocab_size}, and dataset={dataset} '
            f'needs {num_needed}')
    context = model.config.block_size
    require(block_size <= context,
            f'block_size={block_size} is more than the {context} of {location.name}; set '
            f'--block_size={context}')

# -----------------------------------------------------------------------------
# the other scripts

def check_sample(settings):
    """ The rules for sample.py. """
    s = SimpleNamespace(**settings)
    check_common(s)
    require(s.compile in (True, False), f'compile={s.compile} is for training; set --compile=True')
    require(0 < s.top_p <= 1, f'top_p={s.top_p} must be above 0 and at most 1, which disables it')
    require(0 <= s.min_p <= 1, f'min_p={s.min_p} must be from 0, which disables it, to 1')
    if s.quantize:
        require(has_fbgemm(s.device),
                f"quantize='int8' is not available on {s.device}; it requires an x86 CPU")
        require(not s.compile, "quantize='int8' cannot be compiled; set --compile=False")
    require(not s.interactive or s.start == '\n',
            'interactive=True reads prompts from the terminal; omit --start')
    folder = os.path.dirname(s.out) or '.'
    require(not os.path.isdir(s.out), f'out={s.out} is a folder')
    require(not s.out or os.access(folder, os.W_OK),
            f'out={s.out}: its folder is missing or not writable')


def check_bench(settings):
    """ The rules for bench.py. """
    s = SimpleNamespace(**settings)
    check_common(s)
    for name in ('max_new_tokens', 'max_iters'):
        require(getattr(s, name) > 0, f'{name}={getattr(s, name)} must be at least 1')
    if s.mode == 'estimate':
        require(s.processes > 1 or not s.fsdp,
                'fsdp=True requires several processes; set --processes=N')
        check_micro_batches(s, s.processes)
        check_fsdp(s, ddp=s.processes > 1, world_size=s.processes)

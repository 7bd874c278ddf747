""" components/settings.py: the rules for the settings of the scripts. """
import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from components import settings as settings_module
from components.errors import UserError
from components.pretrained import ModelLocation
from components.settings import (
    check_bench,
    check_fit,
    check_sample,
    check_train,
    model_config,
    new_model_config,
)
from model import GPTConfig


def default_settings(script):
    """ The settings of a script at their defaults, with what 'auto' selects. """
    location, _, _ = (ROOT / script).read_text().partition('\nexec(')
    names = {}
    exec(location, names)
    defaults = {name: value for name, value in names.items()
                if type(value) in (int, float, bool, str) and not name.startswith('_')}
    return {**defaults, 'device': 'cpu', 'dtype': 'float32', 'compile': False, 'backend': 'gloo'}


def check(script, device_type='cpu', ddp=False, world_size=1, **changes):
    """ Applies the rules of a script to its defaults with these changes. """
    settings = {**default_settings(script), **changes}
    if script == 'train.py':
        check_train(settings, device_type, ddp, world_size)
    elif script == 'sample.py':
        check_sample(settings)
    else:
        check_bench(settings)


def refused(*words):
    """ Expects a UserError whose message has these words, in this order. """
    return pytest.raises(UserError, match='.*'.join(map(re.escape, words)))

# -----------------------------------------------------------------------------
# single settings

# (script, setting, values at the limits, values beyond them)
RANGES = [
    *[('train.py', name, [0, 10**9], [-1, math.inf, math.nan]) for name in (
        'max_iters', 'warmup_iters', 'lr_decay_iters', 'cooldown_iters', 'eval_interval',
        'log_interval', 'checkpoint_interval', 'max_skipped_steps', 'early_stopping',
        'learning_rate', 'min_lr', 'muon_lr', 'weight_decay', 'grad_clip')],
    *[('train.py', name, [1], [0, -4]) for name in (
        'batch_size', 'block_size', 'gradient_accumulation_steps')],
    *[('train.py', name, [0.0, 0.999], [-0.1, 1.0, 1.5]) for name in (
        'dropout', 'beta1', 'beta2')],
    ('train.py', 'eval_iters', [1, -1], [0, -2]),
    ('train.py', 'seed', [0, 2**63 - 1], [-1, 2**63]),
    ('train.py', 'backend', ['nccl'], ['mpi']),
    ('sample.py', 'temperature', [0.0], [-1.0, math.inf]),
    ('sample.py', 'top_k', [0], [-1]),
    ('sample.py', 'top_p', [0.01, 1.0], [0.0, 1.5]),
    ('sample.py', 'min_p', [0.0, 1.0], [-0.1, 1.5]),
    ('sample.py', 'num_samples', [1], [0]),
    ('sample.py', 'max_new_tokens', [0], [-1]),
    ('sample.py', 'past_block', ['half'], ['roll']),
    ('sample.py', 'quantize', [''], ['int4']),
    ('sample.py', 'seed', [0], [-1]),
    ('bench.py', 'mode', ['step', 'sample', 'estimate'], ['fast']),
    *[('bench.py', name, [1], [0]) for name in (
        'max_new_tokens', 'batch_size', 'gradient_accumulation_steps', 'max_iters', 'processes')],
    ('bench.py', 'muon_lr', [0.0], [-0.1]),
    ('bench.py', 'seed', [0], [-1]),
]


@pytest.mark.parametrize('script, name, valid, invalid', RANGES)
def test_range(script, name, valid, invalid):
    for value in valid:
        others = {}
        if name in ('min_lr', 'lr_decay_iters', 'warmup_iters', 'cooldown_iters'):
            others['decay_lr'] = False  # the schedule does not matter here
        if name == 'learning_rate':
            others['min_lr'] = 0.0
        check(script, **{name: value, **others})
    for value in invalid:
        with refused(f'{name}={value!r}'):
            check(script, **{name: value})

# -----------------------------------------------------------------------------
# settings that do not fit together, or not this machine


@pytest.fixture
def machine(monkeypatch):
    """ A machine with four GPUs, on which everything can be compiled but for MPS. """
    missing = {'cpu': '', 'cuda': '', 'mps': 'a C++ compiler'}
    monkeypatch.setattr(settings_module, 'missing_for_compile', missing.get)
    monkeypatch.setattr(settings_module, 'find_spec', lambda name: None)
    monkeypatch.setattr(settings_module, 'has_fbgemm', 'cpu'.__eq__)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '5')


COOLDOWN = dict(warmup_iters=2, lr_decay_iters=20)
TWO_PROCESSES = dict(ddp=True, world_size=2)
FSDP = dict(fsdp=True, gradient_accumulation_steps=4, **TWO_PROCESSES)
CUDA_GRAPHS = dict(compile='reduce-overhead', device='cuda', gradient_accumulation_steps=1)
MPS_DROPOUT = dict(device_type='mps', activation_checkpointing=True)
TRAIN, SAMPLE, BENCH = 'train.py', 'sample.py', 'bench.py'


@pytest.mark.parametrize('script, valid, change, words', [
    (TRAIN, dict(learning_rate=0.1, min_lr=0.1), dict(min_lr=1.0), 'min_lr=1.0 learning_rate=0.1'),
    (TRAIN, dict(learning_rate=0.1, min_lr=1.0, decay_lr=False), dict(decay_lr=True), 'min_lr=1.0'),
    (TRAIN, dict(COOLDOWN, cooldown_iters=18), dict(cooldown_iters=19),
     'cooldown_iters=19 warmup_iters=2 lr_decay_iters=20'),
    (TRAIN, dict(warmup_iters=30, lr_decay_iters=20), dict(cooldown_iters=1), 'cooldown_iters=1'),
    (TRAIN, dict(muon_lr=0.02, min_lr=0.0), dict(learning_rate=0.0), 'muon_lr learning_rate'),
    (TRAIN, dict(early_stopping=3), dict(eval_interval=0), 'early_stopping=3 --eval_interval'),
    (TRAIN, dict(eval_split='test', eval_only=True), dict(eval_only=False),
     "eval_split='test' --eval_only=True"),
    (TRAIN, dict(TWO_PROCESSES, gradient_accumulation_steps=3), dict(gradient_accumulation_steps=1),
     'gradient_accumulation_steps=1 processes, 2'),
    (TRAIN, dict(TWO_PROCESSES), dict(device_type='mps'), '--device=cpu'),
    (TRAIN, dict(world_size=5), dict(device_type='cuda'), '5 processes --nproc_per_node=4'),
    (TRAIN, FSDP, dict(ddp=False), 'fsdp=True torchrun'),
    (TRAIN, dict(FSDP, dtype='bfloat16'), dict(dtype='float16'), 'dtype=float16 --dtype=bfloat16'),
    (TRAIN, FSDP, dict(gradient_accumulation_steps=3), 'gradient_accumulation_steps=3 multiple 2'),
    (TRAIN, MPS_DROPOUT, dict(dropout=0.1), 'activation_checkpointing=True dropout=0.1 MPS'),
    (TRAIN, {}, dict(wandb_log=True), 'wandb_log=True pip install'),
    (TRAIN, dict(compile=True), dict(device='mps'), 'compile=True C++ --compile=False'),
    (TRAIN, CUDA_GRAPHS, dict(device='cpu'), 'compile=reduce-overhead CUDA device=cpu'),
    (TRAIN, CUDA_GRAPHS, dict(gradient_accumulation_steps=2), 'reduce-overhead --compile=True'),
    (TRAIN, CUDA_GRAPHS, dict(ddp=True), 'reduce-overhead --compile=True'),
    (SAMPLE, dict(compile=True, device='cuda'), dict(compile='reduce-overhead'), '--compile=True'),
    (SAMPLE, dict(quantize='int8'), dict(device='cuda'), "quantize='int8' cuda"),
    (SAMPLE, dict(quantize='int8'), dict(compile=True), "quantize='int8' --compile=False"),
    (SAMPLE, dict(interactive=True), dict(start='the'), 'interactive=True --start'),
    (SAMPLE, dict(out='samples.jsonl'), dict(out='nowhere/samples.jsonl'), 'out=nowhere/'),
    (BENCH, dict(fsdp=True), dict(mode='estimate'), 'fsdp=True --processes=N'),
    (BENCH, dict(mode='estimate', processes=40), dict(processes=41),
     'gradient_accumulation_steps=40 processes, 41'),
])
def test_settings_that_do_not_fit(tmp_path, monkeypatch, machine, script, valid, change, words):
    monkeypatch.chdir(tmp_path)
    check(script, **valid)
    with refused(*words.split()):
        check(script, **{**valid, **change})


def test_processes_that_see_a_gpu_each(machine, monkeypatch):
    """ As launchers set CUDA_VISIBLE_DEVICES for each process. """
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    check('train.py', device_type='cuda', ddp=True, world_size=5)

# -----------------------------------------------------------------------------
# the configuration of a model


def test_model_config():
    assert model_config(n_layer=3, gelu='tanh') == GPTConfig(n_layer=3, gelu='tanh')
    with refused('n_head=5'):
        model_config(n_embd=16, n_head=5)
    with pytest.raises(TypeError):  # a bug
        model_config(n_layers=3)


def test_new_model_config():
    settings = dict(n_layer=3, n_head=2, n_embd=8, dropout=0.1, rotary=True, learning_rate=0.1)
    expected = GPTConfig(vocab_size=65, n_layer=3, n_head=2, n_embd=8, dropout=0.1, rotary=True)
    assert new_model_config(settings, vocab_size=65) == expected
    defaults = default_settings('train.py')
    assert new_model_config(defaults, vocab_size=50304) == GPTConfig(bias=False)

# -----------------------------------------------------------------------------
# a model and its dataset

GPT2 = {'kind': 'gpt2'}
AB = {'kind': 'char', 'itos': ['a', 'b']}
ABC = {'kind': 'char', 'itos': ['a', 'b', 'c']}
ABCD = {'kind': 'char', 'itos': ['a', 'b', 'c', 'd']}
ACB = {'kind': 'char', 'itos': ['a', 'c', 'b']}


def fit(model_args, spec=ABC, checkpoint=None, location=('checkpoint', 'out/ckpt.pt'),
        ids=(0, 1, 2)):
    """ Applies the rules to a model and a dataset `words` with the token ids `ids`. """
    model = SimpleNamespace(config=GPTConfig(**{'block_size': 16, **model_args}))
    data = {'train': np.array(ids, np.uint16), 'val': np.array([0], np.uint16)}
    vocab_size = 50304 if spec == GPT2 else 3
    settings = dict(dataset='words', block_size=16)
    check_fit(model, ModelLocation(*location), checkpoint, data, vocab_size, spec, settings)


@pytest.mark.parametrize('arguments', [
    dict(model_args=dict(vocab_size=3)),
    dict(model_args=dict(vocab_size=64, block_size=32)),
    dict(model_args=dict(vocab_size=50257), spec=GPT2),
    dict(model_args=dict(vocab_size=3), checkpoint={}),  # nanoGPT's
    dict(model_args=dict(vocab_size=3), checkpoint={'tokenizer': None}),
    dict(model_args=dict(vocab_size=3), checkpoint={'tokenizer': ABC}),
    dict(model_args=dict(vocab_size=4), checkpoint={'tokenizer': ABCD}),
    dict(model_args=dict(vocab_size=50257), spec=GPT2, location=('huggingface', 'gpt2-xl')),
    dict(model_args=dict(vocab_size=3), location=('scratch', 'scratch')),
])
def test_model_fits_its_dataset(arguments):
    fit(**arguments)


@pytest.mark.parametrize('arguments, words', [
    (dict(model_args=dict(vocab_size=2), ids=[0]), 'out/ckpt.pt vocabulary 2 dataset=words 3'),
    (dict(model_args=dict(vocab_size=50257), spec=GPT2, ids=[7, 50299]), '50257 50300'),
    (dict(model_args=dict(vocab_size=3, block_size=8)), 'block_size=16 out/ckpt.pt --block_size=8'),
    (dict(model_args=dict(vocab_size=3), checkpoint={'tokenizer': ACB}),
     'dataset=words out/ckpt.pt --tokenizer=out/ckpt.pt'),
    (dict(model_args=dict(vocab_size=3), checkpoint={'tokenizer': AB}), '--tokenizer=out/ckpt.pt'),
    (dict(model_args=dict(vocab_size=3), checkpoint={'tokenizer': ACB},
          location=('resume', 'my run/ckpt.pt')), "--tokenizer='my run/ckpt.pt'"),
    (dict(model_args=dict(vocab_size=50304), checkpoint={'tokenizer': GPT2}),
     'dataset=words out/ckpt.pt --tokenizer=gpt2'),
    (dict(model_args=dict(vocab_size=50257), location=('huggingface', 'gpt2')),
     'dataset=words gpt2; --tokenizer=gpt2'),
])
def test_model_does_not_fit_its_dataset(arguments, words):
    with refused(*words.split()):
        fit(**arguments)


@pytest.mark.parametrize('meta, vocab_size, words', [
    pytest.param({'vocab_size': 3, 'itos': ['a', 'b', 'c']}, 3, None, id='the same tokens'),
    pytest.param({'vocab_size': 3, 'itos': ['c', 'b', 'a']}, 3, 'dataset=words', id='other tokens'),
    pytest.param({'vocab_size': 3}, 3, None, id='unknown tokens'),
    pytest.param(None, 3, None, id='the dataset is gone'),
    pytest.param(None, 50304, 'dataset=words --tokenizer=gpt2', id='GPT-2'),
])
def test_tokens_of_a_checkpoint_of_nanogpt(tmp_path, meta, vocab_size, words):
    """ They are those of its dataset. """
    if meta is not None:
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    checkpoint = {'config': {'dataset': str(tmp_path)}}
    arguments = dict(model_args=dict(vocab_size=vocab_size), checkpoint=checkpoint)
    if words is None:
        fit(**arguments)
        return
    with refused(*words.split()):
        fit(**arguments)


@pytest.mark.parametrize('files, vocab_size, spec, words', [
    pytest.param({'vocab.txt': 'a\nb\nc'}, 3, ABC, None, id='the same tokens'),
    pytest.param({'vocab.txt': 'a\nc\nb'}, 3, ABC, 'dataset=words --tokenizer=', id='other tokens'),
    pytest.param({'vocab.txt': 'a\nb\nc'}, 50257, GPT2, 'dataset=words --tokenizer=', id='GPT-2'),
    pytest.param({}, 50304, ABC, 'dataset=words --tokenizer=gpt2', id="GPT-2's vocabulary"),
    pytest.param({}, 3, ABC, None, id='unknown tokens'),
    pytest.param({}, 300, ABC, '300 dataset=words', id='others'),
    pytest.param({'spiece.model': ''}, 3, ABC, 'no tokenizer', id='damaged'),
])
def test_tokens_of_a_directory(tmp_path, files, vocab_size, spec, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    arguments = dict(model_args=dict(vocab_size=vocab_size), spec=spec,
                     location=('huggingface', str(tmp_path)))
    if words is None:
        fit(**arguments)
        return
    with refused(*words.split()):
        fit(**arguments)

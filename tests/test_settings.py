""" components/settings.py: the rules for the settings of the scripts. """
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from components import settings as settings_module
from components.errors import UserError
from components.pretrained import ModelSource
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
    """ The settings of a script at their defaults, with device, dtype and compile selected. """
    source, _, _ = (ROOT / script).read_text().partition('\nexec(')
    names = {}
    exec(source, names)
    defaults = {name: value for name, value in names.items()
                if type(value) in (int, float, bool, str) and not name.startswith('_')}
    return {**defaults, 'device': 'cpu', 'dtype': 'float32', 'compile': False}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """ check(name=value, ...) applies the rules for train.py to its defaults with this change. """
    monkeypatch.chdir(tmp_path)

    def apply(device_type='cpu', ddp=False, world_size=1, local_world_size=1, is_master=True,
              **changes):
        settings = {**default_settings('train.py'), 'backend': 'gloo', **changes}
        check_train(settings, device_type, ddp, world_size, local_world_size, is_master)
    return apply


def refused(*words):
    """ Expects a UserError whose message has these words, in this order. """
    pattern = '.*'.join(re.escape(word) for word in words)
    return pytest.raises(UserError, match=pattern)

# -----------------------------------------------------------------------------
# train.py: values out of range

def test_defaults_of_train(check):
    check()


@pytest.mark.parametrize('name, value', [
    ('batch_size', 0),
    ('batch_size', -4),
    ('block_size', 0),
    ('block_size', -1),
    ('gradient_accumulation_steps', 0),
    ('dropout', 1.0),
    ('dropout', -0.1),
    ('learning_rate', -1.0),
    ('learning_rate', float('inf')),
    ('learning_rate', float('nan')),
    ('min_lr', -1.0),
    ('min_lr', float('nan')),
    ('muon_lr', -0.1),
    ('weight_decay', -0.1),
    ('beta1', 1.0),
    ('beta1', -0.5),
    ('beta2', 1.5),
    ('grad_clip', -1.0),
    ('max_iters', -1),
    ('warmup_iters', -1),
    ('lr_decay_iters', -5),
    ('cooldown_iters', -1),
    ('eval_iters', 0),
    ('eval_iters', -2),
    ('eval_interval', -1),
    ('log_interval', -1),
    ('checkpoint_interval', -1),
    ('max_bad_steps', -1),
    ('early_stopping', -1),
    ('ema_decay', 1.0),
    ('ema_decay', -0.1),
    ('seed', -1),
    ('seed', 2**63),
])
def test_value_out_of_range(check, name, value):
    with refused(f'{name}={value}'):
        check(**{name: value})


@pytest.mark.parametrize('name, value', [
    ('dropout', 0.0),
    ('beta1', 0.0),
    ('muon_lr', 0.0),
    ('weight_decay', 0.0),
    ('grad_clip', 0.0),
    ('max_iters', 0),
    ('warmup_iters', 0),
    ('cooldown_iters', 0),
    ('eval_iters', -1),
    ('eval_interval', 0),
    ('log_interval', 0),
    ('checkpoint_interval', 0),
    ('max_bad_steps', 0),
    ('early_stopping', 0),
    ('ema_decay', 0.0),
    ('seed', 2**63 - 1),
    ('batch_size', 1),
    ('block_size', 1),
    ('gradient_accumulation_steps', 1),
])
def test_value_at_its_limit(check, name, value):
    check(**{name: value})


def test_batch_that_no_memory_holds(check):
    with refused('batch_size=1000000000', 'out of memory', 'lower batch_size'):
        check(batch_size=10**9)

# -----------------------------------------------------------------------------
# train.py: values that do not fit together

def test_min_lr_above_learning_rate(check):
    with refused('min_lr=1.0', 'learning_rate=0.1'):
        check(min_lr=1.0, learning_rate=0.1)


def test_min_lr_without_decay(check):
    check(min_lr=1.0, learning_rate=0.1, decay_lr=False)


def test_cooldown_begins_during_warmup(check):
    with refused('cooldown_iters=19', 'warmup_iters=2', 'lr_decay_iters=20'):
        check(cooldown_iters=19, warmup_iters=2, lr_decay_iters=20)


def test_cooldown_right_after_warmup(check):
    check(cooldown_iters=18, warmup_iters=2, lr_decay_iters=20)


def test_warmup_longer_than_the_schedule_without_cooldown(check):
    check(warmup_iters=30, lr_decay_iters=20)


def test_muon_without_a_learning_rate_for_adamw(check):
    with refused('muon_lr requires a learning_rate above 0'):
        check(muon_lr=0.02, learning_rate=0.0, min_lr=0.0)


def test_early_stopping_requires_evaluations(check):
    with refused('early_stopping=3 requires evaluations; set --eval_interval'):
        check(early_stopping=3, eval_interval=0)
    check(early_stopping=3, eval_interval=0, eval_only=True)


def test_fewer_micro_batches_than_processes(check):
    with refused('gradient_accumulation_steps=1', 'processes, 2'):
        check(gradient_accumulation_steps=1, ddp=True, world_size=2, local_world_size=2)


def test_uneven_number_of_micro_batches(check):
    check(gradient_accumulation_steps=3, ddp=True, world_size=2, local_world_size=2)


def test_training_with_another_eval_split(check):
    with refused("eval_split='test'", '--eval_only=True'):
        check(eval_split='test')


def test_evaluation_of_another_split(check):
    check(eval_split='test', eval_only=True)

# -----------------------------------------------------------------------------
# train.py: what this machine lacks

def test_compile_without_a_compiler(check, monkeypatch):
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': 'a C++ compiler'}.get)
    check(compile=False)
    with refused('compile=True', 'a C++ compiler', '--compile=False'):
        check(compile=True)


SHARDED = dict(fsdp=True, ddp=True, world_size=2, gradient_accumulation_steps=4)


def test_fsdp(check):
    check(**SHARDED)
    check(**SHARDED, dtype='bfloat16')


@pytest.mark.parametrize('change, words', [
    (dict(ddp=False), ['several processes', 'torchrun']),
    (dict(dtype='float16'), ['dtype=float16', '--dtype=bfloat16']),
    (dict(gradient_accumulation_steps=3), ['gradient_accumulation_steps=3', 'multiple', '2']),
], ids=repr)
def test_fsdp_that_is_unsupported(check, change, words):
    with refused('fsdp=True', *words):
        check(**{**SHARDED, **change})


def test_activation_checkpointing_with_dropout_on_mps(check):
    check(activation_checkpointing=True, device_type='mps')
    with refused('activation_checkpointing=True', 'dropout=0.1', 'MPS'):
        check(activation_checkpointing=True, device_type='mps', dropout=0.1)


def test_out_dir_of_another_machine(check, tmp_path):
    (tmp_path / 'out').write_text('a file')
    check(is_master=False)
    with refused('out_dir=out is a file'):
        check()


@pytest.fixture
def gpu(monkeypatch):
    """ Pretends that there is a GPU, with all that torch.compile requires. """
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': '', 'cuda': ''}.get)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    return dict(compile='reduce-overhead', device='cuda', device_type='cuda',
                gradient_accumulation_steps=1)


def test_cuda_graphs(check, gpu):
    check(**gpu)


def test_cuda_graphs_require_cuda(check, gpu):
    with refused('compile=reduce-overhead requires CUDA', 'device=cpu'):
        check(**{**gpu, 'device': 'cpu', 'device_type': 'cpu'})


@pytest.mark.parametrize('change', [dict(gradient_accumulation_steps=2), dict(ddp=True)], ids=repr)
def test_cuda_graphs_require_one_micro_batch(check, gpu, change):
    with refused('compile=reduce-overhead requires gradient_accumulation_steps=1'):
        check(**{**gpu, **change})


def test_cuda_graphs_are_no_choice_of_sample(gpu):
    with refused('compile=reduce-overhead is for training'):
        apply_check_sample(compile='reduce-overhead', device='cuda')


def test_compile_with_a_compiler(check, monkeypatch):
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    check(compile=True)


def test_unknown_backend(check):
    with refused("backend='mpi'", "'auto'", "'nccl'", "'gloo'"):
        check(backend='mpi')


def test_nccl_on_a_cpu(check):
    with refused("backend='nccl'", 'cpu', '--backend=auto'):
        check(backend='nccl', ddp=True)


def test_nccl_does_not_matter_in_one_process(check):
    check(backend='nccl')


def test_several_processes_on_an_apple_gpu(check):
    with refused('Apple GPU', '--device=cpu'):
        check(device_type='mps', ddp=True)


def test_more_processes_than_gpus(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    check(device_type='cuda', ddp=True, world_size=4, local_world_size=2)
    with refused('3 processes', '2 GPUs'):
        check(device_type='cuda', ddp=True, world_size=6, local_world_size=3)


def test_processes_that_see_a_gpu_each(check, monkeypatch):
    """ As launchers set CUDA_VISIBLE_DEVICES for each process. """
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    check(device_type='cuda', ddp=True, world_size=4, local_world_size=4)


def test_wandb_is_not_installed(check, monkeypatch):
    monkeypatch.setattr(settings_module, 'find_spec', lambda name: None)
    check(wandb_log=False)
    with refused('wandb_log=True', 'pip install wandb'):
        check(wandb_log=True)

# -----------------------------------------------------------------------------
# train.py: out_dir

def test_out_dir_without_a_name(check):
    with refused("out_dir=''", '--out_dir=out'):
        check(out_dir='')


def test_out_dir_that_does_not_exist(check):
    check(out_dir='a/b')


def test_out_dir_that_is_a_file(check, tmp_path):
    (tmp_path / 'file').touch()
    with refused('out_dir=file is a file'):
        check(out_dir='file')


def test_out_dir_that_is_not_writable(check, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_module.os, 'access', lambda path, mode: False)
    check(out_dir=str(tmp_path), eval_only=True)
    with refused('out_dir=', 'not writable'):
        check(out_dir=str(tmp_path))

# -----------------------------------------------------------------------------
# the configuration of a model

def test_model_config():
    assert model_config(n_layer=3, gelu='tanh') == GPTConfig(n_layer=3, gelu='tanh')


def test_invalid_model_config():
    with refused('n_head=5'):
        model_config(n_embd=16, n_head=5)


def test_unknown_field_is_a_bug():
    with pytest.raises(TypeError):
        model_config(n_layers=3)


def test_new_model_config():
    settings = dict(n_layer=3, n_head=2, n_embd=8, dropout=0.1, rotary=True, learning_rate=0.1)
    expected = GPTConfig(vocab_size=65, n_layer=3, n_head=2, n_embd=8, dropout=0.1, rotary=True)
    assert new_model_config(settings, vocab_size=65) == expected


def test_default_model_of_train_is_gpt2():
    config = new_model_config(default_settings('train.py'), vocab_size=50304)
    assert config == GPTConfig(bias=False)

# -----------------------------------------------------------------------------
# check_fit

CHARACTERS = {'vocab_size': 3, 'itos': ['a', 'b', 'c']}


def fit(model_args, meta=CHARACTERS, checkpoint=None, source=('checkpoint', 'out/ckpt.pt'),
        ids=(0, 1, 2), block_size=16):
    """ Applies the rules to a model and a dataset `words` with the token ids `ids`. """
    model = SimpleNamespace(config=GPTConfig(**model_args))
    data = {'train': np.array(ids, np.uint16), 'val': np.array([0], np.uint16)}
    settings = dict(dataset='words', block_size=block_size)
    check_fit(model, ModelSource(*source), checkpoint, data, meta, settings)


def test_model_fits_its_dataset():
    fit(dict(vocab_size=3, block_size=16))


def test_padded_vocabulary_fits():
    fit(dict(vocab_size=64, block_size=16))


def test_vocabulary_smaller_than_that_of_the_dataset():
    with refused('out/ckpt.pt has a vocabulary of 2', 'dataset=words needs 3'):
        fit(dict(vocab_size=2, block_size=16), ids=[0])


def test_vocabulary_smaller_than_a_token():
    with refused('vocabulary of 50257', 'dataset=words needs 50300'):
        fit(dict(vocab_size=50257, block_size=16), meta=None, ids=[7, 50299])


def test_block_size_of_a_longer_context():
    fit(dict(vocab_size=3, block_size=32))


def test_block_size_of_a_shorter_context():
    with refused('block_size=16', 'the 8 of out/ckpt.pt', '--block_size=8'):
        fit(dict(vocab_size=3, block_size=8))


def test_checkpoint_of_the_same_vocabulary():
    checkpoint = {'tokenizer': {'kind': 'char', 'itos': ['a', 'b', 'c']}}
    fit(dict(vocab_size=3, block_size=16), checkpoint=checkpoint)


@pytest.mark.parametrize('tokenizer', [
    pytest.param({'kind': 'char', 'itos': ['a', 'c', 'b']}, id='other order'),
    pytest.param({'kind': 'gpt2'}, id='other kind'),
])
def test_checkpoint_of_another_vocabulary(tokenizer):
    with refused('vocabulary of out/ckpt.pt differs', 'dataset=words'):
        fit(dict(vocab_size=50304, block_size=16), checkpoint={'tokenizer': tokenizer})


@pytest.mark.parametrize('checkpoint', [
    pytest.param({}, id='nanoGPT'),
    pytest.param({'tokenizer': None}, id='unknown tokenizer'),
])
def test_checkpoint_without_a_tokenizer(checkpoint):
    fit(dict(vocab_size=3, block_size=16), checkpoint=checkpoint)


@pytest.fixture
def hf_directory(tmp_path):
    """ A directory with the tokenizer of a Hugging Face model: a, b -> its name, its record. """
    tokenizers = pytest.importorskip('tokenizers')
    vocabulary = {'a': 0, 'b': 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='a'))
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(tmp_path), {'kind': 'hf', 'json': tokenizer.to_str(), 'end': None}


@pytest.mark.slow
def test_hugging_face_model_with_the_tokens_of_the_dataset(hf_directory):
    name, record = hf_directory
    meta = {'vocab_size': 2, 'tokenizer': record}
    fit(dict(vocab_size=2, block_size=16), source=('huggingface', name), meta=meta, ids=[0, 1])


@pytest.mark.slow
def test_hugging_face_model_with_other_tokens(hf_directory):
    name, _ = hf_directory
    with refused('dataset=words has other tokens', f'--tokenizer={name}'):
        fit(dict(vocab_size=3, block_size=16), source=('huggingface', name))


def test_new_model_beside_a_folder_called_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'scratch').mkdir()
    (tmp_path / 'scratch/tokenizer.json').write_text('{}')
    fit(dict(vocab_size=3, block_size=16), source=('scratch', 'scratch'))

# -----------------------------------------------------------------------------
# sample.py

def apply_check_sample(**changes):
    check_sample({**default_settings('sample.py'), **changes})


def test_defaults_of_sample():
    apply_check_sample()


@pytest.mark.parametrize('name, value', [
    ('temperature', -1.0),
    ('temperature', float('inf')),
    ('top_k', -1),
    ('top_p', 0.0),
    ('top_p', 1.5),
    ('min_p', -0.1),
    ('min_p', 1.5),
    ('repetition_penalty', 0.0),
    ('repetition_penalty', float('inf')),
    ('num_samples', 0),
    ('max_new_tokens', -1),
    ('seed', -1),
])
def test_sample_value_out_of_range(name, value):
    with refused(f'{name}={value}'):
        apply_check_sample(**{name: value})


@pytest.mark.parametrize('name, value', [('past_block', 'roll'), ('quantize', 'int4')])
def test_unknown_choice_of_sample(name, value):
    with refused(f'{name}={value!r} must be'):
        apply_check_sample(**{name: value})


@pytest.mark.parametrize('name, value', [
    ('temperature', 0.0),
    ('top_k', 0),
    ('top_p', 0.01),
    ('min_p', 1.0),
    ('repetition_penalty', 0.5),
    ('max_new_tokens', 0),
    ('past_block', 'half'),
])
def test_sample_value_at_its_limit(name, value):
    apply_check_sample(**{name: value})


def test_interactive_with_a_prompt():
    with refused('interactive=True', '--start'):
        apply_check_sample(interactive=True, start='the')


def test_int8_on_a_machine_without_it(monkeypatch):
    monkeypatch.setattr(settings_module, 'has_fbgemm', lambda device_type: device_type == 'cpu')
    apply_check_sample(quantize='int8', device='cpu')
    with refused("quantize='int8'", 'cuda:1'):
        apply_check_sample(quantize='int8', device='cuda:1')


def test_int8_is_not_compiled(monkeypatch):
    monkeypatch.setattr(settings_module, 'has_fbgemm', lambda device_type: True)
    monkeypatch.setattr(settings_module, 'missing_for_compile', lambda device_type: '')
    apply_check_sample(quantize='int8')
    apply_check_sample(compile=True)
    with refused("quantize='int8'", '--compile=False'):
        apply_check_sample(quantize='int8', compile=True)


def test_samples_into_a_missing_folder():
    with refused('out=nowhere/samples.jsonl', 'folder is missing'):
        apply_check_sample(out='nowhere/samples.jsonl')


def test_samples_into_a_folder(tmp_path):
    with refused(f'out={tmp_path} is not a file'):
        apply_check_sample(out=str(tmp_path))


def test_samples_into_a_file(tmp_path):
    (tmp_path / 'old.jsonl').touch()
    apply_check_sample(out=str(tmp_path / 'old.jsonl'))
    apply_check_sample(out=str(tmp_path / 'new.jsonl'))

# -----------------------------------------------------------------------------
# bench.py

def test_defaults_of_bench():
    check_bench(default_settings('bench.py'))


@pytest.mark.parametrize('mode', ['step', 'sample', 'estimate'])
def test_modes_of_bench(mode):
    check_bench({**default_settings('bench.py'), 'mode': mode})


@pytest.mark.parametrize('name, value', [
    ('mode', 'fast'),
    ('max_new_tokens', 0),
    ('batch_size', 0),
    ('gradient_accumulation_steps', 0),
    ('max_iters', 0),
    ('seed', -1),
    ('processes', 0),
])
def test_bench_value_out_of_range(name, value):
    with refused(f'{name}={value!r}'):
        check_bench({**default_settings('bench.py'), name: value})


@pytest.mark.parametrize('settings, message', [
    (dict(fsdp=True), 'fsdp=True requires several processes; set --processes=N'),
    (dict(processes=41), 'gradient_accumulation_steps=40 is less than the number of processes'),
    (dict(fsdp=True, processes=3), 'gradient_accumulation_steps=40 to be a multiple'),
    (dict(fsdp=True, processes=4, dtype='float16'), 'dtype=float16 is unsupported'),
])
def test_processes_of_an_estimate(settings, message):
    """ The rules of train.py; the other modes ignore these settings, which a config may have. """
    settings = {**default_settings('bench.py'), **settings}
    check_bench({**settings, 'mode': 'step'})
    with refused(message):
        check_bench({**settings, 'mode': 'estimate'})

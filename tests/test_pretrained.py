""" What init_from names, and the model and the tokenizer that it stands for. """
import os
import pickle

import pytest
import torch
import transformers
from conftest import SMALL, run, train

from components.checkpoint import save_checkpoint
from components.distributed import Job
from components.errors import UserError
from components.huggingface import GPT2_NAMES
from components.pretrained import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer_record,
    resolve_init_from,
)
from model import GPT, GPTConfig

CHARACTERS = {'kind': 'char', 'itos': [chr(97 + i) for i in range(26)]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """ An empty working directory. """
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hf_directory(here):
    """ The directory `hf` with a small GPT-2 and no tokenizer. """
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    hf_model = transformers.GPT2LMHeadModel(config)
    for p in hf_model.parameters():
        torch.nn.init.normal_(p, std=1.0)  # far from 0, where the two forms of GELU differ
    hf_model.save_pretrained('hf')
    return 'hf'


def save(path, model, **fields):
    """ Writes a checkpoint of `model` without optimizers -> its source. """
    save_checkpoint(path, model, {}, **fields)
    return ModelSource('checkpoint', str(path))


# -----------------------------------------------------------------------------
# find_model

@pytest.mark.parametrize('init_from, kind', [
    ('scratch', 'scratch'),
    ('weights', 'checkpoint'),  # a file that exists
    ('missing.pt', 'checkpoint'),
    ('gpt2-xl', 'huggingface'),
    ('folder', 'huggingface'),
    ('namespace/name', 'huggingface'),
    ('missing', 'huggingface'),
])
def test_kinds_of_sources(here, init_from, kind):
    (here / 'weights').write_text('')
    (here / 'folder').mkdir()
    assert find_model(init_from, out_dir='out') == ModelSource(kind, init_from)


@pytest.mark.parametrize('name', GPT2_NAMES)
def test_gpt2_is_not_a_file_of_that_name(here, name):
    (here / name).write_text('')
    assert find_model(name, out_dir='out').kind == 'huggingface'


@pytest.mark.parametrize('best, name', [(True, 'ckpt.pt'), (False, 'ckpt_last.pt')])
def test_resume_from_the_best_or_the_latest(here, tiny, best, name):
    (here / 'out').mkdir()
    save('out/ckpt.pt', tiny, iter_num=10, run_id='a')
    save('out/ckpt_last.pt', tiny, iter_num=20, run_id='a')
    assert find_model('resume', 'out', best) == ModelSource('resume', f'out/{name}')


def test_resume_without_a_checkpoint(here):
    source = find_model('resume', 'out')
    assert source == ModelSource('resume', 'out/ckpt.pt')
    with pytest.raises(UserError, match='out/ckpt.pt'):
        load_model(source)


# -----------------------------------------------------------------------------
# resolve_init_from

@pytest.mark.parametrize('init_from', ['scratch', 'resume', 'gpt2', 'out/ckpt.pt'])
def test_only_auto_is_resolved(here, tiny, init_from):
    (here / 'out').mkdir()
    save('out/ckpt.pt', tiny, job='a')
    assert resolve_init_from(init_from, 'out', False, Job('a', restarted=False)) == init_from


def test_auto_resumes_where_there_is_a_checkpoint(here, tiny):
    assert resolve_init_from('auto', 'out', False, Job()) == 'scratch'
    (here / 'out').mkdir()
    save('out/ckpt_last.pt', tiny)
    assert resolve_init_from('auto', 'out', False, Job()) == 'resume'


def test_a_restarted_job_resumes_its_own_checkpoint(here, tiny):
    restarted = Job('a', restarted=True)
    assert resolve_init_from('gpt2', 'out', False, restarted) == 'gpt2'  # nothing is saved yet
    (here / 'out').mkdir()
    save('out/ckpt.pt', tiny, job='an earlier run')
    assert resolve_init_from('gpt2', 'out', False, restarted) == 'gpt2'
    save('out/ckpt.pt', tiny, job='a')
    assert resolve_init_from('gpt2', 'out', False, restarted) == 'resume'


# -----------------------------------------------------------------------------
# load_model

@pytest.mark.parametrize('kind', ['resume', 'checkpoint'])
def test_load_a_checkpoint(here, tiny, kind):
    save('ckpt.pt', tiny, iter_num=10)
    model, checkpoint = load_model(ModelSource(kind, 'ckpt.pt'))
    assert model.config == tiny.config
    assert checkpoint['iter_num'] == 10
    for loaded, saved in zip(model.parameters(), tiny.parameters(), strict=True):
        assert torch.equal(loaded, saved)


@pytest.mark.parametrize('mmap', [False, True])
def test_a_loaded_model_does_not_need_its_file(here, tiny, mmap):
    source = save('ckpt.pt', tiny)
    model, _ = load_model(source, mmap=mmap)
    (here / 'ckpt.pt').write_bytes(b'')
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx)[0], tiny(idx)[0])


def test_training_does_not_need_the_file_it_resumed_from(here, tiny):
    """ As it would if tensors were mapped: then a file that is truncated ends the process. """
    optimizers = {'optimizer': tiny.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')}
    idx = torch.arange(8)[None]
    tiny(idx, idx)[1].backward()
    optimizers['optimizer'].step()
    save_checkpoint('ckpt.pt', tiny, optimizers, iter_num=1)
    model, checkpoint = load_model(ModelSource('resume', 'ckpt.pt'))
    with open('ckpt.pt', 'rb+') as file:
        file.write(bytes(os.path.getsize('ckpt.pt')))
    for tensors in checkpoint['optimizer']['state'].values():
        assert tensors['step'] == 1
    for loaded, saved in zip(model.parameters(), tiny.parameters(), strict=True):
        assert torch.equal(loaded, saved)


def test_dropout_of_a_checkpoint(here):
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    source = save('ckpt.pt', model)
    kept, _ = load_model(source)
    assert kept.config.dropout == 0.1
    overridden, _ = load_model(source, dropout=0.0)
    assert overridden.config.dropout == 0.0


def test_dropout_of_a_hugging_face_model(hf_directory):
    source = find_model(hf_directory, out_dir='out')
    model, checkpoint = load_model(source, dropout=0.3)
    assert checkpoint is None
    assert model.config.dropout == model.transformer.h[0].attn.attn_dropout.p == 0.3
    model, _ = load_model(source)
    assert model.config.dropout == 0.0


def test_a_missing_file(here):
    with pytest.raises(UserError, match='nothing.pt'):
        load_model(find_model('nothing.pt', out_dir='out'))


def test_impossible_model_args(here, tiny):
    save('ckpt.pt', tiny)
    checkpoint = torch.load('ckpt.pt', weights_only=True)
    checkpoint['model_args']['n_head'] = 3
    torch.save(checkpoint, 'ckpt.pt')
    with pytest.raises(UserError, match='n_head=3'):
        load_model(ModelSource('checkpoint', 'ckpt.pt'))


def test_a_bug_in_the_model_keeps_its_traceback(here, tiny, monkeypatch):
    """ Only what a user can put right is a UserError. """
    source = save('ckpt.pt', tiny)

    def broken_init(self, config):
        raise ValueError('a bug')

    monkeypatch.setattr(GPT, '__init__', broken_init)
    with pytest.raises(ValueError, match='a bug'):
        load_model(source)


# -----------------------------------------------------------------------------
# load_tokenizer_record

def test_tokenizer_of_gpt2():
    source = ModelSource('huggingface', 'gpt2-medium')
    assert load_tokenizer_record(source, model=None, checkpoint=None) == {'kind': 'gpt2'}


def test_tokenizer_of_a_directory_without_one(hf_directory):
    source = ModelSource('huggingface', hf_directory)
    assert load_tokenizer_record(source, model=None, checkpoint=None) == {'kind': 'gpt2'}


def test_tokenizer_of_a_directory(here):
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({'cat': 0, '<end>': 1}))
    hf_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<end>')
    hf_tokenizer.save_pretrained('hf')
    record = load_tokenizer_record(ModelSource('huggingface', 'hf'), model=None, checkpoint=None)
    assert record['kind'] == 'hf'
    assert record['end'] == 1
    assert '"cat":0' in record['json'].replace(' ', '')


def test_tokenizer_of_a_checkpoint(tiny):
    checkpoint = {'tokenizer': CHARACTERS, 'config': {'dataset': 'gone'}}
    source = ModelSource('checkpoint', 'ckpt.pt')
    assert load_tokenizer_record(source, tiny, checkpoint) == CHARACTERS


def test_tokenizer_of_the_dataset(tiny, dataset):
    """ Checkpoints of nanoGPT have no tokenizer. """
    checkpoint = {'config': {'dataset': str(dataset)}}
    record = load_tokenizer_record(ModelSource('checkpoint', 'ckpt.pt'), tiny, checkpoint)
    assert record['kind'] == 'char'
    assert {'c', 'a', 't', '\n'} <= set(record['itos'])


@pytest.mark.parametrize('config', [{}, {'config': {}}, {'config': {'dataset': 'gone'}}])
def test_a_large_vocabulary_is_gpt2s(config):
    model = GPT(GPTConfig(block_size=2, vocab_size=50257, n_layer=1, n_head=1, n_embd=1))
    source = ModelSource('checkpoint', 'ckpt.pt')
    assert load_tokenizer_record(source, model, config) == {'kind': 'gpt2'}


@pytest.mark.parametrize('required', [True, False])
def test_the_dataset_is_gone(tiny, required):
    checkpoint = {'config': {'dataset': 'gone'}}
    with pytest.raises(UserError, match='vocabulary of 40 .*dataset=gone; run its prepare.py'):
        load_tokenizer_record(ModelSource('checkpoint', 'ckpt.pt'), tiny, checkpoint, required)


def test_only_the_vocabulary_size_is_known(tmp_path, tiny):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 40}))
    checkpoint = {'config': {'dataset': str(tmp_path)}}
    source = ModelSource('checkpoint', 'ckpt.pt')
    assert load_tokenizer_record(source, tiny, checkpoint, required=False) is None
    with pytest.raises(UserError, match='no tokenizer'):
        load_tokenizer_record(source, tiny, checkpoint)


# -----------------------------------------------------------------------------
# in the scripts

@pytest.mark.slow
def test_fine_tuning_gpt2_keeps_its_gelu(tmp_path, dataset, hf_directory):
    """ In a top-level key of the checkpoint: readers of the seven classic model_args ignore it. """
    _, before, out = train(tmp_path, dataset, init_from='hf', max_iters=3)
    assert 'starting from the weights of hf' in out
    saved = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert saved['gelu'] == 'tanh'
    assert 'gelu' not in saved['model_args']
    assert saved['model_args']['block_size'] == SMALL['block_size'] < 24
    assert saved['model_args']['vocab_size'] == 50
    _, after, _ = train(tmp_path, dataset, init_from='resume', max_iters=3)
    assert after == {3: before[3]}
    model, _ = load_model(find_model('resume', tmp_path / 'out'))
    assert model.config.gelu == 'tanh'


@pytest.mark.slow
def test_sampling_needs_the_tokenizer_of_the_dataset(tmp_path, tiny):
    (tmp_path / 'out').mkdir()
    save(tmp_path / 'out/ckpt.pt', tiny, config={'dataset': 'gone'})
    _, error = run('sample.py', cwd=tmp_path, code=1)
    assert 'meta.pkl of dataset=gone' in error
    assert error.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_unknown_models_get_one_line(tmp_path, dataset, script):
    settings = {}
    if script == 'train.py':
        settings = {**SMALL, 'dataset': dataset}
    _, error = run(script, cwd=tmp_path, code=1, **settings, init_from='nothing')
    assert "unknown model 'nothing'" in error
    assert error.count('\n') == 1

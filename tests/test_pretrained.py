""" What init_from names, and the model and the tokenizer that it stands for. """
import os
import pickle
import shutil
from functools import partial

import pytest
import torch
import transformers
from conftest import SMALL, save_checkpoint

from components.checkpoint import load_checkpoint
from components.distributed import Job
from components.errors import UserError
from components.pretrained import (
    ModelLocation,
    find_model,
    find_model_of_job,
    load_model,
    load_tokenizer_spec,
)
from model import GPT, GPTConfig

CHARACTERS = {'kind': 'char', 'itos': [chr(97 + i) for i in range(26)]}
CHECKPOINT = ModelLocation('checkpoint', 'ckpt.pt')


@pytest.fixture
def here(tmp_path, monkeypatch):
    """ A working directory with an empty folder `out`. """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
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

# -----------------------------------------------------------------------------
# find_model

@pytest.mark.parametrize('init_from, kind', [
    ('scratch', 'scratch'),
    ('weights', 'checkpoint'),  # a file that exists
    ('missing.pt', 'checkpoint'),
    ('gpt2-xl', 'huggingface'),
    ('gpt2', 'huggingface'),  # although there is a file of that name
    ('out', 'huggingface'),  # a folder
    ('namespace/name', 'huggingface'),
    ('missing', 'huggingface'),
])
def test_kinds_of_sources(here, init_from, kind):
    (here / 'weights').touch()
    (here / 'gpt2').touch()
    assert find_model(init_from, out_dir='out') == ModelLocation(kind, init_from)


def test_folder_of_a_run(here, tiny):
    save_checkpoint('out/ckpt.pt', tiny)
    save_checkpoint('out/ckpt_last.pt', tiny)
    assert find_model('out', out_dir='') == ModelLocation('checkpoint', 'out/ckpt.pt')


@pytest.mark.parametrize('eval_only, name', [(True, 'ckpt.pt'), (False, 'ckpt_last.pt')])
def test_resume_from_the_best_or_the_latest(here, tiny, eval_only, name):
    save_checkpoint('out/ckpt.pt', tiny)
    save_checkpoint('out/ckpt_last.pt', tiny)
    location = ModelLocation('resume', f'out/{name}')
    assert find_model('resume', 'out', best=eval_only) == location
    assert find_model_of_job('resume', 'out', eval_only, Job()) == location


@pytest.mark.parametrize('init_from, job, saved_job, kind', [
    ('auto', Job(), None, 'scratch'),  # nothing is saved yet
    ('auto', Job(), '', 'resume'),
    ('scratch', Job(), '', 'scratch'),
    ('resume', Job(), None, 'resume'),
    # torchrun has started the job a again, which continues if the checkpoint is its own
    ('gpt2', Job('a', restarted=True), None, 'huggingface'),
    ('gpt2', Job('a', restarted=True), 'b', 'huggingface'),
    ('gpt2', Job('a', restarted=True), 'a', 'resume'),
    ('gpt2', Job('a', restarted=False), 'a', 'huggingface'),
])
def test_model_of_a_job(here, tiny, init_from, job, saved_job, kind):
    if saved_job is not None:
        save_checkpoint('out/ckpt_last.pt', tiny, job=saved_job)
    assert find_model_of_job(init_from, 'out', False, job).kind == kind

# -----------------------------------------------------------------------------
# load_model

@pytest.mark.parametrize('kind', ['resume', 'checkpoint'])
@pytest.mark.parametrize('mmap', [False, True])
def test_a_loaded_model_does_not_need_its_file(here, tiny, kind, mmap):
    """ The file of a mapped tensor must not change. """
    save_checkpoint('ckpt.pt', tiny, iter_num=10)
    model, checkpoint = load_model(ModelLocation(kind, 'ckpt.pt'), mmap=mmap)
    with open('ckpt.pt', 'rb+') as file:
        file.write(bytes(os.path.getsize('ckpt.pt')))
    assert model.config == tiny.config
    assert checkpoint['iter_num'] == 10
    for loaded, saved in zip(model.parameters(), tiny.parameters(), strict=True):
        assert torch.equal(loaded, saved)
    if not mmap:
        expected = tiny.transformer.wte.weight
        assert torch.equal(checkpoint['model']['lm_head.weight'], expected)


@pytest.mark.parametrize('dropout, expected', [(None, 0.1), (0.0, 0.0)])
def test_dropout_of_a_checkpoint(here, dropout, expected):
    config = GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.1)
    save_checkpoint('ckpt.pt', GPT(config))
    model, _ = load_model(CHECKPOINT, dropout)
    assert model.config.dropout == expected


@pytest.mark.parametrize('dropout, expected', [(None, 0.0), (0.3, 0.3)])
def test_dropout_of_a_hugging_face_model(hf_directory, dropout, expected):
    model, checkpoint = load_model(find_model(hf_directory, out_dir='out'), dropout)
    assert checkpoint is None
    assert model.config.dropout == expected


def test_models_that_cannot_be_loaded(here, tiny):
    save_checkpoint('ckpt.pt', tiny)
    checkpoint = torch.load('ckpt.pt', weights_only=True)
    checkpoint['model_args']['n_head'] = 3
    torch.save(checkpoint, 'ckpt.pt')
    for init_from, message in [('resume', 'out/ckpt.pt'), ('nothing.pt', 'nothing.pt'),
                               ('nothing', 'nothing'), ('ckpt.pt', 'n_head=3')]:
        with pytest.raises(UserError, match=message):
            load_model(find_model(init_from, 'out'))


def test_a_bug_in_the_model_keeps_its_traceback(here, tiny, monkeypatch):
    """ Only what a user can put right is a UserError. """
    def broken_init(self, config):
        raise ValueError('a bug')

    save_checkpoint('ckpt.pt', tiny)
    monkeypatch.setattr(GPT, '__init__', broken_init)
    with pytest.raises(ValueError, match='a bug'):
        load_model(CHECKPOINT)


def test_fine_tuning_gpt2_keeps_its_gelu(trainer, hf_directory, tmp_path, dataset):
    """ In a key of its own: readers of nanoGPT's seven model_args ignore it. """
    ids = shutil.copytree(dataset, tmp_path / 'ids')
    (ids / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 12}))  # of unknown tokens
    trainer = partial(trainer, dataset=ids)
    val_loss = trainer(init_from='hf', max_iters=3)['val_loss']
    saved = torch.load('out/ckpt.pt', weights_only=True)
    assert saved['gelu'] == 'tanh'
    assert 'gelu' not in saved['model_args']
    assert saved['model_args']['block_size'] == SMALL['block_size'] < 24
    assert saved['model_args']['vocab_size'] == 50
    assert trainer(init_from='resume', max_iters=3)['val_loss'] == val_loss
    assert load_checkpoint('out/ckpt.pt')['model_args']['gelu'] == 'tanh'

# -----------------------------------------------------------------------------
# load_tokenizer_spec

def model_of(vocab_size):
    return GPT(GPTConfig(block_size=2, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=1))


@pytest.mark.parametrize('name, vocab_size', [('gpt2-medium', 50257), ('hf', 50257), ('hf', 50304)])
def test_tokenizer_of_gpt2(hf_directory, name, vocab_size):
    """ The directory has no tokenizer. """
    location = ModelLocation('huggingface', name)
    assert load_tokenizer_spec(location, model_of(vocab_size), None) == {'kind': 'gpt2'}


@pytest.mark.parametrize('vocab_size', [50, 50256, 60000])
def test_directory_without_a_tokenizer(hf_directory, vocab_size):
    location = ModelLocation('huggingface', hf_directory)
    assert load_tokenizer_spec(location, model_of(vocab_size), None, required=False) is None
    with pytest.raises(UserError, match=f'hf has a vocabulary of {vocab_size} and no tokenizer; '):
        load_tokenizer_spec(location, model_of(vocab_size), None)


def test_tokenizer_of_a_directory(here):
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({'cat': 0, '<end>': 1}))
    hf_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<end>')
    hf_tokenizer.save_pretrained('hf')
    spec = load_tokenizer_spec(ModelLocation('huggingface', 'hf'), model_of(2), None)
    assert (spec['kind'], spec['end']) == ('hf', 1)
    assert '"cat":0' in spec['json'].replace(' ', '')


def test_tokenizer_of_the_dataset(tiny, dataset):
    """ Checkpoints of nanoGPT have no tokenizer. """
    spec = load_tokenizer_spec(CHECKPOINT, tiny, {'config': {'dataset': str(dataset)}})
    assert spec['kind'] == 'char'
    assert {'c', 'a', 't', '\n'} <= set(spec['itos'])


@pytest.mark.parametrize('vocab_size, checkpoint, spec', [
    (26, {'tokenizer': CHARACTERS, 'config': {'dataset': 'gone'}}, CHARACTERS),
    (50257, {}, {'kind': 'gpt2'}),
    (50257, {'config': {}}, {'kind': 'gpt2'}),
    (50304, {'config': {'dataset': 'gone'}}, {'kind': 'gpt2'}),
], ids=str)
def test_tokenizer_of_a_checkpoint(vocab_size, checkpoint, spec):
    assert load_tokenizer_spec(CHECKPOINT, model_of(vocab_size), checkpoint) == spec


@pytest.mark.parametrize('required', [True, False])
def test_the_dataset_is_gone(tiny, required):
    checkpoint = {'config': {'dataset': 'gone'}}
    with pytest.raises(UserError, match='dataset=gone'):
        load_tokenizer_spec(CHECKPOINT, tiny, checkpoint, required)


def test_only_the_vocabulary_size_is_known(tmp_path, tiny):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 40}))
    checkpoint = {'config': {'dataset': str(tmp_path)}}
    assert load_tokenizer_spec(CHECKPOINT, tiny, checkpoint, required=False) is None
    with pytest.raises(UserError, match='no tokenizer'):
        load_tokenizer_spec(CHECKPOINT, tiny, checkpoint)

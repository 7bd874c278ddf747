""" Checkpoints exported as Hugging Face directories, read by transformers. """
import os
import pickle

import pytest
import torch
import transformers
from conftest import FAST_MODEL, SMALL, run, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import components.huggingface
from components.checkpoint import Progress, make_checkpoint
from components.pretrained import find_model, load_model
from components.tokenizer import get_tokenizer
from model import GPT, GPTConfig

CHARACTERS = {'kind': 'char', 'itos': list('\n .acehmnost')}
SETTINGS = {'dataset': 'words', 'learning_rate': 0.01}


@pytest.fixture
def save(tmp_path):
    """ save(...) writes out/ckpt.pt of a small GPT -> the GPT. """
    def write(tokenizer=CHARACTERS, config=SETTINGS, vocab_size=12, **args):
        torch.manual_seed(0)
        args = {'bias': False, **args}
        model = GPT(GPTConfig(
            block_size=16, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16, **args))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        (tmp_path / 'out').mkdir()
        progress = Progress(iter_num=20, best_val_loss=1.23456)
        scaler = torch.amp.GradScaler(enabled=False)
        fields = dict(tokenizer=tokenizer, config=config)
        checkpoint = make_checkpoint(progress, model, {}, scaler, fields)
        torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
        return model.eval()
    return write


@pytest.mark.parametrize('args, hf_class', [
    pytest.param({}, 'GPT2LMHeadModel', id='GPT-2'),
    pytest.param(dict(bias=True, gelu='tanh', vocab_size=64), 'GPT2LMHeadModel', id='padding'),
    pytest.param(dict(rope_base=200, **FAST_MODEL), 'NanoChatForCausalLM', id='nanochat'),
])
@torch.no_grad()
def test_an_export_computes_what_the_checkpoint_computes(
        tmp_path, save, script_globals, capsys, args, hf_class):
    """ Its logits, its tokens, and the text that both continue. """
    model = save(**args)
    script_globals('export.py')
    assert f'out/hf: {hf_class}, 12 tokens, with a tokenizer' in capsys.readouterr().out
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / 'out/hf')
    assert type(hf_model).__name__ == hf_class
    assert hf_model.dtype == torch.float32
    idx = torch.randint(12, (3, 16), generator=torch.Generator().manual_seed(0))
    logits, _ = model(idx, idx)
    torch.testing.assert_close(hf_model(idx).logits, logits[..., :12], atol=1e-5, rtol=1e-5)

    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'out/hf')
    text = 'the cat sat.\na'
    ids = get_tokenizer(CHARACTERS).encode(text)
    assert hf_tokenizer(text).input_ids == ids
    assert hf_tokenizer.decode(ids) == text

    prompt = torch.tensor([ids[:3]])
    mask = torch.ones_like(prompt)
    greedy = hf_model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=13)
    expected = model.generate(prompt, 13, temperature=0, vocab_size=12)
    assert greedy.tolist() == expected.tolist()
    by_default = hf_model.generate(prompt, attention_mask=mask)
    assert by_default.shape == (1, 3 + 8)  # half of block_size


def test_model_card_of_an_export(tmp_path, save, script_globals):
    save()
    script_globals('export.py', hf_dir='my-model')
    card = (tmp_path / 'my-model/README.md').read_text()
    assert card.startswith('---\nlibrary_name: transformers\n---\n# my-model\n')
    assert 'million parameters, 20 iterations on\n`words`, best validation loss 1.2346 nats' in card
    assert card.endswith("|---|---|\n| dataset | `'words'` |\n| learning_rate | `0.01` |\n")


def test_export_without_a_tokenizer(tmp_path, save, script_globals, capsys):
    """ A meta.pkl that has nothing but a size, as of tokens that are not text. """
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 12}))
    save(tokenizer=None, config={'dataset': str(tmp_path)})
    script_globals('export.py')
    assert '12 tokens, without a tokenizer' in capsys.readouterr().out
    assert not (tmp_path / 'out/hf/tokenizer.json').exists()


# -----------------------------------------------------------------------------
# the directory is whole or absent

def test_export_is_flushed_to_the_disk(tmp_path, save, script_globals, monkeypatch):
    flushed = set()
    fsync = os.fsync

    def recording_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    save()
    monkeypatch.setattr(os, 'fsync', recording_fsync)
    script_globals('export.py')
    files = list((tmp_path / 'out/hf').iterdir())
    assert len(files) >= 5
    assert {path.stat().st_ino for path in files} <= flushed


def full_disk(*args):
    raise OSError('No space left on device')


def wrong_conversion(model, *args, to_gpt2=components.huggingface.to_gpt2):
    hf_model = to_gpt2(model, *args)
    hf_model.transformer.h[0].ln_1.weight.data += 1
    return hf_model


@pytest.mark.parametrize('name, replacement, error, message', [
    ('to_tokenizer', full_disk, SystemExit, 'export.py: No space left'),
    ('to_gpt2', wrong_conversion, AssertionError, 'the logits differ by'),
])
def test_a_failed_export_leaves_nothing(
        tmp_path, save, script_globals, monkeypatch, name, replacement, error, message):
    save()
    monkeypatch.setattr(components.huggingface, name, replacement)
    with pytest.raises(error, match=message):
        script_globals('export.py')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['ckpt.pt']


def test_an_interrupted_export_is_replaced(tmp_path, save, script_globals):
    save()
    (tmp_path / 'out/hf.tmp').mkdir()
    (tmp_path / 'out/hf.tmp/old').write_text('')
    script_globals('export.py')
    assert not (tmp_path / 'out/hf.tmp').exists()
    assert not (tmp_path / 'out/hf/old').exists()


# -----------------------------------------------------------------------------
# what cannot be exported

def test_an_existing_directory_is_kept(tmp_path, save, script_globals, capsys):
    save()
    (tmp_path / 'out/hf').mkdir()
    with pytest.raises(SystemExit, match='out/hf exists'):
        script_globals('export.py')
    assert not list((tmp_path / 'out/hf').iterdir())
    assert 'overriding' not in capsys.readouterr().out


@pytest.mark.parametrize('args, message', [
    pytest.param(dict(rotary=True, untied=True), 'rotary, untied and bias=False', id='part'),
    pytest.param(dict(FAST_MODEL, bias=True), 'untied and bias=True', id='bias'),
    pytest.param(dict(tokenizer={'kind': 'char', 'itos': list('abcdefghijklm')}),
                 'tokenizer has 13 tokens.* 12', id='tokenizer'),
    pytest.param(dict(tokenizer=None, config={'dataset': 'gone'}),
                 'dataset=gone .*; run its prepare.py', id='dataset'),
])
def test_unsupported_checkpoint(tmp_path, save, script_globals, args, message):
    save(**args)
    with pytest.raises(SystemExit, match=message):
        script_globals('export.py')
    assert not (tmp_path / 'out/hf').exists()


def test_export_without_a_checkpoint(script_globals):
    with pytest.raises(SystemExit, match='nowhere/ckpt.pt'):
        script_globals('export.py', out_dir='nowhere')


# -----------------------------------------------------------------------------
# through the scripts

@pytest.mark.slow
def test_fine_tuning_an_export(tmp_path, dataset, other_characters):
    train(tmp_path, dataset)
    out, _ = run('export.py', cwd=tmp_path, hf_dir='hf')
    assert "overriding: hf_dir = 'hf'" in out
    _, of_export, _ = train(tmp_path, dataset, init_from='hf', out_dir='a')
    _, of_checkpoint, _ = train(tmp_path, dataset, init_from='out/ckpt.pt', out_dir='b')
    assert of_export[0] == pytest.approx(of_checkpoint[0], rel=1e-3)

    settings = {**SMALL, 'dataset': other_characters, 'init_from': 'hf'}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'has other tokens than hf' in error


def make_hugging_face_directory(folder, text):
    """ A GPT-2 with a tokenizer of its own -> the tokenizer. """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=['<end>'],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([text], trainer)
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<end>')
    hf_tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(hf_tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return hf_tokenizer


@pytest.mark.slow
def test_round_trip_from_hugging_face_and_back(tmp_path, clone):
    """ Text in the tokens of a Hugging Face directory, fine-tuning, samples, and an export. """
    text = 'The cat sat on the mat. The dog sat on the cat. Où est le chat? ' * 400
    (tmp_path / 'my.txt').write_text(text)
    hf_tokenizer = make_hugging_face_directory(tmp_path / 'hf', text)
    prepare = clone / 'data/custom/prepare.py'
    run(prepare, cwd=tmp_path, source='my.txt', name='mine', tokenizer='hf')
    settings = {**SMALL, 'dataset': clone / 'data/mine', 'block_size': 32, 'init_from': 'hf'}
    run('train.py', cwd=tmp_path, **settings)
    sampling = dict(start='The cat', num_samples=2, max_new_tokens=20, device='cpu')
    samples, _ = run('sample.py', cwd=tmp_path, **sampling)
    assert samples.count('The cat') >= 2

    run('export.py', cwd=tmp_path)
    model, _ = load_model(find_model('resume', tmp_path / 'out'))
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path / 'out/hf')
    exported_tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'out/hf')
    assert model.config.gelu == 'tanh'
    end_of_text = hf_tokenizer.eos_token_id
    assert exported_tokenizer.eos_token_id == end_of_text
    assert hf_model.generation_config.eos_token_id == end_of_text  # generation can stop
    assert exported_tokenizer.model_max_length == 32
    ids = exported_tokenizer('The cat sat. Où').input_ids
    assert ids == hf_tokenizer('The cat sat. Où').input_ids
    idx = torch.tensor([ids])
    with torch.no_grad():
        logits, _ = model(idx, idx)
        torch.testing.assert_close(hf_model(idx).logits, logits, atol=1e-5, rtol=1e-5)
    samples, _ = run('sample.py', cwd=tmp_path, init_from='out/hf', **sampling)
    assert samples.count('The cat') >= 2

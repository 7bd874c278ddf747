""" GPT-2 weights from Hugging Face, and both model classes back, against transformers. """
import shutil

import pytest
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from conftest import FAST_MODEL
from safetensors.torch import load_file, save_file

from components.errors import UserError
from components.huggingface import (
    GPT2_NAMES,
    to_gpt2,
    to_nanochat,
    to_tokenizer,
)
from components.tokenizer import get_tokenizer
from model import GPT, GPTConfig

NANOCHAT = dict(FAST_MODEL, bias=False)  # what to_nanochat() can convert


@pytest.fixture(scope='module')
def hf_directory(tmp_path_factory):
    """ The path of a small random GPT-2 as transformers saves it, biases and norms included. """
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('hf') / 'tiny-gpt2'
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4)
    hf_model = transformers.GPT2LMHeadModel(config)
    for p in hf_model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    hf_model.save_pretrained(folder)
    return folder


def random_gpt(**args):
    """ A small GPT whose weights are large enough for attention and GELU to matter. """
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**sizes, **args}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


# -----------------------------------------------------------------------------
# GPT-2 weights in

@pytest.mark.parametrize('activation, gelu', [('gelu_new', 'tanh'), ('gelu', 'exact')])
def test_logits_loss_and_gradients_equal_hugging_face(hf_directory, tmp_path, activation, gelu):
    hf_model = transformers.GPT2LMHeadModel.from_pretrained(hf_directory)
    assert hf_model.config.activation_function == 'gelu_new'  # that of GPT-2
    hf_model.config.activation_function = activation
    hf_model.save_pretrained(tmp_path)
    hf_model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    model = GPT.from_pretrained(str(tmp_path)).eval()
    assert model.config.gelu == gelu

    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(2))
    targets = F.pad(idx[:, 1:], (0, 1), value=-1)
    logits, loss = model(idx, targets)
    reference = hf_model(idx, labels=idx)
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, reference.loss)
    loss.backward()
    reference.loss.backward()
    hf_parameters = dict(hf_model.named_parameters())
    for name, p in model.named_parameters():
        expected = hf_parameters[name].grad
        is_conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        if is_conv1d:
            expected = expected.t()
        torch.testing.assert_close(p.grad, expected, atol=1e-4, rtol=1e-3, msg=name)


def test_dropout_alone_can_be_overridden(hf_directory):
    assert GPT.from_pretrained(str(hf_directory)).config.dropout == 0
    model = GPT.from_pretrained(str(hf_directory), dict(dropout=0.3))
    assert model.config.dropout == model.transformer.h[0].attn.dropout == 0.3
    with pytest.raises(AssertionError, match='only dropout'):
        GPT.from_pretrained(str(hf_directory), dict(n_layer=2))


@pytest.mark.parametrize('field, value', [
    ('layer_norm_epsilon', 1e-6),
    ('n_inner', 100),
    ('scale_attn_by_inverse_layer_idx', True),
    ('scale_attn_weights', False),
    ('tie_word_embeddings', False),
    ('activation_function', 'relu'),
    ('add_cross_attention', True),
])
def test_unsupported_configuration(tmp_path, field, value):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **{field: value})
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f'{field}={value!r}'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('content, reason', [
    ('{"n_embd": ', 'config.json'),
    ('[]', 'model_type'),
    ('{"model_type": "gpt2", "n_head": "x"}', 'n_head'),
])
def test_broken_configuration(tmp_path, content, reason):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=f'cannot load .*{reason}'):
        GPT.from_pretrained(str(tmp_path))


def test_what_is_not_a_gpt2(tmp_path):
    with pytest.raises(UserError, match='gpt2-huge'):
        GPT.from_pretrained('gpt2-huge')
    with pytest.raises(UserError, match='neither a ckpt.pt nor the config.json'):
        GPT.from_pretrained(str(tmp_path))
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match='llama'):
        GPT.from_pretrained(str(tmp_path))


def test_missing_and_broken_weights(hf_directory, tmp_path):
    shutil.copytree(hf_directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'model.safetensors'
    weights = load_file(path)
    del weights['transformer.h.1.mlp.c_fc.weight']
    save_file(weights, path, metadata={'format': 'pt'})
    with pytest.raises(UserError, match='lacks .*h.1.mlp.c_fc.weight'):
        GPT.from_pretrained(str(tmp_path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match='weights cannot be read'):
        GPT.from_pretrained(str(tmp_path))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """ The path of an empty cache of the hub, without a network, and a new working directory. """
    from huggingface_hub import constants
    cache = tmp_path / 'hub'
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return cache


@pytest.mark.parametrize('repository', ['openai-community/gpt2', 'gpt2'])  # and its old name
def test_gpt2_of_the_cache(hf_directory, hub_cache, repository):
    """ Not a directory of that name, which transformers would read for the old one. """
    folder = hub_cache / f'models--{repository.replace("/", "--")}'
    shutil.copytree(hf_directory, folder / 'snapshots/abc')
    (folder / 'refs').mkdir()
    (folder / 'refs/main').write_text('abc')
    assert GPT.from_pretrained('gpt2').config.vocab_size == 61
    shutil.copytree(hf_directory, 'gpt2')
    if repository == 'gpt2':
        with pytest.raises(UserError, match='openai-community/gpt2'):
            GPT.from_pretrained('gpt2')


@pytest.mark.parametrize('name', GPT2_NAMES)
def test_gpt2_without_a_network(hub_cache, name):
    with pytest.raises(UserError, match=f'openai-community/{name}.*requires a network'):
        GPT.from_pretrained(name)


# -----------------------------------------------------------------------------
# a trained GPT out

@pytest.mark.parametrize('convert, args, activation', [
    pytest.param(to_gpt2, dict(bias=False), 'gelu', id='gpt2'),
    pytest.param(to_gpt2, dict(bias=True, dropout=0.25), 'gelu', id='bias'),
    pytest.param(to_gpt2, dict(bias=True, gelu='tanh'), 'gelu_new', id='tanh'),
    pytest.param(to_nanochat, NANOCHAT, 'gelu', id='nanochat'),
    pytest.param(to_nanochat, dict(NANOCHAT, gelu='tanh'), 'gelu_pytorch_tanh', id='nanochat tanh'),
    pytest.param(to_nanochat, dict(NANOCHAT, rope_base=20), 'gelu', id='rope_base'),
])
@torch.no_grad()
def test_logits_of_an_export(convert, args, activation):
    """ Of the tokens that the tokenizer has: the padding of the vocabulary is left out. """
    model = random_gpt(**args)
    hf_model = convert(model, vocab_size=33, end_of_text=32).eval()
    idx = torch.randint(33, (3, 16), generator=torch.Generator().manual_seed(1))
    logits, _ = model(idx, idx)
    torch.testing.assert_close(hf_model(idx).logits, logits[..., :33], atol=1e-5, rtol=1e-5)
    # the other form of GELU differs by less than the tolerance in a model with smaller weights
    config = hf_model.config
    name = 'activation_function' if convert == to_gpt2 else 'hidden_act'
    assert getattr(config, name) == activation
    assert config.vocab_size == 33
    assert hf_model.generation_config.eos_token_id == 32
    if convert == to_gpt2:
        assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == model.config.dropout


def test_to_nanochat_gradients():
    model = random_gpt(**NANOCHAT)
    hf_model = to_nanochat(model, vocab_size=40, end_of_text=None).eval()
    idx = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))
    targets = F.pad(idx[:, 1:], (0, 1), value=-1)
    _, loss = model(idx, targets)
    loss.backward()
    hf_model(idx, labels=idx).loss.backward()
    pairs = [
        (model.transformer.wte, hf_model.model.embed_tokens),
        (model.transformer.h[1].mlp.c_proj, hf_model.model.layers[1].mlp.fc2),
        (model.transformer.h[0].attn.c_proj, hf_model.model.layers[0].self_attn.o_proj),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-4)


# -----------------------------------------------------------------------------
# tokenizers

def test_character_tokenizer():
    spec = {'kind': 'char', 'itos': ['\n', ' ', '.', 'a', 'b', 'é']}
    text = 'ab é.\n\nba'
    hf_tokenizer = to_tokenizer(spec, block_size=16)
    ids = get_tokenizer(spec).encode(text)
    assert hf_tokenizer(text).input_ids == ids
    assert hf_tokenizer.decode(ids) == text
    assert hf_tokenizer.model_max_length == 16
    with pytest.raises(Exception, match='UNK'):
        hf_tokenizer('abc')


@pytest.mark.parametrize('end, eos_token', [(1, '<end>'), (None, None)])
def test_hugging_face_tokenizer(end, eos_token):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({'cat': 0, '<end>': 1, 'the': 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    spec = {'kind': 'hf', 'json': tokenizer.to_str(), 'end': end}
    hf_tokenizer = to_tokenizer(spec, block_size=16)
    assert hf_tokenizer('the cat').input_ids == [2, 0]
    assert hf_tokenizer.eos_token == eos_token


def test_gpt2_tokenizer(monkeypatch):
    """ With a few merges, because GPT-2's own have to be downloaded. """
    pieces = [bytes([i]) for i in range(256)]
    pieces += [b' t', b'he', b' the', b'\n\n', b' a']
    end_of_text = len(pieces)
    bpe = tiktoken.Encoding(
        'gpt2',
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={piece: i for i, piece in enumerate(pieces)},
        special_tokens={'<|endoftext|>': end_of_text},
    )
    monkeypatch.setattr(tiktoken, 'get_encoding', {'gpt2': bpe}.get)
    text = "On the\n\nthere it's été, a  42!<|endoftext|>Then"
    hf_tokenizer = to_tokenizer({'kind': 'gpt2'}, block_size=16)
    assert hf_tokenizer.encode(text) == bpe.encode(text, allowed_special='all')
    assert hf_tokenizer.decode(bpe.encode_ordinary('the été  !')) == 'the été  !'
    assert hf_tokenizer.eos_token_id == hf_tokenizer.bos_token_id == end_of_text

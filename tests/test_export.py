""" Checkpoints as Hugging Face directories, read by transformers. """
import json
import os

import pytest
import torch
from conftest import SMALL, run, train

from bins import get_tokenizer
from checkpoint import load_checkpoint, load_weights
from model import GPT, GPTConfig

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)


def ours_and_theirs(out_dir, hf_dir):
    """ -> the GPT of a checkpoint, its record of a tokenizer, and the model and tokenizer of a directory. """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    checkpoint = load_checkpoint(out_dir / 'ckpt.pt')
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval()
    load_weights(model, checkpoint, 'ckpt.pt')
    return (model, checkpoint.get('tokenizer'), AutoModelForCausalLM.from_pretrained(hf_dir).eval(),
            AutoTokenizer.from_pretrained(hf_dir))


@pytest.mark.parametrize('flags', [dict(), dict(bias=True), RECIPE], ids=str)
@torch.no_grad()
def test_an_export_says_what_the_checkpoint_says(tmp_path, dataset, script_globals, flags):
    train(tmp_path, dataset, **flags)
    synced, fsync = set(), os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda fd: synced.add(os.fstat(fd).st_ino) or fsync(fd))
        script_globals('export.py')
    assert {path.stat().st_ino for path in (tmp_path / 'out/hf').iterdir()} <= synced
    model, record, theirs, tokenizer = ours_and_theirs(tmp_path / 'out', tmp_path / 'out/hf')
    config = theirs.config.to_dict()  # the other form of GELU would differ by less than the logits' tolerance
    assert config.get('hidden_act', config.get('activation_function')) == 'gelu'
    idx = torch.randint(model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-5, rtol=1e-5)
    encode, decode, _, _ = get_tokenizer(record)
    text = 'the cat sat.\na'
    assert tokenizer(text).input_ids == encode(text) and tokenizer.decode(encode(text)) == text
    with pytest.raises(Exception, match='UNK'):
        tokenizer('xyz')
    prompt = torch.tensor([encode('the')])
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                max_new_tokens=13)
    assert continued.tolist() == model.generate(prompt, 13, temperature=0).tolist()
    assert theirs.generate(prompt).shape == (1, 3 + 8)  # half a block
    card = (tmp_path / 'out/hf/README.md').read_text()
    assert '| learning_rate | `0.01` |' in card and ', 20 iterations on' in card
    assert f'best validation loss {load_checkpoint(tmp_path / "out/ckpt.pt")["best_val_loss"]:.4f} ' in card
    assert not list(tmp_path.glob('out/*.tmp'))
    with pytest.raises(SystemExit, match='hf is there already'):
        script_globals('export.py')


def test_fine_tuning_an_export_takes_its_tokens(tmp_path, dataset, script_globals, other_characters):
    train(tmp_path, dataset)
    script_globals('export.py')
    _, steps, _ = train(tmp_path, dataset, init_from='out/hf', out_dir='more')
    _, ours, _ = train(tmp_path, dataset, init_from='out/ckpt.pt', out_dir='b')
    assert steps[0] == pytest.approx(ours[0], rel=1e-3)
    settings = {**SMALL, 'dataset': other_characters, 'init_from': 'out/hf'}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'has other tokens than out/hf' in error


def test_what_transformers_cannot_express_is_refused_by_name(tmp_path, dataset, script_globals):
    for flags, named in ((dict(rotary=True, untied=True), 'has rotary, untied and bias=False'),
                         (dict(bias=True, **RECIPE), 'has rotary, rmsnorm, qk_norm, untied and bias=True')):
        train(tmp_path, dataset, max_iters=1, **flags)
        with pytest.raises(SystemExit, match=named):
            script_globals('export.py')
        assert not (tmp_path / 'out/hf').exists()


@torch.no_grad()
def test_the_padding_of_the_vocabulary_is_cut(tmp_path, dataset, script_globals):
    train(tmp_path, dataset, max_iters=2)
    path = tmp_path / 'out/ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    known = len(checkpoint['tokenizer']['itos'])
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        checkpoint['model'][key] = torch.cat((checkpoint['model'][key], torch.randn(47, 16)))
    checkpoint['model_args']['vocab_size'] = known + 47
    torch.save(checkpoint, path)
    script_globals('export.py', hf_dir='elsewhere')
    model, _, theirs, _ = ours_and_theirs(tmp_path / 'out', tmp_path / 'elsewhere')
    idx = torch.arange(known)[None]
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0][..., :known], atol=1e-5, rtol=1e-5)


def test_the_round_trip_from_hugging_face_and_back(tmp_path, script_globals, clone):
    """ A GPT-2 directory with a tokenizer of its own: text, fine-tuning, samples, and an export. """
    import tokenizers
    import transformers
    text = 'The cat sat on the mat. The dog sat on the cat. Où est le chat? ' * 400
    (tmp_path / 'my.txt').write_text(text)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<end>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<end>')
    tokenizer.save_pretrained(tmp_path / 'hf')
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2,
                                     n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'hf')
    run(clone / 'data/custom/prepare.py', cwd=tmp_path, source='my.txt', name='mine', tokenizer='hf')
    settings = {**SMALL, 'dataset': clone / 'data/mine', 'block_size': 32, 'init_from': 'hf'}
    out, _ = run('train.py', cwd=tmp_path, **settings)
    assert 'starting from the weights of hf' in out
    asked = dict(start='The cat', num_samples=2, max_new_tokens=20, device='cpu')
    samples, _ = run('sample.py', cwd=tmp_path, **asked)
    assert samples.count('The cat') >= 2
    run('export.py', cwd=tmp_path)
    model, record, theirs, again = ours_and_theirs(tmp_path / 'out', tmp_path / 'out/hf')
    assert model.config.gelu == 'tanh' and json.loads(record['json']) and again.eos_token == '<end>'
    assert theirs.generation_config.eos_token_id == again.eos_token_id == record['end']  # it can stop
    assert again.model_max_length == 32
    idx = torch.tensor([again('The cat sat. Où').input_ids])
    assert idx.tolist() == [tokenizer('The cat sat. Où').input_ids]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-5, rtol=1e-5)
    samples, _ = run('sample.py', cwd=tmp_path, init_from='out/hf', **asked)
    assert samples.count('The cat') >= 2

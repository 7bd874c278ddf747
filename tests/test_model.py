""" The model against Hugging Face's GPT-2, closed forms, and its own promises. """
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from model import GPT, GPTConfig, choose_device, peak_flops


@pytest.fixture(scope='module')
def hf_directory(tmp_path_factory):
    """ A small random GPT-2 as transformers saves it, biases and norms far from their defaults. """
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('hf') / 'tiny-gpt2'
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_logits_loss_and_gradients_equal_hugging_face(hf_directory):
    ours = GPT.from_pretrained(str(hf_directory)).eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(hf_directory).eval()
    idx = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(2))
    logits, loss = ours(idx, F.pad(idx[:, 1:], (0, 1), value=-1))
    reference = theirs(idx, labels=idx)
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, reference.loss)
    loss.backward()
    reference.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = gradients[name].grad
        if expected.shape != p.shape or name.endswith('attn.c_proj.weight'):  # that one is square
            expected = expected.t()
        torch.testing.assert_close(p.grad, expected, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize('field, value', [
    ('layer_norm_epsilon', 1e-6), ('n_inner', 100), ('scale_attn_by_inverse_layer_idx', True),
    ('scale_attn_weights', False), ('tie_word_embeddings', False), ('activation_function', 'relu'),
    ('add_cross_attention', True)])
def test_a_configuration_that_cannot_be_expressed_is_refused_by_name(tmp_path, field, value):
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **{field: value}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        GPT.from_pretrained(str(tmp_path))


def test_exact_gelu_of_a_hugging_face_model(hf_directory, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(hf_directory)
    theirs.config.activation_function = 'gelu'
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.arange(20)[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert ours.config.gelu == 'exact'


def test_other_models_and_names_are_refused(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='llama'):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match='not a directory'):
        GPT.from_pretrained('gpt2-huge')


@pytest.mark.parametrize('bias', [False, True])
def test_no_position_reads_what_comes_after_it(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=bias)).eval()
    a = torch.randint(40, (1, 16))
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % 40
    before, after = model(a, a)[0], model(b, b)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=0, rtol=0)
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_without_targets_the_last_logits_alone(tiny):
    idx = torch.randint(40, (2, 7))
    last, loss = tiny(idx)
    assert last.shape == (2, 1, 40) and loss is None
    torch.testing.assert_close(last, tiny(idx, idx)[0][:, -1:])
    with pytest.raises(ValueError, match='17 tokens'):
        tiny(torch.zeros(1, 17, dtype=torch.long))


def test_targets_of_minus_one_are_ignored(tiny):
    idx = torch.randint(40, (2, 8))
    targets = idx.clone()
    targets[1] = -1
    torch.testing.assert_close(tiny(idx, targets)[1], tiny(idx[:1], idx[:1])[1])


def test_weight_tying_names_and_counts():
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=3, n_head=2, n_embd=16, bias=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    C, V, T, L = 16, 40, 16, 3
    expected = V * C + L * (12 * C * C + 13 * C) + 2 * C
    assert model.get_num_params() == expected
    assert model.get_num_params(non_embedding=False) == expected + T * C
    assert {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.2.attn.c_attn.bias',
            'transformer.h.0.mlp.c_proj.weight', 'transformer.ln_f.bias',
            'lm_head.weight'} <= set(model.state_dict())


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=2, n_embd=64, bias=True))
    for name, p in model.named_parameters():
        if name.endswith('.bias'):
            assert (p == 0).all()
        elif '.ln_' in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name


def test_the_two_groups_of_the_optimizer():
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=True))
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay['weight_decay'], rest['weight_decay'], decay['betas']) == (0.1, 0.0, (0.9, 0.95))
    assert all(p.dim() >= 2 for p in decay['params'])
    assert {names[id(p)].rsplit('.', 1)[1] for p in rest['params']} == {'weight', 'bias'}
    assert all('ln_' in names[id(p)] or names[id(p)].endswith('.bias') for p in rest['params'])
    assert len(decay['params']) + len(rest['params']) == len(names)


def test_cropping_keeps_what_the_first_positions_compute(tiny):
    idx = torch.randint(40, (2, 8))
    before = tiny(idx, idx)[0]
    tiny.crop_block_size(8)
    torch.testing.assert_close(tiny(idx, idx)[0], before)
    assert tiny.config.block_size == 8 and tiny.state_dict()['transformer.wpe.weight'].shape == (8, 16)


def test_generation_draws_from_the_softmax_of_the_top_k(tiny):
    tiny.eval()
    idx = torch.randint(40, (1, 20), generator=torch.Generator().manual_seed(0))  # more than block_size
    logits = tiny(idx[:, -16:])[0][0, -1] / 0.7
    kept = logits.topk(5).indices
    probabilities = F.softmax(logits[kept], dim=-1)
    torch.manual_seed(0)
    drawn = tiny.generate(idx.repeat(4000, 1), 1, temperature=0.7, top_k=5)[:, -1]
    counts = torch.stack([(drawn == k).sum() for k in kept])
    assert counts.sum() == 4000  # none outside the five
    chi_squared = ((counts - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum()
    assert chi_squared < 18.5  # 99.9% of four degrees of freedom


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny):
    out = tiny.generate(torch.zeros(300, 1, dtype=torch.long), 3, top_k=1000, vocab_size=7)
    assert out.max() < 7
    assert tiny.generate(torch.zeros(300, 1, dtype=torch.long), 3, top_k=0)[:, 1:].max() > 7


def test_flops_and_mfu(tiny):
    flops = 6 * tiny.get_num_params() + 12 * 2 * 2 * 8 * 16  # 6 N + 12 L H Q T
    assert tiny.flops_per_token(16) == flops
    assert tiny.estimate_mfu(5, 0.5, peak=1e9) == pytest.approx(flops * 16 * 5 / 0.5 / 1e9)
    assert peak_flops('cpu', 'float32')[0] > 1e9
    assert tiny.estimate_mfu(5, 0.5) > 0


@pytest.mark.parametrize('wrong', [
    dict(n_embd=10, n_head=3), dict(n_layer=0), dict(block_size=-1), dict(dropout=1.0), dict(vocab_size=1.5)])
def test_a_configuration_checks_itself(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**wrong)


@pytest.mark.parametrize('part', ['attn', 'mlp'])
def test_dropout_in_each_part_of_a_block(part):
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    part, x = getattr(model.transformer.h[0], part), torch.randn(1, 16, 16)
    assert not torch.equal(part(x), part(x))
    part.eval()
    assert torch.equal(part(x), part(x))


def test_dropout_of_the_attention_weights():
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    attention, x = model.transformer.h[0].attn, torch.randn(1, 16, 16)
    attention.resid_dropout.eval()
    assert not torch.equal(attention(x), attention(x))


def test_weights_that_are_missing_are_named(hf_directory, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file
    shutil.copytree(hf_directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.mlp.c_fc.weight']
    save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='h.1.mlp.c_fc.weight'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('capability, dtype', [((8, 0), 'bfloat16'), ((7, 5), 'float16')])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    assert choose_device() == ('cuda', dtype, True)
    assert choose_device('cuda:1', compile=False) == ('cuda:1', dtype, False)
    assert choose_device('cpu') == ('cpu', 'float32', False)
    with pytest.raises(ValueError, match='cuda:2'):
        choose_device('cuda:2')


def test_choosing_the_device():
    assert choose_device('cpu') == ('cpu', 'float32', False)
    assert choose_device('cpu', 'bfloat16', True) == ('cpu', 'bfloat16', True)
    for wrong in (dict(device='gpu'), dict(device=True), dict(device='cuda:99'),
                  dict(device='cpu', dtype='int8'), dict(device='cpu', compile='yes')):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            choose_device(**wrong)

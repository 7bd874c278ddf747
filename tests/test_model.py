""" The model against Hugging Face's GPT-2, closed forms, and its own promises. """
import math
import os
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
import transformers

import machine
from machine import choose_device, peak_flops
from model import GPT, GPTConfig, KVCache, padding_mask, rotate
from update import Muon, clip_and_step


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


def test_dropout_alone_can_be_set_beside_the_weights_of_gpt2(hf_directory):
    model = GPT.from_pretrained(str(hf_directory), dict(dropout=0.3))
    assert model.config.dropout == model.transformer.h[0].attn.dropout == 0.3
    assert GPT.from_pretrained(str(hf_directory)).config.dropout == 0
    with pytest.raises(AssertionError, match='only dropout'):
        GPT.from_pretrained(str(hf_directory), dict(n_layer=2))


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


def test_flops_and_mfu(tiny, monkeypatch):
    flops = 6 * tiny.get_num_params() + 12 * 2 * 2 * 8 * 16  # 6 N + 12 L H Q T
    assert tiny.flops_per_token(16) == flops
    assert tiny.estimate_mfu(5, 0.5, peak=1e9) == pytest.approx(flops * 16 * 5 / 0.5 / 1e9)
    assert peak_flops('cpu', 'float32')[0] > 1e9
    clock = iter(range(100))
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(clock)))  # a product takes a second
    assert peak_flops.__wrapped__('cpu', 'float32')[0] == 2 * 128**3
    monkeypatch.undo()
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


def test_a_cache_that_nanogpt_filled_is_used(hf_directory, tmp_path, monkeypatch):
    """ Under the name gpt2, which openai-community/gpt2 had before. A folder of that name is not meant. """
    from huggingface_hub import constants
    cached = tmp_path / 'hub/models--gpt2'
    shutil.copytree(hf_directory, cached / 'snapshots/abc')
    (cached / 'refs').mkdir()
    (cached / 'refs/main').write_text('abc')
    for name, value in (('HF_HUB_CACHE', str(tmp_path / 'hub')), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained('gpt2').config.vocab_size == 61
    (tmp_path / 'gpt2').mkdir()
    with pytest.raises(ValueError, match='openai-community/gpt2'):
        GPT.from_pretrained('gpt2')


def test_weights_that_are_missing_are_named(hf_directory, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(hf_directory, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.mlp.c_fc.weight']
    save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='h.1.mlp.c_fc.weight'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('capability, compiler, triton, dtype, compiled', [
    ((8, 0), 'g++', True, 'bfloat16', True), ((7, 5), 'g++', True, 'float16', True),
    ((6, 1), 'g++', True, 'float16', False), ((8, 0), None, True, 'bfloat16', False),
    ((8, 0), 'g++', None, 'bfloat16', False)])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, capability, compiler, triton, dtype, compiled):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    monkeypatch.setattr(shutil, 'which', lambda name: compiler)
    monkeypatch.setattr(machine, 'find_spec', lambda name: triton)
    assert choose_device() == ('cuda', dtype, compiled)
    assert choose_device(compile=True) == ('cuda', dtype, True)  # asked for: what is wrong will be said
    assert choose_device('cuda:1', compile=False) == ('cuda:1', dtype, False)
    assert choose_device('cpu', 'float32') == ('cpu', 'float32', False)
    with pytest.raises(ValueError, match='cuda:2'):
        choose_device('cuda:2')


@pytest.mark.parametrize('has, dtype', [
    ({'avx512_bf16': True}, 'bfloat16'), ({'amx_bf16': True, 'avx512_bf16': False}, 'bfloat16'),
    ({}, 'float32')])
def test_a_cpu_computes_in_what_it_has(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has)
    assert choose_device('cpu') == ('cpu', dtype, False)


@pytest.mark.skipif(not os.path.exists('/proc/meminfo'), reason='a guess there')
def test_free_memory_is_in_bytes():
    size, pages, free = map(os.sysconf, ('SC_PAGE_SIZE', 'SC_PHYS_PAGES', 'SC_AVPHYS_PAGES'))
    assert 0.5 * size * free < machine.free_memory('cpu') <= size * pages


def test_choosing_the_device():
    assert choose_device('cpu', 'bfloat16', True) == ('cpu', 'bfloat16', True)
    for wrong in (dict(device='gpu'), dict(device=True), dict(device='cuda:99'),
                  dict(device='cpu', dtype='int8'), dict(device='cpu', compile='yes')):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            choose_device(**wrong)


# -----------------------------------------------------------------------------
# newer than GPT-2

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)


@pytest.fixture
def recipe():
    """ A GPT with every newer flag on, and weights large enough for attention to matter. """
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False, **RECIPE))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_the_recipe_is_a_nanochat_of_transformers(recipe):
    """ Logits and gradients, with the q, k and v that they keep apart. """
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=40, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, final_logit_softcapping=None, pad_token_id=None, hidden_act='gelu',
        attn_implementation='eager')).eval()
    weights = {'model.embed_tokens.weight': recipe.transformer.wte.weight,
               'lm_head.weight': recipe.lm_head.weight}
    for i, block in enumerate(recipe.transformer.h):
        q, k, v = block.attn.c_attn.weight.chunk(3)
        for name, weight in dict(q_proj=q, k_proj=k, v_proj=v, o_proj=block.attn.c_proj.weight).items():
            weights[f'model.layers.{i}.self_attn.{name}.weight'] = weight
        weights[f'model.layers.{i}.mlp.fc1.weight'] = block.mlp.c_fc.weight
        weights[f'model.layers.{i}.mlp.fc2.weight'] = block.mlp.c_proj.weight
    theirs.load_state_dict({key: value.detach() for key, value in weights.items()})
    idx = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))
    logits, loss = recipe(idx, F.pad(idx[:, 1:], (0, 1), value=-1))
    reference = theirs(idx, labels=idx)
    torch.testing.assert_close(logits, reference.logits, atol=1e-5, rtol=1e-5)
    loss.backward()
    reference.loss.backward()
    for ours, name in ((recipe.transformer.wte, 'embed_tokens'),
                       (recipe.transformer.h[1].mlp.c_proj, 'layers.1.mlp.fc2')):
        torch.testing.assert_close(ours.weight.grad, theirs.model.get_submodule(name).weight.grad,
                                   atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('flag', RECIPE)
def test_a_flag_alone_changes_the_logits(tiny, flag):
    torch.manual_seed(0)
    other = GPT(GPTConfig(**{**vars(tiny.config), flag: True}))
    for model in (tiny, other):
        for name, p in model.named_parameters():  # the same where both have it
            seed = torch.Generator().manual_seed(sum(name.encode()))
            torch.nn.init.normal_(p, std=0.3, generator=seed)
    idx = torch.arange(12)[None]
    assert (other(idx, idx)[0] - tiny(idx, idx)[0]).abs().max() > 0.1


def test_what_rotary_positions_see_is_how_far_apart_tokens_are(recipe):
    x = torch.randn(8, generator=torch.Generator().manual_seed(1)).expand(1, 16, 1, 1, 8)
    turned = rotate(x, recipe.cos, recipe.sin)[0, :, 0, 0]                      # (16, 8)
    products = turned @ turned.T                                                # (16, 16)
    for distance in range(15):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1  # and it is seen


def test_rotary_models_crop_without_a_table(recipe):
    idx = torch.arange(8)[None]
    before = recipe(idx)[0]
    recipe.crop_block_size(8)
    assert torch.equal(recipe(idx)[0], before)
    assert not {'cos', 'sin'} & set(recipe.state_dict())  # of 16 positions: a cropped model would not load
    with pytest.raises(ValueError, match='block_size=8'):
        recipe(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match='even'):
        GPTConfig(n_embd=15, n_head=3, rotary=True)


def test_the_mask_follows_the_keys_around_a_full_cache():
    cache, size, pads = KVCache(5), 5, (0, 3, 6)
    for n in range(15):
        token = torch.full((3, 1, 1, 1), float(n))
        keys, _ = cache.extend(token, token)
        mask = padding_mask(torch.tensor([n]), n + 1, torch.tensor(pads), size)
        for row, pad in enumerate(pads):
            read = keys[row, 0, :, 0][mask[row, 0, 0]].tolist()
            assert sorted(read) == [i for i in range(max(0, n + 1 - size), n + 1) if i >= pad or i == n]


def test_a_table_that_is_only_looked_up_costs_no_flops(recipe):
    n = sum(p.numel() for p in recipe.parameters())
    assert recipe.get_num_params() == recipe.get_num_params(non_embedding=False) == n
    assert recipe.flops_per_token(16) == 6 * (n - 40 * 16) + 12 * 2 * 16 * 16


def test_attention_stays_in_float32_on_a_cpu(recipe):
    """ So bfloat16 has the errors of its products alone, and a model that is bfloat16 throughout works. """
    idx = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))
    exact = recipe(idx, idx)[0]
    with torch.autocast('cpu', torch.bfloat16):
        mixed, loss = recipe(idx, idx)
    loss.backward()
    assert recipe.transformer.h[0].attn.c_attn.weight.grad.dtype == torch.float32
    assert 0 < (mixed - exact).abs().max() < 0.05 * exact.abs().max()
    assert recipe.bfloat16()(idx, idx)[0].dtype == torch.bfloat16


@pytest.mark.parametrize('flags', [{}, RECIPE], ids=['default', 'recipe'])
def test_compiled_as_one_graph_it_is_the_same(flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=2, n_embd=16, **flags))
    idx = torch.arange(12)[None]
    with torch.autocast('cpu', torch.bfloat16):
        compiled = torch.compile(model, backend='aot_eager', fullgraph=True)(idx, idx)[1]
        torch.testing.assert_close(compiled, model(idx, idx)[1], atol=1e-2, rtol=0)


# -----------------------------------------------------------------------------
# the update

def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((48, 16), (16, 16), (64, 16), (16, 64), (16, 16), (64, 16))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_muon_is_that_of_torch():
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95)
    for step in range(3):
        for p, q, g in zip(ours, theirs, matrices(step + 1)):
            p.grad, q.grad = g.detach().clone(), g.detach().clone()
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=5e-3, rtol=0)  # three updates of 0.1, in bfloat16
        torch.testing.assert_close(mine.state[p]['momentum_buffer'], reference.state[q]['momentum_buffer'])


def test_an_update_of_muon_has_singular_values_near_1_and_the_directions_of_the_gradient():
    before, params = matrices(), matrices()
    optimizer = Muon(params, lr=1.0, dtype=torch.float32)
    for p, g in zip(params, matrices(1)):
        p.grad = g.detach().clone()
    optimizer.step()
    for old, p in zip(before, params):
        update = (old - p).detach() / max(1, p.shape[0] / p.shape[1]) ** 0.5
        u, s, v = torch.linalg.svd(p.grad, full_matrices=False)
        middle = u.T @ update @ v.T                                             # diagonal in the SVD's bases
        assert 0.6 < middle.diagonal().min() and middle.diagonal().max() < 1.3
        assert (middle - middle.diagonal().diag()).abs().max() < 1e-4


def test_attention_has_the_precision_of_its_input(tiny):
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tiny.transformer.h[0].attn.double(), x)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_muon_of_a_model(recipe, dtype):
    muon = recipe.configure_muon(0.02, 0.1, dtype)
    assert (muon.param_groups[0]['lr'], muon.param_groups[0]['weight_decay']) == (0.02, 0.1)
    assert muon.dtype == (torch.bfloat16 if dtype == 'bfloat16' else torch.float32)


def test_muon_waits_when_the_very_first_gradients_are_bad():
    """ As those of float16, whose scale is being found, often are; there is no momentum yet. """
    before, params = matrices(), matrices()
    for p in params:
        p.grad = torch.full_like(p, float('inf'))
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))
    assert not any(state['momentum_buffer'].any() for state in optimizer.state.values())


def test_a_bad_loss_holds_the_update_though_the_gradients_are_good(tiny):
    """ As in the other processes, where one of them has it. """
    optimizer = tiny.configure_optimizers(0.1, 0.1, (0.9, 0.95), 'cpu')
    idx, before = torch.arange(12)[None], [p.detach().clone() for p in tiny.parameters()]
    tiny(idx, idx)[1].backward()
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    assert not clip_and_step([optimizer], scaler, tiny.parameters(), torch.tensor(math.nan), 1.0).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters()))


def test_muon_is_for_matrices():
    with pytest.raises(AssertionError, match='not a matrix'):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize('fused', [False, True])
def test_an_optimizer_that_knows_no_found_inf_waits_too(tiny, fused):
    optimizers = [torch.optim.SGD(tiny.transformer.h.parameters(), lr=0.1, momentum=0.9),
                  torch.optim.AdamW(tiny.transformer.wte.parameters(), lr=0.1, fused=fused)]
    idx, scaler = torch.arange(12)[None], torch.amp.GradScaler('cpu', enabled=False)
    for good in False, True:
        before = [p.detach().clone() for p in tiny.transformer.h.parameters()]
        loss = tiny(idx, idx)[1] * (1.0 if good else float('nan'))
        loss.backward()
        clip_and_step(optimizers, scaler, tiny.parameters(), loss.detach(), 1.0)
        assert any(optimizers[0].state.values()) == any(optimizers[1].state.values()) == good or fused
        assert good != all(torch.equal(a, b) for a, b in zip(before, tiny.transformer.h.parameters()))
        assert all(p.isfinite().all() for p in tiny.parameters())


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_bad_number_anywhere_holds_both_optimizers(recipe, bad):
    optimizers = [recipe.configure_optimizers(0.1, 0.1, (0.9, 0.95), 'cpu', muon=True),
                  recipe.configure_muon(0.1, 0.1)]
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']]
    assert len({id(p) for p in held}) == len(held) == len(list(recipe.parameters()))
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    idx = torch.arange(12)[None]

    def step(poison=0.0):
        loss = recipe(idx, idx)[1]
        loss.backward()
        recipe.lm_head.weight.grad[0, 0] += poison  # AdamW's, and Muon's matrices are to wait as well
        return clip_and_step(optimizers, scaler, recipe.parameters(), loss.detach(), 1.0)

    step()
    before = [p.detach().clone() for p in recipe.parameters()]
    momenta = [state['momentum_buffer'].clone() for state in optimizers[1].state.values()]
    step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, recipe.parameters()))
    assert all(torch.equal(a, state['momentum_buffer']) for a, state in
               zip(momenta, optimizers[1].state.values()))
    step()
    assert not any(torch.equal(a, b) for a, b in zip(before, recipe.parameters()))

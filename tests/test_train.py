"""
train.py: batches, evaluation, learning rate, updates, a run, resuming. (Several processes are in
test_distributed.py, stops in test_stopping.py, log.csv in test_log.py.)

All tests run the script itself: `trainer` in this process, `train` in a new one.
"""
import csv
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import FAST, NANOGPT_MODEL_ARGS, train
from kill_and_resume import checkpoint_differences, differences

from components.dataset import epoch_starts

# what random numbers are for: this follows the seed in their keys, and stays, or runs would change
TRAINING = 0
EVALUATION = 1
DROPOUT = 2
EPOCH = 3


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def moments(names, key='exp_avg'):
    """ AdamW's moments of all parameters, in a list. `names` are train.py's global variables. """
    state = names['optimizers']['optimizer'].state
    return [state[p][key] for p in names['raw_model'].parameters()]

# -----------------------------------------------------------------------------
# batches

def windows_of(ids, starts):
    """ The inputs of the windows of 16 tokens at `starts`, as lists. """
    return [ids[start:start + 16].tolist() for start in starts]


@pytest.mark.parametrize('arguments, key, settings', [
    (('train', 3, 7), (1337, TRAINING, 7, 3), dict()),
    (('train', 0, 107), (5, TRAINING, 107, 0), dict(seed=5)),
    (('train', 2), (1337, EVALUATION, 0, 2), dict()),
    (('train', 2), (1337, EVALUATION, 0, 2), dict(without_replacement=True)),
    (('val', 0), (1337, EVALUATION, 1, 0), dict()),
], ids=str)
def test_windows_are_a_function_of_the_seed_and_their_number(trainer, arguments, key, settings):
    """ Key: the seed; TRAINING and the iteration, or EVALUATION and the split; the batch. """
    names = trainer(**settings)
    ids = names['data'][arguments[0]]
    starts = np.random.default_rng(key).integers(len(ids) - 16, size=4)
    x, y = names['get_batch'](*arguments)
    assert x.tolist() == windows_of(ids, starts)
    assert y.tolist() == windows_of(ids, starts + 1)
    assert x.dtype == y.dtype == torch.int64


def test_windows_without_replacement(trainer):
    """ The windows of consecutive micro-batches follow each other in the order of an epoch. """
    names = trainer(without_replacement=True, batch_size=2, gradient_accumulation_steps=2)
    x = [names['get_batch']('train', index, iter_num)[0]
         for iter_num in range(93) for index in (0, 1)]
    starts = epoch_starts(6000, 16, 372, 0, (1337, EPOCH))
    assert torch.cat(x).tolist() == windows_of(names['data']['train'], starts)


@pytest.mark.parametrize('num_tokens, num_windows', [(97, 6), (96, 5), (17, 1)])
def test_adjacent_windows(trainer, num_tokens, num_windows):
    """ The last one has a target; the loss ignores the rows after it. """
    names = trainer(eval_iters=-1)
    ids = names['data']['val'] = names['data']['val'][:num_tokens]
    batches = [names['get_batch']('val', index)[1] for index in (0, 1)]
    targets = torch.cat(batches).tolist()
    expected = windows_of(ids, [16 * number + 1 for number in range(num_windows)])
    assert targets == expected + [[-1] * 16] * (8 - num_windows)

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def mean_loss(names, split, starts):
    """ The mean loss of windows, one by one. """
    model = names['raw_model'].eval()
    losses = []
    for start in starts:
        window = torch.from_numpy(names['data'][split][start:start + 17].astype(np.int64))[None]
        losses.append(model(window[:, :-1], window[:, 1:])[1].item())
    model.train()
    return np.mean(losses)


@pytest.mark.parametrize('split, number', [('train', 0), ('val', 1)])
def test_evaluation_equals_a_loop_over_windows(trainer, split, number):
    names = trainer(eval_iters=3)
    starts = []
    for index in range(3):
        rng = np.random.default_rng((1337, EVALUATION, number, index))
        starts += rng.integers(len(names['data'][split]) - 16, size=4).tolist()
    expected = mean_loss(names, split, starts)
    assert names['estimate_loss']()[split] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_evaluation_of_the_whole_split_equals_a_loop_over_windows(trainer, split):
    """ Of the training split as many windows are evaluated as the validation split has. """
    names = trainer(eval_iters=-1, batch_size=7)
    num_windows = (len(names['data']['val']) - 1) // 16
    assert num_windows % 7 != 0  # the last batch has rows without a window
    expected = mean_loss(names, split, range(0, 16 * num_windows, 16))
    assert names['estimate_loss']()[split] == pytest.approx(expected, abs=1e-5)


def test_dropout_is_off_in_an_evaluation_alone(trainer):
    names = trainer(dropout=0.5)
    assert names['estimate_loss']() == trainer()['estimate_loss']()
    assert names['raw_model'].training


def test_evaluation_of_another_split(trainer, dataset, tmp_path, capsys):
    shutil.copy(dataset / 'meta.pkl', tmp_path)
    shutil.copy(dataset / 'train.bin', tmp_path)
    shutil.copy(dataset / 'val.bin', tmp_path / 'test.bin')
    val_loss = trainer()['estimate_loss']()['val']
    losses = trainer(dataset=tmp_path, eval_split='test', eval_only=True)['losses']
    assert losses['test'] == val_loss
    assert f'test loss {val_loss:.4f}' in capsys.readouterr().out

# -----------------------------------------------------------------------------
# learning rate

@pytest.mark.parametrize('settings, lrs', [
    (dict(), {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 5: 0.1 + 0.45 * (1 + math.cos(math.pi / 8)),
              8: 0.55, 12: 0.1, 13: 0.1, 10**6: 0.1}),
    (dict(warmup_iters=0), {0: 1.0, 6: 0.55, 12: 0.1}),
    (dict(lr_decay_iters=4), {3: 0.8, 4: 0.1, 5: 0.1}),
    (dict(decay_lr=False), {0: 1.0, 5: 1.0, 99: 1.0}),
    (dict(cooldown_iters=6), {0: 0.2, 3: 0.8, 4: 1.0, 6: 1.0, 9: 0.55, 11: 0.25, 12: 0.1, 99: 0.1}),
    (dict(cooldown_iters=8), {3: 0.8, 4: 1.0, 8: 0.55, 12: 0.1}),  # right after warmup
], ids=str)
def test_learning_rates(trainer, settings, lrs):
    """ A warmup of 4 iterations to 1.0, and a decay to 0.1 at iteration 12. """
    names = trainer(**{**dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12),
                       **settings})
    assert {it: names['get_lr'](it) for it in lrs} == pytest.approx(lrs)


def test_update_with_the_lr_of_its_iteration(trainer):
    """ AdamW's first update is the learning rate times the sign of the gradient. """
    names = trainer(max_iters=1, warmup_iters=4, weight_decay=0.0, grad_clip=0.0)
    initial_model = trainer()['raw_model']
    for p, initial in zip(names['raw_model'].parameters(), initial_model.parameters()):
        assert (p - initial).abs().max().item() == pytest.approx(0.01 / 5, rel=0.01)


# -----------------------------------------------------------------------------
# updates

def test_gradient_accumulation_equals_one_large_batch(trainer):
    """ After one update, AdamW's first moment is (1 - beta1) times the gradient. """
    names = trainer(gradient_accumulation_steps=3, max_iters=1, grad_clip=0.0)
    batches = [names['get_batch']('train', index, 0) for index in range(3)]
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    initial_model = trainer()['raw_model']  # the seed gives the same initial weights
    _, loss = initial_model(x, y)
    loss.backward()
    assert names['lossf'] == pytest.approx(loss.item(), abs=1e-6)
    for moment, p in zip(moments(names), initial_model.parameters(), strict=True):
        torch.testing.assert_close(moment / (1 - names['beta1']), p.grad, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_to_their_norm(trainer):
    free = trainer(max_iters=1, grad_clip=0.0)
    clipped = trainer(max_iters=1, grad_clip=0.01)
    norm = math.sqrt(sum((moment / 0.1).square().sum().item() for moment in moments(free)))
    assert norm > 0.1
    assert free['grad_norm'].item() == pytest.approx(norm, rel=1e-4)
    assert clipped['grad_norm'] == free['grad_norm']
    for clipped_moment, moment in zip(moments(clipped), moments(free), strict=True):
        torch.testing.assert_close(clipped_moment, moment * 0.01 / norm, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize('dtype, scale', [('float16', 65536.0), ('bfloat16', 1.0)])
def test_16_bits_follow_float32(trainer, dtype, scale):
    """ Gradients are clipped hard, which would show if float16's were not unscaled before. """
    settings = dict(max_iters=20, grad_clip=0.1)
    names = trainer(dtype=dtype, **settings)
    reference = trainer(dtype='float32', **settings)
    assert names['scaler'].is_enabled() == (dtype == 'float16')
    assert names['scaler'].get_scale() == scale  # no overflow was found
    assert names['lossf'] == pytest.approx(reference['lossf'], abs=0.02)
    assert names['lossf'] != reference['lossf']
    moment = moments(names)[0]
    reference_moment = moments(reference)[0]
    assert (moment - reference_moment).norm() < 0.1 * reference_moment.norm()


def test_dropout_is_a_function_of_seed_iteration_and_index(trainer):
    """ The loss of the last iteration, 101, is computed again. An evaluation came before it. """
    names = trainer(max_iters=102, dropout=0.5, gradient_accumulation_steps=2, decay_lr=False,
                    learning_rate=0.0, eval_interval=101)
    losses = []
    for index in range(2):
        dropout_seed = np.random.default_rng((1337, DROPOUT, 101, index)).integers(2**63)
        torch.manual_seed(int(dropout_seed))
        _, loss = names['raw_model'](*names['get_batch']('train', index, 101))
        losses.append(loss.item())
    assert names['lossf'] == pytest.approx(np.mean(losses), abs=1e-6)
    assert losses[0] != losses[1]

# -----------------------------------------------------------------------------
# a run

TRANSCRIPT = """\
tokens per iteration will be: 64
number of parameters: 0.01M
GPTConfig(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=False, \
gelu='exact', rotary=False, rope_base=10000, rmsnorm=False, qk_norm=False, untied=False)
device: cpu, float32, not compiled, 1 process, AdamW
mfu is measured against * TFLOP/s, from a measured matrix product
NOTE: the learning rate decays until lr_decay_iters=20, and training ends at max_iters=12; \
--lr_decay_iters=12 completes the decay
12 iterations: 768 tokens, 0.128 epochs, about * at an mfu of 30%, plus evaluations
checkpoints and log.csv go to out
step 0: train loss 2.5249, val loss 2.5100
iter 0: loss 2.5277, time *ms, mfu -100.00%, * tokens/s, * left, grad norm 1.1339
iter 3: loss 2.3583, time *ms, mfu -100.00%, * tokens/s, * left, grad norm 1.2986
step 5: train loss 2.2442, val loss 2.2543
saving checkpoint to out
iter 6: loss 2.2118, time *ms, mfu *%, * tokens/s, * left, grad norm 1.5120
iter 9: loss 2.0784, time *ms, mfu *%, * tokens/s, * left, grad norm 1.8995
step 10: train loss 2.0448, val loss 2.0361
saving checkpoint to out
step 12: train loss 1.9881, val loss 1.9744
saving checkpoint to out
12 iterations in *, best val loss 1.9744 at step 12; try: python sample.py --out_dir=out
"""


def without_times(out):
    """ The lines of a run, with times as *. """
    for pattern in (r'\d+\.\d\d(?=ms)', r'(?<=mfu )\d+\.\d\d', r'[\d,]+(?= tokens/s)',
                    r'\d+\.\d\d(?= TFLOP/s)', r'\d:\d\d:\d\d'):
        out = re.sub(pattern, '*', out)
    return out


@pytest.mark.slow
def test_transcript_of_a_run(tmp_path, dataset):
    """ Losses and norms may differ in the last digits on another machine. """
    _, _, out = train(tmp_path, dataset, max_iters=12, eval_interval=5, log_interval=3,
                      always_save_checkpoint=False)
    number = r'\d\.\d{4}'
    out = without_times(out[out.index('tokens per iteration'):])
    assert re.sub(number, '#', out) == re.sub(number, '#', TRANSCRIPT)
    values, expected = [[float(text) for text in re.findall(number, lines)]
                        for lines in (out, TRANSCRIPT)]
    assert values == pytest.approx(expected, abs=2e-3)

    checkpoint = read_checkpoint(tmp_path / 'out/ckpt_last.pt')
    expected = dict(iter_num=12, tokens=12 * 4 * 16, best_val_iter=12, best_val_loss=values[-1])
    assert {key: checkpoint[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert {int(state['step']) for state in checkpoint['optimizer']['state'].values()} == {12}
    assert sorted(checkpoint['model_args']) == NANOGPT_MODEL_ARGS
    assert checkpoint['config']['backend'] == 'gloo'  # what auto selected
    assert checkpoint['tokenizer']['kind'] == 'char'

    with open(tmp_path / 'out/log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [int(row['iter']) for row in rows] == [0, 3, 5, 6, 9, 10, 12]
    assert float(rows[-1]['loss']) == pytest.approx(checkpoint['loss'], rel=1e-5)


def test_dataset_without_meta_has_the_vocabulary_of_gpt2(trainer, dataset, tmp_path):
    shutil.copy(dataset / 'train.bin', tmp_path)
    shutil.copy(dataset / 'val.bin', tmp_path)
    model = trainer(dataset=tmp_path)['raw_model']
    assert model.config.vocab_size == 50304  # padded, as in nanoGPT's checkpoints


def test_initial_weights_are_a_function_of_the_seed(trainer):
    weights = trainer()['raw_model'].lm_head.weight
    assert torch.equal(trainer()['raw_model'].lm_head.weight, weights)
    assert not torch.equal(trainer(seed=1)['raw_model'].lm_head.weight, weights)


@pytest.mark.parametrize('settings, num_saves', [
    (dict(max_iters=0), 0),
    (dict(max_iters=15, eval_interval=10), 2),
    (dict(max_iters=15, eval_interval=0, checkpoint_interval=7), 3),
    (dict(max_iters=15, eval_interval=10, checkpoint_interval=5), 3),
], ids=str)
def test_saves_of_a_run(trainer, capsys, settings, num_saves):
    """ After evaluations, every checkpoint_interval, and at the end. """
    trainer(**settings)
    assert capsys.readouterr().out.count('saving checkpoint') == num_saves


def test_run_on_a_full_disk(trainer, tmp_path, capsys, limit_file_size):
    """ Training continues, and the older checkpoint stays. """
    trainer(max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    limit_file_size(10_000)
    with pytest.raises(SystemExit) as stopped:
        trainer(max_iters=20, init_from='resume')
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert 'iter 19:' in out
    assert 'NOT SAVED' in out.splitlines()[-1]
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before


def test_early_stopping(trainer, tmp_path, capsys):
    """ A learning rate of 3 makes the model worse; the run is not resumed past its end, either. """
    settings = dict(max_iters=20, eval_interval=2, early_stopping=3, learning_rate=3.0, min_lr=3.0,
                    warmup_iters=0, always_save_checkpoint=False)
    progress = trainer(**settings)['progress']
    assert progress.iter_num == progress.best_val_iter + 6 < 20
    assert read_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] == progress.iter_num
    resumed = trainer(**settings, init_from='resume')
    assert resumed['iter_num'] == progress.iter_num
    assert 'nothing to do' in capsys.readouterr().out

# -----------------------------------------------------------------------------
# eval_only

def test_eval_only_writes_nothing(trainer, tmp_path, capsys):
    trainer(eval_only=True, max_iters=20)
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert 'step 0: train loss' in out
    assert 'iter 0' not in out


def test_eval_only_of_the_best_checkpoint(trainer, tmp_path):
    settings = dict(always_save_checkpoint=False, dropout=0.1)
    best = trainer(max_iters=10, **settings)['val_loss']
    latest = trainer(max_iters=12, init_from='resume', decay_lr=False, learning_rate=10.0,
                     **settings)['val_loss']
    assert latest > best + 0.5
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    assert trainer(eval_only=True, init_from='resume', **settings)['val_loss'] == best
    assert {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before

# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize('settings', [
    pytest.param(dict(dropout=0.2, gradient_accumulation_steps=3), id='float32'),
    pytest.param(dict(FAST, dtype='float16', dropout=0.1), id='float16'),
    pytest.param(dict(FAST, dtype='bfloat16', always_save_checkpoint=False), id='fast'),
    pytest.param(dict(without_replacement=True, dropout=0.2), id='epochs'),
])
def test_resume_is_bit_identical(trainer, tmp_path, capsys, settings):
    trainer(max_iters=20, out_dir='uninterrupted', **settings)
    trainer(max_iters=10, init_from='auto', **settings)
    assert 'init_from=auto: scratch' in capsys.readouterr().out
    trainer(max_iters=20, init_from='auto', **settings)
    out = capsys.readouterr().out
    assert 'init_from=auto: resume' in out
    assert re.findall(r'^iter (\d+)', out, re.MULTILINE) == [str(it) for it in range(10, 20)]
    assert differences(tmp_path / 'out', tmp_path / 'uninterrupted') == []


def to_nanogpt(checkpoint):
    """ A checkpoint as nanoGPT wrote it: prefixed keys, a causal mask, and no keys of ours. """
    old = {key: checkpoint[key] for key in ('optimizer', 'model_args', 'iter_num', 'config')}
    old['model'] = {f'_orig_mod.{key}': value for key, value in checkpoint['model'].items()}
    old['model']['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    old['best_val_loss'] = torch.tensor(checkpoint['best_val_loss'])
    for group in old['optimizer']['param_groups']:
        group['fused'] = None
        del group['lr_scale']
    return old


def to_a6ae721(checkpoint):
    """ A checkpoint as this repository wrote it before. """
    old = {**checkpoint, 'evaluated_iter': checkpoint['iter_num'], 'num_evals_without_best': 0}
    del old['val_loss']
    return old


@pytest.mark.parametrize('convert, has_last', [
    (to_nanogpt, False), (to_a6ae721, False), (to_a6ae721, True)])
def test_resume_of_old_folders_is_bit_identical(trainer, tmp_path, convert, has_last):
    settings = dict(eval_interval=5, always_save_checkpoint=False)
    out = tmp_path / 'out'
    trainer(max_iters=20, out_dir='uninterrupted', **settings)
    trainer(max_iters=5, **settings)
    best = convert(read_checkpoint(out / 'ckpt.pt'))
    trainer(max_iters=10, init_from='resume', **settings)
    last = convert(read_checkpoint(out / 'ckpt_last.pt'))
    for path in out.glob('*.pt'):  # they are links
        path.unlink()
    if has_last:
        torch.save(best, out / 'ckpt.pt')
        torch.save(last, out / 'ckpt_last.pt')
    else:
        torch.save(last, out / 'ckpt.pt')
    trainer(max_iters=20, init_from='resume', **settings)
    for name in ('ckpt.pt', 'ckpt_last.pt'):
        assert checkpoint_differences(out / name, tmp_path / 'uninterrupted' / name) == []


def test_resume_uses_the_settings_of_the_command_line(trainer):
    trainer(max_iters=20)
    names = trainer(init_from='resume', beta2=0.5, weight_decay=0.03, dropout=0.3, eval_only=True)
    decayed, not_decayed = names['optimizers']['optimizer'].param_groups
    assert decayed['betas'] == (0.9, 0.5)
    assert (decayed['weight_decay'], not_decayed['weight_decay']) == (0.03, 0.0)
    assert names['raw_model'].config.dropout == 0.3
    assert {int(step) for step in moments(names, 'step')} == {20}


def test_resume_with_a_smaller_block_size(trainer, tmp_path):
    trainer(max_iters=20)
    before = read_checkpoint(tmp_path / 'out/ckpt.pt')
    trainer(max_iters=21, init_from='resume', block_size=8, learning_rate=0.0, min_lr=0.0)
    after = read_checkpoint(tmp_path / 'out/ckpt.pt')
    key = 'transformer.wpe.weight'
    assert after['model_args']['block_size'] == 8
    torch.testing.assert_close(after['model'][key], before['model'][key][:8])
    assert after['optimizer']['state'][1]['exp_avg'].shape == (8, 16)


def test_start_from_a_checkpoint_file_uses_its_weights_alone(trainer, tmp_path, capsys):
    val_loss = trainer(max_iters=20)['val_loss']
    capsys.readouterr()
    trainer(init_from='out/ckpt.pt', out_dir='new', max_iters=3)
    out = capsys.readouterr().out
    assert f'val loss {val_loss:.4f}' in re.search('step 0: .*', out)[0]
    assert re.findall(r'^iter (\d+)', out, re.MULTILINE) == ['0', '1', '2']
    optimizer = read_checkpoint(tmp_path / 'new/ckpt.pt')['optimizer']
    assert {int(state['step']) for state in optimizer['state'].values()} == {3}

# -----------------------------------------------------------------------------
# the settings of the _fast configs

def test_run_of_the_fast_settings(trainer, tmp_path):
    trainer(max_iters=12, dtype='bfloat16', **FAST)
    checkpoint = read_checkpoint(tmp_path / 'out/ckpt.pt')
    weights = checkpoint['model']
    assert 'transformer.wpe.weight' not in weights
    assert not torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight'])
    # a reader that does not know these has to fail
    args = set(checkpoint['model_args']) - set(NANOGPT_MODEL_ARGS)
    assert args == {'rotary', 'rmsnorm', 'qk_norm', 'untied'}
    assert len(checkpoint['optimizer']['state']) == 2  # token embedding and lm_head
    assert len(checkpoint['muon']['state']) == 8  # 4 matrices in each of 2 blocks
    # at iteration 12, 8 of 10 iterations of the cooldown are left
    (adamw_group, _), (muon_group,) = [
        checkpoint[name]['param_groups'] for name in ('optimizer', 'muon')]
    assert adamw_group['lr'] == pytest.approx(0.0082)
    assert muon_group['lr'] == pytest.approx(0.02 * 0.82)

    in_float32 = trainer(eval_only=True, init_from='out/ckpt.pt')
    assert in_float32['val_loss'] == pytest.approx(checkpoint['best_val_loss'], abs=0.02)
    with pytest.raises(SystemExit, match='muon_lr'):
        trainer(init_from='resume', max_iters=20)

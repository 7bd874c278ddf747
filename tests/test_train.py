""" Training: the schedule, the gradients, resuming, many processes. Real runs of the real script. """
import csv
import itertools
import math
import re
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CLASSIC_MODEL_ARGS, ROOT, SMALL, run, train
from faults import differences

import checkpoint as checkpoint_module
import machine
from checkpoint import load_checkpoint

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02,
              cooldown_iters=10, dtype='bfloat16')


def test_the_defaults_are_those_of_nanogpt():
    names = {'__name__': 'train', '__file__': str(ROOT / 'train.py')}
    exec((ROOT / 'train.py').read_text().split('\nexec(')[0], names)  # down to the last setting
    theirs = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
        wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
        block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4,
        max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
        warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5)
    assert {key: names[key] for key in theirs} == theirs
    new = dict(rotary=False, rmsnorm=False, qk_norm=False, untied=False, muon_lr=0.0, cooldown_iters=0)
    assert {key: names[key] for key in new} == new  # what would make another model is off


# -----------------------------------------------------------------------------
# the schedule, the batches

@pytest.fixture
def trainer(script_globals, dataset):
    """ trainer(...) runs train.py, by default without an update -> its variables and functions. """
    return lambda **settings: script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 0,
                                                            **settings})


def test_learning_rate_at_its_corners(trainer):
    names = trainer()
    get_lr = names['get_lr']

    def rates(its, **settings):
        names.update({**dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12,
                             decay_lr=True), **settings})
        return [get_lr(it) for it in its]

    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 1 / 8)) / 2
    assert rates([0, 1, 3, 4, 5, 8]) == pytest.approx([0.2, 0.4, 0.8, 1.0, middle, 0.55])
    assert rates([12, 13, 10**6]) == [0.1, 0.1, 0.1]
    assert rates([0, 6, 12], warmup_iters=0) == pytest.approx([1.0, 0.55, 0.1])
    assert rates([3, 4, 5], lr_decay_iters=4) == pytest.approx([0.8, 0.1, 0.1])
    assert rates([0, 5, 99], decay_lr=False) == [1.0, 1.0, 1.0]
    line = dict(cooldown_iters=6)
    assert rates([0, 3, 4, 6, 9, 11, 12, 99], **line) == pytest.approx([0.2, 0.8, 1, 1, 0.55, 0.25, 0.1, 0.1])
    assert rates([4, 8, 12], cooldown_iters=8) == pytest.approx([1.0, 0.55, 0.1])


def test_a_rise_and_a_line_may_leave_nothing_between_them(trainer):
    get_lr = trainer(warmup_iters=8, cooldown_iters=12)['get_lr']  # 20 in all
    assert [get_lr(7), get_lr(8), get_lr(14), get_lr(20)] == pytest.approx([8e-2 / 9, 1e-2, 5.5e-3, 1e-3])


def test_a_batch_is_a_function_of_seed_iteration_and_index(trainer):
    names = trainer()
    get_batch = names['get_batch']
    x, y = get_batch('train', 3, 7)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    before = torch.get_rng_state()
    assert torch.equal(get_batch('train', 3, 7)[0], x)
    assert torch.equal(torch.get_rng_state(), before)  # dropout's generator is left alone
    for other in (('train', 2, 7), ('train', 3, 8), ('train', 3, 107), ('train', 3), ('val', 3, 7)):
        assert not torch.equal(get_batch(*other)[0], x)
    starts = np.random.default_rng((1337, 0, 1, 3)).integers(6000 - 16, size=(100, 4))[7]
    ids = names['data']['train']
    assert get_batch('train', 3, 107)[1].tolist() == [ids[start + 1:start + 17].tolist() for start in starts]
    assert x.is_contiguous() and y.is_contiguous()
    names['seed'] = 1
    names['draw'].cache_clear()
    assert not torch.equal(get_batch('train', 3, 7)[0], x)


def test_whole_validation_split_against_a_plain_loop(trainer, dataset):
    names = trainer(eval_iters=-1, batch_size=7)
    model = names['raw_model'].eval()
    for split, mean in names['estimate_loss']().items():
        ids = torch.from_numpy(np.fromfile(dataset / f'{split}.bin', dtype=np.uint16).astype(np.int64))
        whole = (len(np.fromfile(dataset / 'val.bin', dtype=np.uint16)) - 1) // 16
        assert whole % 7  # the last batch is not full
        with torch.no_grad():
            losses = [model(ids[None, i:i + 16], ids[None, i + 1:i + 17])[1].item()
                      for i in range(0, 16 * whole, 16)]
        assert mean == pytest.approx(sum(losses) / whole, abs=1e-5)


def test_each_batch_of_an_evaluation_has_windows_of_its_own(trainer):
    names = trainer()
    for split, of in (('train', 0), ('val', 1)):
        ids = names['data'][split]
        for index in range(3):
            starts = np.random.default_rng((1337, 1, of, index)).integers(len(ids) - 16, size=4)
            assert names['get_batch'](split, index)[0].tolist() == [ids[s:s + 16].tolist() for s in starts]


def test_dropout_is_off_in_an_evaluation(trainer):
    assert trainer(dropout=0.5)['estimate_loss']() == trainer()['estimate_loss']()


def test_the_last_whole_window_has_a_target(trainer):
    names = trainer(eval_iters=-1)
    names['data']['val'] = names['data']['val'][:65]
    assert names['count_windows']('val') == 4 and math.isfinite(names['estimate_loss']()['val'])
    names['data']['val'] = names['data']['val'][:64]
    assert names['count_windows']('val') == 3


def test_a_dataset_without_a_meta_pkl_is_gpt2s(trainer, dataset, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / f'{split}.bin').write_bytes((dataset / f'{split}.bin').read_bytes())
    model = trainer(dataset=tmp_path)['raw_model']
    assert model.config.vocab_size == 50304  # as nanoGPT has it, so that its checkpoints fit


# -----------------------------------------------------------------------------
# what a run does

def test_a_run_learns_updates_max_iters_times_and_ends_with_an_evaluation_and_a_save(tmp_path, dataset):
    iters, steps, out = train(tmp_path, dataset, max_iters=25)
    assert list(iters) == list(range(25)) and list(steps) == [0, 10, 20, 25]
    assert steps[25][1] < steps[0][1] - 0.5
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert checkpoint['iter_num'] == 25
    assert {int(s['step']) for s in checkpoint['optimizer']['state'].values()} == {25}
    assert checkpoint['best_val_loss'] == pytest.approx(min(val for _, val in steps.values()), abs=1e-4)
    assert sorted(checkpoint['model_args']) == CLASSIC_MODEL_ARGS
    assert checkpoint['config']['device'] == 'cpu' and checkpoint['config']['backend'] == 'gloo'  # resolved
    assert 'tokens per iteration will be: 64\n' in out and 'saving checkpoint to out\n' in out
    assert 'mfu -100.00%, ' in out.split('iter 4:')[1].split('\n')[0]
    assert 'mfu -100.00%, ' not in out.split('iter 5:')[1].split('\n')[0]


def test_only_the_best_is_kept_without_always_save_checkpoint(tmp_path, dataset):
    settings = dict(always_save_checkpoint=False, eval_interval=5)
    _, steps, _ = train(tmp_path, dataset, **settings)
    _, later, _ = train(tmp_path, dataset, **settings, max_iters=40, init_from='resume', decay_lr=False,
                        learning_rate=10.0)  # so high that the loss goes up again
    steps.update(later)
    best = min(val for _, val in steps.values())
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert steps[checkpoint['iter_num']][1] == best < steps[40][1] - 0.5
    _, again, _ = train(tmp_path, dataset, init_from='resume', eval_only=True, max_iters=40)
    assert again[checkpoint['iter_num']] == steps[checkpoint['iter_num']]


def test_how_often_a_run_saves(tmp_path, dataset):
    settings = dict(checkpoint_interval=7, eval_interval=0)
    _, _, out = train(tmp_path, dataset, **settings, max_iters=14)
    assert out.count('saving checkpoint to') == 2  # at 7 and 14, not before anything was learned
    _, _, out = train(tmp_path, dataset, **settings, max_iters=15, init_from='resume')
    assert out.count('saving checkpoint to') == 1


def test_a_run_that_only_got_worse_has_no_best_model(tmp_path, dataset):
    train(tmp_path, dataset)
    _, _, out = train(tmp_path, dataset, init_from='out/ckpt.pt', out_dir='worse', decay_lr=False,
                      learning_rate=1.0, always_save_checkpoint=False, max_iters=3)
    assert 'sample.py --out_dir=worse' in out
    assert [path.name for path in (tmp_path / 'worse').glob('*.pt*')] == ['ckpt_last.pt']
    run('sample.py', cwd=tmp_path, out_dir='worse', num_samples=1, max_new_tokens=4)


def test_a_model_without_a_loss_does_not_replace_one_that_had_one(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    _, steps, _ = train(tmp_path, dataset, init_from='resume', decay_lr=False, learning_rate=1e30)
    assert math.isnan(steps[20][1]) and (tmp_path / 'out/ckpt.pt').read_bytes() == before


def test_the_clock_stops_while_a_checkpoint_is_saved(trainer, monkeypatch, capsys):
    """ On a clock that ticks a millisecond at each look, and half an hour while saving. """
    clock = [0.0]

    def look():
        clock[0] += 0.001
        return clock[0]

    def save(*args, **kwargs):
        clock[0] += 1800

    trainer()  # what measures the peak has done so
    monkeypatch.setattr(time, 'perf_counter', look)
    monkeypatch.setattr(checkpoint_module, 'save_checkpoint', save)
    trainer(max_iters=24, eval_interval=6, log_interval=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('iter ')]
    assert len(lines) == 6 and clock[0] > 4 * 1800
    for line, iterations in zip(lines, (1, 4, 4, 4, 4, 4)):
        seconds = float(line.split('time ')[1].split('ms')[0]) / 1000
        assert 0.001 / iterations - 1e-5 <= seconds <= 0.002
        assert '0:00:00 left, grad norm ' in line
        tokens = float(line.split('%, ')[1].split(' tokens/s')[0].replace(',', ''))
        assert tokens == pytest.approx(64 / seconds, rel=0.02)


def test_the_time_that_is_left(trainer, monkeypatch, capsys):
    """ On a clock that ticks ten seconds at each look. """
    trainer()  # what measures the peak has done so
    clock = itertools.count(0, 10)
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(clock)))
    trainer(max_iters=8, eval_interval=0, log_interval=2)
    lines = re.findall(r'iter (\d+): .*time (\S+)ms.* (\d+):(\d\d):(\d\d) left', capsys.readouterr().out)
    assert [int(line[0]) for line in lines] == [0, 2, 4, 6]
    for it, each, hours, minutes, seconds in lines:
        left = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        assert left == round(float(each) / 1000 * (8 - int(it) - 1))  # of those after this one


def test_eval_only_writes_nothing(tmp_path, dataset):
    iters, steps, _ = train(tmp_path, dataset, eval_only=True)
    assert not iters and list(steps) == [0]
    assert not list(tmp_path.iterdir())
    train(tmp_path, dataset, max_iters=7, dropout=0.1)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    iters, steps, _ = train(tmp_path, dataset, eval_only=True, init_from='resume')
    assert not iters and list(steps) == [7]
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    (tmp_path / 'out/ckpt.pt').rename(tmp_path / 'out/ckpt_last.pt')  # a run without a best one
    again, _, _ = train(tmp_path, dataset, eval_only=True, init_from='auto')
    assert not again and train(tmp_path, dataset, eval_only=True, init_from='auto')[1] == steps


@pytest.mark.parametrize('extra', [
    dict(dropout=0.2, gradient_accumulation_steps=3), {**RECIPE, 'dtype': 'float16', 'dropout': 0.1}, RECIPE],
    ids=['float32', 'float16', 'recipe'])
def test_resume_equals_no_interruption_bit_for_bit(tmp_path, dataset, extra):
    whole, _, _ = train(tmp_path, dataset, out_dir='whole', **extra)
    first, _, _ = train(tmp_path, dataset, out_dir='parts', **{**extra, 'max_iters': 10})
    rest, _, out = train(tmp_path, dataset, out_dir='parts', init_from='auto', **extra)
    assert 'init_from=auto: resume' in out and {**first, **rest} == whole and min(rest) == 10
    assert not differences(tmp_path / 'whole', tmp_path / 'parts')
    if extra.get('dtype') == 'float16':
        scaler = torch.load(tmp_path / 'parts/ckpt.pt', weights_only=True)['scaler']
        assert scaler['scale'] > 1  # it was on


def test_accumulation_equals_one_large_batch(trainer):
    """ After one update AdamW's first moment is (1 - beta1) times the gradient that train.py came to. """
    names = trainer(gradient_accumulation_steps=3, max_iters=1, grad_clip=0.0)
    micro_batches = [names['get_batch']('train', index, 0) for index in range(3)]
    x, y = (torch.cat(parts) for parts in zip(*micro_batches))
    untouched = trainer()['raw_model']  # the seed gives the same initial weights
    _, loss = untouched(x, y)
    loss.backward()
    assert names['lossf'] == pytest.approx(loss.item(), abs=1e-6)
    for p, fresh in zip(names['raw_model'].parameters(), untouched.parameters()):
        moment = names['optimizers'][0].state[p]['exp_avg']
        torch.testing.assert_close(moment / (1 - names['beta1']), fresh.grad, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_by_their_norm(trainer):
    free, clipped = (trainer(max_iters=1, grad_clip=clip) for clip in (0.0, 0.01))
    moments = [[names['optimizers'][0].state[p]['exp_avg'] for p in names['raw_model'].parameters()]
               for names in (free, clipped)]
    norm = math.sqrt(sum((m / 0.1).square().sum().item() for m in moments[0]))
    assert norm > 0.1 and free['normf'] == clipped['normf'] == pytest.approx(norm, rel=1e-4)
    for m, c in zip(*moments):
        torch.testing.assert_close(c, m * 0.01 / norm, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_16_bits_follow_float32(trainer, dtype):
    """ Clipped hard, so that gradients that a scaler has multiplied and not divided would show. """
    settings = dict(max_iters=20, grad_clip=0.1)
    names, reference = trainer(dtype=dtype, **settings), trainer(dtype='float32', **settings)
    assert names['scaler'].is_enabled() == (dtype == 'float16')
    assert names['scaler'].get_scale() == (65536.0 if dtype == 'float16' else 1.0)  # no overflow was found
    assert names['lossf'] == pytest.approx(reference['lossf'], abs=0.02)
    assert names['lossf'] != reference['lossf']
    p, q = names['raw_model'].lm_head.weight, reference['raw_model'].lm_head.weight
    moments = names['optimizers'][0].state[p]['exp_avg'], reference['optimizers'][0].state[q]['exp_avg']
    assert (moments[0] - moments[1]).norm() < 0.1 * moments[1].norm()


def test_the_optimizer_steps_with_the_rate_of_its_iteration(trainer):
    names = trainer(max_iters=1, warmup_iters=4, weight_decay=0.0, grad_clip=0.0)
    for p, fresh in zip(names['raw_model'].parameters(), trainer()['raw_model'].parameters()):
        step = (p - fresh).abs().max().item()  # AdamW's first step is the rate times the sign
        assert step == pytest.approx(0.01 / 5, rel=0.01)
    names = trainer(max_iters=6, warmup_iters=4, lr_decay_iters=12)
    assert [g['lr'] for g in names['optimizers'][0].param_groups] == [names['get_lr'](6)] * 2
    assert names['get_lr'](6) not in (names['get_lr'](5), names['get_lr'](7), 1e-2)


def test_dropout_is_on_after_an_evaluation_and_a_function_of_iteration_and_micro_batch(trainer):
    names = trainer(max_iters=102, dropout=0.5, gradient_accumulation_steps=2, decay_lr=False,
                    learning_rate=0.0, eval_interval=101)
    model, expected = names['raw_model'], 0.0
    for index in range(2):
        torch.manual_seed(int(np.random.default_rng((1337, 2, 1, index)).integers(2**63, size=100)[1]))
        expected += model(*names['get_batch']('train', index, 101))[1].item() / 2
    assert model.training and names['lossf'] == pytest.approx(expected, abs=1e-6)
    names['estimate_loss']()
    assert model.training


def test_resume_takes_every_setting_of_the_optimizer_from_the_command_line(script_globals, tmp_path, dataset):
    train(tmp_path, dataset)
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'init_from': 'resume', 'beta2': 0.5,
                                          'weight_decay': 0.03, 'eval_only': True, 'dropout': 0.3})
    decay, rest = names['optimizers'][0].param_groups
    assert decay['betas'] == (0.9, 0.5) and (decay['weight_decay'], rest['weight_decay']) == (0.03, 0.0)
    assert names['raw_model'].config.dropout == 0.3
    assert all(state['step'] == 20 for state in names['optimizers'][0].state.values())


def test_resume_restores_the_scaler_and_the_best_loss(script_globals, tmp_path, dataset):
    settings = {**SMALL, 'dataset': dataset, 'dtype': 'float16', 'always_save_checkpoint': False}
    train(tmp_path, **{**settings, 'max_iters': 10})
    path = tmp_path / 'out/ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['scaler']['scale'] = 1024.0
    checkpoint['best_val_loss'] = 0.5
    torch.save(checkpoint, path)
    before = path.read_bytes()
    names = script_globals('train.py', **{**settings, 'init_from': 'resume', 'max_iters': 12})
    assert names['scaler'].get_scale() == 1024.0 and names['best_val_loss'] == 0.5
    assert path.read_bytes() == before  # not better than 0.5


def test_resume_with_a_smaller_block_crops_the_moments_too(tmp_path, dataset):
    train(tmp_path, dataset)
    before = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    train(tmp_path, dataset, init_from='resume', block_size=8, max_iters=21, learning_rate=0.0, min_lr=0.0)
    after = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert after['model_args']['block_size'] == 8
    key = 'transformer.wpe.weight'
    torch.testing.assert_close(after['model'][key], before['model'][key][:8])  # learning rate 0
    assert after['optimizer']['state'][1]['exp_avg'].shape == (8, 16)
    assert after['optimizer']['state'][1]['exp_avg'].untyped_storage().nbytes() == 8 * 16 * 4


def test_starting_from_a_checkpoint_file_takes_its_weights_alone(tmp_path, dataset):
    _, steps, _ = train(tmp_path, dataset)
    iters, again, _ = train(tmp_path, dataset, init_from='out/ckpt.pt', out_dir='out2', max_iters=3)
    assert list(iters) == [0, 1, 2] and again[0] == steps[20]
    assert {int(s['step']) for s in
            torch.load(tmp_path / 'out2/ckpt.pt', weights_only=True)['optimizer']['state'].values()} == {3}


def test_a_checkpoint_of_the_original_resumes(tmp_path, dataset):
    """ Prefixed keys, a tensor for best_val_loss, a mask buffer, no keys of ours. """
    whole, _, _ = train(tmp_path, dataset, out_dir='whole')
    train(tmp_path, dataset, max_iters=10)
    path = tmp_path / 'out/ckpt.pt'
    new = torch.load(path, weights_only=True)
    old = {key: new[key] for key in ('optimizer', 'model_args', 'iter_num', 'config')}
    old['model'] = {'_orig_mod.' + key: value for key, value in new['model'].items()}
    old['model']['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    old['best_val_loss'] = torch.tensor(new['best_val_loss'])
    for group in old['optimizer']['param_groups']:
        group['fused'] = None
    torch.save(old, path)
    rest, _, _ = train(tmp_path, dataset, init_from='resume')
    assert {**whole, **rest} == whole and min(rest) == 10
    out, _ = run('sample.py', cwd=tmp_path, num_samples=1, max_new_tokens=20, start='the')
    assert '---------------' in out


def test_fine_tuning_gpt2_keeps_its_gelu_in_a_key_of_its_own(tmp_path, dataset):
    import transformers
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=24, n_embd=16, n_layer=1, n_head=2))
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=1.0)  # far from 0, where the two forms of GELU differ
    hf.save_pretrained(tmp_path / 'hf')
    _, before, _ = train(tmp_path, dataset, init_from='hf', max_iters=3)  # block_size 16 of 24
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert checkpoint['gelu'] == 'tanh' and 'gelu' not in checkpoint['model_args']
    assert checkpoint['model_args']['block_size'] == 16 and checkpoint['model_args']['vocab_size'] == 50
    _, after, _ = train(tmp_path, dataset, init_from='resume', max_iters=3)
    assert after == {3: before[3]}
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['model_args']['gelu'] == 'tanh'


def test_a_checkpoint_of_the_recipe_says_so_loudly(tmp_path, dataset):
    """ Readers of the seven classic model_args must not take it for a GPT-2; its AdamW stays classic. """
    train(tmp_path, dataset, max_iters=12, **RECIPE)
    saved = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert set(saved['model_args']) - set(CLASSIC_MODEL_ARGS) == {'rotary', 'rmsnorm', 'qk_norm', 'untied'}
    assert 'transformer.wpe.weight' not in saved['model'] and 'lm_head.weight' in saved['model']
    moments = saved['optimizer']['state']
    assert {tuple(of) for of in moments.values()} == {('step', 'exp_avg', 'exp_avg_sq')}
    assert len(moments) == 2 and len(saved['muon']['state']) == 8
    rates = [group['lr'] for key in ('optimizer', 'muon') for group in saved[key]['param_groups']]
    assert rates == pytest.approx([0.0082, 0.0082, 0.02 * 0.82])  # 8 of 10 iterations before the lowest
    out, _ = run('sample.py', cwd=tmp_path, num_samples=1, max_new_tokens=30)
    assert out.count('-' * 15) == 1
    _, steps, _ = train(tmp_path, dataset, eval_only=True, init_from='out/ckpt.pt')
    assert steps[0][1] == pytest.approx(saved['best_val_loss'], abs=0.02)  # in float32 now
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset, 'init_from': 'resume'})
    assert 'was trained with Muon, and muon_lr' in error and error.count('\n') == 1


# -----------------------------------------------------------------------------
# many processes

@pytest.fixture(scope='module')
def single_process(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp('single')
    return train(folder, dataset, gradient_accumulation_steps=4, dropout=0.1, eval_iters=-1)


@pytest.mark.parametrize('processes', [2, 3, 4])  # three: uneven shares
def test_many_processes_give_the_losses_of_one(tmp_path, dataset, single_process, processes):
    iters, steps, out = train(tmp_path, dataset, processes=processes, gradient_accumulation_steps=4,
                              dropout=0.1, eval_iters=-1)
    assert f'{processes} processes over gloo' in out
    assert iters == pytest.approx(single_process[0], abs=1.01e-4) and len(iters) == 20  # printed digits
    for it, losses in single_process[1].items():
        assert steps[it] == pytest.approx(losses, abs=1.01e-4)


def test_resumed_by_another_number_of_processes(tmp_path, dataset, single_process):
    settings = dict(gradient_accumulation_steps=4, dropout=0.1, eval_iters=-1)
    first, _, _ = train(tmp_path, dataset, processes=2, max_iters=10, **settings)
    rest, steps, _ = train(tmp_path, dataset, processes=3, init_from='resume', **settings)
    assert {**first, **rest} == pytest.approx(single_process[0], abs=1.01e-4) and min(rest) == 10
    assert steps[20] == pytest.approx(single_process[1][20], abs=1.01e-4)


def test_three_processes_resume_bit_for_bit(tmp_path, dataset):
    settings = dict(gradient_accumulation_steps=3, processes=3, n_embd=32)
    train(tmp_path, dataset, **settings, out_dir='untouched')
    train(tmp_path, dataset, **settings, max_iters=10)
    job = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['job']
    train(tmp_path, dataset, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'untouched')
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('out', 'untouched'))
    assert len({job, a['job'], b['job'], ''}) == 4  # each start is a job of its own


def test_mfu_of_a_process_counts_its_own_share(trainer, monkeypatch, tmp_path):
    """ In this process, the first of two, as it believes. """
    def join(backend, rank, world_size, dtype):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return '', False
    trainer()  # what measures the peak has done so
    for key, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(machine, 'join_processes', join)
    monkeypatch.setattr(machine, 'leave', lambda code, ddp: dist.destroy_process_group())
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    names = trainer(max_iters=6, gradient_accumulation_steps=2, eval_interval=0)
    with open(tmp_path / 'out/log.csv', newline='') as f:
        speed = float(list(csv.DictReader(f))[5]['tokens_per_second'])  # of both
    expected = speed / 2 * names['raw_model'].flops_per_token(16) / names['peak']
    assert names['running_mfu'] == pytest.approx(expected, rel=1e-4)


def test_two_processes_with_the_recipe(tmp_path, dataset):
    settings = {**RECIPE, 'dtype': 'float32', 'gradient_accumulation_steps': 2}
    one, _, first = train(tmp_path, dataset, out_dir='one', **settings)
    two, _, second = train(tmp_path, dataset, out_dir='two', processes=2, **settings)
    assert two == pytest.approx(one, abs=1.01e-4)
    norms = [[float(norm) for norm in re.findall(r'grad norm (\S+)', out)] for out in (first, second)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-3) and len(norms[0]) == 20  # what grad_clip cuts


def test_more_processes_than_micro_batches_are_refused(tmp_path, dataset):
    _, error = run('train.py', cwd=tmp_path, processes=2, code=1, **{**SMALL, 'dataset': dataset})
    assert error.count('gradient_accumulation_steps=1 is less than the number of processes, 2') == 1


def test_half_of_torchruns_variables_are_one_line(tmp_path, dataset, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset})
    assert 'train.py: ' in error and 'WORLD_SIZE expected, but not set' in error and error.count('\n') == 1

"""
train.py: batches, evaluation, learning rate, updates, a run, resuming. (Several processes are in
test_distributed.py, skipped updates in test_monitor.py, time and log.csv in test_metrics.py.)

All tests run the script itself: `trainer` in this process, `train` in a new one.
"""
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSIC_MODEL_ARGS, ROOT, SMALL, run, train
from kill_and_resume import differences

from components import metrics
from components.dataset import shuffled_starts

RECIPE = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02,
              cooldown_iters=10, dtype='bfloat16')


@pytest.fixture
def trainer(script_globals, dataset, monkeypatch):
    """
    trainer(**settings) runs train.py in this process, by default without an update -> its global
    variables.
    """
    monkeypatch.setattr(metrics.Timer, 'PEAK_MEASUREMENTS', 1)  # one is enough here, and faster

    def execute(**settings):
        defaults = {**SMALL, 'dataset': dataset, 'max_iters': 0}
        return script_globals('train.py', **{**defaults, **settings})
    return execute


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def moments(names, key='exp_avg'):
    """ AdamW's moments of all parameters, in a list. `names` are train.py's global variables. """
    state = names['optimizers']['optimizer'].state
    return [state[p][key] for p in names['raw_model'].parameters()]

# -----------------------------------------------------------------------------
# settings

@pytest.fixture(scope='module')
def default_settings():
    """ The variables at the top of train.py, down to the last setting. """
    source, _, _ = (ROOT / 'train.py').read_text().partition('\nexec(')
    names = {}
    exec(source, names)
    return names


NANOGPT_SETTINGS = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
    wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5)
NEWER_SETTINGS = dict(
    rotary=False, rope_base=10000, rmsnorm=False, qk_norm=False, untied=False, muon_lr=0.0,
    cooldown_iters=0)
MACHINE_SETTINGS = dict(backend='auto', device='auto', dtype='auto', compile='auto')


@pytest.mark.parametrize('expected', [
    pytest.param(NANOGPT_SETTINGS, id='of nanoGPT'),
    pytest.param(NEWER_SETTINGS, id='newer ones are off'),
    pytest.param(MACHINE_SETTINGS, id='of the machine'),
])
def test_default_settings(default_settings, expected):
    assert {name: default_settings[name] for name in expected} == expected

# -----------------------------------------------------------------------------
# batches

def windows_of(ids, starts):
    """ The inputs of the windows of 16 tokens at `starts`, as lists. """
    return [ids[start:start + 16].tolist() for start in starts]


def test_batch_of_inputs_and_targets(trainer):
    x, y = trainer()['get_batch']('train', 3, 7)
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x.is_contiguous()
    assert y.is_contiguous()


def test_targets_follow_the_inputs(trainer):
    names = trainer()
    ids = names['data']['train']
    starts = np.random.default_rng((1337, 0, 7, 3)).integers(6000 - 16, size=4)
    _, y = names['get_batch']('train', 3, 7)
    assert y.tolist() == windows_of(ids, starts + 1)


@pytest.mark.parametrize('seed', [1337, 1])
def test_training_windows_are_a_function_of_seed_iteration_and_index(trainer, seed):
    names = trainer(seed=seed)
    starts = np.random.default_rng((seed, 0, 107, 3)).integers(6000 - 16, size=4)
    x, _ = names['get_batch']('train', 3, 107)
    assert x.tolist() == windows_of(names['data']['train'], starts)


@pytest.mark.parametrize('index', [0, 1, 2])
@pytest.mark.parametrize('split, number', [('train', 0), ('val', 1)])
def test_evaluation_windows_are_a_function_of_seed_split_and_index(trainer, split, number, index):
    names = trainer()
    ids = names['data'][split]
    starts = np.random.default_rng((1337, 1, number, index)).integers(len(ids) - 16, size=4)
    x, _ = names['get_batch'](split, index)
    assert x.tolist() == windows_of(ids, starts)


def test_windows_without_replacement(trainer):
    """ The windows of consecutive micro-batches follow each other in the order of an epoch. """
    settings = dict(without_replacement=True, batch_size=2, gradient_accumulation_steps=2)
    names = trainer(**settings)
    ids = names['data']['train']
    x = [names['get_batch']('train', index, iter_num)[0]
         for iter_num in range(93) for index in (0, 1)]
    starts = shuffled_starts(6000, 16, 0, 372, (1337, 3))
    assert torch.cat(x).tolist() == windows_of(ids, starts)


def test_evaluation_windows_do_not_depend_on_without_replacement(trainer):
    expected, _ = trainer()['get_batch']('train', 1)
    x, _ = trainer(without_replacement=True)['get_batch']('train', 1)
    assert torch.equal(x, expected)


def test_batch_is_the_same_every_time(trainer):
    get_batch = trainer()['get_batch']
    x, _ = get_batch('train', 3, 7)
    assert torch.equal(get_batch('train', 3, 7)[0], x)


@pytest.mark.parametrize('other', [
    pytest.param(('train', 2, 7), id='index'),
    pytest.param(('train', 3, 8), id='iteration'),
    pytest.param(('train', 3), id='evaluation'),
    pytest.param(('val', 3), id='split'),
])
def test_batches_differ(trainer, other):
    get_batch = trainer()['get_batch']
    x, _ = get_batch('train', 3, 7)
    assert not torch.equal(get_batch(*other)[0], x)


def test_batches_do_not_change_the_random_numbers_of_torch(trainer):
    """ Dropout uses these. """
    names = trainer()
    before = torch.get_rng_state()
    names['get_batch']('train', 3, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_shortest_split_has_one_window(trainer):
    names = trainer()
    names['data']['train'] = names['data']['train'][:17]
    _, y = names['get_batch']('train', 0, 0)
    assert y.tolist() == [names['data']['train'][1:].tolist()] * 4

# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def loss_of_window(names, split, start):
    """ The loss of one window, without a batch. """
    window = torch.from_numpy(names['data'][split][start:start + 17].astype(np.int64))
    _, loss = names['raw_model'].eval()(window[None, :-1], window[None, 1:])
    return loss.item()


@pytest.mark.parametrize('split, number', [('train', 0), ('val', 1)])
def test_evaluation_equals_a_loop_over_windows(trainer, split, number):
    names = trainer(eval_iters=3)
    losses = []
    for index in range(3):
        key = (1337, 1, number, index)
        starts = np.random.default_rng(key).integers(len(names['data'][split]) - 16, size=4)
        losses += [loss_of_window(names, split, start) for start in starts]
    assert names['estimate_loss']()[split] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_evaluation_of_the_whole_split_equals_a_loop_over_windows(trainer, split):
    """ Of the training split as many windows are evaluated as the validation split has. """
    names = trainer(eval_iters=-1, batch_size=7)
    num_windows = (len(names['data']['val']) - 1) // 16
    assert num_windows % 7 != 0  # the last batch is padded
    losses = [loss_of_window(names, split, 16 * i) for i in range(num_windows)]
    assert names['estimate_loss']()[split] == pytest.approx(np.mean(losses), abs=1e-5)


def test_padding_of_the_last_batch_is_ignored_by_the_loss(trainer):
    names = trainer(eval_iters=-1)
    names['data']['val'] = names['data']['val'][:16 * 6 + 1]  # 6 windows in batches of 4
    x, y = names['get_adjacent_batch']('val', 1)
    assert x.shape == (4, 16)
    assert y[:2].tolist() == windows_of(names['data']['val'], [16 * 4 + 1, 16 * 5 + 1])
    assert (y[2:] == -1).all()


@pytest.mark.parametrize('num_tokens, num_windows', [(65, 4), (64, 3), (17, 1)])
def test_last_adjacent_window_has_a_target(trainer, num_tokens, num_windows):
    names = trainer(eval_iters=-1)
    names['data']['val'] = names['data']['val'][:num_tokens]
    assert names['num_adjacent_windows']('val') == num_windows
    assert names['num_adjacent_windows']('train') == num_windows
    assert math.isfinite(names['estimate_loss']()['val'])


class ReusesMemory(torch.nn.Module):
    """ A model that, as a CUDA graph does, returns every loss in the same memory. """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = torch.zeros(())

    def forward(self, *args, **options):
        _, loss = self.model(*args, **options)
        return None, self.loss.copy_(loss)


def test_evaluation_with_cuda_graphs(trainer):
    names = trainer(eval_iters=3)
    expected = names['estimate_loss']()
    names['eval_model'] = ReusesMemory(names['eval_model'])
    assert names['estimate_loss']() == expected


def test_dropout_is_off_in_an_evaluation(trainer):
    assert trainer(dropout=0.5)['estimate_loss']() == trainer()['estimate_loss']()


def test_model_is_in_training_mode_after_an_evaluation(trainer):
    names = trainer()
    names['estimate_loss']()
    assert names['raw_model'].training


def test_evaluation_sends_no_float64_to_the_device(trainer, monkeypatch):
    """ Apple GPUs do not have it. """
    names = trainer()
    to = torch.Tensor.to

    def to_mps(tensor, *args, **kwargs):
        assert tensor.dtype != torch.float64
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'to', to_mps)
    names['estimate_loss']()


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

@pytest.fixture
def get_lr(trainer):
    """
    get_lr(it, **settings) with a warmup of 4 iterations to 1.0, and a decay to 0.1 at iteration 12.
    """
    names = trainer()

    def with_settings(it, **settings):
        names.update(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12,
                     decay_lr=True, cooldown_iters=0)
        names.update(settings)
        return names['get_lr'](it)
    return with_settings


def test_lr_linear_warmup(get_lr):
    lrs = [get_lr(it) for it in (0, 1, 3)]
    assert lrs == pytest.approx([0.2, 0.4, 0.8])


def test_lr_cosine_decay(get_lr):
    at_an_eighth = 0.1 + 0.9 * (1 + math.cos(math.pi / 8)) / 2
    lrs = [get_lr(it) for it in (4, 5, 8)]
    assert lrs == pytest.approx([1.0, at_an_eighth, 0.55])


@pytest.mark.parametrize('it', [12, 13, 10**6])
def test_lr_after_the_decay(get_lr, it):
    assert get_lr(it) == 0.1


def test_lr_without_warmup(get_lr):
    lrs = [get_lr(it, warmup_iters=0) for it in (0, 6, 12)]
    assert lrs == pytest.approx([1.0, 0.55, 0.1])


def test_lr_without_decay_after_warmup(get_lr):
    lrs = [get_lr(it, lr_decay_iters=4) for it in (3, 4, 5)]
    assert lrs == pytest.approx([0.8, 0.1, 0.1])


@pytest.mark.parametrize('it', [0, 5, 99])
def test_lr_constant(get_lr, it):
    assert get_lr(it, decay_lr=False) == 1.0


def test_lr_linear_cooldown(get_lr):
    lrs = [get_lr(it, cooldown_iters=6) for it in (0, 3, 4, 6, 9, 11, 12, 99)]
    assert lrs == pytest.approx([0.2, 0.8, 1.0, 1.0, 0.55, 0.25, 0.1, 0.1])


def test_lr_cooldown_right_after_warmup(trainer):
    get_lr = trainer(warmup_iters=8, cooldown_iters=12)['get_lr']  # of 20 iterations
    lrs = [get_lr(it) for it in (7, 8, 14, 20)]
    assert lrs == pytest.approx([8e-2 / 9, 1e-2, 5.5e-3, 1e-3])


def test_update_with_the_lr_of_its_iteration(trainer):
    """ AdamW's first update is the learning rate times the sign of the gradient. """
    names = trainer(max_iters=1, warmup_iters=4, weight_decay=0.0, grad_clip=0.0)
    initial_model = trainer()['raw_model']
    for p, initial in zip(names['raw_model'].parameters(), initial_model.parameters()):
        assert (p - initial).abs().max().item() == pytest.approx(0.01 / 5, rel=0.01)


def test_lr_of_all_groups(trainer):
    names = trainer(max_iters=6, warmup_iters=4, lr_decay_iters=12, muon_lr=0.02)
    lr = names['get_lr'](6)
    assert lr not in (names['get_lr'](5), names['get_lr'](7), 1e-2)
    assert [group['lr'] for group in names['optimizers']['optimizer'].param_groups] == [lr, lr]
    assert names['optimizers']['muon'].param_groups[0]['lr'] == pytest.approx(2 * lr)

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
    assert free['grad_normf'] == pytest.approx(norm, rel=1e-4)
    assert clipped['grad_normf'] == free['grad_normf']
    for clipped_moment, moment in zip(moments(clipped), moments(free), strict=True):
        torch.testing.assert_close(clipped_moment, moment * 0.01 / norm, atol=1e-8, rtol=1e-3)


@pytest.mark.parametrize('dtype, scale', [('float16', 65536.0), ('bfloat16', 1.0)])
def test_16_bits_follow_float32(trainer, dtype, scale):
    """ Gradients are clipped hard, which would show if float16's were not unscaled before. """
    settings = dict(max_iters=20, grad_clip=0.1)
    names = trainer(dtype=dtype, **settings)
    reference = trainer(dtype='float32', **settings)
    assert names['scaler'].get_scale() == scale  # no overflow was found
    assert names['lossf'] == pytest.approx(reference['lossf'], abs=0.02)
    assert names['lossf'] != reference['lossf']
    moment = moments(names)[0]
    reference_moment = moments(reference)[0]
    assert (moment - reference_moment).norm() < 0.1 * reference_moment.norm()


def test_scaler_is_for_float16_alone(trainer):
    assert trainer(dtype='float16')['scaler'].is_enabled()
    assert not trainer(dtype='bfloat16')['scaler'].is_enabled()
    assert not trainer(dtype='float32')['scaler'].is_enabled()


def test_dropout_is_a_function_of_seed_iteration_and_index(trainer):
    """ The loss of the last iteration, 101, is computed again. An evaluation came before it. """
    names = trainer(max_iters=102, dropout=0.5, gradient_accumulation_steps=2, decay_lr=False,
                    learning_rate=0.0, eval_interval=101)
    model = names['raw_model']
    losses = []
    for index in range(2):
        dropout_seed = np.random.default_rng((1337, 2, 101, index)).integers(2**63)
        torch.manual_seed(int(dropout_seed))
        _, loss = model(*names['get_batch']('train', index, 101))
        losses.append(loss.item())
    assert names['lossf'] == pytest.approx(np.mean(losses), abs=1e-6)
    assert losses[0] != losses[1]

# -----------------------------------------------------------------------------
# a run

@pytest.fixture(scope='module')
def finished_run(tmp_path_factory, dataset):
    """ A run of 25 iterations: what it printed, and its checkpoint. """
    folder = tmp_path_factory.mktemp('run')
    losses, evaluations, out = train(folder, dataset, max_iters=25)
    return SimpleNamespace(
        losses=losses,
        evaluations=evaluations,
        val_losses={it: val_loss for it, (_, val_loss) in evaluations.items()},
        out=out,
        checkpoint=read_checkpoint(folder / 'out/ckpt.pt'))


@pytest.mark.slow
def test_every_iteration_is_logged(finished_run):
    assert list(finished_run.losses) == list(range(25))


@pytest.mark.slow
def test_evaluation_at_each_interval_and_at_the_end(finished_run):
    assert list(finished_run.evaluations) == [0, 10, 20, 25]


@pytest.mark.slow
def test_training_lowers_the_loss(finished_run):
    assert finished_run.val_losses[25] < finished_run.val_losses[0] - 0.5


@pytest.mark.slow
def test_number_of_updates(finished_run):
    assert finished_run.checkpoint['iter_num'] == 25
    adamw_state = finished_run.checkpoint['optimizer']['state']
    assert {int(state['step']) for state in adamw_state.values()} == {25}


@pytest.mark.slow
def test_best_evaluation_is_saved(finished_run):
    val_losses = finished_run.val_losses
    best_iter = min(val_losses, key=val_losses.get)
    assert finished_run.checkpoint['best_val_iter'] == best_iter
    best_val_loss = finished_run.checkpoint['best_val_loss']
    assert best_val_loss == pytest.approx(val_losses[best_iter], abs=1e-4)


@pytest.mark.slow
def test_progress_is_saved(finished_run):
    assert finished_run.checkpoint['tokens'] == 25 * 4 * 16
    assert finished_run.checkpoint['seconds'] > 0
    assert finished_run.checkpoint['loss'] == pytest.approx(finished_run.losses[24], abs=1e-4)


@pytest.mark.slow
def test_saved_config_has_what_auto_selected(finished_run):
    assert finished_run.checkpoint['config']['backend'] == 'gloo'


@pytest.mark.slow
def test_default_architecture_has_the_classic_model_args(finished_run):
    assert sorted(finished_run.checkpoint['model_args']) == CLASSIC_MODEL_ARGS


@pytest.mark.slow
@pytest.mark.parametrize('line', [
    pytest.param('tokens per iteration will be: 64', id='tokens'),
    pytest.param(r'number of parameters: 0\.\d\dM', id='parameters'),
    pytest.param('saving checkpoint to out', id='save'),
    pytest.param(r'step 25: train loss \d\.\d{4}, val loss \d\.\d{4}', id='evaluation'),
    pytest.param(r'iter 24: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%, .*', id='iteration'),
])
def test_printed_lines_of_nanogpt(finished_run, line):
    assert re.search(f'^{line}$', finished_run.out, re.MULTILINE)


def test_dataset_without_meta_has_the_vocabulary_of_gpt2(trainer, dataset, tmp_path):
    shutil.copy(dataset / 'train.bin', tmp_path)
    shutil.copy(dataset / 'val.bin', tmp_path)
    model = trainer(dataset=tmp_path)['raw_model']
    assert model.config.vocab_size == 50304  # padded, as in nanoGPT's checkpoints


def test_initial_weights_are_a_function_of_the_seed(trainer):
    weights = trainer()['raw_model'].lm_head.weight
    assert torch.equal(trainer()['raw_model'].lm_head.weight, weights)
    assert not torch.equal(trainer(seed=1)['raw_model'].lm_head.weight, weights)


def test_nothing_is_saved_without_an_update(trainer, tmp_path, capsys):
    trainer(max_iters=0)
    assert not list((tmp_path / 'out').glob('*.pt'))
    assert 'nothing to do' in capsys.readouterr().out


def test_best_model_is_kept_without_always_save_checkpoint(trainer, tmp_path):
    settings = dict(always_save_checkpoint=False, eval_interval=5)
    trainer(**settings, max_iters=20)
    best = read_checkpoint(tmp_path / 'out/ckpt.pt')
    names = trainer(**settings, max_iters=40, init_from='resume', decay_lr=False,
                    learning_rate=10.0)  # the loss increases again
    assert best['best_val_loss'] < names['val_loss'] - 0.5
    kept = read_checkpoint(tmp_path / 'out/ckpt.pt')
    assert kept['best_val_loss'] <= best['best_val_loss']
    names = trainer(init_from='resume', eval_only=True)
    assert names['val_loss'] == kept['best_val_loss']


def test_checkpoint_interval(trainer, capsys):
    trainer(checkpoint_interval=7, eval_interval=0, max_iters=14)
    assert capsys.readouterr().out.count('saving checkpoint') == 2  # at 7 and 14


def test_checkpoint_interval_after_a_resume(trainer, capsys):
    trainer(checkpoint_interval=7, eval_interval=0, max_iters=14)
    capsys.readouterr()
    trainer(checkpoint_interval=7, eval_interval=0, max_iters=15, init_from='resume')
    assert capsys.readouterr().out.count('saving checkpoint') == 1  # at 15


def test_model_with_a_nan_loss_is_not_saved(trainer, tmp_path):
    trainer(max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    names = trainer(max_iters=20, init_from='resume', decay_lr=False, learning_rate=1e30)
    assert math.isnan(names['val_loss'])
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before


@pytest.mark.slow
def test_run_that_only_got_worse_can_be_sampled(tmp_path, dataset):
    """ Its loss never was below that of the weights it started from. """
    train(tmp_path, dataset)
    _, _, out = train(tmp_path, dataset, init_from='out/ckpt.pt', out_dir='worse', decay_lr=False,
                      learning_rate=1.0, always_save_checkpoint=False, max_iters=3)
    assert [path.name for path in (tmp_path / 'worse').glob('*.pt*')] == ['ckpt_last.pt']
    assert 'sample.py --out_dir=worse' in out
    run('sample.py', cwd=tmp_path, out_dir='worse', num_samples=1, max_new_tokens=4)

# -----------------------------------------------------------------------------
# eval_only

def test_eval_only_writes_nothing(trainer, tmp_path, capsys):
    trainer(eval_only=True, max_iters=20)
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert 'step 0: train loss' in out
    assert 'iter 0' not in out


def test_eval_only_of_a_checkpoint(trainer, tmp_path, capsys):
    val_loss = trainer(max_iters=7, dropout=0.1)['val_loss']
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    capsys.readouterr()
    names = trainer(eval_only=True, init_from='resume', max_iters=20)
    out = capsys.readouterr().out
    assert names['val_loss'] == val_loss
    assert 'step 7: train loss' in out
    assert 'iter 7' not in out
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before


def test_eval_only_of_a_run_without_a_best_model(trainer, tmp_path):
    val_loss = trainer(max_iters=7)['val_loss']
    (tmp_path / 'out/ckpt.pt').rename(tmp_path / 'out/ckpt_last.pt')
    names = trainer(eval_only=True, init_from='auto')
    assert names['val_loss'] == val_loss

# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize('settings', [
    pytest.param(dict(dropout=0.2, gradient_accumulation_steps=3), id='float32'),
    pytest.param({**RECIPE, 'dtype': 'float16', 'dropout': 0.1}, id='float16'),
    pytest.param(RECIPE, id='recipe'),
    pytest.param(dict(ema_decay=0.9, without_replacement=True, dropout=0.2), id='averaged'),
])
def test_resume_is_bit_identical(trainer, tmp_path, capsys, settings):
    trainer(max_iters=20, out_dir='uninterrupted', **settings)
    trainer(max_iters=10, **settings)
    capsys.readouterr()
    trainer(max_iters=20, init_from='auto', **settings)
    out = capsys.readouterr().out
    assert 'init_from=auto: resume' in out
    assert 'iter 10:' in out
    assert 'iter 9:' not in out
    assert differences(tmp_path / 'out', tmp_path / 'uninterrupted') == []


def test_evaluation_and_checkpoint_are_of_the_averaged_weights(trainer, tmp_path):
    names = trainer(max_iters=20, ema_decay=0.9)
    checkpoint = read_checkpoint(tmp_path / 'out/ckpt.pt')
    training_model = dict(names['raw_model'].named_parameters())
    torch.testing.assert_close(checkpoint['training_model'], training_model, rtol=0, atol=0)
    averages = names['ema'].averages
    saved = {name: checkpoint['model'][name] for name in averages}
    torch.testing.assert_close(saved, averages, rtol=0, atol=0)
    for settings in (dict(), dict(ema_decay=0.9)):
        evaluated = trainer(init_from='resume', eval_only=True, **settings)
        assert evaluated['val_loss'] == names['val_loss']
    without = trainer(max_iters=20)
    assert without['val_loss'] != names['val_loss']


def test_average_does_not_change_training(trainer):
    expected = trainer(max_iters=20)['raw_model'].state_dict()
    weights = trainer(max_iters=20, ema_decay=0.9)['raw_model'].state_dict()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_resume_without_the_average_continues_the_same_training(trainer):
    expected = trainer(max_iters=20)['raw_model'].state_dict()
    trainer(max_iters=10, ema_decay=0.9)
    weights = trainer(max_iters=20, init_from='resume')['raw_model'].state_dict()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_early_stopping(trainer, tmp_path, capsys):
    """ A learning rate of 3 makes the model worse; the run is not resumed past its end, either. """
    settings = dict(max_iters=20, eval_interval=2, early_stopping=3, learning_rate=3.0, min_lr=3.0,
                    warmup_iters=0, always_save_checkpoint=False)
    names = trainer(**settings)
    best_iter = names['checkpointer'].best_val_iter
    assert names['iter_num'] == best_iter + 6 < 20
    assert read_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] == best_iter + 6
    assert 'stopped early (early_stopping=3)' in capsys.readouterr().out
    resumed = trainer(**settings, init_from='resume')
    assert resumed['iter_num'] == best_iter + 6
    assert 'nothing to do: by iteration' in capsys.readouterr().out


def test_auto_without_a_checkpoint(trainer, capsys):
    trainer(init_from='auto')
    assert 'init_from=auto: scratch' in capsys.readouterr().out


@pytest.mark.slow
def test_resume_in_another_process_is_bit_identical(tmp_path, dataset):
    settings = dict(dropout=0.1)
    train(tmp_path, dataset, out_dir='uninterrupted', **settings)
    train(tmp_path, dataset, max_iters=10, **settings)
    train(tmp_path, dataset, init_from='resume', **settings)
    assert differences(tmp_path / 'out', tmp_path / 'uninterrupted') == []


def test_resume_uses_the_settings_of_the_command_line(trainer):
    trainer(max_iters=20)
    names = trainer(init_from='resume', beta2=0.5, weight_decay=0.03, dropout=0.3, eval_only=True)
    decayed, not_decayed = names['optimizers']['optimizer'].param_groups
    assert decayed['betas'] == (0.9, 0.5)
    assert decayed['weight_decay'] == 0.03
    assert not_decayed['weight_decay'] == 0.0
    assert names['raw_model'].config.dropout == 0.3
    assert {int(step) for step in moments(names, 'step')} == {20}


def test_resume_restores_the_scaler(trainer, tmp_path):
    trainer(max_iters=10, dtype='float16')
    path = tmp_path / 'out/ckpt.pt'
    checkpoint = read_checkpoint(path)
    checkpoint['scaler']['scale'] = 1024.0
    torch.save(checkpoint, path)
    names = trainer(max_iters=12, dtype='float16', init_from='resume')
    assert names['scaler'].get_scale() == 1024.0


def test_resume_restores_the_best_loss(trainer, tmp_path):
    trainer(max_iters=10, always_save_checkpoint=False)
    path = tmp_path / 'out/ckpt.pt'
    torch.save({**read_checkpoint(path), 'best_val_loss': 0.5}, path)
    before = path.read_bytes()
    names = trainer(max_iters=12, always_save_checkpoint=False, init_from='resume')
    assert names['checkpointer'].best_val_loss == 0.5
    assert path.read_bytes() == before  # the model did not become better than 0.5


def test_resume_with_a_smaller_block_size(trainer, tmp_path):
    trainer(max_iters=20)
    before = read_checkpoint(tmp_path / 'out/ckpt.pt')
    trainer(max_iters=21, init_from='resume', block_size=8, learning_rate=0.0, min_lr=0.0)
    after = read_checkpoint(tmp_path / 'out/ckpt.pt')
    key = 'transformer.wpe.weight'
    assert after['model_args']['block_size'] == 8
    torch.testing.assert_close(after['model'][key], before['model'][key][:8])
    moment = after['optimizer']['state'][1]['exp_avg']
    assert moment.shape == (8, 16)
    assert moment.untyped_storage().nbytes() == 8 * 16 * 4  # not that of all rows


def test_start_from_a_checkpoint_file_uses_its_weights_alone(trainer, tmp_path, capsys):
    val_loss = trainer(max_iters=20)['val_loss']
    capsys.readouterr()
    trainer(init_from='out/ckpt.pt', out_dir='new', max_iters=3)
    out = capsys.readouterr().out
    assert f'val loss {val_loss:.4f}' in re.search('step 0: .*', out)[0]
    assert re.findall(r'^iter (\d+)', out, re.MULTILINE) == ['0', '1', '2']
    optimizer = read_checkpoint(tmp_path / 'new/ckpt.pt')['optimizer']
    assert {int(state['step']) for state in optimizer['state'].values()} == {3}


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


@pytest.mark.slow
def test_nanogpt_checkpoint_can_be_resumed_and_sampled(tmp_path, dataset):
    uninterrupted, _, _ = train(tmp_path, dataset, out_dir='uninterrupted')
    train(tmp_path, dataset, max_iters=10)
    path = tmp_path / 'out/ckpt.pt'
    torch.save(to_nanogpt(read_checkpoint(path)), path)
    resumed, _, _ = train(tmp_path, dataset, init_from='resume')
    assert resumed == {it: loss for it, loss in uninterrupted.items() if it >= 10}
    out, _ = run('sample.py', cwd=tmp_path, num_samples=1, max_new_tokens=20, start='the')
    assert '-' * 15 in out

# -----------------------------------------------------------------------------
# a run with every newer setting

@pytest.fixture(scope='module')
def recipe_run(tmp_path_factory, dataset):
    """ A run of 12 iterations of the recipe -> its folder and checkpoint. """
    folder = tmp_path_factory.mktemp('recipe')
    train(folder, dataset, max_iters=12, **RECIPE)
    return folder, read_checkpoint(folder / 'out/ckpt.pt')


@pytest.mark.slow
def test_recipe_is_named_in_model_args(recipe_run):
    """ So that a reader that does not know it fails. """
    _, checkpoint = recipe_run
    newer_args = set(checkpoint['model_args']) - set(CLASSIC_MODEL_ARGS)
    assert newer_args == {'rotary', 'rmsnorm', 'qk_norm', 'untied'}


@pytest.mark.slow
def test_weights_of_the_recipe(recipe_run):
    _, checkpoint = recipe_run
    assert 'transformer.wpe.weight' not in checkpoint['model']
    assert not torch.equal(checkpoint['model']['lm_head.weight'],
                           checkpoint['model']['transformer.wte.weight'])


@pytest.mark.slow
def test_optimizers_of_the_recipe(recipe_run):
    _, checkpoint = recipe_run
    adamw_state = checkpoint['optimizer']['state']
    assert len(adamw_state) == 2  # token embedding and lm_head
    assert {tuple(state) for state in adamw_state.values()} == {('step', 'exp_avg', 'exp_avg_sq')}
    assert len(checkpoint['muon']['state']) == 8  # 4 matrices in each of 2 blocks


@pytest.mark.slow
def test_learning_rates_of_the_recipe(recipe_run):
    """ At iteration 12, 8 of 10 iterations of the cooldown are left. """
    _, checkpoint = recipe_run
    adamw_lrs = [group['lr'] for group in checkpoint['optimizer']['param_groups']]
    assert adamw_lrs == pytest.approx([0.0082, 0.0082])
    muon_lrs = [group['lr'] for group in checkpoint['muon']['param_groups']]
    assert muon_lrs == pytest.approx([0.02 * 0.82])


@pytest.mark.slow
def test_recipe_can_be_sampled(recipe_run):
    folder, _ = recipe_run
    out, _ = run('sample.py', cwd=folder, num_samples=1, max_new_tokens=30)
    assert out.count('-' * 15) == 1


@pytest.mark.slow
def test_recipe_can_be_evaluated_in_float32(recipe_run, dataset):
    folder, checkpoint = recipe_run
    path = folder / 'out/ckpt.pt'
    _, evaluations, _ = train(folder, dataset, eval_only=True, init_from=path)
    assert evaluations[0][1] == pytest.approx(checkpoint['best_val_loss'], abs=0.02)


@pytest.mark.slow
def test_recipe_is_not_resumed_without_muon(recipe_run, dataset):
    folder, _ = recipe_run
    settings = {**SMALL, 'dataset': dataset, 'init_from': 'resume'}
    _, error = run('train.py', cwd=folder, code=1, **settings)
    assert 'muon_lr' in error
    assert error.count('\n') == 1

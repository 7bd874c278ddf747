""" fsdp=True: the same numbers as one process, a share of its memory, and one whole checkpoint. """
import json
import re

import pytest
import torch
from conftest import SMALL, run, train
from kill_and_resume import differences
from processes import run_first

from components.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

PRINTED_DIGITS = 1.01e-4  # losses are printed with four digits, and sums are in another order
FAITHFUL = dict(gradient_accumulation_steps=4, dropout=0.1, max_iters=30, lr_decay_iters=30)
RECIPE = dict(FAITHFUL, rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02,
              cooldown_iters=10)
ARCHITECTURES = dict(faithful=FAITHFUL, recipe=RECIPE)


@pytest.fixture(scope='module', params=ARCHITECTURES)
def single_process(request, tmp_path_factory, dataset):
    """ A run in one process -> its settings, its losses, its evaluations. """
    settings = ARCHITECTURES[request.param]
    losses, evaluations, _ = train(tmp_path_factory.mktemp('single'), dataset, **settings)
    assert len(losses) == 30
    return settings, losses, evaluations


def assert_equal(losses, evaluations, expected_losses, expected_evaluations):
    assert losses == pytest.approx(expected_losses, abs=PRINTED_DIGITS)
    for number, pair in expected_evaluations.items():
        assert evaluations[number] == pytest.approx(pair, abs=PRINTED_DIGITS)


@pytest.mark.parametrize('options', [
    dict(processes=2, fsdp=True),
    dict(processes=4, fsdp=True),
    dict(processes=2, fsdp=True, activation_checkpointing=True),
    dict(processes=2),
], ids=repr)
def test_losses_equal_one_process(tmp_path, dataset, single_process, options):
    settings, *expected = single_process
    losses, evaluations, _ = train(tmp_path, dataset, **settings, **options)
    assert_equal(losses, evaluations, *expected)


def test_resume_in_other_numbers_of_processes(tmp_path, dataset, single_process):
    settings, *expected = single_process
    losses = {}
    evaluations = {}
    for max_iters, options in [
        (7, dict(processes=4, fsdp=True)),
        (15, dict(processes=2)),
        (22, {}),
        (30, dict(processes=2, fsdp=True)),
    ]:
        settings = {**settings, 'max_iters': max_iters, 'init_from': 'auto'}
        new_losses, new_evaluations, _ = train(tmp_path, dataset, **settings, **options)
        losses.update(new_losses)
        evaluations.update(new_evaluations)
    assert_equal(losses, evaluations, *expected)


def test_averaged_weights(tmp_path, dataset):
    """ Evaluations alternate between two sets of weights, which FSDP gathers. """
    settings = dict(RECIPE, ema_decay=0.9, eval_interval=5)
    expected = train(tmp_path, dataset, **settings, out_dir='one')
    train(tmp_path, dataset, **{**settings, 'max_iters': 20}, fsdp=True, processes=2)
    parts = train(tmp_path, dataset, **settings, fsdp=True, processes=2, init_from='resume')
    losses, evaluations, _ = parts
    assert losses == pytest.approx({it: expected[0][it] for it in losses}, abs=PRINTED_DIGITS)
    assert min(losses) == 20
    for it, pair in evaluations.items():
        assert pair == pytest.approx(expected[1][it], abs=PRINTED_DIGITS)
    checkpoint = load_checkpoint(tmp_path / 'out/ckpt.pt')
    expected_checkpoint = load_checkpoint(tmp_path / 'one/ckpt.pt')
    for key in ('model', 'training_model'):
        torch.testing.assert_close(checkpoint[key], expected_checkpoint[key], atol=1e-4, rtol=0)


def test_resume_is_bit_identical(tmp_path, dataset):
    settings = dict(RECIPE, fsdp=True, processes=2, activation_checkpointing=True)
    train(tmp_path, dataset, **settings, out_dir='uninterrupted')
    train(tmp_path, dataset, **{**settings, 'max_iters': 10})
    train(tmp_path, dataset, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


def test_activation_checkpointing_is_bit_identical(tmp_path, dataset):
    settings = dict(RECIPE, fsdp=True, processes=2)
    train(tmp_path, dataset, **settings, out_dir='stored')
    train(tmp_path, dataset, **settings, activation_checkpointing=True)
    assert not differences(tmp_path / 'out', tmp_path / 'stored')


def test_rows_that_cannot_be_divided(tmp_path, dataset):
    """ Matrices of 20 and 60 rows in eight parts: the last process has none of some. """
    settings = dict(RECIPE, n_embd=20, gradient_accumulation_steps=8)
    expected, evaluations, _ = train(tmp_path, dataset, **settings, out_dir='one')
    losses, evaluations_of_parts, _ = train(tmp_path, dataset, **settings, fsdp=True, processes=8)
    assert_equal(losses, evaluations_of_parts, expected, evaluations)
    model = load_checkpoint(tmp_path / 'out/ckpt.pt')['model']
    expected_model = load_checkpoint(tmp_path / 'one/ckpt.pt')['model']
    torch.testing.assert_close(model, expected_model, atol=1e-4, rtol=0)


def test_processes_evaluate_different_numbers_of_batches(tmp_path, dataset):
    settings = dict(RECIPE, eval_only=True, gradient_accumulation_steps=4)
    for eval_iters in (3, -1):
        _, expected, _ = train(tmp_path, dataset, eval_iters=eval_iters, **settings)
        _, evaluations, _ = train(tmp_path, dataset, eval_iters=eval_iters, **settings, fsdp=True,
                                  processes=4)
        assert_equal({}, evaluations, {}, expected)


def test_bfloat16(tmp_path, dataset):
    settings = dict(FAITHFUL, dtype='bfloat16', bias=False)
    expected, _, _ = train(tmp_path, dataset, **settings, out_dir='one')
    losses, _, _ = train(tmp_path, dataset, **settings, fsdp=True, processes=2)
    assert losses == pytest.approx(expected, abs=2e-3)
    float32, _, _ = train(tmp_path, dataset, **FAITHFUL, out_dir='float32')
    assert losses != pytest.approx(float32, abs=PRINTED_DIGITS)

# -----------------------------------------------------------------------------
# memory

COUNT_BYTES = """
import atexit, json, os
from components import optim
step = optim.clip_and_step

def local_bytes(tensors):
    parts = [optim.local_part(tensor) for tensor in tensors if tensor.dim() > 0]
    storages = [part.untyped_storage() for part in parts]  # some parts share one
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def counting_step(optimizers, scaler, parameters, *rest):
    parameters = list(parameters)
    gradients = local_bytes([p.grad for p in parameters])
    norm = step(optimizers, scaler, parameters, *rest)
    moments = [tensor for optimizer in optimizers.values()
               for state in optimizer.state.values() for tensor in state.values()]
    counts = dict(parameters=local_bytes(parameters), gradients=gradients,
                  moments=local_bytes(moments))
    print('bytes: ' + json.dumps(counts) + chr(10), end='', flush=True)
    return norm

optim.clip_and_step = counting_step
"""


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_each_of_four_processes_has_a_quarter(tmp_path, dataset, monkeypatch, muon_lr):
    run_first(COUNT_BYTES, tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 4, 'max_iters': 2,
                'muon_lr': muon_lr, 'eval_interval': 0, 'n_embd': 32, 'block_size': 32}
    largest = {}
    for fsdp in (False, True):
        out, _ = run('train.py', cwd=tmp_path, processes=4, fsdp=fsdp, **settings)
        counts = [json.loads(line) for line in re.findall(r'^bytes: (.*)$', out, re.MULTILINE)]
        assert len(counts) == 8  # of four processes and two iterations
        largest[fsdp] = {key: max(count[key] for count in counts) for key in counts[0]}
    for key, size in largest[False].items():
        # 22 characters in four parts are at most 6
        assert size / 4 <= largest[True][key] <= size / 4 + 4 * 32 * 4, key

# -----------------------------------------------------------------------------
# what can go wrong


NAN_IN_ONE_PROCESS = """
import os, model
forward = model.GPT.forward
def forward_with_nan(self, idx, targets=None, *args, **settings):
    logits, loss = forward(self, idx, targets, *args, **settings)
    if self.training and os.environ['RANK'] == '1':
        loss = loss * float('nan')
    return logits, loss
model.GPT.forward = forward_with_nan
"""


def test_skipped_updates_change_nothing(tmp_path, dataset, monkeypatch):
    settings = dict(RECIPE, fsdp=True, processes=2, eval_interval=0, decay_lr=False)
    train(tmp_path, dataset, **{**settings, 'max_iters': 3})
    before = load_checkpoint(tmp_path / 'out/ckpt.pt')
    run_first(NAN_IN_ONE_PROCESS, tmp_path, monkeypatch)
    _, _, out = train(tmp_path, dataset, **{**settings, 'max_iters': 6}, init_from='resume')
    assert 'iter 5: loss nan, grad norm nan: update skipped, 3 in a row' in out
    after = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert after['iter_num'] == 6
    for name in ('model', 'optimizer', 'muon'):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


FULL_DISK = """
from components import checkpoint
def check_free_space(folder, size):
    raise OSError('not enough disk space')
checkpoint.check_free_space = check_free_space
"""


NO_FOLDER = """
from pathlib import Path
def mkdir(self, *args, **kwargs):
    raise OSError('stale file handle')
from components import metrics
open_csv = metrics.Log.open_csv
def open_csv_and_lose_folder(self, *args):
    open_csv(self, *args)
    Path.mkdir = mkdir
metrics.Log.open_csv = open_csv_and_lose_folder
"""


@pytest.mark.parametrize('code, reason', [
    (FULL_DISK, 'not enough disk space'),
    (NO_FOLDER, 'stale file handle'),
])
def test_save_that_fails(tmp_path, dataset, monkeypatch, code, reason):
    run_first(code, tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 2, 'fsdp': True}
    out, _ = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    assert out.count(f'WARNING: nothing was saved: {reason}') == 2
    assert f'NOT SAVED: {reason}' in out


def test_checkpoint_is_as_large_as_that_of_one_process(tmp_path, dataset):
    """ Tied weights and padding are not stored a second time. """
    settings = dict(FAITHFUL, n_embd=18)
    train(tmp_path, dataset, **settings, out_dir='one')
    train(tmp_path, dataset, **settings, fsdp=True, processes=4)
    size = (tmp_path / 'out/ckpt.pt').stat().st_size
    assert size == pytest.approx((tmp_path / 'one/ckpt.pt').stat().st_size, abs=1500)

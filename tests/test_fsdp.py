""" fsdp=True: the same numbers as one process, a share of its memory, and one whole checkpoint. """
import json
import re

import pytest
import torch
from conftest import FAST, SMALL, run, train
from kill_and_resume import differences
from processes import run_first

from components.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

PRINTED_DIGITS = 1.01e-4  # losses are printed with four digits, and sums are in another order
GPT2 = dict(gradient_accumulation_steps=4, dropout=0.1)
FAST_SETTINGS = dict(GPT2, **FAST)


def assert_equal_runs(a, b, tolerance=PRINTED_DIGITS):
    """ Compares the losses and evaluations that train() returns for two runs. """
    assert a[0] == pytest.approx(b[0], abs=tolerance)
    assert list(a[1]) == list(b[1])
    for number, pair in b[1].items():
        assert a[1][number] == pytest.approx(pair, abs=tolerance)


@pytest.mark.parametrize('settings', [GPT2, FAST_SETTINGS], ids=['gpt2', 'fast'])
def test_other_numbers_of_processes_equal_one_process(tmp_path, dataset, settings):
    expected = train(tmp_path, dataset, **settings, out_dir='one')
    losses = {}
    evaluations = {}
    for max_iters, options in [
        (5, dict(processes=4, fsdp=True)),
        (10, dict(processes=2)),
        (15, {}),
        (20, dict(processes=2, fsdp=True, activation_checkpointing=True)),
    ]:
        settings = {**settings, 'max_iters': max_iters, 'init_from': 'auto'}
        more_losses, more_evaluations, _ = train(tmp_path, dataset, **settings, **options)
        losses.update(more_losses)
        evaluations.update({number: more_evaluations[number] for number in more_evaluations
                            if number in expected[1]})
    assert len(losses) == 20
    assert_equal_runs((losses, evaluations), expected)


def test_resume_and_activation_checkpointing_are_bit_identical(tmp_path, dataset):
    settings = dict(FAST_SETTINGS, fsdp=True, processes=2)
    train(tmp_path, dataset, **settings, out_dir='uninterrupted')
    train(tmp_path, dataset, **settings, activation_checkpointing=True, max_iters=10)
    train(tmp_path, dataset, **settings, activation_checkpointing=True, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


def test_rows_that_cannot_be_divided(tmp_path, dataset):
    """ Matrices of 16 and 48 rows in five parts: the last process has none of some. """
    settings = dict(FAST_SETTINGS, untied=False, gradient_accumulation_steps=5)
    one = train(tmp_path, dataset, **settings, out_dir='one')
    parts = train(tmp_path, dataset, **settings, fsdp=True, processes=5)
    assert_equal_runs(parts, one)
    path = tmp_path / 'out/ckpt.pt'
    path_of_one = tmp_path / 'one/ckpt.pt'
    torch.testing.assert_close(load_checkpoint(path)['model'],
                               load_checkpoint(path_of_one)['model'], atol=1e-4, rtol=0)
    # tied weights and padding are not stored a second time
    assert path.stat().st_size == pytest.approx(path_of_one.stat().st_size, abs=500)


@pytest.mark.parametrize('eval_iters', [3, -1])
def test_processes_evaluate_different_numbers_of_batches(tmp_path, dataset, eval_iters):
    settings = dict(FAST_SETTINGS, eval_only=True, eval_iters=eval_iters)
    one = train(tmp_path, dataset, **settings)
    assert_equal_runs(train(tmp_path, dataset, **settings, fsdp=True, processes=4), one)


def test_bfloat16(tmp_path, dataset):
    one = train(tmp_path, dataset, **GPT2, dtype='bfloat16')
    parts = train(tmp_path, dataset, **GPT2, dtype='bfloat16', fsdp=True, processes=2)
    assert_equal_runs(parts, one, tolerance=2e-3)
    float32 = train(tmp_path, dataset, **GPT2, fsdp=True, processes=2)
    assert parts[0] != pytest.approx(float32[0], abs=PRINTED_DIGITS)


@pytest.mark.parametrize('settings', [GPT2, FAST_SETTINGS], ids=['gpt2', 'fast'])
def test_initial_weights_are_those_of_one_process(tmp_path, dataset, settings):
    """ Bit for bit, also of a model that is fine-tuned. Updates with a learning rate of 0. """
    settings = dict(settings, learning_rate=0.0, muon_lr=0.0, decay_lr=False, max_iters=1)
    train(tmp_path, dataset, **settings, out_dir='one')
    init_from = tmp_path / 'one/ckpt.pt'
    for name, options in {
        'two': dict(processes=2, fsdp=True),
        'four': dict(processes=4, fsdp=True),
        'fine-tuned': dict(processes=2, fsdp=True, init_from=init_from),
        'DDP': dict(processes=2),
        'fine-tuned with DDP': dict(processes=2, init_from=init_from),
    }.items():
        train(tmp_path, dataset, **settings, **options, out_dir=name)
        weights = load_checkpoint(tmp_path / name / 'ckpt.pt')['model']
        torch.testing.assert_close(weights, load_checkpoint(init_from)['model'], rtol=0, atol=0)


COUNT_GRAPHS = """
import os
import torch
from torch._dynamo.utils import counters
from components import distributed, settings
compile = torch.compile
shut_down = distributed.shut_down

def shut_down_and_count(exit_code):
    if os.environ['RANK'] == '1':
        print('graphs:', counters['stats']['unique_graphs'], dict(counters['graph_break']))
    shut_down(exit_code)

torch.compile = lambda model: compile(model, backend='aot_eager')
settings.missing_for_compile = lambda device_type: ''  # that backend requires no compiler
distributed.shut_down = shut_down_and_count
"""


def test_compiled(tmp_path, dataset, monkeypatch):
    """ Whole blocks, and lm_head with the loss: each once to train and once to evaluate. """
    settings = dict(FAST_SETTINGS, fsdp=True, processes=2, dropout=0.0)
    expected = train(tmp_path, dataset, **settings)
    run_first(COUNT_GRAPHS, tmp_path, monkeypatch)
    compiled = train(tmp_path, dataset, **settings, compile=True)
    assert_equal_runs(compiled, expected)
    assert 'graphs: 4 {}\n' in compiled[2]

# -----------------------------------------------------------------------------
# memory

COUNT_BYTES = """
import json
from components import optim
from components.distributed import local_part
clip_and_step = optim.clip_and_step

def local_bytes(tensors):
    parts = [local_part(tensor) for tensor in tensors if tensor.dim() > 0]
    storages = [part.untyped_storage() for part in parts]  # some parts share one
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def count_and_step(optimizers, scaler, parameters, *rest):
    parameters = list(parameters)
    counts = dict(parameters=local_bytes(parameters),
                  gradients=local_bytes([p.grad for p in parameters]))
    norm = clip_and_step(optimizers, scaler, parameters, *rest)
    moments = [tensor for optimizer in optimizers.values()
               for state in optimizer.state.values() for tensor in state.values()]
    counts['moments'] = local_bytes(moments)
    print('bytes: ' + json.dumps(counts) + chr(10), end='', flush=True)
    return norm

optim.clip_and_step = count_and_step
"""


def test_each_of_four_processes_has_a_quarter(tmp_path, dataset, monkeypatch):
    run_first(COUNT_BYTES, tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 4, 'max_iters': 2,
                'muon_lr': 0.02, 'eval_interval': 0, 'n_embd': 32, 'block_size': 32}
    largest = {}
    for fsdp in (False, True):
        out, _ = run('train.py', cwd=tmp_path, processes=4, fsdp=fsdp, **settings)
        counts = [json.loads(line) for line in re.findall(r'bytes: (\{.*?\})', out)]
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
def forward_with_nan(self, *args, **settings):
    logits, loss = forward(self, *args, **settings)
    if self.training and os.environ['RANK'] == '1':
        loss = loss * float('nan')
    return logits, loss
model.GPT.forward = forward_with_nan
"""


def test_skipped_steps_change_nothing(tmp_path, dataset, monkeypatch):
    settings = dict(FAST_SETTINGS, fsdp=True, processes=2, eval_interval=0, decay_lr=False)
    train(tmp_path, dataset, **settings, max_iters=3)
    before = load_checkpoint(tmp_path / 'out/ckpt.pt')
    run_first(NAN_IN_ONE_PROCESS, tmp_path, monkeypatch)
    _, _, out = train(tmp_path, dataset, **settings, max_iters=6, init_from='resume',
                      checkpoint_interval=5)
    assert re.search('^iter 5: loss nan, .*skipped, 3 in a row$', out, re.MULTILINE)
    after = load_checkpoint(tmp_path / 'out/ckpt.pt')
    for name in ('model', 'optimizer', 'muon'):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_save_that_fails_in_the_first_process(tmp_path, dataset, monkeypatch):
    run_first("""
import torch
def save(*args):
    raise OSError('stale file handle')
torch.save = save
""", tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 2, 'fsdp': True}
    out, _ = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    assert out.count('stale file handle') == 3  # after both evaluations, and at the end

"""
Every path that the scripts take on a GPU, once, as a user runs them. Planned for at most four
minutes on an H100, half of them to compile (not measured yet).

    python -m pytest tests/test_cuda.py -x

Where there is no GPU, DEVICE = 'cpu' below shows that the tests themselves work.
"""
import json
import re
import subprocess
from functools import cache

import pytest
import torch
import torch.distributed as dist
from conftest import FAST, SMALL, run, train
from kill_and_resume import differences
from processes import restart_after_a_stopped_process, run_first, start_training

from components.checkpoint import load_checkpoint
from components.device import missing_for_compile
from model import GPT, GPTConfig

DEVICE = 'cuda'
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='requires a CUDA GPU')
if DEVICE == 'cuda':
    pytestmark = needs_gpu

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=8)
GPT2 = dict(SIZES, gradient_accumulation_steps=2)
FAST_SETTINGS = dict(GPT2, **FAST)
SETTINGS = dict(gpt2=GPT2, fast=FAST_SETTINGS)
OPTIMIZERS = dict(gpt2='AdamW', fast='AdamW and Muon')
# of losses after 20 updates in another dtype, or in TF32, which float32 is on a GPU
TOLERANCE = 0.01


@pytest.fixture(scope='module')
def reference(tmp_path_factory, dataset):
    """ reference('gpt2') -> what train() returns for a run on the CPU in float32. """
    @cache
    def run_once(name):
        return train(tmp_path_factory.mktemp(name), dataset, **SETTINGS[name])
    return run_once


def assert_equal_runs(a, b, num_iters=20):
    """ Compares the losses and evaluations that train() returns for two runs. """
    losses_of_a, evaluations_of_a, _ = a
    losses_of_b, evaluations_of_b, _ = b
    assert len(losses_of_a) == num_iters
    assert losses_of_a == pytest.approx(losses_of_b, abs=TOLERANCE)
    for iter_num, pair in evaluations_of_b.items():
        assert evaluations_of_a[iter_num] == pytest.approx(pair, abs=TOLERANCE)

# -----------------------------------------------------------------------------
# training


@pytest.mark.parametrize('name', SETTINGS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_training(tmp_path, dataset, reference, dtype, name):
    """ With two micro-batches an iteration. """
    ended = train(tmp_path, dataset, device=DEVICE, dtype=dtype, **SETTINGS[name])
    optimizers = OPTIMIZERS[name]
    assert f'device: {DEVICE}, {dtype}, not compiled, 1 process, {optimizers}\n' in ended[2]
    assert_equal_runs(ended, reference(name))


# training and evaluation have a graph each, and Muon one for each of four shapes
NO_RECOMPILATION = """
import torch._dynamo
torch._dynamo.config.recompile_limit = 4
torch._dynamo.config.fail_on_recompile_limit_hit = True
"""


@needs_gpu
@pytest.mark.parametrize('name, dtype', [('gpt2', 'bfloat16'), ('fast', 'float16')])
def test_compiled_training(tmp_path, dataset, reference, monkeypatch, name, dtype):
    run_first(NO_RECOMPILATION, tmp_path, monkeypatch)
    ended = train(tmp_path, dataset, device='cuda', dtype=dtype, compile=True, **SETTINGS[name])
    assert f'device: cuda, {dtype}, compiled' in ended[2]
    assert_equal_runs(ended, reference(name))


# which Muon makes the first step
PRINT_MUON = """
from components import optim
step = optim.Muon.step

def print_and_step(self):
    print(f'Muon in {self.dtype}, compiled: {self.is_compiled}')
    optim.Muon.step = step
    return step(self)

optim.Muon.step = print_and_step
"""


@needs_gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_compiled_muon(tmp_path, dataset, monkeypatch, dtype):
    """ Four graphs for all learning rates of a schedule. """
    settings = dict(FAST_SETTINGS, device='cuda', dtype=dtype)
    eager = train(tmp_path, dataset, out_dir='eager', **settings)
    run_first(NO_RECOMPILATION + PRINT_MUON, tmp_path, monkeypatch)
    ended = train(tmp_path, dataset, compile=True, **settings)
    assert f'Muon in torch.{dtype}, compiled: True\n' in ended[2]
    assert_equal_runs(ended, eager)


@needs_gpu
def test_training_with_cuda_graphs(tmp_path, dataset):
    settings = dict(FAST_SETTINGS, gradient_accumulation_steps=1, device='cuda', dtype='bfloat16')
    ended = train(tmp_path, dataset, compile='reduce-overhead', **settings)
    assert 'device: cuda, bfloat16, compiled with CUDA graphs' in ended[2]
    assert_equal_runs(ended, train(tmp_path, dataset, out_dir='eager', **settings))


@needs_gpu
def test_automatic_choice(tmp_path, dataset):
    _, _, out = train(tmp_path, dataset, device='auto', dtype='auto', compile='auto', max_iters=1,
                      **GPT2)
    dtype = 'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16'
    can_compile = dtype == 'bfloat16' and not missing_for_compile('cuda')
    compiled = 'compiled' if can_compile else 'not compiled'
    assert f'device: cuda, {dtype}, {compiled}, 1 process, AdamW\n' in out


def test_fine_tuning_and_evaluation_of_the_whole_split(tmp_path, dataset):
    """ From the weights of another run, with a shorter block_size. """
    train(tmp_path, dataset, device=DEVICE, out_dir='first', **GPT2)
    settings = dict(GPT2, init_from=tmp_path / 'first/ckpt.pt', block_size=32, eval_iters=-1)
    ended = train(tmp_path, dataset, device=DEVICE, **settings)
    assert_equal_runs(ended, train(tmp_path, dataset, out_dir='cpu', **settings))
    checkpoint = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert checkpoint['model']['transformer.wpe.weight'].shape == (32, 32)

# -----------------------------------------------------------------------------
# skipped steps and resumed runs

NON_FINITE_LOSSES = """
import model
forward = model.GPT.forward
def forward_with_nan(self, *args, **settings):
    logits, loss = forward(self, *args, **settings)
    if self.training:
        loss = loss * float('nan')
    return logits, loss
model.GPT.forward = forward_with_nan
"""


@pytest.mark.parametrize('name, dtype', [('gpt2', 'float16'), ('fast', 'float32')])
def test_skipped_steps_change_nothing(tmp_path, dataset, monkeypatch, name, dtype):
    """ Until they end the run. On a GPU, a step is looked at an iteration later. """
    settings = dict(SMALL, **SETTINGS[name], dataset=dataset, device=DEVICE, dtype=dtype)
    settings.update(eval_interval=0, checkpoint_interval=5, decay_lr=False)
    run('train.py', cwd=tmp_path, **{**settings, 'max_iters': 3})
    before = load_checkpoint(tmp_path / 'out/ckpt.pt')
    run_first(NON_FINITE_LOSSES, tmp_path, monkeypatch)
    out, _ = run('train.py', cwd=tmp_path, **{**settings, 'max_iters': 6}, init_from='resume')
    assert re.search('^iter 4: loss nan, .*skipped, 2 in a row$', out, re.MULTILINE)
    run('train.py', cwd=tmp_path, code=1, **settings, init_from='resume', max_skipped_steps=3)
    after = load_checkpoint(tmp_path / 'out/ckpt.pt')
    for key in {'model', 'optimizer', 'muon'} & set(before):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def train_twice(tmp_path, dataset, **settings):
    """ A run, and the same in out/ with a pause -> what train() returns for both. """
    whole = train(tmp_path, dataset, out_dir='uninterrupted', **settings)
    losses, evaluations, _ = train(tmp_path, dataset, max_iters=10, **settings)
    more_losses, more_evaluations, out = train(tmp_path, dataset, init_from='resume', **settings)
    assert min(more_losses) == 10
    return whole, ({**losses, **more_losses}, {**evaluations, **more_evaluations}, out)


def test_resume(tmp_path, dataset, reference):
    """
    On a GPU the runs are equal up to rounding. The gradients of attention, and where compiled also
    those of the embeddings, are sums by atomic additions, in an order that changes.
    """
    compile = DEVICE == 'cuda'  # on a CPU it takes minutes
    settings = dict(GPT2, device=DEVICE, dtype='bfloat16', dropout=0.1, compile=compile)
    whole, resumed = train_twice(tmp_path, dataset, **settings)
    assert_equal_runs(resumed, whole)
    without_dropout, evaluations, _ = reference('gpt2')
    assert whole[0] != pytest.approx(without_dropout, abs=TOLERANCE)
    assert whole[1][0] == pytest.approx(evaluations[0], abs=TOLERANCE)


# https://docs.pytorch.org/docs/stable/notes/randomness.html
DETERMINISTIC = """
import os
os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
import torch
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.deterministic = True
"""


def test_resume_by_deterministic_algorithms_is_bit_identical(tmp_path, dataset, monkeypatch):
    run_first(DETERMINISTIC, tmp_path, monkeypatch)
    train_twice(tmp_path, dataset, device=DEVICE, dtype='float16', dropout=0.1, **FAST_SETTINGS)
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')

# -----------------------------------------------------------------------------
# several processes


@pytest.mark.parametrize('name', SETTINGS)
def test_two_processes_share_a_device(tmp_path, dataset, reference, name):
    """ By Gloo; NCCL refuses two processes on one GPU. """
    ended = train(tmp_path, dataset, device=DEVICE, backend='gloo', processes=2, **SETTINGS[name])
    assert '2 processes over gloo' in ended[2]
    assert_equal_runs(ended, reference(name))


needs_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason='requires NCCL')


@needs_gpu
@needs_nccl
@pytest.mark.parametrize('fsdp', [False, True])
def test_torchrun_with_nccl(tmp_path, dataset, reference, monkeypatch, fsdp):
    """ Compiled, so that DDP or FSDP has a compiled model. """
    run_first(NO_RECOMPILATION, tmp_path, monkeypatch)
    process = start_training(tmp_path, dataset, torchrun=['--nproc_per_node=1'], device='cuda',
                             dtype='bfloat16', compile=True, fsdp=fsdp, **GPT2)
    try:
        out, error = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, error
    losses = [float(loss) for loss in re.findall(r'^iter \d+: loss ([^,]+),', out, re.MULTILINE)]
    expected_losses, _, _ = reference('gpt2')
    assert losses == pytest.approx(list(expected_losses.values()), abs=TOLERANCE)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['config']['backend'] == 'nccl'


@needs_gpu
@needs_nccl
def test_two_processes_with_one_gpu(tmp_path, dataset, monkeypatch):
    """ NCCL refuses this, too, in many lines. """
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    process = start_training(tmp_path, dataset, torchrun=['--nproc_per_node=2'], device='cuda',
                             backend='nccl', **GPT2)
    _, error = process.communicate(timeout=300)
    assert error.count('have the same GPU') == 1


@needs_nccl
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='requires two CUDA GPUs')
@pytest.mark.parametrize('fsdp', [False, True])
def test_restart_after_a_process_was_stopped(tmp_path, dataset, monkeypatch, fsdp):
    """ The other one waits in a collective of NCCL. """
    restart_after_a_stopped_process(tmp_path, dataset, monkeypatch, device='cuda', fsdp=fsdp)


@needs_nccl
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='requires two CUDA GPUs')
def test_fsdp_begins_with_the_weights_of_one_process(tmp_path, dataset):
    settings = dict(GPT2, device='cuda', learning_rate=0.0, decay_lr=False, max_iters=1)
    train(tmp_path, dataset, **settings)
    process = start_training(tmp_path, dataset, torchrun=['--nproc_per_node=2'], fsdp=True,
                             **{**settings, 'out_dir': 'two'})
    process.communicate(timeout=300)
    weights = load_checkpoint(tmp_path / 'two/ckpt.pt')['model']
    expected = load_checkpoint(tmp_path / 'out/ckpt.pt')['model']
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)

# -----------------------------------------------------------------------------
# no synchronization

# PyTorch raises an error where it waits for the GPU. It does not for event.synchronize(), by which
# the numbers of a step are read an iteration later.
SYNCHRONIZATION_IS_AN_ERROR = """
import torch
from components import optim
clip_and_step = optim.clip_and_step
calls = []

def clip_and_watch(*args):
    calls.append(None)
    if len(calls) == 5:
        torch.cuda.set_sync_debug_mode('error')
        try:
            torch.ones((), device='cuda').item()
        except RuntimeError:
            print('synchronization is an error')
    if len(calls) == 25:
        torch.cuda.set_sync_debug_mode('default')
        print('20 iterations without synchronization')
    return clip_and_step(*args)

optim.clip_and_step = clip_and_watch
"""
LARGE_BATCH = 64  # from 3,072 tokens on, PyTorch has another kernel for gradients of embeddings


@needs_gpu
@pytest.mark.parametrize('settings', [
    dict(GPT2, dtype='float32', batch_size=LARGE_BATCH),
    dict(GPT2, dtype='float16', dropout=0.1),
    dict(FAST_SETTINGS, dtype='bfloat16', batch_size=LARGE_BATCH),
    dict(GPT2, dtype='bfloat16', compile=True),
    dict(FAST_SETTINGS, dtype='bfloat16', compile=True),
    dict(GPT2, dtype='bfloat16', compile='reduce-overhead', gradient_accumulation_steps=1),
], ids=['float32', 'float16', 'fast', 'compiled', 'compiled fast', 'CUDA graphs'])
def test_loop_does_not_synchronize(tmp_path, dataset, monkeypatch, settings):
    run_first(SYNCHRONIZATION_IS_AN_ERROR, tmp_path, monkeypatch)
    _, _, out = train(tmp_path, dataset, device='cuda', max_iters=30, log_interval=0,
                      eval_interval=0, **settings)
    assert 'synchronization is an error\n20 iterations without synchronization\n' in out

# -----------------------------------------------------------------------------
# memory


# leaves room for the products that measure the peak
LIMIT_MEMORY = """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(2**30 / total)
"""


@needs_gpu
def test_out_of_memory(tmp_path, dataset, monkeypatch):
    run_first(LIMIT_MEMORY, tmp_path, monkeypatch)
    settings = {**SMALL, **GPT2, 'dataset': dataset, 'device': 'cuda', 'eval_interval': 0,
                'dtype': 'bfloat16', 'batch_size': 16384}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'Traceback' not in error
    last_line = error.splitlines()[-1]
    assert last_line.startswith('train.py: out of memory (')
    assert last_line.endswith('--batch_size=8192 --gradient_accumulation_steps=4')


@needs_gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_peak_memory_is_estimated(tmp_path, dtype):
    """
    With a vocabulary of 50,304. The estimate knows nothing of cuBLAS's workspaces, but includes the
    gradients of an earlier micro-batch, which are larger.
    """
    settings = dict(n_layer=6, n_head=8, n_embd=512, block_size=256, batch_size=16, dtype=dtype,
                    dataset=tmp_path / 'none', device='cuda', compile=False)
    out, _ = run('bench.py', cwd=tmp_path, mode='estimate', **settings)
    estimated, = re.findall(r'^  total +([\d,.]+) MB$', out, re.MULTILINE)
    out, _ = run('bench.py', cwd=tmp_path, mode='step', **settings)
    measured, = re.findall(r'peak memory: (\S+) GiB on the GPU', out)
    share = float(measured) * 2**30 / (float(estimated.replace(',', '')) * 1e6)
    assert 0.5 < share < 1.15

# -----------------------------------------------------------------------------
# sampling

CHARACTERS = sorted(set('the cat sat on a mat.\n'))
PROMPTS = ['the cat', 'a', 'sat on']


@pytest.fixture(scope='module')
def random_model(tmp_path_factory):
    """ A model with weights so large that its greedy texts do not repeat -> GPT, out_dir. """
    model_args = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, bias=False, dropout=0.0,
                      vocab_size=len(CHARACTERS))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**model_args)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    checkpoint = {
        'model': model.state_dict(),
        'model_args': model_args,
        'iter_num': 1,
        'best_val_loss': 3.0,
        'config': {'dataset': 'nowhere'},
        'tokenizer': {'kind': 'char', 'itos': CHARACTERS},
    }
    folder = tmp_path_factory.mktemp('random')
    torch.save(checkpoint, folder / 'ckpt.pt')
    return model, folder


@torch.no_grad()
def greedy(model, prompt, max_new_tokens):
    """ The most likely continuation of a text, each token computed without a cache. """
    idx = torch.tensor([[CHARACTERS.index(c) for c in prompt]])             # (1, T)
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size:])                # (1, 1, vocab_size)
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return ''.join(CHARACTERS[i] for i in idx[0, len(prompt):].tolist())


def sample(cwd, out_dir, prompts, **settings):
    """ Runs sample.py -> the texts of the samples. """
    (cwd / 'prompts.txt').write_text('\n'.join(prompts))
    run('sample.py', cwd=cwd, device=DEVICE, out_dir=out_dir, start='LINES:prompts.txt',
        out='samples.jsonl', **settings)
    lines = (cwd / 'samples.jsonl').read_text().splitlines()
    return [json.loads(line)['text'] for line in lines]


# in TF32, near ties could be decided in another way
NO_TF32 = """
import torch
torch.set_float32_matmul_precision = lambda precision: None
"""


@pytest.mark.parametrize('max_new_tokens, settings', [
    pytest.param(50, {}, id='one batch'),
    pytest.param(50, dict(stream=True), id='one after another'),
    pytest.param(50, dict(compile=True), id='compiled', marks=needs_gpu),
    pytest.param(100, {}, id='past block_size'),
])
def test_greedy_samples_equal_the_uncached_path(tmp_path, random_model, monkeypatch,
                                                max_new_tokens, settings):
    """ That of the CPU, for prompts of different lengths. """
    model, out_dir = random_model
    run_first(NO_TF32, tmp_path, monkeypatch)
    texts = sample(tmp_path, out_dir, PROMPTS, dtype='float32', num_samples=1, temperature=0,
                   max_new_tokens=max_new_tokens, **settings)
    assert texts == [greedy(model, prompt, max_new_tokens) for prompt in PROMPTS]
    assert len(set(texts)) == 3


@pytest.mark.parametrize('dtype, settings', [
    ('bfloat16', dict(top_p=0.9, min_p=0.01, max_new_tokens=40)),
    ('float16', dict(past_block='half', max_new_tokens=100)),
])
def test_samples_in_16_bits(tmp_path, random_model, dtype, settings):
    """ All tokens are read at the end, and with `stop` each is read at once. """
    _, out_dir = random_model
    settings = dict(settings, dtype=dtype, num_samples=4)
    texts = sample(tmp_path, out_dir, ['the cat'], **settings)
    assert [len(text) for text in texts] == [settings['max_new_tokens']] * 4
    assert len(set(texts)) == 4
    stopped = sample(tmp_path, out_dir, ['the cat'], stop='a', **settings)
    assert stopped == [text.partition('a')[0] for text in texts]


@needs_gpu
def test_int8_is_refused(tmp_path, random_model):
    _, out_dir = random_model
    _, error = run('sample.py', cwd=tmp_path, code=1, out_dir=out_dir, quantize='int8',
                   device='cuda')
    assert "quantize='int8'" in error
    assert error.count('\n') == 1

# -----------------------------------------------------------------------------
# bench.py


@pytest.mark.parametrize('mode, settings, pattern', [
    ('step', dict(compile=False), r'time per iteration: \S+ms, MFU: \d+\.\d\d%$'),
    ('sample', dict(dtype='bfloat16', max_new_tokens=8), r'this, batch 10: \S+ tokens/s'),
    ('estimate', {}, r' +this machine +[\d.,]+ TFLOP/s'),
])
def test_bench(tmp_path, dataset, mode, settings, pattern):
    out, _ = run('bench.py', cwd=tmp_path, device=DEVICE, mode=mode, dataset=dataset, **SIZES,
                 **settings)
    assert re.search('^' + pattern, out, re.MULTILINE)

"""
Every path that the scripts take on a GPU, once, as a user runs them. Planned for at most four
minutes on an H100, half of them to compile (not measured yet).

    python -m pytest tests/test_cuda.py -x

Where there is no GPU, what is not peculiar to one runs on the CPU, so that the tests are known to
work.
"""
import json
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, run, run_script, train
from kill_and_resume import differences
from processes import run_first, start_training

from components.checkpoint import load_checkpoint
from components.device import missing_for_compile
from model import GPT, GPTConfig

# torch.cuda.is_available() does not prevent the forks of fork_server.py from using the GPU, as it
# is called in another process
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason='requires a CUDA GPU')
instead_of_gpu = [pytest.mark.slow, pytest.mark.skipif(HAS_GPU, reason='runs on the GPU')]

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=8)
FAITHFUL = dict(SIZES, gradient_accumulation_steps=2)
RECIPE = dict(FAITHFUL, rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02,
              cooldown_iters=10)
ARCHITECTURES = dict(faithful=FAITHFUL, recipe=RECIPE)
OPTIMIZERS = dict(faithful='AdamW', recipe='AdamW and Muon')
# of losses after 20 updates in another dtype, or in TF32, which float32 is on a GPU
TOLERANCE = 0.01


@pytest.fixture(scope='module', params=[
    pytest.param('cuda', marks=needs_gpu),
    pytest.param('cpu', marks=instead_of_gpu),
])
def device(request):
    return request.param


@pytest.fixture(scope='module')
def reference(tmp_path_factory, dataset):
    """ reference('faithful') -> what train() returns for a run on the CPU in float32. """
    @cache
    def run_once(architecture):
        folder = tmp_path_factory.mktemp(architecture)
        return train(folder, dataset, **ARCHITECTURES[architecture])
    return run_once


@pytest.fixture(scope='module')
def trained(tmp_path_factory, dataset, device):
    """ The folder of a run on the device. """
    folder = tmp_path_factory.mktemp('trained')
    train(folder, dataset, device=device, **FAITHFUL)
    return folder / 'out'


def assert_equal_runs(a, b):
    """ Compares the losses and evaluations that train() returns for two runs. """
    losses_of_a, evaluations_of_a, _ = a
    losses_of_b, evaluations_of_b, _ = b
    assert len(losses_of_a) == 20
    assert losses_of_a == pytest.approx(losses_of_b, abs=TOLERANCE)
    assert list(evaluations_of_a) == list(evaluations_of_b)
    for iter_num, pair in evaluations_of_a.items():
        assert pair == pytest.approx(evaluations_of_b[iter_num], abs=TOLERANCE)


def last_line(error):
    """ The last line of standard error, where PyTorch may warn first. """
    assert 'Traceback' not in error
    return error.splitlines()[-1]

# -----------------------------------------------------------------------------
# training


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_training(tmp_path, dataset, device, reference, dtype, architecture):
    """ With two micro-batches an iteration. """
    ended = train(tmp_path, dataset, device=device, dtype=dtype, **ARCHITECTURES[architecture])
    names = OPTIMIZERS[architecture]
    assert f'device: {device}, {dtype}, not compiled, 1 process, {names}\n' in ended[2]
    assert_equal_runs(ended, reference(architecture))


# training and evaluation have a graph each
NO_RECOMPILATION = """
import torch._dynamo
torch._dynamo.config.recompile_limit = 2
torch._dynamo.config.fail_on_recompile_limit_hit = True
"""


@needs_gpu
@pytest.mark.parametrize('architecture, dtype', [('faithful', 'bfloat16'), ('recipe', 'float16')])
def test_compiled_training(tmp_path, dataset, reference, monkeypatch, architecture, dtype):
    run_first(NO_RECOMPILATION, tmp_path, monkeypatch)
    ended = train(tmp_path, dataset, device='cuda', dtype=dtype, compile=True,
                  **ARCHITECTURES[architecture])
    assert f'device: cuda, {dtype}, compiled' in ended[2]
    assert_equal_runs(ended, reference(architecture))


@needs_gpu
def test_training_with_cuda_graphs(tmp_path, dataset):
    settings = {**RECIPE, 'gradient_accumulation_steps': 1, 'device': 'cuda', 'dtype': 'bfloat16'}
    ended = train(tmp_path, dataset, compile='reduce-overhead', **settings)
    assert 'device: cuda, bfloat16, compiled with CUDA graphs' in ended[2]
    assert_equal_runs(ended, train(tmp_path, dataset, out_dir='eager', **settings))


@needs_gpu
def test_automatic_choice(tmp_path, dataset):
    _, _, out = train(tmp_path, dataset, device='auto', dtype='auto', compile='auto', max_iters=1,
                      **FAITHFUL)
    capability = torch.cuda.get_device_capability()
    dtype = 'bfloat16' if capability >= (8, 0) else 'float16'
    compiled = 'compiled'
    if missing_for_compile('cuda') or capability < (7, 0):
        compiled = 'not compiled'
    assert f'device: cuda, {dtype}, {compiled}, 1 process, AdamW\n' in out


def test_crop_of_block_size(tmp_path, dataset, device, trained):
    settings = {**FAITHFUL, 'block_size': 32, 'init_from': trained / 'ckpt.pt'}
    ended = train(tmp_path, dataset, device=device, **settings)
    on_cpu = train(tmp_path, dataset, out_dir='cpu', **settings)
    assert_equal_runs(ended, on_cpu)
    checkpoint = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert checkpoint['model_args']['block_size'] == 32
    assert checkpoint['model']['transformer.wpe.weight'].shape == (32, 32)


def test_evaluation_of_the_whole_split(tmp_path, dataset, device, trained):
    settings = dict(FAITHFUL, init_from='resume', out_dir=trained, eval_only=True, eval_iters=-1)
    _, evaluations, out = train(tmp_path, dataset, device=device, **settings)
    _, on_cpu, _ = train(tmp_path, dataset, **settings)
    assert evaluations[20] == pytest.approx(on_cpu[20], abs=TOLERANCE)
    assert 'bits per byte' in out

# -----------------------------------------------------------------------------
# skipped updates and resumed runs

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


@pytest.mark.parametrize('architecture, dtype', [('faithful', 'float16'), ('recipe', 'float32')])
def test_skipped_updates_change_nothing(tmp_path, dataset, device, monkeypatch, architecture,
                                        dtype):
    settings = dict(ARCHITECTURES[architecture], device=device, dtype=dtype, eval_interval=0,
                    decay_lr=False)
    train(tmp_path, dataset, max_iters=3, **settings)
    before = load_checkpoint(tmp_path / 'out/ckpt.pt')
    run_first(NON_FINITE_LOSSES, tmp_path, monkeypatch)
    _, _, out = train(tmp_path, dataset, max_iters=6, init_from='resume', **settings)
    # on a GPU, an update is looked at an iteration later
    assert 'iter 4: loss nan, grad norm nan: update skipped, 2 in a row' in out
    after = load_checkpoint(tmp_path / 'out/ckpt.pt')
    assert after['iter_num'] == 6
    names = ['model', 'optimizer']
    if architecture == 'recipe':
        names.append('muon')
    for name in names:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_run_ends_after_skipped_updates(tmp_path, dataset, device, monkeypatch):
    run_first(NON_FINITE_LOSSES, tmp_path, monkeypatch)
    settings = {**SMALL, **FAITHFUL, 'dataset': dataset, 'device': device, 'max_bad_steps': 3}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert last_line(error).startswith('train.py: stopped at iteration 2: 3 non-finite updates')


def train_twice(tmp_path, dataset, **settings):
    """ A run, and the same in out/ with a pause -> what train() returns for both. """
    whole = train(tmp_path, dataset, out_dir='uninterrupted', **settings)
    losses, evaluations, _ = train(tmp_path, dataset, max_iters=10, **settings)
    more_losses, more_evaluations, out = train(tmp_path, dataset, init_from='resume', **settings)
    assert min(more_losses) == 10
    return whole, ({**losses, **more_losses}, {**evaluations, **more_evaluations}, out)


def test_resume(tmp_path, dataset, device, reference):
    """
    On a GPU the runs are equal up to rounding. The gradients of attention, and where compiled also
    those of the embeddings, are sums by atomic additions, in an order that changes.
    """
    compile = device == 'cuda'  # on a CPU it takes minutes
    settings = dict(FAITHFUL, device=device, dtype='bfloat16', dropout=0.1, compile=compile)
    whole, resumed = train_twice(tmp_path, dataset, **settings)
    assert_equal_runs(resumed, whole)
    without_dropout, evaluations, _ = reference('faithful')
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


def test_resume_by_deterministic_algorithms_is_bit_identical(tmp_path, dataset, device,
                                                             monkeypatch):
    run_first(DETERMINISTIC, tmp_path, monkeypatch)
    train_twice(tmp_path, dataset, device=device, dtype='float16', dropout=0.1, **RECIPE)
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')

# -----------------------------------------------------------------------------
# several processes


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_two_processes_share_a_device(tmp_path, dataset, device, reference, architecture):
    """ By Gloo; NCCL refuses two processes on one GPU. """
    ended = train(tmp_path, dataset, device=device, backend='gloo', processes=2,
                  **ARCHITECTURES[architecture])
    assert '2 processes over gloo' in ended[2]
    assert_equal_runs(ended, reference(architecture))


@needs_gpu
@pytest.mark.skipif(not dist.is_nccl_available(), reason='requires NCCL')
def test_torchrun_with_nccl(tmp_path, dataset, reference):
    """ Compiled, so that DDP wraps a compiled model. """
    process = start_training(tmp_path, dataset, torchrun=['--nproc_per_node=1'], device='cuda',
                             dtype='bfloat16', compile=True, **FAITHFUL)
    try:
        out, error = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, error
    losses = [float(loss) for loss in re.findall(r'^iter \d+: loss ([^,]+),', out, re.MULTILINE)]
    expected_losses, _, _ = reference('faithful')
    assert losses == pytest.approx(list(expected_losses.values()), abs=TOLERANCE)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['config']['backend'] == 'nccl'

# -----------------------------------------------------------------------------
# no synchronization

# PyTorch raises an error where it waits for the GPU. It does not for event.synchronize(), by which
# the numbers of an update are read an iteration later.
SYNCHRONIZATION_IS_AN_ERROR = """
import torch
from components import metrics
count_iteration = metrics.Timer.count_iteration

def count_and_watch(self):
    count_iteration(self)
    if self.num_iters == 5:
        torch.cuda.set_sync_debug_mode('error')
        try:
            torch.ones((), device='cuda').item()
        except RuntimeError:
            print('synchronization is an error')
    if self.num_iters == 25:
        torch.cuda.set_sync_debug_mode('default')
        print('20 iterations without synchronization')

metrics.Timer.count_iteration = count_and_watch
"""
LARGE_BATCH = 64  # from 3,072 tokens on, PyTorch has another kernel for gradients of embeddings


@needs_gpu
@pytest.mark.parametrize('architecture, settings', [
    pytest.param('faithful', dict(dtype='float32', batch_size=LARGE_BATCH), id='float32'),
    pytest.param('faithful', dict(dtype='float16', dropout=0.1), id='float16'),
    pytest.param('recipe', dict(dtype='bfloat16', batch_size=LARGE_BATCH), id='recipe'),
    pytest.param('faithful', dict(dtype='bfloat16', compile=True), id='compiled'),
    pytest.param('faithful', dict(dtype='bfloat16', compile='reduce-overhead',
                                  gradient_accumulation_steps=1), id='CUDA graphs'),
])
def test_loop_does_not_synchronize(tmp_path, dataset, monkeypatch, architecture, settings):
    run_first(SYNCHRONIZATION_IS_AN_ERROR, tmp_path, monkeypatch)
    settings = {**ARCHITECTURES[architecture], 'device': 'cuda', **settings}
    _, _, out = train(tmp_path, dataset, max_iters=30, log_interval=0, eval_interval=0, **settings)
    assert 'synchronization is an error\n20 iterations without synchronization\n' in out

# -----------------------------------------------------------------------------
# memory


# the limit of a GPU leaves room for the products that measure its peak
LIMIT_MEMORY = dict(
    cuda="""
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(2**30 / total)
""",
    cpu="""
import re
import resource
status = open('/proc/self/status').read()
used = 1024 * int(re.search(r'VmSize:\\s+(\\d+) kB', status)[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
""")


def test_out_of_memory(tmp_path, dataset, device, monkeypatch):
    if device == 'cpu' and sys.platform != 'linux':
        pytest.skip('requires /proc')
    run_first(LIMIT_MEMORY[device], tmp_path, monkeypatch)
    settings = {**SMALL, **FAITHFUL, 'dataset': dataset, 'device': device, 'eval_interval': 0,
                'dtype': 'bfloat16', 'batch_size': 16384}
    out, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'checkpoints and log.csv go to out' in out  # the last line before the loop
    assert last_line(error).startswith('train.py: out of memory (')
    assert last_line(error).endswith('--batch_size=8192 --gradient_accumulation_steps=4')


@needs_gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_peak_memory_is_below_the_estimate(tmp_path, dtype):
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
    assert 0.5 < share < 1

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
    run('sample.py', cwd=cwd, out_dir=out_dir, start='LINES:prompts.txt', out='samples.jsonl',
        **settings)
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
def test_greedy_samples_equal_the_uncached_path(tmp_path, device, random_model, monkeypatch,
                                                max_new_tokens, settings):
    """ That of the CPU, for prompts of different lengths. """
    model, out_dir = random_model
    run_first(NO_TF32, tmp_path, monkeypatch)
    texts = sample(tmp_path, out_dir, PROMPTS, device=device, dtype='float32', num_samples=1,
                   temperature=0, max_new_tokens=max_new_tokens, **settings)
    assert texts == [greedy(model, prompt, max_new_tokens) for prompt in PROMPTS]
    assert len(set(texts)) == 3


@pytest.mark.parametrize('dtype, settings', [
    ('bfloat16', dict(top_p=0.9, min_p=0.01, repetition_penalty=1.2)),
    ('float16', dict(past_block='half', max_new_tokens=100)),
])
def test_samples_in_16_bits(tmp_path, device, random_model, dtype, settings):
    """ All tokens are read at the end, and with `stop` each is read at once. """
    _, out_dir = random_model
    settings = {'max_new_tokens': 40, 'num_samples': 4, **settings, 'device': device,
                'dtype': dtype}
    texts = sample(tmp_path, out_dir, ['the cat'], **settings)
    assert [len(text) for text in texts] == [settings['max_new_tokens']] * 4
    assert len(set(texts)) == 4
    stopped = sample(tmp_path, out_dir, ['the cat'], stop='a', **settings)
    assert stopped == [text.partition('a')[0] for text in texts]


@needs_gpu
def test_int8_is_refused(tmp_path, random_model):
    _, out_dir = random_model
    code, _, error = run_script('sample.py', [f'--out_dir={out_dir}', '--quantize=int8',
                                              '--device=cuda'], tmp_path)
    assert code == 1
    assert error == ("sample.py: quantize='int8' is not available on cuda; it requires an x86 "
                     'CPU\n')

# -----------------------------------------------------------------------------
# bench.py


def bench(cwd, device, mode, **settings):
    out, _ = run('bench.py', cwd=cwd, device=device, mode=mode, **SIZES, **settings)
    return out


def test_bench_step(tmp_path, dataset, device):
    out = bench(tmp_path, device, 'step', dataset=dataset, compile=False)
    assert re.search(r'^time per iteration: \S+ms, MFU: \d+\.\d\d%$', out, re.MULTILINE)
    assert 'peak memory' in out


def test_bench_compare(tmp_path, dataset, device):
    """ On a GPU compiled, in both dtypes. """
    compile = device == 'cuda'
    out = bench(tmp_path, device, 'compare', dataset=dataset, dtype='bfloat16', compile=compile)
    names = ['in float32', 'with Muon', 'without loading']
    if compile:
        names.append('without compile')
    for name in names:
        assert re.search(rf'^{name}: \S+ms, \S+ times as long$', out, re.MULTILINE)


def test_bench_sample(tmp_path, dataset, device):
    out = bench(tmp_path, device, 'sample', dataset=dataset, dtype='bfloat16', max_new_tokens=8)
    for name in ('this, batch 1', 'this, batch 10', 'float32, batch 10',
                 'uncached float32, batch 1'):
        assert re.search(rf'^{name}: \S+ tokens/s', out, re.MULTILINE)


def test_bench_estimate(tmp_path, dataset, device):
    out = bench(tmp_path, device, 'estimate', dataset=dataset)
    assert re.search(r'^  this machine +[\d.,]+ TFLOP/s', out, re.MULTILINE)

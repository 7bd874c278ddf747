""" components/estimate.py, compared with real models, real steps and real files. """
import weakref

import pytest
import torch
from conftest import SMALL, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from components import estimate
from components.device import GPU_PEAKS, peak_flops
from components.optim import clip_and_step, configure_optimizers
from model import GPT, GPTConfig

BATCH_SIZE = 4
SHAPE = dict(vocab_size=50, n_layer=3, n_head=2, n_embd=128, block_size=64)
NEWER = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True)


def new_model(device='cpu', **settings):
    torch.manual_seed(0)
    config = GPTConfig(**{**SHAPE, **settings})
    with torch.device(device):
        return GPT(config)


def forward(model, dtype):
    """ The loss of random tokens, as train.py computes it. """
    shape = (BATCH_SIZE, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, shape)
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        _, loss = model(idx, idx, return_logits=False)
    return loss


def saved_bytes(model, dtype):
    """ Bytes that a forward pass saves for the backward pass, parameters excluded. """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('flags, tolerance', [
    pytest.param({}, 0.02, id='GPT-2'),
    pytest.param(dict(bias=False), 0.02, id='without biases'),
    pytest.param(dict(rotary=True), 0.02, id='rotary'),
    pytest.param(dict(rmsnorm=True), 0.02, id='rmsnorm'),
    pytest.param(dict(qk_norm=True), 0.02, id='qk_norm'),
    pytest.param(NEWER, 0.02, id='all newer flags'),
    pytest.param(dict(dropout=0.1), 0.02, id='dropout'),
    pytest.param(dict(dropout=0.1, **NEWER), 0.1, id='dropout and all newer flags'),
])
def test_saved_activations(dtype, flags, tolerance):
    model = new_model(**flags)
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype)
    log_softmax = 4 * BATCH_SIZE * model.config.block_size * model.config.vocab_size
    estimated = memory['activations'] + memory['weights in 16 bits'] + log_softmax
    assert estimated == pytest.approx(saved_bytes(model, dtype), rel=tolerance)


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_weights_and_moments(muon_lr):
    model = new_model(**NEWER)
    optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'cpu', muon_lr)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    loss = forward(model, 'float32')
    loss.backward()
    clip_and_step(optimizers, scaler, model.parameters(), loss.detach())
    moments = 0
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            moments += sum(tensor.nbytes for name, tensor in state.items() if name != 'step')

    memory = estimate.memory_of_training(new_model('meta', **NEWER), BATCH_SIZE, 'float32', muon_lr)
    assert memory['optimizer moments'] == moments
    assert memory['weights'] == sum(p.nbytes for p in model.parameters())
    assert memory['gradients'] == memory['weights']


class LiveTensors(TorchDispatchMode):
    """ Counts the bytes of tensors that were made in its context and still exist. """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        self.add(storage.nbytes())
        weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('settings', [
    pytest.param({}, id='small vocabulary'),
    pytest.param(dict(vocab_size=5000, n_layer=1, n_embd=32), id='mostly logits'),
    pytest.param(NEWER, id='newer flags'),
])
@pytest.mark.parametrize('num_chunks', [1, 4])
def test_total_memory_is_the_peak_of_two_micro_batches(dtype, settings, num_chunks, monkeypatch):
    with LiveTensors() as live:
        model = new_model(**settings)
        num_logits = BATCH_SIZE * model.config.block_size * model.config.vocab_size
        for module in (model_module, estimate):
            monkeypatch.setattr(module, 'MAX_LOGITS', num_logits // num_chunks)
        optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'cpu')
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for _ in range(2):  # the moments exist from the second iteration on
            for _ in range(2):  # and gradients from the second micro-batch on
                loss = forward(model, dtype)
                loss.backward()
                loss = loss.detach()
            clip_and_step(optimizers, scaler, model.parameters(), loss)
    total = sum(estimate.memory_of_training(model, BATCH_SIZE, dtype).values())
    assert total == pytest.approx(live.peak, rel=0.05)


def test_flops_of_a_real_step():
    model = new_model()
    # FlopCounterMode does not know the CPU's own attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = forward(model, 'float32')
        loss.backward()
    estimated = model.flops_per_token(64) * BATCH_SIZE * 64
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    pytest.param({}, id='GPT-2 without biases'),
    pytest.param(dict(bias=True), id='GPT-2'),
    pytest.param(dict(rotary=True, untied=True, muon_lr=0.01), id='newer flags'),
])
def test_parameters_and_checkpoint_of_a_real_run(tmp_path, dataset, flags):
    settings = {**SMALL, 'n_layer': 3, 'n_embd': 128, 'max_iters': 2, 'dataset': dataset, **flags}
    run('train.py', cwd=tmp_path, **settings)
    sizes = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'dataset', 'dtype')
    settings = {name: settings[name] for name in (*sizes, *flags)}
    out, _ = run('bench.py', cwd=tmp_path, mode='estimate', **settings)

    lines = out.partition('parameters:\n')[2].splitlines()
    totals = [line for line in lines if line.startswith('  total')]
    parts = lines[:lines.index(totals[0])]
    counts = [int(line.split()[-1].replace(',', '')) for line in parts]
    words = totals[0].replace(',', '').split()  # total N a checkpoint of S MB
    num_params = int(words[1])
    checkpoint_size = float(words[-2]) * 1e6

    path = tmp_path / 'out/ckpt.pt'
    weights = torch.load(path, weights_only=True)['model'].values()
    real = {weight.data_ptr(): weight.numel() for weight in weights}  # tied weights once
    assert sum(counts) == num_params == sum(real.values())
    assert checkpoint_size == pytest.approx(path.stat().st_size, rel=0.02)


def test_parameters_of_gpt2():
    counts = estimate.parameters_by_part(new_model('meta', vocab_size=50257, block_size=1024,
                                                   n_layer=12, n_head=12, n_embd=768))
    assert counts['token embedding'] == 50257 * 768
    assert counts['position embedding'] == 1024 * 768
    assert counts['MLP'] == 12 * (8 * 768**2 + 5 * 768)
    assert counts['lm_head'] == 0  # tied
    assert sum(counts.values()) == 124_439_808


@pytest.mark.parametrize('seconds, text', [
    (0.25, '0.2 seconds'),
    (59, '59.0 seconds'),
    (90, '1.5 minutes'),
    (3600, '1.0 hours'),
    (129_600, '1.5 days'),
    (86400 * 12_345, '12,345.0 days'),
])
def test_format_duration(seconds, text):
    assert estimate.format_duration(seconds) == text


def test_report(capsys):
    model = new_model('meta')
    num_params = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(64)
    estimate.print_estimate(model, batch_size=4, gradient_accumulation_steps=5, max_iters=10**9,
                            device_type='cpu', dtype='float32', muon_lr=0.0)
    lines = capsys.readouterr().out.splitlines()

    assert f'  weights {4 * num_params / 1e6:.1f} MB'.split() in [line.split() for line in lines]
    iteration, = [line for line in lines if line.startswith('an iteration')]
    assert f'{5 * 4 * 64:,} tokens, {flops * 5 * 4 * 64 / 1e12:,.4g} TFLOP' in iteration
    peaks = {'A100': GPU_PEAKS['A100'], 'this machine': peak_flops('cpu', 'float32')[0]}
    for device, peak in peaks.items():
        row, = [line for line in lines if line.startswith(f'  {device}  ')]
        for tokens in (5 * 4 * 64 * 10**9, 20 * num_params):
            duration = estimate.format_duration(flops * tokens / (0.4 * peak))
            assert duration in row

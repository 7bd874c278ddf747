""" components/estimate.py, compared with real models, real steps and real files. """
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from components import estimate
from components.device import GPU_MEMORY, GPU_PEAKS, peak_flops
from components.distributed import local_part
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
    config = getattr(model, 'module', model).config  # DDP wraps it
    idx = torch.randint(config.vocab_size, (BATCH_SIZE, config.block_size))
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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('flags', [
    pytest.param({}, id='GPT-2'),
    pytest.param(dict(dropout=0.1), id='dropout'),
    pytest.param(NEWER, id='all newer flags'),
])
def test_saved_activations_with_activation_checkpointing(dtype, flags):
    model = new_model(**flags)
    model.activation_checkpointing = True
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype, activation_checkpointing=True)
    log_softmax = 4 * BATCH_SIZE * model.config.block_size * model.config.vocab_size
    weight_copy = estimate.size_of_weight_copies(model.lm_head, dtype)
    estimated = memory['activations'] + weight_copy + log_softmax
    assert estimated == pytest.approx(saved_bytes(model, dtype), rel=0.02)


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
    """ The most bytes of tensors that were made in its context and existed at the same time. """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.storages.add(local_part(tensor).untyped_storage())
        # FSDP resizes its storages
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('settings', [
    pytest.param({}, id='small vocabulary'),
    pytest.param(dict(vocab_size=5000, n_layer=1, n_embd=32), id='mostly logits'),
    pytest.param(NEWER, id='newer flags'),
])
@pytest.mark.parametrize('num_chunks', [1, 4])
@pytest.mark.parametrize('activation_checkpointing', [False, True])
def test_total_memory_is_the_peak_of_two_micro_batches(
        dtype, settings, num_chunks, activation_checkpointing, monkeypatch):
    with LiveTensors() as live:
        model = new_model(**settings)
        model.activation_checkpointing = activation_checkpointing
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
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype,
                                         activation_checkpointing=activation_checkpointing)
    assert sum(memory.values()) == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('activation_checkpointing', [False, True])
def test_flops_of_a_real_step(activation_checkpointing, dropout):
    model = new_model(dropout=dropout)
    model.activation_checkpointing = activation_checkpointing
    # FlopCounterMode does not know the CPU's own attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = forward(model, 'float32')
        loss.backward()
    flops_per_token = model.flops_per_token(64)
    if activation_checkpointing:
        flops_per_token += estimate.flops_of_recomputation(model, 64)
    estimated = flops_per_token * BATCH_SIZE * 64
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.02)

# -----------------------------------------------------------------------------
# several processes

# trains for two iterations of two micro-batches, and prints what the second one needed
MEASURES = f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch
import torch.distributed as dist
import model as model_module
from components.distributed import local_part, parallelize
from components.optim import clip_and_step, configure_optimizers
from test_estimate import LiveTensors, forward, new_model

class Collectives(LiveTensors):
    sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        N = dist.get_world_size()
        name = func.name()
        if name.startswith('c10d::_allgather_base_'):
            self.sent += (N - 1) * args[1].nbytes     # of the input
        if name.startswith('c10d::_reduce_scatter_base_'):
            self.sent += (N - 1) * args[0].nbytes     # of the output
        if name.startswith('c10d::alltoall_base_'):
            self.sent += (N - 1) * args[0].nbytes // N
        return super().__torch_dispatch__(func, types, args, kwargs)

settings = json.loads(sys.argv[1])
model_module.MAX_LOGITS = settings['max_logits']
fsdp, dtype, muon_lr = settings['fsdp'], settings['dtype'], settings['muon_lr']
dist.init_process_group('gloo')
with Collectives() as measured:
    model = new_model(**settings['model'])
    model.activation_checkpointing = settings['activation_checkpointing']
    config = dict(dtype=dtype, compile=False, fsdp=fsdp)
    raw_model, model, _ = parallelize(model, 'cpu', ddp=True, config=config)
    optimizers = configure_optimizers(raw_model, 0.1, 1e-4, (0.9, 0.95), 'cpu', muon_lr, dtype)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    for iteration in range(2):
        measured.sent = measured.peak = 0
        for index in range(2):
            model.require_backward_grad_sync = index == 1
            loss = forward(model, dtype)
            loss.backward()
            loss = loss.detach()
        clip_and_step(optimizers, scaler, raw_model.parameters(), loss)
if dist.get_rank() == 0:
    moments = [local_part(tensor).nbytes for optimizer in optimizers.values()
               for state in optimizer.state.values()
               for name, tensor in state.items() if name != 'step']
    weights = [local_part(p).nbytes for p in raw_model.parameters()]
    print(json.dumps(dict(sent=measured.sent, peak=measured.peak, weights=sum(weights),
                          moments=sum(moments))))
"""


def measure(folder, monkeypatch, processes, **settings):
    """ What two iterations in several processes need, and what the estimate says of them. """
    defaults = dict(fsdp=False, dtype='float32', muon_lr=0.0, activation_checkpointing=False,
                    model={}, max_logits=model_module.MAX_LOGITS)
    settings = {**defaults, **settings}
    script = folder / 'script.py'
    script.write_text(MEASURES)
    out, _ = run(script, json.dumps(settings), cwd=folder, processes=processes)
    model = new_model('meta', **settings.pop('model'))
    monkeypatch.setattr(estimate, 'MAX_LOGITS', settings['max_logits'])
    monkeypatch.setattr(model_module, 'MAX_LOGITS', settings.pop('max_logits'))
    memory = estimate.memory_of_training(model, BATCH_SIZE, processes=processes, **settings)
    settings.pop('activation_checkpointing')
    sent = estimate.sent_per_iteration(model, processes=processes, micro_batches=2, **settings)
    return json.loads(out), memory, sent


MOSTLY_LOGITS = dict(vocab_size=5000, n_layer=1, n_embd=32)
# chunks of 64 tokens, of which the model is twice as wide
WIDE_CHUNKS = dict(model=dict(vocab_size=4000), max_logits=64 * 4000)


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    pytest.param({}, id='float32'),
    pytest.param(dict(dtype='bfloat16'), id='bfloat16'),
    pytest.param(dict(activation_checkpointing=True), id='activation checkpointing'),
    pytest.param(dict(model=MOSTLY_LOGITS), id='mostly logits'),
    pytest.param(dict(model=MOSTLY_LOGITS, max_logits=64 * 5000, dtype='bfloat16'), id='chunks'),
    pytest.param(WIDE_CHUNKS, id='wide chunks'),
    pytest.param(dict(muon_lr=0.02, activation_checkpointing=True, dtype='bfloat16'), id='Muon'),
])
@pytest.mark.parametrize('processes', [2, 3])  # 3: parameters are padded
def test_fsdp(tmp_path, monkeypatch, processes, settings):
    measured, memory, sent = measure(tmp_path, monkeypatch, processes, fsdp=True, **settings)
    assert memory['weights'] == memory['gradients'] == measured['weights']
    assert memory['optimizer moments'] == measured['moments']
    assert sum(sent.values()) == measured['sent']
    assert sum(memory.values()) == pytest.approx(measured['peak'], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    pytest.param({}, id='whole logits'),
    pytest.param(dict(activation_checkpointing=True), id='activation checkpointing'),
    pytest.param(WIDE_CHUNKS, id='wide chunks'),
])
@pytest.mark.parametrize('processes', [2, 4, 7])  # of a shape there are 3 matrices
def test_ddp(tmp_path, monkeypatch, processes, settings):
    measured, memory, sent = measure(tmp_path, monkeypatch, processes, muon_lr=0.02, **settings)
    assert memory['weights'] == measured['weights']
    assert memory['optimizer moments'] == measured['moments']
    assert sent[estimate.MUON] == measured['sent']
    all_reduced = 2 * (processes - 1) / processes * measured['weights']
    assert sent[estimate.GRADIENTS] == pytest.approx(all_reduced)
    assert sum(memory.values()) == pytest.approx(measured['peak'], rel=0.1)


def test_one_process_has_all_rows():
    p = torch.empty(10, 3, device='meta')
    assert [estimate.shard_numel(p, n) for n in (1, 2, 3, 4, 100)] == [30, 15, 12, 9, 3]


@pytest.mark.parametrize('sent, waiting', [
    pytest.param({'gradients': 3e9}, 0, id='hidden by the last backward pass'),
    pytest.param({'gradients': 7e9}, 3, id='gradients'),
    pytest.param({'blocks': 12e9}, 0, id='hidden by all micro-batches'),
    pytest.param({'blocks': 14e9}, 2, id='blocks'),
    pytest.param({'blocks': 5e9, 'root': 1e9}, 1, id='root'),
    pytest.param({'gradients': 3e9, 'Muon': 2e9}, 2, id='Muon'),
])
def test_waiting_for_what_computing_does_not_hide(sent, waiting):
    """ Two micro-batches of 6 seconds each, of which the backward pass takes 4. """
    assert estimate.waiting_time(sent, 1e9, 12, 2) == pytest.approx(waiting)


def test_checkpoint_interval_loses_least():
    """ Saving for a share of the time, and half an interval for each failure (Young 1974). """
    save = 100e9 / estimate.DISK_SPEED
    between_failures = 54 * 86400 * 16 / 419  # of 1024 of the 16,384 GPUs

    def lost(interval):
        return save / interval + interval / 2 / between_failures

    best = estimate.best_checkpoint_interval(100e9, 1024)
    assert best == pytest.approx(min(range(100, 10_000), key=lost), abs=1)


def test_memory_of_every_gpu():
    assert list(GPU_MEMORY) == list(GPU_PEAKS)


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


def report(capsys, **settings):
    """ The lines that print_estimate() prints of a small model. """
    defaults = dict(batch_size=4, gradient_accumulation_steps=5, max_iters=10**9, device='cpu',
                    dtype='float32', muon_lr=0.0, processes=1, fsdp=False,
                    activation_checkpointing=False, interconnect=50.0)
    estimate.print_estimate(new_model('meta'), {**defaults, **settings})
    return capsys.readouterr().out.splitlines()


def test_report(capsys):
    model = new_model('meta')
    num_params = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(64)
    lines = report(capsys)

    assert f'  weights {4 * num_params / 1e6:.1f} MB'.split() in [line.split() for line in lines]
    iteration, = [line for line in lines if line.startswith('an iteration')]
    assert f'{5 * 4 * 64:,} tokens, {flops * 5 * 4 * 64 / 1e12:,.4g} TFLOP' in iteration
    peaks = {'A100': GPU_PEAKS['A100'], 'this machine': peak_flops('cpu', 'float32')[0]}
    for device, peak in peaks.items():
        row, = [line for line in lines if line.startswith(f'  {device}  ')]
        for tokens in (5 * 4 * 64 * 10**9, 20 * num_params):
            duration = estimate.format_duration(flops * tokens / (0.4 * peak))
            assert duration in row
    assert not [line for line in lines if 'process' in line or 'MFU  ' in line]


def row_of(lines, gpu):
    """ memory, fits, milliseconds of computing and of waiting, MFU in percent. """
    row, = [line for line in lines if line.startswith(f'  {gpu}  ')]
    words = row.replace(',', '').replace('%', '').split()
    return int(words[1]), words[3], float(words[4]), float(words[6]), float(words[8])


@pytest.mark.parametrize('fsdp', [False, True])
def test_report_of_several_processes(capsys, fsdp):
    """ 13 micro-batches for 3 processes: the slowest has 5, and the others wait for it. """
    steps = 12 if fsdp else 13
    shape = dict(batch_size=1000, gradient_accumulation_steps=steps, max_iters=1000, processes=3,
                 interconnect=2.0, fsdp=fsdp)
    lines = report(capsys, **shape)
    model = new_model('meta')
    sent = estimate.sent_per_iteration(model, 'float32', 0.0, 3, fsdp, math.ceil(steps / 3))
    for name, size in sent.items():
        line, = [line for line in lines if line.startswith(f'  {name} ') and ' ms, ' in line]
        words = line.replace(',', '').split()
        assert float(words[1]) == pytest.approx(size / 1e6, abs=0.06)
        assert float(words[3]) == pytest.approx(size / 2e6, abs=0.06)

    _, fits, compute, waiting, mfu = row_of(lines, 'H100')
    flops = model.flops_per_token(64) * 1000 * 64
    seconds = math.ceil(steps / 3) * flops / (0.4 * 989e12)
    expected_waiting = estimate.waiting_time(sent, 2e9, seconds, math.ceil(steps / 3))
    assert fits == 'yes'
    assert compute == pytest.approx(1000 * seconds, abs=0.06)
    assert waiting == pytest.approx(1000 * expected_waiting, abs=0.06)
    total = seconds + expected_waiting
    assert mfu == pytest.approx(100 * steps * flops / total / (3 * 989e12), abs=0.06)
    row, = [line for line in lines if line.startswith('  H100  ')]
    assert estimate.format_duration(1000 * total) in row


def test_report_of_activation_checkpointing(capsys):
    lines = report(capsys, activation_checkpointing=True)
    model = new_model('meta')
    share = estimate.flops_of_recomputation(model, 64) / model.flops_per_token(64)
    assert f'activation checkpointing computes {share:.0%} more than MFU counts' in lines
    *_, mfu = row_of(lines, 'A100')
    assert mfu == pytest.approx(40 / (1 + share), abs=0.06)
    assert not [line for line in lines if 'process' in line or 'failures' in line]


def test_report_of_what_fits(capsys):
    bytes_per_sequence = sum(estimate.memory_of_training(new_model('meta'), 10**6, 'float32', 0.0,
                                                         processes=2).values()) / 10**6
    batch_size = int(30e9 / bytes_per_sequence)
    lines = report(capsys, batch_size=batch_size, processes=2)
    fits = {gpu: row_of(lines, gpu)[1] for gpu in ('H100', 'A100', 'L4')}
    assert fits == {'H100': 'yes', 'A100': 'yes', 'L4': 'no'}
    lines = report(capsys, batch_size=int(batch_size * 37 / 30), processes=2)
    assert row_of(lines, 'A100')[:2] == (40, 'no')  # less than a tenth is free


def test_report_of_failures(capsys):
    line, = [line for line in report(capsys, processes=2) if line.startswith('failures')]
    model = new_model('meta')
    size = 12 * sum(p.numel() for p in model.parameters())
    assert estimate.format_duration(54 * 86400 * 8192 / 419) in line
    assert estimate.format_duration(estimate.best_checkpoint_interval(size, 2)) in line

# -----------------------------------------------------------------------------
# config/scaling.md


def tables_of(page):
    """ The rows of the tables of a page, by the words of their heads: {head: [[cell, ...]]}. """
    tables = {}
    rows = None
    for line in page.read_text().splitlines():
        if not line.startswith('|'):
            rows = None
            continue
        cells = [cell.strip().replace(',', '') for cell in line.strip('|').split('|')]
        if rows is None:
            rows = tables[tuple(cells)] = []
        elif cells[0] != '---':
            rows.append(cells)
    return list(tables.values())


SIZES, PLAN, CHECKPOINTS = tables_of(ROOT / 'config/scaling.md')


def model_of_page(name):
    """ The model of a row of config/scaling.md, and its number of parameters there. """
    row, = [row for row in SIZES if row[0] == name]
    n_layer, n_head, n_embd, block_size, num_params = map(int, row[1:])
    model = new_model('meta', n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False,
                      block_size=block_size, vocab_size=50304)
    return model, num_params


def settings_of_page(processes, how, micro_batch):
    """ Settings of a row: '8', 'FSDP', '4 x 32'. """
    batch_size, micro_batches = map(int, micro_batch.split(' x '))
    processes = int(processes)
    interconnect = 450.0 if processes <= 8 else 50.0
    return SimpleNamespace(
        processes=processes, fsdp=how == 'FSDP', batch_size=batch_size, dtype='bfloat16',
        gradient_accumulation_steps=micro_batches * processes, muon_lr=0.0,
        activation_checkpointing=False, interconnect=interconnect)


def printed(number):
    """ A number of the page may be rounded to two digits. """
    return pytest.approx(float(number), rel=0.05, abs=0.05)


@pytest.mark.parametrize('row', [row for row in PLAN if row[3] != 'does not fit'],
                         ids=lambda row: f'{row[0]} on {row[1]}')
def test_plan_of_the_page(row):
    name, processes, how, micro_batch, tokens, gigabytes, compute, waiting, mfu, duration = row
    model, num_params = model_of_page(name)
    s = settings_of_page(processes, how, micro_batch)
    T = model.config.block_size
    tokens_per_iter = s.gradient_accumulation_steps * s.batch_size * T
    assert int(tokens) == tokens_per_iter
    assert num_params == sum(p.numel() for p in model.parameters())
    memory = estimate.memory_of_training(model, s.batch_size, s.dtype, 0.0, s.processes, s.fsdp)
    assert sum(memory.values()) / 1e9 == pytest.approx(float(gigabytes), abs=0.051)
    assert float(gigabytes) <= 0.9 * 80
    time = estimate.time_of_iteration(model, s, GPU_PEAKS['H100'])
    assert time.compute * 1000 == printed(compute)
    assert time.waiting * 1000 == printed(waiting)
    assert 40 * time.compute / time.total == pytest.approx(float(mfu.rstrip('%')), abs=0.051)
    number, unit = estimate.format_duration(20 * num_params / tokens_per_iter * time.total).split()
    assert duration.split()[1] == unit
    assert float(number) == printed(duration.split()[0])


@pytest.mark.parametrize('row', CHECKPOINTS, ids=lambda row: row[0])
def test_checkpoints_of_the_page(row):
    name, size, duration, *intervals = row
    model, num_params = model_of_page(name)
    assert 12 * num_params / 1e9 == printed(size.split()[0])
    assert 12 * num_params / estimate.DISK_SPEED == printed(duration.split()[0])
    for processes, interval in zip((8, 64, 256, 1024), intervals):
        plan, = [row for row in PLAN if row[:2] == [name, str(processes)]]
        s = settings_of_page(*plan[1:4])
        seconds = estimate.best_checkpoint_interval(12 * num_params, processes)
        time = estimate.time_of_iteration(model, s, GPU_PEAKS['H100'])
        assert seconds / time.total == printed(interval.split()[0])


def test_what_does_not_fit_on_the_page():
    row, = [row for row in PLAN if row[3] == 'does not fit']
    model, _ = model_of_page(row[0])
    memory = estimate.memory_of_training(model, 1, 'bfloat16', activation_checkpointing=True)
    assert sum(memory.values()) > GPU_MEMORY['H100']

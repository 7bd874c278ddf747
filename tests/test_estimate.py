""" components/estimate.py, compared with real steps and files, and config/scaling.md with it. """
import weakref
from functools import cache, partial

import pytest
import torch
from conftest import FAST_MODEL, ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from components import estimate, functional
from components.device import GPU_MEMORY, GPU_PEAKS
from components.optim import clip_and_step, configure_optimizers
from model import GPT, GPTConfig

BATCH_SIZE = 4
TINY = dict(vocab_size=50, n_layer=3, n_head=2, n_embd=64, block_size=64)
MOSTLY_LOGITS = dict(vocab_size=5000, n_layer=1, n_embd=32)
LARGER = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=500)


def new_model(device='cpu', **settings):
    with torch.device(device):
        return GPT(GPTConfig(**{**TINY, **settings}))


def forward(model, dtype):
    """ The loss of random tokens, as train.py computes it. """
    idx = torch.randint(model.config.vocab_size, (BATCH_SIZE, model.config.block_size))
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        _, loss = model(idx, idx, return_logits=False)
    return loss


def saved_bytes(model, dtype):
    """ Bytes that a forward pass saves for the backward pass, parameters excluded. """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


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
                self.storages.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('settings', [
    {}, LARGER, dict(bias=False), dict(dropout=0.1), FAST_MODEL,
    *[{name: True} for name in FAST_MODEL],
], ids=str)
def test_saved_activations(dtype, settings):
    model = new_model(**settings)
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype)
    log_softmax = 4 * BATCH_SIZE * model.config.block_size * model.config.vocab_size
    estimated = memory['activations'] + memory.get('weights in 16 bits', 0) + log_softmax
    assert estimated == pytest.approx(saved_bytes(model, dtype), rel=0.1)


@pytest.mark.parametrize('dtype, architecture, settings', [
    ('float32', {}, {}),
    ('float32', LARGER, {}),
    ('float32', LARGER, dict(activation_checkpointing=True)),
    ('float32', MOSTLY_LOGITS, {}),
    ('float32', MOSTLY_LOGITS, dict(num_chunks=4)),
    ('float32', FAST_MODEL, dict(muon_lr=0.02)),
    ('bfloat16', {}, {}),
    ('bfloat16', FAST_MODEL, dict(muon_lr=0.02, num_chunks=4)),
    ('bfloat16', {}, dict(activation_checkpointing=True)),
    ('bfloat16', MOSTLY_LOGITS, dict(num_chunks=4)),
], ids=str)
def test_total_is_the_peak_of_two_micro_batches(dtype, architecture, settings, monkeypatch):
    settings = dict(settings)
    num_chunks = settings.pop('num_chunks', 1)
    with LiveTensors() as live:
        model = new_model(**architecture)
        model.activation_checkpointing = settings.get('activation_checkpointing', False)
        num_logits = BATCH_SIZE * model.config.block_size * model.config.vocab_size
        for module in (functional, estimate):
            monkeypatch.setattr(module, 'MAX_LOGITS', num_logits // num_chunks)
        optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), 'cpu',
                                          settings.get('muon_lr', 0.0))
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for _ in range(2):  # the moments exist from the second iteration on
            for _ in range(2):  # and gradients from the second micro-batch on
                loss = forward(model, dtype)
                loss.backward()
                loss = loss.detach()
            clip_and_step(optimizers, scaler, model.parameters(), loss)
    memory = estimate.memory_of_training(model, BATCH_SIZE, dtype, **settings)
    assert sum(memory.values()) == pytest.approx(live.peak, rel=0.1)
    moments = 0
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            moments += sum(tensor.nbytes for name, tensor in state.items() if name != 'step')
    assert memory['optimizer moments'] == moments


def test_what_several_processes_divide():
    memory = partial(estimate.memory_of_training, new_model('meta'), 1, 'float32')
    alone = memory()
    assert memory(processes=4) == {**alone, 'buckets of DDP': alone['gradients']}
    fsdp = memory(processes=4, fsdp=True)
    for name in ('weights', 'gradients', 'optimizer moments'):
        assert fsdp[name] == alone[name] / 4
    assert fsdp['activations'] == alone['activations']
    block = 4 * (12 * 64**2 + 13 * 64)
    assert fsdp['gathered by FSDP'] == 2 * (alone['weights'] - 2 * block)


@pytest.mark.parametrize('fsdp', [False, True])
def test_compiled_logits_are_in_full(fsdp):
    """ Logits and their gradient in 16 bits. """
    memory = partial(estimate.memory_of_training, new_model('meta', vocab_size=50304), 100,
                     'bfloat16', processes=2, fsdp=fsdp)
    chunks = memory()['logits and loss']
    compiled = memory(compile=True)['logits and loss']
    assert compiled == 2 * 2 * 50304 * 100 * 64 > chunks


@pytest.mark.parametrize('dtype, num_bytes', [('float32', 64), ('bfloat16', 36), ('float16', 36)])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_attention_of_cuda(dtype, num_bytes, dropout):
    """ In the dtype of the run, and without T x T matrices. """
    config = new_model('meta', dropout=dropout).config
    masks = 2 * getattr(torch, dtype).itemsize if dropout else 0
    assert estimate.activations_per_layer(config, dtype, 'cuda') == (num_bytes + masks) * 64


def test_largest_micro_batches():
    """ A tenth of the GPU stays free. """
    def memory(batch_size):
        return {'weights': 5, 'activations': 2 * batch_size}
    capacities = {'tiny': 7, 'small': 8, 'larger': 10, 'large': 100}
    expected = {'tiny': 0, 'small': 1, 'larger': 2, 'large': 42}
    assert estimate.largest_micro_batches(capacities, memory) == expected


@pytest.mark.parametrize('activation_checkpointing', [False, True])
def test_flops_of_a_real_step(activation_checkpointing):
    model = new_model()
    model.activation_checkpointing = activation_checkpointing
    # FlopCounterMode does not know the CPU's own attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, 'float32').backward()
    tokens = BATCH_SIZE * 64
    seconds = estimate.seconds_of_training(model, tokens, 1e9, 2, activation_checkpointing)
    assert seconds * 2 * 0.4e9 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_parameters_of_gpt2():
    counts = estimate.parameters_by_part(new_model('meta', vocab_size=50257, block_size=1024,
                                                   n_layer=12, n_head=12, n_embd=768))
    assert counts['MLP'] == 12 * (8 * 768**2 + 5 * 768)
    assert counts['lm_head'] == 0  # tied
    assert sum(counts.values()) == 124_439_808


@pytest.mark.parametrize('seconds, text', [
    (0.25, '0.2 seconds'), (90, '1.5 minutes'), (3600, '1.0 hours'), (1e9, '11,574.1 days'),
])
def test_format_duration(seconds, text):
    assert estimate.format_duration(seconds) == text


def test_report(capsys):
    model = new_model('meta')
    num_params = sum(p.numel() for p in model.parameters())
    settings = dict(batch_size=7, gradient_accumulation_steps=5, max_iters=1000, device='cpu',
                    dtype='bfloat16', compile=False, muon_lr=0.0, processes=1, fsdp=False,
                    activation_checkpointing=False)
    estimate.print_estimate(model, settings)
    out = capsys.readouterr().out
    assert f'{num_params:,}, a checkpoint of {12 * num_params / 1e6:,.1f} MB' in out
    total = sum(estimate.memory_of_training(model, 7, 'bfloat16').values())
    assert f'{total / 1e6:,.1f} MB' in out
    tokens_per_iter = 5 * 7 * 64
    assert f'an iteration: {tokens_per_iter:,} tokens' in out
    rows = {line[2:16].strip(): line for line in out.splitlines()}
    assert 'this machine' in rows
    on_cuda = partial(estimate.memory_of_training, model, dtype='bfloat16', device_type='cuda')
    largest = estimate.largest_micro_batches(GPU_MEMORY, on_cuda)
    for gpu, peak in GPU_PEAKS.items():
        for tokens in (1000 * tokens_per_iter, 20 * num_params):
            seconds = estimate.seconds_of_training(model, tokens, peak)
            assert estimate.format_duration(seconds) in rows[gpu]
        assert f' GB{largest[gpu]:>8} ' in rows[gpu]

# -----------------------------------------------------------------------------
# config/scaling.md

PAGE = (ROOT / 'config/scaling.md').read_text()
MODELS = {  # n_layer, n_head, n_embd, block_size
    '124M': (12, 12, 768, 1024),
    '350M': (24, 16, 1024, 1024),
    '774M': (36, 20, 1280, 1024),
    '1.5B': (48, 25, 1600, 1024),
    '7B': (32, 32, 4096, 2048),
}


@cache
def model_of_page(name):
    n_layer, n_head, n_embd, block_size = MODELS[name]
    return new_model('meta', n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False,
                     block_size=block_size, vocab_size=50304)


def sizes():
    for name in MODELS:
        num_params = sum(p.numel() for p in model_of_page(name).parameters())
        yield name, *MODELS[name], f'{num_params:,}', f'{12 * num_params / 1e9:.1f} GB'


def memory():
    cases = [('124M', 1, 'no'), ('350M', 1, 'no'), ('774M', 1, 'no'), ('1.5B', 1, 'no'),
             ('1.5B', 1, 'yes'), ('1.5B', 8, 'no'), ('7B', 1, 'yes'), ('7B', 8, 'no'),
             ('7B', 8, 'yes'), ('7B', 64, 'no')]
    for name, processes, checkpointing in cases:
        memory = partial(estimate.memory_of_training, model_of_page(name), dtype='bfloat16',
                         processes=processes, fsdp=processes > 1, compile=True,
                         activation_checkpointing=checkpointing == 'yes', device_type='cuda')
        one_sequence = f'{sum(memory(1).values()) / 1e9:.1f} GB'
        capacities = {size: size * 1e9 for size in (16, 24, 40, 80, 141)}
        largest = estimate.largest_micro_batches(capacities, memory)
        yield name, processes, checkpointing, one_sequence, *largest.values()


def time():
    for name in MODELS:
        model = model_of_page(name)
        chinchilla = 20 * sum(p.numel() for p in model.parameters())
        for tokens in (chinchilla, 600_000 * 40 * 12 * 1024):  # train.py's defaults
            durations = []
            for processes in (1, 8, 64):
                seconds = estimate.seconds_of_training(
                    model, tokens, GPU_PEAKS['H100'], processes)
                durations.append(estimate.format_duration(seconds))
            yield name, f'{tokens / 1e9:.3g} billion', *durations


def test_tables_of_the_page():
    expected = []
    for row in (*sizes(), *memory(), *time()):
        expected.append(f'| {" | ".join(map(str, row))} |')
    rows = [line for line in PAGE.splitlines() if line.startswith('| ') and '| model' not in line]
    assert rows == expected


def test_numbers_in_the_text_of_the_page():
    text = ' '.join(PAGE.split())
    config = model_of_page('124M').config
    on_cuda = estimate.activations_per_layer(config, 'bfloat16', 'cuda') / config.n_embd
    on_cpu = estimate.activations_per_layer(config, 'bfloat16') / config.n_embd
    assert f'{on_cuda:.0f} x `n_embd` bytes for a token, and {on_cpu:.0f} x on a CPU' in text
    shares = []
    for model in map(model_of_page, MODELS):
        flops = model.flops_per_token(model.config.block_size)
        shares.append(estimate.flops_of_recomputation(model.config) / flops)
    peak = GPU_PEAKS['H100']
    assert f'an MFU of {estimate.ASSUMED_MFU:.0%} ' in text
    assert f"an H100's {peak / 1e12:.0f} TFLOP/s" in text
    assert f'an A100 needs {peak / GPU_PEAKS["A100"]:.1f} times as long' in text
    assert f'Checkpointing adds {100 * min(shares):.0f} to {max(shares):.0%}' in text
    hidden_tokens = 8 / 50e9 * estimate.ASSUMED_MFU * peak / 6
    assert f'about {round(hidden_tokens, -2):,.0f} tokens compute' in text

"""
Measures how fast training and sampling are, compared with the limit of the hardware, and estimates
what a model of some size needs.

    python bench.py --batch_size=12 --block_size=1024
    python bench.py config/train_shakespeare_char_cpu_fast.py
    python bench.py --mode=sample     tokens/s, also without a cache and by Hugging Face's generate
    python bench.py --mode=estimate --n_layer=24 --n_head=16 --n_embd=1024
    python bench.py --mode=estimate --processes=64 --gradient_accumulation_steps=64 --fsdp=True
    python bench.py --profile=True    writes ./bench_log/*.json for chrome://tracing and TensorBoard

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import components  # noqa: F401, I001  before torch: it sets how CPU threads wait

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from components.dataset import gather_windows, open_bin, prefetch
from components.device import (
    choose_device,
    compile_model,
    describe_compile,
    has_fbgemm,
    peak_flops,
    synchronize,
    use_device,
)
from components.errors import install_excepthook, one_line_errors
from components.estimate import print_estimate
from components.generation import next_tokens, read_tokens
from components.optim import clip_and_step, configure_optimizers
from components.quantization import quantize_linears
from components.settings import check_bench, new_model_config
from components.static_decoding import make_decoder
from components.tokenizer import DATA_DIR, load_meta
from model import GPT

# -----------------------------------------------------------------------------
mode = 'step'            # step: the time of a training step; sample: tokens/s; estimate: memory and
                         # time of a model that is not built
batch_size = 12          # sequences per step
gradient_accumulation_steps = 40  # mode estimate: micro-batches per iteration
max_iters = 600000       # mode estimate: iterations of the run
block_size = 1024        # tokens per sequence
bias = False             # in linear layers and layer norms
n_layer = 12
n_head = 12
n_embd = 768             # a multiple of n_head
dropout = 0.0
rotary = False           # from here to muon_lr as in train.py
rmsnorm = False
qk_norm = False
untied = False
muon_lr = 0.0            # above 0: Muon for the matrices of the blocks
activation_checkpointing = False  # as in train.py; not in mode sample
processes = 1            # mode estimate: GPUs, each with a process
fsdp = False             # mode estimate: as in train.py
real_data = True         # read windows of the dataset; False: the same random tokens in every step
dataset = 'openwebtext'  # folder under data/
max_new_tokens = 200     # mode sample: of each sample
seed = 1337
device = 'auto'          # cuda, cuda:1, mps or cpu; auto: the first of these that is available
dtype = 'auto'           # float32, bfloat16 or float16; auto: 16 bits on CUDA and x86 with bfloat16
compile = 'auto'         # True, False or reduce-overhead, as in train.py; auto: on CUDA
profile = False          # write a trace of five steps to ./bench_log
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

MAX_SECONDS = 180  # if a measurement would take longer, fewer steps are timed

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile, training=mode != 'sample')
    config = {key: globals()[key] for key in config_keys}  # noqa: F821
    check_bench(config)
    meta = load_meta(dataset) if real_data else None
    vocab_size = meta['vocab_size'] if meta else 50304
    gpt_config = new_model_config(config, vocab_size)
    data = None
    if real_data and mode == 'step':
        path = DATA_DIR / dataset / 'train.bin'
        if path.exists():
            data = open_bin(dataset, 'train', block_size, vocab_size)
        else:
            print(f'{path} does not exist; random tokens of a vocabulary of {vocab_size:,} '
                  'replace it')

for line in config_overrides:  # noqa: F821
    print(line)
install_excepthook(config, ddp=False)
device_type = device.partition(':')[0]

# -----------------------------------------------------------------------------
# a training step

shape = (batch_size, block_size + 1)
random_tokens = torch.from_numpy(np.random.default_rng(seed).integers(vocab_size, size=shape))


def get_batch(rng):
    """ Windows of the dataset, or random tokens -> inputs and targets: int64 (B, T). """
    batch = random_tokens                                                   # (B, T + 1)
    if data is not None:
        starts = rng.integers(len(data) - block_size, size=batch_size)      # (B,)
        batch = torch.from_numpy(gather_windows(data, starts, block_size))  # (B, T + 1)
    if device_type == 'cuda':
        batch = batch.pin_memory().to(device, non_blocking=True)
    inputs = batch[:, :-1].contiguous()                                     # (B, T)
    targets = batch[:, 1:].contiguous()                                     # (B, T)
    return inputs, targets


def make_step():
    """
    Makes a new model with optimizers. Returns a function that trains it on one batch as train.py
    does: step() -> the seconds that it took, and how many of them it waited for data.
    """
    torch.manual_seed(seed)
    raw_model = GPT(gpt_config).to(device)
    raw_model.activation_checkpointing = activation_checkpointing
    optimizers = configure_optimizers(raw_model, 1e-1, 1e-4, (0.9, 0.95), device_type, muon_lr,
                                      dtype, compile)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    autocast = use_device(device, dtype)
    model = compile_model(raw_model, compile)
    rng = np.random.default_rng(seed)
    batches = prefetch(get_batch, itertools.repeat((rng,)), device, dtype)

    def step():
        start = time.perf_counter()
        X, Y = next(batches)
        waited = time.perf_counter() - start
        X = X.to(device)
        Y = Y.to(device)
        with autocast:
            _, loss = model(X, Y, return_logits=False)
        scaler.scale(loss).backward()
        clip_and_step(optimizers, scaler, raw_model.parameters(), loss.detach(), grad_clip=1.0)
        synchronize(device_type)  # otherwise the clock stops before the work is done
        return time.perf_counter() - start, waited
    return step


def write_trace(step, repetitions):
    """ Runs steps under the profiler, which writes a trace to ./bench_log. """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    to_bench_log = torch.profiler.tensorboard_trace_handler('bench_log')
    with torch.profiler.profile(activities=activities, on_trace_ready=to_bench_log):
        for _ in range(repetitions):
            step()
    print('a trace of the step is in ./bench_log; the times below are without the profiler')


def print_speed(times, flops, peak, peak_source):
    """ Reports the times [(seconds, seconds waited), ...] of steps of `flops` FLOPs each. """
    durations = [seconds for seconds, _ in times]
    waited = [seconds for _, seconds in times]
    median = statistics.median(durations)  # a few steps that are interrupted would change a mean
    mfu = flops / median / peak
    print(f'time per iteration: {median * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
    print(f'  median of {len(times)}, from {min(durations) * 1000:.4f} '
          f'to {max(durations) * 1000:.4f}ms')
    print(f'  {batch_size * block_size / median:,.0f} tokens/s')
    print(f'  MFU against {peak / 1e12:.2f} TFLOP/s of {peak_source}')
    print(f'  waiting for data: {sum(waited) / sum(durations) * 100:.2f}% of the step')


def print_peak_memory():
    """ Reports the most memory that this process needed so far. """
    if device_type == 'cuda':
        print(f'  peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU')
    elif os.name == 'posix':
        import resource
        unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(f'  peak memory: {peak / 2**30:.2f} GiB')


def bench_step(model):
    """ Mode step. `model` is on the meta device, to count FLOPs. """
    # 1. what a step computes, and how many steps there is time for
    peak, peak_source = peak_flops(device_type, dtype)
    tokens = batch_size * block_size
    flops = model.flops_per_token(block_size) * tokens
    print(f'a step is {tokens:,} tokens, {flops / 1e12:.3f} TFLOP')
    warm_up = 10
    timed = 20
    traced = 5
    expected = flops / peak / 0.3  # seconds, if it reaches 30% of the peak
    if (warm_up + timed + traced) * expected > MAX_SECONDS:
        warm_up = 1
        timed = min(20, max(3, int(MAX_SECONDS / expected) - 1))
        traced = 1
        minutes = (warm_up + timed + traced) * expected / 60
        print(f'a step may take {expected:.0f} s: {warm_up} to warm up and {timed} timed '
              f'instead of 10 and 20, in about {minutes:.0f} minutes', flush=True)

    # 2. warm up: the first steps allocate memory and select kernels, or compile
    step = make_step()
    for _ in range(warm_up):
        step()
    if device_type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    if profile:
        write_trace(step, traced)

    # 3. measure
    times = [step() for _ in range(timed)]

    # 4. report
    print_speed(times, flops, peak, peak_source)
    print_peak_memory()

# -----------------------------------------------------------------------------
# sampling

PROMPT_LENGTH = 8  # tokens
BATCH_SIZES = (1, 10)  # samples at the same time
ROUNDS = 3


class Method(NamedTuple):
    """ A way to sample. """
    sample: Callable  # sample(B) -> seconds until the first token (or None) and until the last
    weight_bits: int = 0  # of each weight, where every new token reads all weights once; else 0
    batch_sizes: tuple = BATCH_SIZES


def make_sampler(dtype, int8=False):
    """ A function that samples from a new model, whose weights are stored in `dtype` or int8. """
    torch.manual_seed(seed)
    model = GPT(gpt_config).eval().to(device)
    quantize_linears(model, getattr(torch, dtype), int8, compile)
    decoders = {B: make_decoder(model, compile) for B in BATCH_SIZES}  # each keeps its graph
    prompt = torch.zeros(1, min(PROMPT_LENGTH, block_size), dtype=torch.long, device=device)

    def sample(B, **settings):
        start = time.perf_counter()
        with torch.inference_mode():
            idx = prompt.expand(B, -1)                                      # (B, T)
            steps = next_tokens(model, idx, max_new_tokens, 0.8, 200, decoder=decoders[B],
                                **settings)
            next(steps).tolist()  # waits for a GPU
            first = time.perf_counter()
            list(read_tokens(steps, one_by_one=False))
        return first - start, time.perf_counter() - start
    return sample


def make_transformers_sampler():
    """ Hugging Face's generate with its defaults, and a random GPT-2 of this size in float32. """
    from transformers import GPT2Config, GPT2LMHeadModel
    hf_config = GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd,
                           n_layer=n_layer, n_head=n_head)
    hf_model = GPT2LMHeadModel(hf_config).eval().to(device)
    prompt = torch.zeros(1, PROMPT_LENGTH, dtype=torch.long, device=device)

    def sample(B):
        idx = prompt.expand(B, -1)
        start = time.perf_counter()
        tokens = hf_model.generate(
            idx, attention_mask=torch.ones_like(idx), do_sample=True, temperature=0.8, top_k=200,
            max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, pad_token_id=0)
        tokens.tolist()  # waits for a GPU
        return None, time.perf_counter() - start
    return sample


def sampling_methods():
    """ The ways to sample that are compared -> {name: Method}. """
    bits = torch.finfo(getattr(torch, dtype)).bits
    is_past_block = PROMPT_LENGTH + max_new_tokens > block_size
    is_gpt2 = not (rotary or rmsnorm or qk_norm or untied)
    this = make_sampler(dtype)
    in_float32 = make_sampler('float32')
    methods = {'this': Method(this, bits)}
    if dtype != 'float32':
        methods['float32'] = Method(in_float32, 32)
    # as nanoGPT does: all tokens are read again for each new one, and samples follow each other
    methods['uncached float32'] = Method(partial(in_float32, cached=False), batch_sizes=(1,))
    if has_fbgemm(device_type) and not compile:
        methods['int8'] = Method(make_sampler(dtype, int8=True), 8)
    if is_past_block:
        methods['past_block=half'] = Method(partial(this, past_block='half'), bits)
    if is_gpt2 and not is_past_block and find_spec('transformers'):
        methods['transformers'] = Method(make_transformers_sampler(), 32)
    return methods


def read_bandwidth(block):
    """ Bytes per second at which a large tensor is read. """
    start = time.perf_counter()
    block.sum().item()
    return block.nbytes / (time.perf_counter() - start)


def bench_sampling():
    """ Mode sample: tokens/s of each method, in alternating runs. """
    methods = sampling_methods()
    block = torch.ones(2**27, device=device)  # 512 MiB, more than any cache holds
    bandwidths = []
    times = {}
    for i in range(ROUNDS):
        bandwidths += [read_bandwidth(block) for _ in range(5)]
        for name, method in methods.items():
            for B in method.batch_sizes:
                seconds = method.sample(B)
                times.setdefault((name, B), []).append(seconds)
                print(f'round {i + 1} of {ROUNDS}, {name}, batch {B}: {seconds[1]:.2f} s',
                      flush=True)
    print_sampling_speed(methods, times, statistics.median(bandwidths))


def print_sampling_speed(methods, times, bandwidth):
    """
    Reports the medians of {(name, B): [(seconds until the first token, until the last), ...]}.
    A new token reads every weight once, so `bandwidth` (bytes/s) limits the speed of one sample.
    """
    weights_read = 12 * n_layer * n_embd**2 + n_embd * vocab_size  # per token: blocks and lm_head
    print(f'{max_new_tokens} tokens after {PROMPT_LENGTH}, medians of {ROUNDS}; '
          f'memory bandwidth {bandwidth / 1e9:.1f} GB/s')
    speeds = {}
    for (name, B), pairs in times.items():
        speeds[name, B] = B * max_new_tokens / statistics.median(last for _, last in pairs)
    for (name, B), speed in speeds.items():
        parts = [f'{name}, batch {B}: {speed:.1f} tokens/s']
        firsts = [first for first, _ in times[name, B] if first is not None]
        if firsts:
            parts.append(f'first token after {statistics.median(firsts) * 1000:.0f}ms')
        weight_bits = methods[name].weight_bits
        if weight_bits:
            share = weights_read * weight_bits / 8 * speed / B / bandwidth
            parts.append(f'weights read at {share * 100:.0f}% of the bandwidth')
        for reference in (('transformers', B), ('uncached float32', 1)):
            if reference in speeds:
                parts.append(f'{speed / speeds[reference]:.2f} x {reference[0]}')
        print(', '.join(parts))

# -----------------------------------------------------------------------------
# what was asked for

with torch.device('meta'):
    model = GPT(gpt_config)  # to count parameters and FLOPs; its tensors have shapes and no memory
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M, without the position embedding')
print(f'device: {device}, {dtype}, {describe_compile(compile)}, {torch.get_num_threads()} threads')
use_device(device, dtype)

if mode == 'estimate':
    print_estimate(model, config)
elif mode == 'sample':
    bench_sampling()
else:
    bench_step(model)

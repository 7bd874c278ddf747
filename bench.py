"""
How fast a training step is, and how far from the hardware's limit.

    python bench.py --batch_size=12 --block_size=1024
    python bench.py config/train_shakespeare_char_cpu_fast.py
    python bench.py --mode=compare      ratios: number formats, optimizers, loading, on a GPU also compile
    python bench.py --profile=True      and open ./bench_log/*.json in chrome://tracing or TensorBoard

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import torch

from bins import load_meta, one_line_errors, open_bin, windows
from checks import check_bench
from machine import choose_device, explain, peak_flops, use_device
from model import GPT, GPTConfig
from update import clip_and_step

# -----------------------------------------------------------------------------
mode = 'step'            # step: this one; compare: what each choice brings, measured in turn
batch_size = 12          # sequences a step
block_size = 1024        # tokens a sequence
bias = False             # in linear layers and layer norms
n_layer = 12
n_head = 12
n_embd = 768             # a multiple of n_head
dropout = 0.0
rotary = False           # these as in train.py
rmsnorm = False
qk_norm = False
untied = False
muon_lr = 0.0            # above 0: Muon for the blocks' matrices
real_data = True         # read windows of the dataset; False: the same random tokens at every step
dataset = 'openwebtext'  # folder under data/
seed = 1337
device = 'auto'          # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'           # float32, bfloat16 or float16; auto: 16 bits on CUDA and x86 with bfloat16
compile = 'auto'         # True or False; auto: on CUDA
profile = False          # leave a trace of five steps in ./bench_log
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())

patience = 180           # seconds that a measurement may take without a warning

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile)
    config = {key: globals()[key] for key in config_keys}  # noqa: F821
    check_bench(config)
    meta = load_meta(dataset) if real_data else None
    vocab_size = meta['vocab_size'] if meta else 50304
    data = None
    if real_data:
        try:
            data = open_bin(dataset, 'train', block_size, vocab_size)
        except FileNotFoundError as error:
            print(f'{error}; measuring with random tokens')
    names = {field.name for field in fields(GPTConfig)}
    gpt_config = GPTConfig(vocab_size=vocab_size, **{key: config[key] for key in config if key in names})

explain(config, ddp=False)
device_type = device.partition(':')[0]
rng = np.random.default_rng(seed)
loader = ThreadPoolExecutor(1, initializer=use_device, initargs=(device, dtype))
noise = torch.from_numpy(rng.integers(vocab_size, size=(batch_size, block_size + 1)))


def get_batch(load=True):
    """ The next batch -> inputs, targets, int64 (B, T); of data, where the device is CUDA, on it already. """
    batch = noise                                                               # (B, T + 1)
    if load and data is not None:
        starts = rng.integers(len(data) - block_size, size=batch_size)
        batch = torch.from_numpy(windows(data, starts, block_size))
        if device_type == 'cuda':
            batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()                # (B, T)


def make_step(dtype, compile, muon, load):
    """ A fresh model -> a function that makes a step as train.py does -> its seconds, those it waited. """
    torch.manual_seed(seed)
    model = GPT(gpt_config).to(device)
    optimizers = [model.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), device_type, muon)]
    if muon:
        optimizers.append(model.configure_muon(1e-4, 0.0, dtype))
    autocast = use_device(device, dtype)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    called = torch.compile(model) if compile else model
    upcoming = loader.submit(get_batch, load)

    def step():
        nonlocal upcoming
        start = time.perf_counter()
        X, Y = (part.to(device) for part in upcoming.result())
        waited = time.perf_counter() - start
        with autocast:
            _, loss = called(X, Y)
        before = time.perf_counter()
        upcoming = loader.submit(get_batch, load)
        waited += time.perf_counter() - before
        scaler.scale(loss).backward()
        clip_and_step(optimizers, scaler, model.parameters(), loss.detach(), grad_clip=1.0)
        if device_type != 'cpu':
            getattr(torch, device_type).synchronize()
        return time.perf_counter() - start, waited
    return step


# say what will be measured, and how long it will take where that is long
with torch.device('meta'):
    model = GPT(gpt_config)  # to be counted: without memory
peak, peak_source = peak_flops(device_type, dtype)
tokens = batch_size * block_size
flops = model.flops_per_token(block_size) * tokens
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
print(f'device: {device}, {dtype}, {"compiled" if compile else "not compiled"}, '
      f'{torch.get_num_threads()} threads; a step is {tokens:,} tokens, {flops / 1e12:.3f} TFLOP')
this = dict(dtype=dtype, compile=compile, muon=muon_lr > 0, load=True)
variants = {'this': this}
if mode == 'compare':
    others = {'in float32': {**this, 'dtype': 'float32'},
              'with AdamW' if muon_lr else 'with Muon': {**this, 'muon': not muon_lr},
              'without compile' if compile else 'with compile': {**this, 'compile': not compile},
              'without loading': {**this, 'load': data is None}}
    if device_type != 'cuda' and not compile:  # which takes long there
        del others['with compile']
    variants.update({name: other for name, other in others.items() if other != this})
warm_up, timed = 10, 20
traced = 5 if profile else 0
expected = len(variants) * flops / peak / 0.3  # a guess: 30% of the peak
if (warm_up + timed + traced) * expected > patience:
    warm_up, timed, traced = 1, max(3, min(20, int(patience / expected) - 1)), min(traced, 1)
    print(f'a step may take {expected:.0f} s: {warm_up} to warm up and {timed} timed instead of 10 and 20, '
          f'in about {(warm_up + timed + traced) * expected / 60:.0f} minutes', flush=True)

steps = {name: make_step(**variant) for name, variant in variants.items()}
times = {name: [] for name in steps}
for _ in range(warm_up):
    for step in steps.values():
        step()
if device_type == 'cuda':
    torch.cuda.reset_peak_memory_stats()
if profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities,
                                on_trace_ready=torch.profiler.tensorboard_trace_handler('bench_log')):
        for _ in range(traced):
            steps['this']()
    print('a trace of the step is in ./bench_log; the times below are without the profiler')
for _ in range(timed):  # in turn: what else the machine does meets all of them
    for name, step in steps.items():
        times[name].append(step())

medians = {name: statistics.median(seconds for seconds, _ in pairs) for name, pairs in times.items()}
seconds, waited = zip(*times['this'])
median = medians['this']
mfu = model.estimate_mfu(batch_size, median, peak)
print(f'time per iteration: {median * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
print(f'  median of {timed}, from {min(seconds) * 1000:.4f} to {max(seconds) * 1000:.4f}ms')
print(f'  {tokens / median:,.0f} tokens/s')
print(f'  MFU against {peak / 1e12:.2f} TFLOP/s of {peak_source}')
print(f'  waiting for data: {sum(waited) / sum(seconds) * 100:.2f}% of the step')
for name in list(variants)[1:]:
    print(f'{name}: {medians[name] * 1000:.4f}ms, {medians[name] / median:.2f} times as long')
if mode == 'compare':
    pass  # the memory would be that of all of them
elif device_type == 'cuda':
    print(f'  peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU')
elif os.name == 'posix':
    import resource
    import sys
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux KiB
    print(f'  peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB')

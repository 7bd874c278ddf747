"""
How fast a training step is, and how far from the hardware's limit.

    python bench.py --batch_size=12 --block_size=1024
    python bench.py --dataset=shakespeare_char --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
    python bench.py --profile=True      and open ./bench_log/*.json in chrome://tracing or TensorBoard

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import os
import statistics
import time
from contextlib import nullcontext

import numpy as np
import torch

from bins import load_meta, one_line_errors, open_bin, windows
from checks import check_bench, explain
from model import GPT, GPTConfig, choose_device, clip_and_step, peak_flops

# -----------------------------------------------------------------------------
batch_size = 12          # sequences a step
block_size = 1024        # tokens a sequence
bias = False             # in linear layers and layer norms
n_layer = 12
n_head = 12
n_embd = 768             # a multiple of n_head
dropout = 0.0
real_data = True         # read windows of the dataset; False: the same random tokens at every step
dataset = 'openwebtext'  # folder under data/
seed = 1337
device = 'auto'          # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'           # float32, bfloat16 or float16; auto: 16 bits on CUDA, bfloat16 where native
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
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                          n_embd=n_embd, dropout=dropout, bias=bias))

explain(config, ddp=False)
device_type = device.partition(':')[0]
if device_type == 'cuda':
    torch.set_float32_matmul_precision('high')  # what stays in float32 may use TF32
    torch.cuda.set_device(torch.device(device).index or 0)
autocast = torch.autocast(device_type, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
model.to(device)
optimizer = model.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), device_type)
step_model = torch.compile(model) if compile else model
rng = np.random.default_rng(seed)
noise = rng.integers(vocab_size, size=(batch_size, block_size + 1))


def get_batch():
    """ The next batch -> inputs, targets, int64 (B, T) on the device. """
    tokens = noise
    if data is not None:
        tokens = windows(data, rng.integers(len(data) - block_size, size=batch_size), block_size)
    batch = torch.from_numpy(tokens)  # (B, T + 1)
    batch = batch.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else batch.to(device)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def step():
    """ One training step as in train.py -> its seconds, and those of them that the next batch took. """
    global X, Y
    start = time.perf_counter()
    with autocast:
        _, loss = step_model(X, Y)
    before = time.perf_counter()
    X, Y = get_batch()
    loading = time.perf_counter() - before
    scaler.scale(loss).backward()
    clip_and_step(optimizer, scaler, model.parameters(), loss.detach(), grad_clip=1.0)
    if device_type != 'cpu':
        getattr(torch, device_type).synchronize()
    return time.perf_counter() - start, loading


# say what will be measured, and how long it will take where that is long
peak, peak_source = peak_flops(device_type, dtype)
tokens = batch_size * block_size
flops = model.flops_per_token(block_size) * tokens
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
print(f'device: {device}, {dtype}, {"compiled" if compile else "not compiled"}, '
      f'{torch.get_num_threads()} threads; a step is {tokens:,} tokens, {flops / 1e12:.3f} TFLOP')
warm_up, timed = 10, 20
traced = 5 if profile else 0
expected = flops / peak / 0.5  # at half of the peak
if (warm_up + timed + traced) * expected > patience:
    warm_up, timed, traced = 1, max(3, min(20, int(patience / expected) - 1)), min(traced, 1)
    print(f'a step may take {expected:.0f} s: {warm_up} to warm up and {timed} timed instead of 10 and 20, '
          f'in about {(warm_up + timed + traced) * expected / 60:.0f} minutes', flush=True)

X, Y = get_batch()
for _ in range(warm_up):
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
            step()
    print('a trace of the step is in ./bench_log; the times below are without the profiler')
seconds, loading = zip(*(step() for _ in range(timed)))

median = statistics.median(seconds)
mfu = model.estimate_mfu(batch_size, median, peak)
print(f'time per iteration: {median * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
print(f'  median of {timed}, from {min(seconds) * 1000:.4f} to {max(seconds) * 1000:.4f}ms')
print(f'  {tokens / median:,.0f} tokens/s')
print(f'  MFU against {peak / 1e12:.2f} TFLOP/s of {peak_source}')
print(f'  loading the data: {sum(loading) / sum(seconds) * 100:.2f}% of the step')
if device_type == 'cuda':
    print(f'  peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU')
elif os.name == 'posix':
    import resource
    import sys
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux KiB
    print(f'  peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB')

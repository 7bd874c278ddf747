"""
How fast a training step is, and a token when sampling, how far from the hardware's limit, and what a model of
some size will cost.

    python bench.py --batch_size=12 --block_size=1024
    python bench.py config/train_shakespeare_char_cpu_fast.py
    python bench.py --mode=compare      ratios: number formats, optimizers, loading, on a GPU also compile
    python bench.py --mode=sample       tokens a second, beside Hugging Face's generate and the way of nanoGPT
    python bench.py --mode=estimate --n_layer=24 --n_head=16 --n_embd=1024     parameters, memory, days
    python bench.py --profile=True      and open ./bench_log/*.json in chrome://tracing or TensorBoard

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from bins import load_meta, one_line_errors, open_bin, windows
from checks import check_bench
from decode import lighten, next_tokens
from machine import GPU_PEAKS, choose_device, explain, has_fbgemm, peak_flops, use_device
from model import GPT, GPTConfig
from update import clip_and_step

# -----------------------------------------------------------------------------
mode = 'step'            # step: this one; compare: what each choice brings; sample: tokens a second;
                         # estimate: sizes, computed for a model that is never made
batch_size = 12          # sequences a step
gradient_accumulation_steps = 40  # of mode estimate: micro-batches an iteration
max_iters = 600000       # of mode estimate: iterations of the run
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
max_new_tokens = 200     # of mode sample, for each sample
seed = 1337
device = 'auto'          # cuda, cuda:1, mps or cpu; auto: the first of these that is there
dtype = 'auto'           # float32, bfloat16 or float16; auto: 16 bits on CUDA and x86 with bfloat16
compile = 'auto'         # True or False; auto: on CUDA
profile = False          # leave a trace of five steps in ./bench_log
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

patience = 180           # seconds that a measurement may take without a warning

with one_line_errors():
    device, dtype, compile = choose_device(device, dtype, compile, training=mode != 'sample')
    config = {key: globals()[key] for key in config_keys}  # noqa: F821
    check_bench(config)
    meta = load_meta(dataset) if real_data else None
    vocab_size = meta['vocab_size'] if meta else 50304
    data = None
    if real_data and mode not in ('sample', 'estimate'):
        try:
            data = open_bin(dataset, 'train', block_size, vocab_size)
        except FileNotFoundError as error:
            print(f'{error}; here random tokens of a vocabulary of {vocab_size:,} take its place')
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
    """ A fresh model -> step(), which trains as train.py does -> its seconds, and those spent waiting. """
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


def make_sampler(dtype, int8=False):
    """ A fresh model -> sample(B), which draws for B rows -> seconds to the first token and to the last. """
    torch.manual_seed(seed)
    model = GPT(gpt_config).eval().to(device)
    lighten(model, getattr(torch, dtype), int8)
    if compile:
        model.compile()
    prompt = torch.zeros(1, min(8, block_size), dtype=torch.long, device=device)

    def sample(B, **settings):
        times = [time.perf_counter()]
        with torch.inference_mode():
            for tokens in next_tokens(model, prompt.expand(B, -1), max_new_tokens, 0.8, 200, **settings):
                tokens.tolist()  # waits for a GPU
                times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[0]
    return sample


def make_generate():
    """ The same of Hugging Face's generate, by its defaults: a random GPT-2 of this size, in float32. """
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd,
                                        n_layer=n_layer, n_head=n_head)).eval().to(device)
    prompt = torch.zeros(1, 8, dtype=torch.long, device=device)

    def sample(B):
        ids, start = prompt.expand(B, -1), time.perf_counter()
        theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=200,
                        max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, pad_token_id=0).tolist()
        return 0, time.perf_counter() - start
    return sample


def bench_sampling():
    """ Prints tokens a second of the ways to sample, at batch 1 and 10, measured in turn. """
    past = 8 + max_new_tokens > block_size
    this, full = make_sampler(dtype), make_sampler('float32')
    ways = {'this': this, 'float32': full,
            'uncached float32': partial(full, cached=False)}  # that of nanoGPT, one by one
    if dtype == 'float32':
        del ways['float32']
    if has_fbgemm(device_type):
        ways['int8'] = make_sampler(dtype, int8=True)
    if past:
        ways['half a block kept'] = partial(this, past_block='half')
    elif not (rotary or rmsnorm or qk_norm or untied) and find_spec('transformers'):
        ways['transformers'] = make_generate()
    linear = 12 * n_layer * n_embd ** 2 + n_embd * vocab_size  # weights that a token reads
    bits = {'this': 32 if dtype == 'float32' else 16, 'int8': 8}
    bits['half a block kept'] = bits['this']
    block = torch.ones(2**27, device=device)  # 512 MiB
    reads = []
    times = {(name, B): [] for name in ways for B in (1, 10) if B == 1 or name != 'uncached float32'}
    for i in range(3):
        for _ in range(5):
            start = time.perf_counter()
            block.sum().item()
            reads.append(block.nbytes / (time.perf_counter() - start))
        for name, B in times:
            times[name, B].append(ways[name](B))
            print(f'round {i + 1} of 3, {name}, {B} at once: {times[name, B][-1][1]:.2f} s', flush=True)
    bandwidth = statistics.median(reads)
    print(f'{max_new_tokens} tokens after 8; medians; memory is read at {bandwidth / 1e9:.1f} GB/s')
    speeds = {(name, B): B * max_new_tokens / statistics.median(last for _, last in times[name, B])
              for name, B in times}
    for (name, B), speed in speeds.items():
        first = statistics.median(first for first, _ in times[name, B])
        share = linear * bits.get(name, 32) / 8 * speed / B / bandwidth
        print(f'{name}, batch {B}: {speed:.1f} tokens/s',
              *([f'the first after {first * 1000:.0f}ms'] if first else []),
              *([f'weights read at {share * 100:.0f}% of that'] if 'uncached' not in name else []),
              *(f'{speed / speeds[other]:.2f} x {other[0]}'
                for other in (('transformers', B), ('uncached float32', 1)) if other in speeds), sep=', ')


def estimate():
    """ Prints what a model of this size is, what training takes in memory, and what a run takes in time. """
    from memory import memory_of_training
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = {'token table': '.wte.', 'position table': '.wpe.', 'attention': '.attn.', 'MLP': '.mlp.',
             'norms': '.ln_', 'head': 'lm_head.'}
    for part, key in parts.items():
        print(f'  {part:15}{sum(n for name, n in sizes.items() if key in name):15,} parameters')
    N = sum(sizes.values())
    memory = memory_of_training(gpt_config, batch_size, gradient_accumulation_steps, dtype, muon_lr > 0)
    print(f'  {"in all":15}{N:15,}, a checkpoint of {(memory["weights"] + memory["moments"]) / 1e6:,.1f} MB')
    print(f'memory, {batch_size} x {block_size} tokens a micro-batch, {dtype}, not compiled, as on a CPU:')
    for name, n in memory.items():
        print(f'  {name:36}{n / 1e6:12,.1f} MB')
    tokens, flops = gradient_accumulation_steps * batch_size * block_size, model.flops_per_token(block_size)
    print(f'an iteration: {tokens:,} tokens, {flops * tokens / 1e12:,.4g} TFLOP')
    runs = {f'max_iters={max_iters:,}': max_iters * tokens, '20 a parameter (arXiv 2203.15556)': 20 * N}
    for name, D in runs.items():
        print(f'{name}: {D / 1e9:,.4g} billion tokens, {flops * D:.4g} FLOP')
    print('days of each on one GPU, at 40% of its 16-bit peak:')
    for gpu, peak in GPU_PEAKS.items():
        print(f'  {gpu:10}', *(f'{flops * D / peak / 0.4 / 86400:12,.3g}' for D in runs.values()))


# say what will be measured, and how long it will take where that is long
with torch.device('meta'):
    model = GPT(gpt_config)  # to be counted: without memory
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M, a table of positions left out')
print(f'device: {device}, {dtype}, {"compiled" if compile else "not compiled"}, '
      f'{torch.get_num_threads()} threads')
use_device(device, dtype)
if mode == 'sample':
    bench_sampling()
    sys.exit()
if mode == 'estimate':
    estimate()
    sys.exit()
peak, peak_source = peak_flops(device_type, dtype)
tokens = batch_size * block_size
flops = model.flops_per_token(block_size) * tokens
print(f'a step is {tokens:,} tokens, {flops / 1e12:.3f} TFLOP')
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
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux KiB
    print(f'  peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB')

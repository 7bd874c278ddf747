""" bench.py: what it runs, and what it computes from the times. """
import json
import re
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import run
from torch._dynamo.testing import CompileCounter

from components import device, optim
from components import settings as settings_module
from model import GPT, GPTConfig

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, device='cpu',
            dtype='float32')


@pytest.mark.slow
def test_step_and_trace(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, profile=True, **TINY)
    assert re.search(r'^time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%$', out, re.MULTILINE)
    assert 'median of 20' in out
    assert 'peak memory' in out
    trace, = (tmp_path / 'bench_log').glob('*.json')
    assert json.loads(trace.read_text())['traceEvents']


@pytest.mark.parametrize('peak_in_steps, warm_up, timed', [
    (1e9, 10, 20),       # a nanosecond at 100% of the peak
    (1 / 29 / 0.3, 1, 5),  # 29 seconds at 30% of it, and 180 are allowed
])
def test_number_of_steps(script_globals, tmp_path, monkeypatch, capsys, peak_in_steps, warm_up,
                         timed):
    """ Each with its optimizer step; random tokens replace a dataset that does not exist. """
    num_steps = 0

    def clip_and_step(*args, **kwargs):
        nonlocal num_steps
        num_steps += 1

    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False)
    flops = 2 * 16 * GPT(config).flops_per_token(16)
    peak = flops * peak_in_steps
    monkeypatch.setattr(device, 'peak_flops', lambda device_type, dtype: (peak, 'a test'))
    monkeypatch.setattr(optim, 'clip_and_step', clip_and_step)
    script_globals('bench.py', dataset=tmp_path / 'none', **TINY)
    out = capsys.readouterr().out
    assert num_steps == warm_up + timed
    assert f'median of {timed}' in out
    assert 'random tokens of a vocabulary of 50,304' in out


@pytest.fixture
def bench(script_globals, capsys):
    """ bench(...) -> the global variables of bench.py, after a run whose output is dropped. """
    def execute(**settings):
        names = script_globals('bench.py', **{**TINY, 'mode': 'estimate', **settings})
        capsys.readouterr()
        return names
    return execute


def test_activation_checkpointing_of_a_step(bench, monkeypatch):
    names = bench(activation_checkpointing=True)
    seen = []
    monkeypatch.setattr(GPT, 'forward', lambda model, *args, **kwargs: (
        None, seen.append(model.activation_checkpointing) or next(model.parameters()).sum()))
    names['make_step']()()
    assert seen == [True]


def test_median_mfu_and_waiting(bench, capsys):
    times = [(0.2, 0.0), (0.1, 0.05), (10.0, 0.053)]
    bench()['print_speed'](times, 3e9, 1e12, 'a test')
    assert capsys.readouterr().out.splitlines() == [
        'time per iteration: 200.0000ms, MFU: 1.50%',
        '  median of 3, from 100.0000 to 10000.0000ms',
        '  160 tokens/s',  # 2 sequences of 16
        '  MFU against 1.00 TFLOP/s of a test',
        '  waiting for data: 1.00% of the step',
    ]


def test_real_and_random_batches(script_globals, dataset):
    tokens = np.fromfile(dataset / 'train.bin', dtype=np.uint16).tolist()
    windows = [tokens[start:start + 17] for start in range(len(tokens) - 16)]
    rng = np.random.default_rng(0)
    names = script_globals('bench.py', dataset=dataset, **TINY)
    inputs, targets = names['get_batch'](rng)
    for row, next_row in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [*row, next_row[-1]] in windows
        assert row[1:] == next_row[:-1]
    assert not names['get_batch'](rng)[0].equal(inputs)
    names['data'] = None
    assert names['get_batch'](rng)[0].equal(names['get_batch'](rng)[0])


@pytest.mark.slow
@pytest.mark.parametrize('settings, present, absent', [
    (dict(max_new_tokens=4), ['uncached float32, batch 1: ', 'transformers, batch 10: '],
     'past_block'),
    (dict(max_new_tokens=20, rotary=True), ['past_block=half, batch 1: '], 'transformers'),
])
def test_sampling_methods(tmp_path, dataset, settings, present, absent):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, mode='sample', **TINY, **settings)
    for name in ('this, batch 1: ', 'this, batch 10: ', 'memory bandwidth', *present):
        assert name in out
    assert absent not in out


@pytest.mark.slow
def test_compiled_sampling_has_a_graph_for_each_batch_size(bench, dataset, monkeypatch):
    """ And for each dtype. FBGEMM's int8 kernel cannot be compiled. """
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    names = bench(mode='sample', compile=True, dtype='bfloat16', dataset=dataset,
                  max_new_tokens=20, rotary=True)
    assert counter.frame_count == 4
    assert 'int8' not in names['sampling_methods']()


@pytest.mark.slow
def test_sampling_speed_counts_the_tokens_of_all_samples(script_globals, monkeypatch, capsys):
    """ The clock of this test advances a second at each look: after the first and last tokens. """
    looks = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(looks)))
    settings = {**TINY, 'n_head': 1, 'n_embd': 8}
    script_globals('bench.py', mode='sample', real_data=False, max_new_tokens=4, rotary=True,
                   **settings)
    out = capsys.readouterr().out
    weights = 12 * 8**2 + 8 * 50304
    share = 2 * 4 * weights / 2**29 * 100  # two tokens per second, and 512 MiB per second
    for B in (1, 10):
        assert (f'this, batch {B}: {2 * B}.0 tokens/s, first token after 1000ms, '
                f'weights read at {share:.0f}% of the bandwidth') in out

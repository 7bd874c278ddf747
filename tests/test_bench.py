""" bench.py: what it runs, in which order, and what it computes from the times. """
import json
import re
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import run
from torch._dynamo.testing import CompileCounter

import model
from components import device, optim
from components import settings as settings_module
from model import GPT, GPTConfig

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, device='cpu')


@pytest.mark.slow
def test_step_and_trace(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, profile=True, **TINY)
    assert re.search(r'^time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%$', out, re.MULTILINE)
    for text in ('tokens/s', 'median of 20', 'MFU against', 'waiting for data', 'peak memory'):
        assert text in out
    trace, = (tmp_path / 'bench_log').glob('*.json')
    assert json.loads(trace.read_text())['traceEvents']


@pytest.mark.slow
def test_compare(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, mode='compare', dtype='bfloat16',
                 rotary=True, muon_lr=0.1, **TINY)
    this, = re.findall(r'time per iteration: (\S+)ms', out)
    for name in ('in float32', 'with AdamW', 'without loading'):
        (other, ratio), = re.findall(rf'{name}: (\S+)ms, (\S+) times as long', out)
        assert float(ratio) == pytest.approx(float(other) / float(this), abs=0.02)
        assert 0.05 < float(ratio) < 20
    assert 'peak memory' not in out  # it would be that of all models together


@pytest.mark.slow
def test_compiled_variants_share_two_graphs(script_globals, dataset, monkeypatch):
    """
    One of each dtype. Past its limit of 8 graphs of one function, torch.compile would run what is
    left without compiling.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', lambda model: compile(model, backend=backend))
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    script_globals('bench.py', mode='compare', compile=True, dtype='bfloat16', dataset=dataset,
                   **TINY)
    assert len(graphs) == 2


@pytest.mark.slow
def test_sampling_methods(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, mode='sample', max_new_tokens=4,
                 dtype='float32', **TINY)
    for text in ('this, batch 1: ', 'this, batch 10: ', 'uncached float32, batch 1: ',
                 'transformers, batch 10: ', 'memory bandwidth'):
        assert text in out
    assert 'past_block' not in out


@pytest.mark.slow
def test_compiled_sampling_has_a_graph_for_each_batch_size(script_globals, dataset, monkeypatch,
                                                           capsys):
    """ And for each dtype. FBGEMM's int8 kernel cannot be compiled. """
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=counter))
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    script_globals('bench.py', mode='sample', compile=True, dtype='bfloat16', dataset=dataset,
                   max_new_tokens=20, rotary=True, **TINY)
    assert counter.frame_count == 4
    out = capsys.readouterr().out
    assert 'past_block=half, batch 10: ' in out
    assert 'int8' not in out


@pytest.mark.slow
def test_sampling_past_block_size(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, mode='sample', max_new_tokens=20,
                 dtype='bfloat16', rotary=True, **TINY)
    assert 'past_block=half, batch 1: ' in out
    assert 'transformers' not in out


@pytest.mark.slow
def test_random_tokens_replace_a_missing_dataset(tmp_path):
    out, _ = run('bench.py', cwd=tmp_path, dataset=tmp_path / 'none', **TINY)
    assert f'{tmp_path}/none/train.bin does not exist' in out
    assert 'random tokens of a vocabulary of 50,304' in out
    assert 'time per iteration' in out


def test_settings_are_checked(tmp_path):
    _, error = run('bench.py', cwd=tmp_path, code=1, **{**TINY, 'mode': 'steps'})
    assert "mode='steps'" in error
    assert error.count('\n') == 1


@pytest.mark.slow
def test_number_of_steps(script_globals, monkeypatch):
    """ 10 steps to warm up and 20 that are timed, each with its optimizer step. """
    clip_and_step = optim.clip_and_step
    num_steps = 0

    def count(*args, **kwargs):
        nonlocal num_steps
        num_steps += 1
        return clip_and_step(*args, **kwargs)

    monkeypatch.setattr(optim, 'clip_and_step', count)
    script_globals('bench.py', real_data=False, dtype='float32', **TINY)
    assert num_steps == 10 + 20


def test_fewer_steps_where_they_are_slow(script_globals, monkeypatch, capsys):
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False)
    flops = 2 * 16 * GPT(config).flops_per_token(16)
    peak = flops / 29 / 0.3  # a step takes 29 seconds at 30% of it, and 180 are allowed
    monkeypatch.setattr(device, 'peak_flops', lambda device_type, dtype: (peak, 'a test'))
    script_globals('bench.py', real_data=False, dtype='float32', **TINY)
    out = capsys.readouterr().out
    assert 'a step may take 29 s: 1 to warm up and 5 timed instead of 10 and 20' in out
    assert 'median of 5' in out


@pytest.mark.parametrize('activation_checkpointing', [False, True])
def test_activation_checkpointing_of_a_step(script_globals, monkeypatch, activation_checkpointing):
    blocks = []

    def checkpoint(block, *arguments, use_reentrant):
        blocks.append(block)
        return block(*arguments)

    names = script_globals('bench.py', mode='estimate', real_data=False, dtype='float32',
                           activation_checkpointing=activation_checkpointing, **TINY)
    monkeypatch.setattr(model, 'checkpoint', checkpoint)
    names['make_step']('float32', compile=False, muon=False, read_data=False)()
    assert len(blocks) == (1 if activation_checkpointing else 0)


@pytest.fixture
def bench(script_globals, capsys):
    """ The functions of bench.py, after a run whose output is dropped. """
    names = script_globals('bench.py', mode='estimate', real_data=False, dtype='float32', **TINY)
    capsys.readouterr()
    return names


def test_median_mfu_and_waiting(bench, capsys):
    times = [(0.2, 0.0), (0.1, 0.05), (10.0, 0.053)]
    bench['print_speed'](times, 3e9, 1e12, 'a test')
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        'time per iteration: 200.0000ms, MFU: 1.50%',
        '  median of 3, from 100.0000 to 10000.0000ms',
        '  160 tokens/s',  # 2 sequences of 16
        '  MFU against 1.00 TFLOP/s of a test',
        '  waiting for data: 1.00% of the step',
    ]


def test_alternating_runs(bench):
    order = []
    steps = {
        'a': lambda: order.append('a'),
        'b': lambda: order.append('b'),
    }
    times = bench['run_alternating'](steps, 3)
    assert order == ['a', 'b', 'a', 'b', 'a', 'b']
    assert {name: len(seconds) for name, seconds in times.items()} == {'a': 3, 'b': 3}


def test_real_and_random_batches(script_globals, dataset):
    settings = {**TINY, 'dataset': dataset, 'dtype': 'float32'}
    names = script_globals('bench.py', **settings)
    tokens = np.fromfile(dataset / 'train.bin', dtype=np.uint16).tolist()
    rng = np.random.default_rng(0)
    inputs, targets = names['get_batch'](rng, read_data=True)
    assert inputs.shape == targets.shape == (2, 16)
    windows = [tokens[start:start + 17] for start in range(len(tokens) - 16)]
    for row, next_row in zip(inputs.tolist(), targets.tolist()):
        assert [*row, next_row[-1]] in windows
        assert row[1:] == next_row[:-1]
    again, _ = names['get_batch'](rng, read_data=True)
    assert not again.equal(inputs)
    first, _ = names['get_batch'](rng, read_data=False)
    second, _ = names['get_batch'](rng, read_data=False)
    assert first.equal(second)


@pytest.mark.slow
def test_sampling_speed_counts_the_tokens_of_all_samples(script_globals, monkeypatch, capsys):
    """ The clock of this test advances a second at each look: after the first and last tokens. """
    looks = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(looks)))
    settings = {**TINY, 'n_head': 1, 'n_embd': 8}
    script_globals('bench.py', mode='sample', real_data=False, dtype='float32', max_new_tokens=4,
                   rotary=True, **settings)
    out = capsys.readouterr().out
    weights = 12 * 8**2 + 8 * 50304
    share = 2 * 4 * weights / 2**29 * 100  # two tokens per second, and 512 MiB per second
    for B in (1, 10):
        assert (f'this, batch {B}: {2 * B}.0 tokens/s, first token after 1000ms, '
                f'weights read at {share:.0f}% of the bandwidth') in out

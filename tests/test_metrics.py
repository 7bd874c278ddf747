""" What a run reports: the lines before and after it, its clock and MFU, log.csv, and wandb. """
import csv
import itertools
import math
import os
import re
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, run, train

from components import checkpoint, metrics
from components.checkpoint import Checkpointer
from components.errors import UserError
from components.metrics import Log, Timer
from components.optim import configure_optimizers
from components.pretrained import ModelSource


def read_rows(folder):
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def column(rows, name):
    """ The numbers of a column, without empty cells. """
    return [float(row[name]) for row in rows if row[name] != '']

# -----------------------------------------------------------------------------
# printed lines


def test_training_line():
    line = metrics.training_line(7, 10, 2.34567, 0.5, 0.123, 1234.5, 0.98765)
    assert line == ('iter 7: loss 2.3457, time 500.00ms, mfu 12.30%, 1,234 tokens/s, '
                    '0:00:01 left, grad norm 0.9877')


def test_training_line_before_mfu_is_known():
    line = metrics.training_line(0, 10, 2.5, 0.5, None, 1000, 1.0)
    assert line == ('iter 0: loss 2.5000, time 500.00ms, 1,000 tokens/s, 0:00:04 left, '
                    'grad norm 1.0000')


def test_printer(capsys):
    metrics.make_printer(is_master=True)('a line')
    metrics.make_printer(is_master=True)(None)
    metrics.make_printer(is_master=False)('another line')
    assert capsys.readouterr().out == 'a line\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has a device that is full')
def test_printer_on_a_full_disk(monkeypatch):
    full = open('/dev/full', 'w')
    monkeypatch.setattr(sys, 'stdout', full)
    metrics.make_printer(is_master=True)('a line')
    with pytest.raises(OSError):
        print('a line', flush=True)
    with suppress(OSError):
        full.close()


# the settings of a run that the lines before and after it need
CONFIG = dict(
    init_from='scratch', out_dir='out', device='cpu', dtype='float32', compile=False,
    backend='gloo', muon_lr=0.0, eval_only=False, max_iters=12, decay_lr=True, lr_decay_iters=12,
    warmup_iters=2, gradient_accumulation_steps=5, batch_size=225, block_size=16,
    learning_rate=1e-3, always_save_checkpoint=True, checkpoint_interval=0,
    early_stopping=0)
SCRATCH = ModelSource('scratch', 'scratch')


@pytest.fixture
def make_checkpointer(tmp_path, monkeypatch):
    """ make_checkpointer(attribute=value, ...) -> a Checkpointer of a run in `tmp_path`. """
    monkeypatch.chdir(tmp_path)

    def make(optimizers=(), **attributes):
        optimizers = dict(optimizers)
        checkpointer = Checkpointer(CONFIG, None, optimizers, None, None, None, '', print, True)
        for name, value in attributes.items():
            assert hasattr(checkpointer, name)
            setattr(checkpointer, name, value)
        return checkpointer
    return make


@pytest.fixture
def summarize(make_checkpointer, monkeypatch, tiny):
    """ summarize(...) -> the lines before a run on a device of 1000 tokens/s. """
    def guess_peak(device_type, dtype):
        return 1000 * tiny.flops_per_token(16), 'a guess'
    monkeypatch.setattr(metrics, 'peak_flops', guess_peak)

    def execute(source=SCRATCH, num_processes=1, first_iter=0, **settings):
        config = {**CONFIG, **settings}
        optimizers = configure_optimizers(
            tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', config['muon_lr'])
        checkpointer = make_checkpointer(optimizers, first_iter=first_iter, best_val_loss=1.5)
        lines = metrics.opening_summary(config, source, checkpointer, tiny, 90_000, num_processes)
        return list(lines)
    return execute


def test_opening_summary(summarize, tiny):
    millions = tiny.get_num_params() / 1e6
    teraflops = 1000 * tiny.flops_per_token(16) / 1e12
    text = '\n'.join(summarize())
    for line in ('tokens per iteration will be: 18,000', f'number of parameters: {millions:.2f}M',
                 str(tiny.config), 'device: cpu, float32, not compiled, 1 process, AdamW'):
        assert f'{line}\n' in text
    assert f' {teraflops:.2f} TFLOP/s, from a guess\n' in text
    assert '\n12 iterations: 216,000 tokens, 2.4 epochs, about 0:12:00 ' in text
    assert text.endswith(' go to out')


def test_warmup_of_the_whole_run_is_noted(summarize):
    assert any('whole run is warmup' in line for line in summarize(warmup_iters=12))
    assert not any('whole run is warmup' in line for line in summarize(warmup_iters=11))


def test_opening_summary_names_compile_and_muon(summarize):
    lines = summarize(compile=True, muon_lr=0.01)
    assert 'device: cpu, float32, compiled, 1 process, AdamW and Muon' in lines


@pytest.mark.parametrize('num_processes, processes, duration', [
    (1, '1 process', '0:12:00'),
    (2, '2 processes over gloo', '0:06:00'),
])
def test_duration_of_several_processes(summarize, num_processes, processes, duration):
    text = '\n'.join(summarize(num_processes=num_processes))
    assert f'not compiled, {processes}, AdamW\n' in text
    assert f'2.4 epochs, about {duration} ' in text


@pytest.mark.parametrize('settings', [
    pytest.param(dict(eval_only=True), id='evaluation'),
    pytest.param(dict(first_iter=12), id='nothing left'),
])
def test_opening_summary_without_training(summarize, settings):
    text = '\n'.join(summarize(**settings))
    assert 'TFLOP/s' in text
    assert 'epochs' not in text
    assert 'go to out' not in text


def test_opening_summary_of_a_resumed_run(summarize):
    source = ModelSource('resume', 'out/ckpt.pt')
    lines = summarize(source, first_iter=2, init_from='auto')
    assert lines[:2] == ['init_from=auto: resume',
                         'resuming out/ckpt.pt at iteration 2, best val loss 1.5000']
    assert lines[-2].startswith('10 iterations: 180,000 tokens, 2 epochs, about 0:10:00')


def test_opening_summary_of_fine_tuning(summarize):
    lines = summarize(ModelSource('huggingface', 'gpt2'), init_from='gpt2')
    assert lines[0] == 'starting from the weights of gpt2'


@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_last.pt'])
def test_earlier_run_will_be_replaced(tmp_path, summarize, name):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / name).write_bytes(b'')
    pattern = 'earlier run in out will be replaced; .*--init_from=resume'
    assert re.search(pattern, summarize()[0])
    assert re.search(pattern, summarize(ModelSource('huggingface', 'gpt2'))[1])
    for lines in (summarize(eval_only=True), summarize(ModelSource('resume', 'out/ckpt.pt'))):
        assert 'replaced' not in '\n'.join(lines)


@pytest.mark.parametrize('settings, expected', [
    pytest.param(dict(max_iters=12, lr_decay_iters=13), True, id='max_iters is lower'),
    pytest.param(dict(max_iters=12, lr_decay_iters=12), False, id='equal'),
    pytest.param(dict(max_iters=12, lr_decay_iters=11), False, id='max_iters is higher'),
    pytest.param(dict(max_iters=12, lr_decay_iters=13, decay_lr=False), False, id='constant rate'),
])
def test_note_of_a_schedule_that_is_cut_off(summarize, settings, expected):
    notes = [line for line in summarize(**settings) if line.startswith('NOTE: ')]
    assert len(notes) == expected
    for note in notes:
        assert 'lr_decay_iters=13' in note
        assert '--lr_decay_iters=12' in note


@pytest.mark.parametrize('device, dtype, has_bfloat16, peak, pattern', [
    pytest.param('cpu', 'bfloat16', False, 5e8, '^bfloat16 .* 16 times .*--dtype=float32$',
                 id='emulated'),
    pytest.param('cpu', 'float16', True, 4e9, '^float16 .* 2 times .*--dtype=float32$',
                 id='emulated float16'),
    pytest.param('cpu', 'float16', False, 8e9, None, id='as fast'),
    pytest.param('cpu', 'bfloat16', True, 5e8, None, id='native'),
    pytest.param('cpu', 'float32', False, 8e9, None, id='float32'),
    pytest.param('cuda', 'bfloat16', False, 5e8, None, id='GPU'),
])
def test_slow_dtype(monkeypatch, device, dtype, has_bfloat16, peak, pattern):
    monkeypatch.setattr(metrics, 'peak_flops', lambda device, dtype: (8e9, 'a guess'))
    monkeypatch.setattr(metrics, 'has_bfloat16', lambda: has_bfloat16)
    lines = list(metrics.warn_of_slow_dtype(device, dtype, peak))
    if pattern is None:
        assert lines == []
    else:
        line, = lines
        assert re.search(pattern, line)


@pytest.mark.parametrize('attributes, expected', [
    pytest.param(dict(best_val_iter=10),
                 '12 iterations in 0:01:15, best val loss 1.5000 at step 10; '
                 'try: python sample.py --out_dir=out', id='complete'),
    pytest.param(dict(best_val_iter=None),
                 '12 iterations in 0:01:15, best val loss 1.5000; '
                 'try: python sample.py --out_dir=out', id='step of the best loss unknown'),
    pytest.param(dict(best_val_iter=10, first_iter=2),
                 '10 iterations in 0:01:15, best val loss 1.5000 at step 10; '
                 'try: python sample.py --out_dir=out', id='resumed'),
    pytest.param(dict(error='no space'),
                 '12 iterations in 0:01:15, best val loss 1.5000; NOT SAVED: no space',
                 id='not saved'),
])
def test_closing_summary(make_checkpointer, attributes, expected):
    checkpointer = make_checkpointer(best_val_loss=1.5, **attributes)
    line = metrics.closing_summary(CONFIG, checkpointer, 12, stopped_by=None, seconds=75.4)
    assert line == expected


@pytest.mark.parametrize('iter_num, first_iter, expected', [
    pytest.param(8, 0, r'stopped early \(early_stopping=2\): 8 iterations', id='early'),
    pytest.param(12, 0, '12 iterations', id='at the end'),
    pytest.param(8, 8, 'nothing to do: by iteration 8, .*early_stopping=2.*--early_stopping=0',
                 id='resumed'),
    pytest.param(12, 12, 'nothing to do: iteration 12 .*max_iters=12', id='resumed at the end'),
])
def test_closing_summary_of_early_stopping(make_checkpointer, iter_num, first_iter, expected):
    config = {**CONFIG, 'early_stopping': 2}
    checkpointer = make_checkpointer(config=config, first_iter=first_iter, evaluated_iter=iter_num,
                                     num_evals_without_best=2)
    line = metrics.closing_summary(config, checkpointer, iter_num, stopped_by=None, seconds=75.4)
    assert re.match(expected, line)


@pytest.mark.parametrize('patience, always_save, expected', [(3, True, 1), (3, False, 0),
                                                             (0, True, 0)])
def test_early_stopping_that_loses_the_best_model(summarize, patience, always_save, expected):
    lines = summarize(early_stopping=patience, always_save_checkpoint=always_save)
    assert sum('--always_save_checkpoint=False' in line for line in lines) == expected


def test_closing_summary_without_training(make_checkpointer):
    checkpointer = make_checkpointer(first_iter=12)
    line = metrics.closing_summary(CONFIG, checkpointer, 12, stopped_by=None, seconds=75.4)
    assert re.match('nothing to do: iteration 12 .*max_iters=12', line)


@pytest.mark.parametrize('attributes, pattern', [
    pytest.param(dict(saved_iter=1008), '--init_from=resume .*it$', id='saved'),
    pytest.param(dict(saved_iter=1005), '--init_from=resume .*1,005$', id='saved earlier'),
    pytest.param(dict(saved_iter=0), 'NOT SAVED: .*skipped', id='updates were skipped'),
    pytest.param(dict(saved_iter=1005, error='no space'), 'NOT SAVED: no space', id='full disk'),
])
def test_closing_summary_after_a_signal(make_checkpointer, attributes, pattern):
    checkpointer = make_checkpointer(**attributes)
    line = metrics.closing_summary(CONFIG, checkpointer, 1008, 'SIGINT', seconds=75.4)
    assert re.match(f'stopped by SIGINT at iteration 1,008; {pattern}', line)


def test_summaries_of_a_run(tmp_path, dataset):
    _, evaluations, out = train(tmp_path, dataset, gradient_accumulation_steps=2)
    assert 'tokens per iteration will be: 128\n' in out
    assert '\n20 iterations: 2,560 tokens, 0.427 epochs, about 0:00:' in out
    best = min(evaluations, key=lambda number: evaluations[number][1])
    best_loss = evaluations[best][1]
    last_line = out.splitlines()[-1]
    assert re.fullmatch(rf'20 iterations in \d:\d\d:\d\d, best val loss {best_loss:.4f} at step '
                        rf'{best}; try: python sample.py --out_dir=out', last_line)


def test_overrides_come_first(tmp_path, dataset):
    _, _, out = train(tmp_path, dataset, max_iters=1)
    overrides = out.splitlines()[:len(SMALL) + 1]
    assert 'overriding: max_iters = 1' in overrides
    assert f"overriding: dataset = '{dataset}'" in overrides
    assert all(line.startswith('overriding: ') for line in overrides)
    assert out.count('overriding: ') == len(set(overrides)) == len(overrides)


def test_nothing_is_printed_before_an_error(tmp_path):
    out, _ = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': 'nowhere'})
    assert out == ''

# -----------------------------------------------------------------------------
# the clock


@pytest.fixture
def clock(monkeypatch):
    """ The clock that Timer reads: clock.now is the time in seconds. """
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, 'perf_counter', lambda: clock.now)
    return clock


@pytest.fixture
def make_timer(clock, monkeypatch):
    """ make_timer(...) -> a Timer of iterations of 100 FLOPs on a device of 1000 FLOP/s. """
    def measured_peak(device_type, dtype):
        return 1000.0, 'a measured matrix product'
    monkeypatch.setattr(metrics, 'peak_flops', measured_peak)
    monkeypatch.setattr(metrics, 'synchronize', lambda device_type: None)
    monkeypatch.setattr(Timer, 'PEAK_MEASUREMENTS', 1)

    def make(device_type='cpu', seconds=0.0):
        return Timer(device_type, 'float32', 100.0, seconds)
    return make


def run_iterations(timer, clock, *durations):
    """ Iterations that take so long, each of which is logged -> the results of lap(). """
    laps = []
    for seconds in durations:
        clock.now += seconds
        timer.count_iteration()
        laps.append(timer.lap())
    return laps


def test_timer_counts_training_alone(make_timer, clock):
    timer = make_timer(seconds=50.0)
    assert run_iterations(timer, clock, 2.0) == pytest.approx([2.0])
    clock.now += 1.0
    with timer.paused():
        clock.now += 1800.0
    clock.now += 3.0
    timer.count_iteration()
    assert timer.lap() == pytest.approx(4.0)
    assert timer.seconds == pytest.approx(56.0)


def test_lap_of_several_iterations(make_timer, clock):
    timer = make_timer()
    for _ in range(4):
        clock.now += 0.5
        timer.count_iteration()
    assert timer.lap() == pytest.approx(0.5)
    clock.now += 3.0
    timer.count_iteration()
    assert timer.lap() == pytest.approx(3.0)


def test_mfu_is_a_running_mean(make_timer, clock):
    timer = make_timer()
    run_iterations(timer, clock, *[9.0] * 5)
    assert timer.running_mfu is None
    run_iterations(timer, clock, 0.5)
    assert timer.running_mfu == pytest.approx(0.2)
    run_iterations(timer, clock, 1.0)
    assert timer.running_mfu == pytest.approx(0.9 * 0.2 + 0.1 * 0.1)


def test_mfu_without_the_first_iteration_of_a_process(make_timer, clock):
    """ With a long log_interval, the first lap has the iteration that compiles. """
    timer = make_timer()
    for _ in range(10):
        timer.count_iteration()
    clock.now += 100.0
    timer.lap()
    assert timer.running_mfu is None
    for _ in range(10):
        timer.count_iteration()
    clock.now += 5.0
    timer.lap()
    assert timer.running_mfu == pytest.approx(0.2)


@pytest.mark.parametrize('device_type, num_measurements', [('cpu', 2), ('cuda', 0)])
def test_peak_is_measured_again_in_pauses(make_timer, monkeypatch, device_type, num_measurements):
    """ On a CPU, which other programs may have used at first. """
    peaks = [900.0, 1100.0, 5000.0]
    measured = []

    def measure(device_type, dtype):
        measured.append(dtype)
        return peaks[len(measured) - 1]
    monkeypatch.setattr(metrics, 'measure_peak', measure)
    monkeypatch.setattr(Timer, 'PEAK_MEASUREMENTS', 3)
    timer = make_timer(device_type)
    for _ in range(4):
        with timer.paused():
            pass
    assert measured == ['float32'] * num_measurements
    assert timer.peak == max([1000.0, *peaks[:num_measurements]])


@pytest.mark.parametrize('durations, is_warned', [
    pytest.param([1.0] + [5.0] * 5, True, id='five slow iterations'),
    pytest.param([1.0] + [5.0] * 4, False, id='four slow iterations'),
    pytest.param([1.0] + [4.9] * 9, False, id='less than five times as slow'),
    pytest.param([1.0] + [5.0] * 4 + [1.0] + [5.0] * 4, False, id='not in a row'),
    pytest.param([5.0] * 9 + [1.0], False, id='slow at first'),
    pytest.param([0.01] + [0.1] * 9, False, id='less than two seconds'),
])
def test_slowdown_warning(make_timer, clock, durations, is_warned):
    timer = make_timer()
    run_iterations(timer, clock, *durations)
    warning = timer.slowdown_warning()
    assert (warning is not None) == is_warned
    if is_warned:
        assert re.match('WARNING: .* five times ', warning)
        assert 'OMP_NUM_THREADS=1' in warning
        assert timer.slowdown_warning() is None  # once a run


def test_slowdown_warning_on_a_gpu(make_timer, clock):
    timer = make_timer('cuda')
    run_iterations(timer, clock, 1.0, *[5.0] * 5)
    assert 'OMP_NUM_THREADS' not in timer.slowdown_warning()


@pytest.fixture
def trainer(script_globals, dataset, monkeypatch):
    """ trainer(...) runs train.py in this process, where the peak is measured once. """
    monkeypatch.setattr(Timer, 'PEAK_MEASUREMENTS', 1)

    def execute(**settings):
        return script_globals('train.py', **{**SMALL, 'dataset': dataset, **settings})
    execute(max_iters=0)  # measures the peak with the real clock
    return execute


def test_clock_stops_for_evaluations_and_saves(trainer, clock, monkeypatch, capsys):
    """ Reading the clock takes a millisecond, and a save half an hour. """
    def tick():
        clock.now += 0.001
        return clock.now

    def save(*args, **kwargs):
        clock.now += 1800
    monkeypatch.setattr(time, 'perf_counter', tick)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', save)
    capsys.readouterr()
    trainer(max_iters=24, eval_interval=6, log_interval=4)
    assert clock.now > 4 * 1800
    out = capsys.readouterr().out
    pattern = r'^iter \d+: .* time (\S+)ms, .*?(\S+) tokens/s, 0:00:00 left, '
    lines = re.findall(pattern, out, re.MULTILINE)
    assert len(lines) == 6
    for (milliseconds, tokens_per_second), iterations in zip(lines, [1, 4, 4, 4, 4, 4]):
        seconds = float(milliseconds) / 1000
        assert 0.001 / iterations - 1e-5 <= seconds < 0.01
        speed = float(tokens_per_second.replace(',', ''))
        assert speed == pytest.approx(64 / seconds, rel=0.02)


def test_time_left(trainer, monkeypatch, capsys):
    """ Reading the clock takes ten seconds. """
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    capsys.readouterr()
    trainer(max_iters=8, eval_interval=0, log_interval=2)
    pattern = r'iter (\d+): .*time (\S+)ms.* (\d+):(\d\d):(\d\d) left'
    lines = re.findall(pattern, capsys.readouterr().out)
    assert [int(line[0]) for line in lines] == [0, 2, 4, 6]
    for number, milliseconds, hours, minutes, seconds in lines:
        seconds_left = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        iterations_left = 8 - int(number) - 1  # after this one
        assert seconds_left == round(float(milliseconds) / 1000 * iterations_left)


def test_mfu_of_a_run(tmp_path, trainer, capsys):
    names = trainer(gradient_accumulation_steps=3, eval_interval=0)
    rows = read_rows(tmp_path / 'out')[:20]
    assert [row['mfu'] for row in rows[:5]] == [''] * 5
    running_mfu = None
    for row in rows[5:]:
        flops = float(row['tokens_per_second']) * names['raw_model'].flops_per_token(16)
        mfu = flops / names['timer'].peak
        if running_mfu is None:
            running_mfu = mfu
        running_mfu = 0.9 * running_mfu + 0.1 * mfu
        assert float(row['mfu']) == pytest.approx(running_mfu, rel=1e-4)
    lines = re.findall(r'^iter (\d+): .*$', capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 20


def test_printed_mfu(tmp_path, dataset):
    _, _, out = train(tmp_path, dataset, max_iters=7)
    lines = re.findall(r'^iter .*$', out, re.MULTILINE)
    assert len(lines) == 7
    for line in lines[:5]:
        assert 'mfu' not in line
    for line in lines[5:]:
        assert re.search(r'ms, mfu \d+\.\d\d%, ', line)

# -----------------------------------------------------------------------------
# log.csv of a run

EVERY_THIRD = dict(log_interval=3, eval_interval=10)


def test_rows_of_a_run(tmp_path, dataset):
    """ One for each iteration that was logged or evaluated. """
    losses, evaluations, _ = train(tmp_path, dataset, **EVERY_THIRD, checkpoint_interval=7)
    rows = read_rows(tmp_path / 'out')
    iters = [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert list(rows[0]) == list(metrics.COLUMNS)
    assert column(rows, 'iter') == iters
    assert column(rows, 'tokens') == [64 * number for number in iters]
    for row in rows:
        number = int(row['iter'])
        assert 0 < float(row['lr']) <= 1e-2
        assert (row['val_loss'] != '') == (number in evaluations)
        if number in evaluations:
            pair = (float(row['train_loss']), float(row['val_loss']))
            assert pair == pytest.approx(evaluations[number], abs=1e-4)
        if number in losses:
            assert float(row['loss']) == pytest.approx(losses[number], abs=1e-4)
            assert float(row['grad_norm']) > 0
            assert float(row['tokens_per_second']) > 0
    seconds = column(rows, 'seconds')
    assert seconds[0] > 0
    assert seconds == sorted(seconds)


def test_loss_of_the_last_row(tmp_path, dataset):
    """ It has no batch, so it has the loss of the last update. """
    losses, _, _ = train(tmp_path, dataset)
    last = read_rows(tmp_path / 'out')[-1]
    assert int(last['iter']) == 20
    assert float(last['loss']) == pytest.approx(losses[19], abs=1e-4)
    assert last['grad_norm'] == ''


def test_loss_of_the_last_row_without_an_update(tmp_path, dataset):
    """ Resumed at max_iters, the loss is the one that the checkpoint holds. """
    losses, _, _ = train(tmp_path, dataset)
    train(tmp_path, dataset, init_from='resume')
    last = read_rows(tmp_path / 'out')[-1]
    assert int(last['iter']) == 20
    assert float(last['loss']) == pytest.approx(losses[19], abs=1e-4)


def test_no_last_row_after_a_run_without_logs_and_evaluations(tmp_path, dataset):
    train(tmp_path, dataset, log_interval=0, eval_interval=0)
    assert column(read_rows(tmp_path / 'out'), 'iter') == [20]  # a run ends with an evaluation


def test_log_of_a_resumed_run(tmp_path, dataset):
    train(tmp_path, dataset, **EVERY_THIRD)
    before = read_rows(tmp_path / 'out')
    with open(tmp_path / 'out/log.csv', 'a') as file:  # as a killed run may leave it
        file.write('21,1344,9,2.0,,,0.01,1.0,1,\n2')
    train(tmp_path, dataset, **EVERY_THIRD, max_iters=31, init_from='resume')
    after = read_rows(tmp_path / 'out')
    assert after[:8] == before[:8]
    assert column(after[8:], 'iter') == [20, 21, 24, 27, 30, 31]
    seconds = column(after, 'seconds')
    assert seconds == sorted(seconds)
    saved = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['seconds']
    assert seconds[-1] == pytest.approx(saved, rel=1e-4)


def test_seconds_of_iterations_that_are_not_logged(tmp_path, dataset):
    train(tmp_path, dataset)
    seconds = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['seconds']
    (tmp_path / 'out/log.csv').write_text('iter,seconds\n')
    train(tmp_path, dataset, init_from='resume', log_interval=0, max_iters=25, eval_interval=0)
    last, = read_rows(tmp_path / 'out')
    assert int(last['iter']) == 25
    assert float(last['seconds']) > seconds


def test_tokens_after_a_change_of_batch_size(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=3)
    train(tmp_path, dataset, max_iters=5, init_from='resume', batch_size=8)
    rows = read_rows(tmp_path / 'out')
    assert column(rows, 'tokens') == [0, 64, 128, 192, 320, 448]


def test_new_run_replaces_the_log(tmp_path, dataset):
    train(tmp_path, dataset)
    train(tmp_path, dataset, max_iters=3)
    assert column(read_rows(tmp_path / 'out'), 'iter') == [0, 1, 2, 3]


def test_eval_only_leaves_the_log(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=3)
    before = (tmp_path / 'out/log.csv').read_bytes()
    train(tmp_path, dataset, eval_only=True, init_from='resume')
    assert (tmp_path / 'out/log.csv').read_bytes() == before


def test_digit_that_is_no_number(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=3)
    with open(tmp_path / 'out/log.csv', 'a', encoding='utf-8') as file:
        file.write('\u00b2' + ',' * 9 + '\n')  # a superscript two
    train(tmp_path, dataset, max_iters=5, init_from='resume')
    assert column(read_rows(tmp_path / 'out'), 'iter') == [0, 1, 2, 3, 4, 5]


def test_log_of_other_columns(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=3)
    (tmp_path / 'out/log.csv').write_text('a,b\n1,2\n')
    train(tmp_path, dataset, max_iters=5, init_from='resume')
    assert column(read_rows(tmp_path / 'out'), 'iter') == [3, 4, 5]


@pytest.mark.parametrize('content', [
    pytest.param(b'iter\n' + 200_000 * b'9', id='long field'),
    pytest.param(b'iter\n\xff\xfe\n', id='not UTF-8'),
])
def test_damaged_log(tmp_path, dataset, content):
    train(tmp_path, dataset, max_iters=3)
    (tmp_path / 'out/log.csv').write_bytes(content)
    settings = {**SMALL, 'dataset': dataset, 'init_from': 'resume'}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'out/log.csv is damaged' in error
    assert error.count('\n') == 1
    assert (tmp_path / 'out/log.csv').read_bytes() == content

# -----------------------------------------------------------------------------
# Log


@pytest.fixture
def make_log(tmp_path):
    """ make_log(...) -> a Log in `tmp_path`, of 64 tokens per iteration. """
    config = dict(out_dir=str(tmp_path), eval_only=False, eval_split='val', wandb_log=False,
                  wandb_project='project', wandb_run_name='run', gradient_accumulation_steps=1,
                  batch_size=4, block_size=16, fsdp=False)

    def make(tokenizer=None, is_active=True, is_resumed=False, **settings):
        return Log({**config, **settings}, 'id', 0, 0, tokenizer, is_resumed, is_active)
    return make


def log_iteration(log, number):
    log.log_training(mfu=0.1, loss=2.5)
    log.end_iteration(number, 0.0)


def test_only_the_master_logs(tmp_path, make_log):
    log = make_log(is_active=False)
    log_iteration(log, 0)
    assert not (tmp_path / 'log.csv').exists()
    assert log.tokens == 64


def test_numbers_have_six_digits(tmp_path, make_log):
    log = make_log()
    log.log_training(mfu=None, loss=1 / 3)
    log.end_iteration(0, 2e5 / 3)
    row, = read_rows(tmp_path)
    assert row['loss'] == '0.333333'
    assert row['seconds'] == '66666.7'
    assert row['mfu'] == ''


def test_row_that_cannot_be_written(tmp_path, make_log, monkeypatch, capsys):
    """ The disk is full in the middle of a row: nothing of this row stays. """
    log = make_log()
    log_iteration(log, 0)

    class FullDisk:
        def __init__(self, file, columns, **options):
            self.file = file

        def writerow(self, row):
            self.file.write('1,64,')
            raise OSError('no space')
    with monkeypatch.context() as patch:
        patch.setattr(metrics.csv, 'DictWriter', FullDisk)
        log_iteration(log, 1)
    log_iteration(log, 2)
    assert column(read_rows(tmp_path), 'iter') == [0, 2]
    assert re.search('WARNING: log.csv .*iteration 1: no space', capsys.readouterr().out)


def test_log_that_was_removed(tmp_path, make_log, capsys):
    log = make_log()
    (tmp_path / 'log.csv').unlink()
    log_iteration(log, 4)
    assert re.search('WARNING: log.csv .*iteration 4: ', capsys.readouterr().out)


def test_unknown_column(make_log):
    log = make_log()
    log.log_training(mfu=0.1, weight=2.5)
    with pytest.raises(ValueError, match="'weight'"):
        log.end_iteration(0, 0.0)


@pytest.mark.parametrize('content', [b'iter\n' + 200_000 * b'9', b'iter\n\xff\xfe\n'],
                         ids=['long field', 'not UTF-8'])
def test_damaged_log_raises_user_error(tmp_path, make_log, content):
    (tmp_path / 'log.csv').write_bytes(content)
    with pytest.raises(UserError, match='log.csv is damaged'):
        make_log(is_resumed=True)
    make_log(is_resumed=False)
    assert read_rows(tmp_path) == []

# -----------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def wandb_run(monkeypatch):
    """ What wandb receives: its init() and its logged values. """
    wandb = pytest.importorskip('wandb')
    run = SimpleNamespace(started=[], logged=[])

    def init(**arguments):
        run.started.append(arguments)
        return SimpleNamespace(log=run.logged.append, define_metric=lambda *args, **options: None)
    monkeypatch.setattr(wandb, 'init', init)
    return run


LETTERS = {'kind': 'char', 'itos': [chr(65 + i) for i in range(40)]}
LOSSES = {'train': 1.0, 'val': 2.0}


def test_wandb_run(make_log, wandb_run, monkeypatch):
    make_log(wandb_log=True)
    monkeypatch.setenv('WANDB_RUN_ID', 'theirs')  # of a run that another script began
    make_log(wandb_log=True)
    first, second = wandb_run.started
    assert (first['project'], first['name'], first['resume']) == ('project', 'run', 'allow')
    assert first['config']['batch_size'] == 4
    assert first['id'] == 'id'
    assert second['id'] == 'theirs'


def test_only_the_master_starts_wandb(make_log, wandb_run):
    make_log(wandb_log=True, is_active=False)
    assert wandb_run.started == []


def test_wandb_receives_evaluations_and_samples(make_log, wandb_run, tiny):
    log = make_log(LETTERS, wandb_log=True, eval_only=True)
    log.log_evaluation(3, LOSSES, 0.1, 0.3, tiny, torch.arange(20))
    values, = wandb_run.logged
    samples = values.pop('samples')
    assert values == {'iter': 3, 'lr': 0.1, 'mfu': 30.0, 'train/loss': 1.0, 'val/loss': 2.0}
    assert [(number, len(text)) for number, text in samples.data] == [(3, 100)] * 3
    assert all(module.training for module in tiny.modules())  # dropout is on again


def test_wandb_before_mfu_is_known(make_log, wandb_run, tiny):
    log = make_log(wandb_log=True, eval_only=True)
    log.log_evaluation(3, LOSSES, 0.1, None, tiny, torch.arange(20))
    assert 'mfu' not in wandb_run.logged[0]


@pytest.mark.parametrize('loss, tokenizer, fsdp', [
    pytest.param(math.nan, LETTERS, False, id='a loss that is not finite'),
    pytest.param(2.0, None, False, id='no tokenizer'),
    pytest.param(2.0, LETTERS, True, id='a part of a model'),
])
def test_wandb_without_samples(make_log, wandb_run, tiny, loss, tokenizer, fsdp):
    log = make_log(tokenizer, wandb_log=True, eval_only=True, fsdp=fsdp)
    log.log_evaluation(3, {'train': 1.0, 'val': loss}, 0.1, 0.3, tiny, torch.arange(20))
    assert set(wandb_run.logged[0]) == {'iter', 'lr', 'mfu', 'train/loss', 'val/loss'}


def test_wandb_without_a_network_for_the_tokenizer(make_log, wandb_run, monkeypatch, capsys):
    def get_tokenizer(record):
        raise OSError('no network')
    monkeypatch.setattr(metrics, 'get_tokenizer', get_tokenizer)
    log = make_log({'kind': 'gpt2'}, wandb_log=True)
    assert log.tokenizer is None
    assert re.search('wandb .* samples.*: no network', capsys.readouterr().out)


def test_wandb_of_a_run(wandb_run, dataset, script_globals):
    settings = {**SMALL, 'dataset': dataset, 'max_iters': 2, 'wandb_log': True}
    script_globals('train.py', **settings)
    keys = {'iter', 'train/loss', 'val/loss', 'lr', 'samples'}
    assert [set(values) for values in wandb_run.logged] == [keys] * 2
    assert [values['iter'] for values in wandb_run.logged] == [0, 2]


@pytest.mark.slow
def test_wandb_offline(tmp_path, dataset):
    """ A resumed run is the same run of wandb. """
    pytest.importorskip('wandb')
    train(tmp_path, dataset, max_iters=2, wandb_log=True)
    train(tmp_path, dataset, max_iters=4, wandb_log=True, init_from='resume')
    run_id = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['run_id']
    assert len(list((tmp_path / 'wandb').glob(f'offline-run-*-{run_id}'))) == 2

# -----------------------------------------------------------------------------
# a loss in other units


def test_perplexity_and_bits_per_byte_of_an_evaluation(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=5)
    settings = dict(max_iters=5, eval_only=True, init_from='resume')
    _, evaluations, out = train(tmp_path, dataset, **settings)
    pattern = r'^perplexity (\S+) per token, (\S+) bits per byte$'
    (perplexity, bits), = re.findall(pattern, out, re.MULTILINE)
    val_loss = evaluations[5][1]
    assert float(perplexity) == pytest.approx(math.exp(val_loss), rel=1e-3)
    assert float(bits) == pytest.approx(val_loss / math.log(2), rel=1e-3)  # a character is a byte


def test_evaluation_of_the_training_split(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=5)
    settings = dict(eval_only=True, eval_split='train', init_from='resume')
    out, _ = run('train.py', cwd=tmp_path, **{**SMALL, 'dataset': dataset, **settings})
    assert re.search(r'^step 5: train loss (\S+), train loss \1$', out, re.MULTILINE)
    assert 'perplexity' in out


def test_bytes_of_text_beyond_ascii():
    record = {'kind': 'char', 'itos': ['a', 'é', '€']}  # 1 + 2 + 3 bytes
    text = metrics.perplexity_and_bits_per_byte(math.log(2), record, np.array([0, 1, 2]))
    assert text == 'perplexity 2 per token, 0.5000 bits per byte'


def test_end_of_text_costs_bits_and_is_not_text():
    tokenizers = pytest.importorskip('tokenizers')
    model = tokenizers.models.WordLevel({'a': 0, 'b': 1, '<|endoftext|>': 2})
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    record = {'kind': 'hf', 'json': tokenizer.to_str(), 'end': 2}
    ids = np.array([0, 1, 2, 1, 0, 2], dtype=np.uint16)  # six tokens, four of them letters
    text = metrics.perplexity_and_bits_per_byte(math.log(2), record, ids)
    assert text.endswith(', 1.5000 bits per byte')


def test_perplexity_without_a_tokenizer(monkeypatch):
    ids = np.array([0, 1])
    assert metrics.perplexity_and_bits_per_byte(math.log(2), None, ids) == 'perplexity 2 per token'

    def get_tokenizer(record):
        raise OSError('no network')
    monkeypatch.setattr(metrics, 'get_tokenizer', get_tokenizer)
    record = {'kind': 'gpt2'}
    text = metrics.perplexity_and_bits_per_byte(math.log(2), record, ids)
    assert text == 'perplexity 2 per token'


def test_perplexity_of_a_very_high_loss():
    assert metrics.perplexity_and_bits_per_byte(1e6, None, np.array([0])).startswith('perplexity')

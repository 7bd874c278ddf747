""" log.csv, the loss in other units, and the pictures. """
import csv
import math
import re
import types

import numpy as np
import pytest
import torch
from conftest import SMALL, run, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import report
from memory import MemoryCount, memory_of_training
from model import GPT, GPTConfig
from report import Log


def rows_of(folder):
    with open(folder / 'log.csv', newline='') as f:
        return list(csv.DictReader(f))


def test_one_row_for_each_iteration_that_was_logged_or_evaluated(tmp_path, dataset):
    settings = dict(log_interval=3, eval_interval=10)
    iters, steps, _ = train(tmp_path, dataset, **settings, checkpoint_interval=7)
    rows = rows_of(tmp_path / 'out')
    expected = [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert [int(row['iter']) for row in rows] == expected
    for row in rows:
        it = int(row['iter'])
        assert int(row['tokens']) == 64 * it and 0 < float(row['lr']) <= 1e-2
        assert (row['val_loss'] != '') == (it in steps) and (row['loss'] != '') == (it in iters)
        if it in steps:
            assert (float(row['train_loss']), float(row['val_loss'])) == pytest.approx(steps[it], abs=1e-4)
        if it in iters:
            assert float(row['loss']) == pytest.approx(iters[it], abs=1e-4) and float(row['grad_norm']) > 0
    assert 0 < float(rows[0]['seconds']) < float(rows[-1]['seconds'])

    with open(tmp_path / 'out/log.csv', 'a') as f:  # as a kill may leave it: rows of later, and half a one
        f.write('21,1344,9,2.0,,,0.01,1.0,1,\n2')
    train(tmp_path, dataset, **settings, max_iters=31, init_from='resume')
    again = rows_of(tmp_path / 'out')
    assert again[:8] == rows[:8] and [int(row['iter']) for row in again[8:]] == [20, 21, 24, 27, 30, 31]
    assert float(again[-1]['seconds']) > float(rows[-1]['seconds'])

    train(tmp_path, dataset, eval_only=True, init_from='resume')
    assert rows_of(tmp_path / 'out') == again

    seconds = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['seconds']
    assert seconds == pytest.approx(float(again[-1]['seconds']), rel=1e-4)
    (tmp_path / 'out/log.csv').write_text('iter,seconds\n')  # iterations that were not logged count as well
    train(tmp_path, dataset, log_interval=0, max_iters=35, eval_interval=0, init_from='resume')
    last, = rows_of(tmp_path / 'out')
    assert int(last['iter']) == 35 and float(last['seconds']) > seconds
    train(tmp_path, dataset, max_iters=3)
    assert [int(row['iter']) for row in rows_of(tmp_path / 'out')] == [0, 1, 2, 3]
    train(tmp_path, dataset, max_iters=5, init_from='resume', batch_size=2 * SMALL['batch_size'])
    tokens = [int(row['tokens']) // (4 * 16) for row in rows_of(tmp_path / 'out')]
    assert tokens == [0, 1, 2, 3, 5, 7]


def test_eval_only_says_the_loss_in_other_units(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=5)
    _, steps, out = train(tmp_path, dataset, max_iters=5, eval_only=True, init_from='resume')
    only, _ = run('train.py', cwd=tmp_path, **{**SMALL, 'dataset': dataset, 'eval_only': True,
                                               'eval_split': 'train', 'init_from': 'resume'})
    assert 'perplexity' in only
    words = out.split('perplexity ')[1].split()
    assert float(words[0]) == pytest.approx(math.exp(steps[5][1]), rel=1e-3)
    assert float(words[3]) == pytest.approx(steps[5][1] / math.log(2), rel=1e-3)  # a character is a byte here


def test_a_log_that_is_damaged_or_cannot_grow(tmp_path, dataset, monkeypatch, capsys):
    train(tmp_path, dataset, max_iters=10)
    (tmp_path / 'out/log.csv').write_text('a,b\n1,2\n')
    train(tmp_path, dataset, max_iters=12, init_from='resume')
    assert [row['iter'] for row in rows_of(tmp_path / 'out')] == ['10', '11', '12']
    (tmp_path / 'out/log.csv').write_text('iter\n' + 200_000 * '9')
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset, 'init_from': 'resume'})
    assert 'out/log.csv is damaged (field larger' in error and error.count('\n') == 1

    log = Log(dict(out_dir=tmp_path, eval_only=False, wandb_log=False), {}, 0, 64, False, True, None)
    for it, fails in enumerate((False, True, False)):
        log.trained(1.0, loss=2.5, mfu=0.1)
        if fails:
            class Half:
                def __init__(self, file, *options, **more):
                    self.file = file

                def writerow(self, row):
                    self.file.write('1,64,')
                    raise OSError('no space')
            monkeypatch.setattr(report.csv, 'writer', Half)
        log.write(it, 0.0)
        monkeypatch.undo()
    assert [row['iter'] for row in rows_of(tmp_path)] == ['0', '2']
    assert 'lacks iteration 1' in capsys.readouterr().out
    with pytest.raises(ValueError, match="'weight'"):
        log.trained(1.0, weight=2.5, mfu=0.1)
        log.write(3, 0.0)
    (tmp_path / 'log.csv').unlink()  # with its folder, perhaps
    log.write(4, 0.0)
    assert 'lacks iteration 4' in capsys.readouterr().out


def test_an_end_of_text_costs_bits_and_is_no_text():
    from tokenizers import Tokenizer, decoders, models
    tokenizer = Tokenizer(models.WordLevel({'a': 0, 'b': 1, '<|endoftext|>': 2}))
    tokenizer.decoder = decoders.Fuse()
    record = {'kind': 'hf', 'json': tokenizer.to_str(), 'end': 2}
    text = report.in_other_units(math.log(2), record, np.array([0, 1, 2, 1, 0, 2], dtype=np.uint16))
    assert text.endswith(' 1.5000 bits a byte')  # six tokens of a bit, four letters


def test_bits_a_byte_of_text_beyond_ascii():
    record = {'kind': 'char', 'itos': ['a', 'é', '€']}
    text = report.in_other_units(math.log(2), record, np.array([0, 1, 2]))
    assert text == 'perplexity 2 a token, 0.5000 bits a byte'  # three bits for 1 + 2 + 3 bytes


def test_plot_draws_runs(tmp_path, dataset, script_globals):
    train(tmp_path, dataset)
    train(tmp_path, dataset, out_dir='other', max_iters=30, log_interval=0)
    script_globals('plot.py', 'out', 'other', x='seconds')
    drawn = script_globals('plot.py', 'out', 'other', file='both.svg')['axes']
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert '<svg' in (tmp_path / 'both.svg').read_text()
    lines = drawn.get_lines()
    assert [len(line.get_xdata()) for line in lines] == [20, 3, 0, 4]
    assert list(lines[1].get_ydata()) == [float(row['val_loss']) for row in rows_of(tmp_path / 'out')
                                          if row['val_loss']]


@pytest.mark.parametrize('x, at', [('iter', [0, 2, 3]), ('tokens', [0, 128, 192]), ('seconds', [5, 11, 13])])
def test_a_plot_and_its_log(tmp_path, script_globals, x, at):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/log.csv').write_text('iter,tokens,seconds,loss,val_loss\n'
                                        '0,0,5,9,9\n1,64,7,3,\n2,128,11,4,2\n3,192,13,,3\n')
    axes = script_globals('plot.py', 'a', x=x)['axes']
    batches, evaluated = axes.get_lines()
    assert list(batches.get_ydata()) == [9, 3, 4] and list(evaluated.get_ydata()) == [9, 2, 3]
    assert list(evaluated.get_xdata()) == at and evaluated.get_label() == 'a: 2.0000 at best'
    assert axes.get_ylim() == pytest.approx((1.9, 4.1))  # without the steep beginning


def test_plot_says_what_is_wrong(tmp_path, dataset, script_globals):
    (tmp_path / 'empty').mkdir()
    for arguments, settings, message in (((), {}, 'name one or more folders'), (('empty',), {}, 'no log.csv'),
                                         (('empty',), dict(x='loss'), "x='loss'"),
                                         (('empty',), dict(file='a.doc'), 'a.doc')):
        with pytest.raises(SystemExit, match=message):
            script_globals('plot.py', *arguments, **settings)


@pytest.mark.parametrize('loss, tokenizer', [(math.nan, {'kind': 'char', 'itos': ['a', 'b']}), (1.0, None)])
def test_wandb_goes_without_samples_where_there_can_be_none(tmp_path, monkeypatch, tiny, loss, tokenizer):
    import wandb
    logged, ids = [], []
    monkeypatch.setattr(wandb, 'init', lambda **kwargs: ids.append(kwargs['id']) or types.SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None))
    config = dict(out_dir=str(tmp_path), eval_only=True, wandb_log=True, wandb_project='', wandb_run_name='')
    log = Log(config, {'run_id': 'id'}, 0, 1, False, True, tokenizer)
    log.evaluated(3, {'train': 1.0, 'val': loss}, 0.1, 0.3, tiny, torch.arange(20))
    assert set(logged[0]) == {'iter', 'lr', 'mfu', 'train/loss', 'val/loss'}
    monkeypatch.setenv('WANDB_RUN_ID', 'theirs')  # wandb's own variable: a run begun with another script
    Log(config, {'run_id': 'id'}, 0, 1, False, True, tokenizer)
    assert ids == ['id', 'theirs']


def test_samples_for_wandb_leave_the_model_training(tmp_path, monkeypatch, tiny):
    import wandb
    logged = []
    monkeypatch.setattr(wandb, 'init', lambda **kwargs: types.SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None))
    config = dict(out_dir=str(tmp_path), eval_only=True, wandb_log=True, wandb_project='', wandb_run_name='')
    record = {'kind': 'char', 'itos': [chr(65 + i) for i in range(40)]}
    log = Log(config, {'run_id': 'id'}, 0, 1, False, True, record)
    log.evaluated(3, {'train': 1.0, 'val': 1.0}, 0.1, 0.3, tiny, torch.arange(20))
    assert len(logged[0]['samples'].data) == 3 and logged[0]['mfu'] == 30.0  # per cent, as nanoGPT
    assert all(module.training for module in tiny.modules())  # or the rest of the run had no dropout


def test_the_time_that_a_run_will_take(tiny):
    config = dict(device='cpu', dtype='float32', compile=False, muon_lr=0, eval_only=False, max_iters=12,
                  block_size=16, backend='gloo', out_dir='out')
    peak = 1000 * tiny.flops_per_token(16)  # a thousand tokens a second
    for processes, text in ((0, '0:10:00'), (1, '0:10:00'), (2, '0:05:00')):  # of 180,000 tokens, at 30%
        lines = list(report.plan(config, tiny, 18_000, 90_000, 2, processes, peak, 'a guess'))
        assert f'10 iterations: 180,000 tokens, 2 epochs, about {text} at an mfu of 30%' in '\n'.join(lines)


def test_mfu_is_a_running_mean_and_none_at_first(tmp_path, dataset, script_globals):
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 3})
    rows = [row for row in rows_of(tmp_path / 'out') if row['loss']]
    assert [row['mfu'] for row in rows[:5]] == [''] * 5
    share, expected = names['raw_model'].flops_per_token(16) / names['peak'], None
    for row in rows[5:]:
        now = float(row['tokens_per_second']) * share
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert float(row['mfu']) == pytest.approx(expected, rel=1e-4)


def test_a_dtype_that_is_slower_here_is_named(monkeypatch, tiny):
    monkeypatch.setattr(report, 'peak_flops', lambda device, dtype: (8e9, 'a guess'))
    monkeypatch.setattr(report, 'has_bfloat16', lambda: False)
    config = dict(device='cpu', compile=False, muon_lr=0, eval_only=True, max_iters=1)
    for dtype, peak in (('float32', 8e9), ('bfloat16', 5e8), ('float16', 8e9)):
        lines = '\n'.join(report.plan({**config, 'dtype': dtype}, tiny, 1, 1, 0, 0, peak, 'a guess'))
        assert ('bfloat16 is 16 times as slow as float32' in lines) == (dtype == 'bfloat16')


SHAPE = dict(n_layer=3, n_head=2, n_embd=128, block_size=32, batch_size=4)


@pytest.mark.parametrize('flags', [{}, dict(bias=True), dict(rotary=True, untied=True, muon_lr=0.01)])
def test_estimates_are_those_of_a_real_run(tmp_path, dataset, flags):
    settings = {**SMALL, **SHAPE, **flags, 'dataset': dataset, 'max_iters': 2}
    run('train.py', cwd=tmp_path, **{**settings, 'learning_rate': 1e-3, 'min_lr': 0})
    wanted = {key: settings[key] for key in (*SHAPE, *flags, 'dataset', 'max_iters')}
    out, _ = run('bench.py', cwd=tmp_path, mode='estimate', device='cpu', dtype='float32', **wanted)
    lines = [line.split() for line in out.splitlines()]
    parts = [int(line[-2].replace(',', '')) for line in lines if line[-1] == 'parameters']
    total, size = next((line[2], line[-2]) for line in lines if line[:2] == ['in', 'all'])
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    numbers = {p.data_ptr(): p.numel() for p in checkpoint['model'].values()}  # a tied table counts once
    assert sum(parts) == sum(numbers.values()) == int(total[:-1].replace(',', ''))
    real = (tmp_path / 'out/ckpt.pt').stat().st_size
    assert float(size.replace(',', '')) * 1e6 == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_and_flops_are_those_of_a_real_step(dtype):
    config = GPTConfig(vocab_size=50, bias=True, **{key: SHAPE[key] for key in SHAPE if key != 'batch_size'})
    memory = memory_of_training(config, 4, 2, dtype)
    torch.manual_seed(0)
    model, kept = GPT(config), {}
    idx = torch.randint(50, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t), \
            torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        logits, loss = model(idx, idx)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {idx.data_ptr()}
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert memory['activations'] == pytest.approx(real + logits.nbytes, rel=0.01)
    assert memory['weights'] == memory['gradients'] == 4 * sum(p.numel() for p in model.parameters())
    assert memory['moments'] == pytest.approx(2 * memory['weights'], rel=0.01)
    together = sum(memory[key] for key in ('weights', 'gradients', 'moments', 'activations'))
    alone = memory_of_training(config, 4, 1, 'float32')['at most at once']  # gradients come as activations go
    assert together <= memory['at most at once'] <= 1.1 * together and alone < together
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it skips the CPU's own
        model(idx, idx)[1].backward()
    assert model.flops_per_token(32) * idx.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_the_heap_loses_is_of_small_pieces():
    with MemoryCount() as count:
        kept = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**26, dtype=torch.uint8)
        torch.empty(2**27, dtype=torch.uint8)
        del kept
    assert count.now == count.small == 0 and count.peak == 2**20 + 2**26 + 2**27
    assert count.heap == count.peak + int(0.35 * 2**20)


def test_the_estimate_of_a_run(tmp_path, script_globals, capsys):
    with pytest.raises(SystemExit):
        script_globals('bench.py', mode='estimate', real_data=False, device='cpu', dtype='float32',
                       n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2, max_iters=10**9,
                       gradient_accumulation_steps=5)
    out = capsys.readouterr().out
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False))
    flops, n = model.flops_per_token(8), sum(p.numel() for p in model.parameters())
    assert f'an iteration: 80 tokens, {flops * 80 / 1e12:,.4g} TFLOP' in out
    days, = [line.split()[1:] for line in out.splitlines() if line.startswith('  A100')]
    for text, tokens in zip(days, (80e9, 20 * n)):
        assert float(text) == pytest.approx(flops * tokens / (0.4 * 312e12) / 86400, rel=0.01)
    weights, = [line.split()[1:] for line in out.splitlines() if line.startswith('  weights')]
    assert weights == [f'{4 * n / 1e6:.1f}', 'MB']


def test_a_run_says_what_it_will_do_and_what_it_did(tmp_path, dataset):
    _, steps, out = train(tmp_path, dataset, gradient_accumulation_steps=2)
    assert ('\n20 iterations: 2,560 tokens, 0.427 epochs, about 0:00:' in out
            and '\ncheckpoints and log.csv go to out\n' in out)
    best = min(val for _, val in steps.values())
    assert re.search(rf'\n20 iterations in \d:\d\d:\d\d, best val loss {best:.4f}; try: python sample.py '
                     r'--out_dir=out\n$', out)
    _, _, out = train(tmp_path, dataset, gradient_accumulation_steps=2, init_from='resume', max_iters=25)
    assert '\n5 iterations: 640 tokens, ' in out and '\n5 iterations in ' in out

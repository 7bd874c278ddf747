""" The scripts end to end, as a user runs them, from another folder. """
import io
import json
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run, train

from machine import has_fbgemm


def test_prepare_train_sample_from_another_folder(tmp_path, dataset):
    _, _, out = train(tmp_path, dataset)
    text, _ = run('sample.py', cwd=tmp_path, num_samples=3, max_new_tokens=30, start='the cat')
    samples = text.split('---------------\n')
    assert len(samples) == 4 and all('the cat' in sample for sample in samples[:3])
    again, _ = run('sample.py', cwd=tmp_path, num_samples=3, max_new_tokens=30, start='the cat')
    assert text == again and samples[0] != samples[1]


@pytest.fixture
def sample(script_globals, capsys, monkeypatch):
    """ sample(...) runs sample.py on out/ckpt.pt in this process -> the samples of --out, and the output. """
    def ask(typed='', **settings):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
        script_globals('sample.py', **{'max_new_tokens': 30, 'out': 'samples.jsonl', 'device': 'cpu',
                                       'dtype': 'float32', 'num_samples': 1, **settings})
        with open('samples.jsonl') as lines:
            return [json.loads(line) for line in lines], capsys.readouterr().out
    return ask


def test_what_sample_py_can_be_asked_for(tmp_path, dataset, sample):
    train(tmp_path, dataset)
    (tmp_path / 'a.txt').write_text('the cat\n')
    (tmp_path / 'b.txt').write_text('a')
    (tmp_path / 'c.txt').write_text('the cat\na\n\nsat on')
    text = lambda samples: [one['text'] for one in samples]
    alone, out = sample(start='the', num_samples=1)
    assert set(alone[0]) == {'prompt', 'text', 'tokens', 'seconds'} and alone[0]['tokens'] == 30
    assert f"the{alone[0]['text']}\n{'-' * 15}\n" in out and 0 < alone[0]['seconds'] < 30
    ten, _ = sample(start='the', num_samples=10)
    assert len(set(text(ten))) == 10 and ten[0]['text'] == alone[0]['text']
    streamed, shown = sample(start='the', num_samples=10, stream=True)
    assert text(streamed) == text(ten) and len({one['seconds'] for one in streamed}) == 10
    for one in ten:
        assert f"the{one['text']}\n{'-' * 15}\n" in shown
    stopped, shown = sample(start='the', num_samples=10, stop='\n')
    assert text(stopped) == [one.partition('\n')[0] for one in text(ten)]
    assert min(one['tokens'] for one in stopped) < 30
    for typed, start, prompts in (('', 'FILES:?.txt', ['the cat\n', 'a', 'the cat\na\n\nsat on']),
                                  ('', 'LINES:c.txt', ['the cat', 'a', 'sat on']),
                                  ('', 'FILE:a.txt', ['the cat\n']), ('on a mat', '-', ['on a mat'])):
        samples, _ = sample(typed, start=start, num_samples=2)
        assert [one['prompt'] for one in samples] == [prompt for prompt in prompts for _ in range(2)]
    asked, shown = sample('the cat\ndog\na\n', interactive=True)
    assert [one['prompt'] for one in asked] == ['the cat', 'a']  # what it cannot read does not end it
    assert "'dg' is not in the vocabulary" in shown and asked[1]['text'] in shown
    together, _ = sample(start='LINES:c.txt', past_block='half', max_new_tokens=40)  # batches by length
    for number, prompt in enumerate(('the cat', 'a', 'sat on')):
        one, _ = sample(start=prompt, past_block='half', max_new_tokens=40, num_samples=3)
        assert together[number]['prompt'] == prompt and together[number]['text'] == one[number]['text']
    greedy, _ = sample(start='the', temperature=0)
    assert text(sample(start='the', temperature=0, num_samples=2, seed=1)[0]) == text(greedy) * 2
    varied, _ = sample(start='the', temperature=0, repetition_penalty=1e9, max_new_tokens=6)
    assert varied[0]['text'] != greedy[0]['text'][:6]
    assert text(sample(start='the', top_k=1)[0]) == text(sample(start='the', top_p=1e-6)[0]) == text(greedy)
    assert text(sample(start='the', min_p=1.0, top_k=0)[0]) == text(greedy)
    assert text(sample(start='the', max_new_tokens=0)[0]) == ['']
    for light in (dict(dtype='bfloat16'), dict(dtype='float16'), dict(past_block='half'),
                  *([dict(quantize='int8')] if has_fbgemm('cpu') else [])):
        assert len(text(sample(start='the', **light)[0])[0]) == 30


def test_dropout_is_off_when_sampling(tmp_path, dataset, sample):
    train(tmp_path, dataset, dropout=0.5)
    once, _ = sample(start='the', temperature=0, num_samples=4)
    assert len({one['text'] for one in once}) == 1


def test_a_prompt_beyond_the_vocabulary_of_the_model(tmp_path, dataset, sample):
    """ Of a tokenizer that has tokens that the model was not made for. """
    train(tmp_path, dataset, max_iters=2)
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    checkpoint['tokenizer']['itos'].append('€')
    torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
    known = checkpoint['model_args']['vocab_size']
    with pytest.raises(SystemExit, match=f'the prompt has token {known}, and the model only {known}'):
        sample(start='the €')


def test_a_model_meets_only_its_own_vocabulary(tmp_path, dataset, other_characters):
    train(tmp_path, dataset, max_iters=2)
    np.full(100, 500, dtype=np.uint16).tofile(other_characters / 'val.bin')
    (other_characters / 'meta.pkl').unlink()  # so the ids are taken for GPT-2's, as the model
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    del checkpoint['tokenizer']
    torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
    settings = {**SMALL, 'dataset': other_characters, 'init_from': 'resume'}
    _, error = run('train.py', cwd=tmp_path, code=1, **settings)
    assert 'needs 501' in error and error.count('\n') == 1


def test_the_padding_of_the_vocabulary_is_never_drawn(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    path = tmp_path / 'out/ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    known = len(checkpoint['tokenizer']['itos'])
    for key in ('transformer.wte.weight', 'lm_head.weight'):  # 50 rows that win every draw
        table = checkpoint['model'][key]
        checkpoint['model'][key] = torch.cat((table, table.mean(0) + 9 * torch.randn(50, 16)))
    checkpoint['model_args']['vocab_size'] = known + 50
    torch.save(checkpoint, path)
    out, _ = run('sample.py', cwd=tmp_path, num_samples=1, max_new_tokens=100, start='the', top_k=0)
    assert len(out.split('the', 1)[1]) > 100


def test_a_classic_checkpoint_whose_dataset_is_gone(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    del checkpoint['tokenizer']
    checkpoint['config']['dataset'] = 'gone'
    torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
    _, error = run('sample.py', cwd=tmp_path, code=1)
    assert 'meta.pkl of dataset=gone' in error and error.count('\n') == 1


def test_bench(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, n_layer=1, n_head=2, n_embd=16, block_size=16,
                 batch_size=2, profile=True, device='cpu')
    for part in ('time per iteration: ', 'ms, MFU: ', 'tokens/s', 'peak memory', 'waiting', 'median of 20',
                 'MFU against'):
        assert part in out
    trace, = (tmp_path / 'bench_log').glob('*.json')
    assert json.loads(trace.read_text())['traceEvents']


def test_bench_compares_in_turn(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, n_layer=1, n_head=2, n_embd=16, block_size=16,
                 batch_size=2, mode='compare', device='cpu', dtype='bfloat16', rotary=True, muon_lr=0.1)
    for part in ('in float32: ', 'with AdamW: ', 'without loading: '):
        ratio, = [line.split(', ')[1] for line in out.splitlines() if line.startswith(part)]
        assert 0.05 < float(ratio.removesuffix(' times as long')) < 20
        this, = re.findall(r'time per iteration: (\S+)ms', out)
        other, = re.findall(rf'{part}(\S+)ms', out)
        assert float(ratio.split()[0]) == pytest.approx(float(other) / float(this), abs=0.02)


def test_bench_samples_in_turn(tmp_path, dataset):
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, n_layer=1, n_head=2, n_embd=16, block_size=16,
                 max_new_tokens=4, mode='sample', device='cpu', dtype='float32')
    for part in ('this, batch 1: ', 'this, batch 10: ', 'uncached float32, batch 1: ',
                 'transformers, batch 10: ', 'memory is read at'):
        assert part in out
    out, _ = run('bench.py', cwd=tmp_path, dataset=dataset, n_layer=1, n_head=2, n_embd=16, block_size=16,
                 max_new_tokens=20, mode='sample', device='cpu', dtype='bfloat16', rotary=True)
    assert 'half a block kept, batch 1: ' in out and 'transformers' not in out


def test_bench_measures_whole_steps(script_globals, monkeypatch):
    import update
    steps, step = [], update.clip_and_step
    monkeypatch.setattr(update, 'clip_and_step', lambda *args, **kwargs: steps.append(step(*args, **kwargs)))
    names = script_globals('bench.py', real_data=False, device='cpu', dtype='float32', n_layer=1, n_head=1,
                           n_embd=8, block_size=8, batch_size=2)
    assert len(steps) == 10 + 20 and names['tokens'] == 16
    assert names['mfu'] == pytest.approx(names['flops'] / names['median'] / names['peak'])
    assert names['flops'] == 16 * names['model'].flops_per_token(8)


def test_bench_counts_the_tokens_of_all_samples(script_globals, monkeypatch, capsys):
    """ On a clock that ticks a second at each look: one for each token, of however many samples. """
    clock = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(clock)))
    with pytest.raises(SystemExit):
        script_globals('bench.py', mode='sample', real_data=False, device='cpu', dtype='float32', n_layer=1,
                       n_head=1, n_embd=8, block_size=16, max_new_tokens=4, rotary=True)
    out = capsys.readouterr().out
    linear = 12 * 8**2 + 8 * 50304
    share = 4 * linear / 2**29 * 100  # a token a second, and 512 MiB
    for B in (1, 10):
        assert f'this, batch {B}: {B}.0 tokens/s, the first after 1000ms, weights read at {share:.0f}%' in out


def test_bench_without_the_dataset(tmp_path):
    out, _ = run('bench.py', cwd=tmp_path, dataset=tmp_path / 'none', n_layer=1, n_head=2, n_embd=16,
                 block_size=16, batch_size=1, device='cpu')
    assert 'vocabulary of 50,304 take its place' in out and 'time per iteration' in out


@pytest.mark.parametrize('config', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
def test_every_config_file_is_taken_by_train(script_globals, capsys, config):
    """ --help comes after the file in the order of the arguments, so the file has been read and checked. """
    with pytest.raises(SystemExit) as stopped:
        script_globals('train.py', str(ROOT / 'config' / config), '--help')
    assert stopped.value.code == 0 and 'not settings' not in capsys.readouterr().out


def test_start_up_imports_nothing_that_is_not_needed(tmp_path):
    command = [sys.executable, '-X', 'importtime', str(ROOT / 'sample.py'), '--help']
    loaded = {line.rpartition('|')[2].strip() for line in
              subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr.splitlines()}
    assert 'torch' in loaded
    assert not loaded & {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}


def test_wandb_offline(tmp_path, dataset, script_globals, monkeypatch):
    train(tmp_path, dataset, max_iters=2, wandb_log=True)
    train(tmp_path, dataset, max_iters=4, wandb_log=True, init_from='resume')
    run_id = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['run_id']
    runs = list((tmp_path / 'wandb').glob(f'offline-run-*-{run_id}'))
    assert len(runs) == 2  # two parts of one run
    import wandb
    logged = []
    monkeypatch.setattr(wandb, 'init', lambda **kwargs: types.SimpleNamespace(
        log=logged.append, define_metric=lambda *_, **__: None))
    script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 2, 'wandb_log': True})
    keys = {'iter', 'train/loss', 'val/loss', 'lr', 'mfu', 'samples'}
    assert [set(values) for values in logged] == [keys] * 2
    assert [(it, len(text)) for it, text in logged[1]['samples'].data] == [(2, 100)] * 3

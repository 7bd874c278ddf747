""" sample.py as a user runs it, on a checkpoint of a model that is not trained. """
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run, train

from components.device import has_fbgemm
from model import GPT, GPTConfig

CHARACTERS = sorted(set('the cat sat on a mat.\n'))
MODEL_ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, dropout=0.5,
                  vocab_size=len(CHARACTERS))
needs_fbgemm = pytest.mark.skipif(not has_fbgemm('cpu'), reason='this CPU has no int8 kernel')


def write_checkpoint(folder, **fields):
    """ Writes out/ckpt.pt with weights so large that greedy texts do not repeat. """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODEL_ARGS))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    checkpoint = {
        'model': model.state_dict(),
        'model_args': MODEL_ARGS,
        'iter_num': 1,
        'best_val_loss': 3.0,
        'config': {'dataset': 'nowhere'},
        'tokenizer': {'kind': 'char', 'itos': CHARACTERS},
        **fields,
    }
    (folder / 'out').mkdir(exist_ok=True)
    torch.save(checkpoint, folder / 'out/ckpt.pt')


@pytest.fixture
def sample(tmp_path, script_globals, capsys, monkeypatch):
    """ sample(...) runs sample.py in this process -> the samples of --out, and what it printed. """
    write_checkpoint(tmp_path)

    def execute(stdin='', **settings):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
        defaults = dict(max_new_tokens=30, num_samples=1, device='cpu', dtype='float32')
        script_globals('sample.py', **{**defaults, 'out': 'samples.jsonl', **settings})
        lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines], capsys.readouterr().out

    return execute


def texts_of(samples):
    return [one['text'] for one in samples]

# -----------------------------------------------------------------------------
# output


def test_output(sample):
    samples, printed = sample(start='the', num_samples=2)
    assert set(samples[0]) == {'prompt', 'text', 'tokens', 'seconds'}
    assert samples[0]['prompt'] == 'the'
    assert samples[0]['tokens'] == len(samples[0]['text']) == 30
    assert 0 < samples[0]['seconds'] < 30
    expected = ''.join(f"the{text}\n{'-' * 15}\n" for text in texts_of(samples))
    assert printed.endswith('device: cpu, float32, not compiled\n' + expected)


def test_samples_differ_and_do_not_depend_on_their_number(sample):
    one, _ = sample(start='the', num_samples=1)
    ten, _ = sample(start='the', num_samples=10)
    assert len(set(texts_of(ten))) == 10
    assert texts_of(ten)[0] == texts_of(one)[0]


def test_stream(sample):
    expected, _ = sample(start='the', num_samples=3)
    streamed, printed = sample(start='the', num_samples=3, stream=True)
    assert texts_of(streamed) == texts_of(expected)
    for text in texts_of(expected):
        assert f"the{text}\n{'-' * 15}\n" in printed


def test_stop(sample):
    expected, _ = sample(start='the', num_samples=10)
    stopped, _ = sample(start='the', num_samples=10, stop='a')
    assert texts_of(stopped) == [text.partition('a')[0] for text in texts_of(expected)]
    assert min(one['tokens'] for one in stopped) < 30


@pytest.mark.parametrize('start, stdin, expected', [
    ('FILE:a.txt', '', ['the cat\n']),
    ('FILES:?.txt', '', ['the cat\n', 'the cat\na\n\nsat on']),
    ('LINES:b.txt', '', ['the cat', 'a', 'sat on']),
    ('-', 'on a mat', ['on a mat']),
])
def test_prompts(tmp_path, sample, start, stdin, expected):
    (tmp_path / 'a.txt').write_text('the cat\n')
    (tmp_path / 'b.txt').write_text('the cat\na\n\nsat on')
    samples, _ = sample(stdin, start=start, num_samples=2)
    prompts = [one['prompt'] for one in samples]
    assert prompts == [prompt for prompt in expected for _ in range(2)]


@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_sample_does_not_depend_on_other_prompts(tmp_path, sample, past_block):
    prompts = ['the cat', 'a', 'sat on']
    (tmp_path / 'prompts.txt').write_text('\n'.join(prompts))
    settings = dict(past_block=past_block, max_new_tokens=40)
    together, _ = sample(start='LINES:prompts.txt', **settings)
    for number, prompt in enumerate(prompts):
        alone, _ = sample(start=prompt, num_samples=3, **settings)
        assert together[number]['prompt'] == prompt
        assert together[number]['text'] == alone[number]['text']


def test_interactive(sample):
    samples, printed = sample('the cat\ndog\na\n', interactive=True)
    assert [one['prompt'] for one in samples] == ['the cat', 'a']
    assert "sample.py: 'dg' is not in the vocabulary" in printed
    assert samples[1]['text'] in printed

# -----------------------------------------------------------------------------
# settings


def test_temperature_of_zero(sample):
    greedy, _ = sample(start='the', temperature=0)
    same, _ = sample(start='the', temperature=0, num_samples=4, seed=1)
    assert texts_of(same) == texts_of(greedy) * 4  # dropout, for one, is off
    assert len(set(texts_of(greedy)[0])) > 2


@pytest.mark.parametrize('settings', [
    dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0, top_k=0)], ids=str)
def test_filters_that_keep_only_the_most_likely_token(sample, settings):
    greedy, _ = sample(start='the', temperature=0)
    filtered, _ = sample(start='the', **settings)
    assert texts_of(filtered) == texts_of(greedy)


def test_repetition_penalty(sample):
    samples, _ = sample(start='the', temperature=0, repetition_penalty=1e9, max_new_tokens=6)
    text = 'the' + samples[0]['text']
    assert len(set(text)) == len(text) == 9


def test_no_new_tokens(sample):
    samples, _ = sample(start='the', max_new_tokens=0)
    assert texts_of(samples) == ['']


@pytest.mark.parametrize('settings, name', [
    pytest.param(dict(dtype='bfloat16'), 'bfloat16', id='bfloat16'),
    pytest.param(dict(dtype='float16'), 'float16', id='float16'),
    pytest.param(dict(quantize='int8'), 'int8', id='int8', marks=needs_fbgemm),
])
def test_weights_in_fewer_bits(sample, settings, name):
    samples, printed = sample(start='the', **settings)
    assert len(samples[0]['text']) == 30
    assert f'device: cpu, {name}, not compiled' in printed


def test_changed_settings_are_printed(sample):
    _, printed = sample(start='the')
    assert "overriding: start = 'the'" in printed


def test_padding_of_the_vocabulary_is_never_sampled(tmp_path, sample):
    checkpoint = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    embedding = checkpoint['model']['transformer.wte.weight']
    generator = torch.Generator().manual_seed(0)
    likely_rows = embedding.mean(0) + 9 * torch.randn(50, 16, generator=generator)
    for key in ('transformer.wte.weight', 'lm_head.weight'):
        checkpoint['model'][key] = torch.cat((embedding, likely_rows))
    checkpoint['model_args']['vocab_size'] += 50
    torch.save(checkpoint, tmp_path / 'out/ckpt.pt')
    samples, _ = sample(start='the', max_new_tokens=100, top_k=0)
    assert len(samples[0]['text']) == 100

# -----------------------------------------------------------------------------
# errors


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(top_k=-1), 'top_k=-1'),
    (dict(num_samples=0), 'num_samples=0'),
    (dict(seed=-1), 'seed=-1'),
    (dict(max_new_tokens=-1), 'max_new_tokens=-1'),
    (dict(top_p=0.0), 'top_p=0.0'),
    (dict(min_p=1.5), 'min_p=1.5'),
    (dict(repetition_penalty=0.0), 'repetition_penalty=0.0'),
    (dict(past_block='roll'), "past_block='roll'"),
    (dict(quantize='int4'), "quantize='int4'"),
    (dict(interactive=True, start='the'), 'interactive=True'),
    (dict(out='nowhere/samples.jsonl'), 'out=nowhere/samples.jsonl'),
    (dict(out='out'), 'out=out'),
    (dict(start=''), 'the prompt is empty'),
    (dict(start='dog'), "'dg' is not in the vocabulary"),
    (dict(start='FILE:nowhere.txt'), 'no file nowhere.txt'),
    (dict(device='cuda:7'), 'device=cuda:7'),
    (dict(out_dir='nowhere'), 'nowhere/ckpt.pt'),
    (dict(init_from='scratch'), 'init_from=scratch'),
], ids=str)
def test_user_errors(sample, settings, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as ended:
        sample(**settings)
    assert ended.value.code.startswith('sample.py: ')
    assert '\n' not in ended.value.code


def test_prompt_with_a_token_that_the_model_does_not_have(tmp_path, sample):
    write_checkpoint(tmp_path, tokenizer={'kind': 'char', 'itos': CHARACTERS + ['€']})
    n = len(CHARACTERS)
    with pytest.raises(SystemExit, match=f'the prompt has token {n}, .* only {n} tokens'):
        sample(start='the €')


def test_checkpoint_without_a_tokenizer_whose_dataset_is_missing(tmp_path, sample):
    write_checkpoint(tmp_path, tokenizer=None)
    with pytest.raises(SystemExit, match='meta.pkl of dataset=nowhere'):
        sample()


def test_non_finite_logits(sample, monkeypatch):
    def forward(self, idx, targets=None, cache=None, pad=None):
        return torch.full((len(idx), 1, len(CHARACTERS)), torch.nan), None

    monkeypatch.setattr(GPT, 'forward', forward)
    with pytest.raises(SystemExit, match='non-finite'):
        sample(start='the')
    with pytest.raises(FileNotFoundError):  # no samples
        sample('the\n', interactive=True)


@pytest.mark.parametrize('interactive', [False, True], ids=['prompts', 'interactive'])
def test_bugs_keep_their_traceback(sample, monkeypatch, interactive):
    def forward(self, idx, targets=None, cache=None, pad=None):
        raise ValueError('a bug')

    monkeypatch.setattr(GPT, 'forward', forward)
    with pytest.raises(ValueError, match='a bug'):
        sample('the\n', interactive=interactive)

# -----------------------------------------------------------------------------
# real processes


@pytest.mark.slow
def test_train_and_sample(tmp_path, dataset):
    train(tmp_path, dataset)
    settings = dict(num_samples=3, max_new_tokens=30, start='the cat')
    printed, _ = run('sample.py', cwd=tmp_path, **settings)
    samples = printed.split('---------------\n')
    assert len(samples) == 4
    assert all('the cat' in text for text in samples[:3])
    assert samples[0] != samples[1]
    again, _ = run('sample.py', cwd=tmp_path, **settings)
    assert again == printed


@pytest.mark.slow
def test_start_up_imports_only_what_is_needed(tmp_path):
    command = [sys.executable, '-X', 'importtime', str(ROOT / 'sample.py'), '--help']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    imported = {line.rpartition('|')[2].strip() for line in ended.stderr.splitlines()}
    assert 'torch' in imported
    assert not imported & {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}

""" sample.py as a user runs it, on a checkpoint of a model that is not trained. """
import io
import json
import re
import subprocess
import sys

import pytest
import tokenizers
import torch
from conftest import ROOT, run, train

from components.device import has_fbgemm
from model import GPT, GPTConfig

CHARACTERS = sorted(set('the cat sat on a mat.\n'))
PROMPTS = ['the cat', 'a', 'sat on', 'on', 'a']
MODEL_ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, dropout=0.5,
                  vocab_size=len(CHARACTERS) + 2)  # padded by two ids that no character has
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
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))

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


@pytest.mark.parametrize('settings', [
    dict(start='the', num_samples=3),
    dict(start='the', num_samples=3, stream=True),
    dict(start='LINES:prompts.txt', num_samples=2),
    dict(start='LINES:prompts.txt', stream=True),
], ids=str)
def test_samples_are_printed_in_the_order_of_the_prompts(sample, settings):
    samples, printed = sample(**settings)
    prompts = PROMPTS if 'LINES' in settings['start'] else ['the']
    repeated = [prompt for prompt in prompts for _ in range(settings.get('num_samples', 1))]
    assert [one['prompt'] for one in samples] == repeated
    expected = ''
    for one in samples:
        expected += f"{one['prompt']}{one['text']}\n{'-' * 15}\n"
        assert set(one) == {'prompt', 'text', 'tokens', 'seconds'}
        assert one['tokens'] == len(one['text']) == 30
        assert 0 < one['seconds'] < 30
    assert len(set(texts_of(samples))) == len(samples)
    assert "overriding: start = '" in printed
    assert printed.endswith('device: cpu, float32, not compiled\n' + expected)


@pytest.mark.parametrize('past_block', ['exact', 'half'])
def test_sample_depends_on_its_prompt_and_number_alone(sample, past_block):
    """ Not on other samples, nor on whether it is streamed. """
    settings = dict(past_block=past_block, max_new_tokens=40)
    together, _ = sample(start='LINES:prompts.txt', **settings)
    streamed, _ = sample(start='LINES:prompts.txt', stream=True, **settings)
    assert texts_of(streamed) == texts_of(together)
    for number, prompt in enumerate(PROMPTS):
        alone, _ = sample(start=prompt, num_samples=len(PROMPTS), **settings)
        assert together[number]['text'] == alone[number]['text']


def test_stop(sample):
    expected, _ = sample(start='the', num_samples=10)
    stopped, _ = sample(start='the', num_samples=10, stop='a')
    assert texts_of(stopped) == [text.partition('a')[0] for text in texts_of(expected)]
    assert min(one['tokens'] for one in stopped) < 30


def test_interactive(sample):
    samples, printed = sample('the cat\ndog\na\n', interactive=True)
    assert [one['prompt'] for one in samples] == ['the cat', 'a']
    assert "sample.py: 'dg' is not in the vocabulary" in printed
    assert samples[1]['text'] in printed

WORDS = tokenizers.models.WordLevel({'the': 0, 'cat': 1, '[UNK]': 2, '</s>': 3}, unk_token='[UNK]')
WORDS = tokenizers.Tokenizer(WORDS).to_str()


@pytest.mark.parametrize('tokenizer, prompt', [
    pytest.param({'kind': 'char', 'itos': CHARACTERS}, '\n', id='newline'),
    pytest.param({'kind': 'char', 'itos': list('ACGT')}, 'A', id='DNA'),
    pytest.param({'kind': 'hf', 'json': WORDS, 'end': 3}, '</s>', id='words'),
    pytest.param({'kind': 'hf', 'json': WORDS, 'end': None}, 'the', id='words without an end'),
    pytest.param({'kind': 'hf', 'json': WORDS, 'end': 99}, 'the', id='no embedding of the end'),
])
def test_default_prompt(tmp_path, sample, tokenizer, prompt):
    """ A newline, or what the model can read in its place, in one line. """
    write_checkpoint(tmp_path, tokenizer=tokenizer)
    samples, printed = sample()
    assert samples[0]['prompt'] == prompt
    line = f"start='\\n' is not in the vocabulary; starting with {prompt!r}\n"
    assert (line in printed) == (prompt != '\n')

# -----------------------------------------------------------------------------
# settings


@pytest.mark.parametrize('settings', [
    dict(temperature=0, num_samples=4, seed=1),  # dropout, for one, is off
    dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0, top_k=0),
], ids=str)
def test_settings_that_leave_only_the_most_likely_token(sample, settings):
    greedy, _ = sample(start='the', temperature=0)
    samples, _ = sample(start='the', **settings)
    assert set(texts_of(samples)) == set(texts_of(greedy))
    assert len(set(texts_of(greedy)[0])) > 2


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

# -----------------------------------------------------------------------------
# errors


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=-1.0), 'temperature=-1.0'),  # for all ranges see test_settings.py
    (dict(out='nowhere/samples.jsonl'), 'out=nowhere/samples.jsonl'),
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


@pytest.mark.parametrize('tokenizer, message', [
    ({'kind': 'char', 'itos': CHARACTERS + ['€', '£', '¥']}, 'token .*, .* only .* tokens'),
    (None, 'meta.pkl of dataset=nowhere'),
])
def test_tokenizer_that_does_not_fit(tmp_path, sample, tokenizer, message):
    write_checkpoint(tmp_path, tokenizer=tokenizer)
    with pytest.raises(SystemExit, match=message):
        sample(start='the ¥')


@pytest.mark.parametrize('interactive', [False, True], ids=['prompts', 'interactive'])
def test_bugs_keep_their_traceback(sample, monkeypatch, interactive):
    def forward(self, idx, **options):
        raise ValueError('a bug')

    monkeypatch.setattr(GPT, 'forward', forward)
    with pytest.raises(ValueError, match='a bug'):
        sample('the\n', interactive=interactive)


def test_non_finite_logits(sample, monkeypatch):
    def forward(self, idx, **options):
        return torch.full((len(idx), 1, MODEL_ARGS['vocab_size']), torch.nan), None

    monkeypatch.setattr(GPT, 'forward', forward)
    with pytest.raises(SystemExit, match='non-finite'):
        sample(start='the')

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
    again, _ = run('sample.py', cwd=tmp_path, **settings)
    assert again == printed


@pytest.mark.slow
def test_start_up_imports_only_what_is_needed(tmp_path):
    command = [sys.executable, '-X', 'importtime', str(ROOT / 'sample.py'), '--help']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    imported = {line.rpartition('|')[2].strip() for line in ended.stderr.splitlines()}
    assert 'torch' in imported
    assert not imported & {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}

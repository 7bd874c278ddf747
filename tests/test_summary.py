""" components/summary.py: the lines before and after a run, and a loss in other units. """
import math
import pickle
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SMALL

from components import summary
from components.checkpoint import Progress
from components.optim import configure_optimizers
from components.pretrained import ModelLocation
from components.summary import closing_line, opening_lines, perplexity_and_bits_per_byte

CONFIG = dict(
    init_from='scratch', out_dir='out', device='cpu', dtype='float32', compile=False,
    backend='gloo', muon_lr=0.0, eval_only=False, max_iters=12, decay_lr=True, lr_decay_iters=12,
    warmup_iters=2, gradient_accumulation_steps=5, batch_size=225, block_size=16,
    learning_rate=1e-3)
SCRATCH = ModelLocation('scratch', 'scratch')
RESUME = ModelLocation('resume', 'out/ckpt.pt')

# -----------------------------------------------------------------------------
# before a run


@pytest.fixture
def opening(tmp_path, monkeypatch, tiny):
    """ opening(...) -> the lines before a run on a device of 1000 tokens/s, as one text. """
    def guess_peak(device_type, dtype):
        return 1000 * tiny.flops_per_token(16), 'a guess'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, 'peak_flops', guess_peak)
    monkeypatch.setattr(summary, 'has_bfloat16', lambda: False)

    def execute(location=SCRATCH, iter_num=0, **settings):
        config = {**CONFIG, **settings}
        optimizers = configure_optimizers(
            tiny, 0.1, 1e-3, (0.9, 0.95), 'cpu', config['muon_lr'])
        progress = Progress(iter_num, best_val_loss=1.5)
        return '\n'.join(opening_lines(config, location, progress, tiny, optimizers, 90_000)) + '\n'
    return execute


def test_opening_lines(opening, tiny):
    assert opening() == (
        'tokens per iteration will be: 18,000\n'
        f'number of parameters: {tiny.get_num_params() / 1e6:.2f}M\n'
        f'{tiny.config}\n'
        'device: cpu, float32, not compiled, 1 process, AdamW\n'
        f'mfu is measured against {tiny.flops_per_token(16) / 1e9:.2f} TFLOP/s, from a guess\n'
        '12 iterations: 216,000 tokens, 2.4 epochs, about 0:12:00 at an mfu of 30%, plus '
        'evaluations\n'
        'checkpoints and log.csv go to out\n')


@pytest.mark.parametrize('arguments, expected, unexpected', [
    pytest.param(dict(compile=True, muon_lr=0.01), ', compiled, 1 process, AdamW and Muon\n', None,
                 id='compile and Muon'),
    pytest.param(dict(eval_only=True), 'TFLOP/s', 'epochs', id='evaluation'),
    pytest.param(dict(iter_num=12), 'TFLOP/s', 'epochs', id='nothing left'),
    pytest.param(dict(location=RESUME, iter_num=2, init_from='auto'),
                 '^init_from=auto: resume\nresuming out/ckpt.pt at iteration 2, best val loss '
                 '1.5000\n(.*\n)*10 iterations: 180,000 tokens, 2 epochs, about 0:10:00', None,
                 id='resumed run'),
    pytest.param(dict(location=ModelLocation('huggingface', 'gpt2'), init_from='gpt2'),
                 '^.* gpt2\n', 'replace', id='fine-tuning'),
    pytest.param(dict(location=RESUME, init_from='resume', n_layer=7, n_head=12, n_embd=768),
                 r'NOTE: .*ignored: n_layer=7 \(2\)\n', None, id='another architecture'),
    pytest.param(dict(warmup_iters=12), 'NOTE: .* warmup', None, id='warmup alone'),
    pytest.param(dict(warmup_iters=11), '', 'NOTE', id='longest warmup'),
    pytest.param(dict(lr_decay_iters=13), 'NOTE: .*lr_decay_iters=13.*--lr_decay_iters=12', None,
                 id='decay that is cut off'),
    pytest.param(dict(lr_decay_iters=13, decay_lr=False), '', 'NOTE', id='constant learning rate'),
    pytest.param(dict(lr_decay_iters=11), '', 'NOTE', id='short decay'),
    pytest.param(dict(dtype='bfloat16'), 'NOTE: .* bfloat16.*--dtype=float32', None, id='emulated'),
    pytest.param(dict(dtype='float16'), 'NOTE: .* float16.*--dtype=float32', None, id='float16'),
    pytest.param(dict(dtype='float16', device='cuda'), '', 'NOTE', id='GPU'),
])
def test_lines_of_other_runs(opening, arguments, expected, unexpected):
    text = opening(**arguments)
    assert re.search(expected, text)
    assert unexpected is None or unexpected not in text


def test_several_processes(opening, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert re.search(r', 2 processes over gloo, (.*\n)*.* about 0:06:00 at', opening())


@pytest.mark.parametrize('name', ['ckpt.pt', 'ckpt_last.pt'])
def test_earlier_run_that_will_be_replaced(tmp_path, opening, name):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / name).touch()
    pattern = 'replace .* earlier run in out; --init_from=resume'
    assert re.search(pattern, opening())
    assert re.search(pattern, opening(ModelLocation('huggingface', 'gpt2')))
    assert not re.search(pattern, opening(eval_only=True))
    assert not re.search(pattern, opening(RESUME))

# -----------------------------------------------------------------------------
# after a run


@pytest.mark.parametrize('changes, expected', [
    pytest.param({}, '12 iterations in 0:01:15, best val loss 1.5000 at step 10; '
                     'try: python sample.py --out_dir=out', id='complete'),
    pytest.param(dict(tokenizer=None), '.*; without a tokenizer', id='no tokenizer'),
    pytest.param(dict(out_dir='my run'), ".*; try: python sample.py --out_dir='my run'$",
                 id='name with a space'),
    pytest.param(dict(first_iter=2, best_val_iter=None),
                 '10 iterations in 0:01:15, best val loss 1.5000; try: ', id='resumed, of nanoGPT'),
    pytest.param(dict(error='no space'), '12 .*; NOT SAVED: no space$', id='not saved'),
    pytest.param(dict(first_iter=12), 'nothing to do: iteration 12 .*max_iters=12', id='no update'),
    pytest.param(dict(reason='why'), 'why at iteration 12; --init_from=resume .* 1,008$',
                 id='stopped'),
    pytest.param(dict(reason='why', error='no space'), 'why at iteration 12; NOT SAVED: no space$',
                 id='stopped and not saved'),
    pytest.param(dict(reason='why', num_skipped_steps=2), 'why .* 1,008, .* below 0.001.*float32',
                 id='stopped by skipped steps'),
    pytest.param(dict(reason='why', num_skipped_steps=2, saved_iter=0), 'why .* NOT SAVED.* below',
                 id='stopped by skipped steps, without a checkpoint'),
    pytest.param(dict(num_skipped_steps=2), '12 .*--out_dir=out$', id='complete, the last skipped'),
])
def test_closing_line(changes, expected):
    values = dict(best_val_iter=10, error='', saved_iter=1008, reason='', num_skipped_steps=0,
                  first_iter=0)
    values = SimpleNamespace(**{**values, **changes})
    values.seconds_of_process = lambda: 75.4
    progress = Progress(12, best_val_loss=1.5, best_val_iter=values.best_val_iter)
    config = {**CONFIG, 'out_dir': changes.get('out_dir', 'out')}
    tokenizer = changes.get('tokenizer', {'kind': 'gpt2'})
    line = closing_line(config, tokenizer, progress, checkpoints=values, stop=values, clock=values)
    assert re.match(expected, line)


@pytest.mark.parametrize('text, itos', [
    pytest.param('the cat\n', None, id='characters'),
    pytest.param('GATTACA', None, id='DNA'),
    pytest.param('GATTACA', {i: i for i in range(4)}, id='bytes, which no text is known of'),
])
def test_the_command_of_the_closing_line_runs(tmp_path, script_globals, capsys, text, itos):
    characters = sorted(set(text))
    ids = np.array([characters.index(character) for character in text * 10], np.uint16)
    for split in ('train', 'val'):
        ids.tofile(tmp_path / f'{split}.bin')
    meta = {'vocab_size': len(characters), 'itos': itos or characters}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    settings = {**SMALL, 'dataset': str(tmp_path), 'out_dir': 'my run', 'max_iters': 1}
    script_globals('train.py', **settings)
    printed = capsys.readouterr().out
    _, found, command = printed.strip().rpartition('; try: ')
    assert bool(found) == (itos is None)
    if found:
        python, script, *arguments = shlex.split(command)
        assert python == 'python'
        script_globals(script, *arguments, num_samples=1, max_new_tokens=3, device='cpu')
        assert capsys.readouterr().out.endswith('---\n')

# -----------------------------------------------------------------------------
# a loss in other units


def test_bytes_of_text_beyond_ascii():
    spec = {'kind': 'char', 'itos': ['a', 'é', '€']}  # 1 + 2 + 3 bytes
    text = perplexity_and_bits_per_byte(math.log(2), spec, np.array([0, 1, 2]))
    assert text == 'perplexity 2 per token, 0.5000 bits per byte'


def test_end_of_text_costs_bits_and_is_not_text():
    tokenizers = pytest.importorskip('tokenizers')
    model = tokenizers.models.WordLevel({'a': 0, 'b': 1, '<|endoftext|>': 2})
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    spec = {'kind': 'hf', 'json': tokenizer.to_str(), 'end': 2}
    ids = np.array([0, 1, 2, 1, 0, 2], dtype=np.uint16)  # six tokens, four of them letters
    text = perplexity_and_bits_per_byte(math.log(2), spec, ids)
    assert text.endswith(', 1.5000 bits per byte')


@pytest.mark.parametrize('loss, spec, expected', [
    (math.log(2), None, 'perplexity 2 per token'),
    (math.log(2), {'kind': 'gpt2'}, 'perplexity 2 per token'),
    (1e6, None, f'perplexity {math.exp(700):.4g} per token'),
])
def test_perplexity_without_a_tokenizer(monkeypatch, loss, spec, expected):
    def get_tokenizer(spec):
        raise OSError('no network')
    monkeypatch.setattr(summary, 'get_tokenizer', get_tokenizer)
    assert perplexity_and_bits_per_byte(loss, spec, np.array([0, 1])) == expected

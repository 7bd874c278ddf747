"""
Wrong command lines. Each ends with one line that names what is wrong, without a traceback, and
writes nothing.
"""
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, environment, flags, run_script, train

TINY_BENCH = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1)
VALID_SETTINGS = {
    'train.py': {**SMALL, 'max_iters': 3, 'out_dir': 'new', 'dataset': 'FOLDER/words'},
    'sample.py': dict(num_samples=1, max_new_tokens=2, device='cpu', out_dir='FOLDER/out'),
    'bench.py': {**TINY_BENCH, 'device': 'cpu', 'dataset': 'FOLDER/words'},
}
needs_forks = pytest.mark.skipif(
    sys.platform != 'linux', reason='without forks, each case takes seconds')

# -----------------------------------------------------------------------------
# what the command lines name


@pytest.fixture(scope='module')
def folder(tmp_path_factory, dataset):
    """ A folder with a trained model, and with files that are broken in every way. """
    folder = tmp_path_factory.mktemp('broken')
    shutil.copytree(dataset, folder / 'words')
    write_texts(folder)
    write_datasets(folder)
    train(folder, dataset, max_iters=2)
    write_checkpoints(folder)
    write_runs(folder)
    return folder


class Bomb:
    """ An object whose pickle creates the file boom. """

    def __reduce__(self):
        return open, ('boom', 'w')


def write_texts(folder):
    (folder / 'syntax.py').write_text('n_layer = = 2')
    (folder / 'raises.py').write_text('x = 1\nprint(1 / 0)')
    (folder / 'misspelt.py').write_text('n_layers = 3')
    (folder / 'type.py').write_text("n_layer = 'two'")
    (folder / 'latin.txt').write_bytes(b'caf\xe9')
    (folder / 'empty.txt').write_text('')
    (folder / 'file').write_text('')


def write_datasets(folder):
    bins = {
        'odd_size': b'abc',
        'too_short': b'ab' * 10,
        'large_ids': b'\xff\xff' * 100,
        'uint32': b'ab\0\0' * 100,
    }
    metas = {
        'meta_code': pickle.dumps({'vocab_size': 3, 'x': Bomb()}),
        'meta_truncated': b'\x80',
        'meta_negative': pickle.dumps({'vocab_size': -3}),
        'meta_string': pickle.dumps({'vocab_size': 3, 'tokenizer': 'gpt2'}),
    }
    meta = pickle.loads((folder / 'words/meta.pkl').read_bytes())
    itos = meta['itos']
    itos[0], itos[1] = itos[1], itos[0]
    metas['other_characters'] = pickle.dumps(meta)
    for name, content in bins.items():
        shutil.copytree(folder / 'words', folder / name)
        (folder / name / 'train.bin').write_bytes(content)
    for name, content in metas.items():
        shutil.copytree(folder / 'words', folder / name)
        (folder / name / 'meta.pkl').write_bytes(content)


def write_checkpoints(folder):
    """ Checkpoint files that are broken in one place each. """
    content = (folder / 'out/ckpt.pt').read_bytes()
    (folder / 'truncated.pt').write_bytes(content[:-2000])
    (folder / 'empty.pt').write_bytes(b'')
    (folder / 'text.pt').write_bytes(b'not a checkpoint')

    def save(name, checkpoint):
        torch.save(checkpoint, folder / f'{name}.pt')

    valid = torch.load(folder / 'out/ckpt.pt', weights_only=True)
    weights = valid['model']
    args = valid['model_args']
    lm_head = weights['lm_head.weight']
    save('code', {**valid, 'config': Bomb()})
    save('list', [1, 2])
    save('no_model_args', {'model': weights})
    save('unknown_arg', {**valid, 'model_args': {**args, 'alibi': True}})
    save('three_heads', {**valid, 'model_args': {**args, 'n_head': 3}})
    save('wider', {**valid, 'model_args': {**args, 'n_embd': 32}})
    save('nan', {**valid, 'model': {**weights, 'lm_head.weight': lm_head * float('nan')}})
    save('string', {**valid, 'model': {**weights, 'lm_head.weight': 'a string'}})


def write_runs(folder):
    """ Folders of runs whose ckpt.pt has a key of a wrong type. """
    valid = torch.load(folder / 'out/ckpt.pt', weights_only=True)
    wrong = {
        'no_optimizer': {'optimizer': None},
        'wrong_optimizer': {'optimizer': {'param_groups': 3}},
        'wrong_iter': {'iter_num': 'x'},
        'wrong_config': {'config': 3},
        'wrong_scaler': {'scaler': [3]},
        'wrong_loss': {'best_val_loss': 'low'},
    }
    for name, fields in wrong.items():
        (folder / name).mkdir()
        torch.save({**valid, **fields}, folder / name / 'ckpt.pt')

# -----------------------------------------------------------------------------
# how a case is checked


def complete(script, arguments, folder):
    """ The arguments after valid ones, which they replace, with the folder in place of FOLDER. """
    arguments = [*flags(VALID_SETTINGS[script]), *arguments]
    return [argument.replace('FOLDER', str(folder)) for argument in arguments]


def assert_one_line(script, code, expected_code, error, pattern):
    assert code == expected_code, error
    assert error.startswith(f'{script}: ')
    assert error.count('\n') == 1
    assert error.endswith('\n')
    assert len(error) < 700
    assert re.search(pattern, error), error


def assert_refused(folder, script, arguments, pattern, expected_code=1):
    """ Runs a script, which has to refuse the arguments in a line that `pattern` matches. """
    files = set(folder.rglob('*'))
    code, _, error = run_script(script, complete(script, arguments, folder), folder)
    assert_one_line(script, code, expected_code, error, pattern)
    assert set(folder.rglob('*')) == files


def cases(*rows):
    """ The rows of a table, named by their first column. """
    return [pytest.param(*row, id=row[0]) for row in rows]


@needs_forks
@pytest.mark.parametrize('script', VALID_SETTINGS)
def test_valid_settings(tmp_path, folder, script):
    """ Nothing but the argument of a case is wrong. """
    code, _, error = run_script(script, complete(script, [], folder), tmp_path)
    assert code == 0, error

# -----------------------------------------------------------------------------
# train.py


@needs_forks
@pytest.mark.parametrize('argument, pattern', cases(
    ('--learnin_rate=1', "'learnin_rate'; did you mean 'learning_rate'"),
    ('--n_layer', "'--n_layer'; .*--key=value"),
    ('-n_layer=2', "'-n_layer=2'; .*--key=value"),
    ('n_layer=2', "'n_layer=2'; .*--key=value"),
    ('--n_layer=two', "n_layer .*not 'two'"),
    ('--n_layer=2.5', 'n_layer .*not 2.5'),
    ('--bias=1', 'bias .*True or False, not 1'),
    ('--learning_rate=fast', "learning_rate .*number, not 'fast'"),
    ('missing.py', "config file 'missing.py'"),
    ('config/train_gpt3.py', r'did you mean \S*config/train_gpt2.py'),
    ('latin.txt', "config file 'latin.txt'"),
    ('out', "config file 'out'"),
    ('syntax.py', 'syntax.py, line 1: SyntaxError'),
    ('raises.py', 'raises.py, line 2: ZeroDivisionError'),
    ('misspelt.py', "misspelt.py: .*'n_layers'; did you mean 'n_layer'"),
    ('type.py', "type.py: n_layer .*not 'two'"),
))
def test_unreadable_argument(folder, argument, pattern):
    assert_refused(folder, 'train.py', [argument], pattern, expected_code=2)


@needs_forks
@pytest.mark.parametrize('argument', [
    'batch_size=0', 'batch_size=-4', 'block_size=0', 'block_size=-1',
    'gradient_accumulation_steps=0',
    'n_layer=0', 'n_layer=-1', 'n_head=0', 'n_embd=0', 'n_embd=17', 'dropout=1.0', 'dropout=-0.1',
    'learning_rate=-1.0', 'weight_decay=-0.1', 'beta1=1.0', 'beta1=-0.5', 'beta2=1.5',
    'grad_clip=-1.0', 'max_iters=-1',
    'warmup_iters=-1', 'lr_decay_iters=-5', 'min_lr=-1.0', 'cooldown_iters=-1', 'muon_lr=-0.1',
    'eval_iters=0', 'eval_iters=-2', 'eval_interval=-1', 'log_interval=-1',
    'checkpoint_interval=-1', 'max_bad_steps=-1', 'seed=-1', f'seed={2**64}',
])
def test_training_setting_out_of_range(folder, argument):
    assert_refused(folder, 'train.py', [f'--{argument}'], re.escape(argument))


@needs_forks
@pytest.mark.parametrize('arguments, pattern', [
    pytest.param('--learning_rate=1e999', 'learning_rate=inf', id='infinite learning rate'),
    pytest.param('--min_lr=1.0 --learning_rate=0.1', 'min_lr=1.0 .*learning_rate=0.1',
                 id='min_lr above learning_rate'),
    pytest.param('--cooldown_iters=19 --warmup_iters=2', 'cooldown_iters=19 .*warmup_iters=2',
                 id='no room for warmup and cooldown'),
    pytest.param('--muon_lr=0.02 --learning_rate=0.0 --min_lr=0.0',
                 'muon_lr .*learning_rate', id='Muon without a learning rate'),
    pytest.param('--n_embd=400000 --n_head=1', 'out of memory', id='model too large'),
    pytest.param('--batch_size=1000000000', 'memory; .*batch_size',
                 id='batch too large'),
    pytest.param('--block_size=100000000', '--block_size=5999', id='block too large'),
    pytest.param('--eval_split=test', "eval_split='test' .*--eval_only=True",
                 id='training with eval_split'),
    pytest.param('--eval_split=test --eval_only=True',
                 'test.bin .*train.bin, val.bin', id='missing split'),
    pytest.param('--device=cuda:7', 'device=cuda:7', id='missing GPU'),
    pytest.param('--device=gpu', 'device=gpu', id='unknown device'),
    pytest.param('--dtype=float8', "dtype='float8'", id='unknown dtype'),
    pytest.param('--compile=maybe', "compile='maybe'", id='unknown compile'),
    pytest.param('--backend=mpi', "backend='mpi'", id='unknown backend'),
])
def test_training_settings(folder, arguments, pattern):
    assert_refused(folder, 'train.py', arguments.split(), pattern)


@needs_forks
@pytest.mark.parametrize('name, pattern', cases(
    ('nowhere', 'nowhere/train.bin .*shakespeare_char'),
    ('shakespeare', 'python data/shakespeare/prepare.py'),
    ('FOLDER/odd_size', '3 bytes .*uint16'),
    ('FOLDER/too_short', '10 tokens.* --block_size=9'),
    ('FOLDER/large_ids', 'token 65535'),
    ('FOLDER/uint32', '32 or 64'),
    ('FOLDER/meta_code', r'meta.pkl .*code \(io.open\)'),
    ('FOLDER/meta_truncated', 'meta.pkl'),
    ('FOLDER/meta_negative', 'meta.pkl .*vocab_size=-3'),
    ('FOLDER/meta_string', 'meta.pkl'),
))
def test_dataset(folder, name, pattern):
    if (ROOT / f'data/{name}/train.bin').exists():
        pytest.skip('this dataset is prepared')
    assert_refused(folder, 'train.py', [f'--dataset={name}'], pattern)


@needs_forks
@pytest.mark.parametrize('out_dir, pattern', cases(
    ('file', 'out_dir=file'),
    ('file/out', 'file/out'),
    ('', "out_dir=''"),
))
def test_out_dir(folder, out_dir, pattern):
    assert_refused(folder, 'train.py', [f'--out_dir={out_dir}'], pattern)


@needs_forks
@pytest.mark.parametrize('init_from, pattern', cases(
    ('nothing', 'nothing'),
    ('nothing.pt', 'nothing.pt'),
))
def test_init_from(folder, init_from, pattern):
    assert_refused(folder, 'train.py', [f'--init_from={init_from}'], pattern)

# -----------------------------------------------------------------------------
# checkpoints


@needs_forks
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
@pytest.mark.parametrize('name, pattern', cases(
    ('truncated', 'truncated.pt .*complete'),
    ('empty', 'empty.pt .*complete'),
    ('text', 'text.pt .*complete'),
    ('code', r'code.pt .*code \(io.open\)'),
    ('list', 'list.pt .* list'),
    ('no_model_args', 'no_model_args.pt .*model_args'),
    ('unknown_arg', 'model_args.*alibi'),
    ('three_heads', 'n_head=3'),
    ('wider', 'wider.pt.* model_args'),
    ('nan', 'nan.pt.*finite.*transformer.wte.weight'),
    ('string', 'string.pt.*lm_head.weight'),
))
def test_checkpoint_file(folder, script, name, pattern):
    assert_refused(folder, script, [f'--init_from={name}.pt'], pattern)


@needs_forks
@pytest.mark.parametrize('out_dir, pattern', cases(
    ('missing', 'missing/ckpt.pt'),
    ('no_optimizer', 'optimizer=None .*type'),
    ('wrong_optimizer', 'wrong_optimizer/ckpt.pt: .*optimizer'),
    ('wrong_iter', "iter_num='x' .*type"),
    ('wrong_config', 'config=3 .*type'),
    ('wrong_scaler', r'scaler=\[3\] .*type'),
    ('wrong_loss', "best_val_loss='low' .*type"),
))
def test_checkpoint_to_resume(folder, out_dir, pattern):
    arguments = ['--init_from=resume', f'--out_dir={out_dir}']
    assert_refused(folder, 'train.py', arguments, pattern)


@needs_forks
@pytest.mark.parametrize('argument, pattern', cases(
    ('--dataset=FOLDER/other_characters', 'vocabulary.* out/ckpt.pt .*dataset='),
    ('--block_size=64', 'block_size=64 .*16 .*out/ckpt.pt'),
    ('--block_size=0', 'block_size=0'),
    ('--muon_lr=0.02', 'out/ckpt.pt .*muon_lr'),
))
def test_settings_that_do_not_fit_the_checkpoint(folder, argument, pattern):
    arguments = ['--init_from=resume', '--out_dir=out', argument]
    assert_refused(folder, 'train.py', arguments, pattern)

# -----------------------------------------------------------------------------
# sample.py and bench.py


@needs_forks
@pytest.mark.parametrize('argument', [
    'temperature=-1.0', 'top_k=-1', 'top_p=0.0', 'top_p=1.5', 'min_p=-0.1', 'min_p=1.5',
    'repetition_penalty=0.0', 'num_samples=-1', 'seed=-1', 'max_new_tokens=-1',
    'start=FILES:nothing*', 'start=LINES:empty.txt', 'out=nowhere/samples.jsonl', 'device=cuda:7',
])
def test_sampling_setting_out_of_range(folder, argument):
    assert_refused(folder, 'sample.py', [f'--{argument}'], re.escape(argument))


@needs_forks
@pytest.mark.parametrize('arguments, pattern', cases(
    ('--past_block=most', "past_block='most'"),
    ('--past_block=roll', "past_block='roll'"),
    ('--quantize=int4', "quantize='int4'"),
    ('--interactive=True --start=the', 'interactive=True .*--start'),
    ('--out=out', 'out=out '),
    ('--start=', 'the prompt is empty'),
    ('--start=dog', "'dg' is not in the vocabulary"),
    ('--start=FILE:nowhere.txt', 'nowhere.txt'),
    ('--start=FILE:latin.txt', 'latin.txt .*UTF-8'),
    ('--start=FILE:empty.txt', 'the prompt is empty'),
    ('--out_dir=nowhere', 'nowhere/ckpt.pt'),
    ('--init_from=nothing/at-all', 'nothing/at-all'),
    ('--init_from=scratch', 'init_from=scratch'),
))
def test_sampling_settings(folder, arguments, pattern):
    assert_refused(folder, 'sample.py', arguments.split(), pattern)


@needs_forks
@pytest.mark.parametrize('arguments, pattern', cases(
    ('--batch_size=0', 'batch_size=0'),
    ('--n_embd=17 --n_head=2', 'n_embd=17'),
    ('--n_embd=15 --n_head=5 --rotary=True', 'n_embd=15 / n_head=5'),
    ('--seed=-1', 'seed=-1'),
    ('--mode=fast', "mode='fast'"),
    ('--mode=sample --max_new_tokens=0', 'max_new_tokens=0'),
    ('--dtype=half', "dtype='half'"),
    ('--dataset=FOLDER/large_ids', 'token 65535'),
))
def test_bench_settings(folder, arguments, pattern):
    assert_refused(folder, 'bench.py', arguments.split(), pattern)

# -----------------------------------------------------------------------------
# processes that are not forks


@pytest.mark.slow
@pytest.mark.parametrize('script, arguments, expected_code, pattern', [
    pytest.param('train.py', ['--n_layer=two'], 2, 'n_layer', id='configurator'),
    pytest.param('train.py', ['--n_embd=400000', '--n_head=1'], 1, 'out of memory', id='memory'),
    pytest.param('sample.py', ['--init_from=nan.pt'], 1, 'nan.pt.*finite', id='checkpoint'),
])
def test_plain_process(folder, script, arguments, expected_code, pattern):
    command = [sys.executable, ROOT / script, *complete(script, arguments, folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert_one_line(script, done.returncode, expected_code, done.stderr, pattern)

""" Damage done on purpose: kills, signals, full disks, numbers that go bad, every bad input in one line. """
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, flags, run, run_script, train
from faults import differences

import model as model_module
from checkpoint import load_checkpoint, newest_checkpoint

FAST = dict(SMALL, eval_interval=0, log_interval=1)


@pytest.fixture(scope='session')
def ruins(tmp_path_factory, dataset):
    """ A folder with what the bad inputs name: checkpoints of every brokenness, configs, prompts. """
    folder = tmp_path_factory.mktemp('ruins')
    train(folder, dataset, max_iters=2)
    good = torch.load(folder / 'out/ckpt.pt', weights_only=True)

    class Bomb:
        def __reduce__(self):
            return open, (str(folder / 'boom'), 'w')

    def put(name, content):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)

    whole = (folder / 'out/ckpt.pt').read_bytes()
    put('short.pt', whole[:-2000])
    put('empty.pt', b'')
    put('text.pt', b'no checkpoint')
    put('bomb.pt', {**good, 'config': Bomb()})
    put('list.pt', [1, 2])
    put('keys.pt', {'model': good['model']})
    put('args.pt', {**good, 'model_args': {**good['model_args'], 'alibi': True}})
    put('head.pt', {**good, 'model_args': {**good['model_args'], 'n_head': 3}})
    put('width.pt', {**good, 'model_args': {**good['model_args'], 'n_embd': 32}})
    table = good['model']['lm_head.weight']
    put('nan.pt', {**good, 'model': {**good['model'], 'lm_head.weight': table * np.nan}})
    put('tensor.pt', {**good, 'model': {**good['model'], 'lm_head.weight': 'no tensor'}})
    for name, change in [('no_optimizer', {'optimizer': None}), ('odd_iter', {'iter_num': 'x'}),
                         ('odd_optimizer', {'optimizer': {'state': 3}}), ('odd_config', {'config': 3}),
                         ('odd_scaler', {'scaler': [3]}), ('odd_loss', {'best_val_loss': 'low'})]:
        (folder / name).mkdir()
        torch.save({**good, **change}, folder / name / 'ckpt.pt')
    for name, content in [('syntax.py', 'n_layer = = 2'), ('raises.py', 'x = 1\nprint(1 / 0)'),
                          ('typo.py', 'n_layers = 3'), ('kind.py', "n_layer = 'two'"),
                          ('latin.txt', b'caf\xe9'), ('empty.txt', b'')]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    other = folder / 'other'
    shutil.copytree(dataset, other)
    meta = pickle.loads((dataset / 'meta.pkl').read_bytes())
    meta['itos'][0], meta['itos'][1] = meta['itos'][1], meta['itos'][0]
    (other / 'meta.pkl').write_bytes(pickle.dumps(meta))
    for name, content in [('meta_bomb', pickle.dumps({'vocab_size': 3, 'x': Bomb()})),
                          ('meta_short', b'\x80'), ('meta_size', pickle.dumps({'vocab_size': -3})),
                          ('meta_word', pickle.dumps({'vocab_size': 3, 'tokenizer': 'gpt2'}))]:
        shutil.copytree(dataset, folder / name)
        (folder / name / 'meta.pkl').write_bytes(content)
    for name, content in [('odd_bin', b'abc'), ('short_bin', b'ab' * 10), ('big_ids', b'\xff\xff' * 100),
                          ('wide', b'ab\0\0' * 100)]:
        shutil.copytree(dataset, folder / name)
        (folder / name / 'train.bin').write_bytes(content)
    (folder / 'file').write_text('')
    return folder


BAD = [  # script, arguments, exit code, part of the line
    # the command line
    ('train.py', ['--learnin_rate=1'], 2, "no setting 'learnin_rate'; the nearest is 'learning_rate'"),
    ('train.py', ['--n_layer'], 2, "cannot read '--n_layer'"),
    ('train.py', ['-n_layer=2'], 2, 'no'),
    ('train.py', ['n_layer=2'], 2, 'n_layer=2'),
    ('train.py', ['--n_layer=two'], 2, "n_layer takes a whole number, not 'two'"),
    ('train.py', ['--n_layer=2.5'], 2, 'n_layer takes a whole number, not 2.5'),
    ('train.py', ['--bias=1'], 2, 'bias takes True or False, not 1'),
    ('train.py', ['--learning_rate=fast'], 2, 'learning_rate takes a number'),
    ('train.py', ['missing.py'], 2, "no config file 'missing.py'"),
    ('train.py', ['syntax.py'], 2, 'syntax.py, line 1: SyntaxError'),
    ('train.py', ['raises.py'], 2, 'raises.py, line 2: ZeroDivisionError'),
    ('train.py', ['typo.py'], 2, "no setting 'n_layers'; did you mean 'n_layer'?"),
    ('train.py', ['kind.py'], 2, 'kind.py: n_layer takes a whole number'),
    ('train.py', ['latin.txt'], 2, "no config file 'latin.txt'"),
    ('train.py', ['out'], 2, "no config file 'out'"),
    # settings of train.py out of range
    *(('train.py', [f'--{name}={value}'], 1, f'{name}={value}') for name, value in [
        ('batch_size', 0), ('batch_size', -4), ('block_size', 0), ('block_size', -1), ('n_layer', 0),
        ('n_layer', -1), ('n_head', 0), ('n_embd', 0), ('n_embd', 17), ('dropout', 1.0), ('dropout', -0.1),
        ('learning_rate', -1.0),
        ('weight_decay', -0.1), ('beta1', 1.0), ('beta1', -0.5), ('beta2', 1.5), ('grad_clip', -1.0),
        ('max_iters', -1), ('warmup_iters', -1), ('lr_decay_iters', -5), ('min_lr', -1.0), ('eval_iters', 0),
        ('eval_iters', -2), ('eval_interval', -1), ('log_interval', -1), ('checkpoint_interval', -1),
        ('max_bad_steps', -1), ('gradient_accumulation_steps', 0), ('seed', -1), ('seed', 2**64)]),
    ('train.py', ['--learning_rate=1e999'], 1, 'learning_rate=inf must be'),
    ('train.py', ['--min_lr=1.0', '--learning_rate=0.1'], 1, 'min_lr=1.0 is above learning_rate=0.1'),
    ('train.py', ['--n_embd=400000', '--n_head=1'], 1, 'out of memory'),
    ('train.py', ['--batch_size=1000000000'], 1, 'would run out of memory; lower batch_size'),
    ('train.py', ['--block_size=100000000'], 1, 'the most is --block_size='),
    ('train.py', ['--eval_split=test'], 1, "eval_split='test' takes --eval_only=True"),
    ('train.py', ['--eval_split=test', '--eval_only=True'], 1, 'test.bin is not there, but train.bin'),
    # what is not there
    ('train.py', ['--device=cuda:7'], 1, 'device=cuda:7'),
    ('train.py', ['--device=gpu'], 1, "device='gpu'"),
    ('train.py', ['--cooldown_iters=19', '--warmup_iters=2'], 1, 'cooldown_iters=19 and warmup_iters=2'),
    ('train.py', ['--muon_lr=0.02', '--learning_rate=0.0', '--min_lr=0.0'], 1, 'muon_lr takes a learning'),
    ('train.py', ['--muon_lr=0.02', '--init_from=resume'], 1, 'trained without Muon, and muon_lr'),
    ('train.py', ['--dtype=float8'], 1, "dtype='float8'"),
    ('train.py', ['--compile=maybe'], 1, "compile='maybe'"),
    ('train.py', ['--backend=mpi'], 1, "backend='mpi' on cpu cannot be"),
    ('train.py', ['--dataset=nowhere'], 1, 'nowhere/train.bin is not there; datasets with a prepare.py are'),
    ('train.py', ['--dataset=odd_bin'], 1, '3 bytes are no uint16 tokens'),
    ('train.py', ['--dataset=short_bin'], 1, '10 tokens; the most is --block_size=9'),
    ('train.py', ['--dataset=big_ids'], 1, 'holds token 65535'),
    ('train.py', ['--dataset=wide'], 1, 'holds tokens of 32 or 64 bits'),
    ('train.py', ['--dataset=meta_word'], 1, 'meta.pkl is not a vocabulary'),
    ('train.py', ['--dataset=meta_bomb'], 1, 'carries code (io.open), which was not run'),
    ('train.py', ['--dataset=meta_short'], 1, 'meta.pkl is not a vocabulary'),
    ('train.py', ['--dataset=meta_size'], 1, 'meta.pkl is not a vocabulary'),
    ('train.py', ['--out_dir=file'], 1, 'out_dir=file is a file'),
    ('train.py', ['--out_dir=file/out'], 1, 'file/out'),
    ('train.py', ['--out_dir='], 1, "out_dir='' is no folder"),
    ('train.py', ['--out_dir=empty', '--init_from=resume'], 1, 'there is no checkpoint empty/ckpt.pt'),
    ('train.py', ['--init_from=nothing'], 1, 'nothing'),
    ('train.py', ['--init_from=nothing.pt'], 1, 'there is no checkpoint nothing.pt'),
    # checkpoints
    *((script, [f'--init_from={name}.pt'], 1, part) for script in ('train.py', 'sample.py')
      for name, part in [
          ('short', 'short.pt is not a whole checkpoint'), ('empty', 'empty.pt is not a whole checkpoint'),
          ('text', 'text.pt is not a whole checkpoint'), ('bomb', 'it carries code (io.open'),
          ('list', 'holds a list'), ('keys', 'lacks model_args'),
          ('args', 'does not know the model_args alibi'), ('head', 'must be a multiple of n_head=3'),
          ('width', 'does not hold the model of its'), ('nan', 'transformer.wte.weight is not finite'),
          ('tensor', 'parameter named "lm_head.weight", expected')]),
    *(('train.py', ['--init_from=resume', f'--out_dir={name}'], 1, part) for name, part in [
        ('no_optimizer', 'optimizer=None is not what'), ('odd_optimizer', 'or of another kind'),
        ('odd_iter', "iter_num='x' is not what"), ('odd_config', 'config=3 is not what'),
        ('odd_scaler', 'scaler=[3] is not what'), ('odd_loss', "best_val_loss='low' is not what")]),
    ('train.py', ['--init_from=resume', '--dataset=other'], 1, 'another vocabulary'),
    ('train.py', ['--init_from=resume', '--block_size=64'], 1, 'block_size=64 is more than the 16 of out/'),
    ('train.py', ['--init_from=resume', '--block_size=0'], 1, 'block_size=0 must be at least 1'),
    # sample.py
    *(('sample.py', [f'--{name}={value}'], 1, f'{name}={value}') for name, value in [
        ('temperature', -1.0), ('top_k', -1), ('num_samples', -1), ('seed', -1), ('max_new_tokens', -1),
        ('top_p', 0.0), ('top_p', 1.5), ('min_p', -0.1), ('min_p', 1.5), ('repetition_penalty', 0.0),
        ('start', 'FILES:nothing*'), ('start', 'LINES:empty.txt'), ('out', 'nowhere/samples.jsonl')]),
    *(('sample.py', [f'--{name}={value}'], 1, f'{name}={value!r}') for name, value in [
        ('past_block', 'most'), ('past_block', 'roll'), ('quantize', 'int4')]),
    ('sample.py', ['--interactive=True', '--start=the'], 1, 'interactive=True asks for prompts itself'),
    ('sample.py', ['--out=out'], 1, 'out=out is no file'),
    ('sample.py', ['--start='], 1, 'the prompt is empty'),
    ('sample.py', ['--start=dog'], 1, "'dg' is not in the vocabulary"),
    ('sample.py', ['--start=FILE:nowhere.txt'], 1, 'there is no file nowhere.txt'),
    ('sample.py', ['--start=FILE:latin.txt'], 1, 'latin.txt is not in UTF-8'),
    ('sample.py', ['--start=FILE:empty.txt'], 1, 'the prompt is empty'),
    ('sample.py', ['--out_dir=nowhere'], 1, 'there is no checkpoint nowhere/ckpt.pt'),
    ('sample.py', ['--device=cuda:7'], 1, 'device=cuda:7'),
    ('sample.py', ['--init_from=nothing/at-all'], 1, 'nothing/at-all'),
    # bench.py
    ('bench.py', ['--batch_size=0'], 1, 'batch_size=0'),
    ('bench.py', ['--n_embd=17', '--n_head=2'], 1, 'n_embd=17'),
    ('bench.py', ['--seed=-1'], 1, 'seed=-1'),
    ('bench.py', ['--mode=fast'], 1, "mode='fast'"),
    ('bench.py', ['--mode=sample', '--max_new_tokens=0'], 1, 'max_new_tokens=0'),
    ('bench.py', ['--n_embd=15', '--n_head=5', '--rotary=True'], 1, 'n_embd=15 / n_head=5 must be even'),
    ('bench.py', ['--dtype=half'], 1, "dtype='half'"),
    ('bench.py', ['--dataset=big_ids'], 1, 'holds token 65535'),
]


def complete(script, arguments, ruins, dataset):
    """ The arguments with what makes everything else about the run good and small. """
    settings = {'train.py': {**SMALL, 'dataset': dataset, 'max_iters': 3, 'out_dir': 'new'},
                'sample.py': dict(num_samples=1, max_new_tokens=2, device='cpu'),
                'bench.py': dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, device='cpu',
                                 dataset=dataset)}[script]
    given = dict(argument[2:].partition('=')[::2] for argument in arguments if argument.startswith('--'))
    if given.get('init_from') == 'resume':
        settings['out_dir'] = 'out'
    if (ruins / given.get('dataset', 'none')).is_dir():  # a dataset may be an absolute path
        arguments = [argument for argument in arguments if not argument.startswith('--dataset')]
        settings['dataset'] = ruins / given['dataset']
    return [*flags({key: value for key, value in settings.items() if key not in given or key == 'dataset'
                    and 'dataset' not in ' '.join(arguments)}), *arguments]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.parametrize('script, arguments, code, part', BAD, ids=lambda value: str(value)[:60])
def test_bad_input_gets_one_line(ruins, dataset, script, arguments, code, part):
    before = sorted(ruins.rglob('*'))
    seen, _, error = run_script(script, complete(script, arguments, ruins, dataset), ruins)
    assert seen == code and error.count('\n') == 1 and part in error, (seen, error[-2000:])
    assert error.startswith(f'{script}: ') and len(error) < 700
    assert [path for path in sorted(ruins.rglob('*')) if path.name != 'new' and path not in before] == []


@pytest.mark.parametrize('script, arguments, code, part', BAD[3:108:9], ids=lambda value: str(value)[:60])
def test_bad_input_of_a_plain_process(ruins, dataset, script, arguments, code, part):
    command = [sys.executable, ROOT / script, *complete(script, arguments, ruins, dataset)]
    done = subprocess.run(command, cwd=ruins, capture_output=True, text=True, env=environment())
    assert done.returncode == code and part in done.stderr and done.stderr.count('\n') == 1


# -----------------------------------------------------------------------------
# kills and signals, of real processes

def begin(cwd, dataset, processes=None, **settings):
    """ Starts train.py, or torchrun with it, in a session of its own. """
    if os.name == 'nt':
        pytest.skip('signals of POSIX')
    command = [sys.executable, str(ROOT / 'train.py'), *flags({**SMALL, 'dataset': dataset, **settings})]
    if processes:
        command[1:1] = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def workers(process):
    """ The process ids of what torchrun started. """
    pids = subprocess.run(['pgrep', '-P', str(process.pid), '-f', 'train.py'], stdout=subprocess.PIPE).stdout
    return [int(pid) for pid in pids.split()]


def wait_for(process, text):
    """ Reads its output up to a line with `text` -> the lines. """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(''.join(lines) + process.stderr.read())


LONG = dict(max_iters=100_000, lr_decay_iters=100_000, eval_interval=0, always_save_checkpoint=False)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGHUP'])
def test_a_signal_stops_well(tmp_path, dataset, name):
    """ The iteration is finished, saved, and said; two signals within 5 seconds count as one. """
    process = begin(tmp_path, dataset, **LONG)
    wait_for(process, 'iter 5:')
    process.send_signal(getattr(signal, name))
    said = process.stderr.readline()  # sent at once they may come in any order
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert said + error == f'{name}: stopping after this iteration or evaluation\n'
    assert f'stopped by {name} at iteration' in out and '--init_from=resume goes on' in out
    stopped = load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num']
    assert stopped >= 5 and not (tmp_path / 'out/ckpt.pt').exists()
    train(tmp_path, dataset, **{**LONG, 'max_iters': stopped + 3}, init_from='resume', eval_iters=1)
    train(tmp_path, dataset, **{**LONG, 'max_iters': stopped + 3}, out_dir='untouched', eval_iters=1)
    assert not differences(tmp_path / 'out', tmp_path / 'untouched')


def test_a_pipe_that_is_gone_does_not_end_a_run(tmp_path, dataset):
    process = begin(tmp_path, dataset, **{**LONG, 'max_iters': 300})
    wait_for(process, 'iter 5:')
    process.stdout.close()
    process.wait(60)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 300


def test_one_run_at_a_time_and_none_replaced_by_a_moment_of_another(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    process = begin(tmp_path, dataset, **LONG)  # forgot to resume
    wait_for(process, 'iter 5:')
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset, 'init_from': 'auto'})
    assert 'another run is writing to' in error
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert 'NOT SAVED: less than a minute does not replace what an earlier run left' in out
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    assert [path.name for path in (tmp_path / 'out').glob('*.pt*')] == ['ckpt.pt']
    train(tmp_path, dataset, max_iters=12, init_from='resume')


def at_start(tmp_path, monkeypatch, code):
    """ Every Python that is started from now on runs `code` first, on a clock that is five times as fast. """
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(
        f'import time\nclock = time.monotonic\ntime.monotonic = lambda: 5 * clock()\n{code}')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'site'))


def test_a_second_signal_ends_at_once(tmp_path, dataset, monkeypatch):
    at_start(tmp_path, monkeypatch, '')
    process = begin(tmp_path, dataset, **{**LONG, 'eval_interval': 10, 'eval_iters': 100_000})
    wait_for(process, 'mfu is the share')
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, dataset):
    settings = dict(LONG, gradient_accumulation_steps=2, dropout=0.1)
    process = begin(tmp_path, dataset, processes=2, **settings)
    wait_for(process, 'iter 5:')
    process.send_signal(signal.SIGTERM)  # the agent passes it on
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and out.count('stopped by SIGTERM') == 1 and out.count('saving') == 1
    stopped = load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num']
    settings = {**settings, 'max_iters': stopped + 3, 'processes': 2}
    iters, _, _ = train(tmp_path, dataset, **settings, init_from='resume')
    expected, _, _ = train(tmp_path, dataset, **settings, out_dir='untouched')
    assert len(iters) == 3 and iters.items() <= expected.items()
    assert not differences(tmp_path / 'out', tmp_path / 'untouched')


def test_no_process_leaves_another_in_its_save(tmp_path, dataset, monkeypatch):
    """ torchrun sends a signal to the rest when one has ended: to them the second, here in a slow save. """
    at_start(tmp_path, monkeypatch, """
import torch
save, clip = torch.save, torch.nn.utils.clip_grad_norm_
torch.save = lambda *args: time.sleep(2) or save(*args)
torch.nn.utils.clip_grad_norm_ = lambda *args: time.sleep(1.1) or clip(*args)
""")
    process = begin(tmp_path, dataset, 2, **LONG, gradient_accumulation_steps=2)
    wait_for(process, 'iter 0:')
    os.kill(min(workers(process)), signal.SIGTERM)  # the first, past the agent, as a scheduler may
    out, error = process.communicate(timeout=60)
    assert 'stopped by SIGTERM' in out, error
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] > 1


def test_processes_that_chose_different_dtypes_do_not_begin(tmp_path):
    (tmp_path / 'join.py').write_text("""
import os, sys
sys.path.insert(0, sys.argv[1])
from machine import join_processes
rank = int(os.environ['RANK'])
join_processes('gloo', rank, 2, ('float16', 'bfloat16')[rank])
""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'join.py']
    done = subprocess.run([*command, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode and 'dtype=bfloat16 on this machine and float16 on the first' in done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_a_worker_that_is_killed_comes_back(tmp_path, dataset):
    """ torchrun starts the workers again, and they resume this job's checkpoint and no older one. """
    train(tmp_path, dataset, max_iters=40, lr_decay_iters=40)  # an earlier run in the same folder
    settings = dict(SMALL, dataset=dataset, max_iters=400, lr_decay_iters=400, eval_interval=100,
                    checkpoint_interval=7, gradient_accumulation_steps=2)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--max-restarts=2', str(ROOT / 'train.py'), *flags(settings)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for moment in ('iter 0:', 'iter 50:'):  # before the first save, and after some
        wait_for(process, moment)
        os.kill(workers(process)[-1], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert 'resuming out/ckpt.pt at iteration' in out
    train(tmp_path, dataset, **{key: value for key, value in settings.items() if key != 'dataset'},
          processes=2, out_dir='untouched')
    assert not differences(tmp_path / 'out', tmp_path / 'untouched')


def test_a_dead_peer_ends_the_others(tmp_path, dataset):
    process = begin(tmp_path, dataset, processes=2, **{**LONG, 'gradient_accumulation_steps': 2})
    wait_for(process, 'iter 5:')
    os.kill(workers(process)[-1], signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert process.returncode != 0 and not list((tmp_path / 'out').glob('*.pt'))
    assert 'train.py: another process of this job is gone' in error
    assert 'Traceback' not in error.split('another process of this job')[0]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_killed_at_any_moment(tmp_path):
    """ The short form of: python tests/faults.py --rounds=100, a round of each kind. """
    command = [sys.executable, str(ROOT / 'tests/faults.py'), '--rounds=6']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and '6 of 6' in done.stdout, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# two checkpoints

def test_the_best_and_the_latest(tmp_path, dataset):
    """ ckpt.pt is the best, ckpt_last.pt the latest where that is another; resume takes the later. """
    settings = dict(always_save_checkpoint=False, eval_interval=5, checkpoint_interval=4, decay_lr=False)
    train(tmp_path, dataset, **settings, max_iters=10)
    train(tmp_path, dataset, **settings, max_iters=12, learning_rate=3.0, init_from='resume')  # gets worse
    best, last = (load_checkpoint(tmp_path / 'out' / name) for name in ('ckpt.pt', 'ckpt_last.pt'))
    assert (best['iter_num'], last['iter_num']) == (10, 12) and best['run_id'] == last['run_id']
    assert newest_checkpoint(tmp_path / 'out').name == 'ckpt_last.pt'
    _, _, out = train(tmp_path, dataset, **settings, max_iters=20, init_from='resume')
    assert 'resuming out/ckpt_last.pt at iteration 12' in out
    raw = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    torch.save({**raw, 'iter_num': 99, 'run_id': 'another'}, tmp_path / 'out/ckpt_last.pt')
    assert newest_checkpoint(tmp_path / 'out').name == 'ckpt.pt'
    # a fresh start in the same folder says so, and leaves nothing of the old run beside the new
    _, _, out = train(tmp_path, dataset, **{**settings, 'eval_interval': 0}, max_iters=4)
    assert 'what an earlier run left in out will be replaced' in out
    names = {path.name for path in (tmp_path / 'out').glob('*.pt*')}
    found = [load_checkpoint(tmp_path / 'out' / name) for name in names]
    assert {checkpoint['iter_num'] for checkpoint in found} == {4}


@pytest.mark.parametrize('eval_interval, expected', [
    (0, {'ckpt_last.pt': 12}), (10, {'ckpt.pt': 10, 'ckpt_last.pt': 12})])
def test_a_new_run_replaces_all_of_an_earlier_one_and_keeps_its_own(tmp_path, script_globals, dataset, poison,
                                                                    eval_interval, expected):
    train(tmp_path, dataset)  # leaves a ckpt.pt, which a resume would take up
    poison(range(13, 10**9), float('nan'))  # ends it without an evaluation
    with pytest.raises(SystemExit):
        script_globals('train.py', **{**SMALL, 'dataset': dataset, 'always_save_checkpoint': False,
                                      'checkpoint_interval': 3, 'max_bad_steps': 2,
                                      'eval_interval': eval_interval})
    found = {path.name: load_checkpoint(path)['iter_num'] for path in (tmp_path / 'out').glob('*.pt')}
    assert found == expected


def test_an_improvement_at_the_moment_of_the_stop_is_not_lost(tmp_path, dataset):
    """ Stopped before an evaluation that would have saved the best model, resumed, it still does. """
    settings = dict(always_save_checkpoint=False, eval_interval=10, max_iters=10)
    train(tmp_path, dataset, **settings, out_dir='untouched')
    train(tmp_path, dataset, **settings)
    best = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    torch.save({**best, 'best_val_loss': best['best_val_loss'] + 1}, tmp_path / 'out/ckpt_last.pt')
    (tmp_path / 'out/ckpt.pt').unlink()  # as it was just before
    train(tmp_path, dataset, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'untouched')


def test_a_save_that_fails_is_survived(tmp_path, script_globals, dataset, monkeypatch, capsys):
    """ The disk fills up: it is said which file and how much, the old checkpoint stays, training goes on. """
    train(tmp_path, dataset, max_iters=10)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=1000))
    loss = load_checkpoint(tmp_path / 'out/ckpt.pt')['best_val_loss']
    with pytest.raises(SystemExit) as end:
        script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 20, 'init_from': 'resume'})
    out = capsys.readouterr().out
    assert end.value.code == 1 and f'best val loss {loss:.4f}; NOT SAVED: out: ' in out.splitlines()[-1]
    assert 'WARNING: nothing was saved: out: ' in out and 'MB are to be written' in out and 'iter 19' in out
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['ckpt.pt', 'log.csv']


# -----------------------------------------------------------------------------
# numbers that go bad

@pytest.fixture
def poison(monkeypatch):
    """ poison(calls, value) multiplies the training losses of these calls by `value`. """
    def arm(calls, value):
        forward, count = model_module.GPT.forward, iter(range(10**9))

        def poisoned(self, idx, targets=None):
            logits, loss = forward(self, idx, targets)
            return logits, loss * value if self.training and next(count) in calls else loss
        monkeypatch.setattr(model_module.GPT, 'forward', poisoned)
    return arm


@pytest.mark.parametrize('value, grad_clip, dtype', [
    (float('nan'), 1.0, 'float32'), (float('inf'), 0.0, 'float32'), (float('inf'), 1.0, 'float16')])
def test_a_bad_update_is_skipped(tmp_path, script_globals, dataset, poison, capsys, value, grad_clip, dtype):
    settings = {**FAST, 'dataset': dataset, 'grad_clip': grad_clip, 'dtype': dtype, 'decay_lr': False}
    script_globals('train.py', **{**settings, 'max_iters': 3, 'out_dir': 'before'})
    poison({3, 4}, value)
    script_globals('train.py', **{**settings, 'max_iters': 5, 'out_dir': 'after'})
    out = capsys.readouterr().out
    assert 'iter 4: loss' in out and 'update skipped, 2 in a row' in out
    a, b = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('before', 'after'))
    for key in ('model', 'optimizer'):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def test_too_many_bad_updates_end_the_run(tmp_path, script_globals, dataset, poison):
    script_globals('train.py', **{**FAST, 'dataset': dataset, 'max_iters': 2})
    poison(range(3, 10**9), float('nan'))
    with pytest.raises(SystemExit, match='at iteration 9: 5 updates in a row .*out/ckpt.pt.*learning_rate'):
        script_globals('train.py', **{**FAST, 'dataset': dataset, 'init_from': 'resume', 'max_bad_steps': 5})


def test_a_model_that_went_bad_is_not_saved(tmp_path, script_globals, dataset, poison):
    poison(range(4, 10**9), float('nan'))
    settings = {**FAST, 'dataset': dataset, 'max_bad_steps': 5, 'eval_interval': 0}
    with pytest.raises(SystemExit, match='finite; --init_from=resume from out/ckpt.pt, learning_rate below'):
        script_globals('train.py', **settings, checkpoint_interval=2)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['iter_num'] == 4
    with pytest.raises(SystemExit, match='5 updates in a row were not finite; begin again'):
        script_globals('train.py', **settings, out_dir='new')
    assert not list((tmp_path / 'new').glob('*.pt'))


def test_bad_updates_between_good_ones_do_not_end_the_run(script_globals, dataset, poison):
    poison({1, 3, 5, 7}, float('nan'))
    names = script_globals('train.py', **{**FAST, 'dataset': dataset, 'max_bad_steps': 2})
    assert names['iter_num'] == 20 and names['bad_steps'] == 0


def test_a_scaler_that_finds_its_scale_is_not_bad(tmp_path, script_globals, dataset, capsys, monkeypatch):
    init = torch.amp.GradScaler.__init__
    defaults = tuple(2.0**40 if value == 2.0**16 else value for value in init.__defaults__)
    monkeypatch.setattr(init, '__defaults__', defaults)
    names = script_globals('train.py', **{**FAST, 'dataset': dataset, 'dtype': 'float16', 'max_bad_steps': 3,
                                          'max_iters': 40})
    out = capsys.readouterr().out
    assert names['scaler'].get_scale() < 2**36 and 'skipped' not in out and 'grad norm inf' in out


def test_out_of_memory_names_what_to_lower(script_globals, dataset, monkeypatch, capfd):
    """ sys.excepthook says it, which this process has to call itself. """
    def forward(self, idx, targets=None):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr(model_module.GPT, 'forward', forward)
    monkeypatch.setattr(os, '_exit', sys.exit)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        script_globals('train.py', **{**FAST, 'dataset': dataset})
    for error in (caught.value, RuntimeError('MPS backend out of memory (MPS allocated: 9 GiB)'),  # of a Mac,
                  RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9')):  # Windows
        with pytest.raises(SystemExit):
            sys.excepthook(type(error), error, None)
        error = capfd.readouterr().err
        assert 'batch_size=4' in error and 'gradient_accumulation_steps=1' in error and error.count('\n') == 1
    with pytest.raises(SystemExit):
        sys.excepthook(IndexError, IndexError('index out of range in self'), None)
    assert 'a token that the model does not know' in capfd.readouterr().err

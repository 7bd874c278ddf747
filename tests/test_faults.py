""" Damage done on purpose: kills, signals, full disks, numbers that go bad, and every bad input in one line. """
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, flags, run, train

import model as model_module
from checkpoint import load_checkpoint, newest_checkpoint

FAST = dict(SMALL, eval_interval=0, log_interval=1)


@pytest.fixture(scope='session')
def scripts():
    """ scripts(command, folder) runs a script in a fork -> exit code, standard output, standard error. """
    zygote = subprocess.Popen([sys.executable, str(ROOT / 'tests/zygote.py')], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True,
                              env={**os.environ, 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline'})

    def ask(script, arguments, folder):
        zygote.stdin.write(json.dumps([str(ROOT / script), [str(a) for a in arguments], str(folder)]) + '\n')
        zygote.stdin.flush()
        return json.loads(zygote.stdout.readline())
    yield ask
    zygote.stdin.close()
    zygote.wait()


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
    put('args.pt', {**good, 'model_args': {**good['model_args'], 'rotary': True}})
    put('head.pt', {**good, 'model_args': {**good['model_args'], 'n_head': 3}})
    put('width.pt', {**good, 'model_args': {**good['model_args'], 'n_embd': 32}})
    put('nan.pt', {**good, 'model': {**good['model'], 'lm_head.weight': good['model']['lm_head.weight'] * np.nan}})
    put('tensor.pt', {**good, 'model': {**good['model'], 'lm_head.weight': 'no tensor'}})
    for name, change in [('no_optimizer', {'optimizer': None}), ('odd_optimizer', {'optimizer': {'state': 3}}),
                         ('odd_iter', {'iter_num': 'x'}), ('odd_config', {'config': 3}),
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
    for name, content in [('meta_bomb', pickle.dumps({'vocab_size': 3, 'x': Bomb()})), ('meta_short', b'\x80'),
                          ('meta_size', pickle.dumps({'vocab_size': -3}))]:
        shutil.copytree(dataset, folder / name)
        (folder / name / 'meta.pkl').write_bytes(content)
    for name, content in [('odd_bin', b'abc'), ('short_bin', b'ab' * 10), ('big_ids', b'\xff\xff' * 100)]:
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
        ('dropout', 'nan'), ('learning_rate', 0.0), ('learning_rate', -1.0), ('learning_rate', 'inf'),
        ('weight_decay', -0.1), ('beta1', 1.0), ('beta1', -0.5), ('beta2', 1.5), ('grad_clip', -1.0),
        ('max_iters', -1), ('warmup_iters', -1), ('lr_decay_iters', -5), ('min_lr', -1.0), ('eval_iters', 0),
        ('eval_iters', -2), ('eval_interval', -1), ('log_interval', -1), ('checkpoint_interval', -1),
        ('max_bad_steps', -1), ('gradient_accumulation_steps', 0), ('seed', -1), ('seed', 2**64)]),
    ('train.py', ['--min_lr=1.0', '--learning_rate=0.1'], 1, 'min_lr=1.0 is above learning_rate=0.1'),
    ('train.py', ['--n_embd=400000', '--n_head=1'], 1, 'out of memory'),
    ('train.py', ['--batch_size=1000000000'], 1, 'out of memory'),
    ('train.py', ['--block_size=100000000'], 1, 'the most is --block_size='),
    ('train.py', ['--eval_split=test'], 1, "eval_split='test' takes --eval_only=True"),
    ('train.py', ['--eval_split=test', '--eval_only=True'], 1, 'test.bin is not there, but train.bin, val.bin'),
    # what is not there
    ('train.py', ['--device=cuda:7'], 1, 'device=cuda:7'),
    ('train.py', ['--device=gpu'], 1, "device='gpu'"),
    ('train.py', ['--dtype=float8'], 1, "dtype='float8'"),
    ('train.py', ['--compile=maybe'], 1, "compile='maybe'"),
    ('train.py', ['--backend=mpi'], 1, "backend='mpi' on cpu cannot be"),
    ('train.py', ['--dataset=nowhere'], 1, 'nowhere/train.bin is not there; datasets with a prepare.py are'),
    ('train.py', ['--dataset=odd_bin'], 1, '3 bytes are no uint16 tokens'),
    ('train.py', ['--dataset=short_bin'], 1, '10 tokens; the most is --block_size=9'),
    ('train.py', ['--dataset=big_ids'], 1, 'holds token 65535'),
    ('train.py', ['--dataset=meta_bomb'], 1, 'carries code (_io.open), which was not run'),
    ('train.py', ['--dataset=meta_short'], 1, 'meta.pkl is not a vocabulary'),
    ('train.py', ['--dataset=meta_size'], 1, 'meta.pkl is not a vocabulary'),
    ('train.py', ['--out_dir=file'], 1, 'out_dir=file is a file'),
    ('train.py', ['--out_dir=file/out'], 1, 'file/out'),
    ('train.py', ['--out_dir='], 1, "out_dir='' is no folder"),
    ('train.py', ['--out_dir=empty', '--init_from=resume'], 1, 'there is no checkpoint empty/ckpt.pt'),
    ('train.py', ['--init_from=nothing'], 1, 'nothing'),
    ('train.py', ['--init_from=nothing.pt'], 1, 'there is no checkpoint nothing.pt'),
    # checkpoints
    *((script, [f'--init_from={name}.pt'], 1, part) for script in ('train.py', 'sample.py') for name, part in [
        ('short', 'short.pt is not a whole checkpoint'), ('empty', 'empty.pt is not a whole checkpoint'),
        ('text', 'text.pt is not a whole checkpoint'), ('bomb', 'it carries code (io.open'),
        ('list', 'holds a list'), ('keys', 'lacks model_args'), ('args', 'does not know the model_args rotary'),
        ('head', 'n_embd=16 must be a multiple of n_head=3'), ('width', 'does not hold the model of its'),
        ('nan', 'nan.pt: lm_head.weight is not finite'), ('tensor', 'tensor.pt: lm_head.weight is no tensor')]),
    *(('train.py', ['--init_from=resume', f'--out_dir={name}'], 1, part) for name, part in [
        ('no_optimizer', 'its optimizer is not that of AdamW'), ('odd_optimizer', 'its optimizer is not that of'),
        ('odd_iter', "iter_num='x'"), ('odd_scaler', 'scaler'), ('odd_loss', 'best_val_loss')]),
    ('train.py', ['--init_from=resume', '--dataset=other'], 1, 'another vocabulary'),
    ('train.py', ['--init_from=resume', '--block_size=64'], 1, 'block_size=64 is more than the 16 of out/ckpt.pt'),
    # sample.py
    *(('sample.py', [f'--{name}={value}'], 1, f'{name}={value}') for name, value in [
        ('temperature', 0.0), ('temperature', -1.0), ('top_k', -1), ('num_samples', -1), ('max_new_tokens', -1),
        ('seed', -1)]),
    ('sample.py', ['--start='], 1, 'the prompt is empty'),
    ('sample.py', ['--start=dog'], 1, "'dg' is not in the vocabulary"),
    ('sample.py', ['--start=FILE:nowhere.txt'], 1, 'nowhere.txt'),
    ('sample.py', ['--start=FILE:latin.txt'], 1, 'latin.txt'),
    ('sample.py', ['--start=FILE:empty.txt'], 1, 'the prompt is empty'),
    ('sample.py', ['--out_dir=nowhere'], 1, 'there is no checkpoint nowhere/ckpt.pt'),
    ('sample.py', ['--device=cuda:7'], 1, 'device=cuda:7'),
    ('sample.py', ['--init_from=nothing/at-all'], 1, 'nothing/at-all'),
    # bench.py
    ('bench.py', ['--batch_size=0'], 1, 'batch_size=0'),
    ('bench.py', ['--n_embd=17'], 1, 'n_embd=17'),
    ('bench.py', ['--seed=-1'], 1, 'seed=-1'),
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
def test_bad_input_gets_one_line(scripts, ruins, dataset, script, arguments, code, part):
    before = sorted(ruins.rglob('*'))
    seen, _, error = scripts(script, complete(script, arguments, ruins, dataset), ruins)
    assert seen == code and error.count('\n') == 1 and part in error, (seen, error[-2000:])
    assert error.startswith(f'{script}: ') and len(error) < 700
    assert [path for path in sorted(ruins.rglob('*')) if path.name != 'new' and path not in before] == []


def test_there_are_enough_of_them():
    assert len(BAD) >= 80


@pytest.mark.parametrize('script, arguments, code, part', BAD[3:108:9], ids=lambda value: str(value)[:60])
def test_bad_input_of_a_plain_process(ruins, dataset, script, arguments, code, part):
    _, error = run(script, *complete(script, arguments, ruins, dataset), cwd=ruins, code=code)
    assert part in error and error.count('\n') == 1

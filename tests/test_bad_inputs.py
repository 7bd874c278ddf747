"""
Wrong command lines, of the real scripts: each ends with one line that names what is wrong, and no
file changes. All rules are in test_settings.py, test_dataset.py and test_checkpoint.py.
"""
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, flags, run_script, train

from components.files import _locks, lock_directory

VALID_SETTINGS = {
    'train.py': {**SMALL, 'max_iters': 3, 'out_dir': 'new', 'dataset': 'FOLDER/words'},
    'sample.py': dict(num_samples=1, max_new_tokens=2, device='cpu', out_dir='FOLDER/out'),
    'bench.py': dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, device='cpu',
                     dataset='FOLDER/words'),
}


class Bomb:
    """ An object whose pickle creates the file boom. """

    def __reduce__(self):
        return open, ('boom', 'w')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, dataset):
    """ A folder with a trained model, and with files that are broken. """
    folder = tmp_path_factory.mktemp('broken')
    for name in ('words', 'uint32', 'meta_code'):
        shutil.copytree(dataset, folder / name)
    np.arange(100, dtype=np.uint32).tofile(folder / 'uint32/train.bin')
    (folder / 'meta_code/meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'x': Bomb()}))
    (folder / 'syntax.py').write_text('n_layer = = 2')
    (folder / 'file').write_text('')

    train(folder, dataset, max_iters=2)
    path = folder / 'out/ckpt.pt'
    valid = torch.load(path, weights_only=True)
    torch.save({**valid, 'config': Bomb()}, folder / 'code.pt')
    (folder / 'truncated').mkdir()
    (folder / 'truncated/ckpt.pt').write_bytes(path.read_bytes()[:-2000])
    shutil.copytree(folder / 'out', folder / 'locked')
    return folder


def complete(script, arguments, folder):
    """ The arguments after valid ones, which they replace. """
    arguments = [*flags(VALID_SETTINGS[script]), *arguments]
    return [argument.replace('FOLDER', str(folder)) for argument in arguments]


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob('*')}


@pytest.mark.parametrize('script', VALID_SETTINGS)
def test_valid_settings(tmp_path, folder, script):
    """ Nothing but the argument of a case below is wrong. """
    code, _, error = run_script(script, complete(script, [], folder), tmp_path)
    assert code == 0, error


@pytest.mark.parametrize('script, arguments, expected_code, pattern', [
    ('train.py', '--learnin_rate=1', 2, "'learnin_rate'; did you mean 'learning_rate'"),
    ('train.py', '--n_layer=two', 2, "n_layer .*not 'two'"),
    ('train.py', 'syntax.py', 2, 'syntax.py, line 1: SyntaxError'),
    ('train.py', '--batch_size=0', 1, 'batch_size=0'),
    ('train.py', '--n_embd=17', 1, 'n_embd=17'),
    ('train.py', '--n_embd=400000 --n_head=1', 1, 'out of memory'),
    ('train.py', '--device=cuda:7', 1, 'device=cuda:7'),
    ('train.py', '--dataset=nowhere', 1, 'nowhere/train.bin .*shakespeare_char'),
    ('train.py', '--dataset=FOLDER/uint32', 1, '32 or 64 bits'),
    ('train.py', '--dataset=FOLDER/meta_code', 1, r'meta.pkl .*code \(io.open\)'),
    ('train.py', '--out_dir=file', 1, "exists: 'file'"),
    ('train.py', '--init_from=resume --out_dir=missing', 1, 'missing/ckpt.pt'),
    ('train.py', '--init_from=resume --out_dir=truncated', 1, 'truncated/ckpt.pt .*complete'),
    ('train.py', '--init_from=resume --out_dir=out --block_size=64', 1, '--block_size=16'),
    ('train.py', '--init_from=resume --out_dir=out --muon_lr=0.02', 1, 'out/ckpt.pt .*muon_lr'),
    ('train.py', '--init_from=auto --out_dir=locked', 1, 'another run .*locked'),
    ('sample.py', '--init_from=code.pt', 1, 'code.pt .* code, which was not run'),
    ('sample.py', '--start=dog', 1, "'dg'"),
    ('bench.py', '--mode=fast', 1, "mode='fast'"),
])
def test_bad_input(folder, script, arguments, expected_code, pattern):
    before = contents(folder)
    lock_directory(folder / 'locked')  # as another run does
    try:
        arguments = complete(script, arguments.split(), folder)
        code, out, error = run_script(script, arguments, folder)
    finally:
        os.close(_locks.pop(os.path.realpath(folder / 'locked')))
    assert code == expected_code, error
    assert out == ''
    assert re.fullmatch(rf'{script}: .*{pattern}.*\n', error), error
    assert contents(folder) == before


@pytest.mark.slow
def test_bad_input_of_a_process_that_is_not_a_fork(folder):
    arguments = complete('sample.py', ['--temperature=-1.0'], folder)
    done = subprocess.run([sys.executable, ROOT / 'sample.py', *arguments], capture_output=True,
                          text=True, env=environment(), cwd=folder)
    assert done.returncode == 1
    assert re.fullmatch(r'sample.py: temperature=-1.0 .*\n', done.stderr)

""" The command line: what it takes, what it refuses, and that it does so in one line. """
import sys

import pytest
from conftest import ROOT, run

SCRIPT = '''""" A script. """
import os
# the settings
size = 4            # how large
rate = 1e-3
name = 'x'
flag = False
compile = 'auto'
_private = 1
exec(open(os.path.join(ROOT, 'configurator.py')).read())
'''


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """ Runs the small script above with these arguments -> its variables. """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'script.py').write_text(SCRIPT)

    def execute(*args):
        monkeypatch.setattr(sys, 'argv', ['script.py', *args])
        names = {'__name__': '__main__', '__file__': str(tmp_path / 'script.py'), 'ROOT': _Path(ROOT)}
        exec(compile(SCRIPT, 'script.py', 'exec'), names)
        return {key: names[key] for key in names['config_keys']}
    return execute


class _Path(type(ROOT)):
    """ A path is no setting, as a str would be. """


DEFAULTS = dict(size=4, rate=1e-3, name='x', flag=False, compile='auto')


@pytest.mark.parametrize('arg, expected', [
    ('--size=7', {'size': 7}), ('--size=1_000', {'size': 1000}), ('--size=6e5', {'size': 600000}),
    ('--rate=1', {'rate': 1.0}), ('--rate=1e-4', {'rate': 1e-4}), ('--flag=True', {'flag': True}),
    ('--name=42', {'name': '42'}), ('--name=a=b', {'name': 'a=b'}), ('--name=', {'name': ''}),
    ('--name=None', {'name': 'None'}), ('--compile=False', {'compile': False}),
    ('--compile=inductor', {'compile': 'inductor'})])
def test_values(configure, arg, expected):
    result = configure(arg)
    assert result == {**DEFAULTS, **expected}
    for key, value in expected.items():
        assert type(result[key]) is type(value)


@pytest.mark.parametrize('arg, message', [
    ('--size=1.5', 'size takes a whole number, not 1.5'), ('--size=x', "a whole number, not 'x'"),
    ('--size=True', 'a whole number, not True'), ('--rate=fast', "rate takes a number, not 'fast'"),
    ('--flag=1', 'flag takes True or False, not 1'), ('--flag=true', "True or False, not 'true'"),
    ('--sise=3', "no setting 'sise'; the nearest is 'size'"), ('--_private=3', "no setting '_private'"),
    ('--flag', "cannot read '--flag'"), ('size=3', "cannot read 'size=3'"),
    ('nowhere.py', "no config file 'nowhere.py'")])
def test_refusals(configure, capsys, arg, message):
    with pytest.raises(SystemExit) as stopped:
        configure(arg)
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and message in error and error.count('\n') == 1


def test_left_to_right_and_config_files_that_compute(configure, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('import time\nsize = 2 * 8\nname = "ft-" + str(time.time())\n'
                                   'def helper(n):\n    return n + size\nrate = helper(0)\n')
    result = configure('--size=5', 'a.py', '--name=mine')
    assert (result['size'], result['rate'], result['name']) == (16, 16.0, 'mine')
    assert configure('a.py', '--size=5')['size'] == 5
    (tmp_path / 'b.py').write_text('size = 4\n')  # what is the default as well
    assert configure('--size=5', 'b.py')['size'] == configure('a.py', 'b.py')['size'] == 4
    configure('--size=5')
    assert 'size = 5' in capsys.readouterr().out


def test_a_shared_config_file_is_warned_about_and_a_misspelling_refused(configure, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('size = 5\nepochs = 3\nhelper_number = 4\n')
    assert configure('a.py') == {**DEFAULTS, 'size': 5}
    assert 'ignored, not settings of this script: epochs, helper_number\n' in capsys.readouterr().out
    (tmp_path / 'a.py').write_text('base_size = 5\nsize = 2 * base_size\n')
    assert configure('a.py')['size'] == 10
    (tmp_path / 'a.py').write_text('sizes = 5\n')
    with pytest.raises(SystemExit):
        configure('a.py')
    assert "no setting 'sizes'; did you mean 'size'?" in capsys.readouterr().err


@pytest.mark.parametrize('text, message', [
    ('size = (\n', 'line 1: SyntaxError'), ('\nsize = 1 / 0\n', 'line 2: ZeroDivisionError'),
    ('size = "big"\n', "size takes a whole number, not 'big'"),
    ('name = None\n', 'name takes a string, not None')])
def test_a_broken_config_file(configure, tmp_path, capsys, text, message):
    (tmp_path / 'a.py').write_text(text)
    with pytest.raises(SystemExit):
        configure('a.py')
    error = capsys.readouterr().err
    assert 'a.py' in error and message in error and error.count('\n') == 1


def test_numpy_numbers_become_plain(configure, tmp_path):
    (tmp_path / 'a.py').write_text('import numpy as np\nrate = np.float64(0.5)\nsize = np.int64(3)\n')
    result = configure('a.py')
    assert type(result['rate']) is float and type(result['size']) is int


def test_help_is_the_block_at_the_top(configure, capsys):
    with pytest.raises(SystemExit) as stopped:
        configure('--help')
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out == 'A script.\n' + SCRIPT.split('import os\n')[1].split('exec(')[0]


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py', *sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob('data/*/prepare.py'))])
def test_every_script_has_help_and_refuses_an_unknown_setting(tmp_path, script):
    out, _ = run(script, '--help', cwd=tmp_path)
    assert len(out) > 200 and '__name__' not in out
    _, error = run(script, '--no_such_thing=1', cwd=tmp_path, code=2)
    assert error.count('\n') == 1 and 'no_such_thing' in error

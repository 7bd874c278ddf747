""" configurator.py, in a small script: config files, --key=value, and what it refuses. """
import re
import sys

import pytest
from conftest import ROOT, run

SETTINGS = '''# the settings
size = 4            # how large
rate = 1e-3
name = 'x'
flag = False
compile = 'auto'
_private = 1
'''
SCRIPT = f'''""" A script. """
import os
{SETTINGS}exec(open(os.path.join(ROOT, 'configurator.py')).read())
later = 2
'''
DEFAULTS = dict(size=4, rate=1e-3, name='x', flag=False, compile='auto')


@pytest.fixture
def run_configurator(tmp_path, monkeypatch):
    """ run_configurator(*arguments) runs the script above -> its global variables. """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)

    def execute(*arguments):
        monkeypatch.setattr(sys, 'argv', ['script.py', *arguments])
        names = {'__name__': '__main__', '__file__': str(path), 'ROOT': ROOT}
        exec(compile(SCRIPT, 'script.py', 'exec'), names)
        return names
    return execute


@pytest.fixture
def configure(run_configurator):
    """ configure(*arguments) -> the settings. """
    def execute(*arguments):
        names = run_configurator(*arguments)
        return {key: names[key] for key in names['config_keys']}
    return execute


@pytest.fixture
def assert_refused(configure, capsys):
    """ assert_refused(argument, pattern): one line that `pattern` matches, and exit code 2. """
    def check(argument, pattern):
        with pytest.raises(SystemExit) as stopped:
            configure(argument)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith('script.py: ')
        assert error.count('\n') == 1
        assert re.search(pattern, error), error
    return check

# -----------------------------------------------------------------------------
# --key=value


def test_settings_are_public_variables_above_the_configurator(configure):
    assert configure() == DEFAULTS


@pytest.mark.parametrize('argument, expected', [
    ('--size=7', 7),
    ('--size=-7', -7),
    ('--size=1_000', 1000),
    ('--size=6e5', 600000),
    ('--rate=1e-4', 1e-4),
    ('--rate=1', 1.0),
    ('--flag=True', True),
    ('--name=y', 'y'),
    ('--name=42', '42'),
    ('--name=None', 'None'),
    ('--name=', ''),
    ('--name=a=b', 'a=b'),
    ('--compile=False', False),
    ('--compile=True', True),
    ('--compile=inductor', 'inductor'),
])
def test_value(configure, argument, expected):
    key = argument.removeprefix('--').partition('=')[0]
    settings = configure(argument)
    assert settings == {**DEFAULTS, key: expected}
    assert type(settings[key]) is type(expected)


@pytest.mark.parametrize('argument, pattern', [
    ('--size=1.5', 'size .*not 1.5'),
    ('--size=x', "size .*not 'x'"),
    ('--size=True', 'size .*not True'),
    ('--rate=fast', "rate .*number, not 'fast'"),
    ('--rate=True', 'rate .*number, not True'),
    ('--flag=1', 'flag .*True or False, not 1'),
    ('--flag=true', "flag .*True or False, not 'true'"),
    ('--sise=3', "unknown setting 'sise'; did you mean 'size'?"),
    ('--_private=3', "unknown setting '_private'"),
    ('--later=3', "unknown setting 'later'"),
    ('--flag', "'--flag'; .*--key=value"),
    ('-size=3', "'-size=3'; .*--key=value"),
    ('size=3', "'size=3'; .*--key=value"),
])
def test_refused_argument(assert_refused, argument, pattern):
    assert_refused(argument, pattern)


def test_last_argument_counts(configure, tmp_path):
    (tmp_path / 'a.py').write_text('size = 16\n')
    assert configure('--size=5', '--size=6')['size'] == 6
    assert configure('--size=5', 'a.py')['size'] == 16
    assert configure('a.py', '--size=5')['size'] == 5

# -----------------------------------------------------------------------------
# config files


def test_config_file_imports_and_computes(configure, tmp_path):
    (tmp_path / 'a.py').write_text('import math\n'
                                   'size = 2 * 8\n'
                                   'name = "run-" + str(math.floor(2.5))\n'
                                   'def double(n):\n'
                                   '    return 2 * n\n'
                                   'rate = double(size)\n')
    expected = dict(size=16, rate=32.0, name='run-2')
    assert configure('a.py') == {**DEFAULTS, **expected}


def test_config_file_reads_earlier_arguments(configure, tmp_path):
    (tmp_path / 'a.py').write_text('rate = 2 * size\n')
    assert configure('--size=5', 'a.py')['rate'] == 10.0


def test_config_file_with_the_default_value(configure, tmp_path):
    (tmp_path / 'a.py').write_text('size = 16\n')
    (tmp_path / 'default.py').write_text('size = 4\n')
    assert configure('--size=5', 'default.py')['size'] == 4
    assert configure('a.py', 'default.py')['size'] == 4


def test_numpy_numbers(configure, tmp_path):
    (tmp_path / 'a.py').write_text('import numpy as np\n'
                                   'rate = np.float64(0.5)\n'
                                   'size = np.int64(3)\n')
    settings = configure('a.py')
    assert type(settings['rate']) is float
    assert type(settings['size']) is int


def test_names_that_are_not_settings(configure, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('size = 5\nepochs = 3\nhelper_number = 4\n')
    assert configure('a.py') == {**DEFAULTS, 'size': 5}
    out = capsys.readouterr().out
    assert re.fullmatch('a.py: .*epochs, helper_number\n', out)


def test_name_like_a_setting_that_is_set(configure, tmp_path):
    (tmp_path / 'a.py').write_text('sizes = 5\nsize = 2 * sizes\n')
    assert configure('a.py')['size'] == 10


@pytest.mark.parametrize('text, pattern', [
    pytest.param('size = (\n', 'a.py, line 1: SyntaxError', id='syntax'),
    pytest.param('\nsize = 1 / 0\n', 'a.py, line 2: ZeroDivisionError', id='exception'),
    pytest.param('sizes = 5\n', "a.py: unknown setting 'sizes'; did you mean 'size'?",
                 id='misspelt'),
    pytest.param('size = "big"\n', "a.py: size .*not 'big'", id='type'),
    pytest.param('name = None\n', 'a.py: name .*string, not None', id='none'),
])
def test_broken_config_file(assert_refused, tmp_path, text, pattern):
    (tmp_path / 'a.py').write_text(text)
    assert_refused('a.py', pattern)


def test_config_file_that_deletes_a_setting(configure, tmp_path):
    (tmp_path / 'a.py').write_text('del size\nflag = True\n')
    assert configure('a.py') == {**DEFAULTS, 'flag': True}


@pytest.mark.parametrize('path, problem', [
    ('nowhere.py', 'does not exist'),
    ('a.txt', 'does not end in .py'),
    ('folder.py', 'does not exist'),
])
def test_path_that_is_not_a_config_file(assert_refused, tmp_path, path, problem):
    (tmp_path / 'a.txt').write_text('size = 5\n')
    (tmp_path / 'folder.py').mkdir()
    assert_refused(path, f"config file '{path}' {problem}; .*--key=value")


def test_misspelt_config_file(assert_refused, tmp_path):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config/small.py').write_text('size = 5\n')
    assert_refused('config/smal.py', 'did you mean config/small.py?')
    assert_refused('small.py', 'did you mean config/small.py?')


def test_misspelt_config_file_from_another_folder(assert_refused, tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config/small.py').write_text('size = 5\n')
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    assert_refused('config/small.py', rf'did you mean {tmp_path}/config/small\.py\?')

# -----------------------------------------------------------------------------
# what it prints


def test_overrides(run_configurator, tmp_path, capsys):
    (tmp_path / 'a.py').write_text('size = 5\nname = "y"\n')
    names = run_configurator('a.py', '--size=6', '--rate=1e-3')
    assert names['config_overrides'] == ['overriding: size = 6', "overriding: name = 'y'"]
    assert capsys.readouterr().out == ''


def test_only_the_first_process_prints(run_configurator, tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.py').write_text('size = 5\nepochs = 3\n')
    monkeypatch.setenv('RANK', '1')
    names = run_configurator('a.py')
    assert names['size'] == 5
    assert names['config_overrides'] == []
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('argument', ['--help', '-h'])
def test_help(configure, capsys, argument):
    with pytest.raises(SystemExit) as stopped:
        configure(argument)
    assert stopped.value.code == 0
    assert capsys.readouterr().out == 'A script.\n' + SETTINGS

# -----------------------------------------------------------------------------
# the scripts

SCRIPTS = ['train.py', 'sample.py', 'bench.py', 'export.py', 'plot.py',
           *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('data/*/prepare.py'))]


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_of_script(tmp_path, script):
    out, _ = run(script, '--help', cwd=tmp_path)
    assert len(out) > 200
    assert '\n\nimport' not in out
    assert '__name__' not in out


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_refuses_unknown_setting(tmp_path, script):
    _, error = run(script, '--no_such_setting=1', cwd=tmp_path, code=2)
    assert error.count('\n') == 1
    assert 'no_such_setting' in error

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
# ---------
{SETTINGS}
# ---------
exec(open(os.path.join(ROOT, 'configurator.py')).read())
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

# -----------------------------------------------------------------------------
# what it reads


@pytest.mark.parametrize('argument, expected', [
    ('--size=-7', -7),
    ('--size=6e5', 600000),
    ('--rate=1e-4', 1e-4),
    ('--rate=1', 1.0),
    ('--flag=True', True),
    ('--name=y', 'y'),
    ('--name=42', '42'),
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


@pytest.mark.parametrize('text, expected', [
    pytest.param('import math\n'
                 'size = 2 * 8\n'
                 'name = "run-" + str(math.floor(2.5))\n'
                 'def double(n):\n'
                 '    return 2 * n\n'
                 'rate = double(size)\n', dict(size=16, rate=32.0, name='run-2'), id='program'),
    pytest.param('import numpy as np\nrate = np.float64(0.5)\nsize = np.int64(3)\n',
                 dict(rate=0.5, size=3), id='numpy numbers'),
    pytest.param('compile = False\n', dict(compile=False), id='auto'),
    pytest.param('size = 5020 * 0.02\nname = None\n', dict(size=100, name=''), id="nanoGPT's"),
    pytest.param('import numpy as np\nsize = np.float64(2.6)\n', dict(size=3), id='numpy, rounded'),
    pytest.param('size = 2.0\n', dict(size=2), id='whole'),
    pytest.param('from pathlib import Path\nflag = 1\nname = Path("out")\n',
                 dict(flag=True, name='out'), id='as in Python'),
    pytest.param('sizes = 5\nsize = 2 * sizes\n', dict(size=10), id='helper like its setting'),
    pytest.param('del size\nflag = True\n', dict(flag=True), id='deleted setting'),
])
def test_config_file(configure, tmp_path, text, expected):
    (tmp_path / 'a.py').write_text(text)
    settings = configure('a.py')
    assert settings == {**DEFAULTS, **expected}
    for key in expected:
        assert type(settings[key]) is type(expected[key])


@pytest.mark.parametrize('arguments, size', [
    ([], 4),
    (['--size=5', '--size=6'], 6),
    (['--size=5', '16.py'], 16),
    (['16.py', '--size=5'], 5),
    (['--size=5', 'default.py'], 4),
    (['16.py', 'default.py'], 4),
    (['--size=5', 'twice.py'], 10),
])
def test_last_argument_counts(configure, tmp_path, arguments, size):
    (tmp_path / '16.py').write_text('size = 16\n')
    (tmp_path / 'default.py').write_text('size = 4\n')
    (tmp_path / 'twice.py').write_text('size = 2 * size\n')
    assert configure(*arguments) == {**DEFAULTS, 'size': size}

# -----------------------------------------------------------------------------
# what it refuses


@pytest.mark.parametrize('argument, pattern', [
    ('--size=1.5', 'size .*not 1.5'),
    ('--size=x', "size .*not 'x'"),
    ('--size=True', 'size .*not True'),
    ('--rate=fast', "rate .*number, not 'fast'"),
    ('--rate=True', 'rate .*number, not True'),
    ('--flag=1', 'flag .*True or False, not 1'),
    ('--flag=true', "flag .*True or False, not 'true'"),
    ('--sise=3', "unknown setting 'sise'; did you mean 'size'"),
    ('--_private=3', "unknown setting '_private'"),
    ('--later=3', "unknown setting 'later'"),
    ('--flag', "'--flag'; .*--key=value"),
    ('-size=3', "'-size=3'; .*--key=value"),
    ('size=3', "'size=3'; .*--key=value"),
    ('syntax.py', 'syntax.py, line 2: SyntaxError'),
    ('exception.py', 'exception.py, line 2: ZeroDivisionError'),
    ('misspelt.py', "misspelt.py: unknown setting 'sizes'; did you mean 'size'"),
    ('type.py', "type.py: size .*not 'big'"),
    ('none.py', 'none.py: size .*integer, not None'),
    ('infinite.py', 'infinite.py: size .*integer, not inf'),
    ('nowhere.py', "'nowhere.py' does not exist; .*--key=value"),
    ('folder.py', "'folder.py' does not exist; .*--key=value"),
    ('a.txt', "'a.txt' does not end in .py; .*--key=value"),
    ('config/smal.py', 'did you mean config/small.py'),
    ('small.py', 'did you mean config/small.py'),
])
def test_refuses(configure, tmp_path, capsys, argument, pattern):
    """ One line and exit code 2. """
    files = {'syntax.py': '\nsize = (\n', 'exception.py': '\nsize = 1 / 0\n',
             'misspelt.py': 'sizes = 5\n', 'type.py': 'size = "big"\n', 'none.py': 'size = None\n',
             'infinite.py': 'size = float("inf")\n',
             'a.txt': 'size = 5\n', 'config/small.py': 'size = 5\n', 'folder.py/x': ''}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        configure(argument)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith('script.py: ')
    assert error.count('\n') == 1
    assert re.search(pattern, error), error


def test_misspelt_config_file_from_another_folder(configure, tmp_path, monkeypatch, capsys):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config/small.py').write_text('size = 5\n')
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    with pytest.raises(SystemExit):
        configure('config/smal.py')
    assert 'did you mean ../config/small.py?' in capsys.readouterr().err

# -----------------------------------------------------------------------------
# what it prints


@pytest.mark.parametrize('rank, overrides, pattern', [
    ('0', ['overriding: size = 6', "overriding: name = 'y'"], 'a.py: .*epochs, helper_number\n'),
    ('1', [], ''),
])
def test_overrides(run_configurator, tmp_path, monkeypatch, capsys, rank, overrides, pattern):
    """ The first of several processes prints, also the names that are not settings. """
    monkeypatch.setenv('RANK', rank)
    (tmp_path / 'a.py').write_text('size = 5\nname = "y"\nepochs = 3\nhelper_number = 4\n')
    names = run_configurator('a.py', '--size=6', '--rate=1e-3')
    assert names['config_overrides'] == overrides
    assert names['size'] == 6
    assert re.fullmatch(pattern, capsys.readouterr().out)


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
def test_script(tmp_path, script):
    """ Its --help holds the docstring and the settings; it refuses a setting it does not have. """
    out, _ = run(script, '--help', cwd=tmp_path)
    assert len(out) > 200
    has_settings = '\n# ---' in (ROOT / script).read_text()
    assert bool(re.search(r'^\w+ = ', out, re.MULTILINE)) == has_settings
    assert not re.search(r'^(import|def|exec|if) ', out, re.MULTILINE)
    _, error = run(script, '--no_such_setting=1', cwd=tmp_path, code=2)
    assert error.count('\n') == 1
    assert 'no_such_setting' in error

""" components/__init__.py: a script prints any text, whatever the encoding of the console. """
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import components


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_text_that_the_console_cannot_show(encoding):
    """ It is printed with replacements, and so is an error. """
    code = "import components, sys; print('\u043f a'); sys.exit('\u043f b')"
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                           env={**os.environ, 'PYTHONIOENCODING': encoding})
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, '? a\n', '\\u043f b\n')


@pytest.mark.parametrize('stdout', [None, SimpleNamespace()], ids=str)
def test_without_a_console(monkeypatch, stdout):
    """ As pythonw.exe starts it, or in a notebook. """
    monkeypatch.setattr(sys, 'stdout', stdout)
    importlib.reload(components)


@pytest.mark.parametrize('script', [
    'train.py', 'sample.py', 'bench.py', 'export.py', 'plot.py', 'data/custom/prepare.py',
    'data/shakespeare_char/prepare.py'])
def test_every_script(script):
    """ It imports components before it prints, at the earliest in configurator.py. """
    before, _, _ = (ROOT / script).read_text().partition("'configurator.py'")
    assert re.search('^(import|from) components', before, re.MULTILINE)


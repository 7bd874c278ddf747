""" The short form of `python tests/kill_and_resume.py --rounds=100`: one round of each kind. """
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from kill_and_resume import KINDS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='the runs are forks')
def test_killed_runs_resume_bit_identically(tmp_path):
    rounds = len(KINDS)
    command = [sys.executable, str(ROOT / 'tests/kill_and_resume.py'), f'--rounds={rounds}']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'{rounds} of {rounds} identical' in done.stdout

""" plot.py """
import csv

import pytest
from conftest import train

LOG = """\
iter,tokens,seconds,loss,val_loss
0,0,5,9,9
1,64,7,3,
2,128,11,4,2
3,192,13,,3
"""


@pytest.fixture
def runs(tmp_path):
    """ The folders a and b in tmp_path, with the same log. """
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.csv').write_text(LOG)


def is_png(path):
    return path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('x, expected', [
    ('iter', [0, 2, 3]),
    ('tokens', [0, 128, 192]),
    ('seconds', [5, 11, 13]),
])
def test_curves(runs, script_globals, x, expected):
    axes = script_globals('plot.py', 'a', x=x)['axes']
    batches, evaluations = axes.get_lines()
    assert list(batches.get_ydata()) == [9, 3, 4]
    assert list(evaluations.get_ydata()) == [9, 2, 3]
    assert list(evaluations.get_xdata()) == expected
    assert evaluations.get_label() == 'a: best 2.0000'
    assert axes.get_ylim() == pytest.approx((1.9, 4.1))  # without the first losses, 9


def test_picture_of_one_run_is_in_its_folder(tmp_path, runs, script_globals, capsys):
    script_globals('plot.py', 'a')
    assert is_png(tmp_path / 'a/loss.png')
    assert not (tmp_path / 'loss.png').exists()
    assert 'wrote a/loss.png' in capsys.readouterr().out


def test_picture_of_several_runs_is_in_the_working_directory(tmp_path, runs, script_globals):
    axes = script_globals('plot.py', 'a', 'b')['axes']
    assert is_png(tmp_path / 'loss.png')
    assert not (tmp_path / 'a/loss.png').exists()
    assert len(axes.get_lines()) == 4


def test_file(tmp_path, runs, script_globals):
    script_globals('plot.py', 'a', file='picture.svg')
    assert '<svg' in (tmp_path / 'picture.svg').read_text()
    assert not (tmp_path / 'a/loss.png').exists()


@pytest.mark.parametrize('log', [
    pytest.param('iter,tokens,seconds,loss,val_loss\n', id='no rows'),
    pytest.param('iter,tokens,seconds,loss,val_loss\n0,0,5,9,\n', id='one row'),
])
def test_run_that_has_just_begun(tmp_path, runs, script_globals, log):
    (tmp_path / 'a/log.csv').write_text(log)
    script_globals('plot.py', 'a')
    assert is_png(tmp_path / 'a/loss.png')


@pytest.mark.slow
def test_log_of_a_real_run(tmp_path, dataset, script_globals):
    train(tmp_path, dataset)
    train(tmp_path, dataset, out_dir='other', max_iters=30, log_interval=0)
    lines = iter(script_globals('plot.py', 'out', 'other')['axes'].get_lines())
    for name in ('out', 'other'):
        with open(tmp_path / name / 'log.csv', newline='') as file:
            rows = list(csv.DictReader(file))
        for column in ('loss', 'val_loss'):
            line = next(lines)
            logged = [row for row in rows if row[column]]
            assert len(logged) > 0
            assert list(line.get_ydata()) == [float(row[column]) for row in logged]
            assert list(line.get_xdata()) == [float(row['iter']) for row in logged]


@pytest.mark.parametrize('folders, settings, message', [
    pytest.param([], {}, 'name one or more folders', id='no folder'),
    pytest.param(['a', 'empty'], {}, 'empty/log.csv does not exist', id='no log.csv'),
    pytest.param(['a'], dict(x='loss'), "x='loss'", id='unknown x'),
])
def test_mistakes_get_one_line(tmp_path, runs, script_globals, folders, settings, message):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match=message):
        script_globals('plot.py', *folders, **settings)

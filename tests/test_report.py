""" log.csv, the loss in other units, and the pictures. """
import csv
import math

import pytest
from conftest import SMALL, run, train


def rows_of(folder):
    with open(folder / 'log.csv', newline='') as f:
        return list(csv.DictReader(f))


def test_one_row_for_each_iteration_that_was_logged_or_evaluated(tmp_path, dataset):
    settings = dict(log_interval=3, eval_interval=10)
    iters, steps, _ = train(tmp_path, dataset, **settings, checkpoint_interval=7)
    rows = rows_of(tmp_path / 'out')
    expected = [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert [int(row['iter']) for row in rows] == expected
    for row in rows:
        it = int(row['iter'])
        assert int(row['tokens']) == 64 * it and 0 < float(row['lr']) <= 1e-2
        assert (row['val_loss'] != '') == (it in steps) and (row['loss'] != '') == (it in iters)
        if it in steps:
            assert (float(row['train_loss']), float(row['val_loss'])) == pytest.approx(steps[it], abs=1e-4)
        if it in iters:
            assert float(row['loss']) == pytest.approx(iters[it], abs=1e-4) and float(row['grad_norm']) > 0
    assert 0 < float(rows[0]['seconds']) < float(rows[-1]['seconds'])

    with open(tmp_path / 'out/log.csv', 'a') as f:  # as a kill may leave it: rows of later, and half a one
        f.write('21,1344,9,2.0,,,0.01,1.0,1,\n2')
    train(tmp_path, dataset, **settings, max_iters=31, init_from='resume')
    again = rows_of(tmp_path / 'out')
    assert again[:8] == rows[:8] and [int(row['iter']) for row in again[8:]] == [20, 21, 24, 27, 30, 31]
    assert float(again[-1]['seconds']) > float(rows[-1]['seconds'])

    train(tmp_path, dataset, eval_only=True, init_from='resume')
    assert rows_of(tmp_path / 'out') == again
    train(tmp_path, dataset, max_iters=3)
    assert [int(row['iter']) for row in rows_of(tmp_path / 'out')] == [0, 1, 2, 3]


def test_eval_only_says_the_loss_in_other_units(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=5)
    _, steps, out = train(tmp_path, dataset, max_iters=5, eval_only=True, init_from='resume')
    only, _ = run('train.py', cwd=tmp_path, **{**SMALL, 'dataset': dataset, 'eval_only': True,
                                               'eval_split': 'train', 'init_from': 'resume'})
    assert 'perplexity' in only
    words = out.split('perplexity ')[1].split()
    assert float(words[0]) == pytest.approx(math.exp(steps[5][1]), rel=1e-3)
    assert float(words[3]) == pytest.approx(steps[5][1] / math.log(2), rel=1e-3)  # a character is a byte here


@pytest.mark.parametrize('x', ['iter', 'seconds'])
def test_plot_draws_runs(tmp_path, dataset, script_globals, x):
    train(tmp_path, dataset)
    train(tmp_path, dataset, out_dir='other', max_iters=30, log_interval=0)
    script_globals('plot.py', 'out', 'other', x=x)
    drawn = script_globals('plot.py', 'out', 'other', x=x, file='both.svg')['axes']
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert '<svg' in (tmp_path / 'both.svg').read_text()
    lines = drawn.get_lines()
    assert [len(line.get_xdata()) for line in lines] == [20, 3, 0, 4]
    assert list(lines[1].get_ydata()) == [float(row['val_loss']) for row in rows_of(tmp_path / 'out')
                                          if row['val_loss']]


def test_plot_says_what_is_wrong(tmp_path, dataset, script_globals):
    (tmp_path / 'empty').mkdir()
    for arguments, settings, message in (((), {}, 'name one or more folders'), (('empty',), {}, 'no log.csv'),
                                         (('empty',), dict(x='loss'), "x='loss'"),
                                         (('empty',), dict(file='a.doc'), 'a.doc')):
        with pytest.raises(SystemExit, match=message):
            script_globals('plot.py', *arguments, **settings)

""" plot.py """
import csv

import numpy as np
import pytest
from conftest import train
from matplotlib import pyplot as plt

LOG = """\
iter,tokens,seconds,loss,val_loss
0,0,5,9,9
1,64,7,3,
2,128,11,4,2
3,192,13,,3
"""
SEEDS = 'fast-1,fast-2,fast-10'


@pytest.fixture(autouse=True)
def logs(tmp_path):
    """ The same log as the folders a, b and x=1,y=2 and as files; seeds that differ. """
    for name in ('a', 'b', 'x=1,y=2', 'empty', *SEEDS.split(',')):
        (tmp_path / name).mkdir()
    for name in ('a/log', 'b/log', 'x=1,y=2/log', 'out-a-1', 'out-a-2', 'other'):
        (tmp_path / f'{name}.csv').write_text(LOG)
    yield
    plt.close('all')  # plot.py leaves that to the end of its process


@pytest.fixture
def seeds(tmp_path):
    """ Writes logs of three seeds -> iterations that all evaluated (n,), losses (3, n). """
    iters = np.array([0, 10, 20, 30])
    losses = 2 + np.random.default_rng(0).random((3, 4))
    losses[:, 0] = 9
    for seed, seed_losses in zip([1, 2, 10], losses, strict=True):
        with open(tmp_path / f'fast-{seed}/log.csv', 'w') as log:
            log.write('iter,tokens,seconds,loss,val_loss\n')
            for i, loss in zip(iters, seed_losses, strict=True):
                if (seed, i) != (2, 20):
                    log.write(f'{i},{i * 64},{i * seed},1.5,{loss}\n')
                log.write(f'{i + 5},{(i + 5) * 64},{(i + 5) * seed},7,\n')
    return iters[[0, 1, 3]], losses[:, [0, 1, 3]]


def is_png(path):
    return path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('x, places', [
    ('iter', [0, 2, 3]), ('tokens', [0, 128, 192]), ('seconds', [5, 11, 13]),
])
@pytest.mark.parametrize('run, picture', [
    ('a', 'a/loss.png'), ('x=1,y=2', 'x=1,y=2/loss.png'), ('other.csv', 'loss.png'),
])
def test_curves(tmp_path, script_globals, x, places, run, picture, capsys):
    axes = script_globals('plot.py', run, x=x)['axes']
    batches, evaluations = axes.get_lines()
    assert list(batches.get_ydata()) == [9, 3, 4]
    assert list(evaluations.get_ydata()) == [9, 2, 3]
    assert list(evaluations.get_xdata()) == places
    assert evaluations.get_label() == f'{run.removesuffix(".csv")}: best 2.0000'
    assert axes.get_ylim() == pytest.approx((1.9, 4.1))  # without the first losses, 9
    assert axes.get_legend().get_title().get_text() == 'validation loss; pale: loss of each batch'
    assert is_png(tmp_path / picture)
    assert f'wrote {picture}' in capsys.readouterr().out


@pytest.mark.parametrize('x, scale', [('iter', 1), ('tokens', 64), ('seconds', 13 / 3)])
def test_seeds_are_a_mean_in_a_band_where_all_were_evaluated(script_globals, seeds, x, scale):
    iters, losses = seeds
    axes = script_globals('plot.py', SEEDS, x=x)['axes']
    mean, = axes.get_lines()  # no line for the training losses
    assert mean.get_xdata() == pytest.approx(iters * scale)
    assert mean.get_ydata() == pytest.approx(losses.mean(0))
    assert mean.get_label() == f'fast: best {losses.min(1).mean():.4f} (mean of 3 seeds)'
    outline = np.unique(axes.collections[0].get_paths()[0].vertices, axis=0)
    for place, seed_losses in zip(iters * scale, losses.T, strict=True):
        edges = outline[np.isclose(outline[:, 0], place), 1]
        assert (edges.min(), edges.max()) == pytest.approx((seed_losses.min(), seed_losses.max()))
    later = losses[:, 1:]  # without the first losses, 9
    margin = 0.05 * np.ptp(later)
    assert axes.get_ylim() == pytest.approx((later.min() - margin, later.max() + margin))
    assert axes.get_legend().get_title().get_text() == 'validation loss; band: range of the seeds'


def test_several_curves_in_the_working_directory(tmp_path, script_globals, seeds):
    axes = script_globals('plot.py', SEEDS, 'a', 'out-a-1.csv,out-a-2.csv', 'a,b')['axes']
    mean, batches, evaluations, of_files, unnamed = axes.get_lines()
    assert batches.get_color() == evaluations.get_color() != mean.get_color()
    assert list(evaluations.get_ydata()) == list(of_files.get_ydata()) == [9, 2, 3]
    assert of_files.get_label() == 'out-a: best 2.0000 (mean of 2 seeds)'
    assert unnamed.get_label() == 'a,b: best 2.0000 (mean of 2 seeds)'
    assert is_png(tmp_path / 'loss.png')


@pytest.mark.parametrize('line, limits', [
    (1.4697, (1.4697 - 0.05 * 2.5303, 4 + 0.05 * 2.5303)),  # below all losses
    (3.5, (1.9, 4.1)),  # between them
])
def test_line(script_globals, line, limits):
    axes = script_globals('plot.py', 'a', line=line)['axes']
    *_, published = axes.get_lines()
    assert list(published.get_ydata()) == [line, line]
    assert axes.get_legend().get_texts()[-1].get_text() == str(line)
    assert axes.get_ylim() == pytest.approx(limits)


def test_run_that_diverged_into_a_file(tmp_path, script_globals):
    (tmp_path / 'a/log.csv').write_text(LOG + '4,256,15,nan,nan\n5,320,17,inf,inf\n')
    axes = script_globals('plot.py', 'a', file='picture.svg')['axes']
    assert axes.get_lines()[1].get_label() == 'a: best 2.0000'
    assert axes.get_ylim() == pytest.approx((1.9, 4.1))
    assert '<svg' in (tmp_path / 'picture.svg').read_text()
    assert not (tmp_path / 'a/loss.png').exists()


@pytest.mark.parametrize('num_rows', [0, 1])
def test_run_that_has_just_begun(tmp_path, script_globals, num_rows):
    (tmp_path / 'a/log.csv').write_text('\n'.join(LOG.splitlines()[:1 + num_rows]))
    script_globals('plot.py', 'a')
    assert is_png(tmp_path / 'a/loss.png')


@pytest.mark.slow
def test_log_of_a_real_run(tmp_path, dataset, script_globals):
    train(tmp_path, dataset)
    with open(tmp_path / 'out/log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    lines = script_globals('plot.py', 'out')['axes'].get_lines()
    for column, line in zip(('loss', 'val_loss'), lines, strict=True):
        logged = [row for row in rows if row[column]]
        assert list(line.get_ydata()) == [float(row[column]) for row in logged] != []
        assert list(line.get_xdata()) == [float(row['iter']) for row in logged]


@pytest.mark.parametrize('arguments, message', [
    ([], 'name one or more folders'),
    (['a', 'empty'], 'empty/log.csv does not exist'),
    (['a,none.csv'], 'none.csv does not exist'),
    (['a,late.csv'], "'a,late.csv' have no evaluated iteration"),
    (['other.csv'], "other.csv has no column 'tokens'"),
    (['text.csv'], r"text.csv is malformed \(.*'high'\)"),
    (['binary.csv'], 'binary.csv is malformed'),
    (['a', '--x=loss'], "x='loss'"),
])
def test_mistakes_get_one_line(tmp_path, script_globals, arguments, message):
    header = LOG.splitlines()[0]
    (tmp_path / 'late.csv').write_text(f'{header}\n7,448,9,3,3\n')
    (tmp_path / 'other.csv').write_text('iter,loss,val_loss\n0,9,9\n')
    (tmp_path / 'text.csv').write_text(f'{header}\n0,0,5,high,9\n')
    (tmp_path / 'binary.csv').write_bytes(bytes(range(128, 256)))
    with pytest.raises(SystemExit, match=message) as stopped:
        script_globals('plot.py', '--x=tokens', *arguments)
    assert '\n' not in str(stopped.value)
    assert not (tmp_path / 'loss.png').exists()

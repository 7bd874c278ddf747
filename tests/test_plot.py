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


@pytest.fixture
def runs(tmp_path):
    """ The folders a and b in tmp_path, with the same log. """
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.csv').write_text(LOG)


@pytest.fixture(autouse=True)
def close_figures():
    """ plot.py leaves that to the end of its process. """
    yield
    plt.close('all')


def write_seeds(folder):
    """ Writes logs of runs fast-1, fast-2, fast-10 -> evaluated iterations (n,), losses (3, n). """
    rng = np.random.default_rng(0)
    iters = np.array([0, 10, 20, 30])
    losses = 2 + rng.random((3, 4))
    losses[:, 0] = 9
    for seed, seed_losses in zip([1, 2, 10], losses):
        (folder / f'fast-{seed}').mkdir()
        with open(folder / f'fast-{seed}/log.csv', 'w') as log:
            log.write('iter,tokens,seconds,loss,val_loss\n')
            for i, loss in zip(iters, seed_losses):
                log.write(f'{i},{i * 64},{i * seed},1.5,{loss}\n')
                log.write(f'{i + 5},{(i + 5) * 64},{(i + 5) * seed},7,\n')
    return iters, losses


def band_in(axes):
    """ The x values, the lower edge and the upper edge of the one shaded band. """
    band, = axes.collections
    outline = np.unique(band.get_paths()[0].vertices, axis=0)
    places = np.unique(outline[:, 0])
    lowest = [outline[outline[:, 0] == place, 1].min() for place in places]
    highest = [outline[outline[:, 0] == place, 1].max() for place in places]
    return places, lowest, highest


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


SEEDS = 'fast-1,fast-2,fast-10'


@pytest.mark.parametrize('x, scale', [
    ('iter', 1),
    ('tokens', 64),
    ('seconds', (1 + 2 + 10) / 3),
])
def test_seeds_are_a_mean_in_a_band(tmp_path, script_globals, x, scale):
    iters, losses = write_seeds(tmp_path)
    axes = script_globals('plot.py', SEEDS, x=x)['axes']
    mean, = axes.get_lines()  # no line for the training losses
    assert mean.get_xdata() == pytest.approx(iters * scale)
    assert mean.get_ydata() == pytest.approx(losses.mean(0))
    places, lowest, highest = band_in(axes)
    assert places == pytest.approx(iters * scale)
    assert lowest == pytest.approx(losses.min(0))
    assert highest == pytest.approx(losses.max(0))
    best = np.mean([losses[0].min(), losses[1].min(), losses[2].min()])
    assert mean.get_label() == f'fast: best {best:.4f} (mean of 3 seeds)'
    assert is_png(tmp_path / 'loss.png')


def test_loss_limits_of_seeds_hold_their_band(tmp_path, script_globals):
    _, losses = write_seeds(tmp_path)
    bottom, top = script_globals('plot.py', SEEDS)['axes'].get_ylim()
    later = losses[:, 1:]  # without the first losses, 9
    margin = 0.05 * (later.max() - later.min())
    assert (bottom, top) == pytest.approx((later.min() - margin, later.max() + margin))


def test_seeds_are_compared_where_all_were_evaluated(tmp_path, script_globals):
    iters, losses = write_seeds(tmp_path)
    log = tmp_path / 'fast-2/log.csv'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([line for line in lines if not line.startswith('20,')]))
    axes = script_globals('plot.py', SEEDS)['axes']
    mean, = axes.get_lines()
    assert list(mean.get_xdata()) == [0, 10, 30]
    assert mean.get_ydata() == pytest.approx(losses.mean(0)[[0, 1, 3]])
    places, _, _ = band_in(axes)
    assert list(places) == [0, 10, 30]


def test_seeds_beside_a_run(tmp_path, runs, script_globals):
    write_seeds(tmp_path)
    axes = script_globals('plot.py', SEEDS, 'a')['axes']
    mean, batches, evaluations = axes.get_lines()
    assert batches.get_color() == evaluations.get_color() != mean.get_color()
    assert list(batches.get_ydata()) == [9, 3, 4]
    assert list(evaluations.get_ydata()) == [9, 2, 3]
    assert is_png(tmp_path / 'loss.png')


@pytest.mark.parametrize('arguments, kinds', [
    (['a'], ['pale: loss of each batch']),
    ([SEEDS], ['band: range of the seeds']),
    (['a', SEEDS], ['pale: loss of each batch', 'band: range of the seeds']),
])
def test_legend_explains_what_the_picture_has(tmp_path, runs, script_globals, arguments, kinds):
    write_seeds(tmp_path)
    legend = script_globals('plot.py', *arguments)['axes'].get_legend()
    assert legend.get_title().get_text() == '; '.join(['validation loss', *kinds])
    assert len(legend.get_texts()) == len(arguments)


@pytest.mark.parametrize('names, expected', [
    (['fast-1', 'fast-10'], 'fast'),
    (['fast', 'fast-10'], 'fast'),
    (['out-fast-seed1', 'out-fast-seed2'], 'out-fast'),
    (['one/fast', 'two/fast'], 'fast'),
    (['one', 'two'], 'one,two'),
])
def test_name_of_a_curve(tmp_path, script_globals, names, expected):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'log.csv').write_text(LOG)
    mean, = script_globals('plot.py', ','.join(names))['axes'].get_lines()
    assert mean.get_label() == f'{expected}: best 2.0000 (mean of 2 seeds)'


def test_folder_with_a_comma_in_its_name(tmp_path, script_globals):
    (tmp_path / 'lr=1,b=2').mkdir()
    (tmp_path / 'lr=1,b=2/log.csv').write_text(LOG)
    _, evaluations = script_globals('plot.py', 'lr=1,b=2')['axes'].get_lines()
    assert evaluations.get_label() == 'lr=1,b=2: best 2.0000'


def test_csv_files(tmp_path, script_globals):
    (tmp_path / 'logs').mkdir()
    for name in ('slow', 'fast-1', 'fast-2'):
        (tmp_path / f'logs/{name}.csv').write_text(LOG)
    axes = script_globals('plot.py', 'logs/slow.csv', 'logs/fast-1.csv,logs/fast-2.csv')['axes']
    batches, evaluations, mean = axes.get_lines()
    assert list(batches.get_ydata()) == [9, 3, 4]
    assert list(evaluations.get_ydata()) == list(mean.get_ydata()) == [9, 2, 3]
    assert evaluations.get_label() == 'slow: best 2.0000'
    assert mean.get_label() == 'fast: best 2.0000 (mean of 2 seeds)'


def test_picture_of_a_csv_file_is_in_the_working_directory(tmp_path, script_globals):
    (tmp_path / 'logs').mkdir()
    (tmp_path / 'logs/slow.csv').write_text(LOG)
    script_globals('plot.py', 'logs/slow.csv')
    assert is_png(tmp_path / 'loss.png')


@pytest.mark.parametrize('line, limits', [
    (1.4697, (1.4697 - 0.05 * 2.5303, 4 + 0.05 * 2.5303)),  # below all losses
    (3.5, (1.9, 4.1)),  # between them
    (5, (2 - 0.05 * 3, 5 + 0.05 * 3)),
])
def test_line(runs, script_globals, line, limits):
    axes = script_globals('plot.py', 'a', line=line)['axes']
    batches, evaluations, published = axes.get_lines()
    assert list(published.get_ydata()) == [line, line]
    assert list(published.get_xdata()) == [0, 1]
    assert published.get_transform() == axes.get_yaxis_transform()  # 0 to 1: the whole width
    assert published.get_linestyle() == '--'
    assert axes.get_legend().get_texts()[-1].get_text() == str(float(line))
    assert axes.get_ylim() == pytest.approx(limits)


def test_run_that_diverged(tmp_path, runs, script_globals):
    diverged = LOG + '4,256,15,nan,nan\n5,320,17,inf,inf\n'
    (tmp_path / 'a/log.csv').write_text(diverged)
    axes = script_globals('plot.py', 'a')['axes']
    _, evaluations = axes.get_lines()
    assert evaluations.get_label() == 'a: best 2.0000'
    assert axes.get_ylim() == pytest.approx((1.9, 4.1))


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


@pytest.mark.parametrize('arguments, settings, message', [
    pytest.param([], {}, 'name one or more folders', id='no run'),
    pytest.param(['a', 'empty'], {}, 'empty/log.csv does not exist', id='no log.csv'),
    pytest.param(['none.csv'], {}, 'none.csv does not exist', id='no .csv file'),
    pytest.param(['a,b,'], {}, "'a,b,' has a comma without a run", id='comma at the end'),
    pytest.param(['a,empty'], {}, 'empty/log.csv does not exist', id='no log.csv of a seed'),
    pytest.param(['a,late'], {}, "'a,late' have no evaluated iteration", id='nothing in common'),
    pytest.param(['other.csv'], {}, "other.csv has no column 'tokens'", id='other columns'),
    pytest.param(['blank.csv'], {}, "blank.csv has no column 'iter'", id='blank file'),
    pytest.param(['text.csv'], {}, r"text.csv is malformed \(.*'high'\)", id='no number'),
    pytest.param(['binary.csv'], {}, 'binary.csv is malformed', id='binary file'),
    pytest.param(['a'], dict(x='loss'), "x='loss'", id='unknown x'),
])
def test_mistakes_get_one_line(tmp_path, runs, script_globals, arguments, settings, message):
    header = LOG.splitlines()[0]
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'late').mkdir()
    (tmp_path / 'late/log.csv').write_text(f'{header}\n7,448,9,3,3\n')
    (tmp_path / 'other.csv').write_text('iter,loss,val_loss\n0,9,9\n')
    (tmp_path / 'blank.csv').write_text('')
    (tmp_path / 'text.csv').write_text(f'{header}\n0,0,5,high,9\n')
    (tmp_path / 'binary.csv').write_bytes(bytes(range(128, 256)))
    settings = {'x': 'tokens', **settings}
    with pytest.raises(SystemExit, match=message) as stopped:
        script_globals('plot.py', *arguments, **settings)
    assert '\n' not in str(stopped.value)
    assert not (tmp_path / 'loss.png').exists()

"""
Plots the losses of runs as one picture, from the log.csv in their folders or from other .csv files
in its format.

    python plot.py out-shakespeare-char                        writes out-shakespeare-char/loss.png
    python plot.py out-a out-b --x=seconds --file=losses.svg
    python plot.py out-a-1,out-a-2,out-a-3 b.csv --line=1.4697

Commas join runs that differ only in the seed into one curve: the mean of their validation losses,
in a band from the lowest to the highest, at the iterations that all of them evaluated. With
--x=seconds, each point is at the mean seconds of its iteration. The curve has the name that all of
its runs have up to a hyphen, here out-a.

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import csv
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from components.errors import UserError, one_line_errors
from components.files import whole_file

# the arguments that name runs; the others are for the configurator
arguments = [arg for arg in sys.argv[1:] if not arg.startswith('-') and not arg.endswith('.py')]
sys.argv[1:] = [arg for arg in sys.argv[1:] if arg not in arguments]

# -----------------------------------------------------------------------------
x = 'iter'  # iter, tokens or seconds
line = 0.0  # a loss to compare with, such as a published one: a dashed line; 0.0: none
file = ''   # the picture: .png, .svg or .pdf; '': loss.png in the folder of the run, or for several
            # runs or a .csv file in the working directory
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

LABELS = {'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}


def read_log(run):
    """
    Reads the log of a run, from its folder or a .csv file.

    Returns a dict of numbers for each row. Raises UserError if it is missing or malformed.
    """
    path = Path(run)
    if path.suffix != '.csv':
        path = path / 'log.csv'
    if not path.exists():
        raise UserError(f'{path} does not exist; name the out_dir of a run of train.py, or a .csv '
                        'file in the format of its log.csv')
    rows = []
    try:
        with open(path, encoding='utf-8', newline='') as log:
            for row in csv.DictReader(log):
                columns = [name for name in ('iter', x, 'loss', 'val_loss') if row[name]]
                rows.append({name: float(row[name]) for name in columns})
    except KeyError as error:
        raise UserError(f'{path} has no column {error}; name a log of train.py') from None
    except (ValueError, csv.Error) as error:
        raise UserError(f'{path} is malformed ({error}); name a log of train.py') from None
    return [row for row in rows if 'iter' in row and x in row]


def read_curve(argument):
    """
    Reads the runs of an argument: one, or several joined by commas.

    Returns a namespace: the `name` of the curve; `places` (n,) on the x axis and the validation
    `losses` (runs, n), at the n iterations that all runs evaluated; and `batches`, of a single run
    the rows with a training loss. Raises UserError if several runs share no iteration.
    """
    runs = argument.split(',')
    if Path(argument).exists():  # its name may have a comma
        runs = [argument]
    logs = [read_log(run) for run in runs]
    evaluations = []
    for log in logs:
        evaluations.append({row['iter']: row for row in log if 'val_loss' in row})
    iters = sorted(set.intersection(*map(set, evaluations)))
    if len(runs) > 1 and not iters:
        raise UserError(f'the runs {argument!r} have no evaluated iteration in common; separate '
                        'them by spaces to plot a curve for each')
    places = np.array([[rows[i][x] for i in iters] for rows in evaluations])
    losses = np.array([[rows[i]['val_loss'] for i in iters] for rows in evaluations])
    batches = []
    if len(runs) == 1:
        batches = [row for row in logs[0] if 'loss' in row]
    words = [Path(run).resolve().name.removesuffix('.csv').split('-') for run in runs]
    name = '-'.join(os.path.commonprefix(words))
    if name == '':
        name = argument
    return SimpleNamespace(name=name, places=places.mean(axis=0), losses=losses, batches=batches)


def plot_curve(axes, color, curve):
    """ Plots the mean validation loss, over the losses of batches or over the range of seeds. """
    num_runs, num_evaluations = curve.losses.shape
    label = curve.name
    if num_evaluations > 0:
        best = np.fmin.reduce(curve.losses, axis=1)  # ignores NaN
        label += f': best {best.mean():.4f}'
    if num_runs > 1:
        label += f' (mean of {num_runs} seeds)'
        axes.fill_between(curve.places, curve.losses.min(axis=0), curve.losses.max(axis=0),
                          color=color, alpha=0.25, linewidth=0)
    else:
        axes.plot([row[x] for row in curve.batches], [row['loss'] for row in curve.batches],
                  color=color, alpha=0.3, linewidth=1)
    axes.plot(curve.places, curve.losses.mean(axis=0), color=color, linewidth=2, marker='o',
              markersize=4, label=label)


def set_loss_limits(axes, curves):
    """ Limits the y axis to `line` and the losses after the steep beginning. """
    shown = []
    if line != 0:
        shown.append(line)
    for curve in curves:
        losses = [row['loss'] for row in curve.batches]
        beginning = 1 + len(losses) // 50
        shown += losses[beginning:] + curve.losses[:, 1:].flatten().tolist()
    shown = [loss for loss in shown if math.isfinite(loss)]  # a run may have diverged
    lowest = min(shown, default=0)
    highest = max(shown, default=0)
    if highest > lowest:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)


with one_line_errors():
    if not arguments:
        raise UserError('name one or more folders of runs, as in: python plot.py out-a out-b')
    if x not in LABELS:
        raise UserError(f'x={x!r} must be one of {", ".join(LABELS)}')
    curves = [read_curve(argument) for argument in arguments]
for override in config_overrides:  # noqa: F821
    print(override)

from matplotlib import pyplot as plt  # noqa: E402  it is slow, and --help does not need it

plt.switch_backend('agg')  # writes files and needs no display
plt.rcParams.update({'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False})
figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout='constrained')
legend_title = 'validation loss'
if any(len(curve.losses) == 1 for curve in curves):
    legend_title += '; pale: loss of each batch'
if any(len(curve.losses) > 1 for curve in curves):
    legend_title += '; band: range of the seeds'
for number, curve in enumerate(curves):
    plot_curve(axes, f'C{number}', curve)
if line != 0:
    axes.axhline(line, color='black', linestyle='--', linewidth=1, label=str(line))
axes.set(xlabel=LABELS[x], ylabel='loss in nats per token', xlim=(0, None))
set_loss_limits(axes, curves)
axes.grid(alpha=0.3)
axes.legend(title=legend_title, frameon=False)

if not file:
    file = 'loss.png'
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        file = os.path.join(arguments[0], file)
with one_line_errors(), whole_file(file) as temporary:
    figure.savefig(temporary, format=Path(file).suffix[1:])
print(f'wrote {file}')

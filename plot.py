"""
Plots the losses of runs, from the log.csv in their folders, as one picture.

    python plot.py out-shakespeare-char                        writes out-shakespeare-char/loss.png
    python plot.py out-a out-b --x=seconds --file=losses.svg

Settings are the variables below. Set them with --key=value or in config files; the last one wins.
"""
import csv
import os
import sys
from pathlib import Path

from components.errors import UserError, one_line_errors
from components.files import whole_file

# the arguments that name folders; the others are for the configurator
folders = [arg for arg in sys.argv[1:] if not arg.startswith('-') and not arg.endswith('.py')]
sys.argv[1:] = [arg for arg in sys.argv[1:] if arg not in folders]

# -----------------------------------------------------------------------------
x = 'iter'  # iter, tokens or seconds
file = ''   # the picture: .png, .svg or .pdf; '': loss.png in the folder of the run, or for several
            # runs in the working directory
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

LABELS = {'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}


def read_log(folder):
    """ The rows of a run's log.csv, as dicts of strings. Raises UserError if it does not exist. """
    path = Path(folder, 'log.csv')
    if not path.exists():
        raise UserError(f'{path} does not exist; name the out_dir of a run of train.py')
    with open(path, encoding='utf-8', newline='') as log:
        return list(csv.DictReader(log))


def points(rows, column):
    """ The x values and the losses of the rows that have a loss in `column`. """
    rows = [row for row in rows if row[x] and row[column]]
    places = [float(row[x]) for row in rows]
    losses = [float(row[column]) for row in rows]
    return places, losses


def plot_run(axes, folder, rows):
    """ Plots the training loss of each batch in a pale color, and the validation loss over it. """
    name = Path(folder).resolve().name
    places, losses = points(rows, 'loss')
    line, = axes.plot(places, losses, alpha=0.3, linewidth=1)
    places, losses = points(rows, 'val_loss')
    if losses:
        name += f': best {min(losses):.4f}'
    axes.plot(places, losses, color=line.get_color(), linewidth=2, marker='o', markersize=4,
              label=name)


def set_loss_limits(axes, runs):
    """ Limits the y axis to the losses after the steep beginning, if there are any. """
    shown = []
    for rows in runs.values():
        _, losses = points(rows, 'loss')
        _, val_losses = points(rows, 'val_loss')
        beginning = 1 + len(losses) // 50
        later = losses[beginning:] + val_losses[1:]
        if not later:
            later = losses + val_losses
        shown += later
    lowest = min(shown, default=0)
    highest = max(shown, default=0)
    if highest > lowest:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)


with one_line_errors():
    if not folders:
        raise UserError('name one or more folders of runs, as in: python plot.py out-a out-b')
    if x not in LABELS:
        raise UserError(f'x={x!r} must be one of {", ".join(LABELS)}')
    runs = {folder: read_log(folder) for folder in folders}
for line in config_overrides:  # noqa: F821
    print(line)

import matplotlib  # noqa: E402  here, because it is slow to import and --help does not need it

matplotlib.use('agg')  # writes files and needs no display
from matplotlib import pyplot as plt  # noqa: E402

plt.rcParams.update({
    'font.size': 12,
    'axes.spines.top': False,
    'axes.spines.right': False,
})
figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout='constrained')
for folder, rows in runs.items():
    plot_run(axes, folder, rows)
axes.set(xlabel=LABELS[x], ylabel='loss in nats per token', xlim=(0, None))
set_loss_limits(axes, runs)
axes.grid(alpha=0.3)
axes.legend(title='validation loss; pale: loss of each batch', frameon=False)

if not file:
    file = 'loss.png'
    if len(folders) == 1:
        file = os.path.join(folders[0], file)
with one_line_errors(), whole_file(file) as temporary:
    figure.savefig(temporary, format=Path(file).suffix[1:])
print(f'wrote {file}')

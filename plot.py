"""
Draws the losses of runs, from the log.csv in their folders, as one picture.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --x=seconds --file=losses.svg

Settings are the variables below: set them with --key=value, or in a file named before it.
"""
import csv
import os
import sys
from pathlib import Path

from bins import one_line_errors, whole_file

# the rest is for the configurator
folders = [arg for arg in sys.argv[1:] if not arg.startswith('-') and not arg.endswith('.py')]
sys.argv[1:] = [arg for arg in sys.argv[1:] if arg not in folders]

# -----------------------------------------------------------------------------
x = 'iter'         # iter, tokens or seconds
file = 'loss.png'  # the picture: .png, .svg or .pdf
# -----------------------------------------------------------------------------
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())

LABELS = {'iter': 'iterations', 'tokens': 'tokens', 'seconds': 'seconds of training'}


def points(rows, column):
    """ The rows of a log that have a loss in this column -> where they are on the x axis, the losses. """
    pairs = [(float(row[x]), float(row[column])) for row in rows if row[x] and row[column]]
    return [place for place, _ in pairs], [loss for _, loss in pairs]


with one_line_errors():
    if not folders:
        raise ValueError('name one or more folders of runs, as in: python plot.py out-a out-b')
    if x not in LABELS:
        raise ValueError(f'x={x!r} must be {", ".join(LABELS)}')
    if Path(file).suffix not in ('.png', '.svg', '.pdf'):
        raise ValueError(f'file={file} must end in .png, .svg or .pdf')
    runs = {}
    for folder in folders:
        try:
            with open(Path(folder, 'log.csv'), encoding='utf-8', newline='') as f:
                runs[folder] = list(csv.DictReader(f))
        except FileNotFoundError:
            raise ValueError(f'{folder} has no log.csv, which train.py writes') from None
        if not points(runs[folder], 'loss')[0] and not points(runs[folder], 'val_loss')[0]:
            raise ValueError(f'{folder}/log.csv has no losses yet')

    import matplotlib
    matplotlib.use('agg')  # no display is needed
    from matplotlib import pyplot as plt
    plt.rcParams.update({'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False})
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout='constrained')
    seen = []
    for folder, rows in runs.items():
        places, losses = points(rows, 'loss')
        line, = axes.plot(places, losses, alpha=0.3, linewidth=1)
        at, evaluated = points(rows, 'val_loss')
        name = Path(folder).resolve().name + (f': {min(evaluated):.4f} at best' if evaluated else '')
        axes.plot(at, evaluated, color=line.get_color(), linewidth=2, marker='o', markersize=4, label=name)
        seen += losses[1 + len(losses) // 50:] + evaluated[1:] or losses + evaluated
    axes.set(xlabel=LABELS[x], ylabel='loss, nats a token', xlim=(0, None))
    margin = 0.05 * (max(seen) - min(seen)) or 0.1
    axes.set_ylim(min(seen) - margin, max(seen) + margin)  # without the steep beginning
    axes.grid(alpha=0.3)
    axes.legend(title='validation; paler: each batch', frameon=False)
    with whole_file(file) as temporary:
        figure.savefig(temporary, format=Path(file).suffix[1:])
print(f'wrote {file}')

""" components/log.py: log.csv and Weights & Biases, by themselves and of whole runs. """
import csv
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, train

from components import log as log_module
from components.checkpoint import Progress
from components.errors import UserError
from components.log import COLUMNS, Log


def read_rows(folder):
    with open(folder / 'log.csv', newline='') as file:
        return list(csv.DictReader(file))


def column(rows, name):
    """ The numbers of a column, without empty cells. """
    return [float(row[name]) for row in rows if row[name] != '']


@pytest.fixture
def make_log(tmp_path):
    """ make_log(...) -> a Log in `tmp_path`. """
    config = dict(out_dir=str(tmp_path), eval_only=False, eval_split='val', wandb_log=False,
                  wandb_project='project', wandb_run_name='run', fsdp=False)

    def make(tokenizer=None, first_iter=0, is_resumed=False, **settings):
        progress = Progress(iter_num=first_iter, run_id='id')
        return Log({**config, **settings}, progress, tokenizer, is_resumed)
    return make


@pytest.fixture
def run(script_globals, dataset):
    """ run(**settings) runs train.py -> its global variables. """
    def execute(**settings):
        return script_globals('train.py', **{**SMALL, 'dataset': dataset, **settings})
    return execute


def log_iteration(log, iter_num, **columns):
    log.add(**columns)
    log.end_row(Progress(iter_num=iter_num, tokens=64 * iter_num, seconds=2e5 / 3))

# -----------------------------------------------------------------------------
# log.csv by itself


def test_row(tmp_path, make_log):
    log = make_log()
    log_iteration(log, 0, loss=1 / 3, mfu=None)
    log_iteration(log, 1)  # nothing was logged or evaluated
    row, = read_rows(tmp_path)
    assert tuple(row) == COLUMNS
    expected = dict(iter='0', tokens='0', seconds='66666.7', loss='0.333333', mfu='', val_loss='')
    assert {name: row[name] for name in expected} == expected
    with pytest.raises(ValueError, match='weight'):
        log_iteration(log, 2, weight=2.5)


@pytest.mark.parametrize('is_first, eval_only', [(False, False), (True, True)])
def test_nothing_is_written(tmp_path, make_log, monkeypatch, is_first, eval_only):
    monkeypatch.setattr(log_module, 'is_first_process', lambda: is_first)
    log_iteration(make_log(eval_only=eval_only), 0, loss=2.5)
    assert not (tmp_path / 'log.csv').exists()


ROWS = 'iter,loss\n0,2.5\n3,2.4\n6,2.3\n'


@pytest.mark.parametrize('content, first_iter, expected', [
    pytest.param(ROWS, 6, [0, 3], id='rows before the first iteration'),
    pytest.param(ROWS + '9,', 12, [0, 3, 6, 9], id='empty cell'),
    pytest.param(ROWS + '9', 12, [0, 3, 6], id='row that was not completed'),
    pytest.param('iter\n' + 200_000 * '9', 12, None, id='long field'),
    pytest.param('iter\n\udcff\n', 12, None, id='not UTF-8'),
    pytest.param('iter\n\u00b2\n', 12, None, id='not a number'),
    pytest.param('a,b\n1,2\n', 12, None, id='other columns'),
])
def test_log_of_a_resumed_run(tmp_path, make_log, content, first_iter, expected):
    path = tmp_path / 'log.csv'
    before = content.encode(errors='surrogateescape')
    path.write_bytes(before)
    if expected is None:
        with pytest.raises(UserError, match='log.csv is damaged'):
            make_log(first_iter=first_iter, is_resumed=True)
        assert path.read_bytes() == before
    else:
        make_log(first_iter=first_iter, is_resumed=True)
        assert column(read_rows(tmp_path), 'iter') == expected
    make_log()  # of a new run
    assert read_rows(tmp_path) == []


def test_disk_that_is_full_in_the_middle_of_a_row(tmp_path, make_log, monkeypatch, capsys):
    """ Nothing of this row stays. """
    class FullDisk:
        def __init__(self, file, columns, **options):
            self.file = file

        def writerow(self, row):
            self.file.write('1,64,')
            raise OSError('no space')
    log = make_log()
    log_iteration(log, 0, loss=2.5)
    with monkeypatch.context() as patch:
        patch.setattr(log_module.csv, 'DictWriter', FullDisk)
        log_iteration(log, 1, loss=2.5)
    log_iteration(log, 2, loss=2.5)
    assert column(read_rows(tmp_path), 'iter') == [0, 2]
    (tmp_path / 'log.csv').unlink()
    log_iteration(log, 4, loss=2.5)
    assert re.findall('WARNING: .* iteration (.)', capsys.readouterr().out) == ['1', '4']

# -----------------------------------------------------------------------------
# log.csv of a run


def test_rows_of_a_run_and_of_its_resumes(tmp_path, dataset):
    """ One for each iteration that was logged or evaluated. """
    settings = dict(log_interval=3, eval_interval=10)
    losses, evaluations, _ = train(tmp_path, dataset, **settings, checkpoint_interval=7)
    rows = read_rows(tmp_path / 'out')
    iters = [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert column(rows, 'iter') == iters
    assert column(rows, 'tokens') == [64 * number for number in iters]
    for row in rows:
        number = int(row['iter'])
        assert 0 < float(row['lr']) <= 1e-2
        assert (row['val_loss'] != '') == (number in evaluations)
        if number in evaluations:
            pair = (float(row['train_loss']), float(row['val_loss']))
            assert pair == pytest.approx(evaluations[number], abs=1e-4)
        if number in losses:
            assert float(row['loss']) == pytest.approx(losses[number], abs=1e-4)
            assert float(row['grad_norm']) > 0
            assert float(row['tokens_per_second']) > 0

    with open(tmp_path / 'out/log.csv', 'a') as file:  # as a killed run may leave it
        file.write('21,1344,9,2.0,,,0.01,1.0,1,\n2')
    train(tmp_path, dataset, **settings, max_iters=31, init_from='resume', batch_size=8)
    after = read_rows(tmp_path / 'out')
    assert after[:8] == rows[:8]
    iters = [20, 21, 24, 27, 30, 31]
    assert column(after[8:], 'iter') == iters
    assert column(after[8:], 'tokens') == [1280 + 128 * (number - 20) for number in iters]
    seconds = column(after, 'seconds')
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    saved = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['seconds']
    assert seconds[-1] == pytest.approx(saved, rel=1e-4)


def test_loss_of_the_last_row(tmp_path, run, capsys):
    """ It has no batch, so it has the loss of the update before, which a checkpoint holds. """
    run()
    loss = re.search('iter 19: loss (.*?),', capsys.readouterr().out)[1]
    for _ in range(2):
        last = read_rows(tmp_path / 'out')[-1]
        assert int(last['iter']) == 20
        assert float(last['loss']) == pytest.approx(float(loss), abs=1e-4)
        assert last['grad_norm'] == ''
        run(init_from='resume')


def test_eval_only_leaves_the_log(tmp_path, run):
    run(max_iters=3)
    before = (tmp_path / 'out/log.csv').read_bytes()
    run(eval_only=True, init_from='resume')
    assert (tmp_path / 'out/log.csv').read_bytes() == before

# -----------------------------------------------------------------------------
# Weights & Biases

LETTERS = {'kind': 'char', 'itos': [chr(65 + i) for i in range(40)]}


@pytest.fixture
def wandb_run(monkeypatch):
    """ What wandb receives: its init() and its logged values. """
    wandb = pytest.importorskip('wandb')
    run = SimpleNamespace(started=[], logged=[])

    def init(**arguments):
        run.started.append(arguments)
        return SimpleNamespace(log=run.logged.append, define_metric=lambda *args, **options: None)
    monkeypatch.setattr(wandb, 'init', init)
    return run


def test_wandb_run(make_log, wandb_run, monkeypatch):
    make_log(wandb_log=True)
    monkeypatch.setenv('WANDB_RUN_ID', 'theirs')  # of a run that another script began
    make_log(wandb_log=True)
    monkeypatch.setattr(log_module, 'is_first_process', lambda: False)
    make_log(wandb_log=True)
    first, second = wandb_run.started
    assert (first['project'], first['name'], first['resume']) == ('project', 'run', 'allow')
    assert first['config']['fsdp'] is False
    assert (first['id'], second['id']) == ('id', 'theirs')


@pytest.mark.parametrize('tokenizer, val_loss, fsdp, has_samples', [
    pytest.param(LETTERS, 2.0, False, True, id='samples'),
    pytest.param(LETTERS, math.inf, False, False, id='a loss that is not finite'),
    pytest.param(None, 2.0, False, False, id='no tokenizer'),
    pytest.param({'kind': 'gpt2'}, 2.0, False, False, id='no network for the tokenizer'),
    pytest.param(LETTERS, 2.0, True, False, id='a part of a model'),
])
def test_wandb_receives_evaluations_and_samples(make_log, wandb_run, tiny, monkeypatch, tokenizer,
                                                val_loss, fsdp, has_samples):
    get_tokenizer = log_module.get_tokenizer

    def get_tokenizer_offline(spec):
        if spec['kind'] == 'gpt2':
            raise OSError('no network')
        return get_tokenizer(spec)
    monkeypatch.setattr(log_module, 'get_tokenizer', get_tokenizer_offline)
    log = make_log(tokenizer, wandb_log=True, eval_only=True, fsdp=fsdp)
    losses = {'train': 1.0, 'val': val_loss}
    log.add_evaluation(3, losses, lr=0.1, mfu=0.3, model=tiny, ids=torch.arange(20))
    values, = wandb_run.logged
    samples = values.pop('samples', None)
    assert values == {'iter': 3, 'lr': 0.1, 'mfu': 30.0, 'train/loss': 1.0, 'val/loss': val_loss}
    assert (samples is not None) == has_samples
    if has_samples:
        assert [(number, len(text)) for number, text in samples.data] == [(3, 100)] * 3
    assert all(module.training for module in tiny.modules())  # dropout is on again


@pytest.mark.parametrize('error', ['UsageError', 'AuthenticationError', 'CommError'])
def test_wandb_cannot_start(make_log, wandb_run, monkeypatch, error):
    """ For example without a login and without a terminal that could ask for one. """
    import wandb

    def init(**arguments):
        raise getattr(wandb.errors, error)('No API key configured.')
    monkeypatch.setattr(wandb, 'init', init)
    with pytest.raises(UserError, match='No API key configured. .*wandb login.*WANDB_MODE=offline'):
        make_log(wandb_log=True)


def test_wandb_chooses_a_name(make_log, wandb_run):
    make_log(wandb_log=True, wandb_run_name='')
    assert wandb_run.started[0]['name'] is None


def test_wandb_of_a_run(wandb_run, run):
    run(max_iters=2, wandb_log=True)
    keys = {'iter', 'train/loss', 'val/loss', 'lr', 'mfu', 'samples'}
    assert [set(values) for values in wandb_run.logged] == [keys] * 2
    assert [values['iter'] for values in wandb_run.logged] == [0, 2]


@pytest.mark.slow
def test_wandb_offline(tmp_path, dataset):
    """ A resumed run is the same run of wandb. """
    pytest.importorskip('wandb')
    train(tmp_path, dataset, max_iters=2, wandb_log=True)
    train(tmp_path, dataset, max_iters=4, wandb_log=True, init_from='resume')
    run_id = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)['run_id']
    assert len(list((tmp_path / 'wandb').glob(f'offline-run-*-{run_id}'))) == 2

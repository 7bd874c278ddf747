""" Several processes: the same numbers as one process, failures, signals, restarts by torchrun. """
import csv
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT, SMALL, flags, run, run_script, train
from kill_and_resume import differences
from processes import LONG, read_until, run_first, start_training, worker_pids

from components import distributed
from components.checkpoint import load_checkpoint
from components.distributed import Job
from components.metrics import Timer

SHARED = dict(gradient_accumulation_steps=4, dropout=0.1, eval_iters=-1)
PRINTED_DIGITS = 1.01e-4  # losses are printed with four digits, and sums are in another order

needs_forks = pytest.mark.skipif(
    sys.platform != 'linux', reason='torchrun has exit codes of its own')
needs_signals = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')

# -----------------------------------------------------------------------------
# the same numbers as one process


@pytest.fixture(scope='module')
def single_process(tmp_path_factory, dataset):
    """ A run in one process -> what train() returns. """
    return train(tmp_path_factory.mktemp('single'), dataset, **SHARED)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 3, 4])  # 3: of four micro-batches, one has two
def test_losses_equal_one_process(tmp_path, dataset, single_process, processes):
    expected_losses, expected_evaluations, _ = single_process
    losses, evaluations, out = train(tmp_path, dataset, processes=processes, **SHARED)
    assert f'{processes} processes over gloo' in out
    assert len(losses) == 20
    assert losses == pytest.approx(expected_losses, abs=PRINTED_DIGITS)
    assert list(evaluations) == list(expected_evaluations)
    for number, pair in expected_evaluations.items():
        assert evaluations[number] == pytest.approx(pair, abs=PRINTED_DIGITS)


@pytest.mark.slow
def test_resume_in_another_number_of_processes(tmp_path, dataset, single_process):
    expected_losses, expected_evaluations, _ = single_process
    first, _, _ = train(tmp_path, dataset, processes=2, max_iters=10, **SHARED)
    rest, evaluations, _ = train(tmp_path, dataset, processes=3, init_from='resume', **SHARED)
    assert min(rest) == 10
    assert {**first, **rest} == pytest.approx(expected_losses, abs=PRINTED_DIGITS)
    assert evaluations[20] == pytest.approx(expected_evaluations[20], abs=PRINTED_DIGITS)


@pytest.mark.slow
def test_resume_of_three_processes_is_bit_identical(tmp_path, dataset):
    settings = dict(gradient_accumulation_steps=3, processes=3, n_embd=32)
    train(tmp_path, dataset, **settings, out_dir='uninterrupted')
    train(tmp_path, dataset, **settings, max_iters=10)
    train(tmp_path, dataset, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


@pytest.mark.slow
def test_newer_architecture_and_muon(tmp_path, dataset):
    settings = dict(rotary=True, rmsnorm=True, qk_norm=True, untied=True, muon_lr=0.02,
                    cooldown_iters=10, gradient_accumulation_steps=2)
    one, _, out_of_one = train(tmp_path, dataset, out_dir='one', **settings)
    two, _, out_of_two = train(tmp_path, dataset, out_dir='two', processes=2, **settings)
    assert two == pytest.approx(one, abs=PRINTED_DIGITS)
    norms_of_one = grad_norms(out_of_one)
    norms_of_two = grad_norms(out_of_two)
    assert len(norms_of_one) == 20
    assert norms_of_two == pytest.approx(norms_of_one, abs=1e-3)


def grad_norms(out):
    return [float(norm) for norm in re.findall(r'grad norm (\S+)', out)]


COMPUTES_IN_PARTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
from components.distributed import compute_in_parts

counts = []

def square(rows):
    counts.append(len(rows))
    return rows ** 2

dist.init_process_group('gloo')
batch = torch.arange(10.).view(5, 2)
assert torch.equal(compute_in_parts(square, batch), batch ** 2)
print(f'computed {{counts}} rows\\n', end='', flush=True)
dist.barrier()  # while a process is still connecting, another one's end would abort it
os._exit(0)
"""


@pytest.mark.parametrize('processes, num_rows', [(2, 3), (4, 2), (6, 1), (11, 5)])
def test_processes_share_the_rows_of_a_batch(tmp_path, processes, num_rows):
    script = tmp_path / 'script.py'
    script.write_text(COMPUTES_IN_PARTS)
    out, _ = run(script, cwd=tmp_path, processes=processes)
    assert out.count(f'computed [{num_rows}] rows') == out.count('computed') == processes


def test_mfu_counts_the_share_of_one_process(tmp_path, dataset, script_globals, monkeypatch):
    """ This process believes to be the first of two, and computes alone. """
    def join(backend, rank, world_size, dtype):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Job()
    variables = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, 'init_process_group', join)
    monkeypatch.setattr(distributed, 'shut_down', lambda code: dist.destroy_process_group())
    monkeypatch.setattr(Timer, 'PEAK_MEASUREMENTS', 1)
    names = script_globals('train.py', **{**SMALL, 'dataset': dataset, 'max_iters': 6,
                                          'gradient_accumulation_steps': 2, 'eval_interval': 0})
    with open(tmp_path / 'out/log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    tokens_per_second = float(rows[5]['tokens_per_second']) / 2  # of one process
    flops = tokens_per_second * names['raw_model'].flops_per_token(16)
    assert float(rows[5]['mfu']) == pytest.approx(flops / names['timer'].peak, rel=1e-4)

# -----------------------------------------------------------------------------
# the start of a job


@pytest.mark.parametrize('backend, device_type, has_nccl, expected', [
    ('auto', 'cpu', True, 'gloo'),
    ('auto', 'cuda', True, 'nccl'),
    ('auto', 'cuda', False, 'gloo'),
    ('gloo', 'cuda', True, 'gloo'),
])
def test_choose_backend(monkeypatch, backend, device_type, has_nccl, expected):
    monkeypatch.setattr(dist, 'is_nccl_available', lambda: has_nccl)
    assert distributed.choose_backend(backend, device_type) == expected


@pytest.mark.slow
def test_jobs_have_different_names(tmp_path, dataset):
    settings = dict(gradient_accumulation_steps=2, max_iters=2)
    names = set()
    for out_dir in ('a', 'b', 'c'):
        train(tmp_path, dataset, processes=2, out_dir=out_dir, **settings)
        names.add(load_checkpoint(tmp_path / out_dir / 'ckpt.pt')['job'])
    assert len(names) == 3
    assert '' not in names


def test_single_process_has_no_job_name(tmp_path, dataset):
    train(tmp_path, dataset, max_iters=2)
    assert load_checkpoint(tmp_path / 'out/ckpt.pt')['job'] == ''


@pytest.mark.slow
def test_more_processes_than_micro_batches(tmp_path, dataset):
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 1}
    _, error = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    for line in error.splitlines():
        assert re.match('train.py: gradient_accumulation_steps=1 .*processes, 2', line)


def test_incomplete_variables_of_torchrun(tmp_path, dataset, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    _, error = run('train.py', cwd=tmp_path, code=1, **{**SMALL, 'dataset': dataset})
    assert re.fullmatch(r'train.py: .*WORLD_SIZE.*\n', error)


@pytest.mark.slow
def test_processes_with_different_dtypes(tmp_path, dataset, monkeypatch):
    """ As two machines that select different dtypes. """
    run_first("""
import os
from components import device
device.default_dtype = lambda *args: ('float16', 'bfloat16')[int(os.environ['RANK'])]
""", tmp_path, monkeypatch)
    settings = {**SMALL, 'dataset': dataset, 'gradient_accumulation_steps': 2, 'dtype': 'auto'}
    _, error = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    assert re.search('^train.py: dtype=bfloat16 .*float16 .*--dtype', error, re.MULTILINE)
    assert 'Traceback' not in error

# -----------------------------------------------------------------------------
# the end of a job


@pytest.mark.slow
@needs_forks
def test_process_that_is_killed(tmp_path, dataset, monkeypatch):
    """ The other process ends with one line, and does not wait forever. """
    run_first("""
import os, signal
from components import optim
clip_and_step = optim.clip_and_step
steps = []
def clip_and_die(*args):
    steps.append(args)
    if os.environ['RANK'] == '1' and len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip_and_step(*args)
optim.clip_and_step = clip_and_die
""", tmp_path, monkeypatch)
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2}
    code, out, error = run_script('train.py', flags(settings), tmp_path, processes=2)
    assert code == -signal.SIGKILL
    assert 'iter 4: loss' in out
    assert re.search('^train.py: another process .*', error, re.MULTILINE)
    assert 'Traceback' not in error
    assert not list((tmp_path / 'out').glob('*.pt'))


SIGNAL_IN_FIRST_PROCESS = """
import os, signal
from components import optim
clip_and_step = optim.clip_and_step
steps = []
def clip_and_signal(*args):
    steps.append(args)
    if os.environ['RANK'] == '0' and len(steps) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return clip_and_step(*args)
optim.clip_and_step = clip_and_signal
"""


@pytest.mark.slow
@needs_forks
def test_signal_to_one_process_stops_all(tmp_path, dataset, monkeypatch):
    settings = dict(gradient_accumulation_steps=2, dropout=0.1, max_iters=10)
    train(tmp_path, dataset, processes=2, **settings, out_dir='uninterrupted')
    with monkeypatch.context() as patch:
        run_first(SIGNAL_IN_FIRST_PROCESS, tmp_path, patch)
        out, _ = run('train.py', cwd=tmp_path, processes=2, code=128 + signal.SIGTERM,
                     **{**SMALL, 'dataset': dataset, **settings})
    assert out.count('stopped by SIGTERM at iteration 7') == 1
    train(tmp_path, dataset, processes=2, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


@pytest.mark.slow
@needs_forks
def test_no_process_ends_before_the_save_of_another(tmp_path, dataset, monkeypatch):
    """ Once one has ended, torchrun sends a signal to the others: to them, it is the second. """
    run_first(SIGNAL_IN_FIRST_PROCESS + """
import time, torch
from components import signals
signals.GRACE_SECONDS = 0
save = torch.save
def save_slowly(*args):
    time.sleep(1)
    save(*args)
torch.save = save_slowly
""", tmp_path, monkeypatch)
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2}
    out, _ = run('train.py', cwd=tmp_path, processes=2, code=128 + signal.SIGTERM, **settings)
    assert 'stopped by SIGTERM' in out
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] == 7


@pytest.mark.slow
@needs_forks
def test_end_after_skipped_updates(tmp_path, dataset):
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2,
                'max_bad_steps': 2, 'decay_lr': False, 'learning_rate': 1e30}
    _, error = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    assert 'stopped at iteration 2: 2 ' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize('exit_code', [0, 1, 143])
def test_shut_down_of_a_single_process(monkeypatch, exit_code):
    finished = []
    wandb = SimpleNamespace(finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    ended_with = 0
    try:
        distributed.shut_down(exit_code)
    except SystemExit as stopped:
        ended_with = stopped.code
    assert ended_with == exit_code
    assert finished == [True]

# -----------------------------------------------------------------------------
# torchrun itself


@pytest.mark.slow
@needs_signals
def test_signal_to_torchrun(tmp_path, dataset):
    settings = dict(LONG, gradient_accumulation_steps=2)
    process = start_training(tmp_path, dataset, ['--nproc_per_node=2'], **settings)
    read_until(process, 'iter 5:')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.count('stopped by SIGTERM') == 1
    assert out.count('saving checkpoint to out') == 1
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] > 5


@pytest.mark.slow
@needs_signals
def test_restart_by_torchrun(tmp_path, dataset):
    """ After a process was killed, new ones resume the latest checkpoint of their job. """
    settings = dict(max_iters=300, lr_decay_iters=300, eval_interval=50, checkpoint_interval=7,
                    gradient_accumulation_steps=2)
    torchrun = ['--nproc_per_node=2', '--max-restarts=1']
    process = start_training(tmp_path, dataset, torchrun, **settings)
    read_until(process, 'iter 20:')
    os.kill(worker_pids(process)[-1], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert 'resuming out/ckpt.pt at iteration' in out
    train(tmp_path, dataset, processes=2, out_dir='uninterrupted', **settings)
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')

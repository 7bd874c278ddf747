""" Several processes: the same numbers as one process, failures, signals, restarts by torchrun. """
import csv
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import FAST, ROOT, SMALL, flags, run, run_script, train
from kill_and_resume import differences
from processes import LONG, read_until, run_first, start_training, worker_pids

from components import distributed
from components.checkpoint import load_checkpoint
from components.errors import UserError
from model import GPT, GPTConfig

SHARED = dict(gradient_accumulation_steps=4, dropout=0.1, eval_iters=-1)
PRINTED_DIGITS = 1.01e-4  # losses are printed with four digits, and sums are in another order

needs_forks = pytest.mark.skipif(
    sys.platform != 'linux', reason='torchrun has exit codes of its own')
needs_signals = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')

# -----------------------------------------------------------------------------
# the same numbers as one process


@pytest.mark.slow
def test_losses_equal_one_process(tmp_path, dataset):
    """ With two processes, resumed by three, of which one has two of the four micro-batches. """
    expected_losses, expected_evaluations, _ = train(tmp_path, dataset, **SHARED, out_dir='one')
    losses, evaluations, out = train(tmp_path, dataset, processes=2, max_iters=10, **SHARED)
    assert '2 processes over gloo' in out
    rest = train(tmp_path, dataset, processes=3, init_from='resume', **SHARED)
    assert min(rest[0]) == 10
    assert {**losses, **rest[0]} == pytest.approx(expected_losses, abs=PRINTED_DIGITS)
    for number, pair in {**evaluations, **rest[1]}.items():
        assert pair == pytest.approx(expected_evaluations[number], abs=PRINTED_DIGITS)
    jobs = [load_checkpoint(tmp_path / name / 'ckpt.pt')['job'] for name in ('one', 'out')]
    assert jobs[0] == ''
    assert jobs[1] != ''


@pytest.mark.slow
def test_resume_of_three_processes_is_bit_identical(tmp_path, dataset):
    settings = dict(gradient_accumulation_steps=3, processes=3, n_embd=32)
    train(tmp_path, dataset, **settings, out_dir='uninterrupted')
    train(tmp_path, dataset, **settings, max_iters=10)
    train(tmp_path, dataset, **settings, init_from='resume')
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')
    names = [load_checkpoint(tmp_path / name / 'ckpt.pt')['job']
             for name in ('out', 'uninterrupted')]
    assert names[0] != names[1]


WATCH_DDP = """
from components import device
from torch.nn.parallel import DistributedDataParallel as DDP
device.measure_peak = lambda device_type, dtype: 1e9
forward = DDP.forward

def watched_forward(self, *args, **settings):
    if self.training:
        print(f'exchanges: {self.require_backward_grad_sync}\\n', end='', flush=True)
    return forward(self, *args, **settings)

def fail(*args, **settings):
    raise AssertionError('buffers are constant')

DDP.forward = watched_forward
DDP._sync_buffers = fail
"""


@pytest.mark.slow
def test_fast_settings(tmp_path, dataset, monkeypatch):
    """ Gradients are exchanged once an iteration, and MFU counts the work of one process. """
    settings = dict(FAST, gradient_accumulation_steps=4)
    one, _, out_of_one = train(tmp_path, dataset, out_dir='one', **settings)
    run_first(WATCH_DDP, tmp_path, monkeypatch)
    two, _, out_of_two = train(tmp_path, dataset, processes=2, **settings)
    assert two == pytest.approx(one, abs=PRINTED_DIGITS)
    norms, norms_of_one = [[float(norm) for norm in re.findall(r'grad norm (\S+)', out)]
                           for out in (out_of_two, out_of_one)]
    assert len(norms) == 20
    assert norms == pytest.approx(norms_of_one, abs=1e-3)
    # the pass that warms up DDP, then two micro-batches of each process
    assert out_of_two.count('exchanges: True') == 2 * (1 + 20)
    assert out_of_two.count('exchanges: False') == 2 * 20

    with open(tmp_path / 'out/log.csv', newline='') as file:
        row = list(csv.DictReader(file))[5]  # the first with an MFU
    model = GPT(GPTConfig(**load_checkpoint(tmp_path / 'out/ckpt.pt')['model_args']))
    flops = float(row['tokens_per_second']) / 2 * model.flops_per_token(16)
    assert float(row['mfu']) == pytest.approx(flops / 1e9, rel=1e-3)


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


@pytest.mark.parametrize('processes, num_rows', [(2, 3), (11, 5)])
def test_processes_share_the_rows_of_a_batch(tmp_path, processes, num_rows):
    script = tmp_path / 'script.py'
    script.write_text(COMPUTES_IN_PARTS)
    out, _ = run(script, cwd=tmp_path, processes=processes)
    assert out.count(f'computed [{num_rows}] rows') == out.count('computed') == processes

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


@pytest.mark.parametrize('device, local_rank, num_gpus, expected', [
    ('cuda', '2', 4, 'cuda:2'),
    ('cuda', '2', 1, 'cuda:0'),  # each process sees its own GPU
    ('cuda:1', None, 4, 'cuda:1'),
    ('cpu', '2', 0, 'cpu'),
])
def test_device_of_process(monkeypatch, device, local_rank, num_gpus, expected):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    if local_rank is not None:
        monkeypatch.setenv('LOCAL_RANK', local_rank)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: num_gpus)
    assert distributed.device_of_process(device) == expected


def test_processes_with_one_gpu(monkeypatch):
    """ NCCL would end with a traceback. """
    store = dist.HashStore()
    monkeypatch.setattr(dist, 'rendezvous', lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **settings: None)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda gpu: SimpleNamespace(uuid='a'))
    monkeypatch.setenv('RANK', '0')
    distributed.init_process_group('nccl', 0, 2, 'bfloat16')
    with pytest.raises(UserError, match='processes 0 and 1 have the same GPU'):
        distributed.init_process_group('nccl', 1, 2, 'bfloat16')


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

# -----------------------------------------------------------------------------
# the end of a job


# {rank}: of the process; its sixth step is preceded by {signal}
SIGNAL_TO_ONE_PROCESS = """
import os, signal
from components import optim
clip_and_step = optim.clip_and_step
steps = []
def clip_and_signal(*args):
    steps.append(args)
    if os.environ['RANK'] == '{rank}' and len(steps) == 6:
        os.kill(os.getpid(), signal.{signal})
    return clip_and_step(*args)
optim.clip_and_step = clip_and_signal
"""


@pytest.mark.slow
@needs_forks
def test_process_that_is_killed(tmp_path, dataset, monkeypatch):
    """ The other process does not wait forever. """
    run_first(SIGNAL_TO_ONE_PROCESS.format(rank=1, signal='SIGKILL'), tmp_path, monkeypatch)
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2}
    code, out, _ = run_script('train.py', flags(settings), tmp_path, processes=2)
    assert code == -signal.SIGKILL
    assert 'iter 4: loss' in out
    assert not list((tmp_path / 'out').glob('*.pt'))


@pytest.mark.slow
@needs_forks
def test_signal_to_one_process_stops_all(tmp_path, dataset, monkeypatch):
    settings = dict(gradient_accumulation_steps=2, dropout=0.1, max_iters=10)
    train(tmp_path, dataset, processes=2, **settings, out_dir='uninterrupted')
    with monkeypatch.context() as patch:
        run_first(SIGNAL_TO_ONE_PROCESS.format(rank=0, signal='SIGTERM'), tmp_path, patch)
        out, _ = run('train.py', cwd=tmp_path, processes=2, code=128 + signal.SIGTERM,
                     **{**SMALL, 'dataset': dataset, **settings})
    assert out.count('stopped by SIGTERM at iteration ') == 1
    losses, _, _ = train(tmp_path, dataset, processes=2, **settings, init_from='resume')
    assert 5 < min(losses) < 10
    assert not differences(tmp_path / 'out', tmp_path / 'uninterrupted')


@pytest.mark.slow
@needs_forks
def test_no_process_ends_before_the_save_of_another(tmp_path, dataset, monkeypatch):
    """ Once one has ended, torchrun sends a signal to the others: to them, it is the second. """
    run_first(SIGNAL_TO_ONE_PROCESS.format(rank=0, signal='SIGTERM') + """
import time, torch
from components import stopping
stopping.GRACE_SECONDS = 0
save = torch.save
def save_slowly(*args):
    time.sleep(1)
    save(*args)
torch.save = save_slowly
""", tmp_path, monkeypatch)
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2}
    run('train.py', cwd=tmp_path, processes=2, code=128 + signal.SIGTERM, **settings)
    assert load_checkpoint(tmp_path / 'out/ckpt_last.pt')['iter_num'] > 5


@pytest.mark.slow
@needs_forks
def test_end_after_skipped_steps(tmp_path, dataset):
    settings = {**SMALL, **LONG, 'dataset': dataset, 'gradient_accumulation_steps': 2,
                'max_skipped_steps': 2, 'decay_lr': False, 'learning_rate': 1e30}
    out, _ = run('train.py', cwd=tmp_path, processes=2, code=1, **settings)
    assert re.search('^stopped after 2 skipped steps .*NOT SAVED', out, re.MULTILINE)


@pytest.mark.parametrize('exit_code', [0, 143])
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


@pytest.mark.slow
@needs_signals
def test_restart_and_signal_by_torchrun(tmp_path, dataset):
    """ After a process was killed, new ones resume the latest checkpoint of their job. """
    settings = dict(LONG, gradient_accumulation_steps=2)
    torchrun = ['--nproc_per_node=2', '--max-restarts=1']
    process = start_training(tmp_path, dataset, torchrun, checkpoint_interval=7, **settings)
    read_until(process, 'iter 20:')
    os.kill(worker_pids(process)[-1], signal.SIGKILL)
    read_until(process, 'resuming out/ckpt_last.pt at iteration')
    read_until(process, 'iter 40:')
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.count('stopped by SIGTERM') == 1
    checkpoint = load_checkpoint(tmp_path / 'out/ckpt_last.pt')

    settings['max_iters'] = checkpoint['iter_num']
    train(tmp_path, dataset, processes=2, out_dir='uninterrupted', **settings)
    expected = load_checkpoint(tmp_path / 'uninterrupted/ckpt_last.pt')
    for key in ('model', 'optimizer'):
        torch.testing.assert_close(checkpoint[key], expected[key], rtol=0, atol=0)

"""
Two machines without a shared disk, each a network namespace with its own copy of the repository and
the dataset, joined by a virtual cable. They are started by the README's command.
"""
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, environment, flags, train
from kill_and_resume import differences
from processes import read_until

ADDRESSES = ('10.77.0.1', '10.77.0.2')
TIMEOUT = 20  # seconds, in place of an hour
RUN = dict(gradient_accumulation_steps=2, max_iters=30, lr_decay_iters=30, init_from='auto')


def has_namespaces():
    """ Whether this user can make network namespaces. """
    if sys.platform != 'linux' or shutil.which('ip') is None:
        return False
    name = f'probe-{os.getpid()}'
    if subprocess.run(['ip', 'netns', 'add', name], capture_output=True).returncode != 0:
        return False
    subprocess.run(['ip', 'netns', 'del', name], check=True)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_namespaces(), reason='requires root and iproute2'),
]


def ip(*arguments):
    subprocess.run(['ip', *arguments], check=True)


class Node:
    """ A machine with its own address and folder. """

    def __init__(self, rank, folder, dataset):
        self.rank = rank
        self.namespace = f'node{rank}-{os.getpid()}'
        self.interface = f'cable{rank}'
        self.folder = folder
        left_out = shutil.ignore_patterns('.*', 'out*', '*.bin', '*.pkl', '__pycache__',
                                          'input.txt')
        shutil.copytree(ROOT, folder, ignore=left_out)
        shutil.copytree(dataset, folder / 'data/words')

    def start(self, **settings):
        """ Starts the README's command -> subprocess.Popen. """
        torchrun = ['-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={self.rank}',
                    '--nproc_per_node=1', f'--master_addr={ADDRESSES[0]}', '--master_port=1234']
        settings = {**SMALL, **RUN, 'dataset': 'words', **settings}
        command = ['ip', 'netns', 'exec', self.namespace, sys.executable, *torchrun, 'train.py',
                   *flags(settings)]
        # the first: the name of this machine means an address that the other cannot reach
        env = {**environment(), 'GLOO_SOCKET_IFNAME': self.interface,
               'PYTHONPATH': str(self.folder / 'site')}
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True,
                                start_new_session=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def set_link(self, state):
        ip('-n', self.namespace, 'link', 'set', self.interface, state)


@pytest.fixture
def nodes(tmp_path, dataset):
    """ Two machines that are connected. """
    nodes = [Node(rank, tmp_path / f'node{rank}', dataset) for rank in range(2)]
    for node in nodes:
        ip('netns', 'add', node.namespace)
    ip('link', 'add', nodes[0].interface, 'netns', nodes[0].namespace, 'type', 'veth',
       'peer', 'name', nodes[1].interface, 'netns', nodes[1].namespace)
    for node in nodes:
        ip('-n', node.namespace, 'address', 'add', f'{ADDRESSES[node.rank]}/24', 'dev',
           node.interface)
        node.set_link('up')
        ip('-n', node.namespace, 'link', 'set', 'lo', 'up')
    yield nodes
    for node in nodes:
        ip('netns', 'del', node.namespace)


def finish(processes):
    """ Waits for all -> [(exit code, standard output, standard error), ...]. """
    results = []
    for process in processes:
        out, error = process.communicate(timeout=300)
        results.append((process.returncode, out, error))
    return results


@pytest.mark.parametrize('fsdp', [False, True])
def test_two_machines_equal_one_process(tmp_path, dataset, nodes, fsdp):
    expected, _, _ = train(tmp_path, dataset, **RUN)
    # the second run resumes, which the second machine can do without a checkpoint
    for max_iters in (15, 30):
        results = finish([node.start(fsdp=fsdp, max_iters=max_iters) for node in nodes])
        assert [code for code, _, _ in results] == [0, 0], results
    _, out, _ = results[0]
    assert 'resuming' in out
    assert not (nodes[1].folder / 'out').exists()
    shutil.copytree(nodes[0].folder / 'out', tmp_path / 'two')
    rows = (tmp_path / 'two/log.csv').read_text().splitlines()[1:]
    losses = [float(row.split(',')[3]) for row in rows]
    assert losses[:30] == pytest.approx([expected[i] for i in range(30)], abs=1e-4)


def test_dataset_that_differs(nodes):
    path = nodes[1].folder / 'data/words/val.bin'
    path.write_bytes(path.read_bytes()[:-2])
    results = finish([node.start() for node in nodes])
    _, _, error = results[1]
    assert 'train.py: ' + str(path) + ' on this machine differs' in error
    assert not (nodes[0].folder / 'out').exists()


def test_link_that_is_cut(tmp_path, nodes):
    settings = dict(max_iters=100, checkpoint_interval=10, eval_interval=0)
    for node in nodes:
        site = node.folder / 'site'
        site.mkdir()
        (site / 'sitecustomize.py').write_text(
            f'import sys\nsys.path.insert(0, {str(node.folder)!r})\n'
            'from datetime import timedelta\nfrom components import distributed\n'
            f'distributed.TIMEOUT = timedelta(seconds={TIMEOUT})\n')
    processes = [node.start(**{**settings, 'max_iters': 100_000}) for node in nodes]
    read_until(processes[0], 'iter 55:')
    nodes[1].set_link('down')
    _, error = processes[0].communicate(timeout=4 * TIMEOUT)
    lines = [line for line in error.splitlines() if 'train.py: ' in line]
    assert len(lines) == 1, error
    assert 'another process of this job has ended' in lines[0]
    os.killpg(processes[1].pid, signal.SIGKILL)
    processes[1].communicate()

    nodes[1].set_link('up')
    results = finish([node.start(**settings) for node in nodes])
    _, out, _ = results[0]
    assert 'resuming out/ckpt.pt at iteration ' in out
    shutil.move(nodes[0].folder / 'out', tmp_path / 'resumed')
    finish([node.start(**settings) for node in nodes])  # from the start
    assert not differences(tmp_path / 'resumed', nodes[0].folder / 'out')

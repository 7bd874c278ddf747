"""
Two machines without a shared disk, each a network namespace with its own copy of the repository and
the dataset, joined by a virtual cable. They are started by the README's command.
"""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, environment, flags, train

ADDRESSES = ('10.77.0.1', '10.77.0.2')
RUN = dict(gradient_accumulation_steps=2)


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
        env = {**environment(), 'GLOO_SOCKET_IFNAME': self.interface}
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True,
                                start_new_session=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)


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
        ip('-n', node.namespace, 'link', 'set', node.interface, 'up')
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


def test_two_machines_continue_a_run_of_one_process(tmp_path, dataset, nodes):
    """ One of them has the checkpoint. With FSDP, the other has a half of the parameters. """
    expected, _, _ = train(tmp_path, dataset, **RUN)
    train(nodes[0].folder, dataset, **RUN, max_iters=10)
    processes = [node.start(fsdp=True, init_from='resume') for node in nodes]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not (nodes[1].folder / 'out').exists()
    rows = (nodes[0].folder / 'out/log.csv').read_text().splitlines()[1:]
    losses = [float(row.split(',')[3]) for row in rows]
    assert losses[:20] == pytest.approx([expected[i] for i in range(20)], abs=1e-4)

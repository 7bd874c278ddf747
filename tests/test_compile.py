"""
torch.compile: all blocks share a graph, lm_head and the loss are another, and each is compiled once
for training and once for evaluation. (The variants of bench.py are in test_bench.py.)
"""
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_MODEL, ROOT, SMALL, environment, flags
from torch._dynamo.utils import counters

from components import functional
from components import settings as settings_module
from components.device import compile_model, missing_for_compile
from model import GPT, GPTConfig

SIZES = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=False)


@pytest.fixture
def graphs(monkeypatch):
    """ The graphs that torch.compile compiles from here on. """
    torch._dynamo.reset()
    counters.clear()
    graphs = Graphs()
    compile = partial(torch.compile, backend=graphs.backend, fullgraph=True)
    monkeypatch.setattr(torch, 'compile', compile)
    yield graphs
    torch._dynamo.reset()


class Graphs(list):

    def backend(self, graph, inputs):
        """ Forward and backward pass are traced as for a GPU, and run without code generation. """
        self.append(graph)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)


def new_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, (3, 17), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def train_and_evaluate(args, dtype, compile):
    """ Alternates training and evaluation of a new model; yields the loss after each. """
    torch.manual_seed(0)
    model = compile_model(GPT(GPTConfig(**{**SIZES, **args})), compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)  # of dropout
    for step in range(8):
        training = step % 4 < 2
        model.train(training)
        with (torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'),
              torch.set_grad_enabled(training)):
            _, loss = model(*new_batch(step), return_logits=False)
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % 2 == 1:
            yield loss.item()


@pytest.mark.slow
@pytest.mark.parametrize('args, dtype, tolerance', [
    pytest.param(dict(), 'float32', 1e-4, id='default'),
    pytest.param(FAST_MODEL, 'bfloat16', 1e-2, id='fast'),
    pytest.param(dict(dropout=0.1), 'bfloat16', 1e-2, id='dropout'),
])
def test_two_graphs_to_train_and_two_to_evaluate(args, dtype, tolerance, graphs, monkeypatch):
    """ For any number of blocks: that of a block, and that of lm_head and the loss. """
    # the same random numbers with torch.compile and without
    monkeypatch.setattr(functional, 'dropout', F.dropout)
    args = dict(args, n_layer=3)
    expected = list(train_and_evaluate(args, dtype, compile=False))
    losses = []
    num_graphs = []
    for loss in train_and_evaluate(args, dtype, compile=True):
        losses.append(loss)
        num_graphs.append(len(graphs))
    assert losses == pytest.approx(expected, abs=tolerance)
    assert num_graphs == [2, 4, 4, 4]


@pytest.mark.slow
def test_graph_of_the_loss(graphs, monkeypatch):
    """
    It has no chunks. Logits are not an output: they would stay in memory, and the backward pass
    would get zeros of their size.
    """
    monkeypatch.setattr(functional, 'MAX_LOGITS', 100)
    model = compile_model(GPT(GPTConfig(**SIZES)), True)
    model(*new_batch(0), return_logits=False)
    losses = graphs[1].graph.find_nodes(op='call_function', target=F.cross_entropy)
    assert len(losses) == 1
    output, = graphs[1].graph.find_nodes(op='output')
    shapes = [node.meta['example_value'].shape for node in output.args[0]]
    assert shapes == [()]


@pytest.mark.slow
@pytest.mark.parametrize('settings, expected', [
    pytest.param(dict(eval_iters=-1), 4, id='default'),
    pytest.param(dict(dropout=0.1, dtype='bfloat16', muon_lr=0.02, **FAST_MODEL), 8, id='fast'),
])
def test_number_of_graphs_of_a_run(settings, expected, graphs, script_globals, dataset,
                                   monkeypatch):
    """ With evaluations, samples for wandb, accumulated gradients, and Muon for four shapes. """
    wandb = pytest.importorskip('wandb')
    wandb_run = SimpleNamespace(define_metric=lambda *args, **settings: None, log=lambda row: None)
    monkeypatch.setattr(wandb, 'init', lambda **settings: wandb_run)
    monkeypatch.setattr(settings_module, 'missing_for_compile', {'cpu': ''}.get)
    script_globals('train.py', **{**SMALL, 'compile': True, 'max_iters': 6, 'eval_interval': 2,
                                  'gradient_accumulation_steps': 2, 'dataset': dataset,
                                  'wandb_log': True, **settings})
    assert len(graphs) == expected
    assert not counters['graph_break']


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compile('cpu')), reason='no C++ compiler')
def test_training_run_with_code_generation(tmp_path, dataset):
    """ As above with torch's default backend: it is compiled again for evaluation alone. """
    settings = {**SMALL, 'compile': True, 'max_iters': 6, 'eval_interval': 2, 'n_layer': 1,
                'dataset': dataset}
    done = subprocess.run(
        [sys.executable, ROOT / 'train.py', *flags(settings)], cwd=tmp_path, text=True,
        env={**environment(), 'TORCH_LOGS': 'recompiles,graph_breaks'}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'iter 5: loss' in done.stdout
    recompiles = re.findall(r'Recompiling function (\w+)', done.stderr)
    assert recompiles == ['forward', 'loss'], done.stderr
    assert 'Graph break' not in done.stderr

"""
An exponential moving average (EMA) of a model's weights. It averages out the noise of single
updates, so that its validation loss is lower while the learning rate is high. (Equal averages do
the same: Polyak and Juditsky 1992; for neural networks arXiv 1803.05407.)

Not here: which of the two sets of weights a checkpoint holds under which key (checkpoint.py).
"""
from contextlib import contextmanager

import torch

from components.distributed import local_part


class EMA:
    """
    Averages the parameters of a model over its updates. The averages begin with the parameters
    that the model has now.

    Args:
        model: the GPT, on its device, sharded if it will be
        decay: share of the average that stays at each update, such as 0.99; 0 for no average, with
            which no method does anything

    Attributes:
        averages: {name: tensor}, empty without an average
    """

    def __init__(self, model, decay):
        self.model = model
        self.decay = decay
        self.params = {}
        if decay > 0:
            self.params = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, iter_num):
        """
        Adds the weights after update `iter_num`. The first updates count more, as in TensorFlow's
        ExponentialMovingAverage with num_updates.
        """
        if not self.params:
            return
        decay = min(self.decay, (1 + iter_num) / (10 + iter_num))
        params = [local_part(p) for p in self.params.values()]
        averages = [local_part(average) for average in self.averages.values()]
        torch._foreach_lerp_(averages, params, 1 - decay)

    @contextmanager
    def applied(self):
        """ The model has the averages as its weights within the `with` block. """
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """ Exchanges the parameters of the model and the averages. """
        for name, p in self.params.items():
            param = local_part(p)
            average = local_part(self.averages[name])
            old_param = param.clone()
            param.copy_(average)
            average.copy_(old_param)
        if hasattr(self.model, 'reshard'):
            self.model.reshard()

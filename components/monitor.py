"""
What every update reports: its loss, the norm of its gradients, whether it was skipped, and whether
any process of the job has received a signal to stop.

Not here: the update itself (optim.py), the signals of this process (signals.py).
"""
import math

import torch

from components.device import HostCopy
from components.distributed import all_reduce_sum


class StepMonitor:
    """
    Tracks updates without synchronization: on CUDA an update's numbers are read an iteration
    later, when their copy to the host is done, so that the loop never waits for the GPU.

    Args:
        device: of the model
        scaler: the torch.amp.GradScaler
        stop_signal: the StopSignal of this process
        print_master: prints in one process alone
        last_loss: of the update before the first, if the run is resumed

    Attributes:
        is_stopping: whether any process has received a signal
        num_skipped_steps: how many updates in a row were skipped
        checked_iter: iteration of the update that check() looked at
    """

    def __init__(self, device, scaler, stop_signal, print_master, last_loss=None):
        self.device = device
        self.scaler = scaler
        self.stop_signal = stop_signal
        self.print_master = print_master
        self.last_loss = last_loss
        self.last_copy = None
        self.reports = []  # (iteration, HostCopy of loss, signals, gradient norm), oldest first
        self.delay = 1 if device.startswith('cuda') else 0  # iterations
        self.totals = None  # loss and number of signals, of all processes
        self.is_stopping = False
        self.num_skipped_steps = 0
        self.checked_iter = None

    def sum_over_processes(self, loss):
        """ Sums the loss and the signals over all processes in one all-reduce -> the loss. """
        has_signal = float(self.stop_signal.number > 0)
        totals = torch.stack((loss, torch.full((), has_signal, device=self.device)))
        self.totals = all_reduce_sum(totals, self.device)
        return self.totals[0]

    def record(self, iter_num, grad_norm):
        """ Keeps the numbers of an update: the loss, the signals, the norm of the gradients. """
        numbers = torch.stack((*self.totals, grad_norm.float()))
        self.last_copy = HostCopy(numbers)
        self.reports.append((iter_num, self.last_copy))

    def latest(self):
        """ The loss and gradient norm of the latest update; on CUDA this waits for the GPU. """
        loss, _, grad_norm = self.last_copy.tolist()
        return loss, grad_norm

    def latest_loss(self):
        """ The loss of the latest update, which an earlier run may have made; None before any. """
        if self.last_copy is None:
            return self.last_loss
        loss, _ = self.latest()
        return loss

    def check(self):
        """ Looks at the update that is due, and sets `is_stopping` and `num_skipped_steps`. """
        if len(self.reports) <= self.delay:
            return
        self.checked_iter, copy = self.reports.pop(0)
        loss, num_signals, grad_norm = copy.tolist()
        self.is_stopping = num_signals > 0
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite or self.is_finding_scale(loss):
            self.num_skipped_steps = 0
            return
        self.num_skipped_steps += 1
        self.print_master(f'iter {self.checked_iter}: loss {loss}, grad norm {grad_norm}: update '
                          f'skipped, {self.num_skipped_steps} in a row')

    def is_finding_scale(self, loss):
        """ Whether a float16 update was skipped because its scaler is still lowering its scale. """
        if not self.scaler.is_enabled() or not math.isfinite(loss):
            return False
        return self.scaler.get_scale() >= 1  # below 1, the gradients themselves overflow

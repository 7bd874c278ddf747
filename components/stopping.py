"""
When a run ends before max_iters: on a signal to any process of the job, or after too many skipped
steps in a row.

Not here: how a step is skipped (optim.py); early stopping, which is a matter of the validation loss
(train.py).
"""
import math
import os
import signal
import time
from contextlib import suppress

import torch

from components.device import HostCopy
from components.distributed import all_reduce_sum, is_first_process, print_master

# Ctrl-C, the default of kill, Slurm's warning before a time limit, a terminal that closed
SIGNALS = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')
GRACE_SECONDS = 5  # torchrun and Slurm may send one signal twice within moments


class StopConditions:
    """
    Reports after each step whether the run has to end. On CUDA a step's numbers are read an
    iteration later, when their copy to the host is done, so that the loop never waits for the GPU.

    Args:
        device: of the model
        scaler: the torch.amp.GradScaler
        max_skipped_steps: in a row that end the run; 0: never

    Attributes:
        reason: why the run ends, or '' while it goes on
        exit_code: of the process, 0 while the run goes on
    """

    def __init__(self, device, scaler, max_skipped_steps):
        self.device = device
        self.scaler = scaler
        self.max_skipped_steps = max_skipped_steps
        self.signal_number = 0  # of the first signal to this process
        self.signal_time = math.inf
        self.num_skipped_steps = 0  # in a row
        self.unread = []  # (iteration, HostCopy of signals, loss and gradient norm), oldest first
        self.delay = 1 if device.startswith('cuda') else 0  # iterations
        self.reason = ''
        self.exit_code = 0

    def listen(self):
        """
        From now on, a signal ends the run after its iteration and a save. A second signal ends the
        process at once, unless it follows within GRACE_SECONDS. A signal that is ignored, as SIGHUP
        under nohup, stays ignored.
        """
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has only some of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if time.monotonic() - self.signal_time > GRACE_SECONDS:
            os._exit(128 + number)
        if self.signal_number:
            return
        self.signal_number = number
        self.signal_time = time.monotonic()
        if is_first_process():
            # os.write instead of print, which the signal may have interrupted
            name = signal.Signals(number).name
            with suppress(OSError):
                os.write(2, f'{name}: stopping after this iteration or evaluation\n'.encode())

    def after_step(self, iter_num, loss, grad_norm):
        """
        Looks at a step, and sets the attributes if it has to be the last one. All processes call
        this, and all of them end after the same step.

        Args:
            loss: 0-d tensor, of all processes
            grad_norm: 0-d tensor; the step was skipped if it or the loss is not finite
        """
        has_signal = torch.full((), float(self.signal_number > 0), device=self.device)
        num_signals = all_reduce_sum(has_signal, self.device)
        numbers = torch.stack((num_signals, loss, grad_norm.float()))
        self.unread.append((iter_num, HostCopy(numbers)))
        if len(self.unread) <= self.delay:
            return
        iter_num, copy = self.unread.pop(0)
        num_signals, loss, grad_norm = copy.tolist()
        if num_signals > 0:
            # another process may have received it
            number = self.signal_number or signal.SIGTERM
            self.reason = f'stopped by {signal.Signals(number).name}'
            self.exit_code = 128 + number
        self.count_skipped_steps(iter_num, loss, grad_norm)

    def count_skipped_steps(self, iter_num, loss, grad_norm):
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite or self.is_finding_scale(loss):
            self.num_skipped_steps = 0
            return
        self.num_skipped_steps += 1
        print_master(f'iter {iter_num}: loss {loss}, grad norm {grad_norm}: step skipped, '
                     f'{self.num_skipped_steps} in a row')
        if self.num_skipped_steps == self.max_skipped_steps:
            self.reason = f'stopped after {self.num_skipped_steps} skipped steps in a row'
            self.exit_code = 1

    def is_finding_scale(self, loss):
        """ Whether a float16 step was skipped because its scaler is still lowering its scale. """
        if not self.scaler.is_enabled() or not math.isfinite(loss):
            return False
        return self.scaler.get_scale() >= 1  # below 1, the gradients themselves overflow

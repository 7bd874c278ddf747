"""
The time of training and its model FLOPs utilization (MFU).

Not here: the peak that MFU is measured against (device.py).
"""
import time
from contextlib import contextmanager

from components.device import peak_flops, synchronize

WARM_UP_ITERS = 5  # of a process, which are slower


class Clock:
    """
    Counts the seconds of training in `progress`, without evaluations and saves.

    Args:
        progress: the Progress of the run
        device_type: 'cpu', 'cuda' or 'mps'
        dtype: of the run
        flops_per_iter: FLOPs of an iteration in this process

    Attributes:
        first_iter: of this process
        is_paused: whether training waits for an evaluation or a save; watchdog.py reads it
        mfu: the running mean of the MFU, from 0 to 1; -1.0 for the first iterations
    """

    def __init__(self, progress, device_type, dtype, flops_per_iter):
        self.progress = progress
        self.device_type = device_type
        self.flops_per_iter = flops_per_iter
        self.peak, _ = peak_flops(device_type, dtype)
        self.mfu = -1.0
        self.first_iter = progress.iter_num
        self.is_paused = False
        self.last_iter = progress.iter_num  # of the last call of seconds_per_iter()
        self.last_seconds = progress.seconds
        self.start = time.perf_counter()
        self.now = self.start

    def update(self):
        """ Adds the time since the last update to progress.seconds. """
        before = self.now
        self.now = time.perf_counter()
        self.progress.seconds += self.now - before

    @contextmanager
    def paused(self):
        """ Does not count the time of the block. """
        synchronize(self.device_type)
        self.update()
        self.is_paused = True
        yield
        self.now = time.perf_counter()
        self.is_paused = False

    def seconds_per_iter(self, num_iters):
        """
        The mean of the iterations since the last call, which is also added to the MFU. `num_iters`
        is the number of all iterations so far, over all resumes.
        """
        self.update()
        seconds = (self.progress.seconds - self.last_seconds) / (num_iters - self.last_iter)
        is_warm = num_iters - self.first_iter > WARM_UP_ITERS and self.last_iter > self.first_iter
        mfu = self.flops_per_iter / seconds / self.peak
        if is_warm and self.mfu < 0:
            self.mfu = mfu
        elif is_warm:
            self.mfu = 0.9 * self.mfu + 0.1 * mfu
        self.last_iter = num_iters
        self.last_seconds = self.progress.seconds
        return seconds

    def seconds_of_process(self):
        """ All seconds since this process began to train. """
        return time.perf_counter() - self.start

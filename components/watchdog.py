"""
Ends a process of a job in which an iteration takes too long, because it or another process hangs or
has ended: the collectives of the others would wait for it, and torchrun for them.

Not here: signals that end a run after its iteration (stopping.py).
"""
import math
import os
import signal
import socket
import threading
from contextlib import suppress

from components.errors import script_name

SECONDS_PER_ITER = 300     # or more, where iterations are slow
SECONDS_AFTER_SIGNAL = 10  # and three times those of the slowest iteration


class Watchdog:
    """
    A thread that counts the seconds of each iteration. Evaluations and saves may take any time, and
    so may the first iteration, which compiles. Seconds in which this process is suspended do not
    count.

    After a signal there is less time: torchrun sends one to the processes that are left when one
    has ended, and restarts the job only when they have ended, too.

    Args:
        progress: the Progress of the run
        clock: its Clock, which is paused for evaluations and saves
    """

    def __init__(self, progress, clock):
        self.progress = progress
        self.clock = clock
        self.first_iter = progress.iter_num
        self.iter_num = progress.iter_num
        self.seconds = 0  # of this iteration
        self.first = 0    # seconds of the first iteration, which may have compiled
        self.slowest = 0  # seconds of the slowest later one
        self.has_signal = False
        self.is_stopped = False

    def start(self):
        """ Starts the thread, in a job of several processes. """
        if int(os.environ.get('WORLD_SIZE', 1)) == 1:
            return
        # a handler in Python does not run while the main thread waits in a collective
        self.signals, self.writer = socket.socketpair()
        self.signals.settimeout(1)
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()

    def stop(self):
        """ The last iteration is done. """
        self.is_stopped = True

    def watch(self):
        while not self.is_stopped:
            try:
                self.signals.recv(100)
                self.has_signal = True
            except TimeoutError:
                self.add_second()

    def add_second(self):
        """ Counts a second, and ends this process if it is one too many. """
        if self.clock.is_paused:
            self.seconds = 0
            return
        if self.progress.iter_num > self.iter_num:
            if self.iter_num == self.first_iter:
                self.first = self.seconds
            else:
                self.slowest = max(self.slowest, self.seconds)
            self.iter_num = self.progress.iter_num
            self.seconds = 0
        self.seconds += 1
        if self.seconds > self.limit():
            self.end_process()

    def limit(self):
        """ How many seconds this iteration may take. """
        if self.has_signal:
            return SECONDS_AFTER_SIGNAL + 3 * self.slowest
        if self.iter_num == self.first_iter:
            return math.inf
        return max(SECONDS_PER_ITER, 2 * self.first, 10 * self.slowest)

    def end_process(self):
        after = ' after a signal' if self.has_signal else ''
        line = (f'{script_name()}: process {os.environ["RANK"]}: iteration {self.iter_num} has not '
                f'ended in {self.seconds} s{after}; this or another process hangs or has ended\n')
        with suppress(OSError):
            os.write(2, line.encode())
        os._exit(1)

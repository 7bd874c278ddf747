"""
Signals that shut a training run down gracefully: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (Slurm's
before a time limit) and SIGHUP (a terminal that closed).

Not here: the signals of other processes of the job (monitor.py).
"""
import os
import signal
import time
from contextlib import suppress

NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')
GRACE_SECONDS = 5  # torchrun and Slurm may send one signal twice within moments


class StopSignal:
    """
    Notes the first signal in `number`, for the loop to stop when it is ready. A second signal ends
    the process at once, unless it follows within GRACE_SECONDS. A signal that is ignored, as
    SIGHUP under nohup, stays ignored.

    Args:
        is_master: whether this process prints that it has received a signal
    """

    def __init__(self, is_master):
        self.number = 0
        self.is_master = is_master
        self.first_time = 0.0
        self.received = []

    def listen(self):
        """ Begins to note signals, instead of ending at the first one. """
        for name in NAMES:
            number = getattr(signal, name, None)  # Windows has only some of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.first_time > GRACE_SECONDS:
            os._exit(128 + number)
        self.received.append(number)
        if len(self.received) > 1:  # a signal may interrupt this handler at any line
            return
        self.first_time = now
        self.number = number
        if self.is_master:
            # os.write instead of print, which the signal may have interrupted
            message = f'{self.name}: stopping after this iteration or evaluation\n'
            with suppress(OSError):
                os.write(2, message.encode())

    @property
    def name(self):
        """ The name of the signal, for messages. """
        if self.number == 0:
            return 'a signal to another process'
        return signal.Signals(self.number).name

    @property
    def exit_code(self):
        """ The exit code of a process that this signal stopped, as shells report it. """
        if self.number == 0:  # another process received it
            return 128 + signal.SIGTERM
        return 128 + self.number

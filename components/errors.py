"""
Errors that a user can fix, in one line; every other error keeps its traceback.

Not here: the rules for settings (settings.py). Imports nothing of ours.
"""
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """ An error that a user can fix: a bad setting, a missing file, a file in another format. """


def script_name():
    """ The name of the script that runs, for messages. """
    return Path(sys.argv[0]).name


@contextmanager
def one_line_errors():
    """
    Ends the script with one line and exit code 1 where the block raises UserError, or OSError by a
    file that it could not read or write. Any other error is a bug and keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        message = ' '.join(str(error).split())
        sys.exit(f'{script_name()}: {message}')


def is_out_of_memory(error):
    """ Whether memory ran out, of the CPU or of a GPU. """
    import torch  # here, because the prepare scripts do without it
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return 'DefaultCPUAllocator' in str(error)  # torch raises a plain RuntimeError


def is_lost_connection(error):
    """ Whether Gloo has lost another process. It raises a plain RuntimeError. """
    return 'gloo/transport' in str(error)


def how_to_save_memory(settings):
    """ For messages: the flags of a smaller micro-batch, or what else to lower. """
    batch_size = settings['batch_size']
    num_micro_batches = settings['gradient_accumulation_steps']
    for divisor in range(2, batch_size + 1):
        if batch_size % divisor == 0:
            return ('a lower batch_size with a higher gradient_accumulation_steps computes the '
                    f'same iteration: --batch_size={batch_size // divisor} '
                    f'--gradient_accumulation_steps={num_micro_batches * divisor}')
    return 'a lower block_size or a smaller model needs less'


def install_excepthook(settings, ddp):
    """
    Reports memory that ran out, and another process that has ended, in one line. Other errors keep
    their traceback. Also lets Ctrl-C end the script at once, without a traceback.

    Args:
        settings: dict of the script's settings
        ddp: whether the script runs in several processes
    """
    def excepthook(kind, error, trace):
        # sys.__stderr__, because torch.distributed may have replaced sys.stderr by a buffer
        if is_out_of_memory(error):
            text = ' '.join(str(error).split())[:100]
            print(f'{script_name()}: out of memory ({text}); {how_to_save_memory(settings)}',
                  file=sys.__stderr__, flush=True)
        elif is_lost_connection(error):
            print(f'{script_name()}: process {os.environ["RANK"]}: another process has ended or '
                  f'hangs ({error!s:.200})', file=sys.__stderr__, flush=True)
        else:
            traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        if ddp:
            # an orderly shutdown can wait forever for a collective that another process left
            os._exit(1)

    sys.excepthook = excepthook
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell ignores it for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens

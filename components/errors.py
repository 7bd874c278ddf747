"""
Errors that a user can fix, in one line; for every other error a hint below its traceback.

Not here: the rules for settings (settings.py). Imports nothing of ours.
"""
import os
import re
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


# -----------------------------------------------------------------------------
# errors that come later, in the middle of the work

OUT_OF_MEMORY = r"(can't allocate|not enough|out of) memory|Invalid buffer size"
CONNECTION_LOST = r'Connection (closed|reset)|[Bb]roken pipe|[Tt]imed out|NCCL.*(remote|abort)'
UNKNOWN_TOKEN = r'index out of range in self|device-side assert'


def is_out_of_memory(error):
    """ Whether memory ran out, of the CPU or of any kind of GPU. """
    import torch  # here, because the prepare scripts do without it
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)) is not None


def is_connection_lost(error):
    """ Whether another process of the job ended, as torch.distributed reports it. """
    import torch.distributed as dist
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and re.search(CONNECTION_LOST, str(error)) is not None


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
    Reports memory that ran out, and the end of another process of the job, in one line without a
    traceback. Where an error can have a cause outside the code, a hint follows its traceback. Also
    lets Ctrl-C end the script at once, without a traceback.

    Args:
        settings: dict of the script's settings, whose sizes are named where memory ran out
        ddp: whether the script runs in several processes
    """
    names = ('batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'n_embd')
    sizes = ', '.join(f'{name}={settings[name]}' for name in names if name in settings)

    def exit_with(message):
        # sys.__stderr__, because torch.distributed may have replaced sys.stderr by a buffer;
        # os._exit, because an orderly shutdown can wait forever for a collective that another
        # process left
        print(f'{script_name()}: {message}', file=sys.__stderr__, flush=True)
        os._exit(1)

    def excepthook(kind, error, trace):
        text = ' '.join(str(error).split())[:100]
        if is_out_of_memory(error):
            exit_with(f'out of memory ({text}) with {sizes}; {how_to_save_memory(settings)}')
        if ddp and is_connection_lost(error):
            exit_with(f'another process of this job has ended ({text}); this one does not save')
        traceback.print_exception(kind, error, trace, file=sys.__stderr__)
        if re.search(UNKNOWN_TOKEN, text):
            print('hint: if the code is unchanged, the data holds a token id outside the model\'s '
                  'vocabulary; prepare the dataset again', file=sys.__stderr__)
        if kind.__module__.startswith('wandb'):
            print('hint: to run without wandb, set --wandb_log=False, or WANDB_MODE=offline before '
                  'the command', file=sys.__stderr__)
        if ddp:
            exit_with('this process failed with the traceback above')

    sys.excepthook = excepthook
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell ignores it for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens

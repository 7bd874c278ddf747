"""
Atomic file writes, free disk space, and a lock for a directory.

Not here: what the files hold (dataset.py, tokenizer.py, checkpoint.py).
"""
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from components.errors import UserError


@contextmanager
def whole_file(path):
    """
    Yields a temporary name beside `path`. When the block succeeds, that file is flushed to the
    disk and renamed to `path`. When it raises, the temporary file is removed and the old `path`
    stays.
    """
    temporary = Path(f'{path}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == 'posix':
        flush_directory(temporary.parent)


def flush_directory(folder):
    """ Flushes the names in `folder`, so that a renamed file survives a power failure. """
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def check_free_space(folder, size):
    """ Raises OSError if `size` bytes do not fit on the disk of `folder`. """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f'{folder}: not enough disk space: {size / 1e6:,.1f} MB needed, '
                      f'{free / 1e6:,.1f} MB free')


_locks = {}  # {folder: the open file descriptor that holds its lock}


def lock_directory(folder):
    """
    Reserves `folder` for this process until it ends. Raises UserError if another process holds it.
    Does nothing on Windows, and on file systems without locks.
    """
    folder = os.path.realpath(folder)
    if folder in _locks:
        return
    try:
        import fcntl
    except ImportError:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks[folder] = descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f'another run is writing to {folder}; end it, or choose another '
                        '--out_dir') from None
    except OSError:
        os.close(descriptor)

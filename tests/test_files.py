""" components/files.py: whole files, free disk space, and the lock of a directory. """
import errno
import os
import shutil
import types

import pytest

from components import files
from components.errors import UserError
from components.files import check_free_space, lock_directory, whole_file

# -----------------------------------------------------------------------------
# whole_file

def test_write(tmp_path):
    with whole_file(tmp_path / 'file') as temporary:
        temporary.write_text('new')
    assert (tmp_path / 'file').read_text() == 'new'
    assert os.listdir(tmp_path) == ['file']


def test_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with whole_file(path) as temporary:
        temporary.write_text('half of the new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'half of the new'


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text('half of the new')
        raise error
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file']


def test_error_before_anything_is_written(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / 'file'):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """ And its name afterwards: after a power failure there is the old file, or the new one. """
    events = []
    fsync = os.fsync
    replace = os.replace

    def logged_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def logged_replace(source, target):
        events.append('renamed')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', logged_fsync)
    monkeypatch.setattr(os, 'replace', logged_replace)
    with whole_file(tmp_path / 'file') as temporary:
        temporary.write_text('new')
    expected = [(tmp_path / 'file').stat().st_ino, 'renamed']
    if os.name == 'posix':
        expected.append(tmp_path.stat().st_ino)
    assert events == expected

# -----------------------------------------------------------------------------
# check_free_space

@pytest.fixture
def small_disk(monkeypatch):
    """ A disk with 3 MB of free space. """
    usage = types.SimpleNamespace(free=3_000_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)


def test_enough_space(small_disk, tmp_path):
    check_free_space(tmp_path, 3_000_000)


def test_not_enough_space(small_disk, tmp_path):
    with pytest.raises(OSError, match=r'4\.5 MB needed, 3\.0 MB free'):
        check_free_space(tmp_path, 4_500_000)

# -----------------------------------------------------------------------------
# lock_directory

@pytest.fixture
def lock_as_another_process():
    """
    lock_as_another_process(folder) locks it by a file descriptor that lock_directory() does not
    know, and returns the descriptor.
    """
    fcntl = pytest.importorskip('fcntl', reason='no locks on Windows')

    def lock(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    return lock


def test_lock_of_another_process(lock_as_another_process, tmp_path):
    lock_as_another_process(tmp_path)
    with pytest.raises(UserError, match='another run is writing to .*--out_dir'):
        lock_directory(tmp_path)


def test_lock_after_another_process_has_ended(lock_as_another_process, tmp_path):
    os.close(lock_as_another_process(tmp_path))
    lock_directory(tmp_path)


def test_lock_is_kept(lock_as_another_process, tmp_path):
    lock_directory(tmp_path)
    with pytest.raises(BlockingIOError):
        lock_as_another_process(tmp_path)


@pytest.mark.skipif(os.name == 'nt', reason='no symbolic links on Windows')
def test_lock_of_this_process(tmp_path):
    """ Also under another name of the directory. """
    (tmp_path / 'out').mkdir()
    (tmp_path / 'link').symlink_to('out')
    lock_directory(tmp_path / 'out')
    lock_directory(tmp_path / 'link')


def test_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    lock_directory(tmp_path)
    assert os.path.realpath(tmp_path) not in files._locks

""" components/files.py: whole files, free disk space, and the lock of a directory. """
import os
import shutil
import types

import pytest

from components.errors import UserError
from components.files import check_free_space, lock_directory, whole_file


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """ And its name afterwards: after a power failure there is the old file, or the new one. """
    path = tmp_path / 'file'
    path.write_text('old')
    events = []
    fsync = os.fsync
    replace = os.replace

    def logged_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def logged_replace(source, target):
        assert path.read_text() == 'old'
        events.append('renamed')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', logged_fsync)
    monkeypatch.setattr(os, 'replace', logged_replace)
    with whole_file(path) as temporary:
        temporary.write_text('new')
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['file']
    expected = [path.stat().st_ino, 'renamed']
    if os.name == 'posix':
        expected.append(tmp_path.stat().st_ino)
    assert events == expected


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text('half of the new')
        raise error
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file']


def test_free_space(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=3_000_000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
    check_free_space(tmp_path, 3_000_000)
    with pytest.raises(OSError, match=r'4\.5 MB needed, 3\.0 MB free'):
        check_free_space(tmp_path, 4_500_000)


def test_lock(tmp_path):
    """ Another file descriptor stands for another process. """
    fcntl = pytest.importorskip('fcntl', reason='no locks on Windows')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'link').symlink_to('out')
    other = os.open(tmp_path / 'out', os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match='another run .*--out_dir'):
        lock_directory(tmp_path / 'out')

    fcntl.flock(other, fcntl.LOCK_UN)
    lock_directory(tmp_path / 'out')
    lock_directory(tmp_path / 'link')  # a second time in one process
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)

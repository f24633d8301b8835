"""System calls of Linux for files, most of which Python does not offer, and what is done where one is not here.

A file system, a kernel or a sandbox may lack any call that is there for speed or safety. NOT_HERE has the answers that mean so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

from ..checkpoints.reader import NOT_HERE, naming

_LIBC = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_AT_FDCWD, _SYNC_FILE_RANGE_WRITE = -100, 2
TMPFS = 0x01021994
# Their files can share blocks (Btrfs, XFS, bcachefs, OCFS2, ZFS), or the server copies (NFS, SMB).
REFLINK_FILESYSTEMS = {0x9123683E, 0x58465342, 0xCA451A4E, 0x7461636F, 0x2FC12FC1, 0x6969, 0xFE534D42}
# Of copy_file_range, besides: on other file systems, in use, refused by a policy, and by SMB for no reason.
_REFLINK_UNSUPPORTED = NOT_HERE | {errno.EXDEV, errno.ETXTBSY, errno.EBADF, errno.EACCES, errno.ENOENT}
# A policy may refuse locks. FUSE and NFS keep a removed file under such a name until it is closed, which may be a little later.
_LOCKS_UNSUPPORTED = NOT_HERE | {errno.EACCES}
_HIDDEN, _CLOSING_S = (".fuse_hidden", ".nfs", ".cifs", ".smb"), 2.0
_PAGE = 4096


def filesystem_type(path: Path) -> int:
    """The magic number of the file system that a path is on (statfs); 0 if it is unknown."""
    statfs = ctypes.create_string_buffer(256)  # struct statfs, whose first field it is
    failed = _LIBC.statfs(os.fsencode(path), statfs)
    return 0 if failed else int(ctypes.c_long.from_buffer(statfs).value)


def reflink(source: int, destination: int, begin: int, end: int) -> range:
    """Clone the whole pages of a range from the same offsets of another file; returns the range that was cloned."""
    first = at = -(-begin // _PAGE) * _PAGE
    last = end // _PAGE * _PAGE
    try:
        while at < last and (done := os.copy_file_range(source, destination, last - at, at, at)):
            at += done
    except OSError as error:
        if error.errno not in _REFLINK_UNSUPPORTED:
            raise
    return range(first, at) if at > first else range(begin, begin)


def allocate(descriptor: int, size: int) -> None:
    """Reserve space for a file; where the file system cannot, only set its size.

    Not by posix_fallocate, which glibc emulates there: it writes a byte to every block.
    """
    if hasattr(_LIBC, "fallocate"):
        while _LIBC.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            if (code := ctypes.get_errno()) in NOT_HERE:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        else:
            return
    set_size(descriptor, size)


def set_size(descriptor: int, size: int) -> None:
    """Set the size of a file; where that cannot be done, it grows as it is written."""
    _or_not_here(lambda: os.ftruncate(descriptor, size))


def start_writing_back(descriptor: int, offset: int, size: int) -> None:
    """Start writing a range to the disk, so that the final sync has little to do.

    posix_fadvise(DONTNEED) would also start it, but waits for all CPUs.
    """
    if hasattr(_LIBC, "sync_file_range"):  # a hint: the result does not matter
        _LIBC.sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE
        )


def rename(source: Path, destination: Path, flags: int) -> None:
    """renameat2: with RENAME_NOREPLACE or RENAME_EXCHANGE."""
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(destination), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(destination))


def rename_to_new(source: Path, destination: Path) -> bool:
    """Rename to a name that is not taken; returns whether the file system itself refuses to replace what has just come there."""
    try:
        rename(source, destination, RENAME_NOREPLACE)
        return True
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    if not source.is_dir() and _or_not_here(lambda: os.link(source, destination)):
        os.unlink(source)
        return True
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    os.rename(source, destination)
    return False


def exchange(first: Path, second: Path) -> bool:
    """Exchange two directories; returns False where that cannot be done in one step.

    overlayfs renames no directory of a lower layer, such as an image's.
    """
    return _or_not_here(lambda: rename(first, second, RENAME_EXCHANGE), NOT_HERE | {errno.EXDEV})


def move_directory(source: Path, destination: Path, first: str) -> bool:
    """Move a directory; returns False if that was done file by file, by one name before the others.

    What a killed call has moved may be there already. No file is replaced.
    """
    try:
        os.rename(source, destination)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
    destination.mkdir(exist_ok=True)
    with os.scandir(source) as found:
        entries = sorted(found, key=lambda entry: (entry.name != first, entry.name))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            move_directory(source / entry.name, destination / entry.name, first)
        else:
            rename_to_new(source / entry.name, destination / entry.name)
    os.rmdir(source)
    return False


def lock(descriptor: int, kind: int) -> bool:
    """Lock an open file without waiting; returns False where there are no locks.

    Args:
        descriptor: The file, open for reading and writing.
        kind: fcntl.LOCK_SH or fcntl.LOCK_EX.

    Raises:
        BlockingIOError: If another process holds it.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
    # The whole file, for this descriptor alone: struct flock.
    how = fcntl.F_RDLCK if kind == fcntl.LOCK_SH else fcntl.F_WRLCK
    whole = struct.pack("hhqqi4x", how, os.SEEK_SET, 0, 0, 0)
    return _or_not_here(lambda: fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole), _LOCKS_UNSUPPORTED)


def sync(descriptor: int) -> bool:
    """Sync a file or a directory; returns False where that cannot be done."""
    return _or_not_here(lambda: os.fsync(descriptor))


def sync_data(descriptor: int) -> None:
    """Sync the bytes of a file, and its size."""
    if not _or_not_here(lambda: os.fdatasync(descriptor)):
        sync(descriptor)


def sync_directory(path: str | Path) -> bool:
    """Sync the names in a directory; returns False where that cannot be done."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be written, but not read
        return False
    try:
        with naming(Path(path)):
            return sync(descriptor)
    finally:
        os.close(descriptor)


def _or_not_here(call: Callable[[], object], unsupported: frozenset[int] = NOT_HERE) -> bool:
    """Make a system call; returns False if it is not here."""
    try:
        call()
        return True
    except OSError as error:
        if error.errno not in unsupported:
            raise
        return False


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, of which some files may have been closed just now."""
    deadline = time.monotonic() + _CLOSING_S
    while os.path.lexists(path):
        try:
            _empty(str(path))
            os.rmdir(path)
        except OSError as error:
            closing = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOENT)
            if not closing or time.monotonic() > deadline:
                raise OSError(error.errno, error.strerror, str(path)) from None
            time.sleep(0.01)


def _empty(name: str, parent: int | None = None) -> None:
    """Remove all in a directory, which may be named relative to another, open one.

    Not by shutil.rmtree, which takes a directory for a link where FUSE numbers inodes anew.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        with os.scandir(descriptor) as found:
            entries = list(found)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.name, descriptor)
                os.rmdir(entry.name, dir_fd=descriptor)
            else:
                os.unlink(entry.name, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def remove_empty(path: Path) -> None:
    """Remove a directory, unless there is more in it than files that were closed just now."""
    deadline = time.monotonic() + _CLOSING_S
    while True:
        try:
            return path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise
            if time.monotonic() > deadline or not _holds_only_hidden(path):
                return
            time.sleep(0.01)


def _holds_only_hidden(path: Path) -> bool:
    try:
        return all(name.startswith(_HIDDEN) for name in os.listdir(path))
    except FileNotFoundError:
        return True


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write JSON to a file, and sync it."""
    with naming(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        sync(file.fileno())

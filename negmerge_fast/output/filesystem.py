"""System calls of Linux for files, most of which Python does not offer, and what is done where one is not here.

A file system, a kernel or a sandbox may lack any call that is there for speed or safety. NOT_HERE has the answers that mean so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from ..checkpoints.reader import NOT_HERE

_LIBC = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_SYNC_FILE_RANGE_WRITE = 2
TMPFS = 0x01021994
# Their files can share blocks (Btrfs, XFS, bcachefs, OCFS2, ZFS), or the server copies (NFS, SMB).
REFLINK_FILESYSTEMS = {0x9123683E, 0x58465342, 0xCA451A4E, 0x7461636F, 0x2FC12FC1, 0x6969, 0xFE534D42}
# Of copy_file_range, besides: on other file systems, in use, refused by a policy, and by SMB for no reason.
_REFLINK_UNSUPPORTED = NOT_HERE | {errno.EXDEV, errno.ETXTBSY, errno.EBADF, errno.EACCES, errno.ENOENT}
# A policy may refuse locks.
_LOCKS_UNSUPPORTED = NOT_HERE | {errno.EACCES}
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
    or_not_here(lambda: os.ftruncate(descriptor, size))


def start_writing_back(descriptor: int, offset: int, size: int) -> None:
    """Start writing a range to the disk, so that the final sync has little to do.

    posix_fadvise(DONTNEED) would also start it, but waits for all CPUs.
    """
    if hasattr(_LIBC, "sync_file_range"):  # a hint: the result does not matter
        _LIBC.sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE
        )


def renameat2(source_fd: int, source: str, destination_fd: int, destination: str, flags: int) -> None:
    """Rename between two open directories, with RENAME_NOREPLACE or RENAME_EXCHANGE."""
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _LIBC.renameat2(source_fd, os.fsencode(source), destination_fd, os.fsencode(destination), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


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
    return or_not_here(lambda: fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole), _LOCKS_UNSUPPORTED)


def sync(descriptor: int) -> bool:
    """Sync a file or a directory; returns False where that cannot be done."""
    return or_not_here(lambda: os.fsync(descriptor))


def sync_data(descriptor: int) -> None:
    """Sync the bytes of a file, and its size."""
    if not or_not_here(lambda: os.fdatasync(descriptor)):
        sync(descriptor)


def or_not_here(call: Callable[[], object], unsupported: frozenset[int] = NOT_HERE) -> bool:
    """Make a system call; returns False if it is not here."""
    try:
        call()
        return True
    except OSError as error:
        if error.errno not in unsupported:
            raise
        return False

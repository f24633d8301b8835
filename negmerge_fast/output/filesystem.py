"""System calls of Linux for files, most of which Python does not offer."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path

from ..checkpoints.reader import naming

_LIBC = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_AT_FDCWD, _SYNC_FILE_RANGE_WRITE = -100, 2
TMPFS = 0x01021994
# Their files can share blocks (Btrfs, XFS, bcachefs, OCFS2, ZFS), or the server copies (NFS, SMB).
REFLINK_FILESYSTEMS = {0x9123683E, 0x58465342, 0xCA451A4E, 0x7461636F, 0x2FC12FC1, 0x6969, 0xFE534D42}
_REFLINK_UNSUPPORTED = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ETXTBSY}
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
    """Reserve space for a file; where the file system cannot, only set its size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


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


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Write JSON to a file, and sync it."""
    with naming(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

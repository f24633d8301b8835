"""Input files, read by position.

A few files are open at a time, whatever the number of shards. Each is checked when it is opened and closed: it must still be
the file that was inspected. A file that shrinks or fails is an error; with a memory map it would be a SIGBUS. Maps are faster
for cached files (by an eighth), and slower from the disk (by a fifth at best): bench/results/reads.jsonl.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError


@dataclass(frozen=True, eq=False)  # as a key, it is itself: what it holds is slow to hash
class File:
    """A regular file as it was when it was inspected.

    Attributes:
        path: Its path.
        size: Bytes.
        identity: Device, inode and time of the last change.
        mode: Its permissions.
        header: The hash of its header, or of a whole index; empty if neither was read.
    """

    path: Path
    size: int
    identity: tuple[int, int, int]
    mode: int
    header: str = ""

    @classmethod
    def at(cls, path: Path) -> File:
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: {getattr(error, 'strerror', None) or error}, expected a file"
            ) from None
        # Checked before it is opened: opening a FIFO would wait for ever.
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a regular file")
        return cls(path, found.st_size, _identity(found), stat.S_IMODE(found.st_mode) & 0o666)

    def open(self) -> int:
        """Return a descriptor for positioned reads."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.refuse_change(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def refuse_change(self, descriptor: int) -> None:
        """Raise OSError if an open file is not the one that was inspected."""
        found = os.fstat(descriptor)
        if _identity(found) != self.identity or found.st_size != self.size:
            raise OSError(f"{self.path}: the file changed while it was being read")

    def read(self, offset: int, size: int) -> bytearray:
        """Return a few bytes, while a checkpoint is opened."""
        buffer = bytearray(size)
        try:
            with Reader(1) as reader:
                reader.read_into(self, offset, memoryview(buffer))
        except PermissionError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(str(error)) from None  # shorter than its size says, as files of /sys are
        return buffer


# Missing in Pythons that were built for an old C library.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Reader:
    """Reads files by position, and keeps the last few of them open.

    A file that has changed since it was inspected raises OSError when it is closed.

    Args:
        max_open: The most files open at a time.
    """

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._open: dict[File, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        changed = None
        while self._open:
            try:
                self._close(next(iter(self._open)), check=kind is None)
            except OSError as error:
                changed = changed or error
        if changed:
            raise changed

    def expect(self, file: File, offset: int, size: int) -> None:
        """Tell the system what will be read next, so that it may fetch it meanwhile."""
        os.posix_fadvise(self.descriptor(file), offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, file: File, offset: int, buffer: memoryview, release: bool = False) -> bool | None:
        """Fill a buffer from a position in a file.

        Args:
            file: The file.
            offset: The position.
            buffer: What to fill.
            release: Whether to tell the system that the pages will not be read again.

        Returns:
            Whether all of it was in the page cache; None if the file system does not tell.

        Raises:
            OSError: If reading fails, or the file ends too early.
        """
        if not buffer:
            return True
        descriptor = self.descriptor(file)
        try:
            found = _read_cached(descriptor, offset, buffer)
            done, cached = found or 0, None if found is None else found == len(buffer)
            if not cached:
                # One hint for the whole read: the kernel's own read-ahead is shorter.
                os.posix_fadvise(descriptor, offset + done, len(buffer) - done, os.POSIX_FADV_WILLNEED)
            while done < len(buffer):
                if not (got := os.preadv(descriptor, [buffer[done:]], offset + done)):
                    raise OSError(f"{file.path}: ends at byte {offset + done}, expected {file.size} bytes")
                done += got
            if release:
                os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise _named(error, file.path) from None
        return cached

    def descriptor(self, file: File) -> int:
        """Return the descriptor of a file, which is valid until the next call."""
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            if len(self._open) == self._max_open:
                self._close(next(iter(self._open)), check=True)
            descriptor = file.open()
        self._open[file] = descriptor  # moved to the end, which is closed last
        return descriptor

    def _close(self, file: File, check: bool) -> None:
        descriptor = self._open.pop(file)
        try:
            if check:
                file.refuse_change(descriptor)
        finally:
            os.close(descriptor)


def _read_cached(descriptor: int, offset: int, buffer: memoryview) -> int | None:
    """Read what is in the page cache, and return its size: one call for cached files, as checking each page costs a tenth."""
    if _NOWAIT is None:
        return None
    try:
        return os.preadv(descriptor, [buffer], offset, _NOWAIT)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return 0
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to errors of calls that take a descriptor."""
    try:
        yield
    except OSError as error:
        raise _named(error, path) from None


def _named(error: OSError, path: Path) -> OSError:
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns

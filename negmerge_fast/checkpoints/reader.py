"""Input files, read by position.

A few files are open at a time, whatever the number of shards. Each is checked when it is opened and closed, and once more when all
is read: it must still be the file that was inspected. A file that shrinks or fails is an error; with a memory map it would be a
SIGBUS. Maps are no faster, warm or cold: bench/results/reads.jsonl.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import ClassVar

from ..core.errors import InputError
from ..core.hashing import hash_of
from ..core.low_rank import Expansion, Upload

# What a system call answers that this file system, kernel or sandbox does not have (524: as NFS lets it out of the kernel).
# A call that is there for speed or safety is then done without. Real faults, such as EIO, ENOSPC and EACCES, are not among them.
NOT_HERE = frozenset({
    errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOTTY, errno.ENODEV, errno.ENOLCK, 524,
})  # fmt: skip

# Blocks of a file's sample, and bytes of each: a disk reads them in a fraction of a second, and versions of a model differ in one.
_SAMPLES, _SAMPLE_BYTES = 16, 4096
# Or they differ in one tensor, such as a head: so many tensors of a file, and bytes in the middle of each.
_MAX_TENSOR_SAMPLES, _TENSOR_SAMPLE_BYTES = 256, 64


@dataclass(frozen=True, eq=False)  # as a key, it is itself: what it holds is slow to hash
class File:
    """A regular file as it was when it was inspected.

    Attributes:
        path: Its path.
        size: Bytes.
        identity: Device, inode and time of the last change.
        mode: Its permissions.
        header: The hash of its header, or of a whole index; empty if neither was read.
        aliases: Names that its metadata calls tied to a tensor in it, and the names of those tensors.
        changed_ns: When its content or its inode changed last, in ns.
        tensor_samples: Ranges of tensors that its sample has, too.
    """

    path: Path
    size: int
    identity: tuple[int, int, int]
    mode: int
    header: str = ""
    changed_ns: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    tensor_samples: list[range] = field(default_factory=list)

    # Whether its bytes are computed from others, and it cannot be opened.
    is_computed: ClassVar[bool] = False
    # Whether some of its tensors are known by factors (streaming/low_rank.py).
    is_low_rank: ClassVar[bool] = False

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
        identity = found.st_dev, found.st_ino, found.st_mtime_ns
        mode = stat.S_IMODE(found.st_mode) & 0o666
        return cls(path, found.st_size, identity, mode, changed_ns=found.st_ctime_ns)

    @property
    def sources(self) -> Collection[File]:
        """The files that are read for it."""
        return (self,)

    def locate(self, offset: int, nbytes: int) -> tuple[File, int]:
        """The file that a range lies in, and where: here, or in one that this one is composed of."""
        return self, offset

    def stored_before(self, offset: int) -> int:
        """How many bytes are read for those before an offset."""
        return offset

    def open(self) -> int:
        """Return a descriptor for positioned reads."""
        # A FIFO that has been put in its place is not waited for.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.refuse_change(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def refuse_replacement(self) -> None:
        """Raise OSError if what lies at the path now is not the file that was inspected.

        It is opened anew: NFS then asks its server, where fstat may answer from a cache.
        """
        if not self.path.is_file():  # opening a FIFO would wait for ever
            raise OSError(f"{self.path}: the file changed while it was being read")
        try:
            os.close(self.open())
        except PermissionError:  # its mode is another one since
            self.refuse_change(self.path)

    def refuse_change(self, opened: int | Path) -> None:
        """Raise OSError if an open file, or what lies at a path, is not the one that was inspected."""
        with naming(self.path):
            found = os.fstat(opened) if isinstance(opened, int) else os.stat(opened)
        device, inode, modified_ns = self.identity
        # A link to a file moves its ctime, FUSE may number inodes anew: both at once are another file.
        same = (found.st_dev, found.st_ino) == (device, inode) or found.st_ctime_ns == self.changed_ns
        if not same or (found.st_size, found.st_mtime_ns) != (self.size, modified_ns):
            raise OSError(f"{self.path}: the file changed while it was being read")

    def read(self, offset: int, size: int) -> bytearray:
        """Return a few bytes, while a checkpoint is opened."""
        return self.read_ranges([range(offset, offset + size)])

    def read_head(self, size: int) -> bytearray:
        """Return the first bytes, or all of a shorter file."""
        return self.read(0, min(self.size, size))

    def read_into(
        self, reader: Reader, offset: int, buffer: memoryview, release: bool = False
    ) -> bool | None:
        """Fill a buffer from a position, as Reader.read_into does. A file whose bytes are computed does it in its own way."""
        return reader.read_into(self, offset, buffer, release)

    def expansion(
        self, reader: Reader, name: str, start: int, arithmetic: str, upload: Upload | None
    ) -> Expansion | None:
        """The elements of a tensor from `start` on, by its factors; None if it has none of that type. See is_low_rank.

        upload: puts factors where they are needed; None in main memory.
        """
        return None

    def expect(self, reader: Reader, offset: int, size: int) -> None:
        """Tell the system what will be read next, as Reader.expect does."""
        reader.expect(self, offset, size)

    @cached_property
    def sample(self) -> str:
        """The hash of a few blocks from the first to the last, or of all of a short file."""
        whole, *more = _sample_ranges(self.size)
        return hash_of(self.read_ranges([whole, *more, *self.tensor_samples] if more else [whole]))

    def add_tensors(self, count: int, ranges: Iterable[range]) -> None:
        """Have the sample tell versions apart that differ in one tensor only. It has all of these, or some of very many."""
        step = max(-(-count // _MAX_TENSOR_SAMPLES), 1)
        for each in islice(ranges, 0, None, step):
            begin = each.start + max(len(each) - _TENSOR_SAMPLE_BYTES, 0) // 2
            self.tensor_samples.append(range(begin, min(begin + _TENSOR_SAMPLE_BYTES, each.stop)))

    def read_ranges(self, ranges: Sequence[range]) -> bytearray:
        """Return the bytes of a few ranges, one after the other."""
        read, at = bytearray(sum(map(len, ranges))), 0
        try:
            descriptor = self.open()
            try:
                for each in ranges:  # a disk may fetch them together
                    advise(descriptor, each.start, len(each), os.POSIX_FADV_WILLNEED)
                for each in ranges:
                    self.fill(descriptor, each.start, memoryview(read)[at : at + len(each)])
                    at += len(each)
                self.refuse_change(descriptor)
            finally:
                os.close(descriptor)
        except PermissionError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(str(error)) from None  # shorter than its size says, as files of /sys are
        return read

    def fill(self, descriptor: int, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a position in this file, which is open."""
        done = 0
        with naming(self.path):
            while done < len(buffer):
                if not (got := os.preadv(descriptor, [buffer[done:]], offset + done)):
                    raise OSError(f"{self.path}: ends at byte {offset + done}, expected {self.size} bytes")
                done += got


def _sample_ranges(size: int) -> list[range]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [range(size)]
    begins = ((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1) for k in range(_SAMPLES))
    return [range(begin, begin + _SAMPLE_BYTES) for begin in begins]


def sample_of(descriptor: int) -> str:
    """File.sample of an open file, without samples of tensors."""
    ranges = _sample_ranges(os.fstat(descriptor).st_size)
    return hash_of(b"".join(os.pread(descriptor, len(each), each.start) for each in ranges))


# Missing in Pythons that were built for an old C library.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Reader:
    """Reads files by position, from any thread, and keeps the last few of them open.

    A file that has changed since it was inspected raises OSError when it is closed. Without an error before, that is asked once
    more of all files at the end.

    Args:
        max_open: The most files open at a time.

    Attributes:
        requests: Whether the system is told beforehand of all that will be read, or reads ahead as it sees fit.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.requests = True
        self._open: dict[File, int] = {}
        self._read: set[File] = set()
        self._lock = Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        for file in self._read if kind is None else ():
            file.refuse_replacement()

    def expect(self, file: File, offset: int, size: int) -> None:
        """Tell the system what will be read next, so that it may fetch it meanwhile."""
        if self.requests:
            advise(self.descriptor(file), offset, size, os.POSIX_FADV_WILLNEED)

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
        with naming(file.path):
            found = _read_cached(descriptor, offset, buffer)
        done, cached = found or 0, None if found is None else found == len(buffer)
        if not cached:
            if self.requests:
                advise(descriptor, offset + done, len(buffer) - done, os.POSIX_FADV_WILLNEED)
            file.fill(descriptor, offset + done, buffer[done:])
        if release:
            advise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return cached

    def descriptor(self, file: File) -> int:
        """Return the descriptor of a file, which is valid until max_open other files were asked for."""
        with self._lock:
            descriptor = self._open.pop(file, None)
            if descriptor is None:
                if len(self._open) == self.max_open:
                    self._close(next(iter(self._open)))
                descriptor = file.open()
                self._read.add(file)
            self._open[file] = descriptor  # moved to the end, which is closed last
            return descriptor

    def _close(self, file: File) -> None:
        descriptor = self._open.pop(file)
        try:
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
        if error.errno in NOT_HERE:
            return None
        raise


def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
    """Give the system a hint. It may not take hints."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, size, advice)


def same_file(first: os.stat_result, second: os.stat_result) -> bool:
    """Whether two answers are of one file. FUSE may number inodes anew: then the times and the number of names tell."""
    if os.path.samestat(first, second):
        return True
    kept = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink) for s in (first, second)]
    return kept[0] == kept[1]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to errors of calls that take a descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None

"""What all formats share: the parts of an opened checkpoint, and reading files by position.

A few files are open at a time, whatever the number of shards, and each is looked at when it is opened and closed: still the
one that was inspected. One that shrinks or fails is an error, where a memory map would be a SIGBUS; maps are faster where files
are cached (by an eighth), and slower where they come from the disk (by a fifth at best): bench/results/reads.jsonl.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from ..layout import Form
from ..rule import InputError, brief


@dataclass(frozen=True, eq=False)  # as a key, it is itself: what it holds is slow to hash
class File:
    """A regular file as it was when it was opened first.

    mode: who may do what with it. header: the hash of its header, or of all of an index, where that was read.
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
        # Before opening it: opening a FIFO waits for ever.
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a regular file")
        return cls(path, found.st_size, _identity(found), stat.S_IMODE(found.st_mode) & 0o666)

    def open(self) -> int:
        """A file descriptor for positioned reads."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.refuse_change(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def refuse_change(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if _identity(found) != self.identity or found.st_size != self.size:
            raise OSError(f"{self.path}: the file changed while it was being read")

    def read(self, offset: int, size: int) -> bytearray:
        """A few bytes, while a checkpoint is opened."""
        buffer = bytearray(size)
        try:
            with Reader(1) as reader:
                reader.read_into(self, offset, memoryview(buffer))
        except PermissionError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(str(error)) from None  # shorter than it seems, as files of /sys are
        return buffer


# Pythons built for an old C library have it not.
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)


class Reader:
    """Reads files by position, and keeps the last few of them open, `most` at a time.

    A file that it lets go of in peace is still the one that was inspected: else what was read of it is an error.
    """

    def __init__(self, most: int) -> None:
        self._most = most
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
        """Say that this will be read next: the system may fetch it meanwhile."""
        os.posix_fadvise(self.descriptor(file), offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, file: File, offset: int, buffer: memoryview, release: bool = False) -> bool | None:
        """Fill the buffer from a position, and say whether all of it was cached; None: the file system doesn't tell.

        release: tell the system that the pages won't be read again.
        """
        if not buffer:
            return True
        descriptor = self.descriptor(file)
        try:
            found = _read_cached(descriptor, offset, buffer)
            done, cached = found or 0, None if found is None else found == len(buffer)
            if not cached:
                # One hint for the whole stroke: the kernel's own read-ahead is shorter.
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
        """Of an open file, until the next call."""
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            if len(self._open) == self._most:
                self._close(next(iter(self._open)), check=True)
            descriptor = file.open()
        self._open[file] = descriptor  # the last one again
        return descriptor

    def _close(self, file: File, check: bool) -> None:
        descriptor = self._open.pop(file)
        try:
            if check:
                file.refuse_change(descriptor)
        finally:
            os.close(descriptor)


def _read_cached(descriptor: int, offset: int, buffer: memoryview) -> int | None:
    """Read what is in the page cache, and say how much that was: where it is all, looking for each page costs a tenth."""
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
    """Errors of calls that take a descriptor name the file, like those of calls that take a path."""
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


@dataclass(frozen=True, slots=True)  # there are as many as tensors times models
class Tensor:
    """Where the bytes of a tensor are: little-endian, in row-major order."""

    form: Form
    file: File
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.form.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name. weights: the files that hold them; others: what else belongs to the model (config, tokenizer);
    left_out: what lies beside them but is neither. The last three name files relative to path, or path itself."""

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    weights: dict[str, File]
    others: dict[str, File]
    left_out: tuple[str, ...] = ()

    @property
    def is_directory(self) -> bool:
        return self.kind == "directory"


# Lists and objects take up to forty times their text: those of real headers and indexes are one in sixteen bytes at most.
_MUCH, _BYTES_PER_BRACKET = 1 << 20, 8
# Digits of 2^63 and a sign: longer numbers take long to read, and no file says one.
_LONGEST_INTEGER = 20
_ODD_INTEGER = re.compile(rb"-0|[0-9-]{%d}" % (_LONGEST_INTEGER + 1))


def parse_json(raw: bytearray, path: Path, what: str, halves: bool = False) -> dict[str, Any]:
    """A JSON object in which no key comes twice, no text is half a character, and no number is -0, NaN or very long.

    halves: there may be half characters, as in names of files that are not UTF-8.
    """
    if len(raw) > _MUCH and raw.count(b"[") + raw.count(b"{") > len(raw) // _BYTES_PER_BRACKET:
        raise InputError(f"{path}: {what} is mostly brackets, expected names of tensors")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InputError(f"{path}: {what} names {brief(twice)} twice")
        return found

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            # Slow, and seldom needed: a header has three integers and more for each tensor.
            parse_int=_integer if _ODD_INTEGER.search(raw) else None,
            parse_constant=_refuse_constant,
        )
        if not halves and b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise InputError(f"{path}: {what} is not JSON ({reason[:120]})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} is a JSON {type(value).__name__}, expected an object")
    return value


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def are_sizes(value: Any) -> bool:
    """Whether it is a list of sizes or offsets: integers that a file can have."""
    if not isinstance(value, list) or len(value) > 64:  # so that a product of them is quickly had
        return False
    for item in value:  # noqa: SIM110 (a generator takes twice as long)
        if type(item) is not int or not 0 <= item < 1 << 63:
            return False
    return True


def is_shape(value: Any) -> bool:
    """Whether it is a list of sizes whose products can be counted in 64 bits, as other programs do."""
    return are_sizes(value) and max(accumulate(value, mul), default=0) < 1 << 64

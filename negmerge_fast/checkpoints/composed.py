"""Files of an output that does not exist yet: constants and ranges of other files, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeAlias

from .base import ByteRange
from .computed import ComputedFile
from .reader import File, Reader

Part: TypeAlias = "bytes | ByteRange"


class Crc(NamedTuple):
    """Where the CRC-32 of a range of an output stands: known when that is written, and zeros until then."""

    begin: int
    nbytes: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class _Placed:
    """A part in its place: what a ComputedFile takes for a tensor of bytes."""

    offset: int
    part: Part

    size: ClassVar[int] = 1

    @property
    def numel(self) -> int:
        return _size(self.part)

    @property
    def stored(self) -> int:
        return 0 if isinstance(self.part, bytes) else self.part.stored_nbytes

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        if isinstance(self.part, bytes):
            buffer[:] = self.part[begin:end]
            return True
        return bool(self.part.read_into(reader, buffer, begin, release))


@dataclass(frozen=True, eq=False)
class ComposedFile(ComputedFile):
    """A file of parts that follow one another.

    Attributes:
        crcs: What depends on all that is written.
    """

    crcs: Sequence[Crc] = ()

    @classmethod
    def of(cls, like: File, parts: Sequence[Part], **more: Any) -> ComposedFile:
        """A file of these parts. like: the file in whose place it is, which errors name and whose permissions it has."""
        parts = [part for part in parts if _size(part)]
        *starts, size = accumulate(map(_size, parts), initial=0)
        placed = list(map(_Placed, starts, parts))
        return cls(
            like.path, size, like.identity, like.mode, changed_ns=like.changed_ns, computed=placed, **more
        )

    @property
    def parts(self) -> list[Part]:
        return [each.part for each in self.computed]  # type: ignore[attr-defined]

    @cached_property
    def sources(self) -> Collection[File]:
        ranges = (part for part in self.parts if isinstance(part, ByteRange))
        return dict.fromkeys(file for part in ranges for file in part.file.sources)

    def locate(self, offset: int, nbytes: int) -> tuple[File, int]:
        for each in self.computed_from(offset):
            part, first = each.part, offset - each.offset  # type: ignore[attr-defined]
            if isinstance(part, ByteRange) and first + nbytes <= part.nbytes:
                return part.file.locate(part.offset + first, nbytes)
            break
        return self, offset

    def expect(self, reader: Reader, offset: int, size: int) -> None:
        for each in self.computed_from(offset):
            if each.offset >= offset + size:
                break
            part = each.part  # type: ignore[attr-defined]
            first = max(offset - each.offset, 0)
            count = min(offset + size - each.offset, each.numel) - first
            if isinstance(part, ByteRange) and count > 0:
                part.file.expect(reader, part.offset + first, count)


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes

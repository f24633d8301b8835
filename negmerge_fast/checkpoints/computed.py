"""Files that do not exist: tensors, one after the other, whose bytes are computed from what other files hold, chunk by chunk."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

from .reader import File, Reader


class Computed(Protocol):
    """A tensor of a computed file, or anything else in it with elements of one size.

    Attributes:
        offset: Where it begins in the file.
        size: Bytes of an element.
        numel: The number of elements.
        stored: Bytes that are read for all of it.
    """

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def stored(self) -> int: ...

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        """Write the elements begin … end to a writable buffer of just their bytes; returns whether all that was read was cached."""
        ...


@dataclass(frozen=True, eq=False)
class ComputedFile(File):
    """A file whose bytes are computed. Its path, identity and mode are those of the file that tells most of them.

    Attributes:
        computed: What is in it, one after the other, from the first byte to the last.
    """

    computed: Sequence[Computed] = field(default_factory=list)

    is_computed = True

    def read_into(
        self, reader: Reader, offset: int, buffer: memoryview, release: bool = False
    ) -> bool | None:
        cached, end = True, offset + len(buffer)
        for each in self.computed_from(offset):
            if each.offset >= end:
                break
            until = each.offset + each.numel * each.size
            first, last = max(offset, each.offset) - each.offset, min(end, until) - each.offset
            if first < last:
                at = each.offset + first - offset
                cached = _fill(reader, each, first, buffer[at : at + last - first], release) and cached
        return cached

    def stored_before(self, offset: int) -> int:
        """Of what is read for a tensor, in proportion to how much of the tensor is before the offset."""
        if not self.computed:
            return 0
        k = max(bisect_right(self._begins, offset) - 1, 0)
        before, each = self._stored_starts[k], self.computed[k]
        nbytes = each.numel * each.size
        return before + each.stored * (offset - each.offset) // nbytes if nbytes else before

    def expect(self, reader: Reader, offset: int, size: int) -> None:
        """Nothing: what is read is known when it is computed."""

    def computed_from(self, offset: int) -> Iterator[Computed]:
        """What is in it from the tensor on that has the byte at an offset."""
        first = max(bisect_right(self._begins, offset) - 1, 0)
        return (self.computed[k] for k in range(first, len(self.computed)))

    @cached_property
    def _begins(self) -> list[int]:
        return [each.offset for each in self.computed]

    @cached_property
    def _stored_starts(self) -> list[int]:
        return list(accumulate((each.stored for each in self.computed), initial=0))


def _fill(reader: Reader, each: Computed, first: int, buffer: memoryview, release: bool) -> bool:
    """Fill a buffer from a byte of a tensor on: whole elements are computed, also of those that it has only a part of."""
    size, last = each.size, first + len(buffer)
    begin, end = first // size, -(last // -size)
    if (begin * size, end * size) == (first, last):
        return each.compute(reader, begin, end, buffer, release)
    whole = bytearray((end - begin) * size)
    cached = each.compute(reader, begin, end, memoryview(whole), release)
    buffer[:] = whole[first - begin * size : last - begin * size]
    return cached


def address_of(memory: Any) -> int:
    """The address of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

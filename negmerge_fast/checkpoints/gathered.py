"""Tensors whose bytes are not together in row-major order: views of PyTorch files with strides, and shards of one tensor.

They are in a file that does not exist: what is read of it is gathered from other files, a bounded amount at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .reader import File, Reader

if TYPE_CHECKING:
    import numpy as np

# Bytes between the first and the last that are needed which are read at once: all of few; of more, if half of them are needed.
_MAX_SPAN_BYTES, _MAX_DENSE_SPAN_BYTES = 64 << 10, 1 << 20


class Box(NamedTuple):
    """A box of a tensor, and where its elements are.

    Attributes:
        file: The file.
        begin: The position of the first element, in bytes.
        origin: The index of the first element in the tensor.
        shape: The extents of the box.
        strides: From one element to the next along each extent, in elements.
    """

    file: File
    begin: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class GatheredFile(File):
    """A file of one tensor in row-major order, of which each element is in one of its boxes.

    Attributes:
        shape: Of the tensor.
        itemsize: Bytes of an element.
        boxes: The boxes.
    """

    shape: tuple[int, ...] = ()
    itemsize: int = 1
    boxes: Sequence[Box] = field(default_factory=list)

    is_computed = True

    @classmethod
    def of(cls, file: File, shape: tuple[int, ...], itemsize: int, boxes: Sequence[Box]) -> GatheredFile:
        """The file of a tensor; `file` is one that messages name."""
        size = math.prod(shape) * itemsize
        return cls(
            file.path,
            size,
            file.identity,
            file.mode,
            changed_ns=file.changed_ns,
            shape=shape,
            itemsize=itemsize,
            boxes=boxes,
        )

    def read_into(
        self, reader: Reader, offset: int, buffer: memoryview, release: bool = False
    ) -> bool | None:
        import numpy as np

        size, end = self.itemsize, offset + len(buffer)
        begin, last = offset // size, -(end // -size)
        exact = begin * size == offset and last * size == end
        whole = buffer if exact else memoryview(bytearray((last - begin) * size))
        elements = np.frombuffer(whole, np.dtype(f"u{size}"))
        cached = True
        for origin, shape, at in _boxes(self.shape, begin, last):
            box = elements[at : at + math.prod(shape)].reshape(shape)
            for held in self.boxes:
                if (common := _intersection(origin, shape, held)) is not None:
                    first, extents = common
                    out = box[
                        tuple(slice(f - o, f - o + n) for f, o, n in zip(first, origin, extents, strict=True))
                    ]
                    cached = self._gather(reader, held, first, out, release) and cached
        if not exact:
            buffer[:] = whole[offset - begin * size : end - begin * size]
        return cached

    def _gather(
        self, reader: Reader, held: Box, first: Sequence[int], out: np.ndarray[Any, Any], release: bool
    ) -> bool:
        """Fill an array with the elements of a held from an index in the tensor on."""
        steps = zip(first, held.origin, held.strides, strict=True)
        at = sum((f - o) * stride for f, o, stride in steps)
        # As they are in the file: the outermost extent has the longest stride.
        order = sorted(range(out.ndim), key=lambda axis: -held.strides[axis])
        return _read_box(
            reader, held, at, [held.strides[axis] for axis in order], out.transpose(order), release
        )

    def expect(self, reader: Reader, offset: int, size: int) -> None:
        """Nothing: it is read in many places."""


def _boxes(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut consecutive elements into boxes: the index of the first element, the extents, and how many elements are before."""
    if begin >= end:
        return
    if not shape:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    (top, head), (bottom, tail) = divmod(begin, row), divmod(end, row)
    if top == bottom:
        yield from (((top, *o), (1, *s), at) for o, s, at in _boxes(shape[1:], head, tail))
        return
    if head:
        yield from (((top, *o), (1, *s), at) for o, s, at in _boxes(shape[1:], head, row))
        top += 1
    if bottom > top:
        yield (top, *[0] * (len(shape) - 1)), (bottom - top, *shape[1:]), top * row - begin
    if tail:
        before = bottom * row - begin
        yield from (((bottom, *o), (1, *s), before + at) for o, s, at in _boxes(shape[1:], 0, tail))


def _intersection(
    origin: Sequence[int], shape: Sequence[int], held: Box
) -> tuple[list[int], list[int]] | None:
    """The first index and the extents of what two boxes have in common."""
    first = [max(a, b) for a, b in zip(origin, held.origin, strict=True)]
    last = [min(a + n, b + m) for a, n, b, m in zip(origin, shape, held.origin, held.shape, strict=True)]
    extents = [end - begin for begin, end in zip(first, last, strict=True)]
    return (first, extents) if all(n > 0 for n in extents) else None


def _read_box(
    reader: Reader, held: Box, at: int, strides: Sequence[int], out: np.ndarray[Any, Any], release: bool
) -> bool:
    """Fill an array with elements from a position in a held on, whose strides are in falling order."""
    import numpy as np

    size, begin = out.dtype.itemsize, held.begin + at * out.dtype.itemsize
    if out.flags.c_contiguous and is_row_major(out.shape, strides):  # they are together, here and there
        content = out.reshape(-1).data.cast("B")
        return bool(held.file.read_into(reader, begin, content, release))
    inner = _span(out.shape[1:], strides[1:])
    span = (len(out) - 1) * strides[0] + inner
    limit = (_MAX_DENSE_SPAN_BYTES if span <= 2 * out.size else _MAX_SPAN_BYTES) // size
    if span <= limit:
        read = bytearray(span * size)
        cached = held.file.read_into(reader, begin, memoryview(read), release)
        steps = [stride * size for stride in strides]
        out[...] = np.lib.stride_tricks.as_strided(np.frombuffer(read, out.dtype), out.shape, steps)
        return bool(cached)
    grouped = max((limit - inner) // max(strides[0], 1) + 1, 1)
    cached = True
    for k in range(0, len(out), grouped):
        where = at + k * strides[0]
        if inner > limit:  # it is 1, and there are more extents
            cached = _read_box(reader, held, where, strides[1:], out[k], release) and cached
        else:
            cached = _read_box(reader, held, where, strides, out[k : k + grouped], release) and cached
    return cached


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides are together in row-major order."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def strided(
    file: File, begin: int, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> GatheredFile:
    """A tensor that is a view of consecutive elements."""
    held = Box(file, begin, (0,) * len(shape), shape, strides)
    return GatheredFile.of(replace(file), shape, itemsize, [held])

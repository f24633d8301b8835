"""Tensors whose bytes are not together in row-major order: views of PyTorch files with strides, and shards of one tensor.

They are in a file that does not exist: what is read of it is gathered from other files, a bounded amount at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import ByteRange
from .computed import ComputedFile
from .reader import File, Reader

if TYPE_CHECKING:
    import numpy as np

# Bytes between the first and the last that are needed which are read at once: all of few, as a read takes as long as copying these; of
# more, if one in sixteen is needed, as of a transposed matrix.
_MAX_SPAN_BYTES, _MAX_DENSE_SPAN_BYTES, _DENSE = 64 << 10, 1 << 20, 16


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


@dataclass(frozen=True)
class Gathered:
    """A tensor in row-major order of which each element is in one of some boxes.

    Attributes:
        shape: Its shape.
        size: Bytes of an element.
        boxes: The boxes, which do not overlap.
    """

    shape: tuple[int, ...]
    size: int
    boxes: Sequence[Box]

    offset = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        return self.numel * self.size

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        """Fill a buffer with the elements begin … end."""
        import numpy as np

        elements, cached = np.frombuffer(buffer, np.dtype(f"u{self.size}")), True
        for first, shape, at in _boxes(self.shape, begin, end):
            wanted = elements[at : at + math.prod(shape)].reshape(shape)
            for box in self.boxes:
                if common := _intersection(first, shape, box):
                    slices: tuple[Any, ...] = tuple(slice(*each) for each in common.of_wanted)
                    out = wanted[(*slices, ...)]  # a view, also of a scalar
                    cached = _gather(reader, box, common.of_box, out, release) and cached
        return cached


class GatheredFile(ComputedFile):
    """A file of one tensor that is gathered."""

    @cached_property
    def sources(self) -> Collection[File]:
        tensors = (each for each in self.computed if isinstance(each, Gathered))
        return dict.fromkeys(file for each in tensors for box in each.boxes for file in box.file.sources)


class _Common(NamedTuple):
    """What two boxes have in common: the begin and end in the first along each extent, and the first index in the second."""

    of_wanted: list[tuple[int, int]]
    of_box: list[int]


def gathered(file: File, shape: tuple[int, ...], size: int, boxes: Sequence[Box]) -> ByteRange:
    """The bytes of a tensor that is gathered from boxes. file: one that messages name."""
    tensor = Gathered(shape, size, boxes)
    computed = GatheredFile(
        file.path, tensor.stored, file.identity, file.mode, changed_ns=file.changed_ns, computed=[tensor]
    )
    return ByteRange(computed, 0, computed.size)


def strided(file: File, begin: int, size: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> ByteRange:
    """The bytes of a tensor that is a view of consecutive elements."""
    return gathered(file, shape, size, [Box(file, begin, (0,) * len(shape), shape, strides)])


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


def _intersection(first: Sequence[int], shape: Sequence[int], box: Box) -> _Common | None:
    begins = [max(a, b) for a, b in zip(first, box.origin, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(first, shape, box.origin, box.shape, strict=True)]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        return None
    of_wanted = [(begin - f, end - f) for begin, end, f in zip(begins, ends, first, strict=True)]
    return _Common(of_wanted, [begin - o for begin, o in zip(begins, box.origin, strict=True)])


def _gather(reader: Reader, box: Box, first: Sequence[int], out: np.ndarray[Any, Any], release: bool) -> bool:
    """Fill an array with the elements of a box from an index in it on."""
    at = sum(index * stride for index, stride in zip(first, box.strides, strict=True))
    # As they are in the file: the outermost extent has the longest stride.
    order = sorted(range(out.ndim), key=lambda axis: -box.strides[axis])
    strides = [box.strides[axis] for axis in order]
    return _read_box(reader, box, at, strides, out.transpose(order), release)


def _read_box(
    reader: Reader, box: Box, at: int, strides: Sequence[int], out: np.ndarray[Any, Any], release: bool
) -> bool:
    """Fill an array with elements from a position in a box on, whose strides are in falling order."""
    import numpy as np

    size, begin = out.dtype.itemsize, box.begin + at * out.dtype.itemsize
    if out.flags.c_contiguous and is_row_major(out.shape, strides):  # they are together, here and there
        content = out.reshape(-1).data.cast("B")
        return bool(box.file.read_into(reader, begin, content, release))
    inner = _span(out.shape[1:], strides[1:])
    span = (len(out) - 1) * strides[0] + inner
    limit = (_MAX_DENSE_SPAN_BYTES if span <= _DENSE * out.size else _MAX_SPAN_BYTES) // size
    if span <= limit:
        read = bytearray(span * size)
        cached = box.file.read_into(reader, begin, memoryview(read), release)
        steps = [stride * size for stride in strides]
        out[...] = np.lib.stride_tricks.as_strided(np.frombuffer(read, out.dtype), out.shape, steps)
        return bool(cached)
    grouped = max((limit - inner) // max(strides[0], 1) + 1, 1)
    cached = True
    for k in range(0, len(out), grouped):
        where = at + k * strides[0]
        if inner > limit:  # it is 1, and there are more extents
            cached = _read_box(reader, box, where, strides[1:], out[k], release) and cached
        else:
            cached = _read_box(reader, box, where, strides, out[k : k + grouped], release) and cached
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

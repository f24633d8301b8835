"""Plans cut into ranges for ranks, and into chunks for buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..checkpoints.base import ByteRange
from ..core.ranges import Range
from .plan import Extent, Plan, TensorSlice


def slice_plan(plan: Plan, range_: Range) -> Iterator[Extent]:
    """Yield the extents, cut to the elements that begin within a range."""
    at = 0
    for extent in plan.extents:
        size = extent.sources[0].nbytes
        if range_.begin <= at and at + size <= range_.end:
            yield extent
        elif at < range_.end and range_.begin < at + size:
            yield from _slice_extent(extent, range_.begin - at, range_.end - at)
        at += size


def _slice_extent(extent: Extent, begin: int, end: int) -> Iterator[Extent]:
    """Yield the elements of an extent that begin between two bytes of its base; nothing if none does."""
    if not extent.slices:
        (source,) = extent.sources
        first, last = max(begin, 0), min(end, source.nbytes)
        yield Extent(extent.path, [ByteRange(source.file, source.offset + first, last - first)], [])
        return
    at, slices = 0, []
    before, taken = [0] * len(extent.sources), [0] * len(extent.sources)
    for tensor_slice in extent.slices:
        size = tensor_slice.sizes[0]
        # Rounded up: an element is where its first byte is.
        first, last = (min(max(-((at - edge) // size), 0), tensor_slice.numel) for edge in (begin, end))
        before = [count + first * each for count, each in zip(before, tensor_slice.sizes, strict=True)]
        if first < last:
            slices.append(tensor_slice._replace(start=tensor_slice.start + first, numel=last - first))
            taken = [
                count + (last - first) * each for count, each in zip(taken, tensor_slice.sizes, strict=True)
            ]
        at += tensor_slice.numel * size
    sources = [
        ByteRange(source.file, source.offset + skipped, nbytes)
        for source, skipped, nbytes in zip(extent.sources, before, taken, strict=True)
    ]
    if slices:
        yield Extent(extent.path, sources, slices)


def partition(plan: Plan, ranges: Sequence[Range], count: int, alignment: int = 1) -> list[list[Range]]:
    """Cut ranges between elements into a shard for each rank, with about as many bytes to read and write.

    Args:
        plan: The plan.
        ranges: What is to be done of it.
        count: How many shards.
        alignment: Shards begin at multiples of so many elements of a tensor.
    """
    overlaps: list[tuple[int, int, Extent, int]] = []  # begin, end, and the extent with its own begin
    at = 0
    for extent in plan.extents:
        end = at + extent.sources[0].nbytes
        cuts = [(max(range_.begin, at), min(range_.end, end)) for range_ in ranges]
        overlaps += [(begin, until, extent, at) for begin, until in cuts if begin < until]
        at = end
    total = sum((end - begin) * _moved_per_byte(extent) for begin, end, extent, _ in overlaps)
    shards: list[list[Range]] = [[] for _ in range(count)]
    done = 0.0
    for begin, end, extent, start in overlaps:
        weight = _moved_per_byte(extent)
        while begin < end:
            shard = min(int(done * count / total), count - 1)
            until = end
            if shard < count - 1:
                remaining = max(int((total * (shard + 1) / count - done) / weight), 1)
                until = min(start + _between_elements(extent, begin + remaining - start, alignment), end)
            if shards[shard] and shards[shard][-1].end == begin:
                shards[shard][-1] = Range(shards[shard][-1].begin, until)
            else:
                shards[shard].append(Range(begin, until))
            done += (until - begin) * weight
            begin = until
    return shards


def _moved_per_byte(extent: Extent) -> float:
    """The bytes read and written for each byte of the output."""
    return 1 + sum(source.nbytes for source in extent.sources) / extent.sources[0].nbytes


def _between_elements(extent: Extent, offset: int, alignment: int) -> int:
    """The first byte of an aligned element that is not before an offset into the base's source."""
    at = 0
    for tensor_slice in extent.slices:
        size = tensor_slice.sizes[0]
        end = at + tensor_slice.numel * size
        if offset < end:
            element = tensor_slice.start - (offset - at) // -size
            aligned = -(element // -alignment) * alignment - tensor_slice.start
            return min(at + aligned * size, end)
        at = end
    return offset


def chunks(extents: Iterable[Extent], chunk_bytes: int, alignment: int = 1) -> Iterator[Extent]:
    """Cut extents at multiples of so many elements of a tensor, so that no source is longer than chunk_bytes: 8 or more for each."""
    for extent in extents:
        if extent.slices:
            yield from _chunks_of(extent, chunk_bytes, alignment)
            continue
        (source,) = extent.sources
        for done in range(0, source.nbytes, chunk_bytes):
            size = min(chunk_bytes, source.nbytes - done)
            yield Extent(extent.path, [ByteRange(source.file, source.offset + done, size)], [])


def _chunks_of(extent: Extent, chunk_bytes: int, alignment: int) -> Iterator[Extent]:
    positions = [source.offset for source in extent.sources]
    slices: list[TensorSlice] = []
    remaining = chunk_bytes

    def finished() -> Extent:
        lengths = [
            sum(column)
            for column in zip(*([s.numel * size for size in s.sizes] for s in slices), strict=True)
        ]
        sources = [
            ByteRange(source.file, at, length)
            for source, at, length in zip(extent.sources, positions, lengths, strict=True)
        ]
        positions[:] = [at + length for at, length in zip(positions, lengths, strict=True)]
        return Extent(extent.path, sources, slices)

    for tensor_slice in extent.slices:
        widest = max(tensor_slice.sizes)
        done = 0
        while True:
            count = min(tensor_slice.numel - done, remaining // widest)
            if count < tensor_slice.numel - done:
                count = max(count - (tensor_slice.start + done + count) % alignment, 0)
            if count or not tensor_slice.numel:
                slices.append(tensor_slice._replace(start=tensor_slice.start + done, numel=count))
                done, remaining = done + count, remaining - count * widest
            if done == tensor_slice.numel:
                break
            yield finished()
            slices, remaining = [], chunk_bytes
    yield finished()


def segments_of(plan: Plan, chunk_bytes: int) -> int:
    """Return how many segments the backends are given in all."""
    return sum(len(chunk.slices) for chunk in chunks(plan.extents, chunk_bytes))

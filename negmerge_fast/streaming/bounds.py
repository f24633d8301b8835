"""Bounds of magnitudes of checkpoints, in bounded memory (core/bounds.py).

The numbers are read as a merge reads them: chunks in the order of the files, on several threads. A sample of a tensor is read when its first
chunk is; with bounds over the whole model, one of all tensors before. What is known of a tensor is kept until its last chunk was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock, Semaphore
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..backends import magnitudes, native, registry
from ..backends.magnitudes import Array, Group, Sample
from ..checkpoints.base import ByteRange
from ..checkpoints.reader import Reader
from ..core.batch import Batch, Signature, segment_at
from ..core.bounds import Bounds, Interval, Trimming, locate
from ..core.errors import InputError
from ..runtime import memory
from ..runtime.buffers import Timeline, WorkerBuffers
from ..runtime.device import buffers_on
from ..runtime.distributed import SINGLE, SingleProcess
from ..runtime.executor import process_in_order
from .budget import allocate, available_bytes, max_open_files
from .options import MergeOptions
from .partition import chunks
from .plan import Extent, Plan, TensorSlice
from .read_ahead import ReadAhead
from .worker import batches

# Elements of a block of a sample of what is computed: each takes a call.
_COMPUTED_BLOCK = 2048
# Bytes of a version that are sampled at once, at most: the keys of all of them are kept for a while.
_SAMPLED_BYTES = 1 << 17
# Bytes of a version in a chunk, at most: a worker has a buffer of keys for each version, too.
_MAX_CHUNK_BYTES = 1 << 20
# Keys that are kept of each interval, at least.
_MIN_KEPT = 1 << 10


def bytes_to_measure(plan: Plan) -> int:
    """What `measure` usually reads: every version of what is merged, once."""
    return sum(source.nbytes for extent in plan.extents if extent.slices for source in extent.sources)


def measure(
    plan: Plan,
    method: Trimming,
    options: MergeOptions,
    ranks: SingleProcess = SINGLE,
    on_moved: Callable[[int], None] | None = None,
) -> dict[str, Bounds]:
    """Find the exact bounds of each tensor that is merged, the same on all ranks.

    Args:
        plan: The plan of the merge.
        method: Whose fractions: a Method that needs bounds.
        options: The memory budget and the number of threads are used.
        ranks: The processes that merge together, all of which call this.
        on_moved: Called in the caller's thread with the bytes that this rank has read so far: in all usually bytes_to_measure(plan)
            of all ranks together, more if something has to be read again. It may raise to stop.

    Raises:
        InputError: If the memory budget is too small.
        OSError: If reading fails.
    """
    own = list(_extents_of(plan, _shards(plan, ranks.count)[ranks.rank]))
    with ranks.failing_together():
        job = _Job(plan, options, method.over, on_moved)
    arithmetics = {s.name: s.signature.arithmetic for e in plan.extents for s in e.slices}
    if method.over == "tensor":
        found = ranks.all_gather(lambda: _of_tensors(job, own, method))
        return {name: Bounds(tuple(low), tuple(high)) for each in found for name, low, high in each}
    group = _of_model(job, own, method, ranks)
    return {name: group.bounds(arithmetic) for name, arithmetic in arithmetics.items()}


def _of_tensors(
    job: _Job, extents: list[Extent], method: Trimming
) -> list[tuple[str, list[float], list[float]]]:
    """The bounds of the tensors of some extents, as JSON values."""
    tensors = _Tensors(job, extents, method)
    while missing := tensors.missing():
        job.read(_with(extents, missing), tensors)
    return [(name, list(low), list(high)) for name, (low, high) in tensors.bounds.items()]


class _Tensors:
    """A group for each tensor, made when it is first read and dropped when its bounds are found: there may be very many."""

    def __init__(self, job: _Job, extents: Sequence[Extent], method: Trimming) -> None:
        self._models, self._capacity, self._method = job.models, job.capacity, method
        self._slices = {s.name: s for extent in extents for s in extent.slices}
        self._groups: dict[str, Group] = {}
        self._lock = Lock()
        self.bounds: dict[str, Bounds] = {}
        for name, each in self._slices.items():
            if not any(bottom or top for bottom, top in method.ranks(self._models, each.numel)):
                self.bounds[name] = Bounds((0.0,) * self._models, (math.inf,) * self._models)

    def missing(self) -> set[str]:
        return self._slices.keys() - self.bounds.keys()

    def group(self, name: str) -> Group:
        with self._lock:
            found = self._groups.get(name)
            if found is None:
                whole = self._slices[name]
                found = Group(
                    whole.numel, self._models, whole.signature.arithmetic, self._method, self._capacity
                )
                self._groups[name] = found
            return found

    def complete(self, name: str, group: Group) -> None:
        """Finish a group to which all elements were added."""
        group.finish()
        if group.is_found:
            with self._lock:
                self.bounds[name] = group.bounds(group.arithmetic)
                del self._groups[name]


class _Model:
    """One group for all tensors."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def group(self, name: str) -> Group:
        return self._group

    def complete(self, name: str, group: Group) -> None:
        """Nothing: other ranks add, too."""


def _of_model(job: _Job, own: list[Extent], method: Trimming, ranks: SingleProcess) -> Group:
    """The group of all tensors, of which ranks read some extents each."""
    slices = [s for extent in job.plan.extents for s in extent.slices]
    arithmetic = "F64" if any(s.signature.arithmetic == "F64" for s in slices) else "F32"
    group = Group(sum(s.numel for s in slices), job.models, arithmetic, method, job.capacity)

    def choose_intervals() -> list[list[Interval]]:
        group.plan(job.sample_model(group) if group.needs_sample else None)
        return [search.intervals for search in group.searches]

    chosen = ranks.on_rank0(choose_intervals)
    for search, intervals in zip(group.searches, chosen, strict=True):
        search.intervals = [Interval(*interval) for interval in intervals]
    while not group.is_found:
        group.begin()

        def read() -> list[int]:
            job.read(own, _Model(group))
            return group.steps()

        steps = ranks.all_gather(read)
        if ranks.count == 1:
            group.finish()
        else:
            locate(
                group.searches,
                [max(each) for each in zip(*steps, strict=True)],
                lambda asked: _added(ranks.all_gather(lambda: group.count_lower(asked))),
            )
            group.plan()
    return group


def _added(counts: Sequence[list[list[int]]]) -> list[list[int]]:
    """The sums of what ranks counted."""
    return [[sum(column) for column in zip(*each, strict=True)] for each in zip(*counts, strict=True)]


def _shards(plan: Plan, count: int) -> list[set[str]]:
    """The names of the tensors that each rank reads: as many bytes, one after the other."""
    slices = [s for extent in plan.extents for s in extent.slices]
    total, done = sum(s.numel * sum(s.sizes) for s in slices), 0
    shards: list[set[str]] = [set() for _ in range(count)]
    for each in slices:
        shards[min(done * count // max(total, 1), count - 1)].add(each.name)
        done += each.numel * sum(each.sizes)
    return shards


def _extents_of(plan: Plan, names: set[str]) -> Iterator[Extent]:
    return _with((extent for extent in plan.extents if extent.slices), names)


def _with(extents: Iterable[Extent], names: set[str]) -> Iterator[Extent]:
    """Cut extents to the tensors of these names."""
    for extent in extents:
        if all(s.name in names for s in extent.slices):
            yield extent
            continue
        held: list[TensorSlice] = []
        begins: list[int] = []
        for each, _, starts in _located(extent):
            if each.name in names:
                begins = begins if held else starts
                held.append(each)
            elif held:
                yield _cut(extent, held, begins)
                held = []
        if held:
            yield _cut(extent, held, begins)


def _located(extent: Extent) -> Iterator[tuple[TensorSlice, list[ByteRange], list[int]]]:
    """The slices of an extent, its sources, and where each slice begins in the sources' files."""
    starts = [source.offset for source in extent.sources]
    for each in extent.slices:
        yield each, extent.sources, starts
        starts = [start + each.numel * size for start, size in zip(starts, each.sizes, strict=True)]


def _cut(extent: Extent, slices: list[TensorSlice], begins: Sequence[int]) -> Extent:
    sizes = [
        sum(column) for column in zip(*([s.numel * size for size in s.sizes] for s in slices), strict=True)
    ]
    sources = [ByteRange(s.file, at, n) for s, at, n in zip(extent.sources, begins, sizes, strict=True)]
    return Extent(extent.path, sources, slices)


class _WholeTensor(NamedTuple):
    """Where a tensor is: its first byte in each version."""

    sources: list[ByteRange]
    numel: int
    signature: Signature


class _Job:
    """What reads of one job have in common."""

    def __init__(
        self, plan: Plan, options: MergeOptions, over: str, on_moved: Callable[[int], None] | None
    ) -> None:
        self.plan, self.options, self.on_moved, self.done = plan, options, on_moved, 0
        self.models = len(plan.models)
        name, _ = registry.choose("auto", "cpu")
        self.concurrent = name in registry.CONCURRENT
        self.measure = magnitudes.choose("cpu")
        # The keys of a chunk's elements are as large as the elements of one version, or twice of 16-bit ones.
        buffers, threads = 2 * self.models, options.thread_count
        available = available_bytes(options.memory_budget)[1]
        intervals = 2 * self.models * (1 if over == "model" else max(threads, 2) + 1)
        kept = min(intervals * magnitudes.BYTES_PER_KEPT * magnitudes.MAX_KEPT, available // 4)
        try:
            found = allocate(plan, replace(options, memory_budget=available - kept), "cpu", (name,), buffers)
        except InputError:  # then little is kept of an interval, and more has to be read again
            found = allocate(plan, options, "cpu", (name,), buffers)
        self.workers, chunk_bytes, held = found
        self.chunk_bytes = min(chunk_bytes, _MAX_CHUNK_BYTES)
        kept = max(available - held, 0) // (intervals * magnitudes.BYTES_PER_KEPT)
        self.capacity = min(max(kept, _MIN_KEPT), magnitudes.MAX_KEPT)
        self.release = bytes_to_measure(plan) > memory.free_memory() // 2
        self.turns = Semaphore(options.thread_count if self.concurrent else 1)
        self.read_ahead = ReadAhead()

    def read(self, extents: Iterable[Extent], groups: _Tensors | _Model) -> None:
        """Add all elements of some extents to the groups of their tensors."""
        with self._shared_reader() as shared:

            @contextmanager
            def open_worker() -> Iterator[Callable[[Extent], int]]:
                with self._reader(shared) as reader, self._buffers() as buffers:
                    yield _Worker(self, groups, reader, buffers)

            process_in_order(chunks(extents, self.chunk_bytes), self.workers, open_worker, self._on_result)

    def sample_model(self, group: Group) -> Sample:
        """A sample of all tensors."""
        samples = []
        tensors = [located for extent in self.plan.extents if extent.slices for located in _located(extent)]
        wanted = magnitudes.allot([each.numel for each, _, _ in tensors], magnitudes.MODEL_SAMPLE)
        with self._shared_reader() as shared, self._reader(shared) as reader, self._buffers() as buffers:
            worker = _Worker(self, _Model(group), reader, buffers)
            for (each, sources, starts), count in zip(tensors, wanted, strict=True):
                if count:
                    begins = [ByteRange(s.file, at, 0) for s, at in zip(sources, starts, strict=True)]
                    tensor = _WholeTensor(begins, each.numel, each.signature)
                    samples += worker.sample(tensor, count, group.arithmetic)
                    self._on_result(0)
        return _joined(samples)

    def _on_result(self, read: int) -> None:
        self.done += read
        if self.on_moved:
            self.on_moved(self.done)

    def _shared_reader(self) -> Any:
        """A reader for all workers, if it can keep all files open: the system reads ahead for each descriptor."""
        files = len({file for files in self.plan.sources.values() for file in files})
        return Reader(files) if files <= max_open_files() else nullcontext()

    def _reader(self, shared: Reader | None) -> Any:
        return nullcontext(shared) if shared else Reader(max(max_open_files() // self.workers, 1))

    def _buffers(self) -> Any:
        return buffers_on("cpu", self.models + 1, self.chunk_bytes, Timeline(kept=False))


def _joined(samples: Sequence[Sample]) -> Sample:
    keys = zip(*(sample.keys for sample in samples), strict=True)
    return Sample(
        [np.concatenate(each) for each in keys], np.concatenate([sample.sizes for sample in samples])
    )


@dataclass(frozen=True)
class _Worker:
    """Reads a chunk of all versions, and adds it to the groups of its tensors."""

    job: _Job
    groups: _Tensors | _Model
    reader: Reader
    buffers: WorkerBuffers

    def __call__(self, chunk: Extent) -> int:
        for each, _, starts in _located(chunk):
            self._plan(self.groups.group(each.name), chunk, each, starts)
        self._read(chunk.sources)
        with self.job.turns:
            for batch, slices in batches(chunk, "cpu", *self.buffers.addresses()):
                self._add(batch, slices)
        return sum(source.nbytes for source in chunk.sources)

    def _plan(self, group: Group, chunk: Extent, each: TensorSlice, starts: Sequence[int]) -> None:
        """Choose the intervals of the group of a slice that has none."""
        with group.lock:
            if group.has_intervals:
                return
            sample = None
            if group.needs_sample:
                begins = [at - each.start * size for at, size in zip(starts, each.sizes, strict=True)]
                sources = [ByteRange(s.file, at, 0) for s, at in zip(chunk.sources, begins, strict=True)]
                wanted = magnitudes.sample_size(group.numel)
                sample = _joined(
                    self.sample(_WholeTensor(sources, group.numel, each.signature), wanted, group.arithmetic)
                )
            group.plan(sample)

    def _add(self, batch: Batch, slices: Sequence[TensorSlice]) -> None:
        arithmetic = batch.signature.arithmetic
        groups = [self.groups.group(each.name) for each in slices]
        edges = np.stack([group.edges(arithmetic) for group in groups])
        counts, found = self.job.measure(batch, edges)
        for row, (group, each) in enumerate(zip(groups, slices, strict=True)):
            if group.add(arithmetic, each.numel, edges[row], counts[row], found[row]):
                self.groups.complete(each.name, group)

    def _read(self, sources: Sequence[ByteRange]) -> None:
        buffers = self.buffers.reserve([source.nbytes for source in sources])
        self.reader.requests = requested = self.job.read_ahead.requests
        began, cached = perf_counter(), True
        for source, buffer in zip(sources, buffers, strict=True):
            cached = bool(source.read_into(self.reader, buffer, release=self.job.release)) and cached
        read = sum(source.nbytes for source in sources)
        self.job.read_ahead.record(cached, read, perf_counter() - began, requested)

    def sample(self, tensor: _WholeTensor, wanted: int, arithmetic: str) -> list[Sample]:
        """Some elements of a tensor, in samples as large as the buffers."""
        sizes = TensorSlice("", 0, 0, tensor.signature).sizes
        computed = any(source.file.is_computed for source in tensor.sources)
        block = _COMPUTED_BLOCK if computed else magnitudes.SAMPLE_BLOCK
        limit = min(self.job.chunk_bytes, _SAMPLED_BYTES) // max(sizes)
        blocks = magnitudes.sample_blocks(tensor.numel, wanted, min(block, limit, wanted))
        if len(blocks) == 1 and blocks[0][1] > limit:
            blocks = [(at, min(limit, tensor.numel - at)) for at in range(0, tensor.numel, limit)]
        samples, at_once = [], max(limit // max((size for _, size in blocks), default=1), 1)
        for first in range(0, len(blocks), at_once):
            part = np.array(blocks[first : first + at_once])
            numel = int(part[:, 1].sum())
            buffers = self.buffers.reserve([numel * size for size in sizes])
            addresses, owner = self.buffers.addresses()
            for source, size, buffer, address in zip(tensor.sources, sizes, buffers, addresses, strict=True):
                self._read_blocks(source, part * size, buffer, address)
            batch = Batch(
                "cpu",
                tensor.signature,
                [segment_at(numel, tensor.signature, addresses, [owner] * len(sizes))],
            )
            with self.job.turns:
                measured = self.job.measure(batch, magnitudes.everything(1, self.job.models))
            keys = magnitudes.keys_of_all(measured, [numel], tensor.signature.arithmetic, arithmetic)
            samples.append(Sample(keys, part[:, 1]))
        return samples

    def _read_blocks(self, source: ByteRange, blocks: Array, buffer: memoryview, address: int) -> None:
        """Read blocks of a source, pairs of start and size in bytes, one behind the other."""
        ends = np.cumsum(blocks[:, 1])
        located = source.locate()
        if native.why_not("cpu", "cpu") is None and not located.file.is_computed:
            rows = np.empty((len(blocks), 4), np.int64)
            rows[:, 0] = self.reader.descriptor(located.file)
            rows[:, 1], rows[:, 2] = located.offset + blocks[:, 0], blocks[:, 1]
            rows[:, 3] = address + ends - blocks[:, 1]
            if native.library().read_ranges(rows.ctypes.data, len(rows)):
                return
        for (start, size), end in zip(blocks.tolist(), ends.tolist(), strict=True):
            source.read_into(self.reader, buffer[end - size : end], start)

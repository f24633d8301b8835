"""A worker of a merge of checkpoints: it reads, prunes, merges and writes chunks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ..backends import registry
from ..checkpoints.base import ByteRange
from ..checkpoints.reader import Reader
from ..core.batch import COUNTED, Batch, Counts, Merge, Operand, Rows, Segment, Signature, segment_at
from ..core.choices import Terms
from ..core.errors import InputError, short_repr
from ..core.low_rank import Expansion
from ..core.rule import NonFinite, Rule
from ..output.writer import Writer
from ..runtime.buffers import Timeline, WorkerBuffers
from .native import IN_MEMORY, NOT_READ, NOT_WRITTEN, ChunkMerger
from .plan import Extent, Plan, TensorSlice
from .progress import ChunkCounts, ChunkResult
from .read_ahead import ReadAhead
from .rules import Rules
from .skipping import ChunkPruner, Skipping, none_agreed

# Of one source of a chunk, the elements of each slice that are known by factors, or None; and that of each source, the base's first.
Expansions: TypeAlias = "Sequence[Expansion | None]"
Known: TypeAlias = "Sequence[Expansions | None]"

_NONFINITE = COUNTED.index("nonfinite")


@dataclass(frozen=True)
class Worker:
    """Processes chunks one at a time, in its own buffers.

    Attributes:
        plan: What the chunks are of.
        rules: What each tensor is merged by.
        merge: The backend's function, called on `device` with `merge_threads` threads.
        turns: Held while merging: a backend that must not run concurrently has one turn for all workers.
        low_rank: Whether the backend's function takes what is known by factors as it is (registry.choose_low_rank).
        nonfinite: With "error" a non-finite element is one.
        skipping: What the workers know together of models that need not be read.
        writer: Takes the output.
        release: Whether pages of files are given back to the system after use.
        reader: Reads the inputs.
        read_ahead: How, as all workers together found best.
        native: Processes chunks in one call; None for other backends, and to skip what need not be read.
        buffers: Memory for all versions of a chunk.
        timeline: Records what the worker did when.
    """

    plan: Plan
    rules: Rules
    merge: Merge
    device: str
    merge_threads: int | None
    turns: AbstractContextManager[Any]
    low_rank: bool
    nonfinite: NonFinite
    skipping: Skipping
    writer: Writer
    release: bool
    reader: Reader
    read_ahead: ReadAhead
    native: ChunkMerger | None
    buffers: WorkerBuffers
    timeline: Timeline

    def process_chunk(self, chunk: Extent) -> ChunkResult:
        """Read a chunk, merge it in place on the base's buffer, and write that."""
        base, known = chunk.sources[0], self.known_by_factors(chunk)
        buffers = self.buffers.reserve(self.sizes_of(chunk, known))
        if (
            self.native
            and base.nbytes
            and (done := self._process_natively(self.native, chunk, buffers, known))
        ):
            return done
        pruner = ChunkPruner(self.skipping, chunk, buffers, *self.buffers.addresses())
        self.reader.requests = requested = self.read_ahead.requests
        began = time.perf_counter()
        with self.timeline.span("read"):
            skipped, cached = self._read(chunk, pruner, buffers, known)
        read = sum(source.stored_nbytes for source in chunk.sources) - skipped
        if read:  # and not constants of a file that is laid out anew
            self.read_ahead.record(cached, read, time.perf_counter() - began, requested)
        if pruner.can_agree:
            merged: list[tuple[list[TensorSlice], Counts]] = []
            with self.turns, self.buffers.launch() as (addresses, owner):
                for batch, slices, rule in ruled_batches(
                    self.rules, chunk, self.device, addresses, owner, known=known
                ):
                    merged.append((slices, self.merge(batch, rule, self.merge_threads)))
            self.buffers.wait()
            counted = self._count(chunk, merged, self.rules)
        else:
            counted = none_agreed(chunk)
        with self.timeline.span("write"):
            like = None if pruner.can_agree else self._descriptor(base)
            self.writer.write(chunk.path, base.offset, buffers[0], self.release, like)
        return ChunkResult(read, base.nbytes, counted, skipped)

    def process_for(self, chunk: Extent, outputs: Sequence[tuple[Rules, Writer]]) -> list[ChunkResult]:
        """Read a chunk once, and merge and write it for several outputs.

        Args:
            chunk: The chunk.
            outputs: The rules and the writer of each.

        Returns:
            A result for each output. What was read is in the first.
        """
        base, sizes = chunk.sources[0], [source.nbytes for source in chunk.sources]
        # The result is the first version: that is what a device gives back.
        result, *buffers = self.buffers.reserve([base.nbytes, *sizes])
        self.reader.requests = requested = self.read_ahead.requests
        began, cached = time.perf_counter(), True
        with self.timeline.span("read"):
            for source, buffer in zip(chunk.sources, buffers, strict=True):
                cached = bool(source.read_into(self.reader, buffer, release=self.release)) and cached
        read = sum(source.stored_nbytes for source in chunk.sources)
        self.read_ahead.record(cached, read, time.perf_counter() - began, requested)
        done: list[ChunkResult] = []
        for rules, writer in outputs:
            counted: list[ChunkCounts] = []
            if chunk.slices:
                counted = self._merge_into(chunk, rules)
            like = None if chunk.slices else self._descriptor(base)
            with self.timeline.span("write"):
                data = result if chunk.slices else buffers[0]
                writer.write(chunk.path, base.offset, data, self.release, like)
            done.append(ChunkResult(0 if done else read, base.nbytes, counted))
        return done

    def _merge_into(self, chunk: Extent, rules: Rules) -> list[ChunkCounts]:
        """Merge a chunk that was read behind the first of the reserved versions, into that one."""
        merged: list[tuple[list[TensorSlice], Counts]] = []
        with self.turns, self.buffers.launch() as (addresses, owner):
            for batch, slices, rule in ruled_batches(
                rules, chunk, self.device, addresses[1:], owner, out=addresses[0]
            ):
                merged.append((slices, self.merge(batch, rule, self.merge_threads)))
        self.buffers.wait()
        return self._count(chunk, merged, rules)

    def _process_natively(
        self, native: ChunkMerger, chunk: Extent, buffers: Sequence[memoryview], known: Known
    ) -> ChunkResult | None:
        """Process a chunk in one call; None if it cannot be read so, and is to be read again to tell why."""
        if len(chunk.sources) > self.reader.max_open:  # their descriptors are all needed at once
            return None
        base, requested = chunk.sources[0], self.read_ahead.requests
        located = chunk._replace(sources=[source.locate() for source in chunk.sources])
        if located.sources[0].file.is_computed:  # the call writes what it has read
            return None
        for k, source in enumerate(located.sources):
            if source.file.is_computed and buffers[k].nbytes:  # and not all known by factors
                with self.timeline.span("read"):
                    self.read_source(chunk, k, buffers[k], known)
        # Only now: what was computed was read from files, which the reader may have opened in place of others.
        descriptors = [
            IN_MEMORY if source.file.is_computed else self.reader.descriptor(source.file)
            for source in located.sources
        ]
        output = self.writer.descriptor(chunk.path)
        addresses, owner = self.buffers.addresses()
        merged = list(ruled_batches(self.rules, chunk, "cpu", addresses, owner, known=known))
        done = native.merge(located, merged, descriptors, addresses, output, requested, base.offset)
        if done.outcome == NOT_READ:
            return None
        counted = self._count(chunk, done.counted, self.rules)
        if done.outcome == NOT_WRITTEN:
            raise OSError(done.error, os.strerror(done.error), str(self.writer.destination.path))
        read = sum(source.stored_nbytes for source in chunk.sources)
        began, *ended = done.times
        self.read_ahead.record(done.cached, read, ended[0] - began, requested)
        for stage, end in zip(("read", "merge", "write"), ended, strict=True):
            self.timeline.add(stage, began, end)
            began = end
        with self.timeline.span("write"):
            self.writer.written(chunk.path, base.offset, buffers[0], self.release)
        return ChunkResult(read, base.nbytes, counted)

    def _descriptor(self, source: ByteRange) -> int | None:
        """The descriptor of a source's file; None if its bytes are computed."""
        return None if source.file.is_computed else self.reader.descriptor(source.file)

    def known_by_factors(self, chunk: Extent) -> Known:
        """What of each source of a chunk is known by factors, for each slice; None if nothing is. Empty if none is for any."""
        if not self.low_rank or not chunk.slices:
            return ()
        known: list[Expansions | None] = []
        wanted = [(s.name, s.start, s.signature.arithmetic) for s in chunk.slices]
        with self.timeline.span("read"):
            for source in chunk.sources:
                found: Expansions = ()
                if source.file.is_low_rank:
                    upload = self.buffers.upload
                    found = [
                        source.file.expansion(self.reader, name, start, arithmetic, upload)
                        for name, start, arithmetic in wanted
                    ]
                known.append(found if any(found) else None)
        return known

    def sizes_of(self, chunk: Extent, known: Known) -> list[int]:
        """The bytes of each source that have to be in a buffer."""
        sizes = [source.nbytes for source in chunk.sources]
        for k, expansions in enumerate(known):
            if expansions and all(expansions):
                sizes[k] = 0
        return sizes

    def read_source(self, chunk: Extent, k: int, buffer: memoryview, known: Known) -> bool:
        """Read what of a source is not known by factors; returns whether all of that was cached."""
        source, expansions = chunk.sources[k], known[k] if known else None
        if expansions is None:
            return bool(source.read_into(self.reader, buffer, release=self.release))
        cached, at = True, 0
        for tensor_slice, expansion in zip(chunk.slices, expansions, strict=True):
            end = at + tensor_slice.numel * tensor_slice.sizes[k]
            if expansion is None:
                cached = bool(source.read_into(self.reader, buffer[at:end], at, self.release)) and cached
            at = end
        return cached

    def _read(
        self, chunk: Extent, pruner: ChunkPruner, buffers: Sequence[memoryview], known: Known
    ) -> tuple[int, bool]:
        """Read the base and, of each model, what can still agree.

        Returns:
            The bytes that were skipped, and whether all others were cached.
        """
        base, *models = chunk.sources
        cached = base.read_into(self.reader, buffers[0], release=self.release)
        all_cached = bool(cached)
        skipped, prefetched, expected = 0, 0, self.skipping.expected_models
        for k, (source, buffer) in enumerate(zip(models, buffers[1:], strict=True)):
            pruner.prune(k)
            if not pruner.can_agree:
                skipped += sum(model.nbytes for model in models[k:])
                self.skipping.record(k, skipped)
                return skipped, all_cached
            if k == prefetched and not cached:  # nor are the models, then: the disk may fetch several at once
                self._prefetch(models, range(k, expected), pruner)
                prefetched, expected = expected, len(models)
            if known and known[k + 1]:
                all_cached = self.read_source(chunk, k + 1, buffer, known) and all_cached
                continue
            ranges = pruner.byte_ranges(k + 1)
            if omitted := source.nbytes - sum(end - begin for begin, end in ranges):
                skipped += omitted
                import numpy as np

                np.frombuffer(buffer, np.uint8).fill(0)
            for begin, end in ranges:
                found = source.read_into(self.reader, buffer[begin:end], begin, self.release)
                all_cached = all_cached and bool(found)
        if models:
            self.skipping.record(len(models), skipped)
        return skipped, all_cached

    def _prefetch(self, models: Sequence[ByteRange], numbers: range, pruner: ChunkPruner) -> None:
        for k in numbers:
            for begin, end in pruner.byte_ranges(k + 1):
                models[k].file.expect(self.reader, models[k].offset + begin, end - begin)

    def _count(
        self, chunk: Extent, merged: Sequence[tuple[list[TensorSlice], Counts]], rules: Rules
    ) -> list[ChunkCounts]:
        counted = [([(s.name, s.numel) for s in slices], Rows(c.tolist())) for slices, c in merged]
        if self.nonfinite == "error" and any(row[_NONFINITE] for _, rows in counted for row in rows):
            self._refuse_nonfinite(chunk, rules)
        return counted

    def _refuse_nonfinite(self, chunk: Extent, rules: Rules) -> None:
        """Name the first non-finite element of a chunk; its base may have been overwritten, and all is read again."""
        import numpy as np

        buffers = self.buffers.reserve([source.nbytes for source in chunk.sources])
        with Reader(1) as reader:
            for source, buffer in zip(chunk.sources, buffers, strict=True):
                source.read_into(reader, buffer)
        for batch, slices, rule in ruled_batches(rules, chunk, "cpu", *self.buffers.addresses()):
            if found := registry.first_nonfinite(batch, rule):
                row, element, version, value = found
                name, start = slices[row].name, slices[row].start
                tensor = self.plan.base.tensors[name]
                held = self.plan.models[version].tensors[name] if isinstance(version, int) else tensor
                file = chunk.sources[-1].file if version == "weights" else held.source.file
                index = tuple(int(i) for i in np.unravel_index(start + element, tensor.spec.shape))
                what = (
                    f"the result at {index} is not finite" if version == "result" else f"{value} at {index}"
                )
                raise InputError(
                    f"{file.path}: tensor {short_repr(name)}: {what}, "
                    "expected finite numbers (or --nonfinite keep-base)"
                )
        raise RuntimeError("a non-finite number was counted, and is not found again")


def with_factors(segment: Segment, known: Known, number: int) -> Segment:
    """The segment of slice `number` of a chunk, with what is known by factors in place of operands."""
    if not known:
        return segment
    models: list[Any] = list(segment.models)
    for k, expansions in enumerate(known[1 : 1 + len(models)]):
        models[k] = (expansions and expansions[number]) or models[k]
    return segment._replace(models=models)


def batches(
    chunk: Extent, device: str, addresses: list[int], owner: Any
) -> Iterator[tuple[Batch, list[TensorSlice]]]:
    """Yield one batch for each signature in a chunk without weights, and the slices that its segments are of."""
    for batch, slices, _ in ruled_batches(_PLAIN, chunk, device, addresses, owner):
        yield batch, slices


_PLAIN = Rules(Rule(0.0))


class _Group(NamedTuple):
    """Segments of one batch, the slices that they are of, and their terms, if the rule needs some."""

    segments: list[Segment]
    slices: list[TensorSlice]
    terms: list[Terms]


def ruled_batches(
    rules: Rules,
    chunk: Extent,
    device: str,
    addresses: list[int],
    owner: Any,
    out: int | None = None,
    known: Known = (),
) -> Iterator[tuple[Batch, list[TensorSlice], Rule]]:
    """Yield one batch for each signature and λ in a chunk, the slices that its segments are of, and its rule.

    Args:
        rules: What each tensor is merged by.
        chunk: What was read.
        device: Where the versions are.
        addresses: Where each version begins.
        owner: Keeps that memory.
        out: Where the result begins; in place on the base if it is None.
        known: What of each version is known by factors, in place of what would be at its address.
    """
    groups: dict[tuple[Signature, float | None], _Group] = {}
    has_terms = rules.rule.choices is not None
    for number, tensor_slice in enumerate(chunk.slices):
        numel, signature = tensor_slice.numel, tensor_slice.signature
        segment = segment_of(tensor_slice, addresses, owner)
        segment = with_factors(segment, known, number)
        if out is not None:
            segment = segment._replace(out=Operand(out, signature.result, owner))
            out += numel * tensor_slice.sizes[0]
        group = groups.setdefault((signature, rules.scale_of(tensor_slice.name)), _Group([], [], []))
        group.segments.append(segment)
        group.slices.append(tensor_slice)
        if has_terms:
            group.terms.append(rules.terms(tensor_slice, weight_of(tensor_slice, addresses, owner)))
        addresses = [a + numel * size for a, size in zip(addresses, tensor_slice.sizes, strict=True)]
    for (signature, scale), group in groups.items():
        batch = Batch(device, signature, group.segments, group.terms if has_terms else None)
        yield batch, group.slices, rules.with_scale(scale)


def segment_of(tensor_slice: TensorSlice, addresses: list[int], owner: Any) -> Segment:
    """The segment of a slice whose versions, and weights if it has some, begin at addresses: in place on the base."""
    versions = addresses if tensor_slice.weight is None else addresses[:-1]
    return segment_at(tensor_slice.numel, tensor_slice.signature, versions, [owner] * len(versions))


def weight_of(tensor_slice: TensorSlice, addresses: list[int], owner: Any) -> Operand | None:
    """The weights of a slice, which begin at the last of the addresses."""
    return None if tensor_slice.weight is None else Operand(addresses[-1], tensor_slice.weight, owner)

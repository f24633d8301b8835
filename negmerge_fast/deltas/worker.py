"""A worker that makes a delta: it reads chunks, and writes masks; means go to the caller, in the order of the chunks."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..backends import masks
from ..core.batch import COUNTED, Batch, Operand, Rows, Segment, Signature
from ..core.choices import Terms
from ..core.delta import mask_bytes
from ..core.dtypes import FLOAT_SIZES
from ..streaming.plan import Extent, TensorSlice
from ..streaming.progress import ChunkResult
from ..streaming.worker import Known, Worker, segment_of, weight_of, with_factors
from .format import DeltaFile

_AGREED, _NONFINITE = COUNTED.index("agreed"), COUNTED.index("nonfinite")

# Buffers of a worker beside those for the versions, as long as a chunk: dense means, at most twice as wide as what is read, and the
# same packed. Masks have memory of their own: that of a single number is a whole word.
EXTRA_BUFFERS = 4


class DeltaResult(NamedTuple):
    """What a worker did with a chunk of a file, and the means of its elements in the masks."""

    chunk: ChunkResult
    path: str
    means: bytes


class _Placed(NamedTuple):
    """A slice of a chunk, the address of its dense means, and its counts."""

    tensor_slice: TensorSlice
    dense: int
    counts: list[int]


@dataclass(frozen=True)
class DeltaWorker(Worker):
    """Processes chunks one at a time. Its `merge` is a backend's function for the means (registry.consensus).

    Attributes:
        files: The files of the delta, by name.
    """

    files: Mapping[str, DeltaFile] = field(kw_only=True)

    def process(self, chunk: Extent) -> DeltaResult:
        """Read a chunk, write its masks, and return its means."""
        dense_bytes = sum(s.numel * FLOAT_SIZES[s.signature.arithmetic] for s in chunk.slices)
        sizes = [mask_bytes(s.numel) for s in chunk.slices]
        known = self.known_by_factors(chunk)
        *versions, _, packed = self.buffers.reserve([*self.sizes_of(chunk, known), dense_bytes, dense_bytes])
        mask = bytearray(sum(sizes))
        self._read_all(chunk, versions, known)
        addresses, owner = self.buffers.addresses()
        *at, dense, means = addresses
        with self.turns, self.timeline.span("merge"):
            placed = self._consensus(chunk, at, dense, owner, known)
        if self.nonfinite == "error" and any(each.counts[_NONFINITE] for each in placed):
            self._refuse_nonfinite(chunk, self.rules)
        file, end = self.files[chunk.path], means
        words = ctypes.addressof(ctypes.c_char.from_buffer(mask)) if mask else 0
        for each, nbytes in zip(placed, sizes, strict=True):
            name, _, numel, signature, _ = each.tensor_slice
            dtype = file.tensors[name].means_dtype
            each.counts[_AGREED] = masks.pack(each.dense, numel, signature.arithmetic, dtype, words, end)
            end += each.counts[_AGREED] * FLOAT_SIZES[dtype]
            words += nbytes
        # The masks of neighbours are neighbours, and a chunk begins at a whole word of one.
        name, start, *_ = chunk.slices[0]
        self.writer.write(chunk.path, file.mask_position(name, start), memoryview(mask), self.release)
        read = sum(source.stored_nbytes for source in chunk.sources)
        counted = [([(s.name, s.numel) for s in chunk.slices], Rows(each.counts for each in placed))]
        return DeltaResult(
            ChunkResult(read, chunk.sources[0].nbytes, counted),
            chunk.path,
            packed[: end - means].tobytes(),
        )

    def _read_all(self, chunk: Extent, buffers: list[memoryview], known: Known) -> None:
        self.reader.requests = requested = self.read_ahead.requests
        began, cached = time.perf_counter(), True
        with self.timeline.span("read"):
            for k, buffer in enumerate(buffers):
                cached = self.read_source(chunk, k, buffer, known) and cached
        nbytes = sum(source.stored_nbytes for source in chunk.sources)
        self.read_ahead.record(cached, nbytes, time.perf_counter() - began, requested)

    def _consensus(
        self, chunk: Extent, at: list[int], dense: int, owner: object, known: Known
    ) -> list[_Placed]:
        """Write the dense means of a chunk's slices, one after the other."""
        placed: list[_Placed] = []
        groups: dict[Signature, tuple[list[Segment], list[_Placed], list[Terms]]] = {}
        has_terms = self.rules.rule.choices is not None
        for number, tensor_slice in enumerate(chunk.slices):
            numel, signature = tensor_slice.numel, tensor_slice.signature
            out = Operand(dense, signature.arithmetic, owner)
            segment = segment_of(tensor_slice, at, owner)._replace(out=out)
            placed.append(_Placed(tensor_slice, dense, []))
            segments, of_group, terms = groups.setdefault(signature, ([], [], []))
            segments.append(with_factors(segment, known, number))
            of_group.append(placed[-1])
            if has_terms:
                terms.append(self.rules.terms(tensor_slice, weight_of(tensor_slice, at, owner)))
            at = [a + numel * size for a, size in zip(at, tensor_slice.sizes, strict=True)]
            dense += numel * FLOAT_SIZES[signature.arithmetic]
        for signature, (segments, of_group, terms) in groups.items():
            batch = Batch("cpu", signature, segments, terms if has_terms else None)
            counts = self.merge(batch, self.rules.rule, self.merge_threads)
            for each, row in zip(of_group, counts.tolist(), strict=True):
                each.counts.extend(row)
        return placed

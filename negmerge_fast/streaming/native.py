"""Chunks of files on the CPU, each read, merged and written by one call of the compiled library."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from ..backends.native import instruction_set, library
from ..core.batch import COUNTED, Rows, Signature
from ..core.dtypes import DTYPE_CODES
from ..core.rule import Rule
from .plan import Extent, TensorSlice

WRITTEN, NOT_READ, NONFINITE, NOT_WRITTEN = range(4)  # ChunkOutcome of csrc/merge_chunk.h


class Merged(NamedTuple):
    """What became of a chunk.

    Attributes:
        outcome: WRITTEN; NOT_READ, if a version could not be read or its file shrank; NONFINITE, if it was not written for that;
            NOT_WRITTEN, with an errno.
        error: That errno.
        cached: Whether all versions were in the page cache.
        times: When the call began, had read, had merged and had written, as of time.perf_counter.
        counted: The slices of each batch, and its counts.
    """

    outcome: int
    error: int
    cached: bool
    times: tuple[float, float, float, float]
    counted: list[tuple[list[TensorSlice], Rows]]


class ChunkMerger:
    """Merges chunks one at a time, with one thread.

    Args:
        rule: The rule of the merge.
        release: Whether pages of what was read are given back to the system.
        refuse_nonfinite: Whether a chunk with a non-finite element is not written.
    """

    def __init__(self, rule: Rule, release: bool, refuse_nonfinite: bool) -> None:
        self._instruction_set = instruction_set()
        self._rule, self._release, self._refuse_nonfinite = rule, release, refuse_nonfinite

    def merge(
        self,
        chunk: Extent,
        descriptors: Sequence[int],
        addresses: Sequence[int],
        output: int,
        fetch: bool,
    ) -> Merged:
        """Process a chunk.

        Args:
            chunk: The chunk.
            descriptors: Of the open files of its sources.
            addresses: Of memory for each source; that of the base has the result afterwards.
            output: The descriptor that is written to, at the offset of the base.
            fetch: Whether the system is told beforehand what will be read.
        """
        versions = zip(chunk.sources, descriptors, addresses, strict=True)
        sources = _packed((fd, s.offset, s.nbytes, address) for s, fd, address in versions)
        groups = [
            (signature, slices, _packed(rows), array("q", bytes(8 * len(COUNTED) * len(rows))))
            for signature, (slices, rows) in _by_signature(chunk, addresses).items()
        ]
        outcome, error, cached, times = library().merge_chunk(
            sources.buffer_info()[0],
            len(chunk.sources),
            [self._arguments(signature, len(slices), *of_it) for signature, slices, *of_it in groups],
            self._instruction_set,
            output,
            chunk.sources[0].offset,
            fetch,
            self._release,
            self._refuse_nonfinite,
        )
        counted = [(slices, _rows(counts)) for _, slices, _, counts in groups]
        return Merged(outcome, error, cached, times, counted)

    def _arguments(
        self, signature: Signature, segments: int, descriptors: array[int], counts: array[int]
    ) -> tuple[int, bytes, bool, float, int, int, int, int]:
        models = signature.models
        return (
            DTYPE_CODES[signature.result],
            bytes(map(DTYPE_CODES.__getitem__, models)),
            signature.task_vectors,
            self._rule.scale,
            self._rule.required(len(models)),
            segments,
            descriptors.buffer_info()[0],
            counts.buffer_info()[0],
        )


def _packed(rows: Iterable[tuple[int, ...]]) -> array[int]:
    return array("q", chain.from_iterable(rows))


def _rows(counts: array[int]) -> Rows:
    return Rows(counts[at : at + len(COUNTED)].tolist() for at in range(0, len(counts), len(COUNTED)))


def _by_signature(
    chunk: Extent, addresses: Sequence[int]
) -> dict[Signature, tuple[list[TensorSlice], list[tuple[int, ...]]]]:
    """Group a chunk's slices by signature, each with its descriptors (core/descriptors.py)."""
    groups: dict[Signature, tuple[list[TensorSlice], list[tuple[int, ...]]]] = {}
    at = list(addresses)
    for tensor_slice in chunk.slices:
        numel, signature = tensor_slice.numel, tensor_slice.signature
        slices, rows = groups.setdefault(signature, ([], []))
        slices.append(tensor_slice)
        rows.append((numel, at[0], *at))
        at = [begin + numel * size for begin, size in zip(at, tensor_slice.sizes, strict=True)]
    return groups

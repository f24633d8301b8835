"""Chunks of files on the CPU, each read, merged and written by one call of the compiled library."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from ..backends.native import FamilyArguments, instruction_set, kernel_arguments, library, pack_expanded
from ..core.batch import Batch, Rows, counted_by
from ..core.rule import Rule
from .plan import Extent, TensorSlice

if TYPE_CHECKING:
    from .._native import Turn

# In place of a descriptor.
IN_MEMORY = -1

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
        release: Whether pages of what was read are given back to the system.
        refuse_nonfinite: Whether a chunk with a non-finite element is not written.
        turn: One for several mergers, of which one may merge at a time while others read and write; None if all may.
    """

    def __init__(self, release: bool, refuse_nonfinite: bool, turn: Turn | None) -> None:
        self._turn = turn
        self._instruction_set = instruction_set()
        self._release, self._refuse_nonfinite = release, refuse_nonfinite

    def merge(
        self,
        chunk: Extent,
        batches: Sequence[tuple[Batch, list[TensorSlice], Rule]],
        descriptors: Sequence[int],
        addresses: Sequence[int],
        output: int,
        fetch: bool,
        offset: int,
    ) -> Merged:
        """Process a chunk.

        Args:
            chunk: The chunk.
            batches: What is to be merged in it, the slices that the segments are of, and the rule. An Expansion may take the place of
                an Operand; the version that it is of has nothing to read.
            descriptors: Of the open files of its sources; IN_MEMORY of one whose bytes are at its address already, or
                that has none.
            addresses: Of memory for each source; that of the base has the result afterwards.
            output: The descriptor that is written to.
            fetch: Whether the system is told beforehand what will be read.
            offset: Where it is written.
        """
        versions = zip(chunk.sources, descriptors, addresses, strict=True)
        sources = array(
            "q",
            chain.from_iterable(
                (fd, s.offset, 0 if fd == IN_MEMORY else s.nbytes, at) for s, fd, at in versions
            ),
        )
        packed = [pack_expanded(batch) for batch, _, _ in batches]
        families = [
            FamilyArguments(batch, rule.choices) if rule.choices else None for batch, _, rule in batches
        ]
        counts = [array("q", bytes(8 * len(counted_by(rule)) * len(slices))) for _, slices, rule in batches]
        outcome, error, cached, times = library().merge_chunk(
            sources.buffer_info()[0],
            len(chunk.sources),
            [
                (
                    *kernel_arguments(batch, rule),
                    rows.buffer_info()[0],
                    found.buffer_info()[0],
                    expansions.buffer_info()[0],
                    family.packed if family else None,
                )
                for (batch, _, rule), (rows, expansions), found, family in zip(
                    batches, packed, counts, families, strict=True
                )
            ],
            self._instruction_set,
            output,
            offset,
            fetch,
            self._release,
            self._refuse_nonfinite,
            self._turn,
        )
        counted = [
            (slices, _rows(found, len(counted_by(rule))))
            for (_, slices, rule), found in zip(batches, counts, strict=True)
        ]
        return Merged(outcome, error, cached, times, counted)


def _rows(counts: array[int], columns: int) -> Rows:
    return Rows(counts[at : at + columns].tolist() for at in range(0, len(counts), columns))

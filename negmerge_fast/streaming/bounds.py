"""Bounds of magnitudes of checkpoints, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

from ..backends.magnitudes import bounds_in_memory
from ..checkpoints.computed import address_of
from ..checkpoints.reader import Reader
from ..core.bounds import Bounds, Trimming
from ..runtime.distributed import SINGLE, SingleProcess
from .options import MergeOptions
from .partition import chunks
from .plan import Plan
from .worker import batches


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
    """
    found = []
    with Reader(64) as reader:
        for chunk in chunks((e for e in plan.extents if e.slices), 1 << 40):
            memory, addresses = bytearray(sum(source.nbytes for source in chunk.sources)), []
            at = 0
            for source in chunk.sources:
                source.read_into(reader, memoryview(memory)[at : at + source.nbytes])
                addresses.append(address_of(memory) + at)
                at += source.nbytes
            for batch, slices in batches(chunk, "cpu", addresses, memory):
                found.append((batch, [each.name for each in slices]))
    return bounds_in_memory(found, method, options.thread_count)

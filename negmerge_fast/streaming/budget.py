"""Memory that a streamed merge may take, and what it makes of it: how many lanes, and how long the strokes."""

from __future__ import annotations

import os
from collections.abc import Collection

from ..core.errors import InputError
from ..output import checksums
from ..runtime import memory
from ..runtime.memory import parse_size

# The shortest stroke for one file that is worth a system call.
_MIN_CHUNK_BYTES = 4096
# What the interpreter's own objects take while a job runs, and what it knows of each tensor of each version.
_OBJECTS, _OF_A_TENSOR = 4 << 20, 512
_MIN_WORKERS = 2


def fit(
    room: int,
    what: str,
    *,
    models: int,
    tensors: int,
    sizes: Collection[int],
    lanes: int,
    longest: int,
    scratch: int,
    block: int,
) -> tuple[int, int, int]:
    """As many lanes and as long strokes as there is room for, and the memory that the job then takes, in bytes.

    what: that there is no more room than that. tensors: of all versions together. sizes: of the output's files. scratch: how
    many temporaries a merge has, each as long as a stroke, in a wider type perhaps, or a block. Strokes become shorter before
    lanes become fewer, down to an eighth of the longest.
    """

    def needed() -> int:
        of_a_lane = (models + 1) * chunk_bytes + scratch * min(4 * chunk_bytes, block)
        return lanes * of_a_lane + _OBJECTS + tensors * _OF_A_TENSOR + checksums.memory(sizes, lanes)

    chunk_bytes = longest
    while needed() > room and chunk_bytes > _MIN_CHUNK_BYTES:
        chunk_bytes //= 2
        if chunk_bytes < longest // 8 and lanes > _MIN_WORKERS:
            lanes, chunk_bytes = max(lanes // 2, _MIN_WORKERS), longest
    if needed() > room:
        raise InputError(
            f"{what}: {room:,} bytes, expected at least {needed():,} for {models} models and their {tensors:,} tensors"
        )
    return lanes, chunk_bytes, needed()


def room(size: int | str | None) -> tuple[str, int]:
    """What a job may take, in bytes, and what to call it; None or "auto": half of what is free now.

    Of several processes that torchrun started on a machine, each takes its part of that.
    """
    if size is None or size == "auto":
        beside = os.environ.get("LOCAL_WORLD_SIZE", "")
        return "half of the free memory", memory.free_memory() // 2 // max(
            int(beside) if beside.isdecimal() else 1, 1
        )
    return "memory_budget", parse_size(size)

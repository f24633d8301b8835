"""The memory that a merge of checkpoints may take: how many workers it has, and how large their chunks are."""

from __future__ import annotations

import os
import resource
from collections.abc import Collection
from typing import NamedTuple

from ..backends import registry
from ..checkpoints.base import Checkpoint
from ..core.errors import InputError
from ..output import checksums
from ..runtime import device as devices
from ..runtime import memory
from ..runtime.memory import parse_size
from .options import MAX_THREADS, MergeOptions
from .plan import Plan

# Where only one worker may merge at a time, one reads, one merges and one writes. Where all may, two still overlap.
_SERIAL_WORKERS, _MIN_WORKERS = 3, 2
# With a GPU, so many wait for copies, kernels and the disk while all threads read: reasoned, not measured yet.
_WAITING_WORKERS = 2
# Temporaries of backends/pytorch.py, SCRATCH_BYTES an element, each at most as long as a block; each worker has its own.
_SCRATCH, _BLOCK, _BLOCK_ON_DEVICE = 14, 1 << 20, 64 << 20
# Of low-rank models csrc/low_rank_cpu.cpp holds a tile of all versions, and right factors of a few columns in panels, bytes a rank.
_TILES, _ROWS_OF_TILE, _PACKED = 3 << 18, 2048, 5 * 256
# On the CPU the best of 256 KiB … 8 MiB for 2 and 8 models, bench/results/chunk_sizes.jsonl: what was read is still in the cache
# when it is merged. With a GPU the cache does not matter, and fewer chunks are fewer launches: reasoned, not measured yet.
MAX_CHUNK_BYTES, MAX_DEVICE_CHUNK_BYTES = 1 << 20, 4 << 20
# A shorter read is not worth a system call.
_MIN_CHUNK_BYTES = 4096
# The interpreter's own objects while a job runs, and what is known of a tensor in each version.
_OBJECTS, _BYTES_PER_TENSOR = 4 << 20, 512


class Allocation(NamedTuple):
    """What a job allocates.

    workers: chunks under way at once. chunk_bytes: the most bytes of a version in a chunk. memory: bytes on the host and, again,
    on a device.
    """

    workers: int
    chunk_bytes: int
    memory: int


def allocate(
    plan: Plan,
    options: MergeOptions,
    device: str,
    backends: Collection[str],
    extra_buffers: int = 0,
    outputs: int = 1,
) -> Allocation:
    """Choose the workers and the chunk size of a job that fits its memory budget.

    Args:
        backends: The names of those that merge or count; the first one merges.
        extra_buffers: Buffers of a worker beside those for the versions, each as long as a chunk.
        outputs: How many are made together. Of several, each is merged in a buffer beside the base's.

    Raises:
        InputError: If the budget is too small for the smallest job.
    """
    name, available_bytes = _available_bytes(options.memory_budget, device)
    on_cpu = device == "cpu"
    return fit(
        available_bytes,
        name,
        models=len(plan.models),
        extra_buffers=extra_buffers + (outputs > 1) + (plan.weights is not None),
        held=sum(checkpoint.held_bytes for checkpoint in plan.checkpoints),
        tensors=sum(len(checkpoint.tensors) for checkpoint in _known(plan)),
        sizes=[file.size for file in plan.files.values()] * outputs,
        workers=_max_workers(options.thread_count, device, next(iter(backends))),
        max_chunk_bytes=MAX_CHUNK_BYTES if on_cpu else MAX_DEVICE_CHUNK_BYTES,
        scratch=_SCRATCH if "torch" in backends else 0,
        block=_BLOCK if on_cpu else _BLOCK_ON_DEVICE,
        tiles=_tiles(plan) if on_cpu and plan.is_low_rank else 0,
        expanded=plan.is_low_rank and next(iter(backends)) != "cpu",
    )


def _tiles(plan: Plan) -> int:
    """What the native kernel takes on a thread to expand low-rank models."""
    ranks = 0
    for adapter in filter(None, (model.adapter for model in plan.models)):
        nested = (parameter for each in adapter.nested.values() for parameter in each.parameters)
        ranks += max(
            (getattr(change, "rank", 1) for change in (*adapter.changes.values(), *nested)), default=1
        )
    return _TILES + (len(plan.models) + 2) * _ROWS_OF_TILE + ranks * _PACKED


def _known(plan: Plan) -> list[Checkpoint]:
    """The checkpoints of which each tensor takes memory: also what the base is a translation of, and once more its layout."""
    origin = plan.base.origin
    return [*plan.checkpoints, *([origin, origin] if origin else [])]


def fit(
    available_bytes: int,
    name: str,
    *,
    models: int,
    tensors: int,
    sizes: Collection[int],
    workers: int,
    max_chunk_bytes: int,
    scratch: int,
    block: int,
    extra_buffers: int = 0,
    held: int = 0,
    tiles: int = 0,
    expanded: bool = False,
) -> Allocation:
    """Choose the most workers and the largest chunks that fit; chunks shrink to an eighth before workers become fewer.

    Args:
        available_bytes: The most memory to take.
        name: What sets that bound, for the error.
        models: The number of fine-tuned models.
        tensors: The number of tensors of all versions together.
        sizes: The sizes of the output's files.
        workers: The most workers.
        max_chunk_bytes: The largest chunk.
        scratch: The number of a merge's temporaries, each as long as a chunk in a wider type, or as a block.
        block: The most bytes of a temporary.
        extra_buffers: Buffers of a worker beside those for the versions.
        held: What the inputs take beside that: Checkpoint.held_bytes.
        tiles: What a worker takes beside all that.
        expanded: Whether low-rank models are expanded before they are merged (backends/low_rank.py): 4 blocks of them at a time.
    """

    def required() -> int:
        per_worker = (models + 1 + extra_buffers) * chunk_bytes + scratch * min(4 * chunk_bytes, block)
        per_worker += tiles + expanded * min(models * chunk_bytes, 4 * block)
        fixed = held + _OBJECTS + tensors * _BYTES_PER_TENSOR
        return workers * per_worker + fixed + checksums.memory(sizes, workers)

    chunk_bytes = max_chunk_bytes
    while required() > available_bytes and chunk_bytes > _MIN_CHUNK_BYTES:
        chunk_bytes //= 2
        if chunk_bytes < max_chunk_bytes // 8 and workers > _MIN_WORKERS:
            workers, chunk_bytes = max(workers // 2, _MIN_WORKERS), max_chunk_bytes
    if required() > available_bytes:
        raise InputError(
            f"{name}: {available_bytes:,} bytes, expected at least {required():,} "
            f"for {models} models and their {tensors:,} tensors"
        )
    return Allocation(workers, chunk_bytes, required())


def available_bytes(memory_budget: int | str | None) -> tuple[str, int]:
    """What bounds a job's memory on the host, and how many bytes that is.

    Processes that torchrun started on one machine get equal parts of half the free memory.
    """
    if memory_budget is None or memory_budget == "auto":
        local_processes = os.environ.get("LOCAL_WORLD_SIZE", "")
        count = max(int(local_processes) if local_processes.isdecimal() else 1, 1)
        return "half of the free memory", memory.free_memory() // 2 // count
    return "memory_budget", parse_size(memory_budget)


def _available_bytes(memory_budget: int | str | None, device: str) -> tuple[str, int]:
    bounds = [available_bytes(memory_budget)]
    if device != "cpu":
        # Other programs cannot use page-locked memory: it is at most half of what is free.
        bounds.append(("free memory", memory.free_memory() // 2))
        bounds.append((f"free memory of {device}", devices.available_bytes(device)))
    return min(bounds, key=lambda bound: bound[1])


def _max_workers(threads: int, device: str, backend: str) -> int:
    if device != "cpu":
        workers = threads + _WAITING_WORKERS
    elif backend in registry.CONCURRENT:
        workers = max(threads, _MIN_WORKERS)
    else:
        workers = _SERIAL_WORKERS
    return min(workers, max(max_open_files() // 2, _MIN_WORKERS), MAX_THREADS)


def max_open_files() -> int:
    """Return how many inputs all workers together keep open: a fraction of the process's limit, which is usually 1,024."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if limit < 0 else min(limit // 4, 256)

"""Rooflines: the bandwidth of memory, of the link to a device and of a disk.

streaming/probes.py measures similar bandwidths for another purpose. A probe chooses a placement within a fraction of
a second: it takes the best of a few short rounds, on buffers as small as a worker's. A roofline takes turns with a
candidate in every round, on as many bytes, and its median is reported. A probe reads files as a merge does, through
checkpoints/reader.py; a roofline of that would be lower than what bare positioned reads reach. So they share no code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from .records import on_gpu

# A shorter copy would fit into a cache, and its time would be that of the launch.
_COPIED_BYTES = 512 << 20
_CHUNK_BYTES = 256 << 10


class Roofline(NamedTuple):
    """A task whose bandwidth no merge can exceed, and the bytes that it reads and writes."""

    name: str
    bytes: int
    task: Callable[[], object]


def memory_read(tensors: Sequence[torch.Tensor]) -> Roofline:
    """Reads every byte of tensors once. Their sizes are multiples of 8 bytes."""

    def task() -> None:
        for tensor in tensors:
            tensor.view(torch.int64).sum()

    return Roofline("memory read", sum(t.nbytes for t in tensors), task)


def memory_copy(source: torch.Tensor, destination: torch.Tensor, name: str = "memory copy") -> Roofline:
    """Copies one tensor to another."""
    return Roofline(name, source.nbytes + destination.nbytes, partial(destination.copy_, source))


@cache
def _pair(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A source and a destination of copies, each far larger than the device's caches."""
    caches = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    size = max(_COPIED_BYTES, 4 * caches)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def device_copy(device: str, size: int = 0) -> Roofline:
    """Copies within a device's memory. About `size` bytes are read and written in all, at least those of one copy."""
    source, destination = _pair(device)
    times = max(1, round(size / (2 * source.nbytes)))

    def task() -> None:
        for _ in range(times):
            destination.copy_(source)

    return Roofline("device copy", times * 2 * source.nbytes, task)


def flush(device: str) -> None:
    """Evict everything from a device's caches by reading, so that nothing has to be written back later."""
    _pair(device)[0].view(torch.int64).sum()


def host_to_device(device: str, pinned: bool, size: int) -> Roofline:
    """Copies `size` bytes from the host to a device."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    destination = torch.empty(size, dtype=torch.uint8, device=device)
    name = "host to device, pinned" if pinned else "host to device, pageable"
    return Roofline(name, size, lambda: destination.copy_(source, non_blocking=pinned))


# Names of rooflines in memory, by kind of device.
IN_MEMORY = {
    "cuda": ("device copy", "host to device, pinned", "host to device, pageable"),
    "cpu": ("memory read", "memory copy"),
}


def in_memory(name: str, device: str, size: int) -> Roofline:
    """The roofline of a name in IN_MEMORY, of about `size` bytes."""
    if name == "device copy":
        return device_copy(device, size)
    if on_gpu(device):
        return host_to_device(device, name.endswith("pinned"), size)
    source = torch.ones(size // 8, dtype=torch.int64)
    return memory_read([source]) if name == "memory read" else memory_copy(source, torch.zeros_like(source))


def file_read(paths: Sequence[Path], threads: int, name: str = "disk read") -> Roofline:
    """Reads every byte of files once. See read_files."""
    return Roofline(name, sum(path.stat().st_size for path in paths), partial(read_files, paths, threads))


def read_files(paths: Sequence[Path], threads: int) -> None:
    """Read files by positioned reads of 256 KiB on several threads."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        # Threads take chunks in turn, so that neighbours are read at about the same time.
        chunks = [
            (descriptor, at)
            for descriptor, size in zip(descriptors, sizes, strict=True)
            for at in range(0, size, _CHUNK_BYTES)
        ]

        def read(first: int) -> None:
            buffer = bytearray(_CHUNK_BYTES)
            for descriptor, at in chunks[first::threads]:
                os.preadv(descriptor, [buffer], at)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def make_cold(paths: Sequence[Path]) -> None:
    """Evict files from the page cache, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be evicted
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def of_merge(device: str, inputs: Sequence[torch.Tensor], size: int) -> Roofline:
    """The roofline of a merge: on a GPU a copy of `size` bytes, on a CPU reading its inputs."""
    return device_copy(device, size) if on_gpu(device) else memory_read(inputs)

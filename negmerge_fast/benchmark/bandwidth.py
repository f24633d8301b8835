"""What no merge can be faster than: reading or copying memory, crossing to a device, reading a disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from .records import on_gpu

# A copy shorter than this would show the launch, and fit a cache.
_COPIED_BYTES = 512 << 20
_CHUNK_BYTES = 256 << 10


class Roofline(NamedTuple):
    """Something to run, and the bytes it reads and writes."""

    name: str
    bytes: int
    task: Callable[[], object]


def memory_read(tensors: Sequence[torch.Tensor]) -> Roofline:
    """Every byte of these tensors once; their sizes are multiples of 8 bytes."""

    def task() -> None:
        for tensor in tensors:
            tensor.view(torch.int64).sum()

    return Roofline("memory read", sum(t.nbytes for t in tensors), task)


def memory_copy(source: torch.Tensor, destination: torch.Tensor, name: str = "memory copy") -> Roofline:
    return Roofline(name, source.nbytes + destination.nbytes, partial(destination.copy_, source))


@cache
def _pair(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory to copy from and to, each far larger than the device's caches."""
    caches = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    size = max(_COPIED_BYTES, 4 * caches)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def device_copy(device: str, size: int = 0) -> Roofline:
    """A copy within a device's memory that reads and writes about so many bytes together, and never few."""
    source, destination = _pair(device)
    times = max(1, round(size / (2 * source.nbytes)))

    def task() -> None:
        for _ in range(times):
            destination.copy_(source)

    return Roofline("device copy", times * 2 * source.nbytes, task)


def flush(device: str) -> None:
    """Read past all that the device's caches hold, and leave nothing in them that would have to be written back."""
    _pair(device)[0].view(torch.int64).sum()


def host_to_device(device: str, pinned: bool, size: int) -> Roofline:
    """Bytes that cross."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    destination = torch.empty(size, dtype=torch.uint8, device=device)
    name = "host to device, pinned" if pinned else "host to device, pageable"
    return Roofline(name, size, lambda: destination.copy_(source, non_blocking=pinned))


# By the kind of device.
IN_MEMORY = {
    "cuda": ("device copy", "host to device, pinned", "host to device, pageable"),
    "cpu": ("memory read", "memory copy"),
}


def in_memory(name: str, device: str, size: int) -> Roofline:
    """A limit by its name, of about so many bytes."""
    if name == "device copy":
        return device_copy(device, size)
    if on_gpu(device):
        return host_to_device(device, name.endswith("pinned"), size)
    source = torch.ones(size // 8, dtype=torch.int64)
    return memory_read([source]) if name == "memory read" else memory_copy(source, torch.zeros_like(source))


def file_read(paths: Sequence[Path], threads: int, name: str = "disk read") -> Roofline:
    """Every byte of these files once, by positioned reads of 256 KiB on several threads."""
    return Roofline(name, sum(path.stat().st_size for path in paths), partial(read_files, paths, threads))


def read_files(paths: Sequence[Path], threads: int) -> None:
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        # From the front of all files, thread by thread: neighbours are read at about the same time.
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
    """Give these files' pages back to the system: the disk is read next."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not on the disk yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def of_merge(device: str, inputs: Sequence[torch.Tensor], size: int) -> Roofline:
    """The limit of a merge: on a GPU a copy of as many bytes, on a CPU reading its own inputs."""
    return device_copy(device, size) if on_gpu(device) else memory_read(inputs)

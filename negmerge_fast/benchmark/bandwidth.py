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
_STROKE = 256 << 10


class Limit(NamedTuple):
    """Something to run, and the bytes it reads and writes."""

    name: str
    bytes: int
    run: Callable[[], object]


def memory_read(tensors: Sequence[torch.Tensor]) -> Limit:
    """Every byte of these tensors once; their sizes are multiples of 8 bytes."""

    def run() -> None:
        for tensor in tensors:
            tensor.view(torch.int64).sum()

    return Limit("memory read", sum(t.nbytes for t in tensors), run)


def memory_copy(source: torch.Tensor, target: torch.Tensor, name: str = "memory copy") -> Limit:
    return Limit(name, source.nbytes + target.nbytes, partial(target.copy_, source))


@cache
def _pair(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory to copy from and to, each far larger than the device's caches."""
    caches = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    size = max(_COPIED_BYTES, 4 * caches)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)


def device_copy(device: str, size: int = 0) -> Limit:
    """A copy within a device's memory that reads and writes about so many bytes together, and never few."""
    source, target = _pair(device)
    times = max(1, round(size / (2 * source.nbytes)))

    def run() -> None:
        for _ in range(times):
            target.copy_(source)

    return Limit("device copy", times * 2 * source.nbytes, run)


def flush(device: str) -> None:
    """Read past all that the device's caches hold, and leave nothing in them that would have to be written back."""
    _pair(device)[0].view(torch.int64).sum()


def host_to_device(device: str, pinned: bool, size: int) -> Limit:
    """Bytes that cross."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    name = "host to device, pinned" if pinned else "host to device, pageable"
    return Limit(name, size, lambda: target.copy_(source, non_blocking=pinned))


# By the kind of device.
IN_MEMORY = {
    "cuda": ("device copy", "host to device, pinned", "host to device, pageable"),
    "cpu": ("memory read", "memory copy"),
}


def in_memory(name: str, device: str, size: int) -> Limit:
    """A limit by its name, of about so many bytes."""
    if name == "device copy":
        return device_copy(device, size)
    if on_gpu(device):
        return host_to_device(device, name.endswith("pinned"), size)
    source = torch.ones(size // 8, dtype=torch.int64)
    return memory_read([source]) if name == "memory read" else memory_copy(source, torch.zeros_like(source))


def file_read(paths: Sequence[Path], threads: int, name: str = "disk read") -> Limit:
    """Every byte of these files once, by positioned reads of 256 KiB on several threads."""
    return Limit(name, sum(path.stat().st_size for path in paths), partial(read_files, paths, threads))


def read_files(paths: Sequence[Path], threads: int) -> None:
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        # From the front of all files, thread by thread: neighbours are read at about the same time.
        strokes = [
            (descriptor, at)
            for descriptor, size in zip(descriptors, sizes, strict=True)
            for at in range(0, size, _STROKE)
        ]

        def read(first: int) -> None:
            buffer = bytearray(_STROKE)
            for descriptor, at in strokes[first::threads]:
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


def of_merge(device: str, inputs: Sequence[torch.Tensor], size: int) -> Limit:
    """The limit of a merge: on a GPU a copy of as many bytes, on a CPU reading its own inputs."""
    return device_copy(device, size) if on_gpu(device) else memory_read(inputs)

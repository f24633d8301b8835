"""A batch as the integers that kernels are given: they know neither torch nor numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import Batch

if TYPE_CHECKING:
    import torch
from .dtypes import DTYPE_CODES


def pack_descriptors(batch: Batch) -> np.ndarray[Any, Any]:
    """int64[segments, 3 + n]: elements, then the addresses of base, out and the models; 0 where there is none."""
    rows = [
        (
            segment.numel,
            segment.base.address if segment.base else 0,
            segment.out.address if segment.out else 0,
            *[stream.address for stream in segment.models],
        )
        for segment in batch.segments
    ]
    # An address may have its highest bit set.
    return np.array(rows, np.uint64).reshape(len(rows), 3 + len(batch.signature.models)).view(np.int64)


def pack_for_device(batch: Batch, tile: int) -> tuple[np.ndarray[Any, Any], int]:
    """What a kernel on a device reads, and the number of its tiles, each of so many elements of one segment.

    int64[segments + 1, 2], the tiles before each segment and whether all its addresses are multiples of 16; then the
    table; then the models' storage types, a byte each.
    """
    descriptors = pack_descriptors(batch)
    tiles = np.zeros((len(descriptors) + 1, 2), np.int64)
    np.cumsum(-(descriptors[:, 0] // -tile), out=tiles[1:, 0])
    tiles[:-1, 1] = np.bitwise_or.reduce(descriptors[:, 1:], axis=1) % 16 == 0
    dtypes = bytes(DTYPE_CODES[dtype] for dtype in batch.signature.models)
    padded = np.frombuffer(dtypes.ljust(-(len(dtypes) // -8) * 8, b"\0"), np.int64)
    return np.concatenate([tiles.ravel(), descriptors.ravel(), padded]), int(tiles[-1, 0])


def upload(memory: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """int64 on a device, where work on its current stream may read it; waits for nothing."""
    import torch

    target_device = torch.device(device)
    if target_device.type == "cpu":
        return torch.from_numpy(memory)
    if target_device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return upload_in_launches(memory, target_device)
    # From pinned memory, or the copy would wait for all that the stream has to do. torch's allocators give neither to
    # anybody before this stream is done with them.
    return torch.from_numpy(memory).pin_memory().to(target_device, non_blocking=True)


def upload_in_launches(memory: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """upload for a CUDA graph: a copy would be repeated from memory that is gone by then; these numbers travel in launches."""
    import torch

    on_device = torch.zeros(len(memory), dtype=torch.int64, device=device)
    torch._foreach_add_(list(on_device.unbind()), memory.tolist())
    return on_device

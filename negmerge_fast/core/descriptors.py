"""Batches packed into integers for the kernels, which know neither torch nor NumPy."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from .batch import Batch, Operands
from .delta import DeltaBatch
from .dtypes import DTYPE_CODES

if TYPE_CHECKING:
    import numpy as np
    import torch


def pack_descriptors(batch: Batch) -> array[int]:
    """Pack a batch as int64[segments, 3 + n]: elements, then the addresses of base, out and the models, or 0.

    Without NumPy: a merge of files on the CPU needs nothing else of it, and it takes longer to import than a small one takes.
    """
    integers: list[int] = []
    for numel, base, models, out in batch.segments:
        integers += (numel, base.address if base else 0, out.address if out else 0)
        integers += models.addresses if type(models) is Operands else [address for address, _, _ in models]
    if len(integers) != len(batch.segments) * (3 + len(batch.signature.models)):
        raise ValueError(f"segments of other numbers of models, expected {len(batch.signature.models)}")
    return array("Q", integers)  # unsigned: an address may have its highest bit set


def pack_deltas(batch: DeltaBatch) -> array[int]:
    """Pack a batch of deltas as int64[segments, 7]: the fields of DeltaSegment, without the owners."""
    integers: list[int] = []
    for segment in batch.segments:
        integers += segment[:-1]
    return array("Q", integers)  # unsigned: an address may have its highest bit set


def pack_for_device(batch: Batch, tile: int) -> tuple[np.ndarray[Any, Any], int]:
    """Pack a batch for a kernel on a device. A segment is cut into tiles of `tile` elements, the last one shorter.

    Returns:
        One array of int64, and the number of tiles. In the array come int64[segments + 1, 2], the number of tiles before
        each segment and whether all its addresses are multiples of 16; then the descriptors; then the models' storage
        types, a byte each.
    """
    import numpy as np

    packed = np.asarray(pack_descriptors(batch))
    descriptors = packed.view(np.int64).reshape(len(batch.segments), 3 + len(batch.signature.models))
    tiles = np.zeros((len(descriptors) + 1, 2), np.int64)
    np.cumsum(-(descriptors[:, 0] // -tile), out=tiles[1:, 0])
    tiles[:-1, 1] = np.bitwise_or.reduce(descriptors[:, 1:], axis=1) % 16 == 0
    dtypes = bytes(DTYPE_CODES[dtype] for dtype in batch.signature.models)
    padded = np.frombuffer(dtypes.ljust(-(len(dtypes) // -8) * 8, b"\0"), np.int64)
    return np.concatenate([tiles.ravel(), descriptors.ravel(), padded]), int(tiles[-1, 0])


def upload(memory: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """Copy int64 to a device, ordered with the device's current stream; waits for nothing."""
    import torch

    target_device = torch.device(device)
    if target_device.type == "cpu":
        return torch.from_numpy(memory)
    if target_device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return upload_in_launches(memory, target_device)
    # Pinned memory, or the copy would wait for the whole stream. torch's allocators reuse neither the pinned nor the
    # device memory before this stream is done with it.
    return torch.from_numpy(memory).pin_memory().to(target_device, non_blocking=True)


def upload_in_launches(memory: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """upload into a CUDA graph. The graph would repeat a copy from memory freed by then; a launch keeps the numbers."""
    import torch

    on_device = torch.zeros(len(memory), dtype=torch.int64, device=device)
    torch._foreach_add_(list(on_device.unbind()), memory.tolist())
    return on_device

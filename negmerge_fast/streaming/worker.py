"""What one worker of a merge does with a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.batch import Batch, Segment, Signature, segment_at
from .plan import Extent, TensorSlice


def batches(
    chunk: Extent, device: str, addresses: list[int], owner: Any
) -> Iterator[tuple[Batch, list[TensorSlice]]]:
    """One batch for each signature in a piece whose versions are at these addresses."""
    groups: dict[Signature, tuple[list[Segment], list[TensorSlice]]] = {}
    for tensor_slice in chunk.slices:
        numel, signature = tensor_slice.numel, tensor_slice.signature
        segment = segment_at(numel, signature, addresses, [owner] * len(addresses))
        addresses = [a + numel * size for a, size in zip(addresses, tensor_slice.sizes, strict=True)]
        segments, slices = groups.setdefault(signature, ([], []))
        segments.append(segment)
        slices.append(tensor_slice)
    for signature, (segments, slices) in groups.items():
        yield Batch(device, signature, segments), slices

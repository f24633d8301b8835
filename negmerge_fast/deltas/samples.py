"""Samples of a base: by the bytes in the middle of each tensor a delta knows the base that it is of."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..checkpoints.delta import sample_range
from ..core.hashing import hash_of
from ..tensors.dtensor import Box


def hashes(tensors: Mapping[str, tuple[torch.Tensor, Box | None, tuple[int, ...]]]) -> dict[str, str]:
    """The hashes of samples of tensors: of the bytes in their middle, in row-major order.

    Args:
        tensors: By name: the tensor in memory, the part that it is of a whole one, or None, and the shape of the whole one.
            Parts that do not hold the sample are not in the result.

    One transfer is waited for on each device.
    """
    found: dict[str, str] = {}
    on_devices: dict[torch.device, list[tuple[str, torch.Tensor, range]]] = {}
    for name, (tensor, box, shape) in tensors.items():
        size = tensor.itemsize
        wanted = sample_range(math.prod(shape) * size)
        elements = range(wanted.start // size, -(wanted.stop // -size))
        indices = elements if box is None else _within(elements, box, shape)
        if indices is None:
            continue
        # The sample may begin and end within an element.
        sample = range(wanted.start - elements.start * size, wanted.stop - elements.start * size)
        if not indices:
            found[name] = hash_of(b"")
        elif tensor.device.type == "cpu" and box is None and tensor.is_contiguous() and not tensor.is_neg():
            held = ctypes.string_at(tensor.data_ptr() + elements.start * size, len(elements) * size)
            found[name] = hash_of(held[sample.start : sample.stop])
        else:
            part = _elements(tensor, indices)
            on_devices.setdefault(tensor.device, []).append((name, part.view(torch.uint8), sample))
    for parts in on_devices.values():
        memory, begin = torch.cat([part for _, part, _ in parts]).cpu().numpy().tobytes(), 0
        for name, part, sample in parts:
            found[name] = hash_of(memory[begin + sample.start : begin + sample.stop])
            begin += len(part)
    return found


def _elements(tensor: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """Some elements of a tensor by their indices in row-major order, as a flat tensor."""
    if isinstance(indices, range) and tensor.is_contiguous() and not tensor.is_neg():
        return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())[
            indices.start : indices.stop
        ]
    return torch.take(tensor.resolve_neg(), torch.tensor(list(indices), device=tensor.device))


def _within(elements: range, box: Box, shape: tuple[int, ...]) -> list[int] | None:
    """The indices in a part of a tensor of elements of the whole; None if it does not hold all of them."""
    if not len(elements):
        return []
    whole = np.stack(np.unravel_index(np.asarray(elements), shape))
    local = whole - np.asarray(box.offset).reshape(-1, 1)
    if (local < 0).any() or (local >= np.asarray(box.shape).reshape(-1, 1)).any():
        return None
    flat: list[int] = np.ravel_multi_index(tuple(local), box.shape).tolist()
    return flat

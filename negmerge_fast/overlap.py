"""Which tensors share memory with which: what is written in place must be written once, and read by nobody else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .rule import InputError


def memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor is and how it is read there: equal for tensors that are one."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def refuse_shared_memory(uses: Iterable[tuple[torch.Tensor, bool, str]]) -> None:
    """Raise InputError if an element that is written is used twice; uses: tensor, whether it is written, its name."""
    spans = []
    read: set[tuple[Any, ...]] = set()
    for tensor, written, label in uses:
        if not tensor.numel() or (not written and memory(tensor) in read):
            continue
        if written and _overlaps_itself(tensor):
            raise InputError(f"{label}: several of its elements share memory, expected one place for each")
        if not written:
            read.add(memory(tensor))
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        end = tensor.data_ptr() + (last + 1) * tensor.element_size()
        spans.append((str(tensor.device), tensor.data_ptr(), end, written, label, tensor))
    active: list[Any] = []
    for span in sorted(spans, key=lambda s: s[:2]):
        device, start, _, written, label, tensor = span
        active = [a for a in active if a[0] == device and a[2] > start]
        for other in active:
            if (written or other[3]) and _share(other[5], tensor):
                written_one, shared = (other[4], label) if other[3] else (label, other[4])
                raise InputError(f"{shared}: shares memory with {written_one}, which is written in place")
        active.append(span)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


class _Addresses:
    """The addresses of a tensor as an array that numpy can reason about, and that nobody reads."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(s * size for s in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }


def _share(left: torch.Tensor, right: torch.Tensor) -> bool:
    # Steps of an exact search that usually takes a few; Any because numpy's stubs know 0 and -1 only.
    bound: Any = 100_000
    try:
        return np.shares_memory(np.asarray(_Addresses(left)), np.asarray(_Addresses(right)), max_work=bound)
    except np.exceptions.TooHardError:
        return True

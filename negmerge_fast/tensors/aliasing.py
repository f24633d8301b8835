"""Aliasing: tied weights, and tensors that share memory with what a merge in place writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..core.batch import Operands, Segment
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError


def tied(paired: dict[str, list[torch.Tensor]], where: Callable[[int | None, str], str]) -> dict[str, str]:
    """Tied weights: names whose memory an earlier name has, and that name. Models must have equal values for both."""
    if len({versions[0].data_ptr() for versions in paired.values()}) == len(paired):
        return {}
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, (tensor, *models) in paired.items():
        if not tensor.numel() or (earlier := first.setdefault(memory(tensor), name)) == name:
            continue
        found[name] = earlier
        for k, (current, tied_to) in enumerate(zip(models, paired[earlier][1:], strict=True)):
            if memory(current) != memory(tied_to) and not same_bits(current, tied_to):
                raise InputError(
                    f"{where(k, name)}: differs from {earlier!r}, expected equal: {where(None, name)} is tied to it"
                )
    return found


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # as_strided, not view(-1), which keeps the stride of a dimension of size 1, and that may be any number.
    as_bytes = [
        t.resolve_neg().contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (left, right)
    ]
    return left.dtype == right.dtype and torch.equal(*as_bytes)


def plainly_apart(segments: Sequence[Segment], others: Iterable[torch.Tensor]) -> bool:
    """Whether the first and last addresses alone prove that no memory is shared with what is written.

    The bases of segments are written; their models and the others are read. Devices are not distinguished: where
    addresses of two devices meet by chance, the exact search of refuse_shared_memory decides.
    """
    if not segments:
        return True
    if len(segments) == 1:  # without NumPy, whose calls take longer than a small merge
        (written_start, written_end), *read = _spans(segments[0])
        read += [span(t) for t in others if t.numel()]
        return all(end <= written_start or written_end <= start for start, end in read)
    integers: list[int] = []
    kinds: dict[tuple[str, ...], int] = {}
    kind_of = []
    for _, base, models, _ in segments:
        assert base and isinstance(models, Operands)
        integers.append(base.address)
        integers += models.addresses
        kind_of.append(kinds.setdefault((base.dtype, *models.dtypes), len(kinds)))
    starts = np.array(integers, np.uint64).reshape(len(segments), -1)
    sizes = np.array([[FLOAT_SIZES[dtype] for dtype in kind] for kind in kinds], np.uint64)[kind_of]
    ends = starts + sizes * np.array([[s.numel] for s in segments], np.uint64)
    other_spans = np.array([span(t) for t in others if t.numel()], np.uint64).reshape(-1, 2)
    read_starts = np.concatenate([starts[:, 1:].ravel(), other_spans[:, 0]])
    read_ends = np.concatenate([ends[:, 1:].ravel(), other_spans[:, 1]])

    # The starts and the ends of disjoint spans have the same order.
    starts, ends = np.sort(starts[:, 0]), np.sort(ends[:, 0])
    if (ends[:-1] > starts[1:]).any():
        return False
    # The first written span that ends after the start of a read span must not start before the end of that.
    following = np.searchsorted(ends, read_starts, side="right")
    return bool((read_ends <= np.append(starts, read_ends.max(initial=0))[following]).all())


def _spans(segment: Segment) -> list[tuple[int, int]]:
    """The spans of a segment's base and models."""
    operands: list[Any] = [segment.base, *segment.models]
    return [(start, start + segment.numel * FLOAT_SIZES[dtype]) for start, dtype, _ in operands]


def refuse_shared_memory(uses: Iterable[tuple[torch.Tensor, bool, str]]) -> None:
    """Raise InputError if an element that is written is used twice. A use is a tensor, whether it is written, its label."""
    spans = []
    read: set[tuple[Any, ...]] = set()
    for tensor, written, label in uses:
        if not tensor.numel() or (not written and memory(tensor) in read):
            continue
        if written and _overlaps_itself(tensor):
            raise InputError(f"{label}: several of its elements share memory, expected one place for each")
        if not written:
            read.add(memory(tensor))
        spans.append((str(tensor.device), *span(tensor), written, label, tensor))
    active: list[Any] = []
    for each in sorted(spans, key=lambda s: s[:2]):
        device, start, _, written, label, tensor = each
        active = [a for a in active if a[0] == device and a[2] > start]
        for other in active:
            if (written or other[3]) and shares_memory(other[5], tensor):
                written_one, shared = (other[4], label) if other[3] else (label, other[4])
                raise InputError(f"{shared}: shares memory with {written_one}, which is written in place")
        active.append(each)


def memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key of a tensor's memory and of how it is read: equal for tensors that are the same."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte, and the address after its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


class _Addresses:
    """The addresses of a tensor as an array for NumPy's search. Nobody reads the elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(s * size for s in tensor.stride()),
            "data": (tensor.data_ptr(), True),
        }


def shares_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one device have an element in common."""
    # The exact search usually takes a few steps. Any, because NumPy's stubs know 0 and -1 only.
    bound: Any = 100_000
    try:
        return np.shares_memory(np.asarray(_Addresses(left)), np.asarray(_Addresses(right)), max_work=bound)
    except np.exceptions.TooHardError:
        return True

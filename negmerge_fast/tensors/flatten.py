"""Flattening: tensors as segments and batches of flat memory, without copies where they are dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..backends.pytorch import DTYPE_NAMES, FLOAT_NAMES
from ..core.batch import Batch, Operand, Segment, Signature
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import is_extra_state
from ..core.schema import TensorSpec

_STORAGE, _STORAGE_NBYTES = torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes
_OFFSET = torch.Tensor.storage_offset
# Types that are known to have their numbers in their own memory. Subclasses are checked one by one.
_PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])
_NO_MEMORY = (
    "a tensor without memory, as inside torch.func.vmap or grad, expected one with: merge outside of these"
)


class Item(NamedTuple):
    """All versions of one tensor.

    Attributes:
        name: The tensor's name.
        versions: The base's tensor (None stands for zeros), then those of the models.
        segment: The segment of the versions, without out, if they are known to be flat.
        out: The tensor to write. With None, elements are only counted.
    """

    name: str
    versions: list[Any]
    segment: Segment | None = None
    out: torch.Tensor | None = None


def flat_item(name: str, models: list[dict[str, Any]]) -> Item | None:
    """The item of a name, if its tensors are plain, contiguous, of one shape and on one device.

    Most of the time of a merge of many small tensors is spent here, so each is visited once and no view is made.
    """
    if is_extra_state(name):
        return None
    operands: list[Operand] = []
    shape = device = previous = None
    widest = 0
    try:
        for model in models:
            tensor: Any = model.get(name)
            if type(tensor) not in _PLAIN:
                return None
            dtype = FLOAT_NAMES.get(tensor.dtype)
            if dtype is None or not tensor.is_contiguous() or tensor.is_neg():
                return None
            if dtype is not previous:
                previous, widest = dtype, max(widest, FLOAT_SIZES[dtype])
            location = tensor.is_cpu or tensor.device  # is_cpu is faster
            if shape is None:
                shape, device = tensor.shape, location
            elif tensor.shape != shape or location != device:
                return None
            if tensor.requires_grad:
                tensor = tensor.detach()
            if not (address := tensor.data_ptr()) and tensor.numel():  # its memory was freed
                return None
            # As Operand(...), without the call of a Python function: this saves a tenth of the time.
            operands.append(tuple.__new__(Operand, (address, dtype, tensor)))
        versions, numel = [s.owner for s in operands], tensor.numel()
        if not _holds(versions, numel * widest):
            return None
    except RuntimeError:  # a nested tensor has no shape, a sparse one no memory
        return None
    if tensor.is_meta:
        return None
    return Item(name, versions, Segment(numel, operands[0], operands[1:], None))


def _holds(tensors: list[torch.Tensor], nbytes: int) -> bool:
    """Whether the storages of contiguous tensors hold what these say, nbytes at most: they may have been freed, or cut."""
    # One comparison suffices for most, and the loops of C take half the time of one in Python.
    if not any(map(_OFFSET, tensors)) and min(map(_STORAGE_NBYTES, map(_STORAGE, tensors))) >= nbytes:
        return True
    ends = (t.nbytes and t.storage_offset() * t.itemsize + t.nbytes for t in tensors)
    return all(t.untyped_storage().nbytes() >= end for t, end in zip(tensors, ends, strict=True))


def require_dense(tensor: torch.Tensor, where: str) -> None:
    """Raise TypeError for a sparse, quantized or nested tensor."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{where}: {kind} tensor, expected a dense one")


def plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor, detached and without its subclass. Raises TypeError or InputError if its numbers are not in its memory."""
    if torch.nn.parameter.is_lazy(tensor):
        raise InputError(
            f"{where}: not initialized yet, expected a tensor with a shape (call the lazy module once)"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not tensor.is_nested:
        raise TypeError(f"{where}: {type(tensor).__name__}, expected a plain torch.Tensor")
    # A subclass without __torch_dispatch__ has its numbers where a tensor has them, whatever its methods say.
    with torch._C.DisableTorchFunctionSubclass():
        require_dense(tensor, where)
        if tensor.is_meta:
            raise InputError(f"{where}: a meta tensor holds no data, expected one that does")
        try:
            refuse_cut(tensor, where)
            detached = tensor.detach()
            has_address = detached.data_ptr() != 0
        except RuntimeError:
            raise TypeError(f"{where}: {_NO_MEMORY}") from None
        if tensor.numel() and not has_address:
            raise TypeError(f"{where}: {_NO_MEMORY}")
        return detached


def refuse_cut(strided: torch.Tensor, where: str) -> None:
    """Raise InputError if the storage of a tensor holds less than its shape, strides and offset say."""
    last = sum((n - 1) * s for n, s in zip(strided.shape, strided.stride(), strict=True))
    end = (strided.storage_offset() + last + 1) * strided.element_size()
    if strided.numel() and end > strided.untyped_storage().nbytes():
        raise InputError(f"{where}: its memory has been freed, or cut, expected {end:,} bytes")


def specs(named: dict[str, Any]) -> dict[str, TensorSpec]:
    """dtypes and shapes of a model's tensors, for schema.mismatches."""
    return {
        name: TensorSpec(DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for name, t in named.items()
        if isinstance(t, torch.Tensor)
    }


def signatures(items: list[Item], device: torch.device, task_vectors: bool) -> Iterator[Signature]:
    """Signatures of the batches on one device, before the batches are made. Each may come more than once."""
    for item in items:
        if item.versions[1].device == device:
            written = item.versions[0] if item.out is None else item.out
            yield Signature(
                FLOAT_NAMES[written.dtype],
                tuple([FLOAT_NAMES[m.dtype] for m in item.versions[1:]]),
                task_vectors,
            )


def batches(items: list[Item], task_vectors: bool) -> Iterator[tuple[Batch, list[str], Callable[[], None]]]:
    """Batches, the names of their segments, and a function to call once the batch is merged."""
    groups: dict[tuple[torch.device, Signature], list[tuple[str, Segment]]] = {}
    scattered = []
    for item in items:
        if segment := _segment_in_place(item):
            key = item.versions[1].device, _signature(segment, task_vectors)
            groups.setdefault(key, []).append((item.name, segment))
        else:
            scattered.append(item)
    # Scattered tensors come first and one at a time: memory for their flat copies may be missing.
    for item in scattered:
        *versions, out = _in_memory_order([*item.versions, item.out])
        copies = [None if t is None else t.resolve_neg().contiguous() for t in versions]
        merged = None if out is None else torch.empty_like(out, memory_format=torch.contiguous_format)

        def finish(out: torch.Tensor | None = out, merged: torch.Tensor | None = merged) -> None:
            if out is not None and merged is not None:
                with torch.inference_mode():
                    out.copy_(merged)

        segment = _segment([*copies, merged])
        batch = Batch(str(item.versions[1].device), _signature(segment, task_vectors), [segment])
        del copies, versions, segment
        yield batch, [item.name], finish
        del batch, finish, merged
    for (device, signature), segments in groups.items():
        yield Batch(str(device), signature, [s for _, s in segments]), [n for n, _ in segments], lambda: None


def _segment_in_place(item: Item) -> Segment | None:
    """A segment on the tensors' own memory, if they are flat in the order of the first one's strides."""
    if item.segment:
        numel, base, models, _ = item.segment
        return Segment(numel, base, models, base if item.out is item.versions[0] else _operand(item.out))
    tensors = _in_memory_order([*item.versions, item.out])
    if all(t is None or (t.is_contiguous() and not t.is_neg()) for t in tensors):
        return _segment(tensors)
    return None


def _signature(segment: Segment, task_vectors: bool) -> Signature:
    result: Any = segment.out or segment.base
    return Signature(result.dtype, tuple([m.dtype for m in segment.models]), task_vectors)


def _segment(contiguous: list[Any]) -> Segment:
    base, *models, out = map(_operand, contiguous)
    return Segment(contiguous[1].numel(), base, [m for m in models if m], out)


def _in_memory_order(tensors: list[Any]) -> list[Any]:
    """The tensors with their dimensions in the order of the first one's strides, which makes dense ones flat."""
    first = next(t for t in tensors if t is not None)
    order = sorted(range(first.dim()), key=lambda i: -first.stride(i))
    return [None if t is None else t.permute(order) for t in tensors]


def _operand(contiguous: torch.Tensor | None) -> Operand | None:
    if contiguous is None:
        return None
    try:
        address = contiguous.data_ptr()
    except RuntimeError:
        address = 0
    if not address and contiguous.numel():  # only a result made in this call: the versions were checked
        raise TypeError(f"the result: {_NO_MEMORY}")
    return Operand(address, DTYPE_NAMES[contiguous.dtype], contiguous)

"""Flattening: tensors as segments and batches of flat memory, without copies where they are dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import add, attrgetter, ge, mul
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from ..backends.pytorch import DTYPE_NAMES, FLOAT_NAMES
from ..core.batch import Batch, Operand, Operands, Segment, Signature
from ..core.choices import Terms
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import is_extra_state
from ..core.schema import TensorSpec
from ..runtime.interrupts import without_gc

# Of a tensor. map() calls them in half the time of a loop in Python.
_STORAGE, _STORAGE_NBYTES = torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes
_OFFSET, _ADDRESS, _NUMEL = torch.Tensor.storage_offset, torch.Tensor.data_ptr, torch.Tensor.numel
_IS_CONTIGUOUS, _IS_NEG = torch.Tensor.is_contiguous, torch.Tensor.is_neg
_DTYPE, _SHAPE, _DEVICE = attrgetter("dtype"), attrgetter("shape"), attrgetter("device")
_IS_CPU, _REQUIRES_GRAD = attrgetter("is_cpu"), attrgetter("requires_grad")
# Tensors are checked one thing after another, so many names at a time that those of all models stay in the cache.
_NAMES_AT_ONCE = 64
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


class TermsOf(Protocol):
    """What makes the terms of segments (core/choices.py): Family of family.py.

    row_major: whether segments must have the order of the tensors' elements, and not that of their memory.
    """

    @property
    def row_major(self) -> bool: ...

    def terms(self, names: Sequence[str]) -> list[Terms] | None: ...


@without_gc()
def flat_items(
    models: list[dict[str, Any]], known: Mapping[str, Item] = MappingProxyType({})
) -> dict[str, Item]:
    """Items of the names whose tensors can be merged where they are. They need no further check.

    known are items that were made before.
    """
    names = [name for name in models[0] if name not in known] if min(len(models), len(models[0])) > 1 else []
    found: dict[str, Item] = {}
    for first in range(0, len(names), _NAMES_AT_ONCE):
        found |= _flat_columns(names[first : first + _NAMES_AT_ONCE], models)
    return {
        name: item
        for name in models[0]
        if (item := known.get(name) or found.get(name) or _flat_item(name, models))
    }


def _flat_columns(names: list[str], models: list[dict[str, Any]]) -> dict[str, Item]:
    """Items of those of some names whose base is flat, if all models are flat there; else none.

    These are the checks of _flat_item, each of all tensors of a model at once. Most of the time of a merge of many small
    tensors is spent in them.
    """
    names = [
        name
        for name in names
        if type(tensor := models[0][name]) in _PLAIN
        and tensor.dtype in FLOAT_NAMES
        and not is_extra_state(name)
    ]
    try:
        base = [models[0][name] for name in names]
        are_flat = zip(names, map(_IS_CONTIGUOUS, base), map(_ADDRESS, base), strict=True)
        names = [name for name, is_contiguous, address in are_flat if is_contiguous and address]
        columns: list[_Column] = []
        for model in models:
            if (column := _flat_column(list(map(model.get, names)), columns[0] if columns else None)) is None:
                return {}
            columns.append(column)
    except RuntimeError:  # as in _flat_item
        return {}
    first, *others = columns
    rows = zip(
        names,
        first.numels,
        zip(*[column.tensors for column in columns], strict=True),
        zip(first.addresses, first.dtypes, first.tensors, strict=True),
        zip(*[column.addresses for column in others], strict=True),
        zip(*[column.dtypes for column in others], strict=True),
        strict=True,
    )
    # One tuple for all that are equal: they are compared later.
    same: dict[tuple[str, ...], tuple[str, ...]] = {}
    new = tuple.__new__  # as Operand(...), without the call of a Python function: half the time
    items: dict[str, Item] = {}
    for name, numel, versions, operand, addresses, dtypes in rows:
        models_of = Operands(addresses, same.setdefault(dtypes, dtypes), versions[1:])
        segment = new(Segment, (numel, new(Operand, operand), models_of, None))
        items[name] = new(Item, (name, list(versions), segment, None))
    return items


class _Column(NamedTuple):
    """Flat tensors of one model, and what is known of them."""

    tensors: list[torch.Tensor]
    addresses: list[int]
    dtypes: list[str]
    shapes: list[torch.Size]
    devices: list[Any]
    numels: list[int]


def _flat_column(tensors: list[Any], base: _Column | None) -> _Column | None:
    """Tensors of a model, if all are as _flat_item wants them beside those of the base."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    dtypes: list[Any] = list(map(FLOAT_NAMES.get, map(_DTYPE, tensors)))
    addresses, shapes = list(map(_ADDRESS, tensors)), list(map(_SHAPE, tensors))
    are_dense = all(dtypes) and all(addresses) and all(map(_IS_CONTIGUOUS, tensors))
    if not are_dense or any(map(_IS_NEG, tensors)):
        return None
    devices = list(map(_IS_CPU, tensors))  # the device takes longer
    if not all(devices):
        devices = list(map(_DEVICE, tensors))
    if base is not None and (shapes != base.shapes or devices != base.devices):
        return None
    numels = base.numels if base is not None else list(map(_NUMEL, tensors))
    kinds = set(dtypes)
    sizes = repeat(FLOAT_SIZES[kinds.pop()]) if len(kinds) == 1 else map(FLOAT_SIZES.__getitem__, dtypes)
    ends = map(mul, map(add, map(_OFFSET, tensors), numels), sizes)
    if not all(map(ge, map(_STORAGE_NBYTES, map(_STORAGE, tensors)), ends)):
        return None
    if any(map(_REQUIRES_GRAD, tensors)):
        tensors = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    return _Column(tensors, addresses, dtypes, shapes, devices, numels)


def _flat_item(name: str, models: list[dict[str, Any]]) -> Item | None:
    """The item of a name, if its tensors are plain, contiguous, of one shape and on one device."""
    if is_extra_state(name):
        return None
    versions: list[torch.Tensor] = []
    addresses: list[int] = []
    dtypes: list[str] = []
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
            versions.append(tensor)
            addresses.append(address)
            dtypes.append(dtype)
        numel = tensor.numel()
        if not _holds(versions, numel * widest):
            return None
    except RuntimeError:  # a nested tensor has no shape, a sparse one no memory
        return None
    if tensor.is_meta:
        return None
    operands = Operands(addresses[1:], tuple(dtypes[1:]), versions[1:])
    return Item(name, versions, Segment(numel, Operand(addresses[0], dtypes[0], versions[0]), operands, None))


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


def batches(
    items: list[Item], task_vectors: bool, family: TermsOf | None = None
) -> Iterator[tuple[Batch, list[str], Callable[[], None]]]:
    """Batches, the names of their segments, and a function to call once the batch is merged."""
    row_major = family is not None and family.row_major
    groups: dict[tuple[torch.device, str, tuple[str, ...]], tuple[list[str], list[Segment]]] = {}
    scattered = []
    for item in items:
        if (segment := _segment_in_place(item, row_major)) is None:
            scattered.append(item)
            continue
        key = (item.versions[1].device, _result(segment), _dtypes(segment))
        if (group := groups.get(key)) is None:
            group = groups[key] = [], []
        group[0].append(item.name)
        group[1].append(segment)
    # Scattered tensors come first and one at a time: memory for their flat copies may be missing.
    for item in scattered:
        *versions, out = _in_order([*item.versions, item.out], row_major)
        copies = [None if t is None else t.resolve_neg().contiguous() for t in versions]
        merged = None if out is None else torch.empty_like(out, memory_format=torch.contiguous_format)

        def finish(out: torch.Tensor | None = out, merged: torch.Tensor | None = merged) -> None:
            if out is not None and merged is not None:
                with torch.inference_mode():
                    out.copy_(merged)

        segment = _segment([*copies, merged])
        signature = Signature(_result(segment), _dtypes(segment), task_vectors)
        terms = None if family is None else family.terms([item.name])
        batch = Batch(str(item.versions[1].device), signature, [segment], terms)
        del copies, versions, segment
        yield batch, [item.name], finish
        del batch, finish, merged
    for (device, result, dtypes), (names, segments) in groups.items():
        terms = None if family is None else family.terms(names)
        yield (
            Batch(str(device), Signature(result, dtypes, task_vectors), segments, terms),
            names,
            lambda: None,
        )


def _segment_in_place(item: Item, row_major: bool) -> Segment | None:
    """A segment on the tensors' own memory, if they are flat in the order of the first one's strides, or in row-major order."""
    if item.segment:
        numel, base, models, _ = item.segment
        return Segment(numel, base, models, base if item.out is item.versions[0] else _operand(item.out))
    tensors = _in_order([*item.versions, item.out], row_major)
    if all(t is None or (t.is_contiguous() and not t.is_neg()) for t in tensors):
        return _segment(tensors)
    return None


def _result(segment: Segment) -> str:
    written: Any = segment.out or segment.base
    dtype: str = written.dtype
    return dtype


def _dtypes(segment: Segment) -> tuple[str, ...]:
    models = segment.models
    return models.dtypes if isinstance(models, Operands) else tuple([m.dtype for m in models])


def _segment(contiguous: list[Any]) -> Segment:
    base, *models, out = map(_operand, contiguous)
    return Segment(contiguous[1].numel(), base, [m for m in models if m], out)


def _in_order(tensors: list[Any], row_major: bool) -> list[Any]:
    """The tensors with their dimensions in the order of the first one's strides, which makes dense ones flat; or as they are."""
    if row_major:
        return tensors
    order = memory_order(next(t for t in tensors if t is not None))
    return [None if t is None else t.permute(order) for t in tensors]


def memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions of a tensor in the order of its strides."""
    strides = tensor.stride()
    return sorted(range(len(strides)), key=lambda i: -strides[i])


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

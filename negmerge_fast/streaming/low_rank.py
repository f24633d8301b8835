"""LoRA adapters as a merge reads them: dense tensors, in files that do not exist, whose bytes are computed chunk by chunk.

As task vectors (core/low_rank.py), an element is d, and +0 where the adapter changes nothing; full models in the list become
differences, too. As merged models, it is b + d rounded to the base's type, and b where nothing is changed.

Only the factors of the tensors that are being merged are held. A CPU kernel takes them as they are (AdapterFile.expansion).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ..backends import registry
from ..checkpoints import placing
from ..checkpoints.adapters import have_equal_numbers
from ..checkpoints.base import ByteRange, Checkpoint, TensorRef
from ..checkpoints.computed import Computed, ComputedFile, address_of
from ..checkpoints.lora import Change, Product, Replacement, Shift, matrices, parts_of, refuse_types
from ..checkpoints.reader import File, Reader
from ..core.batch import Batch, Operand, Segment, Signature
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, short_repr
from ..core.low_rank import (
    PANEL,
    ExpandBatch,
    ExpandSegment,
    Expansion,
    LowRank,
    Upload,
    in_panels,
    lacking,
    rounded_scale,
)
from ..core.pairing import Renames
from ..core.rule import Rule
from ..core.schema import TensorSpec

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = Mapping[str, TensorRef]
_Floats: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# Tensors whose factors an adapter keeps: chunks of neighbours are under way at once.
_KEPT = 2
# Right factors of fewer panels are packed when they are needed: zeros behind them would take more than a quarter.
_MIN_PANELS = 4
# What is known of a computed tensor, beside what budget.py counts for each: measured for 90,000 of 30 adapters.
_BYTES_PER_TENSOR = 2048


class Placed(NamedTuple):
    """An adapter whose changes have their places in a base.

    Attributes:
        model: Its checkpoint.
        changes: What it changes, by the base's names.
        placed: How many of its modules have a place: all.
        notes: What a user should know of it, a line each.
    """

    model: Checkpoint
    changes: Mapping[str, Change[TensorRef]]
    placed: str
    notes: tuple[str, ...]


def place_adapter(base: Checkpoint, model: Checkpoint, renames: Renames | None, reader: Reader) -> Placed:
    """Find the places of an adapter's changes in a base.

    Raises:
        InputError: If one has none, or another shape.
    """
    assert model.adapter
    adapter = model.adapter.renamed(renames) if renames else model.adapter
    held = {**base.unindexed, **base.tensors}
    shapes = {name: tensor.spec.shape for name, tensor in held.items()}
    found = placing.place(adapter, shapes, base.configs.get("", {}), str(base.path))
    refuse_types(
        found.changes,
        lambda ref: ref.spec.dtype,
        {name: tensor.spec.dtype for name, tensor in held.items()},
        str(model.path),
        lambda name: f"{base.path}: tensor {short_repr(name)}",
    )
    for name, copy in found.copies.items():
        if not have_equal_numbers(held[name], copy, reader):
            raise InputError(
                f"{model.path}: has a copy of {short_repr(name)} of its own, expected the numbers of {base.path}: "
                "it was trained or resized, and is not merged"
            )
    own, prefix = (*adapter.notes, *found.notes), f"{adapter.name}: "
    *notes, placed = (note.removeprefix(prefix) for note in own)
    return Placed(model, found.changes, placed, tuple(notes))


def notes_of(adapters: Sequence[Placed], merged: Tensors) -> list[str]:
    """What of the tensors that are merged only some of the adapters change, a line each."""
    return lacking([each.changes for each in adapters], merged)


class Layout(NamedTuple):
    """What is the same for all models of a list.

    Attributes:
        base: The tensors of the base that are merged, in the order of its files.
        arithmetic: The arithmetic type of each.
        merged: Whether adapters are merged into the base, and not task vectors.
    """

    base: Tensors
    arithmetic: Mapping[str, str]
    merged: bool


def lay_out(base: Tensors, adapters: Sequence[Placed], full: Sequence[Tensors], merged: bool) -> Layout:
    """Order the tensors to merge as the base's files have them, and find their arithmetic type."""
    order = {file: k for k, file in enumerate(dict.fromkeys(t.source.file for t in base.values()))}
    ordered = sorted(base.items(), key=lambda item: (order[item[1].source.file], item[1].source.offset))
    arithmetic = {}
    for name, tensor in ordered:
        stored = {tensor.spec.dtype, *(model[name].spec.dtype for model in full)}
        for each in adapters:
            stored.update(_dtypes(each.changes.get(name)))
        arithmetic[name] = "F64" if "F64" in stored else "F32"
    return Layout(dict(ordered), arithmetic, merged)


def _dtypes(change: Change[TensorRef] | None) -> set[str]:
    """The storage types of what a change is made of."""
    return {ref.spec.dtype for ref in parts_of(change)}


def expand_adapter(layout: Layout, placed: Placed) -> Checkpoint:
    """An adapter as a checkpoint of dense tensors. Nothing is read yet."""
    weights = next(iter(placed.model.weights.values()))
    cache = FactorCache()

    def make(name: str, base: TensorRef, offset: int) -> _Dense | TensorRef:
        change = placed.changes.get(name)
        arithmetic = layout.arithmetic[name]
        if layout.merged:  # as if it were the only one of the list
            arithmetic = "F64" if "F64" in {base.spec.dtype, *_dtypes(change)} else "F32"
        into = base if layout.merged else None
        if change is None:
            return _Unchanged(name, base, arithmetic, offset, into)
        if isinstance(change, Replacement):
            if layout.merged and change.rows is None:
                value: TensorRef = change.value
                return value
            return _Replaced(name, base, arithmetic, offset, into, change.value, change.rows)
        return _Expanded(name, base, arithmetic, offset, into, change, cache)

    tensors = _computed(layout, weights, make)
    held = max(
        (_factor_bytes(change, layout.arithmetic[n]) for n, change in placed.changes.items() if n in tensors),
        default=0,
    )
    known = len(tensors) * _BYTES_PER_TENSOR
    return replace(placed.model, tensors=tensors, held_bytes=(_KEPT + 1) * held + known)


def subtract_base(layout: Layout, model: Checkpoint, tensors: Tensors) -> tuple[Checkpoint, Tensors]:
    """A full model of a list with adapters, as differences to the base."""

    def make(name: str, base: TensorRef, offset: int) -> _Dense | TensorRef:
        return _Replaced(name, base, layout.arithmetic[name], offset, None, tensors[name], None)

    computed = _computed(layout, next(iter(model.weights.values())), make)
    held_bytes = model.held_bytes + len(computed) * _BYTES_PER_TENSOR
    return replace(model, tensors={**model.tensors, **computed}, held_bytes=held_bytes), computed


def _computed(
    layout: Layout, like: File, make: Callable[[str, TensorRef, int], _Dense | TensorRef]
) -> dict[str, TensorRef]:
    """Lay tensors out one after the other, in a file for each of the base's, so that neighbours there are neighbours here."""
    held: dict[File, list[tuple[str, TensorRef]]] = {}
    for name, tensor in layout.base.items():
        held.setdefault(tensor.source.file, []).append((name, tensor))
    tensors: dict[str, TensorRef] = {}
    for found in held.values():
        dense: list[_Dense] = []
        at = 0
        for name, tensor in found:
            made = make(name, tensor, at)
            if isinstance(made, TensorRef):
                tensors[name] = made
            else:
                dense.append(made)
                at += made.numel * made.size
        file = AdapterFile(
            like.path, at, like.identity, like.mode, changed_ns=like.changed_ns, computed=dense
        )
        for each in dense:
            source = ByteRange(file, each.offset, each.numel * each.size)
            tensors[each.name] = TensorRef(TensorSpec(each.dtype, each.base.spec.shape), source)
    return tensors


@dataclass(frozen=True)
class _Dense(ABC):
    """A dense tensor of a model.

    Attributes:
        name: Its name in the base.
        base: The base's tensor.
        arithmetic: The arithmetic type.
        offset: Where it begins in the computed file.
        into: The base's tensor if differences are added to it, and the result is of its type; None if differences are written.
    """

    name: str
    base: TensorRef
    arithmetic: str
    offset: int
    into: TensorRef | None

    @property
    def stored(self) -> int:
        """Bytes that are read for all of it, beside the base's."""
        return 0

    @abstractmethod
    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        """Computed.compute."""

    @property
    def dtype(self) -> str:
        return self.into.spec.dtype if self.into else self.arithmetic

    @cached_property
    def size(self) -> int:
        return FLOAT_SIZES[self.dtype]

    @cached_property
    def numel(self) -> int:
        return self.base.numel

    def _begin_with(self, reader: Reader, begin: int, buffer: memoryview) -> None:
        """Fill a buffer with the base's elements, or with zeros if differences are written."""
        if self.into:
            self.into.source.read_into(reader, buffer, begin * self.size)
        else:
            np.frombuffer(buffer, np.uint8).fill(0)


class _Unchanged(_Dense):
    """A tensor that the adapter does not change."""

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        self._begin_with(reader, begin, buffer)
        return True


@dataclass(frozen=True)
class _Expanded(_Dense):
    """A tensor to which a low-rank difference, or a scaled vector, is added."""

    change: Product[TensorRef] | Shift[TensorRef]
    cache: FactorCache

    @cached_property
    def stored(self) -> int:
        return _stored_bytes(self.change)

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        at = Operand(address_of(buffer), self.dtype, buffer)
        if self.into:
            self._begin_with(reader, begin, buffer)
        expansion = Expansion(self.factors(reader), begin)
        segment = ExpandSegment(end - begin, expansion, at if self.into else None, at)
        result = self.dtype if self.into else None
        _, expand = registry.choose_expand("auto", "cpu")
        expand(ExpandBatch("cpu", self.arithmetic, result, [segment]), 1)
        return True

    @property
    def has_large_factors(self) -> bool:
        """Whether factors take more memory than the tensor: those of all tensors of a chunk would be held at once."""
        held, change = _factor_bytes(self.change, self.arithmetic), self.change
        shared_by = change.experts if isinstance(change, Product) and change.expert is not None else 1
        return held > self.numel * self.size * shared_by

    @cached_property
    def whole(self) -> _Whole:
        change = self.change
        if isinstance(change, Product):
            change = change._replace(expert=None, shape=None)
        # Hashed for each chunk: a file is told by its identity, and all else by where it begins.
        sources = [number for ref in parts_of(change) for number in (id(ref.source.file), ref.source.offset)]
        return _Whole((*sources, change[2:], self.arithmetic), change, self.arithmetic)

    def factors(self, reader: Reader, upload: Upload | None = None) -> LowRank:
        """The factors of the tensor, in main memory or where `upload` puts them."""
        found = self.cache.get(reader, self.whole, upload)
        if isinstance(self.change, Shift) or self.change.expert is None:
            return found
        size, e = FLOAT_SIZES[self.arithmetic], self.change.expert
        left = found.left + e * found.rows * found.rank * size
        right = found.right + e * found.rank * found.columns * size
        panels_size = -(found.columns * size // -PANEL) * found.rank * PANEL
        panels = found.panels and found.panels + e * panels_size
        return found._replace(left=left, right=right, matrices=1, panels=panels)


@dataclass(frozen=True)
class _Replaced(_Dense):
    """A tensor that is stored whole, or some of its rows: x, of which the difference to the base is written.

    Attributes:
        value: What is stored.
        rows: Which rows of the base it has; None if all.
    """

    value: TensorRef
    rows: tuple[int, ...] | None

    @property
    def stored(self) -> int:
        return self.value.source.stored_nbytes

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        if self.rows is None:
            return self._compute_range(reader, begin, end, begin, buffer, release)
        self._begin_with(reader, begin, buffer)
        columns = self.numel // max(self.base.spec.shape[0], 1)
        cached = True
        for k, row in enumerate(self.rows):
            first, last = max(begin, row * columns), min(end, (row + 1) * columns)
            if first < last:
                part = buffer[(first - begin) * self.size : (last - begin) * self.size]
                stored = k * columns + first - row * columns
                cached = self._compute_range(reader, first, last, stored, part, release) and cached
        return cached

    def _compute_range(
        self, reader: Reader, begin: int, end: int, stored: int, buffer: memoryview, release: bool
    ) -> bool:
        """Write the elements begin … end, which are stored from `stored` on."""
        x_type, b_type = self.value.spec.dtype, self.base.spec.dtype
        x, b = (bytearray((end - begin) * FLOAT_SIZES[dtype]) for dtype in (x_type, b_type))
        cached = bool(
            self.value.source.read_into(reader, memoryview(x), stored * FLOAT_SIZES[x_type], release)
        )
        if self.into:
            from ..backends.pytorch import rounded

            written = _torch(buffer, self.dtype)
            written.copy_(rounded(_torch(x, x_type), written.dtype))
            return cached
        self.base.source.read_into(reader, memoryview(b), begin * FLOAT_SIZES[b_type])
        _subtract(x, x_type, b, b_type, self.arithmetic, buffer)
        return cached


def _subtract(
    x: bytearray, x_type: str, b: bytearray, b_type: str, arithmetic: str, buffer: memoryview
) -> None:
    """Write d = x - b of the rule, b rounded to the type of x where that cannot hold it.

    A merge of this model alone has it as its mean: a difference of zero is +0 then, and one that is not finite is counted.
    """
    numel = len(x) // FLOAT_SIZES[x_type]
    signature = Signature(b_type, (x_type,), False)
    if signature.arithmetic == arithmetic:
        consensus = registry.consensus(registry.choose("auto", "cpu")[0])
        model, base = (Operand(address_of(data), t, data) for data, t in ((x, x_type), (b, b_type)))
        segment = Segment(numel, base, [model], Operand(address_of(buffer), arithmetic, buffer))
        [(_, nonfinite, _)] = consensus(Batch("cpu", signature, [segment]), Rule(-1.0), 1).tolist()
        if not nonfinite:
            return
    from ..backends.low_rank import subtract

    subtract(_torch(x, x_type), _torch(b, b_type), _torch(buffer, arithmetic))


def _torch(data: bytearray | memoryview, dtype: str) -> torch.Tensor:
    import torch

    from ..backends.pytorch import TORCH_DTYPES

    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype])


class _Whole(NamedTuple):
    """Factors that are read together: all experts of a fused parameter, whether it is one tensor of the base or many.

    Attributes:
        key: What tells them from others.
        change: The change of all experts.
        arithmetic: The type of the factors in memory.
    """

    key: tuple[Any, ...]
    change: Product[TensorRef] | Shift[TensorRef]
    arithmetic: str


class FactorCache:
    """The factors of the last few tensors of an adapter, in the arithmetic type. Threads may share it."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], LowRank] = OrderedDict()
        self._lock = Lock()

    def get(self, reader: Reader, whole: _Whole, upload: Upload | None) -> LowRank:
        """Return factors, which are read if they are not held."""
        key = whole.key, upload is None
        with self._lock:
            found = self._held.pop(key, None)
            if found is None:
                found = _load(reader, whole.change, whole.arithmetic, upload)
                while len(self._held) >= _KEPT:
                    self._held.popitem(last=False)
            self._held[key] = found
        return found


def _load(
    reader: Reader, change: Product[TensorRef] | Shift[TensorRef], arithmetic: str, upload: Upload | None
) -> LowRank:
    """Read the factors of a change. A vector is a matrix of one row: its own product with one."""
    wide = "<f8" if arithmetic == "F64" else "<f4"
    if isinstance(change, Shift):
        right = _read(reader, change.value, wide).reshape(1, 1, -1)
        left = np.ones((1, 1, 1), wide)
    else:
        a, b = (_read(reader, ref, wide) for ref in (change.a, change.b))
        left, right = map(np.ascontiguousarray, matrices(change, a, b))
    scale = rounded_scale(change.scale, arithmetic)
    (count, rows, rank), columns = left.shape, right.shape[2]
    (at_left, of_left), (at_right, of_right) = map(upload or _in_main_memory, (left, right))
    factors = LowRank(at_left, at_right, count, rows, columns, rank, scale, (of_left, of_right))
    if upload or rows == 1 or columns * right.itemsize < _MIN_PANELS * PANEL:
        return factors
    panels = in_panels(right)
    return factors._replace(panels=panels.ctypes.data, owner=(of_left, of_right, panels))


def _in_main_memory(array: _Floats) -> tuple[int, _Floats]:
    return array.ctypes.data, array


def _read(reader: Reader, tensor: TensorRef, wide: str) -> _Floats:
    """Read a whole tensor and widen it."""
    data = bytearray(tensor.source.nbytes)
    tensor.source.read_into(reader, memoryview(data))
    if tensor.spec.dtype == "BF16":
        numbers = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(data, f"<f{FLOAT_SIZES[tensor.spec.dtype]}")
    return numbers.astype(wide, copy=False).reshape(tensor.spec.shape)


def _stored_bytes(change: Change[TensorRef]) -> int:
    """Bytes of a change in its file; of one expert, its part."""
    if not isinstance(change, Product):
        return int(change.value.source.nbytes)
    nbytes = int(change.a.source.nbytes + change.b.source.nbytes)
    return nbytes if change.expert is None else nbytes // change.experts


def _factor_bytes(change: Change[TensorRef], arithmetic: str) -> int:
    """The most bytes of a change's factors in memory, of which either may be there in panels, too."""
    if isinstance(change, Replacement):
        return 0
    sizes = [ref.numel * FLOAT_SIZES[arithmetic] for ref in parts_of(change)]
    return sum(sizes) + max(sizes) * 5 // 4


@dataclass(frozen=True, eq=False)
class AdapterFile(ComputedFile):
    """A computed file of dense tensors, of which some are known by their factors."""

    is_low_rank = True

    @cached_property
    def _by_name(self) -> dict[str, Computed]:
        return {each.name: each for each in self.computed if isinstance(each, _Dense)}

    def expansion(
        self, reader: Reader, name: str, start: int, arithmetic: str, upload: Upload | None
    ) -> Expansion | None:
        tensor = self._by_name[name]
        if not isinstance(tensor, _Expanded) or tensor.arithmetic != arithmetic or tensor.has_large_factors:
            return None
        return Expansion(tensor.factors(reader, upload), start)

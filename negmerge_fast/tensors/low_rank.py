"""Tensors that adapters change, in segments whose models are low-rank differences: no dense model is ever whole in memory.

core/low_rank.py has the rule. What is not low-rank, such as a full model's difference to the base, is computed block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from ..backends import low_rank, registry
from ..backends.pytorch import FLOAT_NAMES, TORCH_DTYPES, compute_alone_if_flushing, plain_arithmetic, rounded
from ..checkpoints.lora import Change, Product, Replacement, Shift, matrices, parts_of
from ..core.batch import Batch, Merge, Operand, Rows, Segment, Signature
from ..core.choices import Terms
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank, rounded_scale
from ..core.rule import Rule
from .counts import Results
from .dtensor import Box
from .flatten import Item

if TYPE_CHECKING:
    from .family import Family

# Bytes of blocks that are computed, of all models of a tensor.
_CPU_SCRATCH, _DEVICE_SCRATCH = 16 << 20, 256 << 20

# A model's tensor; what an adapter changes in it; None if it changes nothing.
Content: TypeAlias = "torch.Tensor | Change[torch.Tensor] | None"


class Mixed(NamedTuple):
    """A tensor to merge, of whose models some are adapters.

    Attributes:
        item: The base's tensor, and where the result is written.
        sources: The models.
        box: The part of the tensor that the base's is, of a DTensor.
        shape: The shape of the whole tensor.
        where: What errors call it.
    """

    item: Item
    sources: Sequence[Content]
    box: Box | None
    shape: tuple[int, ...]
    where: str


class Prepared:
    """A tensor whose models can be had block by block. Factors are in the arithmetic type, and live as long as this.

    Args:
        mixed: The tensor.
        merged: Whether adapters are merged into the base, and not task vectors.
        task_vectors: Whether full models are task vectors.

    Attributes:
        signature: What its segments are merged as.
        numel: Its elements.
    """

    def __init__(self, mixed: Mixed, merged: bool, task_vectors: bool) -> None:
        self._mixed = mixed
        # A copy of what is scattered; one tensor at a time.
        self.base = mixed.item.versions[0].resolve_neg().contiguous()
        self.device, self.numel = self.base.device, self.base.numel()
        self.signature = signature_of(mixed, merged, task_vectors)
        self._models = [
            self._model(source, merged, task_vectors, dtype)
            for source, dtype in zip(mixed.sources, self.signature.models, strict=True)
        ]
        self._scratch: dict[int, torch.Tensor] = {}
        self._threads: int | None = None
        if any(model.is_computed for model in self._models) and self.device.type == "cpu":
            self._threads = _threads(min(self.numel, _CPU_SCRATCH // FLOAT_SIZES["F32"]))

    def _model(self, source: Content, merged: bool, task_vectors: bool, dtype: str) -> _Model:
        if isinstance(source, torch.Tensor):
            if merged or task_vectors:
                return _Stored(source, dtype)
            return _Replaced(self, source, None, dtype, None)
        into = self.base if merged else None
        arithmetic = _own_arithmetic(self.base, source) if merged else self.signature.arithmetic
        if isinstance(source, Replacement):
            value, rows = self._replacement(source)
            if merged and rows is None:
                return _Stored(value.to(self.device), dtype)
            return _Replaced(self, value, rows, dtype, into)
        factors, begin = self._factors(source, arithmetic)
        return _Expanded(self, factors, begin, arithmetic, dtype, into, self.signature.arithmetic)

    def _replacement(self, change: Replacement[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...] | None]:
        """The part of a replacement that is of this rank's shard, and its rows there."""
        box, value, rows = self._mixed.box, change.value, change.rows
        if box is None:
            return value, rows
        if rows is None:
            return value[box.slices()], None
        first, end = box.offset[0], box.offset[0] + box.shape[0]
        held = [k for k, row in enumerate(rows) if first <= row < end]
        return value[held][(slice(None), *box.slices(1))], tuple(rows[k] - first for k in held)

    def _factors(
        self, change: Product[torch.Tensor] | Shift[torch.Tensor] | None, arithmetic: str
    ) -> tuple[LowRank, int]:
        """Factors in an arithmetic type, and the number of the first element of this rank's shard."""
        dtype = TORCH_DTYPES[arithmetic]
        if change is None:
            columns = (self.base.shape[-1] if self.base.dim() else 1) or 1
            rows = self.numel // columns
            zeros = torch.zeros(max(rows, columns), dtype=dtype, device=self.device)
            return LowRank(zeros.data_ptr(), zeros.data_ptr(), 1, rows, columns, 1, 1.0, [zeros]), 0
        if isinstance(change, Shift):
            right = change.value.reshape(1, 1, -1)
            left = torch.ones(1, 1, 1, dtype=dtype, device=self.device)
        else:
            left, right = matrices(change, change.a, change.b)
        left, right, begin = _of_shard(self._mixed, left, right)
        left, right = (t.to(self.device, dtype).contiguous() for t in (left, right))
        scale = rounded_scale(change.scale, arithmetic)
        (count, rows, rank), columns = left.shape, right.shape[2]
        return LowRank(
            left.data_ptr(), right.data_ptr(), count, rows, columns, rank, scale, [left, right]
        ), begin

    def block(self, longest: int) -> int:
        """Elements of the longest segment, at most so many: all of them unless something has to be computed."""
        computed = sum(FLOAT_SIZES[model.dtype] for model in self._models if model.is_computed)
        if not computed:
            return min(self.numel, longest) or 1
        nbytes = _CPU_SCRATCH if self.device.type == "cpu" else _DEVICE_SCRATCH
        return min(self.numel, longest, max(nbytes // computed // 64 * 64, 64)) or 1

    def segment(self, start: int, size: int, out: Operand | None) -> Segment:
        """The segment of some elements. What is computed is valid until the next one."""
        models: Any = [
            model.at(start) if not model.is_computed else self._compute(k, model, start, size)
            for k, model in enumerate(self._models)
        ]
        return Segment(size, at(self.base, start), models, out)

    def dense(self, start: int, size: int) -> Segment:
        """The same with what is low-rank expanded, for an error message."""
        segment = self.segment(start, size, None)
        models = list(segment.models)
        for k, model in enumerate(self._models):
            if isinstance(models[k], Expansion):
                models[k] = self._compute(k, model, start, size)
        return segment._replace(models=models)

    def _compute(self, k: int, model: _Model, start: int, size: int) -> Operand:
        memory = self._scratch.get(k)
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=TORCH_DTYPES[model.dtype], device=self.device)
            self._scratch[k] = memory
        with plain_arithmetic(self._threads):
            model.compute(start, memory[:size])
        return Operand(memory.data_ptr(), model.dtype, memory)


def require_expandable(mixed: Mixed) -> None:
    """Raise InputError if what an adapter changes of this rank's shard is not consecutive, and is no product of its own."""
    for source in mixed.sources if mixed.box else ():
        if isinstance(source, Product):
            _of_shard(mixed, *matrices(source, source.a, source.b))


def _of_shard(
    mixed: Mixed, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The factors of this rank's shard, and the number of its first element."""
    box, shape = mixed.box, mixed.shape
    if box is None:
        return left, right, 0
    sizes = (left.shape[0], left.shape[1], right.shape[2])
    if box.shape[1:] == shape[1:]:  # consecutive elements
        return left, right, box.offset[0] * (math.prod(sizes) // shape[0])
    if shape != sizes[-len(shape) :] or (len(shape) < 3 and left.shape[0] > 1):
        raise InputError(
            f"{mixed.where}: a shard from {box.offset} of shape {box.shape}, "
            "expected one of the first dimension alone for an adapter"
        )
    *matrix, rows, columns = box.slices()
    held = tuple(matrix) or slice(None)
    return left[held][:, rows], right[held][..., columns], 0


def _threads(size: int) -> int | None:
    """The number of threads that compute so many elements: one if others flush subnormals."""
    with plain_arithmetic():
        usual = torch.get_num_threads()
        compute_alone_if_flushing(torch.empty(size, dtype=torch.float32, device="cpu"))
        return None if torch.get_num_threads() == usual else 1


def at(contiguous: torch.Tensor, start: int) -> Operand:
    """A tensor's elements from one on."""
    return Operand(
        contiguous.data_ptr() + start * contiguous.itemsize, FLOAT_NAMES[contiguous.dtype], contiguous
    )


class _Model:
    """A model of a tensor.

    Attributes:
        dtype: The type of its elements.
        is_computed: Whether they have to be computed before they are merged.
    """

    dtype: str
    is_computed: bool

    def at(self, start: int) -> Operand | Expansion:
        """The elements from one on, if they are not computed."""
        raise NotImplementedError

    def compute(self, start: int, out: torch.Tensor) -> None:
        """Write elements."""
        raise NotImplementedError


class _Stored(_Model):
    """A model whose elements are in memory."""

    is_computed = False

    def __init__(self, tensor: torch.Tensor, dtype: str) -> None:
        self._tensor, self.dtype = tensor.resolve_neg().contiguous(), dtype

    def at(self, start: int) -> Operand:
        return at(self._tensor, start)


class _Expanded(_Model):
    """A low-rank difference; or the base with it, rounded. It is computed only where no kernel of the signature's type does the same."""

    def __init__(
        self,
        tensor: Prepared,
        factors: LowRank,
        begin: int,
        arithmetic: str,
        dtype: str,
        into: torch.Tensor | None,
        expected: str,
    ) -> None:
        self._device, self._factors, self._begin = tensor.device, factors, begin
        self._arithmetic, self.dtype, self._into = arithmetic, dtype, into
        self.is_computed = arithmetic != expected

    def at(self, start: int) -> Expansion:
        return Expansion(self._factors, self._begin + start)

    def compute(self, start: int, out: torch.Tensor) -> None:
        base = None if self._into is None else at(self._into, start)
        written = Operand(out.data_ptr(), self.dtype, out)
        segment = ExpandSegment(len(out), self.at(start), base, written)
        result = None if base is None else self.dtype
        low_rank.expand(ExpandBatch(str(self._device), self._arithmetic, result, [segment]))


class _Replaced(_Model):
    """Weights, or some rows of them: their difference to the base; or, of rows, the base with these in it."""

    is_computed = True

    def __init__(
        self,
        tensor: Prepared,
        value: torch.Tensor,
        rows: tuple[int, ...] | None,
        dtype: str,
        into: torch.Tensor | None,
    ) -> None:
        self._base, self._rows, self.dtype, self._into = tensor.base.view(-1), rows, dtype, into
        # A view where the value is on the device and flat.
        self._value = value.to(tensor.device).resolve_neg().contiguous().view(-1)
        self._columns = len(self._base) // max(tensor.base.shape[0], 1) if rows is not None else 0

    def compute(self, start: int, out: torch.Tensor) -> None:
        if self._rows is None:
            self._write(start, start, out)
            return
        if self._into is None:
            out.zero_()
        else:
            out.copy_(self._base[start : start + len(out)])
        for k, row in enumerate(self._rows):
            first = max(start, row * self._columns)
            last = min(start + len(out), (row + 1) * self._columns)
            if first < last:
                stored = k * self._columns + first - row * self._columns
                self._write(first, stored, out[first - start : last - start])

    def _write(self, first: int, stored: int, out: torch.Tensor) -> None:
        """Write elements from the base's number `first` on, which are stored from `stored` on."""
        x, b = self._value[stored : stored + len(out)], self._base[first : first + len(out)]
        if self._into is not None:
            out.copy_(rounded(x, out.dtype))
        else:
            low_rank.subtract(x, b, out)


def _own_arithmetic(base: torch.Tensor, change: Change[torch.Tensor] | None) -> str:
    """The type of the arithmetic if a change were the only one."""
    return "F64" if torch.float64 in {base.dtype, *_dtypes(change)} else "F32"


def _dtypes(source: Content) -> set[torch.dtype]:
    """The types of what a model is stored as."""
    return {source.dtype} if isinstance(source, torch.Tensor) else {part.dtype for part in parts_of(source)}


def signature_of(mixed: Mixed, merged: bool, task_vectors: bool) -> Signature:
    """What the segments of a tensor are merged as."""
    base = mixed.item.versions[0]
    stored = {base.dtype}.union(*map(_dtypes, mixed.sources))
    arithmetic = "F64" if torch.float64 in stored else "F32"

    def dtype_of(source: Content) -> str:
        if isinstance(source, torch.Tensor) and (merged or task_vectors):
            return FLOAT_NAMES[source.dtype]
        if merged and isinstance(source, Replacement) and source.rows is None:
            return FLOAT_NAMES[source.value.dtype]
        return FLOAT_NAMES[base.dtype] if merged else arithmetic

    return Signature(FLOAT_NAMES[base.dtype], tuple(map(dtype_of, mixed.sources)), not merged)


def run(
    tensors: Sequence[Mixed],
    rule: Rule,
    merged: bool,
    task_vectors: bool,
    backend: str,
    family: Family | None = None,
) -> Results:
    """Merge tensors into their outputs, one after the other. Returns counts, as run_batches does."""
    for mixed in tensors:
        require_expandable(mixed)  # before anything is written
    if family is not None:
        rule = family.rule(rule)
    merges = choose(registry.choose_low_rank, tensors, rule, merged, task_vectors, backend)
    results: list[Any] = []
    for mixed in tensors:
        if not mixed.item.versions[0].numel():
            results.append(([(mixed.item.name, 0)], Rows([[0, 0, 0]])))
            continue
        prepared = Prepared(mixed, merged, task_vectors)
        results += _merge(prepared, mixed.item, merges[str(prepared.device)], rule, family)
    return results


def choose(
    chooser: Callable[..., tuple[str, Merge]],
    tensors: Sequence[Mixed],
    rule: Rule,
    merged: bool,
    task_vectors: bool,
    backend: str,
) -> dict[str, Merge]:
    """Choose a backend for each device. Nothing is written if one of the devices has none."""
    found: dict[str, list[Signature]] = {}
    for mixed in tensors:
        device = str(mixed.item.versions[0].device)
        found.setdefault(device, []).append(signature_of(mixed, merged, task_vectors))
    return {device: chooser(backend, device, rule, signatures)[1] for device, signatures in found.items()}


def _merge(prepared: Prepared, item: Item, merge: Merge, rule: Rule, family: Family | None) -> Iterator[Any]:
    """Merge a tensor, and yield the counts of its blocks."""
    terms = None
    if family is not None:
        rule, terms = family.rule(rule, item.name), family.row_terms(item.name)
    written, out = item.out, None
    if written is not None:
        flat = written.is_contiguous() and not written.is_neg()
        out = written if flat else torch.empty_like(written, memory_format=torch.contiguous_format)
    block = prepared.block(prepared.numel)
    for start in range(0, prepared.numel, block):
        size = min(block, prepared.numel - start)
        segment = prepared.segment(start, size, None if out is None else at(out, start))
        batch = Batch(str(prepared.device), prepared.signature, [segment], at_start(terms, start))
        yield [(item.name, size)], merge(batch, rule)
    if written is not None and out is not None and out is not written:
        with torch.inference_mode():
            written.copy_(out)


def unwritten(mixed: Mixed, merged: bool, task_vectors: bool) -> list[tuple[Batch, list[str]]]:
    """A tensor without outputs, in one batch. What has to be computed of it is dense."""
    require_expandable(mixed)
    prepared = Prepared(mixed, merged, task_vectors)
    batch = Batch(str(prepared.device), prepared.signature, [prepared.segment(0, prepared.numel, None)])
    return [(batch, [mixed.item.name])]


def at_start(terms: Terms | None, start: int) -> list[Terms] | None:
    """The terms of a batch of one segment, which begins so many elements later."""
    return None if terms is None else [terms.at(start)]


def first_nonfinite(
    mixed: Mixed, rule: Rule, merged: bool, task_vectors: bool, family: Family | None = None
) -> tuple[int, int | str, str] | None:
    """Find the first element of a tensor that is not finite: its number, the version and the value, as registry.first_nonfinite."""
    if not mixed.item.versions[0].numel():
        return None
    terms = None
    if family is not None:
        rule, terms = family.rule(rule, mixed.item.name), family.row_terms(mixed.item.name)
    prepared = Prepared(mixed, merged, task_vectors)
    block = prepared.block(1 << 18)
    for start in range(0, prepared.numel, block):
        segment = prepared.dense(start, min(block, prepared.numel - start))
        batch = Batch(str(prepared.device), prepared.signature, [segment], at_start(terms, start))
        if found := registry.first_nonfinite(batch, rule):
            _, index, version, value = found
            return start + index, version, value
    return None

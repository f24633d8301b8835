"""merge, merge_, merge_task_vectors and negate_ on tensors, mappings of tensors and modules.

Models become named tensors, the versions of one name a segment of flat memory, and all segments of one device and
signature a batch: one call of a backend. Everything is checked before the first write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from . import backends
from .layout import Form, mismatches
from .overlap import plainly_apart, refuse_shared_memory, tied
from .process import uncollected, uninterrupted
from .rule import (
    FLOAT_SIZES,
    Batch,
    InputError,
    Inputs,
    NonFinite,
    Rule,
    Segment,
    Signature,
    Stats,
    Stream,
    require_choice,
)

Model: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor] | torch.nn.Module"

_SPELLED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
}  # fmt: skip

_FLOATS = {dtype: spelled for dtype, spelled in _SPELLED.items() if spelled in FLOAT_SIZES}
# Nothing else at first sight: a subclass may hold its numbers elsewhere.
_STRIDED = torch.strided
_PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])

# The name of the one tensor of a model that is just a tensor.
_ALONE = ""


def merge(
    base: Model,
    finetuned: Sequence[Model],
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Any:
    """The base, negated by the consensus of its fine-tuned versions (NegMerge, arXiv 2410.05583, section 4).

        d_k = x_k - b;   agree = all d_k > 0 or all d_k < 0;   out = b - scale · mean(d)  if agree,  else b

    base: a tensor, a mapping of names to tensors, or an nn.Module. Any shape, strides and device; fp64, fp32, fp16
        and bf16 are merged; integer and bool tensors are the base's, untouched.
    finetuned: one or more of the same kind, with the same names, shapes and devices; floating-point types may differ.
    scale: λ. min_agreement: the share of the models, in (0.5, 1], that must agree on the sign; 1 is the paper's.
    inputs: whether finetuned holds "finetuned" weights x_k or "task_vectors" d_k.
    nonfinite: an element with a NaN or an infinity in any version, or in the result, keeps the base's bits
        ("keep-base") or is an "error".

    Returns what base is, in memory of its own: a tensor, or a dict of tensors (of a module, its state dict). Tied
    weights stay tied. Raises InputError (a ValueError) or TypeError naming model and tensor.
    """
    rule = Rule(scale, min_agreement)
    job = _Job(base, finetuned, "finetuned", inputs, nonfinite, backend)
    items = [item._replace(out=torch.empty_like(item.versions[0])) for item in job.items]
    stats = job.run(items, rule)
    job.refuse_nonfinite(items, rule, stats)
    merged = {item.name: item.out for item in items}
    result: dict[str, Any] = {}
    for name in job.names:
        if (owner := job.tied.get(name, name)) in merged:
            result[name] = merged[owner]
        else:
            value = job.untouched[name]
            result[name] = value.value if isinstance(value, _ExtraState) else value.clone()
    return result[_ALONE] if isinstance(base, torch.Tensor) else result


def merge_(
    base: Model,
    finetuned: Sequence[Model],
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Stats:
    """merge, in place on base; the arguments are merge's. Tied weights are updated once.

    Nothing is written if anything is refused: fine-tuned versions that share memory with base included, and with
    nonfinite="error" any non-finite element (which costs a second reading of everything). Ctrl-C waits until all is
    written; only memory that is missing for the flat copy of a scattered tensor can stop it on the way.

    Returns what was counted, per tensor and in all: elements, agreed, nonfinite, consensus_ratio.
    """
    rule = Rule(scale, min_agreement)
    return _Job(base, finetuned, "finetuned", inputs, nonfinite, backend).run_in_place(rule)


def negate_(
    base: Model,
    tau: Model,
    *,
    scale: float,
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Stats:
    """base -= scale · tau, in place, where tau is not zero: task negation (arXiv 2212.04089) with any task vector.

    base, nonfinite and the result are those of merge_; tau is one model of the same kind, whose integer and bool
    tensors may be missing. One multiplication and one addition, rounded each, in float32 (float64 for fp64).
    """
    rule = Rule(scale)
    job = _Job(base, [tau], "tau", "task_vectors", nonfinite, backend)
    return job.run_in_place(rule)


def merge_task_vectors(
    task_vectors: Sequence[Model],
    *,
    min_agreement: float = 1.0,
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Any:
    """The consensus mean of task vectors, dense: their mean where all signs agree, 0 elsewhere (arXiv 2410.05583, eq. 3).

    task_vectors: one or more tensors, mappings or modules with the same names, shapes and devices. The result has the
    widest of their types, per tensor; integer and bool tensors are left out; non-finite elements are 0 or an error.
    Raises as merge does.
    """
    rule = Rule(-1.0, min_agreement)
    models = _models(task_vectors, "task_vectors")
    job = _Job(
        models[0], models, "task_vectors", "task_vectors", nonfinite, backend, reference="task_vectors[0]"
    )
    if isinstance(models[0], torch.Tensor) and not job.items:
        raise InputError(
            f"task_vectors[0]: {models[0].dtype}, expected a floating-point type to merge, of {', '.join(FLOAT_SIZES)}"
        )
    items = []
    for item in job.items:
        vectors = item.versions[1:]
        widest = vectors[0].dtype
        for vector in vectors:
            widest = torch.promote_types(widest, vector.dtype)
        out = torch.empty_like(vectors[0], dtype=widest)
        segment = item.segment and item.segment._replace(base=None)
        items.append(_Item(item.name, [None, *vectors], segment, out))
    stats = job.run(items, rule)
    job.refuse_nonfinite(items, rule, stats)
    merged = {item.name: item.out for item in items}
    result = {n: merged[job.tied.get(n, n)] for n in job.names if job.tied.get(n, n) in merged}
    return result[_ALONE] if isinstance(models[0], torch.Tensor) else result


class _ExtraState(NamedTuple):
    """What a module says of itself beside its tensors: the base's, untouched, whatever it is."""

    value: Any


class _Item(NamedTuple):
    """All versions of one tensor: the base (None: zeros), the models'; out None: count only.

    segment: theirs, without out, if they were seen to be flat.
    """

    name: str
    versions: list[Any]
    segment: Segment | None = None
    out: torch.Tensor | None = None


class _Job:
    """One call: the tensors paired by name and checked, and how to run and describe them."""

    @uncollected()
    def __init__(
        self,
        base: Model,
        finetuned: Sequence[Model],
        label: str,
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        reference: str = "base",
    ) -> None:
        require_choice("inputs", inputs, ("finetuned", "task_vectors"))
        require_choice("nonfinite", nonfinite, ("keep-base", "error"))

        def where(k: int | None, name: str) -> str:
            model = reference if k is None else label if label == "tau" else f"{label}[{k}]"
            return model if name == _ALONE else f"{model}[{name!r}]"

        self.where, self.task_vectors, self.nonfinite = where, inputs == "task_vectors", nonfinite
        named = [_named(base, where(None, _ALONE))]
        models = _models(finetuned, label)
        for k, model in enumerate(models):
            if isinstance(model, torch.Tensor) != isinstance(base, torch.Tensor):
                raise TypeError(
                    f"{where(k, _ALONE)}: {type(model).__name__}, but {reference} is {type(base).__name__}"
                )
        named += [_named(model, where(k, _ALONE)) for k, model in enumerate(models)]
        self._pair(named, reference)
        devices = {str(device) for device in {item.versions[0].device for item in self.items}}
        self.merges = {device: backends.choose(backend, device)[1] for device in devices or {"cpu"}}

    def _pair(self, named: list[dict[str, Any]], reference: str) -> None:
        self.names = list(named[0])
        # As a rule these are all, and nothing is left for the closer look that follows.
        flat = {name: item for name in self.names if (item := _look(name, named))}
        base, *models = rest = [
            _checked({n: v for n, v in model.items() if n not in flat}, partial(self.where, k))
            for k, model in zip([None, *range(len(named) - 1)], named, strict=True)
        ]
        problems = mismatches(
            _forms(base), [_forms(m) for m in models], self.where, self.task_vectors, reference
        ) or list(_other_devices(base, models, self.where))
        if problems:
            raise InputError("; ".join(problems))
        items = {
            name: flat.get(name) or _Item(name, [m[name] for m in rest])
            for name in self.names
            if name in flat or _is_float(base[name])
        }
        self.tied = tied({name: item.versions for name, item in items.items()}, self.where)
        self.items = [item for name, item in items.items() if name not in self.tied]
        self.untouched = {name: value for name, value in base.items() if name not in items}

    def run(self, items: list[_Item], rule: Rule) -> Stats:
        stats = Stats()
        for batch, names, finish in _batches(items, self.task_vectors):
            counts = self.merges[batch.device](batch, rule)
            stats.add([(n, s.numel) for n, s in zip(names, batch.segments, strict=True)], counts)
            finish()
            del batch, finish  # and with them the copies of scattered tensors, before the next are made
        return stats

    def run_in_place(self, rule: Rule) -> Stats:
        # They are the base's, untouched: a view of the weights as integers would not be.
        integers = {n: t for n, t in self.untouched.items() if isinstance(t, torch.Tensor)}
        flat = [item.segment for item in self.items if item.segment]
        if len(flat) < len(self.items) or not plainly_apart(flat, integers.values()):
            refuse_shared_memory(self._uses(integers))
        if self.nonfinite == "error":
            self.refuse_nonfinite(self.items, rule, self.run(self.items, rule))
        for item in self.items:
            # Autograd must notice what is written through addresses, too.
            if not item.versions[0].is_inference():
                torch.autograd.graph.increment_version(item.versions[0])
        items = [_Item(n, versions, s, versions[0]) for n, versions, s, _ in self.items]
        with uninterrupted():
            return self.run(items, rule)

    def _uses(self, integers: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool, str]]:
        """Every tensor that a merge in place uses, whether it is written, and what to call it."""
        for item in self.items:
            for k, tensor in enumerate(item.versions):
                yield tensor, k == 0, self.where(k - 1 if k else None, item.name)
        for name, tensor in integers.items():
            yield tensor, False, self.where(None, name)

    def refuse_nonfinite(self, items: list[_Item], rule: Rule, stats: Stats) -> None:
        if self.nonfinite == "keep-base" or not stats.nonfinite:
            return
        for batch, names, _ in _batches(items, self.task_vectors):
            if found := backends.first_nonfinite(batch, rule):
                row, index, version, value = found
                place = self.where(None if isinstance(version, str) else version, names[row])
                what = "the result is not finite" if version == "result" else f"{value}"
                raise InputError(f"{place}: element {index} in memory order: {what}, expected finite numbers")


def _models(models: Sequence[Model], label: str) -> list[Model]:
    if isinstance(models, (torch.Tensor, Mapping, torch.nn.Module)) or not isinstance(models, Iterable):
        raise TypeError(f"{label}: {type(models).__name__}, expected a list of models")
    if not (listed := list(models)):
        raise InputError(f"{label}: no models, expected at least one")
    return listed


def _named(model: Model, where: str) -> dict[str, Any]:
    if isinstance(model, torch.Tensor):
        return {_ALONE: model}
    if isinstance(model, torch.nn.Module):
        return dict(model.state_dict())
    if isinstance(model, Mapping):
        return dict(model.items())
    raise TypeError(f"{where}: {type(model).__name__}, expected a tensor, a mapping of tensors or a module")


def _look(name: str, models: list[dict[str, Any]]) -> _Item | None:
    """The tensors of a name with their segment, if all are plain, contiguous, of one shape and on one device.

    This is most of what a merge of many small tensors costs: each is visited once, and no view of it is made.
    """
    if str(name).endswith("_extra_state"):
        return None
    streams: list[Stream] = []
    shape = device = None
    try:
        for model in models:
            tensor: Any = model.get(name)
            if type(tensor) not in _PLAIN or tensor.layout is not _STRIDED:
                return None
            dtype = _FLOATS.get(tensor.dtype)
            if dtype is None or not tensor.is_contiguous() or tensor.is_neg():
                return None
            place = tensor.is_cpu or tensor.device  # the former is had sooner
            if shape is None:
                shape, device = tensor.shape, place
            elif tensor.shape != shape or place != device:
                return None
            if tensor.requires_grad:
                tensor = tensor.detach()
            # What Stream(...) does, less a call of a Python function: a tenth of it all.
            if not (address := tensor.data_ptr()) and tensor.numel():  # its memory was freed
                return None
            streams.append(tuple.__new__(Stream, (address, dtype, tensor)))
    except RuntimeError:  # of a nested tensor, which has no shape
        return None
    if tensor.is_meta:
        return None
    return _Item(name, [s.owner for s in streams], Segment(tensor.numel(), streams[0], streams[1:], None))


def _checked(named: dict[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """The tensors, detached; a module's extra state is kept as it is."""
    checked: dict[str, Any] = {}
    for name, value in named.items():
        if str(name).endswith("_extra_state"):
            checked[name] = _ExtraState(value)
        elif isinstance(value, torch.Tensor):
            _require_plain(value, where(name))
            checked[name] = value.detach()
        else:
            raise TypeError(f"{where(name)}: {type(value).__name__}, expected a tensor")
    return checked


def _require_plain(tensor: torch.Tensor, where: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{where}: {kind} tensor, expected a dense one")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{where}: {type(tensor).__name__}, expected a plain torch.Tensor")
    if tensor.is_meta:
        raise InputError(f"{where}: a meta tensor holds no data, expected one that does")
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    behind = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.numel() and behind > tensor.untyped_storage().nbytes():
        raise InputError(f"{where}: its memory has been freed, or cut, expected {behind:,} bytes")


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _FLOATS


def _forms(named: dict[str, Any]) -> dict[str, Form]:
    return {
        name: Form(_SPELLED.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for name, t in named.items()
        if isinstance(t, torch.Tensor)
    }


def _other_devices(
    base: dict[str, Any], models: list[dict[str, Any]], where: Callable[[int | None, str], str]
) -> Iterator[str]:
    for k, model in enumerate(models):
        for name, tensor in base.items():
            if _is_float(tensor) and model[name].device != tensor.device:
                yield f"{where(k, name)}: on {model[name].device}, expected {tensor.device} like {where(None, name)}"


def _batches(items: list[_Item], task_vectors: bool) -> Iterator[tuple[Batch, list[str], Callable[[], None]]]:
    """Batches, the names of their segments, and what to do when one is merged."""
    groups: dict[tuple[torch.device, Signature], list[tuple[str, Segment]]] = {}
    scattered = []
    for item in items:
        if segment := _where_it_is(item):
            key = item.versions[1].device, _signature(segment, task_vectors)
            groups.setdefault(key, []).append((item.name, segment))
        else:
            scattered.append(item)
    # First, and one at a time: their flat copies are extra memory, which may not be there.
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
    for (device, signature), members in groups.items():
        yield Batch(str(device), signature, [s for _, s in members]), [n for n, _ in members], lambda: None


def _where_it_is(item: _Item) -> Segment | None:
    """The segment that reads and writes the tensors themselves, if they are flat in the order of the first one's strides."""
    if item.segment:
        numel, base, models, _ = item.segment
        return Segment(numel, base, models, base if item.out is item.versions[0] else _stream(item.out))
    tensors = _in_memory_order([*item.versions, item.out])
    if all(t is None or (t.is_contiguous() and not t.is_neg()) for t in tensors):
        return _segment(tensors)
    return None


def _signature(segment: Segment, task_vectors: bool) -> Signature:
    result: Any = segment.out or segment.base
    return Signature(result.dtype, tuple([m.dtype for m in segment.models]), task_vectors)


def _segment(contiguous: list[Any]) -> Segment:
    base, *models, out = map(_stream, contiguous)
    return Segment(contiguous[1].numel(), base, [m for m in models if m], out)


def _in_memory_order(tensors: list[Any]) -> list[Any]:
    """The tensors with their dimensions in the order of the first one's strides: flat wherever it is dense."""
    first = next(t for t in tensors if t is not None)
    order = sorted(range(first.dim()), key=lambda i: -first.stride(i))
    return [None if t is None else t.permute(order) for t in tensors]


def _stream(contiguous: torch.Tensor | None) -> Stream | None:
    return (
        None if contiguous is None else Stream(contiguous.data_ptr(), _SPELLED[contiguous.dtype], contiguous)
    )

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
from .overlap import memory, refuse_shared_memory
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
    job = _Job.of(base, finetuned, "finetuned", inputs, nonfinite, backend)
    items = [item._replace(out=torch.empty_like(item.versions[0])) for item in job.items]
    stats = job.run(items, rule)
    job.refuse_nonfinite(items, rule, stats)
    merged = {item.name: item.out for item in items}
    result: dict[str, Any] = {}
    for name, value in job.base.items():
        owner = job.tied.get(name, name)
        if owner in merged:
            result[name] = merged[owner]
        else:
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
    nonfinite="error" any non-finite element (which costs a second reading of everything).

    Returns what was counted, per tensor and in all: elements, agreed, nonfinite, consensus_ratio.
    """
    rule = Rule(scale, min_agreement)
    return _Job.of(base, finetuned, "finetuned", inputs, nonfinite, backend).run_in_place(rule)


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
    job = _Job.of(base, [tau], "tau", "task_vectors", nonfinite, backend)
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
    job = _Job.of(
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
        items.append(_Item(item.name, [None, *vectors], torch.empty_like(vectors[0], dtype=widest)))
    stats = job.run(items, rule)
    job.refuse_nonfinite(items, rule, stats)
    merged = {item.name: item.out for item in items}
    result = {n: merged[job.tied.get(n, n)] for n in job.base if job.tied.get(n, n) in merged}
    return result[_ALONE] if isinstance(models[0], torch.Tensor) else result


class _ExtraState(NamedTuple):
    """What a module says of itself beside its tensors: the base's, untouched, whatever it is."""

    value: Any


class _Item(NamedTuple):
    """All versions of one tensor: the base (None: zeros), the models'; out None: count only."""

    name: str
    versions: list[Any]
    out: torch.Tensor | None = None

    @property
    def result(self) -> torch.dtype:
        first = self.versions[0] if self.out is None else self.out
        return torch.float64 if first is None else first.dtype


class _Job:
    """One call: the tensors paired by name and checked, and how to run and describe them."""

    def __init__(
        self,
        base: dict[str, Any],
        models: list[dict[str, Any]],
        where: Callable[[int | None, str], str],
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        reference: str,
    ) -> None:
        self.base, self.where = base, where
        self.task_vectors, self.nonfinite = inputs == "task_vectors", nonfinite
        problems = mismatches(
            _forms(base), [_forms(m) for m in models], where, self.task_vectors, reference
        ) or list(_other_devices(base, models, where))
        if problems:
            raise InputError("; ".join(problems))
        self.tied = _tied(base, models, where)
        self.items = [
            _Item(name, [tensor, *(m[name] for m in models)])
            for name, tensor in base.items()
            if _is_float(tensor) and name not in self.tied
        ]
        devices = {str(item.versions[0].device) for item in self.items}
        self.merges = {device: backends.choose(backend, device)[1] for device in devices or {"cpu"}}

    @classmethod
    def of(
        cls,
        base: Model,
        finetuned: Sequence[Model],
        label: str,
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        reference: str = "base",
    ) -> _Job:
        require_choice("inputs", inputs, ("finetuned", "task_vectors"))
        require_choice("nonfinite", nonfinite, ("keep-base", "error"))

        def where(k: int | None, name: str) -> str:
            model = reference if k is None else label if label == "tau" else f"{label}[{k}]"
            return model if name == _ALONE else f"{model}[{name!r}]"

        named_base = _named(base, partial(where, None))
        models = _models(finetuned, label)
        for k, model in enumerate(models):
            if isinstance(model, torch.Tensor) != isinstance(base, torch.Tensor):
                raise TypeError(
                    f"{where(k, _ALONE)}: {type(model).__name__}, but {reference} is {type(base).__name__}"
                )
        named = [_named(model, partial(where, k)) for k, model in enumerate(models)]
        return cls(named_base, named, where, inputs, nonfinite, backend, reference)

    def run(self, items: list[_Item], rule: Rule) -> Stats:
        stats = Stats()
        for batch, names, finish in _batches(items, self.task_vectors):
            counts = self.merges[batch.device](batch, rule)
            stats.add([(n, s.numel) for n, s in zip(names, batch.segments, strict=True)], counts)
            finish()
            del batch, finish  # and with them the copies of scattered tensors, before the next are made
        return stats

    def _uses(self) -> Iterator[tuple[torch.Tensor, bool, str]]:
        """Every tensor that a merge in place uses, whether it is written, and what to call it."""
        for item in self.items:
            for k, tensor in enumerate(item.versions):
                yield tensor, k == 0, self.where(k - 1 if k else None, item.name)
        for name, tensor in self.base.items():
            # Integer tensors are the base's, untouched: a view of the weights as integers would not be.
            if isinstance(tensor, torch.Tensor) and not _is_float(tensor):
                yield tensor, False, self.where(None, name)

    def run_in_place(self, rule: Rule) -> Stats:
        refuse_shared_memory(self._uses())
        if self.nonfinite == "error":
            self.refuse_nonfinite(self.items, rule, self.run(self.items, rule))
        for item in self.items:
            # Autograd must notice what is written through addresses, too.
            if not item.versions[0].is_inference():
                torch.autograd.graph.increment_version(item.versions[0])
        return self.run([item._replace(out=item.versions[0]) for item in self.items], rule)

    def refuse_nonfinite(self, items: list[_Item], rule: Rule, stats: Stats) -> None:
        """With nonfinite="error", name the first non-finite element, if there is one."""
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


def _named(model: Model, where: Callable[[str], str]) -> dict[str, Any]:
    """Names to detached tensors; a module's extra state is kept as it is."""
    if isinstance(model, torch.Tensor):
        model = {_ALONE: model}
    elif isinstance(model, torch.nn.Module):
        model = model.state_dict()
    elif not isinstance(model, Mapping):
        raise TypeError(
            f"{where(_ALONE)}: {type(model).__name__}, expected a tensor, a mapping of tensors or a module"
        )
    named: dict[str, Any] = {}
    for name, value in model.items():
        if str(name).endswith("_extra_state"):
            named[name] = _ExtraState(value)
        elif isinstance(value, torch.Tensor):
            _require_plain(value, where(name))
            named[name] = value.detach()
        else:
            raise TypeError(f"{where(name)}: {type(value).__name__}, expected a tensor")
    return named


def _require_plain(tensor: torch.Tensor, where: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{where}: {kind} tensor, expected a dense one")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{where}: {type(tensor).__name__}, expected a plain torch.Tensor")
    if tensor.is_meta:
        raise InputError(f"{where}: a meta tensor holds no data, expected one that does")


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _SPELLED.get(value.dtype) in FLOAT_SIZES


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


def _tied(
    base: dict[str, Any], models: list[dict[str, Any]], where: Callable[[int | None, str], str]
) -> dict[str, str]:
    """Names whose memory has an earlier name already, and that name. The models must hold equal values for both."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in base.items():
        if not _is_float(tensor) or not tensor.numel():
            continue
        if (earlier := first.setdefault(memory(tensor), name)) == name:
            continue
        tied[name] = earlier
        for k, model in enumerate(models):
            here, there = model[name], model[earlier]
            if memory(here) != memory(there) and not _same_bits(here, there):
                raise InputError(
                    f"{where(k, name)}: differs from {earlier!r}, expected equal: {where(None, name)} is tied to it"
                )
    return tied


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [_flat(t.resolve_neg().contiguous()).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and torch.equal(*as_bytes)


def _batches(items: list[_Item], task_vectors: bool) -> Iterator[tuple[Batch, list[str], Callable[[], None]]]:
    """Batches, the names of their segments, and what to do when one is merged."""
    groups: dict[tuple[str, Signature], list[tuple[str, Segment]]] = {}
    scattered = []
    for item in items:
        flat = _in_memory_order([*item.versions, item.out])
        if all(t is None or (t.is_contiguous() and not t.is_neg()) for t in flat):
            groups.setdefault(_key(item, task_vectors), []).append((item.name, _segment(flat)))
        else:
            scattered.append(item)
    for (device, signature), members in groups.items():
        yield Batch(device, signature, [s for _, s in members]), [n for n, _ in members], lambda: None
    for item in scattered:  # one at a time, for their flat copies are extra memory
        *versions, out = _in_memory_order([*item.versions, item.out])
        copies = [None if t is None else t.resolve_neg().contiguous() for t in versions]
        merged = None if out is None else torch.empty_like(out, memory_format=torch.contiguous_format)

        def finish(out: torch.Tensor | None = out, merged: torch.Tensor | None = merged) -> None:
            if out is not None and merged is not None:
                with torch.inference_mode():
                    out.copy_(merged)

        device, signature = _key(item, task_vectors)
        batch = Batch(device, signature, [_segment([*copies, merged])])
        del copies, versions
        yield batch, [item.name], finish
        del batch, finish, merged


def _in_memory_order(tensors: list[Any]) -> list[Any]:
    """The tensors with their dimensions in the order of the first one's strides: flat wherever it is dense."""
    first = next(t for t in tensors if t is not None)
    order = sorted(range(first.dim()), key=lambda i: -first.stride(i))
    return [None if t is None else t.permute(order) for t in tensors]


def _key(item: _Item, task_vectors: bool) -> tuple[str, Signature]:
    models = item.versions[1:]
    signature = Signature(_SPELLED[item.result], tuple(_SPELLED[m.dtype] for m in models), task_vectors)
    return str(models[0].device), signature


def _segment(contiguous: list[Any]) -> Segment:
    base, *models, out = (
        None if t is None else Stream(t.data_ptr(), _SPELLED[t.dtype], _flat(t)) for t in contiguous
    )
    return Segment(contiguous[1].numel(), base, [m for m in models if m is not None], out)


def _flat(contiguous: torch.Tensor) -> torch.Tensor:
    # Not view(-1): a contiguous tensor's dimensions of size 1 may have any stride, and would keep it.
    return contiguous.as_strided((contiguous.numel(),), (1,))

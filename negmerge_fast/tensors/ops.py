"""The rule as operators of torch, for graphs: torch.compile, torch.export, CUDA graphs. Importing this registers them.

    torch.ops.negmerge.merge(base, finetuned, scale, min_agreement=1.0, task_vectors=False, backend="auto")
        -> (merged, counts)
    torch.ops.negmerge.merge_(base, finetuned, scale, min_agreement=1.0, task_vectors=False, backend="auto")
        -> counts

base: one or more dense tensors on one device, fp64, fp32, fp16 or bf16, of any shapes and strides. finetuned: those of the
first model in the order of base, then the second's, and so on. merged: like base, with the strides of torch.empty_like.
counts: int64[len(base), 2] on that device, agreed and non-finite elements, for which nobody has waited.

A non-finite element keeps the base's bits. A mistake is an InputError or a TypeError naming model and tensor, the same
where a graph is traced as where it runs; but only there is it seen that memory is shared (merge_), or has been freed.
merge has a gradient, which takes for constant what agrees, in backward mode only (torch.func.jvp sees zeros); merge_ writes
as under torch.no_grad. Ctrl-C is not held up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..backends import registry
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, require_choice
from ..core.rule import Rule
from .aliasing import plainly_apart, refuse_shared_memory
from .flatten import FLOATS, SPELLED, Item, batches, flat_item, plain, signatures

_ARGUMENTS = (
    'Tensor[] finetuned, float scale, float min_agreement=1.0, bool task_vectors=False, str backend="auto"'
)


@torch.library.custom_op(
    "negmerge::merge", mutates_args=(), schema=f"(Tensor[] base, {_ARGUMENTS}) -> (Tensor[], Tensor)"
)
def merge(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    models = _models(base, finetuned, scale, min_agreement, backend)
    items = _items(base, models)
    merged = [torch.empty_like(tensor) for tensor in base]
    items = [item._replace(out=out) for item, out in zip(items, merged, strict=True)]
    return merged, _run(items, Rule(scale, min_agreement), task_vectors, backend)


@torch.library.custom_op(
    "negmerge::merge_", mutates_args=("base",), schema=f"(Tensor(a!)[] base, {_ARGUMENTS}) -> Tensor"
)
def merge_(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    models = _models(base, finetuned, scale, min_agreement, backend)
    items = _items(base, models)
    flat = [item.segment for item in items if item.segment]
    if len(flat) < len(items) or not plainly_apart(flat, ()):
        refuse_shared_memory(_uses(items))
    items = [item._replace(out=item.versions[0]) for item in items]
    return _run(items, Rule(scale, min_agreement), task_vectors, backend)


@merge.register_fake
def _(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    _models(base, finetuned, scale, min_agreement, backend)
    return [torch.empty_like(tensor) for tensor in base], _no_counts(base)


@merge_.register_fake
def _(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    _models(base, finetuned, scale, min_agreement, backend)
    return _no_counts(base)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    base, finetuned, ctx.scale, ctx.min_agreement, ctx.task_vectors, _ = inputs
    ctx.tensors = len(base)
    ctx.save_for_backward(*base, *finetuned)


def _backward(ctx: Any, gradients: list[torch.Tensor | None], _: Any) -> tuple[Any, ...]:
    versions = [list(ctx.saved_tensors[i :: ctx.tensors]) for i in range(ctx.tensors)]
    found = [
        [None] * len(v) if g is None else _gradients(v, g, ctx.scale, ctx.min_agreement, ctx.task_vectors)
        for v, g in zip(versions, gradients, strict=True)
    ]
    of_models = [per_tensor[k] for k in range(1, len(versions[0])) for per_tensor in found]
    others = len(ctx.needs_input_grad) - 2  # torch leaves out arguments that have their defaults
    return [per_tensor[0] for per_tensor in found], of_models, *[None] * others


def _gradients(
    versions: list[torch.Tensor],
    gradient: torch.Tensor,
    scale: float,
    min_agreement: float,
    task_vectors: bool,
) -> list[torch.Tensor]:
    """What an element of out = b - scale · mean(d) hands to b and to each x_k; where it is the base's, all goes to b."""
    base, *models = versions
    wide = torch.float64 if torch.float64 in [t.dtype for t in versions] else torch.float32
    b, g = base.to(wide), gradient.to(wide)
    differences = [x.to(wide) if task_vectors else x.to(wide) - b for x in models]
    required = Rule(1.0, min_agreement).required(len(models))
    above = sum((d > 0).to(torch.int32) for d in differences) >= required
    below = sum((d < 0).to(torch.int32) for d in differences) >= required
    chosen = [((d > 0) & above) | ((d < 0) & below) for d in differences]
    number = torch.stack(chosen).sum(0).clamp(min=1)  # where none is chosen, nothing is handed on
    mean = torch.stack([d.where(c, 0.0) for d, c in zip(differences, chosen, strict=True)]).sum(0) / number
    finite = b.isfinite() & (b - scale * mean).to(base.dtype).isfinite()
    for d in differences:
        finite = finite & d.isfinite()
    agree = (above | below) & finite
    share = torch.where(agree, -scale * g / number, 0.0)
    of_models = [torch.where(c, share, 0.0).to(x.dtype) for c, x in zip(chosen, models, strict=True)]
    of_base = g if task_vectors else torch.where(agree, g + scale * g, g)
    return [of_base.to(base.dtype), *of_models]


merge.register_autograd(_backward, setup_context=_keep_for_backward)


def _no_counts(base: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty(len(base), 2, dtype=torch.int64, device=base[0].device)


def _models(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float,
    backend: str,
) -> list[list[torch.Tensor]]:
    """The models, each a list like base, after everything that can be checked without memory: for real and fake."""
    Rule(scale, min_agreement)
    require_choice("backend", backend, ("auto", *registry.NAMES))
    if not base:
        raise InputError("base: no tensors, expected at least one")
    if not finetuned:
        raise InputError("finetuned: no models, expected at least one")
    if len(finetuned) % len(base):
        raise InputError(
            f"finetuned: {len(finetuned)} tensors, expected a multiple of the {len(base)} of base, all of a model after another"
        )
    models = [finetuned[first : first + len(base)] for first in range(0, len(finetuned), len(base))]
    for i, tensor in enumerate(base):
        _require_mergeable(tensor, f"base[{i}]")
        if tensor.device != base[0].device:
            raise InputError(f"base[{i}]: on {tensor.device}, expected {base[0].device} like base[0]")
        for k, model in enumerate(models):
            where = f"finetuned[{k}][{i}]"
            _require_mergeable(model[i], where)
            if model[i].shape != tensor.shape:
                found, expected = tuple(model[i].shape), tuple(tensor.shape)
                raise InputError(f"{where}: shape {found}, expected {expected} like base[{i}]")
            if model[i].device != tensor.device:
                raise InputError(f"{where}: on {model[i].device}, expected {tensor.device} like base[{i}]")
    return models


def _require_mergeable(tensor: torch.Tensor, where: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{where}: {kind} tensor, expected a dense one")
    if tensor.dtype not in FLOATS:
        found = SPELLED.get(tensor.dtype, tensor.dtype)
        raise InputError(
            f"{where}: {found}, expected a floating-point type to merge, of {', '.join(FLOAT_SIZES)}"
        )


def _items(base: list[torch.Tensor], models: list[list[torch.Tensor]]) -> list[Item]:
    """All versions of each tensor; its name is its place in base."""
    names = [str(i) for i in range(len(base))]
    named = [dict(zip(names, model, strict=True)) for model in (base, *models)]
    return [flat_item(name, named) or _scattered(name, [model[name] for model in named]) for name in names]


def _scattered(name: str, versions: list[torch.Tensor]) -> Item:
    places = _places(name, len(versions))
    return Item(name, [plain(tensor, where) for tensor, where in zip(versions, places, strict=True)])


def _places(name: str, versions: int) -> list[str]:
    return [f"base[{name}]", *(f"finetuned[{k}][{name}]" for k in range(versions - 1))]


def _uses(items: list[Item]) -> Iterator[tuple[torch.Tensor, bool, str]]:
    """Every tensor that a merge in place uses, whether it is written, and what to call it."""
    for item in items:
        for k, where in enumerate(_places(item.name, len(item.versions))):
            yield item.versions[k], k == 0, where


def _run(items: list[Item], rule: Rule, task_vectors: bool, backend: str) -> torch.Tensor:
    """Merge all items, of one device, and return their counts in their order."""
    device = items[0].versions[0].device
    # For all that will be asked for, so that nothing is written if a part of it cannot be done.
    _, merge_batch = registry.choose(backend, str(device), rule, signatures(items, device, task_vectors))
    rows: dict[str, torch.Tensor] = {}
    for batch, names, finish in batches(items, task_vectors):
        counts = merge_batch(batch, rule)
        if not isinstance(counts, torch.Tensor):
            counts = torch.from_numpy(counts)
        finish()
        if len(names) == len(items):  # one batch is in order
            return counts
        rows.update(zip(names, counts.unbind(), strict=True))
        del batch, finish  # and with them the copies of scattered tensors, before the next are made
    # Not by an index, which would have to be copied to the device.
    return torch.stack([rows[item.name] for item in items])

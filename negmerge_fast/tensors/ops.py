"""The rule as operators of torch, for torch.compile, torch.export and CUDA graphs. Importing the module registers them.

The operators are torch.ops.negmerge.merge and torch.ops.negmerge.merge_. A mistake raises InputError or TypeError and
names model and tensor, both where a graph is traced and where it runs. Shared memory (merge_) and freed memory are
found only where it runs. Elements that are not finite are told of on the CPU, where counts need not be waited for. Ctrl-C
is not held up.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from ..backends import registry
from ..backends.pytorch import DTYPE_NAMES, FLOAT_NAMES, rounded
from ..core.batch import COUNTED
from ..core.errors import InputError, require_choice
from ..core.rule import Rule
from .call import misfits, not_mergeable, other_device, pair, refuse_aliasing, run_batches
from .counts import LEFT, tell_of_nonfinite
from .flatten import Item, flat_items, require_dense

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
    """Merge lists of tensors: torch.ops.negmerge.merge.

    The operator has a gradient, in backward mode only (torch.func.jvp sees zeros). The gradient treats the set of agreeing
    elements as constant.

    Args:
        base: One or more dense tensors on one device: fp64, fp32, fp16 or bf16, any shapes and strides.
        finetuned: The tensors of the first model in the order of base, then those of the second, and so on.
        scale: λ, any finite number.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign.
        task_vectors: Whether finetuned holds differences and not weights.
        backend: "auto", "cuda", "triton", "cpu" or "torch".

    Returns:
        merged, tensors like base with the strides of torch.empty_like; and counts, int64[len(base), 3] on the same device: agreed,
            non-finite and vetoed-by-zero elements of each tensor, not waited for. A non-finite element keeps the base's bits.

    Raises:
        InputError: If tensors do not fit each other or an option is out of range.
        TypeError: If an argument is of the wrong kind.
    """
    items = _paired(_named(base, finetuned, scale, min_agreement, backend))
    merged = [torch.empty_like(tensor) for tensor in base]
    items = [item._replace(out=out) for item, out in zip(items, merged, strict=True)]
    return merged, _counts(items, Rule(scale, min_agreement), task_vectors, backend)


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
    """Merge lists of tensors in place: torch.ops.negmerge.merge_.

    It writes to base as under torch.no_grad. The arguments are those of merge.

    Args:
        base: As of merge; written.
        finetuned: As of merge.
        scale: As of merge.
        min_agreement: As of merge.
        task_vectors: As of merge.
        backend: As of merge.

    Returns:
        counts, int64[len(base), 3] on the device of base: agreed, non-finite and vetoed-by-zero elements of each tensor.

    Raises:
        InputError: As merge; also if memory is shared with base.
        TypeError: If an argument is of the wrong kind.
    """
    items = _paired(_named(base, finetuned, scale, min_agreement, backend))
    refuse_aliasing(items, {}, _where)
    items = [item._replace(out=item.versions[0]) for item in items]
    return _counts(items, Rule(scale, min_agreement), task_vectors, backend)


@merge.register_fake
def _(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    _require_mergeable(_named(base, finetuned, scale, min_agreement, backend))
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
    _require_mergeable(_named(base, finetuned, scale, min_agreement, backend))
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
    other_arguments = len(ctx.needs_input_grad) - 2  # torch leaves out arguments that have their defaults
    return [per_tensor[0] for per_tensor in found], of_models, *[None] * other_arguments


def _gradients(
    versions: list[torch.Tensor],
    gradient: torch.Tensor,
    scale: float,
    min_agreement: float,
    task_vectors: bool,
) -> list[torch.Tensor]:
    """Gradients of out = b - scale · mean(d) for b and each x_k. Where the rule keeps the base, all of it goes to b."""
    base, *models = versions
    wide = torch.float64 if torch.float64 in [t.dtype for t in versions] else torch.float32
    b, g = base.to(wide), gradient.to(wide)
    # Rounding the base to the type of a model counts as the identity.
    differences = [
        x.to(wide) if task_vectors else x.to(wide) - rounded(base, x.dtype).to(wide) for x in models
    ]
    required = Rule(1.0, min_agreement).required(len(models))
    positive = sum((d > 0).to(torch.int32) for d in differences) >= required
    negative = sum((d < 0).to(torch.int32) for d in differences) >= required
    chosen = [((d > 0) & positive) | ((d < 0) & negative) for d in differences]
    number = torch.stack(chosen).sum(0).clamp(min=1)  # where no model is chosen, the gradient is 0
    mean = torch.stack([d.where(c, 0.0) for d, c in zip(differences, chosen, strict=True)]).sum(0) / number
    finite = b.isfinite() & (b - scale * mean).to(base.dtype).isfinite()
    for d in differences:
        finite = finite & d.isfinite()
    agree = (positive | negative) & finite
    per_model = torch.where(agree, -scale * g / number, 0.0)
    of_models = [torch.where(c, per_model, 0.0).to(x.dtype) for c, x in zip(chosen, models, strict=True)]
    of_base = g if task_vectors else torch.where(agree, g + scale * g, g)
    return [of_base.to(base.dtype), *of_models]


merge.register_autograd(_backward, setup_context=_keep_for_backward)


def _no_counts(base: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty(len(base), len(COUNTED), dtype=torch.int64, device=base[0].device)


def _where(k: int | None, name: str) -> str:
    return f"base[{name}]" if k is None else f"finetuned[{k}][{name}]"


def _named(
    base: list[torch.Tensor],
    finetuned: list[torch.Tensor],
    scale: float,
    min_agreement: float,
    backend: str,
) -> list[dict[str, torch.Tensor]]:
    """The base and the models, each tensor named by its position in base."""
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
    names = [str(i) for i in range(len(base))]
    models = [finetuned[first : first + len(base)] for first in range(0, len(finetuned), len(base))]
    return [dict(zip(names, model, strict=True)) for model in (base, *models)]


def _paired(named: list[dict[str, torch.Tensor]]) -> list[Item]:
    flat = flat_items(named)
    _require_mergeable(named, flat)
    items, _ = pair(named, flat, _where, "base")
    return list(items.values())


def _require_mergeable(named: list[dict[str, torch.Tensor]], flat: Collection[str] = ()) -> None:
    """Check everything that needs no memory, for real and fake tensors alike. Flat tensors are known to fit."""
    base, *models = named
    to_check = [name for name in base if name not in flat]
    for name in to_check:
        for k, model in enumerate(named):
            _require_float(model[name], _where(k - 1 if k else None, name))
    for name, tensor in base.items():
        if problem := other_device(tensor, base["0"], _where(None, "0")):
            raise InputError(f"{_where(None, name)}: {problem}")
    for name in to_check:
        versions = [{name: model[name]} for model in models]
        if problems := misfits({name: base[name]}, versions, _where, _where(None, name)):
            raise InputError(problems[0])


def _require_float(tensor: torch.Tensor, where: str) -> None:
    require_dense(tensor, where)
    if tensor.dtype not in FLOAT_NAMES:
        raise not_mergeable(where, DTYPE_NAMES.get(tensor.dtype, tensor.dtype))


def _counts(items: list[Item], rule: Rule, task_vectors: bool, backend: str) -> torch.Tensor:
    """Merge items of one device. Returns their counts, in the order of the items, without waiting for the device."""
    rows: dict[str, torch.Tensor] = {}
    results = run_batches(items, rule, task_vectors, backend)
    tell_of_nonfinite(results, [item.name for item in items], LEFT, stacklevel=2)
    for segments, found in results:
        counts = found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
        if len(segments) == len(items):  # a single batch has the order of the items
            return counts
        rows.update(zip([name for name, _ in segments], counts.unbind(), strict=True))
    # Rows are stacked: an index would have to be copied to the device.
    return torch.stack([rows[item.name] for item in items])

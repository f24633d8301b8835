"""merge and merge_ while torch.compile or torch.export traces a graph.

These functions are traced line by line. They see neither addresses nor values, so they do not look for shared memory.
Their errors are reported by the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import is_extra_state
from ..core.schema import mismatches
from ..core.stats import Stats
from ..core.unmergeable import may_have_factors
from . import ops  # noqa: F401  registers torch.ops.negmerge
from .call import nothing_to_merge, require_options
from .flatten import specs
from .names import SINGLE, Label, label_of, list_models, name_tensors, require_one_kind


def require_plain(include: Any, exclude: Any, rename: Any, scale: Any, method: Any, weights: Any) -> None:
    """Raise InputError for options that choose or change names, and for all but NegMerge with one λ."""
    for name, value in (("include", include), ("exclude", exclude), ("rename", rename)):
        if value:
            raise InputError(f"{name}: {value!r}, expected none in a graph: pass what is to be merged")
    if isinstance(scale, (dict, list, tuple)):
        raise InputError(f"scale: {scale!r}, expected a number in a graph")
    if not isinstance(method, str) or method != "negmerge":
        raise InputError(f"method: {method}, expected negmerge in a graph")
    if weights is not None:
        raise InputError("weights: expected none in a graph")


def merge_in_graph(
    base: Any,
    finetuned: Sequence[Any],
    scale: Any,
    min_agreement: float,
    inputs: str,
    nonfinite: str,
    backend: str,
) -> Any:
    """merge in a graph. Tied weights become separate tensors."""
    named, models, floats = _pair(base, finetuned, inputs, nonfinite)
    tensors, _ = torch.ops.negmerge.merge(
        [named[name] for name in floats],
        [model[name] for model in models for name in floats],
        scale,
        min_agreement,
        inputs == "task_vectors",
        backend,
    )
    merged = {**named, **dict(zip(floats, tensors, strict=True))}
    for name, value in named.items():
        if name not in floats and isinstance(value, torch.Tensor):
            merged[name] = value.clone()
    return merged[SINGLE] if isinstance(base, torch.Tensor) else merged


def merge_in_graph_(
    base: Any,
    finetuned: Sequence[Any],
    scale: Any,
    min_agreement: float,
    inputs: str,
    nonfinite: str,
    backend: str,
) -> Stats:
    """merge_ in a graph. The numbers of the result can be read only after the graph has run."""
    named, models, floats = _pair(base, finetuned, inputs, nonfinite)
    stats = Stats()
    counts = torch.ops.negmerge.merge_(
        [named[name] for name in floats],
        [model[name] for model in models for name in floats],
        scale,
        min_agreement,
        inputs == "task_vectors",
        backend,
    )
    stats.add([(name, named[name].numel()) for name in floats], counts)
    return stats


def _pair(
    base: Any, finetuned: Sequence[Any], inputs: str, nonfinite: str
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The base and the models by name, and the names of the tensors to merge. The operators check devices."""
    require_options(inputs, nonfinite)
    if nonfinite == "error":
        raise InputError("nonfinite: 'error', expected 'keep-base' in a graph, which looks at no numbers")
    where = label_of("finetuned")
    listed = list_models(finetuned, "finetuned", arrays=False)
    require_one_kind(base, listed, where, arrays=False)
    named, *models = [
        _detached(name_tensors(model, where(k, SINGLE), arrays=False), k, where)
        for k, model in zip([None, *range(len(listed))], [base, *listed], strict=True)
    ]
    for k, model in enumerate([named, *models]):
        if may_have_factors(model):
            raise InputError(
                f"{where(k - 1 if k else None, SINGLE)}: an adapter, expected none in a graph: merge adapters outside"
            )
    base_specs, *model_specs = [
        specs({name: value for name, value in model.items() if not is_extra_state(name)})
        for model in (named, *models)
    ]
    if problems := mismatches(base_specs, model_specs, where):
        raise InputError("; ".join(problems))
    floats = [name for name, spec in base_specs.items() if spec.dtype in FLOAT_SIZES]
    if not floats:
        raise nothing_to_merge(where(None, SINGLE), named)
    return named, models, floats


def _detached(named: dict[str, Any], k: int | None, where: Label) -> dict[str, Any]:
    """The tensors of a model, detached; extra state as it is."""
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) and not is_extra_state(name):
            raise TypeError(f"{where(k, name)}: {type(value).__name__}, expected a tensor")
    return {n: value.detach() if isinstance(value, torch.Tensor) else value for n, value in named.items()}

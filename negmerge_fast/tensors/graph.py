"""merge and merge_ while a graph is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, require_choice
from ..core.schema import mismatches
from ..core.stats import Stats
from . import ops  # noqa: F401  registers torch.ops.negmerge
from .flatten import specs

# tensors.merge and merge_ while a graph is traced. What follows is traced with them, line by line, and sees neither
# addresses nor numbers: memory that is shared is not looked for, and what is refused is reported by the compiler.


def merge_in_graph(
    base: Any,
    finetuned: Sequence[Any],
    scale: float,
    min_agreement: float,
    inputs: str,
    nonfinite: str,
    backend: str,
) -> Any:
    """tensors.merge for a graph; tied weights become tensors of their own."""
    named, models, floats = _for_graph(base, finetuned, inputs, nonfinite)
    merged = dict(named)
    if floats:
        tensors, _ = torch.ops.negmerge.merge(
            [named[name] for name in floats],
            [model[name] for model in models for name in floats],
            scale,
            min_agreement,
            inputs == "task_vectors",
            backend,
        )
        merged.update(zip(floats, tensors, strict=True))
    for name, value in named.items():
        if name not in floats and isinstance(value, torch.Tensor):
            merged[name] = value.clone()
    return merged[""] if isinstance(base, torch.Tensor) else merged


def merge_in_graph_(
    base: Any,
    finetuned: Sequence[Any],
    scale: float,
    min_agreement: float,
    inputs: str,
    nonfinite: str,
    backend: str,
) -> Stats:
    """tensors.merge_ for a graph. The numbers of what it returns are for after the graph."""
    named, models, floats = _for_graph(base, finetuned, inputs, nonfinite)
    stats = Stats()
    if floats:
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


def _for_graph(
    base: Any, finetuned: Sequence[Any], inputs: str, nonfinite: str
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The base and the models by name, checked but for devices, and the names of what is merged."""
    require_choice("inputs", inputs, ("finetuned", "task_vectors"))
    require_choice("nonfinite", nonfinite, ("keep-base", "error"))
    if nonfinite == "error":
        raise InputError("nonfinite: 'error', expected 'keep-base' in a graph, which looks at no numbers")
    if isinstance(finetuned, (torch.Tensor, Mapping, torch.nn.Module)):
        raise TypeError(f"finetuned: {type(finetuned).__name__}, expected a list of models")
    if not (listed := list(finetuned)):
        raise InputError("finetuned: no models, expected at least one")

    def where(k: int | None, name: str) -> str:
        model = "base" if k is None else f"finetuned[{k}]"
        return f"{model}[{name!r}]" if name else model

    for k, model in enumerate(listed):
        if isinstance(model, torch.Tensor) != isinstance(base, torch.Tensor):
            raise TypeError(f"{where(k, '')}: {type(model).__name__}, but base is {type(base).__name__}")
    named, *models = [
        _named(model, where(k, ""))
        for k, model in zip([None, *range(len(listed))], [base, *listed], strict=True)
    ]
    of_base, *of_models = [specs(model) for model in (named, *models)]
    if problems := mismatches(of_base, of_models, where, inputs == "task_vectors"):
        raise InputError("; ".join(problems))
    return named, models, [name for name, spec in of_base.items() if spec.dtype in FLOAT_SIZES]


def _named(model: Any, where: str) -> dict[str, Any]:
    if isinstance(model, torch.Tensor):
        return {"": model.detach()}
    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    if not isinstance(model, Mapping):
        raise TypeError(
            f"{where}: {type(model).__name__}, expected a tensor, a mapping of tensors or a module"
        )
    named: dict[str, Any] = {}
    for name, value in model.items():
        if isinstance(value, torch.Tensor):
            named[name] = value.detach()
        elif name.endswith("_extra_state"):  # what a module says of itself, untouched
            named[name] = value
        else:
            raise TypeError(f"{where}[{name!r}]: {type(value).__name__}, expected a tensor")
    return named

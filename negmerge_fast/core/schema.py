"""Whether the versions of a model fit each other: names, shapes and kinds of type. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from .dtypes import FLOAT_SIZES, INTEGER_DTYPES

# Mismatches that are told; of two models that have nothing in common there are as many as tensors.
MAX_REPORTED = 20


class TensorSpec(NamedTuple):
    """dtype: spelled as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]


def mismatches(
    base: Mapping[str, TensorSpec],
    models: Sequence[Mapping[str, TensorSpec]],
    where: Callable[[int | None, str], str],
    task_vectors: bool = False,
    reference: str = "base",
) -> list[str]:
    """What keeps the models from being merged into the base, one phrase each; empty if nothing does.

    Of many, the first ones, and how many more there are.

    where: names a tensor of the base (None) or of a model (its number from 0); reference: what to call the base. Integer and bool
    tensors are the base's, untouched, so task vectors need not have them.
    """
    found = _mismatches(base, models, task_vectors, reference)
    messages = [f"{where(k, name)}: {problem}" for k, name, problem in islice(found, MAX_REPORTED)]
    if more := sum(1 for _ in found):
        messages.append(f"and {more:,} more")
    return messages


def _mismatches(
    base: Mapping[str, TensorSpec],
    models: Sequence[Mapping[str, TensorSpec]],
    task_vectors: bool,
    reference: str,
) -> Iterator[tuple[int | None, str, str]]:
    for name, spec in base.items():
        if spec.dtype not in FLOAT_SIZES and spec.dtype not in INTEGER_DTYPES:
            yield None, name, f"dtype {spec.dtype}, expected {', '.join(FLOAT_SIZES)} or an integer type"
    for k, model in enumerate(models):
        for name, spec in base.items():
            if name in model:
                if problem := _difference(spec, model[name], reference):
                    yield k, name, problem
            elif spec.dtype in FLOAT_SIZES or not task_vectors:
                yield k, name, f"missing, expected {spec.dtype} {spec.shape} like {reference}"
        for name, spec in model.items():
            if name not in base and not (task_vectors and spec.dtype in INTEGER_DTYPES):
                yield k, name, f"not in {reference}"


def _difference(base: TensorSpec, model: TensorSpec, reference: str) -> str | None:
    if model.shape != base.shape:
        return f"shape {model.shape}, expected {base.shape} like {reference}"
    if base.dtype in FLOAT_SIZES and model.dtype not in FLOAT_SIZES:
        return f"dtype {model.dtype}, expected one of {', '.join(FLOAT_SIZES)} ({reference} has {base.dtype})"
    if base.dtype in INTEGER_DTYPES and model.dtype not in INTEGER_DTYPES:
        return f"dtype {model.dtype}, expected an integer type ({reference} has {base.dtype})"
    return None

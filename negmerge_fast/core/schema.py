"""Comparison of a base and its models: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from .dtypes import FLOAT_SIZES, INTEGER_DTYPES

# Mismatches in one error: two models with nothing in common have as many as they have tensors.
MAX_REPORTED = 20
# Of one model, tensors that are missing, and those that the base lacks.
_MAX_OF_ONE_KIND = 3


class TensorSpec(NamedTuple):
    """The dtype, as safetensors spells it, and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def mismatches(
    base: Mapping[str, TensorSpec],
    models: Sequence[Mapping[str, TensorSpec]],
    where: Callable[[int | None, str], str],
    reference: str = "base",
) -> list[str]:
    """Find why the models cannot be merged into the base.

    Integer and bool tensors are copied from the base, so models need not have them, and may have more.

    Args:
        base: The specs of the base's tensors.
        models: The specs of each model's tensors.
        where: Names a tensor, of the base (None) or of a model (its number from 0).
        reference: What messages call the base.

    Returns:
        One phrase for each mismatch, at most MAX_REPORTED and then how many more there are; empty if all fits.
    """
    found = _mismatches(base, models, reference)
    messages = [f"{where(k, name)}: {problem}" for k, name, problem in islice(found, MAX_REPORTED)]
    if more := sum(1 for _ in found):
        messages.append(f"and {more:,} more")
    return messages


def _mismatches(
    base: Mapping[str, TensorSpec],
    models: Sequence[Mapping[str, TensorSpec]],
    reference: str,
) -> Iterator[tuple[int | None, str, str]]:
    for name, spec in base.items():
        if spec.dtype not in FLOAT_SIZES and spec.dtype not in INTEGER_DTYPES:
            yield None, name, f"dtype {spec.dtype}, expected {', '.join(FLOAT_SIZES)} or an integer type"
    for k, model in enumerate(models):
        for name, spec in base.items():
            if name in model and (problem := _difference(spec, model[name], reference)):
                yield k, name, problem
        if model.keys() == base.keys():
            continue
        missing = [n for n, s in base.items() if n not in model and s.dtype not in INTEGER_DTYPES]
        surplus = [n for n, s in model.items() if n not in base and s.dtype not in INTEGER_DTYPES]
        for name, more in _some(missing):
            yield k, name, f"missing, expected {base[name].dtype} {base[name].shape} like {reference}{more}"
        for name, more in _some(surplus):
            yield k, name, f"not in {reference}{more}"


def _some(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield a few of some names, and after the last of them how many more there are."""
    few = names[: _MAX_OF_ONE_KIND if len(names) > _MAX_OF_ONE_KIND + 1 else None]
    for name in few[:-1]:
        yield name, ""
    for name in few[-1:]:
        yield name, f" (and {len(names) - len(few):,} more)" if len(names) > len(few) else ""


def _difference(base: TensorSpec, model: TensorSpec, reference: str) -> str | None:
    if model.shape != base.shape:
        return f"shape {model.shape}, expected {base.shape} like {reference}"
    if base.dtype in FLOAT_SIZES and model.dtype not in FLOAT_SIZES:
        return f"dtype {model.dtype}, expected one of {', '.join(FLOAT_SIZES)} ({reference} has {base.dtype})"
    if base.dtype in INTEGER_DTYPES and model.dtype not in INTEGER_DTYPES:
        return f"dtype {model.dtype}, expected an integer type ({reference} has {base.dtype})"
    return None

"""Checks of what names and numbers say: quantized weights, adapters, integers that differ, variances below zero."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch

from ..backends.pytorch import DTYPE_NAMES
from ..core import unmergeable
from ..core.dtypes import INTEGER_DTYPES
from ..core.errors import InputError
from ..core.schema import TensorSpec
from .aliasing import memory
from .names import Label

# Types of tensors that are quantized weights: of bitsandbytes, and of torchao and others that say so.
_QUANTIZED_TYPES = ("Params4bit", "Int8Params", "Quant")


def quantized_type(value: object) -> str | None:
    """The type of a tensor, if it is one of quantized weights."""
    if type(value) in (torch.Tensor, torch.nn.Parameter) or not isinstance(value, torch.Tensor):
        return None
    names = [cls.__name__ for cls in type(value).__mro__]
    return type(value).__name__ if any(kind in n for kind in _QUANTIZED_TYPES for n in names) else None


def holds_integers(named: Mapping[str, Any]) -> bool:
    """Whether some tensor has integers, apart from flags and single numbers."""
    return any(_is_integer(value) and value.dim() for value in named.values())


def _is_integer(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and DTYPE_NAMES.get(value.dtype, "") in INTEGER_DTYPES - {"BOOL"}


def refuse_quantized(
    named: Mapping[str, Any], specs: Mapping[str, TensorSpec], label: Callable[[str], str]
) -> None:
    """Raise InputError for the first tensor that is a part of quantized weights."""
    for name, value in named.items():
        kind = quantized_type(value)
        if kind or "_packed_params" in str(name):  # of torch's quantized layers: these are no tensors
            kind = kind or type(value).__name__
            raise InputError(f"{label(name)}: {kind}: quantized weights, expected floating-point weights")
    unmergeable.refuse_packed(specs, label)


def refuse_different_integers(named: Sequence[Mapping[str, Any]], where: Label) -> None:
    """Raise InputError for integers that training changed: they are weights in a form of their own, and are not merged.

    One comparison is waited for on each device.
    """
    base, *models = named
    compared: dict[torch.device, list[tuple[int, str, torch.Tensor]]] = {}
    for name, tensor in base.items():
        if not _is_integer(tensor) or unmergeable.is_counter(name, _spec(tensor)):
            continue
        for k, model in enumerate(models):
            other = model.get(name)
            if _is_integer(other) and other.shape == tensor.shape and memory(other) != memory(tensor):
                differs = (tensor.long() != other.to(tensor.device).long()).any()
                compared.setdefault(tensor.device, []).append((k, name, differs))
    for found in compared.values():
        for (k, name, _), differs in zip(found, torch.stack([d for *_, d in found]).tolist(), strict=True):
            if differs:
                raise InputError(
                    f"{where(k, name)}: {_spec(base[name]).dtype}, differs from {where(None, name)}, expected equal "
                    f"integers: they are not merged (exclude={'^' + re.escape(name) + '$'!r} keeps those of base)"
                )


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def below_zero(named: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the variances in which there are elements below zero. One comparison is waited for on each device."""
    found = {name: t for name, t in named.items() if unmergeable.is_variance(str(name)) and t.numel()}
    names: list[str] = []
    for device in dict.fromkeys(t.device for t in found.values()):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            continue  # nothing can be waited for
        held = [(name, t) for name, t in found.items() if t.device == device]
        flags = torch.stack([(t < 0).any() for _, t in held]).tolist()
        names += [name for (name, _), flag in zip(held, flags, strict=True) if flag]
    return names

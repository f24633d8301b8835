"""Modules: what their state dicts say and do not say, and whether what is merged in place is their memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from copy import copy
from itertools import accumulate, chain
from typing import Any

import torch

from ..backends.pytorch import FLOAT_NAMES
from ..core.errors import InputError
from ..core.unmergeable import quantization_of
from . import peft
from .aliasing import span
from .checks import quantized_type
from .flatten import Item
from .names import Label, viewed

# Children that are the model itself, in a wrapper of DDP, FSDP 1 or torch.compile.
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")
# Attributes of transformers' models whose weights are quantized.
_QUANTIZED = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")


def refuse_unmergeable(module: torch.nn.Module, where: str) -> None:
    """Raise InputError for a model of quantized weights or of adapters, as far as the module itself says so."""
    for part in _unwrapped(module):
        if reason := _quantization(part):
            raise InputError(
                f"{where}: {type(part).__name__} with {reason}: quantized weights, expected floating-point weights"
            )
        if _has_adapters(part) and not peft.is_wrapped(part):
            raise InputError(
                f"{where}: {type(part).__name__} with adapters (peft_config) that are not in its layers, "
                "expected LoRA adapters or whole weights"
            )


def _unwrapped(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module, and those that it only wraps."""
    yield module
    for name in (*_WRAPPED, *peft.wrapped(module)):
        if isinstance(child := getattr(module, name, None), torch.nn.Module):
            yield from _unwrapped(child)


def _quantization(module: torch.nn.Module) -> str | None:
    """What says that a module's weights are quantized, in the words of transformers."""
    config = _plain(getattr(module, "config", None))
    if isinstance(config, dict):
        named = {name: _plain(value) for name, value in config.items() if isinstance(name, str)}
        if found := quantization_of(named):
            return found
    if getattr(module, "hf_quantizer", None) is not None:
        return "hf_quantizer"
    return next((name for name in _QUANTIZED if getattr(module, name, False) is True), None)


def _plain(config: Any) -> Any:
    """What stands in a configuration that may be an object."""
    if isinstance(config, dict) or not hasattr(config, "__dict__"):
        return config
    return {name: getattr(value, "value", value) for name, value in vars(config).items()}


def _has_adapters(module: torch.nn.Module) -> bool:
    if any(cls.__name__ in ("PeftModel", "PeftMixedModel") for cls in type(module).__mro__):
        return True
    # A model whose adapters were merged into it keeps the configuration. Only with adapters is one of them active.
    active = getattr(module, "active_adapter", None)
    return bool(getattr(module, "peft_config", None)) and active is not None and not callable(active)


def quantized_parameter(module: torch.nn.Module, names: Container[str]) -> tuple[str, str] | None:
    """The name and the type of the first of a module's parameters or buffers whose type is of quantized weights."""
    named = chain(module.named_parameters(), module.named_buffers())
    quantized = ((peft.plain_name(module, name), kind) for name, t in named if (kind := quantized_type(t)))
    return next(((name, kind) for name, kind in quantized if name is not None and name in names), None)


def refuse_copies(
    module: torch.nn.Module,
    items: Iterable[Item],
    others: Mapping[str, torch.Tensor | None],
    where: Label,
) -> list[str]:
    """Raise InputError for the first tensor of a module's state dict that is to be written and is not the module's memory.

    Args:
        module: The module.
        items: What is to be written of its state dict.
        others: The rest of its state dict, by name; None for what has no memory to compare.
        where: Labels a tensor in errors.

    Returns:
        Names of the module's floating-point parameters that are not in its state dict.
    """
    held = [
        t
        for part in module.modules()
        for p in part._parameters.values()
        if p is not None and (t := _in_memory(p)) is not None
    ]
    addresses = {t.data_ptr() for t in held}
    written = {_address(item): item for item in items}
    if outside := written.keys() - addresses:  # buffers; views; what has no elements
        buffers = [t for t in map(_in_memory, module.buffers()) if t is not None]
        spans = _Spans([*held, *buffers])
        for item in [item for address, item in written.items() if address in outside]:
            if item.versions[0].numel() and not spans.contain(item.versions[0]):
                raise InputError(
                    f"{where(None, item.name)}: a copy that the module's state dict gives (by a hook, or FSDP 1), "
                    "expected the memory of a parameter or buffer: merge the state dict and load the result"
                )
    if not (addresses := addresses - written.keys()):
        return []
    shown = [item.versions[0] for item in written.values()] + [t for t in others.values() if t is not None]
    spans = _Spans(shown)
    return [
        name
        for name, parameter in module.named_parameters()
        if (t := _in_memory(parameter)) is not None
        and t.data_ptr() in addresses
        and t.numel()
        and name not in others
        and not spans.contain(t)
        and peft.plain_name(module, name) is not None
    ]


def _in_memory(tensor: torch.Tensor) -> torch.Tensor | None:
    """A parameter or buffer of a floating-point type where it lies; None if it has no memory of its own."""
    if type(tensor) is torch.nn.Parameter and tensor.dtype in FLOAT_NAMES and tensor.layout is torch.strided:
        return None if tensor.is_meta else tensor
    return viewed(tensor)


def _address(item: Item) -> int:
    if item.segment and item.segment.base:
        return item.segment.base.address
    address: int = item.versions[0].data_ptr()
    return address


class _Spans:
    """Spans of memory, to ask whether a tensor lies in one of them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = sorted(span(t) for t in tensors if t.numel())
        self._starts = [start for start, _ in spans]
        self._ends = list(accumulate((end for _, end in spans), max))

    def contain(self, tensor: torch.Tensor) -> bool:
        start, end = span(tensor)
        before = bisect_right(self._starts, start)
        return before > 0 and end <= self._ends[before - 1]


def like_state_dict(result: dict[str, Any], state: object) -> dict[str, Any]:
    """A result of the kind of a state dict: an OrderedDict where that is one, with what it says of its modules (_metadata)."""
    metadata = getattr(state, "_metadata", None)
    if metadata is None and not isinstance(state, OrderedDict):
        return result
    ordered = OrderedDict(result)
    if metadata is not None:
        made = copy(metadata)
        if isinstance(metadata, dict):
            made.update((name, copy(value)) for name, value in metadata.items())
        ordered._metadata = made  # type: ignore[attr-defined]  # as torch has it
    return ordered

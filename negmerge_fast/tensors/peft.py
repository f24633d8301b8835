"""Modules in which PEFT has put adapters: the base's tensors under their plain names, and each adapter's as its file has them.

PEFT is never imported: its classes are known by their names.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch

from ..core.errors import InputError, some_names

# By a class of PEFT: where an instance of it has the module that it wraps.
_WRAPPED = {
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",
    "BaseTunerLayer": "base_layer",
    "ModulesToSaveWrapper": "original_module",
    "TrainableTokensWrapper": "token_adapter",
}
_LAYERS = frozenset({"BaseTunerLayer", "ModulesToSaveWrapper", "TrainableTokensWrapper"})
# Before all keys of an adapter's file.
_PREFIX = "base_model.model."
# What holds the adapters' parts in a layer. All else that such a layer has beside the base's is no weight.
_IN_MODEL = "modules_to_save"
_TOKENS, _ORIGINAL_TOKENS = "trainable_tokens_delta", "trainable_tokens_original"


class _Entry(NamedTuple):
    """What a name of a wrapped module's state dict is: of the base, with its plain name; or of an adapter, with its key in a file."""

    plain: str | None
    adapter: str = ""
    key: str = ""


def _classes(module: object) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _wrapped(module: torch.nn.Module) -> str | None:
    """The name of the child that a module of PEFT wraps; None if it is no such module."""
    child = next((_WRAPPED[name] for name in _classes(module) if name in _WRAPPED), None)
    return child if child in module._modules else None


def _is_layer(module: object) -> bool:
    return not _LAYERS.isdisjoint(_classes(module))


def wrapped(module: torch.nn.Module) -> list[str]:
    """The names of the children that a module of PEFT wraps: one, or none."""
    return [] if (child := _wrapped(module)) is None else [child]


def is_wrapped(module: torch.nn.Module) -> bool:
    """Whether PEFT has put layers into a module. A model whose adapters were merged into it for good has none."""
    if "peft" not in sys.modules or next(_configurations(module), None) is None:
        return False
    return any(map(_is_layer, module.modules()))


def plain_name(module: torch.nn.Module, name: str) -> str | None:
    """The name that a parameter has without PEFT's layers; None of an adapter's."""
    if "peft" not in sys.modules:
        return name
    return None if (entry := _entry(module, name)) is None else entry.plain


def _configurations(module: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Yield configurations of adapters, by their names. PEFT puts the same at a model and at what wraps it."""
    for part in module.modules():
        found = part.__dict__.get("peft_config")
        if isinstance(found, dict) and found:
            yield found


def _configuration(module: torch.nn.Module, where: str) -> dict[str, Any]:
    """The configurations of a module's adapters, by their names. Raises InputError if parts of it have different ones."""
    first, *others = _configurations(module)
    for other in others:
        if other.keys() != first.keys() or any(other[name] is not first[name] for name in first):
            raise InputError(
                f"{where}: {type(module).__name__} with adapters in several parts ({some_names(sorted({*first, *other}))}), "
                "expected one model of PEFT: merge the parts one by one"
            )
    return first


def _entry(module: torch.nn.Module, name: str) -> _Entry | None:
    """What a name of a module's state dict is; None for what belongs to no adapter and is no weight."""
    own: list[str] = []
    plain: list[str] = []
    rest = name.split(".")
    part: Any = module
    while True:
        child = _wrapped(part)
        if child is not None and rest[:1] != [child]:
            return _of_adapter(part, own, rest)
        if child is None and rest[0] not in part._modules:
            return _Entry(".".join(plain + rest))
        if child is None or _is_layer(part):
            own.append(rest[0])
        if child is None:
            plain.append(rest[0])
        part = part._modules[rest.pop(0)]
        if part is None or not rest:
            return _Entry(".".join(plain + rest))


def _of_adapter(layer: Any, own: list[str], rest: list[str]) -> _Entry | None:
    """What a name is that a layer has beside the module that it wraps."""
    if len(rest) < 2 or rest[0] == _ORIGINAL_TOKENS:
        return None
    if rest[0] == _TOKENS and getattr(layer, "tied_adapter", None):
        return None  # the other layer's own
    held = [] if rest[0] == _IN_MODEL else [rest[0]]
    return _Entry(None, rest[1], ".".join(own + held + rest[2:]))


def plain_state(module: torch.nn.Module) -> dict[str, Any]:
    """The state dict of a wrapped module as it was before: the base's tensors under their plain names."""
    state = module.state_dict()
    found: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        if (entry := _entry(module, name)) and entry.plain is not None:
            found[entry.plain] = value
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict):
        names = {name: _module_name(module, name) for name in metadata}
        kept = OrderedDict((plain, metadata[name]) for name, plain in names.items() if plain is not None)
        found._metadata = kept  # type: ignore[attr-defined]  # as torch has it
    return found


def _module_name(module: torch.nn.Module, name: str) -> str | None:
    """The plain name of a module within a wrapped one; None if it is not the base's."""
    end = "weight"  # of any tensor of it
    entry = _entry(module, f"{name}.{end}" if name else end)
    return None if entry is None or entry.plain is None else entry.plain.removesuffix(end).removesuffix(".")


def adapters_of(
    module: torch.nn.Module, where: str = "model"
) -> Iterator[tuple[str, dict[str, Any], dict[str, torch.Tensor]]]:
    """Yield each adapter's name, its configuration and its tensors, as PEFT writes them, in the order of the configurations.

    PEFT's own function is not called: it would lose the layers that have a number if another adapter has that for a name, and may
    ask a hub whether the vocabulary grew.

    Args:
        module: A model of PEFT, or one that has layers of it, or has these within.
        where: What errors call it.
    """
    state = module.state_dict()
    entries = {name: entry for name in state if (entry := _entry(module, name))}
    for adapter, config in _configuration(module, where).items():
        fields = _fields(config)
        tensors = {
            _PREFIX + entry.key: state[name]
            for name, entry in entries.items()
            if entry.plain is None and entry.adapter == adapter
        }
        tensors.update(
            {_PREFIX + plain: state[name] for name, plain in _biases(module, entries, fields.get("bias"))}
        )
        yield adapter, fields, tensors


def _biases(
    module: torch.nn.Module, entries: Mapping[str, _Entry], bias: object
) -> Iterator[tuple[str, str]]:
    """Yield the names, and the plain names, of the base's biases that an adapter trains where they are, and has in its file."""
    if bias in (None, "none"):
        return
    tuned = {
        f"{name}.base_layer.bias" if name else "base_layer.bias"
        for name, part in module.named_modules(remove_duplicate=False)
        if "BaseTunerLayer" in _classes(part)
    }
    for name, entry in entries.items():
        is_bias = name.rpartition(".")[2] == "bias" and ".original_module." not in f".{name}"
        if entry.plain is not None and is_bias and (bias == "all" or name in tuned):
            yield name, entry.plain


def scales_of(module: torch.nn.Module, adapter: str) -> Iterator[tuple[str, str | None, float]]:
    """Yield the scale that each layer has for an adapter, with the plain names of its module and of the parameter that it is of.

    The parameter is None of a layer that wraps a module, whose weight it is.
    """
    for name, part in module.named_modules():
        scaling = part.__dict__.get("scaling")
        if not isinstance(scaling, dict) or adapter not in scaling:
            continue
        if (plain := _module_name(module, f"{name}.base_layer" if name else "base_layer")) is not None:
            yield plain, getattr(part, "parameter_name", None), float(scaling[adapter])


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration as its file has them."""
    if isinstance(config, Mapping):
        fields = dict(config)
    else:
        fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else dict(vars(config))
    made: dict[str, Any] = json.loads(json.dumps(fields, default=_plain_value))
    return made


def _plain_value(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, Enum):
        return value.value
    return str(value)


def refuse_merged(module: torch.nn.Module, where: str) -> None:
    """Raise InputError if an adapter is merged into the weights at the moment: these are not the base's then."""
    names = {
        str(name)
        for part in module.modules()
        for name in getattr(part, "merged_adapters", None) or ()
        if "BaseTunerLayer" in _classes(part)
    }
    if names:
        raise InputError(
            f"{where}: {some_names(sorted(names))}: merged into the base's weights at the moment, "
            "expected them apart: call unmerge_adapter() first"
        )

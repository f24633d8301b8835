"""Names of tensors and of models, sorted and shortened for pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.errors import escape

# Rows of a picture: the kinds that have most elements, and one for all others.
MAX_KINDS = 40


class Layers(NamedTuple):
    """Shares of elements that agree, of layers and kinds of parameter.

    Attributes:
        layers: Numbers of layers, ascending; None first, if there are tensors that are in no layer.
        kinds: Names without the number of the layer.
        ratios: The share of each kind in each layer; None where there is no such tensor.
    """

    layers: list[int | None]
    kinds: list[str]
    ratios: list[list[float | None]]


def split_layer(name: str) -> tuple[int | None, str]:
    """The layer that a tensor is in, the first number in its name, and the rest; "*" stands for that and all other numbers.

    >>> split_layer("model.layers.7.mlp.experts.3.up_proj.weight")
    (7, 'model.layers.*.mlp.experts.*.up_proj.weight')
    """
    parts = name.split(".")
    numbers = [part for part in parts if part.isascii() and part.isdecimal() and len(part) < 7]
    return (
        int(numbers[0]) if numbers else None,
        ".".join("*" if part in numbers else part for part in parts),
    )


def by_layer(tensors: Iterable[Mapping[str, Any]]) -> Layers:
    """Sum tensors by layer and kind, in the order in which kinds are first named."""
    counts: dict[str, dict[int | None, list[int]]] = {}
    for tensor in tensors:
        if tensor["elements"]:
            layer, kind = split_layer(tensor["name"])
            found = counts.setdefault(kind, {}).setdefault(layer, [0, 0])
            found[0] += tensor["agreed"]
            found[1] += tensor["elements"]
    if len(counts) > MAX_KINDS:
        counts = _largest(counts)
    numbered = {layer for of_kind in counts.values() for layer in of_kind}
    layers: list[int | None] = [None] if None in numbered else []
    layers += sorted(layer for layer in numbered if layer is not None)
    # Kinds that are in layers come first: these are most of a model.
    kinds = sorted(counts, key=lambda kind: None in counts[kind])
    ratios = [
        [
            counts[kind][layer][0] / counts[kind][layer][1] if layer in counts[kind] else None
            for layer in layers
        ]
        for kind in kinds
    ]
    return Layers(layers, kinds, ratios)


def _largest(counts: dict[str, dict[int | None, list[int]]]) -> dict[str, dict[int | None, list[int]]]:
    sizes = {kind: sum(elements for _, elements in found.values()) for kind, found in counts.items()}
    largest = set(sorted(sizes, key=lambda kind: -sizes[kind])[: MAX_KINDS - 1])
    rest: dict[int | None, list[int]] = {}
    for kind in counts.keys() - largest:
        for layer, (agreed, elements) in counts[kind].items():
            found = rest.setdefault(layer, [0, 0])
            found[0] += agreed
            found[1] += elements
    kept = {kind: found for kind, found in counts.items() if kind in largest}
    return {**kept, f"{len(counts) - len(kept)} other kinds": rest}


def without_common_prefix(kinds: Sequence[str]) -> list[str]:
    """Kinds without the parts that all kinds in layers begin with: they say nothing."""
    in_layers = [kind.split(".") for kind in kinds if "*" in kind.split(".")]
    if len(in_layers) < 2:
        return list(kinds)
    common = 0
    for parts in zip(*(parts[:-1] for parts in in_layers), strict=False):
        if len(set(parts)) > 1:
            break
        common += 1
    return [".".join(kind.split(".")[common:]) if "*" in kind.split(".") else kind for kind in kinds]


def model_labels(models: Sequence[str], count: int) -> list[str]:
    """Short names of models: the last parts of their paths that tell them apart, or numbers of unknown ones."""
    if not models:
        return [f"model {k + 1}" for k in range(count)]
    paths = [os.path.normpath(model).split(os.sep) for model in models]
    longest = max(map(len, paths))
    for parts in range(1, longest + 1):
        labels = [os.sep.join(path[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return list(models)


def shortened(name: str, length: int) -> str:
    """A printable name of bounded length: the middle of a long one is left away."""
    name = escape(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"

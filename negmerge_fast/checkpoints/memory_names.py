"""Names of parameters in memory, and the tensors of files that transformers loads into them.

For vision-language models, CLIP and fused experts the two differ: transformers has a mapping for each type of model. It is asked for
with a model on the device meta, which has shapes and no numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..core.errors import first_line, short_repr

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A tensor of a file that is a parameter, or a part of one.

    Attributes:
        name: The tensor's name.
        expert: The index in the parameter's first dimension, if it is of one expert only.
        rows: The rows that it has of the parameter, or of the expert, if it has not all.
        transposed: Whether rows and columns are exchanged in the tensor.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


class Location(NamedTuple):
    """Where a parameter is: its shape in memory, and the tensors that hold it."""

    shape: Shape
    parts: tuple[Part, ...]

    @property
    def is_whole(self) -> bool:
        """Whether one tensor is the parameter as it is."""
        return self.parts == (Part(self.parts[0].name),)


class MemoryNames(NamedTuple):
    """A model in memory.

    Attributes:
        locations: By the names of parameters.
        transposed: Modules whose weights are (in, out), or (experts, in, out), by name.
        version: Of transformers.
    """

    locations: Mapping[str, Location]
    transposed: frozenset[str]
    version: str


class Unknown(LookupError):
    """The names in memory are not known; the message is a phrase that says why."""


def memory_names(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], model_class: str = ""
) -> MemoryNames:
    """Find what transformers loads into which parameter.

    Args:
        config: The config.json of the model.
        shapes: The shapes of the tensors of its files.
        model_class: The class of the model in memory, if it is not the first of its architectures.

    Raises:
        Unknown: If transformers is not installed, or does not tell.
    """
    architectures = config.get("architectures")
    if (
        not model_class
        and isinstance(architectures, list)
        and architectures
        and isinstance(architectures[0], str)
    ):
        model_class = architectures[0]
    if not model_class:
        raise Unknown(
            "its config.json has no architectures, by which transformers would know its names in memory"
        )
    _refuse_large(config, len(shapes))
    try:
        import transformers
    except Exception as error:  # of any kind, if what it imports is broken
        why = (
            "is not installed"
            if isinstance(error, ModuleNotFoundError)
            else f"cannot be imported ({first_line(error)})"
        )
        raise Unknown(f"transformers, which knows names in memory, {why}") from None
    version = str(transformers.__version__)
    try:
        return _ask(model_class, dict(config), shapes, version)
    except Unknown:
        raise
    except Exception as error:  # its API for this is not public
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Unknown(
            f"transformers {version} does not tell its names in memory ({short_repr(reason)})"
        ) from None


# Modules that a configuration may ask for: on the device meta, only their count takes time.
_MIN_MODULES = 1024
_COUNTS = ("layers", "layer", "depth", "depths", "experts", "blocks")


def _refuse_large(config: Mapping[str, Any], count: int) -> None:
    """Refuse a configuration of more modules than there are tensors: it may be anybody's."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        for key, item in value.items() if isinstance(value, dict) else ():
            numbers = item if isinstance(item, list) else [item]
            if str(key).endswith(_COUNTS) and any(
                isinstance(n, int) and n > max(count, _MIN_MODULES) for n in numbers
            ):
                raise Unknown(f"its config.json says {key} {short_repr(item)}, and it has {count} tensors")
            pending.append(item)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers says while a model is made is of no use here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _ask(architecture: str, config: dict[str, Any], shapes: Mapping[str, Shape], version: str) -> MemoryNames:
    import torch
    import transformers
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    kind: Any = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise Unknown(f"transformers {version} has no {short_repr(architecture)}")
    found: Any = kind
    config_class = found.config_class
    inner = config.get(getattr(config_class, "base_config_key", ""))
    if isinstance(inner, dict) and config.get("model_type") != config_class.model_type:
        config = inner  # a tower's own
    with torch.device("meta"), _quiet():
        model = kind(config_class.from_dict(config))
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    held = model.state_dict()
    owner = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for name in sorted(shapes, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if parameter not in held and name in held:
            parameter, pattern = rename_source_key(name, [], [], model.base_model_prefix, held)
        if parameter in held:
            sources[parameter].append((pattern, name))
    locations = {}
    for parameter, found in sources.items():
        converter = owner[found[0][0]] if found[0][0] is not None else None
        parts = _parts(converter, found, shapes)
        if parts == (Part(found[0][1]),):
            locations[parameter] = Location(shapes[found[0][1]], parts)
        elif parts and _shape(parts, shapes) == (shape := tuple(held[parameter].shape)):
            locations[parameter] = Location(shape, parts)
    transposed = frozenset(
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
    )
    return MemoryNames(locations, transposed, version)


def _parts(
    converter: Any, sources: Sequence[tuple[str | None, str]], shapes: Mapping[str, Shape]
) -> tuple[Part, ...]:
    """The tensors that make up a parameter; none if it is not known how they do."""
    if converter is None:
        return (Part(sources[0][1]),) if len(sources) == 1 else ()
    if len(converter.target_patterns) != 1:
        return ()
    operations = list(converter.operations)
    kinds = [type(each).__name__ for each in operations]
    transposed = False
    if kinds[-1:] == ["Transpose"] and {operations[-1].dim0 % 3, operations[-1].dim1 % 3} in ({0, 1}, {1, 2}):
        transposed = not operations[-1].check_dims
        kinds, operations = kinds[:-1], operations[:-1]
        if not transposed:
            return ()
    stacked = kinds[:1] == ["MergeModulelist"] and operations[0].dim == 0
    if stacked:
        kinds, operations = kinds[1:], operations[1:]
    joined = kinds == ["Concatenate"] and operations[0].dim == (1 if stacked else 0)
    if (kinds and not joined) or (transposed and joined):
        return ()
    parts, row = [], 0
    for pattern in converter.source_patterns if joined else [sources[0][0]]:
        names = [name for source, name in sources if source == pattern]
        rows = shapes[names[0]][0] if names and shapes[names[0]] else 0
        if (
            not names
            or any(shapes[name] != shapes[names[0]] for name in names)
            or (len(names) > 1 and not stacked)
        ):
            return ()
        for expert, name in enumerate(names):
            parts.append(
                Part(name, expert if stacked else None, (row, row + rows) if joined else None, transposed)
            )
        row += rows
    return tuple(parts) if len(parts) == len(sources) else ()


def _shape(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> Shape:
    """The shape of a parameter that is made up of parts."""
    last, shape = parts[-1], shapes[parts[-1].name]
    if last.transposed:
        shape = (*shape[:-2], *shape[:-3:-1])
    if last.rows is not None:
        shape = (last.rows[1], *shape[1:])
    return shape if last.expert is None else (last.expert + 1, *shape)

"""Where an adapter's changes are in its base: which of the base's tensors they are of.

An adapter names parameters as they are in memory; a file may name them otherwise, or hold them in parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Generic, TypeVar

from ..core.errors import InputError, short_repr, some_names
from .lora import Adapter, Change, Nested, Parameter, Product, Replacement, Shift
from .memory_names import Location, MemoryNames, Part, Shape, Unknown, memory_names

T = TypeVar("T")

# Types of models whose experts are (experts, in, out), which PEFT asks the module for.
_TRANSPOSED_EXPERTS = ("gpt_oss", "aria", "openai_privacy_filter")
# Modules that a model may tie to its embedding, and embeddings.
_OUTPUTS = ("lm_head", "embed_out", "output_projection", "output_layer", "proj_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")


@dataclass(frozen=True)
class Placed(Generic[T]):
    """An adapter's changes by the names of the base's tensors.

    Attributes:
        changes: The changes.
        modules: How many modules of the adapter they are of: all.
        notes: What a user should know of it, a line each; the last says how many modules were placed, and how.
        copies: What the adapter has of tensors that it does not change, or changes otherwise: it must be equal to the base's.
    """

    changes: dict[str, Change[T]]
    modules: int
    notes: tuple[str, ...]
    copies: dict[str, T] = field(default_factory=dict)


def place(
    adapter: Adapter[T], shapes: Mapping[str, Shape], config: Mapping[str, Any], name_of_base: str
) -> Placed[T]:
    """Location an adapter on its base.

    Each parameter is the base's tensor of the same name; else the only one whose name ends with it, or with which it ends; else what
    transformers, if it is installed, loads into it.

    Args:
        adapter: The adapter.
        shapes: The shapes of the base's tensors.
        config: The base's config.json; empty if there is none.
        name_of_base: What errors call the base.

    Raises:
        InputError: If a part of it has no location, or does not fit.
    """
    return _Placing(adapter, shapes, config, name_of_base).placed()


class _Names:
    """Names, found by how they end."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._ending: dict[str, list[list[str]]] = defaultdict(list)
        self._joined: dict[tuple[str, ...], str] = {}
        for name in self._names:
            components = _components(name)
            self._ending[components[-1]].append(components)
            self._joined[tuple(components)] = name

    def find(self, parameter: str) -> str | None:
        """A parameter's own name, or the only one that ends with it; else the longest with which it ends."""
        if parameter in self._names:
            return parameter
        wanted = _components(parameter)
        same = self._ending[wanted[-1]]
        found = [each for each in same if _is_suffix(wanted, each)]
        if not found:
            found = sorted((each for each in same if len(each) > 1 and _is_suffix(each, wanted)), key=len)[
                -1:
            ]
        return self._joined[tuple(found[0])] if len(found) == 1 else None


def _components(name: str) -> list[str]:
    return name.replace("/", ".").split(".")


def _is_suffix(short: Sequence[str], name: Sequence[str]) -> bool:
    return len(short) <= len(name) and list(name[len(name) - len(short) :]) == list(short)


class _Placing(Generic[T]):
    def __init__(
        self, adapter: Adapter[T], shapes: Mapping[str, Shape], config: Mapping[str, Any], base: str
    ) -> None:
        self.adapter, self.shapes, self.config, self.base = adapter, shapes, config, base
        self.shape_of = adapter.shape_of
        self.unknown = ""
        self.changes: dict[str, Change[T]] = {}
        self.sources: dict[str, str] = {}

    def placed(self) -> Placed[T]:
        locations, how = self._locations()
        changes = dict(self.adapter.changes)
        for module, nested in self.adapter.nested.items():
            changes.update(self._resolved(module, nested, locations))
        changes.update(self._oriented(changes, locations))
        for parameter, change in changes.items():
            self._add(parameter, change, locations[parameter])
        copies = dict(self._copies(locations))
        count = self.adapter.modules
        note = f"{self.adapter.name}: {count} of {count} adapter modules placed{how}"
        return Placed(self.changes, count, (*self._tied(changes), note), copies)

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self.adapter.name}: {problem}")

    def _locations(self) -> tuple[dict[str, Location], str]:
        """Where all parameters are, and a phrase that says how that was found."""
        by_name = self._found({name: Location(shape, (Part(name),)) for name, shape in self.shapes.items()})
        missing = self._missing(by_name)
        if not missing:
            same = all(location.parts[0].name == parameter for parameter, location in by_name.items())
            return by_name, "" if same else " by how their names end"
        for model_class in dict.fromkeys((self.adapter.model_class, "")):
            if (memory := self._ask(model_class)) is not None:
                mapped = self._found(memory.locations)
                if not self._missing(mapped):
                    self._memory = memory
                    return mapped, f" by their names in memory (transformers {memory.version})"
        raise self._no_place(missing)

    @cached_property
    def _memory(self) -> MemoryNames | None:
        return self._ask(self.adapter.model_class) or self._ask("")

    def _ask(self, model_class: str) -> MemoryNames | None:
        try:
            return memory_names(self.config, self.shapes, model_class)
        except Unknown as error:
            self.unknown = f" ({error})"
            return None

    def _found(self, named: Mapping[str, Location]) -> dict[str, Location]:
        names = _Names(named)
        found = {parameter: names.find(parameter) for parameter in self._parameters()}
        return {parameter: named[name] for parameter, name in found.items() if name is not None}

    def _parameters(self) -> Iterator[str]:
        yield from self.adapter.changes
        yield from self.adapter.copies
        for module, nested in self.adapter.nested.items():
            yield from (f"{module}.{parameter.name}" for parameter in nested.parameters)

    def _missing(self, locations: Mapping[str, Location]) -> list[str]:
        """The modules without a place."""
        adapter = self.adapter
        missing = [
            adapter.owner_of.get(p, p) for p in (*adapter.changes, *adapter.copies) if p not in locations
        ]
        for module, nested in adapter.nested.items():
            if sum(f"{module}.{each.name}" in locations for each in nested.parameters) < len(nested.levels):
                missing.append(module)
        return list(dict.fromkeys(missing))

    def _no_place(self, missing: list[str]) -> InputError:
        tied = [module for module in missing if _components(module)[-1] in _OUTPUTS]
        if tied and self._is_tied():
            return self._error(
                f"{short_repr(tied[0])} has no tensor in {self.base}, which ties it to its embedding: expected an adapter without it"
            )
        return self._error(
            f"{len(missing)} of {self.adapter.modules} adapter modules have no place in {self.base}: {some_names(missing)}{self.unknown}"
        )

    def _is_tied(self) -> bool:
        """Whether the output layer is tied to the embedding, and no tensor of its own."""
        tied: Any = self.config.get("tie_word_embeddings", True)
        return bool(tied) and not any(
            _components(name)[-2:-1] == [each] for name in self.shapes for each in _OUTPUTS
        )

    def _tied(self, changes: Mapping[str, Change[T]]) -> Iterator[str]:
        """Say of an embedding that the output layer changes with it."""
        for parameter, change in changes.items():
            rows = change.rows if isinstance(change, Replacement) else None
            module = _components(parameter)[-2:-1]
            if module and module[0] in _EMBEDDINGS and rows is None and self._is_tied():
                yield f"{self.adapter.name}: {parameter} is the output layer of {self.base}, too, which changes with it"

    def _resolved(
        self, module: str, nested: Nested[T], locations: Mapping[str, Location]
    ) -> Iterator[tuple[str, Product[T]]]:
        """The products of a module's parameters, each with the parameter that it fits."""
        present = [each for each in nested.parameters if f"{module}.{each.name}" in locations]
        named = [each for each in present if not each.is_weight] or present
        fits = [
            {
                each: product
                for each in named
                if (product := self._fit(module, each, level, nested, locations))
            }
            for level in nested.levels
        ]
        fitting = list(islice(_assignments(fits), 2))
        if len(fitting) != 1:
            raise self._unclear(module, nested, locations, named, len(fitting))
        for each, product in fitting[0].items():
            yield f"{module}.{each.name}", product

    def _unclear(
        self,
        module: str,
        nested: Nested[T],
        locations: Mapping[str, Location],
        named: Sequence[Parameter],
        count: int,
    ) -> InputError:
        factors = [tuple(map(self.shape_of, level)) for level in nested.levels]
        parameters = [f"{each.name} {locations[f'{module}.{each.name}'].shape}" for each in named]
        what = "fit more than one of" if count else "do not fit"
        return self._error(
            f"{module}: factors {short_repr(factors)} {what} {', '.join(parameters)} of {self.base}, expected one parameter for each"
        )

    def _fit(
        self,
        module: str,
        parameter: Parameter,
        factors: tuple[T, T],
        nested: Nested[T],
        locations: Mapping[str, Location],
    ) -> Product[T] | None:
        """The product of a parameter, if the shapes are its."""
        a, b = map(self.shape_of, factors)
        shape = locations[f"{module}.{parameter.name}"].shape
        experts = shape[0] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or a[0] != parameter.rank * experts:
            return None
        rows, columns = shape[-2:]
        plain, transposed = (b[0], a[1]) == (rows, columns), (a[1], b[0]) == (rows, columns)
        if len(shape) == 2 and not parameter.is_weight:
            transposed = False
        elif len(shape) == 2 and plain and transposed:
            transposed = nested.transposed
            plain = not transposed
        elif plain and transposed:
            transposed = self._has_transposed_experts(module, nested)
            plain = not transposed
        if not plain and not transposed:
            return None
        # One expert has a dimension of its own, too.
        own = shape if len(shape) == 3 and experts == 1 else None
        return Product(*factors, parameter.rank, parameter.scale, not plain, experts, shape=own)

    def _has_transposed_experts(self, module: str, nested: Nested[T]) -> bool:
        """Whether square experts are (in, out): PEFT took all for it before 0.19, and since then asks the module."""
        if nested.swaps is None:
            raise self._error(
                f"{module}: square experts, and no peft_version in the configuration, which would tell in from out"
            )
        if not nested.swaps:
            return True
        if self._memory is not None:
            return module in self._memory.transposed
        text = self.config.get("text_config")
        types = [each.get("model_type") for each in (self.config, text) if isinstance(each, Mapping)]
        return any(str(kind).startswith(_TRANSPOSED_EXPERTS) for kind in types)

    def _oriented(
        self, changes: Mapping[str, Change[T]], locations: Mapping[str, Location]
    ) -> Iterator[tuple[str, Product[T]]]:
        """Products that fit only with fan_in_fan_out set otherwise. PEFT sets it for each module, and saves the last one's."""
        flexible = {
            parameter: change
            for parameter, change in changes.items()
            if isinstance(change, Product)
            and parameter in self.adapter.flexible
            and len(locations[parameter].shape) == 2
        }
        square, others = [], []
        for parameter, product in flexible.items():
            found, expected = _product_shape(product, self.shape_of), locations[parameter].shape
            if found == found[::-1] == expected:
                square.append(parameter)
            elif found != expected == found[::-1]:
                others.append(parameter)
                yield parameter, product._replace(transposed=not product.transposed)
        for parameter in square if others else ():
            if self._memory is None:
                raise self._error(
                    f"{parameter}: square, and fan_in_fan_out of the configuration is not what {others[0]} has: it may be "
                    f"transposed or not{self.unknown}"
                )
            module = parameter.removesuffix(".weight")
            yield parameter, flexible[parameter]._replace(transposed=module in self._memory.transposed)

    def _add(self, parameter: str, change: Change[T], location: Location) -> None:
        if isinstance(change, Product):
            self._check(parameter, location, _product_shape(change, self.shape_of))
        elif isinstance(change, Shift) or change.rows is None:
            self._check(parameter, location, self.shape_of(change.value))
        else:
            self._check_rows(parameter, location, change)
        for part in location.parts:
            if part.name in self.changes:
                raise self._error(
                    f"{parameter} and {self.sources[part.name]} are both {short_repr(part.name)} in {self.base}"
                )
            self.sources[part.name] = parameter
            self.changes[part.name] = self._part_of(parameter, change, location, part)

    def _part_of(self, parameter: str, change: Change[T], location: Location, part: Part) -> Change[T]:
        """The change of a tensor that is a part of a parameter, or has rows and columns exchanged."""
        if location.is_whole:
            return change
        if not isinstance(change, Product):
            raise self._error(
                f"{parameter}: a whole tensor, but {self.base} has it in parts or transposed ({short_repr(part.name)}), expected factors"
            )
        rows, columns = (None, part.rows) if change.transposed else (part.rows, None)
        expert = part.expert if change.experts > 1 else None
        return change._replace(
            expert=expert, rows=rows, columns=columns, transposed=change.transposed != part.transposed
        )

    def _check(self, parameter: str, location: Location, found: Shape) -> None:
        if found != location.shape:
            raise self._error(
                f"{parameter}: shape {found}, expected {location.shape} as {short_repr(location.parts[0].name)} in {self.base}"
            )

    def _check_rows(self, parameter: str, location: Location, change: Replacement[T]) -> None:
        assert change.rows
        shape = self.shape_of(change.value)
        if (
            len(location.shape) != 2
            or shape[1:] != location.shape[1:]
            or max(change.rows) >= location.shape[0]
        ):
            raise self._error(
                f"{parameter}: rows up to {max(change.rows)} of {shape[1]} elements, "
                f"expected rows of {location.shape} as {short_repr(location.parts[0].name)} in {self.base}"
            )

    def _copies(self, locations: Mapping[str, Location]) -> Iterator[tuple[str, T]]:
        for parameter, value in self.adapter.copies.items():
            location = locations[parameter]
            if not location.is_whole or self.shape_of(value) != location.shape:
                raise self._error(
                    f"has a copy of {short_repr(parameter)} of shape {self.shape_of(value)}, expected {location.shape} as in "
                    f"{self.base}: a resized embedding is not merged"
                )
            yield location.parts[0].name, value


def _assignments(fits: Sequence[Mapping[Parameter, Product[T]]]) -> Iterator[dict[Parameter, Product[T]]]:
    """The choices of a different parameter for each level."""
    if not fits:
        yield {}
        return
    for parameter, product in fits[0].items():
        rest = [{each: other for each, other in fit.items() if each != parameter} for fit in fits[1:]]
        if all(rest):
            for chosen in _assignments(rest):
                yield {parameter: product, **chosen}


def _product_shape(product: Product[T], shape_of: Callable[[T], Shape]) -> Shape:
    a, b = shape_of(product.a), shape_of(product.b)
    if product.shape is not None:
        return product.shape
    experts = (product.experts,) if product.experts > 1 else ()
    return (*experts, a[1], b[0]) if product.transposed else (*experts, b[0], *a[1:])

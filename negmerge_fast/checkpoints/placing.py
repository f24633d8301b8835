"""Where an adapter's changes are in its base: which of the base's tensors they are of.

An adapter names parameters as they are in memory; a file may name them otherwise, or hold them in parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Generic, NamedTuple, TypeVar

from ..core.errors import InputError, short_repr, some_names
from .lora import Adapter, Change, Nested, Parameter, Product, Replacement, Shift

T = TypeVar("T")
Shape = tuple[int, ...]


class Part(NamedTuple):
    """A tensor of the base that is a parameter, or a part of one.

    Attributes:
        name: The tensor's name.
        expert: The index in the parameter's first dimension, if it is of one expert only.
        rows: The rows that it is of each expert, if it is not all.
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


@dataclass(frozen=True)
class Placed(Generic[T]):
    """An adapter's changes by the names of the base's tensors.

    Attributes:
        changes: The changes.
        modules: How many modules of the adapter they are of: all.
        notes: How it was placed, and what a user should know of that, a line each.
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
    """The base's tensors by how their names end."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._ending: dict[str, list[str]] = defaultdict(list)
        for name in shapes:
            self._ending[_components(name)[-1] if name else ""].append(name)
        self.ambiguous: dict[str, list[str]] = {}

    def find(self, parameter: str) -> str | None:
        """The tensor of a parameter's name, or the only one whose name ends with it, or with which it ends."""
        if parameter in self._shapes:
            return parameter
        wanted = _components(parameter)
        found = [n for n in self._ending[wanted[-1]] if _is_suffix(wanted, _components(n))]
        if not found:
            shorter = [
                n
                for n in self._ending[wanted[-1]]
                if _is_suffix(_components(n), wanted) and len(_components(n)) > 1
            ]
            found = sorted(shorter, key=len)[-1:]
        if len(found) > 1:
            self.ambiguous[parameter] = found
        return found[0] if len(found) == 1 else None


def _components(name: str) -> list[str]:
    return name.replace("/", ".").split(".")


def _is_suffix(short: Sequence[str], name: Sequence[str]) -> bool:
    return len(short) <= len(name) and list(name[len(name) - len(short) :]) == list(short)


class _Placing(Generic[T]):
    def __init__(
        self, adapter: Adapter[T], shapes: Mapping[str, Shape], config: Mapping[str, Any], base: str
    ) -> None:
        self.adapter, self.shapes, self.config, self.base = adapter, shapes, config, base
        self.names = _Names(shapes)
        self.shape_of = adapter.shape_of
        self.changes: dict[str, Change[T]] = {}
        self.sources: dict[str, str] = {}

    def placed(self) -> Placed[T]:
        how = ""
        locations = self._by_name()
        if missing := self._missing(locations):
            raise self._no_place(missing)
        if any(location.parts[0].name != parameter for parameter, location in locations.items()):
            how = " by how their names end"
        changes = dict(self.adapter.changes)
        for module, nested in self.adapter.nested.items():
            changes.update(self._resolved(module, nested, locations))
        for parameter, change in changes.items():
            self._add(parameter, change, locations[parameter])
        copies = {
            locations[parameter].parts[0].name: value for parameter, value in self.adapter.copies.items()
        }
        for name, value in copies.items():
            self._check_copy(name, value)
        count = self.adapter.modules
        note = f"{self.adapter.name}: {count} of {count} adapter modules placed{how}"
        return Placed(self.changes, count, (note,), copies)

    def _by_name(self) -> dict[str, Location]:
        found = {}
        for parameter in self._parameters():
            if (name := self.names.find(parameter)) is not None:
                found[parameter] = Location(self.shapes[name], (Part(name),))
        return found

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
        count = self.adapter.modules
        return InputError(
            f"{self.adapter.name}: {len(missing)} of {count} adapter modules have no place in {self.base}: {some_names(missing)}"
        )

    def _resolved(
        self, module: str, nested: Nested[T], locations: Mapping[str, Location]
    ) -> Iterator[tuple[str, Product[T]]]:
        """The products of a module's parameters, each with the parameter that it fits."""
        present = [each for each in nested.parameters if f"{module}.{each.name}" in locations]
        named = [each for each in present if not each.is_weight] or present
        fitting = []
        for chosen in permutations(named, len(nested.levels)):
            pairs = zip(chosen, nested.levels, strict=True)
            products = [self._fit(module, each, factors, nested, locations) for each, factors in pairs]
            if all(product is not None for product in products):
                fitting.append(
                    [
                        (f"{module}.{each.name}", product)
                        for each, product in zip(chosen, products, strict=True)
                    ]
                )
        if len(fitting) != 1:
            raise self._unclear(module, nested, locations, named, len(fitting))
        for name, product in fitting[0]:
            assert product
            yield name, product

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
        return InputError(
            f"{self.adapter.name}: {module}: factors {short_repr(factors)} {what} {', '.join(parameters)} of {self.base}, "
            "expected one parameter for each"
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
        if len(shape) == 2:
            transposed = transposed and parameter.is_weight and nested.transposed
            plain = plain and not (parameter.is_weight and nested.transposed)
        if not plain and not transposed:
            return None
        return Product(*factors, parameter.rank, parameter.scale, not plain, experts)

    def _add(self, parameter: str, change: Change[T], location: Location) -> None:
        if isinstance(change, Product):
            self._check(parameter, location, _product_shape(change, self.shape_of))
        elif isinstance(change, Shift) or change.rows is None:
            self._check(parameter, location, self.shape_of(change.value))
        else:
            self._check_rows(parameter, location, change)
        for part in location.parts:
            if part.name in self.changes:
                raise InputError(
                    f"{self.adapter.name}: {parameter} and {self.sources[part.name]} are both {short_repr(part.name)} in {self.base}"
                )
            self.sources[part.name] = parameter
            self.changes[part.name] = change

    def _check(self, parameter: str, location: Location, found: Shape) -> None:
        if found != location.shape:
            raise InputError(
                f"{self.adapter.name}: {parameter}: shape {found}, expected {location.shape} as {short_repr(location.parts[0].name)} in {self.base}"
            )

    def _check_rows(self, parameter: str, location: Location, change: Replacement[T]) -> None:
        assert change.rows
        shape = self.shape_of(change.value)
        if (
            len(location.shape) != 2
            or shape[1:] != location.shape[1:]
            or max(change.rows) >= location.shape[0]
        ):
            raise InputError(
                f"{self.adapter.name}: {parameter}: rows up to {max(change.rows)} of {shape[1]} elements, "
                f"expected rows of {location.shape} as {short_repr(location.parts[0].name)} in {self.base}"
            )

    def _check_copy(self, name: str, value: T) -> None:
        if (found := self.shape_of(value)) != self.shapes[name]:
            raise InputError(
                f"{self.adapter.name}: has its own copy of {short_repr(name)} of shape {found}, expected {self.shapes[name]} "
                f"as in {self.base}: a resized embedding is not merged"
            )


def _product_shape(product: Product[T], shape_of: Any) -> Shape:
    a, b = shape_of(product.a), shape_of(product.b)
    experts = (product.experts,) if product.experts > 1 else ()
    return (*experts, a[1], b[0]) if product.transposed else (*experts, b[0], *a[1:])

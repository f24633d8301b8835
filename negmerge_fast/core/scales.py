"""λ for each tensor, by patterns on its name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .errors import InputError, short_repr
from .rule import Rule, as_float

# One λ for all, or regular expressions and the λ of tensors whose names they match: the first that does counts.
Scale: TypeAlias = "float | Mapping[str, float] | Sequence[tuple[str, float]] | Scales"


@dataclass(frozen=True)
class Scales:
    """λ by the names of tensors.

    Attributes:
        pairs: Regular expressions, searched for in a name in this order, and λ. "" matches every name.
    """

    pairs: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, scale: Scale) -> Scales:
        """Check what a user gave.

        Raises:
            InputError: If a pattern is no regular expression or is given twice, or a number is not finite.
            TypeError: If it is neither a number nor pairs.
        """
        if isinstance(scale, Scales):
            return scale
        pairs = scale.items() if isinstance(scale, Mapping) else scale
        if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
            return cls((("", Rule(scale).scale),))  # type: ignore[arg-type]
        checked: list[tuple[str, float]] = []
        for pair in pairs:
            if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"scale: {short_repr(pair)}, expected a regular expression and a number")
            pattern, number = pair
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError, TypeError) as error:
                raise InputError(
                    f"scale: {short_repr(pattern)} is not a regular expression ({error})"
                ) from None
            if pattern in dict(checked):
                raise InputError(f"scale: {short_repr(pattern)} is given twice, expected each pattern once")
            value = as_float(f"scale of {short_repr(pattern)}", number)
            if not math.isfinite(value):
                raise InputError(f"scale of {short_repr(pattern)}: {value}, expected a finite number")
            checked.append((pattern, value))
        if not checked:
            raise InputError("scale: no patterns, expected a number or at least one")
        return cls(tuple(checked))

    @property
    def single(self) -> float | None:
        """The λ of all tensors; None if patterns tell."""
        return self.pairs[0][1] if self.pairs[0][0] == "" else None

    @property
    def is_one(self) -> bool:
        """Whether there is one λ, of all tensors."""
        return len(self.pairs) == 1 and self.pairs[0][0] == ""

    @property
    def given(self) -> float | dict[str, float]:
        """A number, or λ by pattern: as a user gives it."""
        return self.pairs[0][1] if self.is_one else dict(self.pairs)

    def by_name(self, names: Iterable[str]) -> dict[str, float]:
        """λ of each tensor.

        Raises:
            InputError: If no pattern matches a tensor, or a pattern matches none that is not another's.
        """
        if self.is_one:
            return dict.fromkeys(names, self.pairs[0][1])
        compiled = [(re.compile(pattern), number) for pattern, number in self.pairs]
        found: dict[str, float] = {}
        unused = set(range(len(compiled)))
        for name in names:
            for k, (pattern, number) in enumerate(compiled):
                if pattern.search(name):
                    found[name] = number
                    unused.discard(k)
                    break
            else:
                raise InputError(
                    f"scale: no pattern matches {short_repr(name)}, expected one, or a number for all others"
                )
        for k in sorted(unused):
            if self.pairs[k][0]:  # a number for all others may be for none
                raise InputError(
                    f"scale: {short_repr(self.pairs[k][0])} is the first to match no tensor, expected at least one"
                )
        return found

    def negated(self) -> Scales:
        """Every λ with its sign turned: what merges in instead of negating."""
        return Scales(tuple((pattern, -number) for pattern, number in self.pairs))

    def to_json(self) -> float | list[list[object]]:
        """A number, or pairs: as a manifest and a report list them."""
        return self.pairs[0][1] if self.is_one else [list(pair) for pair in self.pairs]

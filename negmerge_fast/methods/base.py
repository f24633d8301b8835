"""What a method is: its choices of core/choices.py, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from ..core.choices import KEEP_ALL, Choices, Election, Gate, Reduction
from ..core.errors import InputError, require_choice
from ..core.rule import as_float

if TYPE_CHECKING:
    import torch

Over = Literal["tensor", "model"]


@dataclass(frozen=True)
class Method:
    """A method of merging, with its numbers. methods/catalogue.py makes one of a name.

    Attributes:
        name: As of the command line.
        gate: Which differences take part.
        election: Which of them are reduced.
        reduction: What they are reduced to.
        density: Of MAGNITUDE, the fraction of each model's elements that pass, in (0, 1]; a number, or one for each model.
        gamma: Of MAGNITUDE, the fraction of the largest elements that do not pass, in [0, 1).
        over: Of MAGNITUDE, whether the fractions are of each tensor, or of the whole model.
        drop: Of RANDOM, the probability with which a difference is dropped, in [0, 1); a number, or one for each model.
        seed: Of RANDOM, 0 … 2^64 - 1.
        mask_scale: λ_t of MASKS, at least 0.
        model_weights: What each model's differences are multiplied with, and counted as in a mean; None is 1 for all.

    Raises:
        InputError: If a number is out of range.
        TypeError: If it is no number.
    """

    name: str
    gate: Gate
    election: Election
    reduction: Reduction
    density: float | tuple[float, ...] = 1.0
    gamma: float = 0.0
    over: Over = "tensor"
    drop: float | tuple[float, ...] = 0.0
    seed: int = 0
    mask_scale: float = 0.0
    model_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("density", "gamma", "drop", "mask_scale", "model_weights"):
            value = getattr(self, name)
            if name in _FOR_EACH and isinstance(value, (tuple, list)):
                if not value:
                    raise InputError(f"{name}: no numbers, expected one for each model")
                numbers = tuple(as_float(name, each) for each in value)
                object.__setattr__(self, name, numbers)
            elif value is None and name == "model_weights":
                continue
            else:
                numbers = (as_float(name, value),)  # of each model
                object.__setattr__(self, name, numbers[0])
            inside, expected = _BOUNDS[name]
            for each in numbers:
                if not inside(each):
                    raise InputError(f"{name}: {each}, expected {expected}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise TypeError(f"seed: {self.seed!r}, expected an integer")
        object.__setattr__(self, "seed", int(self.seed))
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed: {self.seed}, expected 0 … 2^64 - 1")
        require_choice("over", self.over, ("tensor", "model"))

    @property
    def is_negmerge(self) -> bool:
        """Whether it is the rule of core/rule.py, unless there are weights for each element."""
        return (self.gate, self.election, self.reduction, self.model_weights) == (
            Gate.NONE, Election.AGREEMENT, Reduction.MEAN, None,
        )  # fmt: skip

    @property
    def needs_bounds(self) -> bool:
        """Whether the magnitudes of all differences have to be known before one is merged."""
        return self.gate == Gate.MAGNITUDE and (self.gamma > 0 or self.density not in (1.0, (1.0,)))

    def choices(self, models: int, weighted: bool = False) -> Choices | None:
        """The choices for so many models; None for the rule of core/rule.py.

        Args:
            models: The number of models.
            weighted: Whether each element has a weight.

        Raises:
            InputError: If there are numbers for each of other than so many models.
        """
        weights = self._each(
            "model_weights", 1.0 if self.model_weights is None else self.model_weights, models
        )
        if self.is_negmerge and not weighted:
            return None
        drops = self._each("drop", self.drop, models)
        return Choices(
            self.gate,
            self.election,
            self.reduction,
            factors=tuple(w / (1.0 - p) for w, p in zip(weights, drops, strict=True)),
            votes=weights,
            keep=tuple(round((1.0 - p) * KEEP_ALL) for p in drops) if self.gate == Gate.RANDOM else (),
            seed=self.seed,
            mask_scale=self.mask_scale,
        )

    def ranks(self, models: int, numel: int) -> list[tuple[int, int]]:
        """For each model, how many of so many sorted magnitudes are below the lower bound's position, and above the upper one's.

        The bounds are the magnitudes at these positions, so that those equal to a bound pass, too.
        """
        # As mergekit 0.1.5 (magnitude_outliers) and the authors of TIES count: rounded down.
        found = []
        for density in self._each("density", self.density, models):
            passing, top = max(int(density * numel), 1), int(self.gamma * numel)
            bottom = numel - passing - top
            if bottom < 0:
                bottom, top = 0, max(top + bottom, 0)
            found.append((bottom, top))
        return found

    def _each(self, name: str, value: float | tuple[float, ...], models: int) -> tuple[float, ...]:
        if not isinstance(value, tuple):
            return (value,) * models
        if len(value) != models:
            raise InputError(f"{name}: {len(value)} numbers, expected one for each of {models} models")
        return value

    def to_json(self) -> dict[str, object]:
        """The method as a manifest lists it: its choices by name, and the numbers that are not the usual ones."""
        listed: dict[str, object] = {"name": self.name}
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if each.name in _CHOICES:
                listed[each.name] = value.name.lower()
            elif value != each.default:
                listed[each.name] = list(value) if isinstance(value, tuple) else value
        return listed

    @classmethod
    def of_json(cls, listed: Mapping[str, Any]) -> Method:
        """The method that to_json listed.

        Raises:
            InputError, TypeError, KeyError, ValueError: If it listed none such.
        """
        known = {name: kind[listed[name].upper()] for name, kind in _CHOICES.items()}
        rest: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in listed.items() if k not in known
        }
        return cls(**rest, **known)

    def __str__(self) -> str:
        numbers = [
            f"{each.name} {getattr(self, each.name)}"
            for each in fields(self)[4:]
            if getattr(self, each.name) != each.default
        ]
        return " ".join([self.name, f"({', '.join(numbers)})"] if numbers else [self.name])


_CHOICES: dict[str, Any] = {"gate": Gate, "election": Election, "reduction": Reduction}


# Numbers of which there may be one for each model.
_FOR_EACH = ("density", "drop", "model_weights")

_FRACTION = (lambda x: 0.0 <= x < 1.0, "at least 0 and less than 1")
_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "density": (lambda x: 0.0 < x <= 1.0, "more than 0 and at most 1"),
    "gamma": _FRACTION,
    "drop": _FRACTION,
    "mask_scale": (lambda x: 0.0 <= x < math.inf, "a finite number of at least 0"),
    "model_weights": (math.isfinite, "a finite number"),
}


def in_order(differences: torch.Tensor) -> torch.Tensor:
    """The sum of differences in their order, from +0 on: as all naive versions add."""
    total = differences[0] * 0 + 0.0
    for each in differences:
        total = total + each
    return total

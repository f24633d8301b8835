"""The rule of NegMerge, to the bit.

For one element, with base weight b, fine-tuned weights x_1 ... x_n and scale λ (arXiv 2410.05583, section 4):

    d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
    agree = all d_k > 0  or  all d_k < 0
    out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

To the bit, so that every backend gives the same bits:

- The arithmetic type is float64 if the base or any model is stored as F64, else float32. λ is rounded to it once.
- Where model k is stored in a type that cannot hold every value of the base's type, d_k subtracts the base rounded to the
  model's type, as storing rounds, then widened. A weight that fine-tuning left alone is then no difference. Rounding may
  overflow, which makes d_k infinite. The last line takes the base as it is.
- The sum starts at +0 and adds d_1, d_2, … in the order the models were given. The mean is one IEEE division by n.
  Then t = λ · (-mean), rounded; then b + t, rounded. There is no fused multiply-add, and subnormals are kept.
  The result is rounded to the base's storage type, to nearest even (from float64 to F16 or BF16 by way of float32).
- A zero difference is no agreement. An element that does not agree keeps the base's bits, NaN payloads included.
- An element is non-finite when b, any d_k, or the result after rounding to storage is not finite. It keeps the
  base's bits, and is counted as non-finite and not as agreed.
- With min_agreement t, an element agrees when the larger of #(d>0) and #(d<0) is at least ceil(t·n - 1e-9) and more
  than n/2. The mean is then over the agreeing models only, added in the same order and divided by their number.
- An element is vetoed by zero when it is finite and does not agree, but would if each d_k of exactly zero had the sign of
  the majority: #(d=0) and the larger of #(d>0) and #(d<0) are together enough. Elements are agreed, non-finite, vetoed by zero
  or conflicting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from .choices import Choices
from .errors import InputError

Inputs = Literal["finetuned", "task_vectors"]
NonFinite = Literal["keep-base", "error"]


@dataclass(frozen=True)
class Rule:
    """What to compute, apart from the data.

    Attributes:
        scale: λ, any finite number (the paper searches 0 … 1). One that overflows the arithmetic type makes every element
            that agrees non-finite.
        min_agreement: The fraction of the models, in (0.5, 1], that must agree on the sign. 1.0 is the paper's unanimity.
        choices: What another method, or one with weights, does instead: the rule of choices.py. None is the rule above.

    Raises:
        InputError: If a number is out of range.
        TypeError: If it is no number.
    """

    scale: float
    min_agreement: float = 1.0
    choices: Choices | None = None

    def __post_init__(self) -> None:
        # Floats from here on: -scale of an unsigned integer is another number, and of the integer 0 another zero.
        for name in ("scale", "min_agreement"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        if not math.isfinite(self.scale):
            raise InputError(f"scale: {self.scale}, expected a finite number")
        if not 0.5 < self.min_agreement <= 1.0:
            raise InputError(f"min_agreement: {self.min_agreement}, expected more than 0.5 and at most 1")

    def required(self, models: int) -> int:
        """Return how many of the models must agree on the sign of an element."""
        # Always more than half: with a min_agreement within rounding of 0.5 both signs could reach half.
        return max(math.ceil(self.min_agreement * models - 1e-9), models // 2 + 1)


def as_float(name: str, value: object) -> float:
    """A number as a float. Raises TypeError or InputError if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name}: too large for a float, expected a finite number") from None

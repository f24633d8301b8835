"""The rule of the other methods, to the bit: a gate, an election, a reduction and a weight.

For one element, with d_k of rule.py, and with the numbers of a Choices and of the tensor's Terms:

    p_k = f_k · d_k                        (f_k: the factor of model k)
    e_k = p_k  if the gate lets d_k pass,  else +0
    r   = what the election leaves of e_1 … e_n, reduced to one number
    out = b - λ · (w · r)    if the element is chosen,   else b      (w: the element's weight)

To the bit, so that every backend gives the same bits:

- Numbers of the arithmetic type, rounded to it once: f_k, the votes v_k, bounds, the mask's λ_t and w. Every operation is rounded by
  itself, sums start at +0 and add in the order of the models, nothing is fused, and subnormals are kept, as rule.py says.
- Gates. NONE: all pass. MAGNITUDE: low_k ≤ |d_k| ≤ high_k. RANDOM: philox(seed, tensor, k, element) < keep_k (below).
- Elections. ALL: every e_k is elected. AGREEMENT: those of the sign of at least `required` of the e_k (rule.py); if no sign has so many,
  none. CONFLICT: all, unless all e_k > 0 or all e_k < 0; then none. SIGN_OF_SUM: those with the sign of e_1 + … + e_n, where a sum of
  zero counts as positive, and e_k of zero have no sign. COUNTED: all, if at least `required` of the e_k have one sign and their sum
  e_1 + … + e_n has it, too; else none. MASKS: all, if |e_k| ≥ λ_t · |S - e_k| for at least two k, with S = e_1 + … + e_n; else none.
- Reductions. SUM of the elected e_k. MEAN: that, divided by a sum of votes: of the elected models' with AGREEMENT and SIGN_OF_SUM, of
  all models' with the others. LARGEST: the elected e_k of the largest magnitude; of equal ones the last. Of none elected, and where the
  votes are zero, r = +0.
- w · r is rounded; without weights it is r. An element is chosen if that is not zero: a product that underflows changes nothing, and
  a delta (delta.py), whose mask has the means that are not zero, has the elements that are counted.
- Then t = λ · (-(w · r)) and b + t, rounded to storage, as in rule.py.
- An element is non-finite when b, any p_k, w · r, or (if it is chosen) the result after rounding to storage is not finite. It keeps
  the base's bits and is counted as non-finite only. An element that is not chosen keeps the base's bits, too.
- Counted are agreed (chosen and finite), non-finite, vetoed by zero (rule.py, of e_k in place of d_k and whatever the weight is; with
  AGREEMENT only, else 0), and masked: finite elements where r is not zero and w is.

The generator is Philox4x32-10 (Salmon et al., SC 2011). The key is the seed's low and high 32 bits; the counter is the low and the high
32 bits of i // 4, the CRC-32 of the tensor's name, and k, for element i of the whole tensor in row-major order and model k from 0. Its
number is word i % 4 of the four. What is chosen thus depends on no chunk, thread or rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .batch import Operand


class Gate(IntEnum):
    """Which differences take part. The numbers are those of csrc/family.h."""

    NONE = 0
    MAGNITUDE = 1
    RANDOM = 2


class Election(IntEnum):
    """Which of these are reduced."""

    ALL = 0
    AGREEMENT = 1
    CONFLICT = 2
    SIGN_OF_SUM = 3
    COUNTED = 4
    MASKS = 5


class Reduction(IntEnum):
    """What they are reduced to."""

    SUM = 0
    MEAN = 1
    LARGEST = 2


# keep of a model of which everything is kept.
KEEP_ALL = 1 << 32


@dataclass(frozen=True)
class Choices:
    """The choices of a method, and its numbers for each model, which are those of a merge's models in order.

    Attributes:
        gate: Which d_k pass.
        election: Which of them are elected.
        reduction: What they are reduced to.
        factors: f_k.
        votes: v_k, of MEAN.
        keep: Of RANDOM, how many of 2^32 numbers of the generator keep d_k; empty for other gates.
        seed: Of RANDOM, 0 … 2^64 - 1.
        mask_scale: λ_t, of MASKS.
    """

    gate: Gate
    election: Election
    reduction: Reduction
    factors: tuple[float, ...]
    votes: tuple[float, ...]
    keep: tuple[int, ...] = ()
    seed: int = 0
    mask_scale: float = 0.0


class Terms(NamedTuple):
    """What the rule needs to know of a segment beside its operands.

    Attributes:
        begin: The segment's first element in its tensor.
        key: The tensor's number in the generator: key_of.
        weight: Its weights, of the segment's elements; None without weights. Their dtype is one of WEIGHT_CODES.
        low, high: Of MAGNITUDE, the bounds for each model; empty for other gates.
    """

    begin: int
    key: int
    weight: Operand | None = None
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def at(self, start: int) -> Terms:
        """The terms of what begins so many elements later."""
        if not start:
            return self
        weight = self.weight
        if weight is not None:
            weight = weight._replace(address=weight.address + start * WEIGHT_SIZES[weight.dtype])
        return self._replace(begin=self.begin + start, weight=weight)


def key_of(name: str) -> int:
    """The number of a tensor in the generator."""
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))


# Storage types of weights, by code, and their sizes: those of models, and masks of integers that are 0 or 1 (or any number). SalUn saves I64.
WEIGHT_CODES = {"F64": 0, "F32": 1, "F16": 2, "BF16": 3, "U8": 4, "BOOL": 4, "I32": 5, "I64": 6}
WEIGHT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "I32": 4, "I64": 8}

# What is counted of a segment by this rule, in this order.
FAMILY_COUNTED = ("agreed", "nonfinite", "vetoed_by_zero", "masked")

"""What each tensor of a merge of checkpoints is merged by: its λ, and what another method needs to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..core.batch import Operand
from ..core.bounds import Bounds
from ..core.choices import Terms, key_of
from ..core.rule import Rule
from ..core.scales import Scales
from .plan import TensorSlice


@dataclass(frozen=True)
class Rules:
    """The rules of a merge's tensors.

    Attributes:
        rule: What is the same for all; and λ, if that is.
        scales: λ of each tensor, by name; None if the rule's is that of all.
        bounds: Of each tensor, by name, if the method needs some.
    """

    rule: Rule
    scales: Mapping[str, float] | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: Rule, scales: Scales, names: Iterable[str]) -> Rules:
        """The rules of tensors with these names.

        Raises:
            InputError: If the patterns of scales do not fit the names.
        """
        return cls(rule, None if scales.is_one else scales.by_name(names))

    def scale_of(self, name: str) -> float | None:
        """λ of a tensor, if it has one of its own."""
        return None if self.scales is None else self.scales[name]

    def with_scale(self, scale: float | None) -> Rule:
        """The rule with what scale_of returned."""
        return self.rule if scale is None else replace(self.rule, scale=scale)

    def terms(self, tensor_slice: TensorSlice, weight: Operand | None) -> Terms:
        """The terms of a slice, with its weights."""
        low, high = self.bounds.get(tensor_slice.name, ((), ()))
        return Terms(tensor_slice.start, key_of(tensor_slice.name), weight, low, high)

"""What a call may ask for beside NegMerge with one λ: another method, λ by patterns on names, a weight for each element.

A call without these imports nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..backends.pytorch import DTYPE_NAMES
from ..core.batch import Operand
from ..core.bounds import Bounds
from ..core.choices import WEIGHT_CODES, Election, Gate, Terms, key_of
from ..core.errors import InputError, some_names
from ..core.pairing import hint, pair_names
from ..core.pairing import notes as pairing_notes
from ..core.rule import Rule
from ..core.scales import Scale, Scales
from ..core.schema import TensorSpec
from ..methods.base import Method
from ..methods.catalogue import as_method
from . import dtensor
from .arrays import as_tensor, is_array
from .flatten import Item, memory_order, plain
from .names import SINGLE, Label, Model, Names, is_single, label_of, name_tensors

_NO_BOUNDS = Bounds((), ())


class Asked(NamedTuple):
    """What is asked for.

    Attributes:
        method: The method.
        scales: λ by names; None if one λ is the rule's.
        weights: A weight for each element, as models are passed; None without.
    """

    method: Method
    scales: Scales | None = None
    weights: Model | None = None


def scales_of(scale: Scale) -> Scales:
    """λ by names. Raises InputError or TypeError if it is neither a number nor patterns."""
    return Scales.of(scale if _has_patterns(scale) else Rule(scale).scale)  # type: ignore[arg-type]


def _has_patterns(scale: object) -> bool:
    return isinstance(scale, (Mapping, Sequence, Scales))


def ask(
    scale: Scale, min_agreement: float, method: str | Method, weights: Model | None
) -> tuple[Rule, Asked | None]:
    """Check the options of a call.

    Returns:
        The rule, whose λ counts if there are no patterns; and what else is asked for, None for NegMerge with one λ.
    """
    chosen = as_method(method)
    scales = scales_of(scale)
    rule = Rule(scales.pairs[0][1], min_agreement)
    if rule.min_agreement < 1 and chosen.election not in (Election.AGREEMENT, Election.COUNTED):
        raise InputError(f"min_agreement: {rule.min_agreement}, expected 1.0: {chosen.name} counts no signs")
    patterns = scales if _has_patterns(scale) else None
    if chosen.is_negmerge and patterns is None and weights is None:
        return rule, None
    return rule, Asked(chosen, patterns, weights)


class Family:
    """The rule and the terms of each tensor of a call.

    Attributes:
        method: The method.
        choices: Its choices; None for NegMerge without weights.
        weights: The weights of each tensor that has some, in its shape; of a DTensor those of this rank's shard.
        bounds: Of a method that needs them, the bounds of each tensor: to be assigned before terms are made.
    """

    def __init__(
        self,
        asked: Asked,
        items: Sequence[Item],
        models: int,
        weights: Mapping[str, torch.Tensor],
        dtensors: Mapping[str, Any],
        where: Label,
    ) -> None:
        self.method, self.weights = asked.method, weights
        self.choices = asked.method.choices(models, asked.weights is not None)
        self.bounds: Mapping[str, Bounds] = {}
        self._scales: Mapping[str, float] | None = None
        if asked.scales is not None:
            self._scales = asked.scales.by_name([str(item.name) for item in items])
        self._like = {item.name: item.versions[0] for item in items}
        self._begins = {
            item.name: self._begin(dtensors[item.name], where(None, item.name))
            for item in items
            if item.name in dtensors
        }

    def _begin(self, held: Any, where: str) -> int:
        """The number of the first element of a DTensor that this rank holds."""
        if (box := dtensor.box_of(held, where)) is None:
            return 0
        found = f"{where}: a shard from {box.offset} of shape {box.shape}"
        if self.method.needs_bounds:
            raise InputError(
                f"{found}, expected a whole tensor: method {self.method.name} compares all of its elements"
            )
        if not self.row_major:
            return 0
        if box.shape[1:] != tuple(held.shape)[1:]:
            raise InputError(
                f"{found}, expected one of the first dimension alone for method {self.method.name}"
            )
        return box.offset[0] * math.prod(box.shape[1:])

    @property
    def row_major(self) -> bool:
        """Whether the numbers of elements count, in row-major order."""
        return self.choices is not None and self.choices.gate == Gate.RANDOM

    def rule(self, rule: Rule, name: str | None = None) -> Rule:
        """The rule with the method's choices, and with the λ of a tensor."""
        scale = rule.scale if self._scales is None or name is None else self._scales[str(name)]
        return replace(rule, scale=scale, choices=self.choices)

    def groups(self, rule: Rule, items: Sequence[Item]) -> Iterator[tuple[Rule, list[Item]]]:
        """Items with one λ, and their rule."""
        found: dict[str, tuple[Rule, list[Item]]] = {}
        for item in items:
            of_item = self.rule(rule, item.name)
            found.setdefault(repr(of_item.scale), (of_item, []))[1].append(item)  # 0 and -0 are two
        yield from found.values()

    def terms(self, names: Sequence[str]) -> list[Terms] | None:
        """The terms of tensors in the order of their batches."""
        if self.choices is None:
            return None
        return [self._terms(name, self.row_major) for name in names]

    def row_terms(self, name: str) -> Terms | None:
        """The terms of a tensor in row-major order."""
        return None if self.choices is None else self._terms(name, row_major=True)

    def _terms(self, name: str, row_major: bool) -> Terms:
        low, high = self.bounds.get(name, _NO_BOUNDS)
        operand = None
        if (weight := self.weights.get(name)) is not None:
            ordered = weight if row_major else weight.permute(memory_order(self._like[name]))
            flat = ordered.resolve_neg().contiguous()
            operand = Operand(flat.data_ptr(), DTYPE_NAMES[flat.dtype], flat)
        return Terms(self._begins.get(name, 0), key_of(str(name)), operand, low, high)


def weights_of(
    weights: Model,
    base: Mapping[str, Any],
    items: Sequence[Item],
    tied: Mapping[str, str],
    names: Names,
    dtensors: Mapping[str, Any],
    where: Label,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Find the weights of tensors.

    Args:
        weights: As of merge.
        base: All tensors of the base.
        items: Those that are merged.
        tied: Other names of some of these, and the names.
        names: Renames the tensors of the weights.
        dtensors: The base's DTensors.
        where: Labels the base's tensors in errors; None is the base.

    Returns:
        The weights by the names of the items, and what a user should know, a line each.

    Raises:
        InputError, TypeError: If weights fit no tensor of the base.
    """
    if is_single(weights) != (SINGLE in base):
        kinds = type(weights).__name__, "a tensor" if SINGLE in base else "a mapping or a module"
        raise TypeError(f"weights: {kinds[0]}, expected {kinds[1]} like {where(None, SINGLE)}")
    named = name_tensors(weights, "weights")
    paired, notes = _pair(base, named, names)
    by_owner: dict[str, list[tuple[str, Any]]] = {}
    for name, own in paired.items():
        by_owner.setdefault(tied.get(name, name), []).append((_label(own), named[own]))
    found = {}
    for item in items:
        held = [
            _weight(value, label, item, dtensors.get(item.name), where)
            for label, value in by_owner.get(item.name, ())
        ]
        for (label, _), other in zip(by_owner.get(item.name, ()), held, strict=False):
            if other is not held[0] and not torch.equal(other, held[0]):
                raise InputError(
                    f"{label}: differs from {by_owner[item.name][0][0]}, expected equal: base ties these tensors"
                )
        if held:
            found[item.name] = held[0]
    if not found:
        raise InputError("weights: of no tensor that is merged, expected some")
    if missing := [item.name for item in items if item.name not in found]:
        notes.append(f"lacks {some_names(missing)}: the weights of their elements are 1")
    return found, [f"weights: {note}" for note in notes]


def _pair(
    base: Mapping[str, Any], named: Mapping[str, Any], names: Names
) -> tuple[dict[str, str], list[str]]:
    """The weights' names by the base's, and what was done to pair them. Tensors may be missing, but none may be more."""
    # As if all were to be merged: masks of bytes, too.
    wanted, given = ({name: TensorSpec("F32", ()) for name in each} for each in (base, named))
    found = pair_names(
        wanted, given, _no_twins, _no_twins, lambda name: name not in base, names.renames, "weights"
    )
    if unknown := [own for name, own in found.names.items() if name not in base]:
        said = hint(list(base), list(named))
        raise InputError(
            f"weights: {some_names(unknown)}: not in base, expected weights of its tensors{f'; {said}' if said else ''}"
        )
    return found.names, pairing_notes(found)


def _no_twins(name: str, others: object) -> list[str]:
    return []


def _label(name: str) -> str:
    return label_of("weights")(0, name)


def _weight(value: Any, label: str, item: Item, held: Any, where: Label) -> torch.Tensor:
    """The weights of a tensor, or of this rank's shard of it, on the memory that they are passed in."""
    like, base = item.versions[0], where(None, item.name)
    if is_array(value):
        value = as_tensor(value, label, written=False)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{label}: {type(value).__name__}, expected a tensor or an array")
    shape = tuple((like if held is None else held).shape)
    if (dtype := DTYPE_NAMES.get(value.dtype)) not in WEIGHT_CODES:
        raise InputError(f"{label}: {dtype or value.dtype}, expected one of {', '.join(WEIGHT_CODES)}")
    if tuple(value.shape) != shape:
        raise InputError(f"{label}: shape {tuple(value.shape)}, expected {shape} like {base}")
    if dtensor.is_dtensor(value):
        if problem := dtensor.difference(like if held is None else held, value):
            raise InputError(f"{label}: {problem} like {base}")
        found = plain(dtensor.local_shard(value, label), label)
    else:
        found = plain(value, label)
        if held is not None and (box := dtensor.box_of(held, base)):
            found = found[box.slices()]
    if found.device != like.device:
        raise InputError(f"{label}: on {found.device}, expected {like.device} like {base}")
    return found

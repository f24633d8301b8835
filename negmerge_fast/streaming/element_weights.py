"""Pairing of weights for each element, such as the masks of SalUn, with the tensors that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from ..checkpoints.base import Checkpoint, TensorRef
from ..core import pairing
from ..core.choices import WEIGHT_CODES
from ..core.errors import InputError, short_repr, some_names
from ..core.schema import TensorSpec

Tensors: TypeAlias = Mapping[str, TensorRef]


def pair_weights(
    base: Checkpoint, merged: Tensors, weights: Checkpoint, renames: pairing.Renames | None
) -> tuple[dict[str, TensorRef], list[str]]:
    """Find the weights of the tensors that are merged, by the base's names.

    Args:
        base: The base.
        merged: Those of its tensors that are merged.
        weights: What was opened. Names may differ from the base's as those of a model may.
        renames: What its names are changed to first.

    Returns:
        The weights, of what has some; and what a user should know, a line each.

    Raises:
        InputError: If they are of something that the base lacks, of other shapes or types, or of nothing that is merged.
    """
    if weights.adapter:
        raise InputError(f"{weights.path}: a LoRA adapter, expected a weight for each element")
    known = {**base.unindexed, **base.aliases, **base.tensors}
    given = {**weights.unindexed, **weights.aliases, **weights.tensors}
    # As floats: there may be weights for some tensors only, but all have to be for one of the base's, masks of bytes, too.
    paired = pairing.pair_names(
        {name: tensor.spec for name, tensor in known.items()},
        {name: TensorSpec("F32", tensor.spec.shape) for name, tensor in given.items()},
        _no_twins,
        _no_twins,
        lambda name: name not in known,
        renames,
        str(weights.path),
    )
    names = paired.names
    if unknown := [own for name, own in names.items() if name not in known]:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        hint = pairing.hint(known.keys(), given.keys())
        raise InputError(
            f"{weights.path}: tensor {short_repr(unknown[0])}{more}: not in base, expected weights of its tensors"
            + (f"; {hint}" if hint else "")
        )
    for name, owner in ((n, o) for file in base.weights.values() for n, o in file.aliases.items()):
        if name in names:
            names.setdefault(owner, names[name])
    found = {name: given[names[name]] for name in merged if name in names}
    if not found:
        raise InputError(f"{weights.path}: weights of no tensor that is merged, expected some")
    for name, (spec, source) in found.items():
        where = f"{source.file.path}: tensor {short_repr(names[name])}"
        if spec.dtype not in WEIGHT_CODES:
            raise InputError(f"{where}: {spec.dtype}, expected weights in one of {', '.join(WEIGHT_CODES)}")
        if spec.shape != (expected := merged[name].spec.shape):
            raise InputError(f"{where}: shape {spec.shape}, expected {expected} like base")
    said = pairing.notes(paired)
    if lacking := [name for name in merged if name not in found]:
        said.append(f"lacks {some_names(lacking)}: the weights of their elements are 1")
    return found, [f"{weights.path}: {phrase}" for phrase in said]


def _no_twins(name: str, others: object) -> list[str]:
    return []

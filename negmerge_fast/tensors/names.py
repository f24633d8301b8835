"""Models in memory by name: their tensors, which of them are merged, and which is the version of which of the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..backends.pytorch import DTYPE_NAMES, FLOAT_NAMES
from ..core import pairing
from ..core.dtypes import TORCH_NAMES
from ..core.errors import InputError
from ..core.schema import TensorSpec
from . import dtensor
from .aliasing import memory, same_bits
from .arrays import SupportsDLPack, as_tensor, is_array
from .flatten import plain, refuse_cut

_NAMES_BY_TEXT = {text: name for name, text in TORCH_NAMES.items()}

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | SupportsDLPack"
Model: TypeAlias = "Array | Mapping[str, torch.Tensor] | Mapping[str, Array] | torch.nn.Module"
# Labels a tensor in errors, given the model's number from 0 (None for the base) and the tensor's name.
Label: TypeAlias = Callable[["int | None", str], str]

# The name of the tensor of a model that is a single tensor.
SINGLE = ""


def is_single(model: object, arrays: bool = True) -> bool:
    """Whether a model is one tensor, or one array."""
    return isinstance(model, torch.Tensor) or (
        arrays and not isinstance(model, (Mapping, torch.nn.Module)) and is_array(model)
    )


def list_models(models: Any, label: str, arrays: bool = True) -> list[Any]:
    """A list of one or more models, from any iterable but a single model."""
    if (
        is_single(models, arrays)
        or isinstance(models, (Mapping, torch.nn.Module, str, bytes, os.PathLike))
        or not isinstance(models, Iterable)
    ):
        raise TypeError(f"{label}: {type(models).__name__}, expected a list of models")
    if not (listed := list(models)):
        raise InputError(f"{label}: no models, expected at least one")
    return listed


def label_of(models: str, reference: str = "base") -> Label:
    """Labels for the tensors of a call. models is the name of the argument that lists them; "tau" and "delta" are single models."""

    def where(k: int | None, name: str) -> str:
        model = (
            reference if k is None else models if models in ("tau", "delta", "weights") else f"{models}[{k}]"
        )
        return model if name == SINGLE else f"{model}[{name!r}]"

    return where


def named_label(models: Sequence[str], reference: str) -> Label:
    """Labels for the tensors of models that have labels themselves."""

    def where(k: int | None, name: str) -> str:
        model = reference if k is None else models[k]
        return model if name == SINGLE else f"{model}[{name!r}]"

    return where


def require_one_kind(base: Any, models: list[Any], where: Label, arrays: bool = True) -> None:
    """Raise TypeError unless the base and the models are all single tensors, or none is."""
    for k, model in enumerate(models):
        if is_single(model, arrays) != is_single(base, arrays):
            found, expected = type(model).__name__, type(base).__name__
            raise TypeError(f"{where(k, SINGLE)}: {found}, but {where(None, SINGLE)} is {expected}")


def name_tensors(model: Any, where: str, arrays: bool = True) -> dict[str, Any]:
    """The tensors of a model by name."""
    if is_single(model, arrays):
        return {SINGLE: model}
    if isinstance(model, torch.nn.Module):
        if torch.compiler.is_compiling():  # torch 2.6 and 2.7 cannot trace how a module makes its own dict
            return dict(model.state_dict(destination={}))
        return dict(model.state_dict())
    if isinstance(model, Mapping):
        return dict(model.items())
    kinds = "a tensor, an array, a mapping of these" if arrays else "a tensor, a mapping of tensors"
    raise TypeError(f"{where}: {type(model).__name__}, expected {kinds} or a module")


class Names:
    """What a call says of names: include, exclude and rename.

    Args:
        include: A regular expression. Only tensors whose name in the base matches are merged.
        exclude: A regular expression. Tensors whose name in the base matches are not merged.
        rename: Regular expressions and what replaces their matches in the models' names.

    Raises:
        InputError: If one is no regular expression.
    """

    def __init__(
        self,
        include: str | None = None,
        exclude: str | None = None,
        rename: pairing.Rename = (),
    ) -> None:
        self.include, self.exclude = include, exclude
        self.renames = pairing.compile_renames(rename)
        chosen = pairing.choice(include, exclude)
        self.all_chosen = chosen is None
        self.is_chosen: Callable[[str], bool] = cache(lambda name: chosen is None or chosen(str(name)))

    def choose(self, named: dict[str, Any]) -> dict[str, Any]:
        """The tensors that are chosen."""
        return named if self.all_chosen else {n: v for n, v in named.items() if self.is_chosen(n)}

    def unchoose(self, unchosen: Collection[str]) -> None:
        """Choose all names but these."""
        self.all_chosen = not unchosen
        self.is_chosen = lambda name: name not in unchosen

    def refuse_nothing(self, base: Mapping[str, Any], where: str) -> None:
        """Raise InputError if none of these tensors is chosen."""
        if not self.all_chosen and not any(map(self.is_chosen, base)):
            raise InputError(
                f"{where}: no tensor is chosen by include {self.include!r}, exclude {self.exclude!r}"
            )


NO_NAMES = Names()


class Paired(NamedTuple):
    """The chosen tensors of the base and of each model, by the base's names; and what was done to pair them."""

    named: list[dict[str, Any]]
    notes: dict[str, list[int]]


def pair_names(
    named: list[dict[str, Any]], names: Names, labels: list[str], reference: str, task_vectors: bool
) -> Paired:
    """Pair the tensors of models with those of the base where names differ.

    Args:
        named: All tensors of the base, and of each model.
        names: What the call says of names.
        labels: What to call each of the models in errors.
        reference: What to call the base.
        task_vectors: Whether models are task vectors, which need no integers.
    """
    base, *models = [_without_extra_state(model) for model in named]
    if not all(isinstance(name, str) for model in (base, *models) for name in model):
        return Paired([names.choose(model) for model in named], {})
    base_specs = specs_of(base)
    paired = [names.choose(named[0])]
    notes: dict[str, list[int]] = {}
    for k, model in enumerate(models):
        found = pairing.pair_names(
            base_specs,
            specs_of(model),
            _twins(base),
            _twins(model),
            names.is_chosen,
            names.renames,
            labels[k],
        )
        paired.append({n: model[own] for n, own in found.names.items() if names.is_chosen(n)})
        if task_vectors:
            found = replace(found, missing_integers=[], surplus_integers=[])
        # Of one memory nothing is guessed; of equal bits it is.
        told = replace(
            found,
            tied=_by_bits(found.tied, base),
            surplus=_by_bits(found.surplus, model),
            names={**found.names},
        )
        for name in found.tied.keys() - told.tied.keys():
            del told.names[name]
        for phrase in pairing.notes(told, reference):
            notes.setdefault(phrase, []).append(k)
    return Paired(paired, notes)


def _by_bits(tied: Mapping[str, str], named: Mapping[str, Any]) -> dict[str, str]:
    """Tied weights that do not share memory, and what they equal."""
    views = {name: viewed(named[name]) for pair in tied.items() for name in pair}
    return {
        name: owner
        for name, owner in tied.items()
        if (this := views[name]) is None or (other := views[owner]) is None or memory(this) != memory(other)
    }


def _without_extra_state(named: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not pairing.is_extra_state(name)}


def specs_of(named: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """dtypes and shapes of a model's tensors and arrays, whatever they are."""
    return {name: _spec(value) for name, value in named.items()}


def _spec(value: Any) -> TensorSpec:
    try:
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                return TensorSpec(DTYPE_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape))
        return TensorSpec(_NAMES_BY_TEXT.get(str(value.dtype), str(value.dtype)), tuple(value.shape))
    except (AttributeError, RuntimeError):  # no tensor; a nested one, without a shape
        return TensorSpec(type(value).__name__, ())


def _twins(named: dict[str, Any]) -> pairing.Twins:
    def twins(name: str, others: Collection[str]) -> list[str]:
        """Tensors with the same memory; else those with the same bits, if these are not all equal: many a bias is zero."""
        if (this := viewed(named[name])) is None:
            return []
        views = {other: t for other in others if (t := viewed(named[other])) is not None}
        if same := [other for other, t in views.items() if memory(t) == memory(this)]:
            return same
        if dtensor.is_dtensor(named[name]) or not this.numel() or bool((this == this.flatten()[0]).all()):
            return []
        return [
            o
            for o, t in views.items()
            if not dtensor.is_dtensor(named[o]) and t.device == this.device and same_bits(t, this)
        ]

    return twins


@torch.no_grad()
def viewed(value: Any) -> torch.Tensor | None:
    """A floating-point tensor or array as a plain tensor on its memory."""
    if is_array(value):
        value = as_tensor(value, "", written=False)
    elif dtensor.is_dtensor(value):
        value = value.to_local()
    try:
        found = plain(value, "") if isinstance(value, torch.Tensor) else None
        return found if found is not None and found.dtype in FLOAT_NAMES else None
    except (InputError, TypeError):  # without memory of its own
        return None


@torch.no_grad()
def copied(value: Any, where: str) -> Any:
    """A copy of what is not merged, whatever it is. Arrays that are not NumPy's become tensors."""
    if isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            return value
        held: Any = value
        if dtensor.is_dtensor(value):
            held = held.to_local()
        if held.layout is torch.strided and not (held.is_meta or held.is_nested):
            with suppress(RuntimeError):  # without memory, as inside torch.func.vmap
                refuse_cut(held, where)
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return as_tensor(value, where, written=False).clone() if is_array(value) else value

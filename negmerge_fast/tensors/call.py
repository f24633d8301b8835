"""One call of a merge: models are listed and named, tensors paired and checked, items merged in batches.

api.py, ops.py and graph.py all build on these functions, so that a mistake has one message everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..backends import registry
from ..backends.pytorch import FLOAT_NAMES
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, MergeWarning, require_choice, some_names, stacklevel
from ..core.pairing import hint, is_extra_state
from ..core.rule import Inputs, NonFinite, Rule
from ..core.schema import mismatches
from ..core.stats import Stats
from ..core.unmergeable import may_have_factors, refuse_factors, variances_below_zero
from ..runtime.interrupts import without_interrupts
from . import dtensor, modules
from .aliasing import memory, plainly_apart, refuse_shared_memory, tied
from .arrays import as_array, as_tensor, is_array
from .checks import (
    below_zero,
    holds_integers,
    refuse_different_integers,
    refuse_quantized,
)
from .counts import LEFT, Results, readable, stats_of, tell_of_earlier, tell_of_nonfinite
from .flatten import Item, batches, flat_items, plain, signatures, specs
from .names import (
    NO_NAMES,
    SINGLE,
    Label,
    Model,
    Names,
    copied,
    is_single,
    label_of,
    list_models,
    name_tensors,
    pair_names,
    require_one_kind,
    specs_of,
    viewed,
)


class ExtraState(NamedTuple):
    """A module's extra state, of any type: the base's is returned unchanged."""

    value: Any


def require_options(inputs: str, nonfinite: str) -> None:
    """Check the options that are choices of words."""
    require_choice("inputs", inputs, ("finetuned", "task_vectors"))
    require_choice("nonfinite", nonfinite, ("keep-base", "error"))


def pair(
    named: list[dict[str, Any]], flat: Mapping[str, Item], where: Label, reference: str
) -> tuple[dict[str, Item], list[dict[str, Any]]]:
    """Pair the tensors by name, and check those that are not flat.

    Returns:
        The items of all floating-point tensors, in the order of the base; and everything else that the base and each of the
            models have.

    Raises:
        InputError: If tensors do not fit each other.
        TypeError: If a value is no dense tensor.
    """
    if all(len(model) == len(flat) for model in named):
        return dict(flat), [{} for _ in named]
    base, *models = rest = [
        _checked({n: v for n, v in model.items() if n not in flat}, k - 1 if k else None, where)
        for k, model in enumerate(named)
    ]
    if problems := misfits(base, models, where, reference):
        texts = [{name: None for name in model if isinstance(name, str)} for model in named]
        hints = (hint(texts[0], model) for model in texts[1:])
        problems += [each for each in hints if each][:1]
        raise InputError("; ".join(problems))
    items = {
        name: flat.get(name) or Item(name, [m[name] for m in rest])
        for name in named[0]
        if name in flat or _is_float(base[name])
    }
    return items, [{name: value for name, value in m.items() if name not in items} for m in rest]


def _checked(named: dict[str, Any], k: int | None, where: Label) -> dict[str, Any]:
    """The tensors of a model, detached; extra state is wrapped."""
    checked: dict[str, Any] = {}
    for name, value in named.items():
        if is_extra_state(name):
            checked[name] = ExtraState(value)
        elif isinstance(value, torch.Tensor):
            checked[name] = plain(value, where(k, name))
        else:
            raise TypeError(f"{where(k, name)}: {type(value).__name__}, expected a tensor or an array")
    return checked


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in FLOAT_NAMES


def not_mergeable(where: str, dtype: object) -> InputError:
    """The error for a tensor that is not of a floating-point type."""
    return InputError(
        f"{where}: {dtype}, expected a floating-point type to merge, of {', '.join(FLOAT_SIZES)}"
    )


def misfits(base: dict[str, Any], models: list[dict[str, Any]], where: Label, reference: str) -> list[str]:
    """Differences that keep models from being merged into the base: in names, dtypes and shapes, else in devices."""
    return mismatches(specs(base), [specs(m) for m in models], where, reference) or [
        f"{where(k, name)}: {problem}"
        for k, model in enumerate(models)
        for name, tensor in base.items()
        if _is_float(tensor) and (problem := other_device(model[name], tensor, where(None, name)))
    ]


def other_device(tensor: torch.Tensor, like: torch.Tensor, label: str) -> str | None:
    """The difference between the devices of two tensors, as errors tell it."""
    return (
        None if tensor.device == like.device else f"on {tensor.device}, expected {like.device} like {label}"
    )


def nothing_to_merge(where: str, rest: Mapping[str, Any]) -> InputError:
    """The error for a model without a floating-point tensor that is chosen."""
    if SINGLE in rest:
        return not_mergeable(where, rest[SINGLE].dtype)
    dtypes = sorted({str(t.dtype) for t in rest.values() if isinstance(t, torch.Tensor)})
    tensors = "tensor" if len(rest) == 1 else "tensors"
    found = f"{len(rest):,} {tensors} of {', '.join(dtypes)}" if dtypes else "no tensors"
    return InputError(f"{where}: {found}, expected a floating-point one to merge ({', '.join(FLOAT_SIZES)})")


def refuse_aliasing(items: Sequence[Item], unwritten: Mapping[str, torch.Tensor], where: Label) -> None:
    """Raise InputError if a merge in place would write an element that it also uses elsewhere.

    unwritten holds the base's integer tensors: they could be views of its weights, and would change with them.
    """
    flat = [item.segment for item in items if item.segment]
    if len(flat) < len(items) or not plainly_apart(flat, unwritten.values()):
        refuse_shared_memory(_uses(items, unwritten, where))


def _uses(
    items: Sequence[Item], unwritten: Mapping[str, torch.Tensor], where: Label
) -> Iterator[tuple[torch.Tensor, bool, str]]:
    """Every tensor that a merge in place uses, whether it is written, and its label."""
    for item in items:
        for k, tensor in enumerate(item.versions):
            yield tensor, k == 0, where(k - 1 if k else None, item.name)
    for name, tensor in unwritten.items():
        yield tensor, False, where(None, name)


def run_batches(items: list[Item], rule: Rule, task_vectors: bool, backend: str) -> Results:
    """Merge items in batches. Returns the counts of each batch with the names and lengths of its segments."""
    # Backends are chosen for all devices first: nothing is written if one of the devices has none.
    merges = {
        str(device): registry.choose(backend, str(device), rule, signatures(items, device, task_vectors))[1]
        for device in {item.versions[1].device for item in items}
    }
    results = []
    for batch, names, finish in batches(items, task_vectors):
        counts = merges[batch.device](batch, rule)
        results.append(([(n, s.numel) for n, s in zip(names, batch.segments, strict=True)], counts))
        finish()
        del batch, finish  # frees the copies of a scattered tensor before the next are made
    return results


class Call:
    """One call on models of any kind: their tensors, paired and checked.

    Without a base (None), results are like the first of the models.

    Attributes:
        items: The tensors to merge, tied ones once.
        untouched: All else that was chosen of the base: integers, and extra state.
        kept: What was not chosen of the base.
        dtensors: The base's DTensors, by name.
    """

    def __init__(
        self,
        base: Model | None,
        models: Sequence[Model],
        label: str,
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        names: Names = NO_NAMES,
        in_place: bool = False,
        reference: str = "base",
    ) -> None:
        require_options(inputs, nonfinite)
        tell_of_earlier()
        listed = list_models(models, label)
        reference = f"{label}[0]" if base is None else reference
        self._has_base = base is not None
        base = listed[0] if base is None else base
        self.where, self.is_single = label_of(label, reference), is_single(base)
        self.task_vectors, self.nonfinite, self.backend = inputs == "task_vectors", nonfinite, backend
        self._notes: list[str] = []
        self._arrays: dict[str, np.dtype[Any]] = {}
        self.dtensors: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        self._modules = [model if isinstance(model, torch.nn.Module) else None for model in (base, *listed)]
        for k, module in enumerate(self._modules):
            if module is not None:
                modules.refuse_unmergeable(module, self.where(k - 1 if k else None, SINGLE))
        self._state = base if self._modules[0] is None else self._modules[0].state_dict()
        named = [name_tensors(self._state, reference)]
        require_one_kind(base, listed, self.where)
        named += [name_tensors(model, self.where(k, SINGLE)) for k, model in enumerate(listed)]
        self.names = list(named[0])
        named, flat = self._paired(named, names, reference, in_place)
        items, rest = pair(named, flat, self.where, reference)
        self.untouched = rest[0]
        if not items:
            raise nothing_to_merge(reference, self.untouched)
        if not self.task_vectors:
            refuse_different_integers(rest, self.where)
        self.tied = tied({name: item.versions for name, item in items.items()}, self.where)
        self._refuse_ties_across_placements(named[0])
        self._refuse_half_of_a_tie(items)
        self.items = [item for name, item in items.items() if name not in self.tied]
        for note in self._notes:
            warnings.warn(note, MergeWarning, stacklevel())

    def _paired(
        self, everything: list[dict[str, Any]], names: Names, reference: str, in_place: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Item]]:
        """The chosen tensors of all models by the base's names, arrays and DTensors as tensors; and the items of those that are flat."""
        names.refuse_nothing(everything[0], reference)
        named = [names.choose(model) for model in everything]
        self.kept = {} if names.all_chosen else {n: v for n, v in everything[0].items() if n not in named[0]}
        flat = flat_items(named)
        if not names.renames and all(len(model) == len(flat) for model in named):
            if may_have_factors(flat):
                refuse_factors(specs_of(named[0]), lambda name: self.where(None, name))
            return named, flat
        if names.renames or any(model.keys() != named[0].keys() for model in named):
            labels = [self.where(k, SINGLE) for k in range(len(named) - 1)]
            named, notes = pair_names(everything, names, labels, reference, self.task_vectors)
            for phrase, models in notes.items():
                more = f" and {len(models) - 1:,} more" if len(models) > 1 else ""
                self._notes.append(f"{labels[models[0]]}{more}: {phrase}")
            flat = flat_items(named)
        if self._view(named, flat, reference, in_place):
            flat = flat_items(named, flat)
        with torch._C.DisableTorchFunctionSubclass():
            self._refuse_unmergeable(named, flat)
        return named, flat

    def _refuse_unmergeable(self, named: list[dict[str, Any]], flat: Mapping[str, Item]) -> None:
        """Raise InputError for adapters and quantized weights."""
        for k, (model, module) in enumerate(zip(named, self._modules, strict=True)):

            def label(name: str, k: int = k) -> str:
                return self.where(k - 1 if k else None, name)

            if may_have_factors(model):
                refuse_factors(specs_of(model), label)
            rest = {n: v for n, v in model.items() if n not in flat and not is_extra_state(n)}
            has_integers = holds_integers(rest)
            refuse_quantized(rest, specs_of(model) if has_integers else {}, label)
            if has_integers and module is not None and (found := modules.quantized_parameter(module, model)):
                name, kind = found
                raise InputError(f"{label(name)}: {kind}: quantized weights, expected floating-point weights")

    @torch.no_grad()  # or DTensors would give their shards as views for autograd
    def _view(
        self, named: list[dict[str, Any]], flat: Mapping[str, Item], reference: str, in_place: bool
    ) -> bool:
        """Replace arrays and DTensors by tensors on their memory. Returns whether there were any."""
        rest = [{n: v for n, v in m.items() if n not in flat and not is_extra_state(n)} for m in named]
        base, *models = rest
        if problems := list(dtensor.mismatches(base, models, self.where, reference)):
            raise InputError("; ".join(problems))
        found = False
        for k, model in enumerate(rest):
            for name, value in model.items():
                where = self.where(k - 1 if k else None, name)
                if dtensor.is_dtensor(value):
                    if k == 0:
                        self.dtensors[name] = value
                    named[k][name] = dtensor.local_shard(value, where)
                elif is_array(value):
                    if k == 0 and isinstance(value, np.ndarray):
                        self._arrays[name] = value.dtype
                    named[k][name] = as_tensor(value, where, written=in_place and k == 0)
                else:
                    continue
                found = True
        return found

    def _refuse_ties_across_placements(self, base: Mapping[str, Any]) -> None:
        """Raise InputError if tied weights are DTensors with different placements: one update would not fit both."""
        for name, owner in self.tied.items() if self.dtensors else ():
            if problem := dtensor.difference(*[self.dtensors.get(n, base[n]) for n in (owner, name)]):
                tie = f"{self.where(None, owner)}, whose memory it has"
                raise InputError(f"{self.where(None, name)}: {problem} like {tie}")

    def _refuse_half_of_a_tie(self, items: Mapping[str, Item]) -> None:
        """Raise InputError if one of two tied weights is chosen and the other is not."""
        if not self.kept:
            return
        chosen = {memory(item.versions[0]): name for name, item in items.items() if item.versions[0].numel()}
        for name, value in self.kept.items():
            view = viewed(value)
            if view is not None and (owner := chosen.get(memory(view))):
                raise InputError(
                    f"{self.where(None, name)}: is not chosen, but tied to {self.where(None, owner)}, "
                    "which is: expected both or neither"
                )

    def unmerged(self) -> dict[str, Any]:
        """Copies of all that the base has beside what is merged, for a result; extra state is not copied."""
        copies: dict[str, Any] = {}
        for name, value in self.untouched.items():
            is_extra = isinstance(value, ExtraState)
            copies[name] = value.value if is_extra else self.empty_like(name, value).copy_(value)
        made: dict[Any, Any] = {}
        for name, value in self.kept.items():
            view = viewed(value)
            key = id(value) if view is None or not view.numel() else (type(value), memory(view))
            if key not in made:
                made[key] = copied(value, self.where(None, name))
            copies[name] = made[key]
        return copies

    def empty_like(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a result like a tensor of the base. For a DTensor it is this rank's shard of a new DTensor."""
        if name not in self.dtensors:
            return torch.empty_like(tensor, dtype=dtype)
        self._made[name] = torch.empty_like(self.dtensors[name], dtype=dtype)
        return dtensor.local_shard(self._made[name], self.where(None, name))

    def run(self, items: list[Item], rule: Rule) -> dict[str, Any]:
        """Merge items into their outputs, and return the outputs by name."""
        results = readable(run_batches(items, rule, self.task_vectors, self.backend))
        if self.nonfinite == "error":
            self.refuse_nonfinite(items, rule, stats_of(results))
        else:
            tell_of_nonfinite(results, self.names, LEFT if self._has_base else "set to 0")
        self._warn_of_variances(items)
        return {item.name: item.out for item in items}

    def run_in_place(self, rule: Rule) -> Stats:
        """Merge all items into the base."""
        self.check_in_place(self.items)
        if self.nonfinite == "error":
            self.run(self.items, rule)
        self.increment_versions()
        items = [Item(n, versions, s, versions[0]) for n, versions, s, _ in self.items]
        with without_interrupts():
            results = readable(run_batches(items, rule, self.task_vectors, self.backend))
        tell_of_nonfinite(results, self.names, LEFT)
        self._warn_of_variances(items)
        return stats_of(results)

    def check_in_place(self, items: Sequence[Item]) -> None:
        """Raise InputError if what is written is used elsewhere, too, or is no memory of the module."""
        rest = {n: t if isinstance(t, torch.Tensor) else None for n, t in self.untouched.items()}
        rest |= {name: viewed(value) for name, value in self.kept.items()}
        refuse_aliasing(items, {n: t for n, t in rest.items() if t is not None}, self.where)
        module = self._modules[0]
        if module is not None and (unshown := modules.refuse_copies(module, items, rest, self.where)):
            what = "parameters that the module's state dict does not have, which are not merged"
            text = f"{self.where(None, SINGLE)}: {some_names(unshown)}: {what}"
            warnings.warn(text, MergeWarning, stacklevel())

    def increment_versions(self) -> None:
        """Let autograd notice writes through addresses. It has a version each for a DTensor and for its shard."""
        dtensor_floats = [t for name, t in self.dtensors.items() if name not in self.untouched]
        written = [item.versions[0] for item in self.items] + dtensor_floats
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])

    def _warn_of_variances(self, items: list[Item]) -> None:
        """Warn of a network that a merge has broken, though it followed the rule."""
        if self._has_base and (names := below_zero({i.name: i.out for i in items if i.out is not None})):
            warnings.warn(f"the result: {variances_below_zero(names)}", MergeWarning, stacklevel())

    def like_base(self, merged: Mapping[str, Any]) -> Any:
        """Results of the base's kind: under its names, tied where it is, with NumPy arrays and DTensors where it has them."""
        owners = {name: owner for name in self.names if (owner := self.tied.get(name, name)) in merged}
        arrays = {
            owner: as_array(merged[owner], dtype)
            for name, owner in owners.items()
            if (dtype := self._arrays.get(name)) is not None
        }
        made = {**merged, **self._made}
        result = {
            name: arrays[owner] if name in self._arrays else made[owner] for name, owner in owners.items()
        }
        return result[SINGLE] if self.is_single else modules.like_state_dict(result, self._state)

    def refuse_nonfinite(self, items: list[Item], rule: Rule, stats: Stats) -> None:
        """Raise InputError for the first non-finite element."""
        # All ranks raise or none: a model must not be merged on some of them only.
        if not dtensor.on_any_rank(self.dtensors.values(), stats.nonfinite > 0):
            return
        for batch, names, _ in batches(items, self.task_vectors) if stats.nonfinite else ():
            if found := registry.first_nonfinite(batch, rule):
                row, index, version, value = found
                where = self.where(None if isinstance(version, str) else version, names[row])
                what = "the result is not finite" if version == "result" else value
                order = "memory order of this rank's shard" if names[row] in self.dtensors else "memory order"
                raise InputError(f"{where}: element {index} in {order}: {what}, expected finite numbers")
        raise InputError(
            "an element on another rank is not finite (the error there names it), expected finite numbers"
        )

"""One call of a merge: models are listed and named, tensors paired and checked, items merged in batches.

api.py, ops.py and graph.py all build on these functions, so that a mistake has one message everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..backends import registry
from ..backends.pytorch import FLOAT_NAMES
from ..core.batch import Batch
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, MergeWarning, require_choice, some_names, stacklevel
from ..core.low_rank import AdaptersAs, lacking
from ..core.pairing import hint, is_extra_state
from ..core.rule import Inputs, NonFinite, Rule
from ..core.schema import mismatches
from ..core.stats import Stats
from ..core.unmergeable import may_have_factors, refuse_factors, variances_below_zero
from ..runtime.interrupts import without_interrupts
from . import adapters, dtensor, low_rank, modules
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
    named_label,
    pair_names,
    require_one_kind,
    specs_of,
    viewed,
)

if TYPE_CHECKING:
    from ..core.bounds import Bounds
    from ..methods.base import Method
    from .family import Asked, Family


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


def refuse_aliasing(
    items: Sequence[Item],
    unwritten: Mapping[str, torch.Tensor],
    where: Label,
    others: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Raise InputError if a merge in place would write an element that it also uses elsewhere.

    Args:
        items: What is written, and its models.
        unwritten: The base's integer tensors: they could be views of its weights, and would change with them.
        where: Labels a tensor in errors.
        others: What else is read, by its label.
    """
    flat = [item.segment for item in items if item.segment]
    if len(flat) < len(items) or not plainly_apart(flat, [*unwritten.values(), *others.values()]):
        refuse_shared_memory(
            chain(_uses(items, unwritten, where), ((t, False, n) for n, t in others.items()))
        )


def _uses(
    items: Sequence[Item], unwritten: Mapping[str, torch.Tensor], where: Label
) -> Iterator[tuple[torch.Tensor, bool, str]]:
    """Every tensor that a merge in place uses, whether it is written, and its label."""
    for item in items:
        for k, tensor in enumerate(item.versions):
            yield tensor, k == 0, where(k - 1 if k else None, item.name)
    for name, tensor in unwritten.items():
        yield tensor, False, where(None, name)


def grouped(items: list[Item], rule: Rule, family: Family | None) -> Iterable[tuple[Rule, list[Item]]]:
    """Items of one λ, and their rule."""
    return [(rule, items)] if family is None else family.groups(rule, items)


def run_batches(
    items: list[Item], rule: Rule, task_vectors: bool, backend: str, family: Family | None = None
) -> Results:
    """Merge items in batches. Returns the counts of each batch with the names and lengths of its segments."""
    if family is not None:
        rule = family.rule(rule)
    # Backends are chosen for all devices first: nothing is written if one of the devices has none.
    merges = {
        str(device): registry.choose(backend, str(device), rule, signatures(items, device, task_vectors))[1]
        for device in {item.versions[1].device for item in items}
    }
    results = []
    for of_group, group in grouped(items, rule, family):
        for batch, names, finish in batches(group, task_vectors, family):
            counts = merges[batch.device](batch, of_group)
            results.append(([(n, s.numel) for n, s in zip(names, batch.segments, strict=True)], counts))
            finish()
            del batch, finish  # frees the copies of a scattered tensor before the next are made
    return results


class Call:
    """One call on models of any kind: their tensors, paired and checked.

    Without a base (None), results are like the first of the models.

    Attributes:
        items: The tensors to merge, tied ones once: the base's, and those of the models that are no adapters.
        models: How many models there are: each adapter is one.
        merged: Whether adapters are models that they are merged into, and not task vectors.
        untouched: All else that was chosen of the base: integers, and extra state.
        kept: What was not chosen of the base, and what no model changes if all are adapters.
        dtensors: The base's DTensors, by name.
        task_vectors: Whether models are merged as task vectors: with adapters all of them are, unless adapters are merged.
        family: The rules and terms of another method, of weights and of λ by names; None for NegMerge with one λ.
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
        adapters_as: AdaptersAs = "difference",
        asked: Asked | None = None,
    ) -> None:
        require_options(inputs, nonfinite)
        require_choice("adapters_as", adapters_as, ("difference", "merged"))
        tell_of_earlier()
        passed = list_models(models, label)
        reference = f"{label}[0]" if base is None else reference
        self._has_base = base is not None
        base = passed[0] if base is None else base
        where = label_of(label, reference)
        listed, self.where, self.models, self.merged = passed, where, len(passed), adapters_as == "merged"
        self._versions: list[adapters.Version] = []
        if any(map(adapters.may_be_adapters, passed)):
            self._versions = adapters.versions_of(passed, lambda k: where(k, SINGLE))
            self._refuse_odd_adapters(label, inputs)
            listed = [version.model for version in self._versions if not version.is_adapter]
            labels = [version.label for version in self._versions if not version.is_adapter]
            self.where, self.models = named_label(labels, reference), len(self._versions)
        self.is_single = is_single(base)
        self.task_vectors, self.nonfinite, self.backend = inputs == "task_vectors", nonfinite, backend
        self._notes: list[str] = []
        self._arrays: dict[str, np.dtype[Any]] = {}
        self.dtensors: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        self._modules = [model if isinstance(model, torch.nn.Module) else None for model in (base, *listed)]
        for k, module in enumerate(self._modules):
            if module is not None:
                modules.refuse_unmergeable(module, self.where(k - 1 if k else None, SINGLE))
        self._state = adapters.state_of(base, reference)
        named = [name_tensors(self._state, reference)]
        require_one_kind(base, listed, self.where)
        named += [name_tensors(model, self.where(k, SINGLE)) for k, model in enumerate(listed)]
        self.names = list(named[0])
        placed = self._placed(base, named[0], names, reference)
        named, flat = self._paired(named, names, reference, in_place)
        items, rest = pair(named, flat, self.where, reference)
        self.untouched = rest[0]
        if not items:
            raise nothing_to_merge(reference, self.untouched)
        if not self.task_vectors:
            refuse_different_integers(rest, self.where)
        self.tied = tied({name: item.versions for name, item in items.items()}, self.where)
        self._sources: dict[str, list[low_rank.Content]] | None = None
        if placed is not None:
            items = self._with_changes(items, placed, named[0], names, reference)
        self._refuse_ties_across_placements(named[0])
        self._refuse_half_of_a_tie(items)
        self.items = [item for name, item in items.items() if name not in self.tied]
        self.family = None if asked is None else self._family(asked, named[0], names)
        for note in self._notes:
            warnings.warn(note, MergeWarning, stacklevel())

    @torch.no_grad()
    def _family(self, asked: Asked, base: Mapping[str, Any], names: Names) -> Family:
        """The rules and terms of the items."""
        from .family import Family, weights_of

        weights: dict[str, torch.Tensor] = {}
        if asked.weights is not None:
            known = {**base, **self.kept}
            weights, notes = weights_of(
                asked.weights, known, self.items, self.tied, names, self.dtensors, self.where
            )
            self._notes += notes
        family = Family(asked, self.items, self.models, weights, self.dtensors, self.where)
        if family.method.needs_bounds:
            family.bounds = self._bounds(family.method)
        return family

    def _bounds(self, method: Method) -> dict[str, Bounds]:
        """The bounds of the items. What is copied or computed for them lives as long as that of others is needed, too."""
        from ..backends.magnitudes import bounds_in_memory

        if method.over == "model":
            return bounds_in_memory(chain.from_iterable(self._unwritten()), method)
        return dict(chain.from_iterable(bounds_in_memory(each, method).items() for each in self._unwritten()))

    def _unwritten(self) -> Iterator[list[tuple[Batch, list[str]]]]:
        """Batches of all items, without outputs, and the names of their segments. All of a tensor is in one list."""
        items = [item for item in self.items if item.versions[0].numel()]
        if self._sources is None:
            for batch, names, _ in batches(items, self.task_vectors):
                yield [(batch, names)]
            return
        for mixed in map(self.mixed, items):
            assert mixed
            yield low_rank.unwritten(mixed, self.merged, self.task_vectors)

    def _refuse_odd_adapters(self, label: str, inputs: str) -> None:
        """Raise InputError for adapters where they mean nothing."""
        found = [version for version in self._versions if version.is_adapter]
        if not self._has_base:
            raise InputError(
                f"{found[0].label}: an adapter, expected a task vector: nm.merge takes adapters, and their base"
            )
        if label == "tau" and len(found) > 1:
            raise InputError(f"{label}: {len(found)} adapters, expected one")
        if self.merged and inputs == "task_vectors":
            raise InputError("adapters_as: 'merged', expected 'difference' beside task vectors")

    def _placed(
        self, base: Any, named: Mapping[str, Any], names: Names, reference: str
    ) -> adapters.Placed | None:
        """The adapters on the base's tensors; None if there are none."""
        if not self._versions:
            return None
        if self.is_single:
            first = next(version for version in self._versions if version.is_adapter)
            raise TypeError(f"{first.label}: an adapter, but {reference} is {type(base).__name__}")
        placed = adapters.place_all(self._versions, named, adapters.config_of(base), names.renames, reference)
        self._note([version.label for version in self._versions], placed.notes)
        return placed

    def _note(self, labels: Sequence[str], notes: Mapping[str, Sequence[int]]) -> None:
        """Say what was done with models, once for all of which it is the same."""
        for phrase, models in notes.items():
            more = f" and {len(models) - 1:,} more" if len(models) > 1 else ""
            self._notes.append(f"{labels[models[0]]}{more}: {phrase}")

    def _with_changes(
        self,
        items: dict[str, Item],
        placed: adapters.Placed,
        base: Mapping[str, Any],
        names: Names,
        reference: str,
    ) -> dict[str, Item]:
        """The tensors to merge with adapters: without a full model among the models, those that one of them changes."""
        twins: dict[str, list[str]] = {}
        for name, owner in self.tied.items():
            twins.setdefault(owner, []).append(name)
        self._sources, found = {}, {}
        labels = [version.label for version in self._versions]
        for name, item in items.items():
            if name in self.tied:
                found[name] = item
                continue
            full = iter(item.versions[1:])
            tied_names = [name, *twins.get(name, ())]
            changes = placed.of(tied_names, self._versions)
            for phrase, models in placed.half_of_ties(tied_names, reference).items():
                self._note(labels, {phrase: models})
            self._sources[name] = [
                change if version.is_adapter else next(full)
                for version, change in zip(self._versions, changes, strict=True)
            ]
            if len(item.versions) > 1 or any(change is not None for change in changes):
                found[name] = item
        found = {name: item for name, item in found.items() if self.tied.get(name, name) in found}
        if not found:
            raise InputError(
                f"{reference}: no tensor that an adapter changes is chosen by include {names.include!r}, exclude {names.exclude!r}"
            )
        touched = [
            [name for name in self._sources if self._sources[name][k] is not None]
            for k, version in enumerate(self._versions)
            if version.is_adapter
        ]
        self._notes += lacking(touched, found.keys() & self._sources.keys())
        self.kept |= {name: self.dtensors.get(name, base[name]) for name in items if name not in found}
        self.tied = {name: owner for name, owner in self.tied.items() if name in found}
        return found

    def mixed(self, item: Item) -> low_rank.Mixed | None:
        """A tensor with what adapters change in it; None if there are no adapters."""
        if self._sources is None:
            return None
        held, where = self.dtensors.get(item.name), self.where(None, item.name)
        box = None if held is None else dtensor.box_of(held, where)
        shape = tuple((item.versions[0] if held is None else held).shape)
        return low_rank.Mixed(item, self._sources[item.name], box, shape, where)

    def _adapter_tensors(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """What adapters change tensors with, by labels."""
        if self._sources is None:
            return {}
        return {
            f"{version.label}: {item.name!r}{part}": tensor
            for item in items
            for version, source in zip(self._versions, self._sources[item.name], strict=True)
            if version.is_adapter
            for part, tensor in adapters.labelled_parts(source)
            if tensor.device == item.versions[0].device
        }

    def _merge_items(self, items: list[Item], rule: Rule) -> Results:
        if self._sources is None:
            return run_batches(items, rule, self.task_vectors, self.backend, self.family)
        tensors = [mixed for item in items if (mixed := self.mixed(item))]
        return low_rank.run(tensors, rule, self.merged, self.task_vectors, self.backend, self.family)

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
            self._note(labels, notes)
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
        results = readable(self._merge_items(items, rule))
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
            results = readable(self._merge_items(items, rule))
        tell_of_nonfinite(results, self.names, LEFT)
        self._warn_of_variances(items)
        return stats_of(results)

    def check_in_place(self, items: Sequence[Item]) -> None:
        """Raise InputError if what is written is used elsewhere, too, or is no memory of the module."""
        rest = {n: t if isinstance(t, torch.Tensor) else None for n, t in self.untouched.items()}
        rest |= {name: viewed(value) for name, value in self.kept.items()}
        read = {n: t for n, t in rest.items() if t is not None}
        others = self._adapter_tensors(items)
        if self.family is not None:
            others |= {f"the weights of {self.where(None, n)}": t for n, t in self.family.weights.items()}
        refuse_aliasing(items, read, self.where, others)
        module = self._modules[0]
        if module is not None and (unshown := modules.refuse_copies(module, items, rest, self.where)):
            what = "parameters that the module's state dict does not have, which are not merged"
            text = f"{self.where(None, SINGLE)}: {some_names(unshown)}: {what}"
            warnings.warn(text, MergeWarning, stacklevel())

    def increment_versions(self) -> None:
        """Let autograd notice writes through addresses. It has a version each for a DTensor and for its shard."""
        written = [item.versions[0] for item in self.items]
        names = {item.name for item in self.items} | self.tied.keys() if self.dtensors else ()
        written += [tensor for name, tensor in self.dtensors.items() if name in names]
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
        if stats.nonfinite and self._sources is not None:
            self._refuse_nonfinite_mixed(items, rule, stats)
        for of_group, group in grouped(items, rule, self.family) if stats.nonfinite else ():
            for batch, names, _ in batches(group, self.task_vectors, self.family):
                if found := registry.first_nonfinite(batch, of_group):
                    row, index, version, value = found
                    where = self.where(None if isinstance(version, str) else version, names[row])
                    raise self._nonfinite_at(where, names[row], index, version, value)
        raise InputError(
            "an element on another rank is not finite (the error there names it), expected finite numbers"
        )

    def _refuse_nonfinite_mixed(self, items: list[Item], rule: Rule, stats: Stats) -> None:
        """The same with adapters among the models."""
        for item in items:
            mixed = self.mixed(item)
            if mixed is None or not stats.tensors[item.name].nonfinite:
                continue
            if found := low_rank.first_nonfinite(mixed, rule, self.merged, self.task_vectors, self.family):
                index, version, value = found
                where = self.where(None, item.name)
                if not isinstance(version, str):
                    where = f"{self._versions[version].label}[{item.name!r}]"
                raise self._nonfinite_at(where, item.name, index, version, value)

    def _nonfinite_at(self, where: str, name: str, index: int, version: int | str, value: str) -> InputError:
        if version == "weights":
            where = label_of(version)(0, name)
        what = "the result is not finite" if version == "result" else value
        order = "memory order of this rank's shard" if name in self.dtensors else "memory order"
        return InputError(f"{where}: element {index} in {order}: {what}, expected finite numbers")

"""One call of merge: tensors paired by name and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..backends import registry
from ..core.errors import InputError, require_choice
from ..core.rule import Inputs, NonFinite, Rule
from ..core.schema import mismatches
from ..core.stats import Stats
from ..runtime.interrupts import without_gc, without_interrupts
from . import dtensor
from .aliasing import plainly_apart, refuse_shared_memory, tied
from .arrays import SupportsDLPack, as_tensor, is_array
from .flatten import FLOATS, Item, batches, flat_item, plain, signatures, specs

if TYPE_CHECKING:
    pass  # of typing since Python 3.11

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | SupportsDLPack"
Model: TypeAlias = "Array | Mapping[str, torch.Tensor] | Mapping[str, Array] | torch.nn.Module"


# The name of the one tensor of a model that is just a tensor.
_SINGLE = ""


class _ExtraState(NamedTuple):
    """What a module says of itself beside its tensors: the base's, untouched, whatever it is."""

    value: Any


class _Call:
    """One call: the tensors paired by name and checked, and how to run and describe them."""

    @without_gc()
    def __init__(
        self,
        base: Model,
        finetuned: Sequence[Model],
        label: str,
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        reference: str = "base",
        in_place: bool = False,
    ) -> None:
        require_choice("inputs", inputs, ("finetuned", "task_vectors"))
        require_choice("nonfinite", nonfinite, ("keep-base", "error"))

        def where(k: int | None, name: str) -> str:
            model = reference if k is None else label if label == "tau" else f"{label}[{k}]"
            return model if name == _SINGLE else f"{model}[{name!r}]"

        self.where, self.task_vectors, self.in_place = where, inputs == "task_vectors", in_place
        self.nonfinite, self.backend = nonfinite, backend
        named = [_named(base, where(None, _SINGLE))]
        models = _models(finetuned, label)
        for k, model in enumerate(models):
            if _is_single(model) != _is_single(base):
                raise TypeError(
                    f"{where(k, _SINGLE)}: {type(model).__name__}, but {reference} is {type(base).__name__}"
                )
        named += [_named(model, where(k, _SINGLE)) for k, model in enumerate(models)]
        self._pair(named, reference)
        if not self.items:
            registry.choose(backend, "cpu")  # refuses what there is not

    def _pair(self, named: list[dict[str, Any]], reference: str) -> None:
        self.names = list(named[0])
        # As a rule these are all, and nothing is left for the closer look that follows.
        flat = {name: item for name in self.names if (item := flat_item(name, named))}
        self.arrays: set[str] = set()
        self.dtensors: dict[str, Any] = {}
        self.made: dict[str, Any] = {}
        if len(flat) < len(self.names) and self._view(named, flat, reference):
            flat = {name: item for name in self.names if (item := flat.get(name) or flat_item(name, named))}
        base, *models = rest = [
            _checked({n: v for n, v in model.items() if n not in flat}, partial(self.where, k))
            for k, model in zip([None, *range(len(named) - 1)], named, strict=True)
        ]
        problems = mismatches(
            specs(base), [specs(m) for m in models], self.where, self.task_vectors, reference
        ) or list(_other_devices(base, models, self.where))
        if problems:
            raise InputError("; ".join(problems))
        items = {
            name: flat.get(name) or Item(name, [m[name] for m in rest])
            for name in self.names
            if name in flat or _is_float(base[name])
        }
        self.tied = tied({name: item.versions for name, item in items.items()}, self.where)
        self._refuse_ties_across_placements(named[0])
        self.items = [item for name, item in items.items() if name not in self.tied]
        self.untouched = {name: value for name, value in base.items() if name not in items}

    @torch.no_grad()  # DTensors give what they hold as it is, not a view for autograd
    def _view(self, named: list[dict[str, Any]], flat: Mapping[str, Item], reference: str) -> bool:
        """Put tensors in the place of arrays and DTensors, among the names that are not flat; whether there were any."""
        rest = [{n: v for n, v in m.items() if n not in flat and not _is_extra_state(n)} for m in named]
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
                        self.arrays.add(name)
                    named[k][name] = as_tensor(value, where, written=self.in_place and k == 0)
                else:
                    continue
                found = True
        return found

    def _refuse_ties_across_placements(self, base: Mapping[str, Any]) -> None:
        for name, owner in self.tied.items() if self.dtensors else ():
            if problem := dtensor.difference(*[self.dtensors.get(n, base[n]) for n in (owner, name)]):
                tie = f"{self.where(None, owner)}, whose memory it has"
                raise InputError(f"{self.where(None, name)}: {problem} like {tie}")

    def empty_like(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a result like the base's tensor of that name; of a DTensor, this rank's shard of a new one."""
        if name not in self.dtensors:
            return torch.empty_like(tensor, dtype=dtype)
        self.made[name] = torch.empty_like(self.dtensors[name], dtype=dtype)
        return dtensor.local_shard(self.made[name], self.where(None, name))

    def like_base(self, merged: Mapping[str, Any]) -> dict[str, Any]:
        """The results under the base's names, tied ones again, as arrays of numpy and DTensors where the base's are."""
        owners = {name: owner for name in self.names if (owner := self.tied.get(name, name)) in merged}
        arrays = {owner: merged[owner].numpy() for name, owner in owners.items() if name in self.arrays}
        made = {**merged, **self.made}
        return {name: arrays[owner] if name in self.arrays else made[owner] for name, owner in owners.items()}

    def run(self, items: list[Item], rule: Rule) -> Stats:
        stats = Stats()
        # For all devices first: nothing is written if one of them has no such backend.
        merges = {
            str(device): registry.choose(
                self.backend, str(device), rule, signatures(items, device, self.task_vectors)
            )[1]
            for device in {item.versions[1].device for item in items}
        }
        for batch, names, finish in batches(items, self.task_vectors):
            counts = merges[batch.device](batch, rule)
            stats.add([(n, s.numel) for n, s in zip(names, batch.segments, strict=True)], counts)
            finish()
            del batch, finish  # and with them the copies of scattered tensors, before the next are made
        return stats

    def run_in_place(self, rule: Rule) -> Stats:
        # They are the base's, untouched: a view of the weights as integers would not be.
        integers = {n: t for n, t in self.untouched.items() if isinstance(t, torch.Tensor)}
        flat = [item.segment for item in self.items if item.segment]
        if len(flat) < len(self.items) or not plainly_apart(flat, integers.values()):
            refuse_shared_memory(self._uses(integers))
        if self.nonfinite == "error":
            self.refuse_nonfinite(self.items, rule, self.run(self.items, rule))
        # Autograd must notice what is written through addresses, too; of a DTensor, it counts both.
        dtensor_floats = [t for name, t in self.dtensors.items() if name not in self.untouched]
        for tensor in [item.versions[0] for item in self.items] + dtensor_floats:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        items = [Item(n, versions, s, versions[0]) for n, versions, s, _ in self.items]
        with without_interrupts():
            return self.run(items, rule)

    def _uses(self, integers: Mapping[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool, str]]:
        """Every tensor that a merge in place uses, whether it is written, and what to call it."""
        for item in self.items:
            for k, tensor in enumerate(item.versions):
                yield tensor, k == 0, self.where(k - 1 if k else None, item.name)
        for name, tensor in integers.items():
            yield tensor, False, self.where(None, name)

    def refuse_nonfinite(self, items: list[Item], rule: Rule, stats: Stats) -> None:
        if self.nonfinite == "keep-base":
            return
        # All ranks raise, or none: a model must not be merged on some of them only.
        if not dtensor.on_any_rank(self.dtensors.values(), stats.nonfinite > 0):
            return
        for batch, names, _ in batches(items, self.task_vectors) if stats.nonfinite else ():
            if found := registry.first_nonfinite(batch, rule):
                row, index, version, value = found
                place = self.where(None if isinstance(version, str) else version, names[row])
                what = "the result is not finite" if version == "result" else f"{value}"
                order = "memory order of this rank's shard" if names[row] in self.dtensors else "memory order"
                raise InputError(f"{place}: element {index} in {order}: {what}, expected finite numbers")
        raise InputError(
            "an element on another rank is not finite (the error there names it), expected finite numbers"
        )


def _models(models: Sequence[Model], label: str) -> list[Model]:
    if (
        _is_single(models)
        or isinstance(models, (Mapping, torch.nn.Module))
        or not isinstance(models, Iterable)
    ):
        raise TypeError(f"{label}: {type(models).__name__}, expected a list of models")
    if not (listed := list(models)):
        raise InputError(f"{label}: no models, expected at least one")
    return listed


def _is_single(model: object) -> bool:
    """Whether a model is one tensor, or one array."""
    return isinstance(model, torch.Tensor) or (
        not isinstance(model, (Mapping, torch.nn.Module)) and is_array(model)
    )


def _named(model: Model, where: str) -> dict[str, Any]:
    if _is_single(model):
        return {_SINGLE: model}
    if isinstance(model, torch.nn.Module):
        return dict(model.state_dict())
    if isinstance(model, Mapping):
        return dict(model.items())
    raise TypeError(
        f"{where}: {type(model).__name__}, expected a tensor, an array, a mapping of these or a module"
    )


def _checked(named: dict[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """The tensors, detached; a module's extra state is kept as it is."""
    checked: dict[str, Any] = {}
    for name, value in named.items():
        if _is_extra_state(name):
            checked[name] = _ExtraState(value)
        elif isinstance(value, torch.Tensor):
            checked[name] = plain(value, where(name))
        else:
            raise TypeError(f"{where(name)}: {type(value).__name__}, expected a tensor or an array")
    return checked


def _is_extra_state(name: str) -> bool:
    return str(name).endswith("_extra_state")


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS


def _other_devices(
    base: dict[str, Any], models: list[dict[str, Any]], where: Callable[[int | None, str], str]
) -> Iterator[str]:
    for k, model in enumerate(models):
        for name, tensor in base.items():
            if _is_float(tensor) and model[name].device != tensor.device:
                yield f"{where(k, name)}: on {model[name].device}, expected {tensor.device} like {where(None, name)}"

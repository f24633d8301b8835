"""One call of a merge: models are listed and named, tensors paired and checked, items merged in batches.

api.py, ops.py and graph.py all build on these functions, so that a mistake has one message everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..backends import registry
from ..backends.pytorch import FLOAT_NAMES
from ..core.batch import Counts
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, require_choice
from ..core.rule import Inputs, NonFinite, Rule
from ..core.schema import mismatches
from ..core.stats import Stats
from ..runtime.interrupts import without_gc, without_interrupts
from . import dtensor
from .aliasing import plainly_apart, refuse_shared_memory, tied
from .arrays import SupportsDLPack, as_array, as_tensor, is_array
from .flatten import Item, batches, flat_item, plain, signatures, specs

Array: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | SupportsDLPack"
Model: TypeAlias = "Array | Mapping[str, torch.Tensor] | Mapping[str, Array] | torch.nn.Module"
# Labels a tensor in errors, given the model's number from 0 (None for the base) and the tensor's name.
Label: TypeAlias = Callable[["int | None", str], str]

# The name of the tensor of a model that is a single tensor.
SINGLE = ""


class ExtraState(NamedTuple):
    """A module's extra state, of any type: the base's is returned unchanged."""

    value: Any


def is_single(model: object, arrays: bool = True) -> bool:
    """Whether a model is one tensor, or one array."""
    return isinstance(model, torch.Tensor) or (
        arrays and not isinstance(model, (Mapping, torch.nn.Module)) and is_array(model)
    )


def is_extra_state(name: str) -> bool:
    """Whether a name of a state dict is that of a module's extra state."""
    return str(name).endswith("_extra_state")


def require_options(inputs: str, nonfinite: str) -> None:
    """Check the options that are choices of words."""
    require_choice("inputs", inputs, ("finetuned", "task_vectors"))
    require_choice("nonfinite", nonfinite, ("keep-base", "error"))


def list_models(models: Any, label: str, arrays: bool = True) -> list[Any]:
    """A list of one or more models, from any iterable but a single model."""
    if (
        is_single(models, arrays)
        or isinstance(models, (Mapping, torch.nn.Module))
        or not isinstance(models, Iterable)
    ):
        raise TypeError(f"{label}: {type(models).__name__}, expected a list of models")
    if not (listed := list(models)):
        raise InputError(f"{label}: no models, expected at least one")
    return listed


def label_of(models: str, reference: str = "base") -> Label:
    """Labels for the tensors of a call. models is the name of the argument that lists them; "tau" is a single model."""

    def where(k: int | None, name: str) -> str:
        model = reference if k is None else models if models == "tau" else f"{models}[{k}]"
        return model if name == SINGLE else f"{model}[{name!r}]"

    return where


def name_tensors(base: Any, models: list[Any], where: Label, arrays: bool = True) -> list[dict[str, Any]]:
    """The tensors of the base and of each model, by name. All must be single tensors, or none."""
    named = [_named(base, where(None, SINGLE), arrays)]
    for k, model in enumerate(models):
        if is_single(model, arrays) != is_single(base, arrays):
            found, expected = type(model).__name__, type(base).__name__
            raise TypeError(f"{where(k, SINGLE)}: {found}, but {where(None, SINGLE)} is {expected}")
    return named + [_named(model, where(k, SINGLE), arrays) for k, model in enumerate(models)]


def _named(model: Any, where: str, arrays: bool) -> dict[str, Any]:
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


def flat_items(named: list[dict[str, Any]]) -> dict[str, Item]:
    """Items of the names whose tensors can be merged where they are. They need no further check."""
    return {name: item for name in named[0] if (item := flat_item(name, named))}


def pair(
    named: list[dict[str, Any]], flat: Mapping[str, Item], where: Label, task_vectors: bool, reference: str
) -> tuple[dict[str, Item], dict[str, Any]]:
    """Pair the tensors by name, and check those that are not flat.

    Returns:
        The items of all floating-point tensors, in the order of the base; and everything else that the base has.

    Raises:
        InputError: If tensors do not fit each other.
        TypeError: If a value is no dense tensor.
    """
    base, *models = rest = [
        _checked({n: v for n, v in model.items() if n not in flat}, k - 1 if k else None, where)
        for k, model in enumerate(named)
    ]
    if problems := misfits(base, models, where, task_vectors, reference):
        raise InputError("; ".join(problems))
    items = {
        name: flat.get(name) or Item(name, [m[name] for m in rest])
        for name in named[0]
        if name in flat or _is_float(base[name])
    }
    return items, {name: value for name, value in base.items() if name not in items}


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


def misfits(
    base: dict[str, Any], models: list[dict[str, Any]], where: Label, task_vectors: bool, reference: str
) -> list[str]:
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


def run_batches(
    items: list[Item], rule: Rule, task_vectors: bool, backend: str
) -> list[tuple[list[tuple[str, int]], Counts]]:
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


def stats_of(results: Sequence[tuple[list[tuple[str, int]], Counts]]) -> Stats:
    """The statistics of what run_batches returned, which may be read on any stream."""
    stats = Stats()
    gpus = {counts.device for _, counts in results if isinstance(counts, torch.Tensor) and counts.is_cuda}
    events: dict[Any, Any] = {device: event for device in gpus if (event := _event_now(device))}
    for segments, counts in results:
        event = events.get(getattr(counts, "device", None))
        stats.add(segments, StreamCounts(counts, event) if event else counts)
    return stats


class StreamCounts(NamedTuple):
    """Counts that a stream writes. Their reader may have another current stream, and Stats does not show them to it."""

    counts: Counts
    written: torch.cuda.Event

    def tolist(self) -> Any:
        self.written.synchronize()
        return self.counts.tolist()


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """An event on the current stream of a device. None in a capture: counts are written by replays, which no event tells."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class Call:
    """One call on models of any kind: their tensors, paired and checked.

    Without a base (None), results are like the first of the models.
    """

    @without_gc()
    def __init__(
        self,
        base: Model | None,
        models: Sequence[Model],
        label: str,
        inputs: Inputs,
        nonfinite: NonFinite,
        backend: str,
        in_place: bool = False,
    ) -> None:
        require_options(inputs, nonfinite)
        listed = list_models(models, label)
        reference = f"{label}[0]" if base is None else "base"
        base = listed[0] if base is None else base
        self.where, self.is_single = label_of(label, reference), is_single(base)
        self.task_vectors, self.nonfinite, self.backend = inputs == "task_vectors", nonfinite, backend
        named = name_tensors(base, listed, self.where)
        self.names = list(named[0])
        self._arrays: dict[str, np.dtype[Any]] = {}
        self._dtensors: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        flat = flat_items(named)
        if len(flat) < len(self.names) and self._view(named, flat, reference, in_place):
            flat = {name: item for name in self.names if (item := flat.get(name) or flat_item(name, named))}
        items, self.untouched = pair(named, flat, self.where, self.task_vectors, reference)
        self.tied = tied({name: item.versions for name, item in items.items()}, self.where)
        self._refuse_ties_across_placements(named[0])
        self.items = [item for name, item in items.items() if name not in self.tied]
        if not self.items:
            registry.choose(backend, "cpu")  # refuses a backend that does not exist

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
                        self._dtensors[name] = value
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
        for name, owner in self.tied.items() if self._dtensors else ():
            if problem := dtensor.difference(*[self._dtensors.get(n, base[n]) for n in (owner, name)]):
                tie = f"{self.where(None, owner)}, whose memory it has"
                raise InputError(f"{self.where(None, name)}: {problem} like {tie}")

    def empty_like(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a result like a tensor of the base. For a DTensor it is this rank's shard of a new DTensor."""
        if name not in self._dtensors:
            return torch.empty_like(tensor, dtype=dtype)
        self._made[name] = torch.empty_like(self._dtensors[name], dtype=dtype)
        return dtensor.local_shard(self._made[name], self.where(None, name))

    def run(self, items: list[Item], rule: Rule) -> dict[str, Any]:
        """Merge items into their outputs, and return the outputs by name."""
        results = run_batches(items, rule, self.task_vectors, self.backend)
        if self.nonfinite != "keep-base":
            self._refuse_nonfinite(items, rule, stats_of(results))
        return {item.name: item.out for item in items}

    def run_in_place(self, rule: Rule) -> Stats:
        """Merge all items into the base."""
        unwritten = {n: t for n, t in self.untouched.items() if isinstance(t, torch.Tensor)}
        refuse_aliasing(self.items, unwritten, self.where)
        if self.nonfinite == "error":
            self.run(self.items, rule)
        # Autograd must notice writes through addresses. It has a version each for a DTensor and for its shard.
        dtensor_floats = [t for name, t in self._dtensors.items() if name not in self.untouched]
        for tensor in [item.versions[0] for item in self.items] + dtensor_floats:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        items = [Item(n, versions, s, versions[0]) for n, versions, s, _ in self.items]
        with without_interrupts():
            return stats_of(run_batches(items, rule, self.task_vectors, self.backend))

    def like_base(self, merged: Mapping[str, Any]) -> Any:
        """Results of the base's kind: under its names, tied where it is, with NumPy arrays and DTensors where it has them."""
        owners = {name: owner for name in self.names if (owner := self.tied.get(name, name)) in merged}
        arrays = {
            owner: as_array(merged[owner], dtype)
            for name, owner in owners.items()
            if (dtype := self._arrays.get(name))
        }
        made = {**merged, **self._made}
        result = {
            name: arrays[owner] if name in self._arrays else made[owner] for name, owner in owners.items()
        }
        return result[SINGLE] if self.is_single else result

    def _refuse_nonfinite(self, items: list[Item], rule: Rule, stats: Stats) -> None:
        """Raise InputError for the first non-finite element."""
        # All ranks raise or none: a model must not be merged on some of them only.
        if not dtensor.on_any_rank(self._dtensors.values(), stats.nonfinite > 0):
            return
        for batch, names, _ in batches(items, self.task_vectors) if stats.nonfinite else ():
            if found := registry.first_nonfinite(batch, rule):
                row, index, version, value = found
                where = self.where(None if isinstance(version, str) else version, names[row])
                what = "the result is not finite" if version == "result" else f"{value}"
                order = (
                    "memory order of this rank's shard" if names[row] in self._dtensors else "memory order"
                )
                raise InputError(f"{where}: element {index} in {order}: {what}, expected finite numbers")
        raise InputError(
            "an element on another rank is not finite (the error there names it), expected finite numbers"
        )

"""A model paired with the delta that is applied to it: names, shapes, ties, devices and memory are checked as by merge_."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..backends import registry
from ..backends.pytorch import FLOAT_NAMES
from ..core.batch import Batch, Counts, Operand, Operands, Segment, Signature
from ..core.delta import APPLIED, Apply, DeltaBatch, DeltaSegment, DeltaSignature
from ..core.descriptors import upload
from ..core.errors import InputError, some_names, stacklevel
from ..core.pairing import Rename
from ..core.rule import NonFinite, Rule
from ..core.scales import Scales
from ..core.stats import Stats
from ..core.unmergeable import is_variance
from ..runtime.interrupts import without_interrupts
from ..tensors import dtensor
from ..tensors.aliasing import memory
from ..tensors.call import Call
from ..tensors.counts import LEFT, Results, readable, stats_of, tell_of_nonfinite
from ..tensors.flatten import Item
from ..tensors.names import SINGLE, Model, Names, viewed
from .packing import Packed, TensorDelta, cut, expand
from .samples import hashes

_CHANGED, _NONFINITE = APPLIED.index("changed"), APPLIED.index("nonfinite")
# Elements at a time when one that is not finite is searched for.
_SEARCHED_AT_ONCE = 1 << 20


class Parts(NamedTuple):
    """What a delta is made of.

    Attributes:
        tensors: By the base's names, tied ones once.
        tied: Names of the base's tied weights, and the names in tensors that they are tied to.
        unchosen: Names of the base's tensors that were not chosen; None if that is not known.
    """

    tensors: Mapping[str, TensorDelta]
    tied: Mapping[str, str]
    unchosen: frozenset[str] | None


class TensorPair(NamedTuple):
    """A tensor of the model, and its delta.

    Attributes:
        name: Its name in the model.
        tensor: The tensor, or this rank's shard of it.
        delta: The delta of all of that.
        sampled: Of what the delta's sample is, the part that the tensor is, or None, and the shape.
    """

    name: str
    tensor: torch.Tensor
    delta: TensorDelta
    sampled: tuple[dtensor.Box | None, tuple[int, ...]]

    @property
    def is_flat(self) -> bool:
        return self.tensor.is_contiguous() and not self.tensor.is_neg()

    @property
    def signature(self) -> DeltaSignature:
        means = FLOAT_NAMES[self.delta.packed.means.dtype]
        return DeltaSignature(FLOAT_NAMES[self.tensor.dtype], means, self.delta.info.arithmetic)

    def segment(
        self, base: torch.Tensor | None, saved: torch.Tensor | None, out: torch.Tensor | None
    ) -> DeltaSegment:
        """The segment of this delta on memory of the tensor's elements in row-major order."""
        owners = [*self.delta.packed, *[t for t in (base, saved, out) if t is not None]]
        mask, means, ranks, b, s, o = [
            0 if t is None else t.data_ptr() for t in (*self.delta.packed, base, saved, out)
        ]
        return DeltaSegment(self.tensor.numel(), mask, means, ranks, b, s, o, owners)


class Group(NamedTuple):
    """Pairs of one device and signature.

    Attributes:
        pairs: The pairs.
        batch: Their batch.
        segments: Their names and numbers of elements.
        recorded: Their counts in the delta: int64[pairs, len(FAMILY_COUNTED)].
    """

    pairs: list[TensorPair]
    batch: DeltaBatch
    segments: list[tuple[str, int]]
    recorded: np.ndarray[Any, np.dtype[np.int64]]


def group(pairs: Sequence[TensorPair], segments: Sequence[DeltaSegment]) -> list[Group]:
    """Group pairs and their segments to batches."""
    found: dict[tuple[str, DeltaSignature], tuple[list[TensorPair], list[DeltaSegment]]] = {}
    for pair, segment in zip(pairs, segments, strict=True):
        held = found.setdefault((str(pair.tensor.device), pair.signature), ([], []))
        held[0].append(pair)
        held[1].append(segment)
    return [
        Group(
            those,
            DeltaBatch(device, signature, segments_of),
            [(pair.name, pair.tensor.numel()) for pair in those],
            np.array(
                [
                    [t.delta.agreed, i.nonfinite, i.vetoed_by_zero, i.masked or 0]
                    for t in those
                    for i in [t.delta.info]
                ],
                np.int64,
            ),
        )
        for (device, signature), (those, segments_of) in found.items()
    ]


def by_scale(whole: Group, scales: Mapping[str, float]) -> Iterator[tuple[Group, float]]:
    """Yield a group's parts by the λ of their tensors."""
    found: dict[str, list[int]] = {}
    for k, pair in enumerate(whole.pairs):
        found.setdefault(repr(scales[str(pair.name)]), []).append(k)  # 0 and -0 are two
    for text, chosen in found.items():
        if len(found) == 1:
            yield whole, float(text)
            return
        [part] = group([whole.pairs[k] for k in chosen], [whole.batch.segments[k] for k in chosen])
        yield part, float(text)


class Paired(Call):
    """One call that applies a delta to a model.

    Stand-ins of the delta's names and shapes take the part of a task vector: tensors of stride 0 on one number each, the same
    one for equal deltas.

    Attributes:
        pairs: The tensors to write, tied ones once.

    Raises:
        InputError: If the model is not what the delta is of.
    """

    def __init__(
        self,
        parts: Parts,
        model: Model,
        rename: Rename,
        backend: str,
        nonfinite: NonFinite = "keep-base",
        written: bool = True,
    ) -> None:
        self._parts, self._rename = parts, rename
        self._deltas = list(parts.tensors.values())
        super().__init__(
            model,
            [self._stand_ins()],
            "delta",
            "task_vectors",
            nonfinite,
            backend,
            in_place=written,
            reference="model",
        )
        self.pairs = [self._pair(item) for item in self.items]
        self._variances = [Item(t.name, [], None, t.tensor) for t in self.pairs if is_variance(t.name)]
        if written:
            flat = [Item(t.name, [t.tensor], _plain_segment(t)) for t in self.pairs]
            self.check_in_place(flat)
        self._refuse_other_values()

    def _stand_ins(self) -> Any:
        """Tensors with the shapes of the delta's. Their place in memory tells which is which."""
        owners = equal_to(self._parts.tensors)
        numbers: dict[torch.device, torch.Tensor] = {}
        index = {name: k for k, name in enumerate(self._parts.tensors)}
        found: dict[str, torch.Tensor] = {}
        for name, owner in {**{n: n for n in index}, **self._parts.tied}.items():
            delta = self._parts.tensors[owner]
            device = delta.packed.mask.device
            if device not in numbers:
                numbers[device] = torch.arange(len(index), dtype=torch.float64, device=device)
            shape = delta.info.spec.shape
            found[name] = numbers[device].as_strided(shape, (0,) * len(shape), index[owners[owner]])
        return found[SINGLE] if found.keys() == {SINGLE} else found

    def _paired(
        self, everything: list[dict[str, Any]], names: Names, reference: str, in_place: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Item]]:
        model, stand_ins = everything
        names = Names(rename=self._rename)
        renamed = names.renames or (lambda name: name)
        known = {renamed(name) for name in stand_ins}
        if self._parts.unchosen is not None:
            names.unchoose({renamed(name) for name in self._parts.unchosen} - known)
        elif known <= model.keys() and (missing := _apart(model, known)):
            names.unchoose(missing)
            kept = some_names([name for name in model if name in missing])
            self._notes.append(
                f"{reference}: {kept}: not in the delta, left as {'it is' if len(missing) == 1 else 'they are'}"
            )
        return super()._paired(everything, names, reference, in_place)

    def _view(
        self, named: list[dict[str, Any]], flat: Mapping[str, Item], reference: str, in_place: bool
    ) -> bool:
        model, stand_ins = named
        for name, value in model.items():
            if name in stand_ins and dtensor.is_dtensor(value):
                if value.shape != stand_ins[name].shape:
                    found, expected = tuple(stand_ins[name].shape), tuple(value.shape)
                    raise InputError(
                        f"{self.where(0, name)}: shape {found}, expected {expected} like {reference}"
                    )
                stand_ins[name] = _distributed_like(value, stand_ins[name])
        return super()._view(named, flat, reference, in_place)

    def _pair(self, item: Item) -> TensorPair:
        name, (tensor, stand_in, *_) = item.name, item.versions
        delta, where = self._deltas[stand_in.storage_offset()], self.where(None, name)
        if FLOAT_NAMES[tensor.dtype] != delta.info.spec.dtype:
            raise InputError(
                f"{where}: dtype {FLOAT_NAMES[tensor.dtype]}, expected {delta.info.spec.dtype} like the delta's base"
            )
        box = dtensor.box_of(self.dtensors[name], where) if name in self.dtensors else None
        if box is None or delta.box is not None:
            if delta.box == box:
                return TensorPair(name, tensor, delta, (None, delta.shape))
            assert delta.box
            found = "all of it" if box is None else f"the part from {box.offset} of shape {box.shape}"
            raise InputError(
                f"{where}: {found}, expected the part from {delta.box.offset} of shape {delta.box.shape}: "
                "the delta is of a shard"
            )
        return TensorPair(name, tensor, cut(delta, box), (box, delta.info.spec.shape))

    def _refuse_other_values(self) -> None:
        """Raise InputError if the model's values are not those of the delta's base, as far as samples tell."""
        if any(map(_is_captured, {pair.tensor.device for pair in self.pairs})):
            return  # nothing can be waited for
        found = hashes({t.name: (t.tensor, *t.sampled) for t in self.pairs})
        for pair in self.pairs:
            if found.get(pair.name, pair.delta.info.sample) != pair.delta.info.sample:
                raise InputError(
                    f"{self.where(None, pair.name)}: other values in its middle than in the delta's base, "
                    "expected that base, to which no delta was applied"
                )

    def choose(self) -> dict[str, tuple[str, Apply]]:
        """Choose a backend for each device. Nothing is written if one of the devices has none."""
        devices = dict.fromkeys(str(pair.tensor.device) for pair in self.pairs)
        return {
            device: registry.choose_apply(
                self.backend, device, [t.signature for t in self.pairs if str(t.tensor.device) == device]
            )
            for device in devices
        }

    def apply(self, scales: Scales) -> Stats:
        """Apply the delta, as run_in_place merges."""
        backends, by_name = self.choose(), self.by_name(scales)
        if self.nonfinite == "error":
            self._refuse_nonfinite(by_name, self._run(by_name, backends, written=False))
        self.increment_versions()
        with without_interrupts():
            results = readable(merge_counts(self._run(by_name, backends, written=True)))
        self.tell(results)
        return stats_of(results)

    def count(self, scales: Scales) -> list[tuple[Group, Counts]]:
        """Count what would change."""
        return self._run(self.by_name(scales), self.choose(), written=False)

    def by_name(self, scales: Scales) -> dict[str, float]:
        """λ of each tensor. Raises InputError as Scales.by_name."""
        return scales.by_name([str(pair.name) for pair in self.pairs])

    def tell(self, results: Results) -> None:
        """Warn of what a merge warns of."""
        tell_of_nonfinite(results, self.names, LEFT, stacklevel() + 1)
        self._warn_of_variances(self._variances)

    def _run(
        self, scales: Mapping[str, float], backends: Mapping[str, tuple[str, Apply]], written: bool
    ) -> list[tuple[Group, Counts]]:
        results = []
        # Scattered tensors come first and one at a time: memory for their flat copies may be missing.
        for pair in [pair for pair in self.pairs if not pair.is_flat]:
            copy = flat_copy(pair.tensor)
            [each] = group([pair], [pair.segment(copy, None, copy if written else None)])
            results.append((each, backends[each.batch.device][1](each.batch, scales[str(pair.name)])))
            if written:
                with torch.inference_mode():
                    pair.tensor.copy_(copy)
            del copy, each
        flat = [pair for pair in self.pairs if pair.is_flat]
        for whole in group(flat, [t.segment(t.tensor, None, t.tensor if written else None) for t in flat]):
            for each, scale in by_scale(whole, scales):
                results.append((each, backends[each.batch.device][1](each.batch, scale)))
        return results

    def _refuse_nonfinite(self, scales: Mapping[str, float], counted: Sequence[tuple[Group, Counts]]) -> None:
        """Raise InputError for elements that are not finite in a version, and for the first that would not be after this."""
        rows = {
            name: row[_NONFINITE]
            for each, counts in counted
            for (name, _), row in zip(each.segments, counts.tolist(), strict=True)
        }
        bad = [t for t in self.pairs if rows[t.name] or t.delta.info.nonfinite]
        if not dtensor.on_any_rank(self.dtensors.values(), bool(bad)):
            return
        if not bad:
            raise InputError(
                "an element on another rank is not finite (the error there names it), expected finite numbers"
            )
        pair = bad[0]
        if number := pair.delta.info.nonfinite:
            elements = "element is" if number == 1 else "elements are"
            raise InputError(
                f"{self.where(0, pair.name)}: {number:,} {elements} not finite in a version, expected finite numbers"
            )
        index = _first_nonfinite(pair, scales[str(pair.name)])
        raise InputError(
            f"{self.where(None, pair.name)}: element {index} in row-major order"
            f"{' of this rank' if pair.name in self.dtensors else ''}: the result is not finite, expected finite numbers"
        )


@dataclass(frozen=True)
class Changed:
    """How many elements have other stored bits than in the base. In BF16 small steps are rounded away.

    Attributes:
        elements: Elements of the tensor, or of all tensors of the delta.
        changed: Those that changed.
        tensors: The same for each tensor, by name; empty for one.
    """

    elements: int
    changed: int
    tensors: Mapping[str, Changed] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """changed / elements; 0 if there are none."""
        return self.changed / self.elements if self.elements else 0.0


def changed_of(results: Sequence[tuple[Group, Counts]]) -> Changed:
    """What counts say of changes."""
    tensors = {
        name: Changed(numel, row[_CHANGED])
        for each, counts in results
        for (name, numel), row in zip(each.segments, counts.tolist(), strict=True)
    }
    return Changed(
        sum(t.elements for t in tensors.values()), sum(t.changed for t in tensors.values()), tensors
    )


def merge_counts(results: Sequence[tuple[Group, Counts]]) -> Results:
    """What a merge would have counted: of the elements in the mask those that are not finite do not agree."""
    return [(each.segments, _merge_counts(each, counts)) for each, counts in results]


def _merge_counts(each: Group, counts: Counts) -> Counts:
    found: Any = each.recorded.copy()
    if isinstance(counts, torch.Tensor):
        found = upload(found.ravel(), str(counts.device)).view(found.shape)
    else:
        counts = np.asarray(counts)
    nonfinite = counts[:, _NONFINITE]
    found[:, 0] -= nonfinite
    found[:, 1] += nonfinite
    return found  # type: ignore[no-any-return]


def flat_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in row-major order, in memory of their own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _first_nonfinite(pair: TensorPair, scale: float) -> int:
    """The first element whose result is not finite."""
    tensor, delta = pair.tensor.resolve_neg().contiguous(), pair.delta
    arithmetic = delta.info.arithmetic
    signature = Signature(FLOAT_NAMES[tensor.dtype], (arithmetic,), True)
    for start in range(0, pair.tensor.numel(), _SEARCHED_AT_ONCE):
        size = min(_SEARCHED_AT_ONCE, tensor.numel() - start)
        dense = expand(delta.packed, start, size, delta.arithmetic)
        address = tensor.data_ptr() + start * tensor.itemsize
        base = Operand(address, signature.result, tensor)
        segment = Segment(size, base, [Operand(dense.data_ptr(), arithmetic, dense)], None)
        if found := registry.first_nonfinite(Batch(str(tensor.device), signature, [segment]), Rule(scale)):
            return start + found[1]
    raise AssertionError("it was counted")


def equal_to(tensors: Mapping[str, TensorDelta]) -> dict[str, str]:
    """The first name with an equal delta, by name. Deltas of tied weights may be there twice."""
    found: dict[str, str] = {}
    similar: dict[tuple[Any, ...], list[str]] = {}
    for name, delta in tensors.items():
        earlier = similar.setdefault((delta.info, delta.box, delta.agreed, delta.packed.mask.device), [])
        found[name] = next((e for e in earlier if _same(tensors[e].packed, delta.packed)), name)
        if found[name] == name:
            earlier.append(name)
    return found


def _same(left: Packed, right: Packed) -> bool:
    return torch.equal(left.mask, right.mask) and torch.equal(left.means, right.means)


def _apart(model: Mapping[str, Any], known: Set[str]) -> set[str]:
    """Names of floating-point tensors of a model that are not among the known ones, nor tied to one of these."""
    others = {name: view for name in model if name not in known and (view := viewed(model[name])) is not None}
    if not others:
        return set()
    held = {memory(view) for name in known if (view := viewed(model[name])) is not None}
    return {name for name, view in others.items() if memory(view) not in held}


def _distributed_like(like: Any, stand_in: torch.Tensor) -> Any:
    """A stand-in as a DTensor like another one."""
    held = like.to_local().shape
    local = stand_in.as_strided(held, (0,) * len(held), stand_in.storage_offset())
    return type(like).from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _plain_segment(pair: TensorPair) -> Segment | None:
    """The segment of a tensor that is written where it is; None if it is scattered."""
    if not pair.is_flat:
        return None
    tensor = pair.tensor
    return Segment(
        tensor.numel(),
        Operand(tensor.data_ptr(), FLOAT_NAMES[tensor.dtype], tensor),
        Operands([], (), []),
        None,
    )


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

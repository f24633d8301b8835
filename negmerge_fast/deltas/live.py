"""Live models: a model moved to any λ, again and again, and back to its own bits."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..backends import registry
from ..core.batch import Counts
from ..core.delta import Apply
from ..core.errors import InputError, some_names
from ..core.pairing import Rename
from ..core.scales import Scale
from ..core.stats import Stats
from ..runtime.interrupts import without_interrupts
from ..tensors.aliasing import shares_memory
from ..tensors.counts import Results, readable, stats_of
from ..tensors.family import scales_of
from ..tensors.names import Model
from .paired import Changed, Group, Paired, Parts, by_scale, changed_of, flat_copy, group, merge_counts

# Blocks that were entered and have not ended, so that no memory is in two of them. Weak: one that nobody holds writes no more.
_entered: weakref.WeakSet[Live] = weakref.WeakSet()
_entered_lock = threading.Lock()


class _Scattered(NamedTuple):
    """A tensor that is not contiguous, and memory for its elements in row-major order, in which it is moved."""

    name: str
    tensor: torch.Tensor
    flat: torch.Tensor

    def load(self) -> None:
        with torch.inference_mode():
            self.flat.copy_(self.tensor)

    def store(self) -> None:
        with torch.inference_mode():
            self.tensor.copy_(self.flat)


class _Watched(NamedTuple):
    """A tensor of the user's.

    Attributes:
        name: Its name in the model.
        holder: The module's or the user's dict that it is in; None if there is none.
        key: Its key there.
        tensor: The tensor.
        address: Where its memory was.
    """

    name: str
    holder: dict[str, Any] | None
    key: str
    tensor: torch.Tensor
    address: int

    def is_elsewhere(self) -> bool:
        replaced = self.holder is not None and self.holder.get(self.key) is not self.tensor
        return replaced or self.tensor.data_ptr() != self.address

    def has_other_memory(self) -> bool:
        """Whether what has its name now, if anything has, is not in the memory that was moved."""
        current = self.tensor if self.holder is None else self.holder.get(self.key)
        return current is not None and not (
            isinstance(current, torch.Tensor) and current.data_ptr() == self.address
        )


class _Prepared(NamedTuple):
    """What each move needs.

    Attributes:
        paired: The model and the delta.
        groups: What is moved, with the backend's function.
        scattered: What has to be copied before and afterwards.
        addresses: Where the tensors of `paired` were.
        watched: The user's own tensors.
        fsdp: Modules of FSDP2, which gather their parameters anew for the next use.
    """

    paired: Paired
    groups: list[tuple[Group, Apply]]
    scattered: list[_Scattered]
    addresses: list[int]
    watched: list[_Watched]
    fsdp: list[Any]


class Live:
    """A model that can be moved to any λ within a block, made by Delta.live.

    Each value assigned to `scale` leaves the bits of merging directly from the base. When the block ends the model has its
    former bits, also after an exception and after Ctrl-C, which comes when a move has ended.

    Only elements in the delta's mask are written. What else changes meanwhile, such as other elements and tensors, stays as the
    user leaves it. Elements in the mask that the user changes are the base's again at the next move and at the end. Memory must stay
    where it is: a parameter that is moved or replaced is an error at the next move, and at the end.

    Attributes:
        scale: λ, or λ by patterns on the model's names, as of apply_; None for the base's bits, as at the beginning. To be assigned.
    """

    def __init__(self, parts: Parts, model: Model, rename: Rename, backend: str) -> None:
        self._arguments: tuple[Parts, Model, Rename, str] | None = (parts, model, rename, backend)
        self._prepared: _Prepared | None = None
        self._scale: Scale | None = None
        self._written = False
        self._counted: list[tuple[Group, Counts]] = []
        self._results: Results = ()
        self._lock = threading.RLock()

    def __enter__(self) -> Live:
        if self._arguments is None:
            raise InputError("live: was entered before, expected a new one: call delta.live again")
        arguments, self._arguments = self._arguments, None
        with torch.no_grad():
            prepared = _prepare(*arguments)
        with _entered_lock:
            for other in list(_entered):
                other._refuse_shared(prepared.paired)
            self._prepared = prepared
            _entered.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(reported=error is not None)
        finally:
            self._end()  # Ctrl-C may have come before it was held back

    def __del__(self) -> None:
        # Of a block that Ctrl-C has left between two instructions of the interpreter.
        try:  # noqa: SIM105 - when the interpreter ends, the names of this module are None, and suppress would be
            self._end()
        except Exception:
            pass

    @property
    def scale(self) -> Scale | None:
        return self._scale

    @scale.setter
    def scale(self, scale: Scale | None) -> None:
        checked = None if scale is None else scales_of(scale)
        with self._lock:  # another thread may end the block meanwhile
            prepared = self._require_entered()
            if lost := [*_freed(prepared), *(each.name for each in prepared.watched if each.is_elsewhere())]:
                raise InputError(
                    f"live: {some_names(sorted(set(lost)))}: moved or replaced since the block began, expected the same memory"
                )
            by_name = None if checked is None else prepared.paired.by_name(checked)
            with without_interrupts():
                self._written = True
                counted = _move(prepared, by_name)
                self._counted = counted if checked is not None else []
                self._scale = None if checked is None else checked.given
                self._results = readable(merge_counts(self._counted))
            if checked is not None:
                prepared.paired.tell(self._results)

    @property
    def stats(self) -> Stats:
        """Counts of the last move, as merge_ returns them; empty at the base's bits."""
        return stats_of(self._results)

    @property
    def changed(self) -> Changed:
        """Elements whose stored bits differ from the base's now."""
        return changed_of(self._counted)

    def _require_entered(self) -> _Prepared:
        if self._prepared is None:
            state = "has not begun" if self._arguments else "has ended"
            raise InputError(
                f"live: its block {state}, expected one that is open: with delta.live(model) as live"
            )
        return self._prepared

    def _refuse_shared(self, paired: Paired) -> None:
        if (prepared := self._prepared) is None:
            return
        storages: dict[tuple[Any, int], list[torch.Tensor]] = {}
        for pair in prepared.paired.pairs:
            storages.setdefault(_storage(pair.tensor), []).append(pair.tensor)
        for pair in paired.pairs:
            for held in storages.get(_storage(pair.tensor), ()):
                if pair.tensor.numel() and held.numel() and shares_memory(held, pair.tensor):
                    where = paired.where(None, pair.name)
                    raise InputError(f"{where}: is live in another block, expected one block at a time")

    def _end(self, reported: bool = False) -> None:
        """Restore the former bits, once. reported: whether an error is raised already, which is not to be hidden."""
        lost: list[str] = []
        moved: list[str] = []
        with self._lock, without_interrupts():
            if (prepared := self._prepared) is None:
                return
            if self._written:
                lost = _restore(prepared)
            left_moved = self._scale is not None and not reported
            self._scale, self._counted, self._results, self._prepared = None, [], (), None
            _entered.discard(self)
        if left_moved:
            moved = sorted({each.name for each in prepared.watched if each.has_other_memory()} - {*lost})
        for names, what in ((lost, "freed, or cut,"), (moved, "moved or replaced")):
            if names:
                raise InputError(
                    f"live: {some_names(names)}: {what} since the block began, expected the same memory: "
                    "these were not restored"
                )


def _prepare(parts: Parts, model: Model, rename: Rename, backend: str) -> _Prepared:
    """Pair the model with the delta, and keep the base's elements that are in the mask."""
    paired = Paired(parts, model, rename, backend)
    backends = paired.choose()
    scattered = [_Scattered(t.name, t.tensor, flat_copy(t.tensor)) for t in paired.pairs if not t.is_flat]
    copies = iter(scattered)
    memories = [t.tensor if t.is_flat else next(copies).flat for t in paired.pairs]
    saved = [
        torch.empty(max(t.delta.agreed, 1), dtype=t.tensor.dtype, device=t.tensor.device)
        for t in paired.pairs
    ]
    triples = list(zip(paired.pairs, memories, saved, strict=True))
    for each in group(paired.pairs, [t.segment(m, s, None) for t, m, s in triples]):
        registry.save_of(backends[each.batch.device][0])(each.batch)
    groups = group(paired.pairs, [t.segment(None, s, m) for t, m, s in triples])
    return _Prepared(
        paired,
        [(each, backends[each.batch.device][1]) for each in groups],
        scattered,
        [pair.tensor.data_ptr() for pair in paired.pairs],
        list(_watched(model, paired)),
        _fsdp_modules(model),
    )


def _watched(model: Model, paired: Paired) -> Iterator[_Watched]:
    """The user's own tensors among those that are moved: these may be replaced, or given other memory."""
    addresses = {pair.tensor.data_ptr() for pair in paired.pairs if pair.tensor.numel()}
    for name, holder, key, value in _named(model):
        # Others, such as DTensors, have no address of their own.
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if is_plain and (address := value.data_ptr()) in addresses:
            yield _Watched(name, holder, key, value, address)


def _named(model: Any) -> Iterator[tuple[str, dict[str, Any] | None, str, Any]]:
    if isinstance(model, torch.nn.Module):
        for prefix, module in model.named_modules(remove_duplicate=False):
            for holder in (module._parameters, module._buffers):
                for key, value in holder.items():
                    yield f"{prefix}.{key}" if prefix else key, holder, key, value
    elif isinstance(model, Mapping):
        for name, value in model.items():
            yield str(name), model if isinstance(model, dict) else None, name, value
    else:
        yield "model", None, "", model


def _fsdp_modules(model: Any) -> list[Any]:
    """Modules of FSDP2. What they gathered is of before a move: the root keeps it after a forward pass."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not isinstance(model, torch.nn.Module):
        return []
    return [module for module in model.modules() if isinstance(module, kind)]


def _move(prepared: _Prepared, scales: Mapping[str, float] | None) -> list[tuple[Group, Counts]]:
    """Write the result of each tensor's λ, or the base's elements, to all elements in the masks."""
    for module in prepared.fsdp:
        module.reshard()
    prepared.paired.increment_versions()
    for each in prepared.scattered:
        each.load()
    counted = [
        (part, apply(part.batch, scale))
        for each, apply in prepared.groups
        for part, scale in ([(each, None)] if scales is None else by_scale(each, scales))
    ]
    for each in prepared.scattered:
        each.store()
    return counted


def _restore(prepared: _Prepared) -> list[str]:
    """Write the base's elements wherever memory is left. Returns the names of tensors whose memory is not."""
    if not (freed := _freed(prepared)):
        _move(prepared, None)
        return []
    groups = []
    for each, apply in prepared.groups:
        held = zip(each.pairs, each.batch.segments, strict=True)
        left = [segment for pair, segment in held if pair.name not in freed]
        groups.append((each._replace(batch=replace(each.batch, segments=left)), apply))
    scattered = [each for each in prepared.scattered if each.name not in freed]
    _move(prepared._replace(groups=groups, scattered=scattered), None)
    return freed


def _freed(prepared: _Prepared) -> list[str]:
    """Names of tensors whose memory was freed, cut, or moved."""
    found = []
    for (name, tensor, *_), address in zip(prepared.paired.pairs, prepared.addresses, strict=True):
        end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        if tensor.data_ptr() != address or (tensor.nbytes and tensor.untyped_storage().nbytes() < end):
            found.append(name)
    return found


def _storage(tensor: torch.Tensor) -> tuple[Any, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()

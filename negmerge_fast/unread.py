"""What need not be read: other models' versions of elements none of which can agree any more, whatever those hold.

An element agrees in the end only if, of the first k of n models, all but n - k of those that must agree do: that is the rule
for k models, with fewer required. So a merge that only counts says whether an element is left. A number that is not finite
counts as one: all of a lot are found, or none was read; where there is none, differences have the same signs in any
arithmetic type. And since it does not matter what the unread versions hold, a merge may take zeros for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .plan import Extent
from .rule import FLOAT_SIZES, Batch, Merge, Rule, Segment, Signature, Stream
from .workers import Counted

# Elements of the first window: enough to have one that is left, where models were fine-tuned densely, few enough to cost little
# more than the call. Each further window of a lot is so many times longer.
_FIRST, _GROWTH = 4096, 8
# Tensors shorter than this share of a piece are looked at together with their neighbours.
_SHARE = 1 / 16


@dataclass(frozen=True)
class Prefix(Rule):
    """The rule for the first few of so many models: agreement that the others could still complete."""

    of: int = 1

    def required(self, models: int) -> int:
        """How many of the first models must agree; below 1 where the others could do without them."""
        return super().required(self.of) - (self.of - models)


class Unread:
    """What the blocks of one merge have in common.

    merge: a backend for the CPU; None: all is read. after: the numbers of models after which to look whether more are needed.
    needed: how many models the last block needed, as the next one will, most likely.
    """

    def __init__(self, rule: Rule, models: int, merge: Merge | None) -> None:
        # Scale 0: whether elements agree has nothing to do with it.
        self.rule, self.merge = Prefix(0.0, rule.min_agreement, models), merge
        spare = models - rule.required(models)
        steps = (spare + (1 << power) for power in range(models.bit_length()))
        self.after = frozenset(k for k in steps if k < models) if merge else frozenset()
        self.needed = models


class _Stretch(NamedTuple):
    """Elements of one signature, neighbours in every version: how many, and from which addresses on."""

    signature: Signature
    numel: int
    addresses: list[int]


@dataclass(frozen=True, eq=False)
class _Lot:
    """Neighbouring tensors that are read for as long as an element of theirs can agree.

    ends: the addresses after them. seen: windows that were looked at; the first had an element that was left.
    """

    stretches: list[_Stretch]
    ends: list[int]
    seen: deque[_Stretch]
    coming: Iterator[_Stretch]

    def windows(self) -> Iterator[_Stretch]:
        """All of its elements, those first where one was left."""
        for _ in range(len(self.seen)):
            yield self.seen[0]
            self.seen.rotate(-1)
        for window in self.coming:
            self.seen.appendleft(window)
            yield window


class Block:
    """A piece that is read model by model. addresses: where its versions are, or will be, in memory that owner keeps."""

    def __init__(self, unread: Unread, piece: Extent, addresses: list[int], owner: Any) -> None:
        self._unread, self._piece, self._addresses, self._owner = unread, piece, addresses, owner
        self._lots: list[_Lot] | None = None

    @property
    def alive(self) -> bool:
        """Whether an element can agree."""
        return bool(self._piece.members if self._lots is None else self._lots)

    def look(self, models: int) -> None:
        """Give up what no longer can agree after so many models."""
        lots = list(_lots(self._piece, self._addresses)) if self._lots is None else self._lots
        open_lots = [(lot, lot.windows()) for lot in lots]
        alive: set[_Lot] = set()
        while open_lots:
            tried = [(lot, rest, window) for lot, rest in open_lots if (window := next(rest, None))]
            left = self._left([window for _, _, window in tried], models)
            alive.update(lot for (lot, _, _), found in zip(tried, left, strict=True) if found)
            open_lots = [(lot, rest) for (lot, rest, _), found in zip(tried, left, strict=True) if not found]
        self._lots = [lot for lot in lots if lot in alive]

    def _left(self, windows: Sequence[_Stretch], models: int) -> list[bool]:
        """Whether each window has an element that can agree."""
        found = [False] * len(windows)
        assert self._unread.merge
        for signature in {window.signature for window in windows}:
            result, dtypes, task_vectors = signature
            stored = (result, *dtypes[:models])
            which = [row for row, window in enumerate(windows) if window.signature == signature]
            segments = []
            for row in which:
                streams = [Stream(a, d, self._owner) for a, d in zip(windows[row].addresses, stored)]  # noqa: B905
                segments.append(Segment(windows[row].numel, streams[0], streams[1:], None))
            batch = Batch("cpu", Signature(result, stored[1:], task_vectors), segments)
            counts = self._unread.merge(batch, self._unread.rule, 1).tolist()
            for row, (agreed, nonfinite) in zip(which, counts, strict=True):
                found[row] = bool(agreed or nonfinite)
        return found

    def runs(self, version: int) -> list[tuple[int, int]]:
        """Which bytes to read of a version, the base being 0: from where to where."""
        if self._lots is None:
            return [(0, self._piece.sources[version].nbytes)]
        runs: list[tuple[int, int]] = []
        for lot in self._lots:
            begin, end = lot.stretches[0].addresses[version], lot.ends[version]
            if runs and runs[-1][1] == begin:
                begin = runs.pop()[0]
            runs.append((begin, end))
        start = self._addresses[version]
        return [(begin - start, end - start) for begin, end in runs]


def _lots(piece: Extent, addresses: list[int]) -> Iterator[_Lot]:
    share = piece.sources[0].nbytes * _SHARE
    groups: list[list[tuple[Signature, int]]] = []
    size = share
    for member in piece.members:
        signature, numel = member.signature, member.numel
        here = numel * FLOAT_SIZES[signature.result]
        if max(size, here) >= share:
            groups.append([])
            size = 0
        size += here
        if groups[-1] and groups[-1][-1][0] == signature:
            numel += groups[-1].pop()[1]
        groups[-1].append((signature, numel))
    for group in groups:
        stretches = []
        for signature, numel in group:
            stretches.append(_Stretch(signature, numel, addresses))
            addresses = _after(stretches[-1], numel)
        yield _Lot(stretches, addresses, deque(), _windows(stretches))


def _windows(stretches: Sequence[_Stretch]) -> Iterator[_Stretch]:
    size = _FIRST
    for stretch in stretches:
        start = 0
        while start < stretch.numel:
            count = min(size, stretch.numel - start)
            yield _Stretch(stretch.signature, count, _after(stretch, start))
            start, size = start + count, size * _GROWTH


def _after(stretch: _Stretch, elements: int) -> list[int]:
    dtypes = (stretch.signature.result, *stretch.signature.models)
    return [a + elements * FLOAT_SIZES[dtype] for a, dtype in zip(stretch.addresses, dtypes, strict=True)]


def none_agreed(piece: Extent) -> list[Counted]:
    """What a merge of a piece counts in which no element agrees, and all are finite."""
    runs: dict[Signature, list[tuple[str, int]]] = {}
    for member in piece.members:
        runs.setdefault(member.signature, []).append((member.name, member.numel))
    return [(each, np.zeros((len(each), 2), np.int64)) for each in runs.values()]

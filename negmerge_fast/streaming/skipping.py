"""What need not be read: other models' versions of elements none of which can agree any more, whatever those hold.

An element agrees in the end only if, of the first k of n models, all but n - k of those that must agree do: that is the rule
for k models, with fewer required. So a merge that only counts says whether an element is left. A number that is not finite
counts as one: all of a lot are found, or none was read; where there is none, differences have the same signs in any
arithmetic type. And since it does not matter what the unread versions hold, a merge may take zeros for them.

Most models change all that is merged, and looking would cost some percent of such a merge: so it is done where the first bytes
of a model are those of one that changed nothing, and now and then, and everywhere while it finds something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

import numpy as np

from ..core.batch import Batch, Merge, Operand, Segment, Signature
from ..core.dtypes import FLOAT_SIZES
from ..core.rule import Rule
from .plan import Extent
from .progress import ChunkCounts

# Elements of the first window: enough to have one that is left, where models were fine-tuned densely, few enough to cost little
# more than the call. Each further window of a lot is so many times longer.
_FIRST, _GROWTH = 1024, 16
# The first bytes of a lot: a model that changes few elements has changed one of theirs. Looked at without that, if all is read: one
# piece in so many.
_SAMPLE, _SELDOM = 256, 16
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

    merge: a backend for the CPU; None: all is read. spare: how many models may disagree. needed: how many models the last block
    needed, as the next one will, most likely; calm: how many in a row were read whole.
    """

    def __init__(self, rule: Rule, models: int, merge: Merge | None) -> None:
        # Scale 0: whether elements agree has nothing to do with it.
        self.rule, self.merge = Prefix(0.0, rule.min_agreement, models), merge
        self.spare = models - rule.required(models)
        self.needed, self.calm = models, 0

    def learn(self, needed: int, skipped: int) -> None:
        """From a block that needed so many models, and of them and of the others so many bytes less than there are."""
        self.needed, self.calm = needed, 0 if skipped else self.calm + 1


class _Window(NamedTuple):
    """Elements that are looked at together; the segment has all models."""

    signature: Signature
    segment: Segment


@dataclass(frozen=True, eq=False)
class _Lot:
    """Neighbouring tensors that are read for as long as an element of theirs can agree.

    begins, ends: where in each version. seen: windows that were looked at; the first had an element that was left.
    """

    begins: list[int]
    ends: list[int]
    coming: Iterator[_Window]
    seen: deque[_Window]

    def windows(self) -> Iterator[_Window]:
        """All of its elements, those first where one was left."""
        for _ in range(len(self.seen)):
            yield self.seen[0]
            self.seen.rotate(-1)
        for window in self.coming:
            self.seen.appendleft(window)
            yield window


class Block:
    """A piece that is read model by model into buffers. addresses: where those are, in memory that owner keeps."""

    def __init__(
        self, unread: Unread, chunk: Extent, buffers: list[memoryview], addresses: list[int], owner: Any
    ) -> None:
        self._unread, self._piece, self._buffers = unread, chunk, buffers
        self._addresses, self._owner = addresses, owner
        self._everywhere = unread.calm % _SELDOM == 0
        self._lots: list[_Lot] | None = None

    @property
    def alive(self) -> bool:
        """Whether an element can agree."""
        return bool(self._piece.slices if self._lots is None else self._lots)

    def look(self, models: int) -> None:
        """Give up what no longer can agree after so many models."""
        beyond = models - self._unread.spare
        if beyond < 1 or not self._unread.merge:
            return
        if self._lots is None:
            self._lots = list(_lots(self._piece, self._addresses, self._owner))
        if self._everywhere and beyond & (beyond - 1) == 0:  # 1, 2, 4, …
            doubtful = self._lots
        else:
            doubtful = [lot for lot in self._lots if self._seems_unchanged(lot, models)]
        dead = set(doubtful)
        asked = [(lot, lot.windows()) for lot in doubtful]
        while asked:
            tried = [(lot, rest, window) for lot, rest in asked if (window := next(rest, None))]
            left = self._left([window for _, _, window in tried], models)
            dead.difference_update(lot for (lot, _, _), found in zip(tried, left, strict=True) if found)
            asked = [(lot, rest) for (lot, rest, _), found in zip(tried, left, strict=True) if not found]
        if dead:
            self._lots = [lot for lot in self._lots if lot not in dead]

    def _seems_unchanged(self, lot: _Lot, version: int) -> bool:
        begin, base = lot.begins[version], lot.begins[0]
        sample = self._buffers[version][begin : min(begin + _SAMPLE, lot.ends[version])]
        if self._piece.slices[0].signature.task_vectors:
            return not any(sample)
        return sample == self._buffers[0][base : min(base + _SAMPLE, lot.ends[0])]

    def _left(self, windows: Sequence[_Window], models: int) -> list[bool]:
        """Whether each window has an element that can agree."""
        rows: dict[Signature, list[int]] = {}
        for row, window in enumerate(windows):
            rows.setdefault(window.signature, []).append(row)
        found = [False] * len(windows)
        assert self._unread.merge
        for (result, dtypes, task_vectors), same in rows.items():
            whole = [windows[row].segment for row in same]
            segments = [Segment(s.numel, s.base, s.models[:models], None) for s in whole]
            batch = Batch("cpu", Signature(result, dtypes[:models], task_vectors), segments)
            counts = self._unread.merge(batch, self._unread.rule, 1).tolist()
            for row, (agreed, nonfinite) in zip(same, counts, strict=True):
                found[row] = bool(agreed or nonfinite)
        return found

    def ranges(self, version: int) -> list[tuple[int, int]]:
        """Which bytes to read of a version, the base being 0: from where to where."""
        if self._lots is None:
            return [(0, self._piece.sources[version].nbytes)]
        ranges: list[tuple[int, int]] = []
        for lot in self._lots:
            begin, end = lot.begins[version], lot.ends[version]
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, end))
        return ranges


def _lots(chunk: Extent, addresses: list[int], owner: Any) -> Iterator[_Lot]:
    share = chunk.sources[0].nbytes * _SHARE
    # Of each lot, its runs of elements of one signature: neighbours in every version, whatever tensors they are of.
    lots: list[list[tuple[Signature, int]]] = []
    size = share
    for tensor_slice in chunk.slices:
        signature, numel = tensor_slice.signature, tensor_slice.numel
        here = numel * FLOAT_SIZES[signature.result]
        if max(size, here) >= share:
            lots.append([])
            size = 0
        size += here
        if lots[-1] and lots[-1][-1][0] == signature:
            numel += lots[-1].pop()[1]
        lots[-1].append((signature, numel))
    ends = [0] * len(chunk.sources)
    for ranges in lots:
        begins = ends
        for signature, numel in ranges:
            ends = [end + numel * size for end, size in zip(ends, _sizes(signature), strict=True)]
        yield _Lot(begins, ends, _windows(ranges, [*map(add, addresses, begins)], owner), deque())


def _windows(ranges: Sequence[tuple[Signature, int]], addresses: list[int], owner: Any) -> Iterator[_Window]:
    size = _FIRST
    for signature, numel in ranges:
        dtypes, sizes = (signature.result, *signature.models), _sizes(signature)
        while numel:
            count = min(size, numel)
            streams = [Operand(a, dtype, owner) for a, dtype in zip(addresses, dtypes, strict=True)]
            yield _Window(signature, Segment(count, streams[0], streams[1:], None))
            addresses = [a + count * s for a, s in zip(addresses, sizes, strict=True)]
            numel, size = numel - count, size * _GROWTH


def _sizes(signature: Signature) -> list[int]:
    """Bytes per element of each version."""
    return [FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models)]


def none_agreed(chunk: Extent) -> list[ChunkCounts]:
    """What a merge of a piece counts in which no element agrees, and all are finite."""
    ranges: dict[Signature, list[tuple[str, int]]] = {}
    for tensor_slice in chunk.slices:
        ranges.setdefault(tensor_slice.signature, []).append((tensor_slice.name, tensor_slice.numel))
    return [(each, np.zeros((len(each), 2), np.int64)) for each in ranges.values()]

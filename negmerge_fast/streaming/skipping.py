"""Data skipping: what cannot change the output is not read.

After the first k of n models, an element can still agree if all but n - k of the models that must agree do so already. That is
the rule for k models with fewer required, so a merge that only counts finds such elements. Non-finite elements count as such.
A tensor of a chunk without any is dropped: the output is the base's, whatever the other models hold. All that was read of it is
counted before that, so that no non-finite element in it is missed.

Most models change everything that is merged. Tensors are therefore probed only where a model begins as the base does, now and then, and everywhere while something is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.batch import COUNTED, Batch, Merge, Rows, Segment, Signature, segment_at
from ..core.rule import Rule
from .plan import Extent, TensorSlice
from .progress import ChunkCounts

# Elements of the first probe: dense changes show in it. Each further probe of a tensor is so many times longer.
_FIRST_PROBE, _PROBE_GROWTH = 1024, 16
# Tensors shorter than this fraction of a chunk are grouped with their neighbours: each group costs as much as a short one.
_MIN_GROUP_FRACTION = 1 / 16
# Bytes of the base that a model's first elements are compared with. While nothing is skipped, one chunk in so many is probed whatever they are.
_SAMPLE_BYTES, _PROBE_INTERVAL = 256, 16


@dataclass(frozen=True)
class PrefixRule(Rule):
    """The rule for the first few of `models` models: agreement that the others can still complete."""

    models: int = 1

    def required(self, models: int) -> int:
        return super().required(self.models) - (self.models - models)


class Skipping:
    """What the chunks of one merge share.

    counter: a CPU backend; None if everything is read. expected_models: how many the last chunk needed, as the next one probably
    will. full_chunks: chunks in a row that were read whole.
    """

    def __init__(self, rule: Rule, models: int, counter: Merge | None) -> None:
        # Whether elements agree does not depend on the scale.
        self.rule, self.counter = PrefixRule(0.0, rule.min_agreement, models=models), counter
        self.max_dissenters = models - rule.required(models)
        self.expected_models, self.full_chunks = models, 0

    def record(self, needed: int, skipped: int) -> None:
        """Learn from a chunk how many models it needed, and how many bytes it skipped."""
        self.expected_models, self.full_chunks = needed, 0 if skipped else self.full_chunks + 1


class _Group:
    """Neighbouring elements of a chunk that are dropped together: those of a tensor, or of short tensors of one signature."""

    def __init__(self, tensor_slice: TensorSlice, begins: Sequence[int]) -> None:
        self.signature, self.sizes, self.begins = tensor_slice.signature, tensor_slice.sizes, begins
        self.numel, self.ends = 0, list(begins)
        # Where the last probe found an element that can agree, and how many elements from there on the present one has counted.
        self.start = self.counted = 0
        self.extend(tensor_slice.numel)

    def extend(self, numel: int) -> None:
        self.numel += numel
        self.ends = [end + numel * size for end, size in zip(self.ends, self.sizes, strict=True)]

    def next_range(self, size: int) -> tuple[int, int]:
        """The first of the next elements to count, and how many: to the end, then from the beginning to start."""
        first, end = self.start + self.counted, self.numel
        if first >= end:
            first, end = first - end, self.start
        return first, min(size, end - first)


def _groups(chunk: Extent) -> list[_Group]:
    min_bytes = chunk.sources[0].nbytes * _MIN_GROUP_FRACTION
    groups: list[_Group] = []
    ends = [0] * len(chunk.sources)
    for tensor_slice in chunk.slices:
        last = groups[-1] if groups else None
        nbytes = max(tensor_slice.numel * tensor_slice.sizes[0], last.ends[0] - last.begins[0] if last else 0)
        if last and last.signature == tensor_slice.signature and nbytes < min_bytes:
            last.extend(tensor_slice.numel)
        else:
            groups.append(_Group(tensor_slice, ends))
        ends = groups[-1].ends
    return groups


class ChunkPruner:
    """The elements of a chunk that can still agree, while its versions are read to these addresses."""

    def __init__(
        self, skipping: Skipping, chunk: Extent, buffers: list[memoryview], addresses: list[int], owner: Any
    ) -> None:
        self._skipping, self._chunk, self._buffers = skipping, chunk, buffers
        self._addresses, self._owner = addresses, owner
        self._probe_all = skipping.full_chunks % _PROBE_INTERVAL == 0
        self._remaining: list[_Group] | None = None  # until something may be dropped, all

    @property
    def can_agree(self) -> bool:
        """Whether any element can."""
        return bool(self._chunk.slices if self._remaining is None else self._remaining)

    def prune(self, models: int) -> None:
        """Drop the groups of which no element can agree, after so many models."""
        confirmed = models - self._skipping.max_dissenters
        if confirmed < 1 or not self._skipping.counter:
            return
        if self._remaining is None:
            self._remaining = _groups(self._chunk)
        probe_all = self._probe_all and confirmed & (confirmed - 1) == 0  # after 1, 2, 4, …
        probed = [g for g in self._remaining if probe_all or self._seems_unchanged(g, models)]
        dropped = {id(group) for group in probed}
        for group in probed:
            group.counted = 0
        size = _FIRST_PROBE
        while probed := [g for g in probed if g.counted < g.numel]:
            ranges = [group.next_range(size) for group in probed]
            counts = self._count(probed, ranges, models)
            for group, (first, numel), count in zip(probed, ranges, counts, strict=True):
                if count:
                    group.start, group.counted = first, group.numel
                    dropped.discard(id(group))
                else:
                    group.counted += numel
            size *= _PROBE_GROWTH
        self._remaining = [group for group in self._remaining if id(group) not in dropped]

    def _seems_unchanged(self, group: _Group, version: int) -> bool:
        result, dtypes, task_vectors = group.signature
        if not task_vectors and dtypes[version - 1] != result:
            return not self._sample_differs(group, version)

        def sample(version: int) -> memoryview:
            begin, end = group.begins[version], group.ends[version]
            return self._buffers[version][begin : min(begin + _SAMPLE_BYTES, end)]

        return not any(sample(version)) if task_vectors else sample(version) == sample(0)

    def _sample_differs(self, group: _Group, version: int) -> bool:
        """Whether the first elements of a model in another type than the base's differ from it, by the rule."""
        signature = Signature(group.signature.result, (group.signature.models[version - 1],), False)
        addresses = [self._addresses[v] + group.begins[v] for v in (0, version)]
        numel = min(group.numel, _SAMPLE_BYTES // group.sizes[0])
        segment = segment_at(numel, signature, addresses, [self._owner] * 2)._replace(out=None)
        assert self._skipping.counter
        (count,) = self._skipping.counter(Batch("cpu", signature, [segment]), Rule(0.0), 1).tolist()
        return bool(_can_change(count))

    def _count(self, groups: Sequence[_Group], ranges: Sequence[tuple[int, int]], models: int) -> list[int]:
        """In a range of each group, the elements that can agree or are not finite."""
        rows: dict[Signature, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group.signature, []).append(row)
        found = [0] * len(groups)
        for (result, dtypes, task_vectors), same in rows.items():
            signature = Signature(result, dtypes[:models], task_vectors)
            segments = [self._segment(groups[row], *ranges[row], signature) for row in same]
            assert self._skipping.counter
            counts = self._skipping.counter(Batch("cpu", signature, segments), self._skipping.rule, 1)
            for row, count in zip(same, counts.tolist(), strict=True):
                found[row] = _can_change(count)
        return found

    def _segment(self, group: _Group, first: int, numel: int, signature: Signature) -> Segment:
        versions = range(1 + len(signature.models))
        at = [self._addresses[v] + group.begins[v] + first * group.sizes[v] for v in versions]
        return segment_at(numel, signature, at, [self._owner] * len(at))._replace(out=None)

    def byte_ranges(self, version: int) -> list[tuple[int, int]]:
        """The bytes to read of a version, 0 being the base; neighbouring groups are one range."""
        if self._remaining is None:
            return [(0, self._chunk.sources[version].nbytes)]
        ranges: list[tuple[int, int]] = []
        for group in self._remaining:
            begin, end = group.begins[version], group.ends[version]
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, end))
        return ranges


def _can_change(count: Sequence[int]) -> int:
    """The elements that agree or are not finite, of the counts of a segment."""
    agreed, nonfinite, _ = count
    return agreed + nonfinite


def none_agreed(chunk: Extent) -> list[ChunkCounts]:
    """The counts of a chunk in which no element agrees, and all are finite. Which are vetoed by zero is not known."""
    named: dict[Signature, list[tuple[str, int]]] = {}
    for tensor_slice in chunk.slices:
        named.setdefault(tensor_slice.signature, []).append((tensor_slice.name, tensor_slice.numel))
    return [(each, Rows([0] * len(COUNTED) for _ in each)) for each in named.values()]

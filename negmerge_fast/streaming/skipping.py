"""Data skipping: what cannot change the output is not read.

After the first k of n models, an element can still agree if all but n - k of the models that must agree do so already. That is
the rule for k models with fewer required, so a merge that only counts finds such elements. Non-finite elements count as such.
A tensor of a chunk without any is dropped: the output is the base's, whatever the other models hold.

Most models change everything that is merged. Tensors are therefore probed only where the first bytes of a model are the
base's, now and then, and everywhere while something is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.batch import Batch, Merge, Operand, Segment, Signature
from ..core.rule import Rule
from .plan import Extent, TensorSlice
from .progress import ChunkCounts

# Elements of the first probe: dense changes show in it. Each further probe of a tensor is so many times longer.
_FIRST_PROBE, _PROBE_GROWTH = 1024, 16
# Bytes compared with the base's. While nothing is skipped, one chunk in so many is probed whatever they are.
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
        self.rule, self.counter = PrefixRule(0.0, rule.min_agreement, models), counter
        self.max_dissenters = models - rule.required(models)
        self.expected_models, self.full_chunks = models, 0

    def record(self, needed: int, skipped: int) -> None:
        """Learn from a chunk how many models it needed, and how many bytes it skipped."""
        self.expected_models, self.full_chunks = needed, 0 if skipped else self.full_chunks + 1


class _Tensor:
    """The elements that a chunk has of a tensor: where each version's bytes begin and end, and how many elements are ruled out."""

    def __init__(self, tensor_slice: TensorSlice, begins: Sequence[int]) -> None:
        self.signature, self.numel, self.sizes = (
            tensor_slice.signature,
            tensor_slice.numel,
            tensor_slice.sizes,
        )
        self.begins = begins
        self.ends = [begin + self.numel * size for begin, size in zip(begins, self.sizes, strict=True)]
        self.ruled_out = 0


class ChunkPruner:
    """The tensors of a chunk that can still agree, while its versions are read to these addresses."""

    def __init__(
        self, skipping: Skipping, chunk: Extent, buffers: list[memoryview], addresses: list[int], owner: Any
    ) -> None:
        self._skipping, self._buffers, self._addresses, self._owner = skipping, buffers, addresses, owner
        self._probe_all = skipping.full_chunks % _PROBE_INTERVAL == 0
        self._tensors, ends = [], [0] * len(addresses)
        for tensor_slice in chunk.slices:
            self._tensors.append(tensor := _Tensor(tensor_slice, ends))
            ends = tensor.ends

    @property
    def can_agree(self) -> bool:
        """Whether any element can."""
        return bool(self._tensors)

    def prune(self, models: int) -> None:
        """Drop the tensors of which no element can agree, after so many models."""
        confirmed = models - self._skipping.max_dissenters
        if confirmed < 1 or not self._skipping.counter:
            return
        probe_all = self._probe_all and confirmed & (confirmed - 1) == 0  # after 1, 2, 4, …
        probed = [t for t in self._tensors if probe_all or self._seems_unchanged(t, models)]
        size = _FIRST_PROBE
        while probed := [t for t in probed if t.ruled_out < t.numel]:
            counts = self._count(probed, size, models)
            probed = [t for t, count in zip(probed, counts, strict=True) if not count]
            for tensor in probed:  # no model brings back an element that cannot agree
                tensor.ruled_out += size
            size *= _PROBE_GROWTH
        self._tensors = [t for t in self._tensors if t.ruled_out < t.numel]

    def _seems_unchanged(self, tensor: _Tensor, version: int) -> bool:
        def sample(version: int) -> memoryview:
            begin, end = tensor.begins[version], tensor.ends[version]
            return self._buffers[version][begin : min(begin + _SAMPLE_BYTES, end)]

        return not any(sample(version)) if tensor.signature.task_vectors else sample(version) == sample(0)

    def _count(self, tensors: Sequence[_Tensor], size: int, models: int) -> list[int]:
        """Of the next elements of each tensor, those that can agree or are not finite."""
        rows: dict[Signature, list[int]] = {}
        for row, tensor in enumerate(tensors):
            rows.setdefault(tensor.signature, []).append(row)
        found = [0] * len(tensors)
        for (result, dtypes, task_vectors), same in rows.items():
            signature = Signature(result, dtypes[:models], task_vectors)
            segments = [self._segment(tensors[row], size, (result, *dtypes[:models])) for row in same]
            assert self._skipping.counter
            counts = self._skipping.counter(Batch("cpu", signature, segments), self._skipping.rule, 1)
            for row, count in zip(same, counts.tolist(), strict=True):
                found[row] = sum(count)
        return found

    def _segment(self, tensor: _Tensor, size: int, dtypes: Sequence[str]) -> Segment:
        versions = zip(self._addresses, tensor.begins, tensor.sizes, dtypes, strict=False)
        base, *models = [
            Operand(address + begin + tensor.ruled_out * bytes_each, dtype, self._owner)
            for address, begin, bytes_each, dtype in versions
        ]
        return Segment(min(size, tensor.numel - tensor.ruled_out), base, models, None)

    def byte_ranges(self, version: int) -> Iterator[tuple[int, int]]:
        """The bytes to read of a version, 0 being the base; neighbouring tensors are one range."""
        begin = end = 0
        for tensor in self._tensors:
            if tensor.begins[version] > end:
                if end > begin:
                    yield begin, end
                begin = tensor.begins[version]
            end = tensor.ends[version]
        if end > begin:
            yield begin, end


def none_agreed(chunk: Extent) -> list[ChunkCounts]:
    """The counts of a chunk in which no element agrees, and all are finite."""
    named: dict[Signature, list[tuple[str, int]]] = {}
    for tensor_slice in chunk.slices:
        named.setdefault(tensor_slice.signature, []).append((tensor_slice.name, tensor_slice.numel))
    return [(each, np.zeros((len(each), 2), np.int64)) for each in named.values()]

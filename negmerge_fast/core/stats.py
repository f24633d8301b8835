"""Counts of a merge, for each tensor and in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .batch import Counts


@dataclass(frozen=True)
class TensorStats:
    """Counts of one tensor.

    Attributes:
        elements: Elements of the tensor.
        agreed: Elements that the rule changed.
        nonfinite: Elements that kept the base's bits because something was not finite.
        vetoed_by_zero: Finite elements that did not agree, but would have if each difference of exactly zero had the sign of
            the majority. In the rest of the elements differences of both signs conflict.
        masked: Finite elements that kept the base's bits only because their weight is zero.
    """

    elements: int = 0
    agreed: int = 0
    nonfinite: int = 0
    vetoed_by_zero: int = 0
    masked: int = 0

    def __add__(self, other: TensorStats) -> TensorStats:
        return TensorStats(
            self.elements + other.elements,
            self.agreed + other.agreed,
            self.nonfinite + other.nonfinite,
            self.vetoed_by_zero + other.vetoed_by_zero,
            self.masked + other.masked,
        )


class Stats:
    """Counts of a merge, for each tensor and in all.

    Counts stay on their device until one of the numbers is read. On a GPU, read it on the stream of the merge, or make the stream
    that it is read on wait for that one.
    """

    def __init__(self) -> None:
        self._counted: dict[str, TensorStats] = {}
        self._pending: list[tuple[Sequence[tuple[str, int]], Counts]] = []

    def add(self, segments: Sequence[tuple[str, int]], counts: Counts) -> None:
        """Take the counts of one batch. segments has the tensor's name and the number of elements of each segment."""
        self._pending.append((segments, counts))
        if len(self._pending) >= 1024:  # a long job must not pile up counts
            self._count()

    def include(self, tensors: Mapping[str, TensorStats]) -> None:
        """Add the counts of other merges, by tensor."""
        self._count()
        for name, counted in tensors.items():
            before = self._counted.get(name)
            self._counted[name] = before + counted if before else counted

    def _count(self) -> None:
        if not self._pending:
            return
        total = dict(self._counted)
        for segments, counts in self._pending:
            for (name, numel), counted in zip(segments, counts.tolist(), strict=True):
                total[name] = total.get(name, TensorStats()) + TensorStats(numel, *counted)
        # In one step: an interrupt before it leaves all pending, and nothing is counted twice.
        self._counted, self._pending = total, []

    def __getstate__(self) -> dict[str, Any]:
        self._count()  # what is pending may belong to a device
        return self.__dict__

    @property
    def tensors(self) -> Mapping[str, TensorStats]:
        """Counts of each tensor, in the order they were merged. Integer and bool tensors are not in it."""
        self._count()
        return self._counted

    @property
    def elements(self) -> int:
        """Elements that were merged."""
        return sum(t.elements for t in self.tensors.values())

    @property
    def agreed(self) -> int:
        """Elements that the rule changed."""
        return sum(t.agreed for t in self.tensors.values())

    @property
    def nonfinite(self) -> int:
        """Elements that kept the base's bits because something was not finite."""
        return sum(t.nonfinite for t in self.tensors.values())

    @property
    def vetoed_by_zero(self) -> int:
        """Elements that only differences of exactly zero kept from agreeing. Models trained in bf16 have many."""
        return sum(t.vetoed_by_zero for t in self.tensors.values())

    @property
    def masked(self) -> int:
        """Elements that only a weight of zero kept from being changed."""
        return sum(t.masked for t in self.tensors.values())

    @property
    def consensus_ratio(self) -> float:
        """agreed / elements; 0 if there was nothing to merge."""
        return self.agreed / self.elements if self.elements else 0.0

    def __repr__(self) -> str:
        return (
            f"Stats(elements={self.elements}, agreed={self.agreed}, nonfinite={self.nonfinite}, "
            f"vetoed_by_zero={self.vetoed_by_zero}, {f'masked={self.masked}, ' if self.masked else ''}"
            f"consensus_ratio={self.consensus_ratio:.4f})"
        )

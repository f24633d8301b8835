"""The plan of a merge of checkpoints: what to read, merge and write.

An extent is a range of one output file. One with slices holds tensors that are neighbours in the base and in every model's
file, so that each version is read in one go. One without slices is copied from the base. Together extents cover every byte
of every output file, in order: a position in a plan counts those bytes. Chunks are extents cut to the size of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..checkpoints.base import ByteRange, Checkpoint, TensorRef
from ..checkpoints.reader import File
from ..core import pairing
from ..core.batch import Signature
from ..core.choices import WEIGHT_SIZES
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import Patterns, Rename
from ..core.ranges import Range
from ..runtime.interrupts import without_gc
from .element_weights import pair_weights
from .pairing import pair


class TensorSlice(NamedTuple):
    """Consecutive elements of a tensor, or all of them. weight: the storage type of their weights, if they have some."""

    name: str
    start: int
    numel: int
    signature: Signature
    weight: str | None = None

    @property
    def sizes(self) -> list[int]:
        """Bytes per element in the base, in each model and, if there are any, in the weights."""
        sizes = [FLOAT_SIZES[dtype] for dtype in (self.signature.result, *self.signature.models)]
        return sizes if self.weight is None else [*sizes, WEIGHT_SIZES[self.weight]]


class Extent(NamedTuple):
    """A range of an output file, and its versions in the base (the first source) and the models; then, of all slices or none, weights.

    path: the output file, relative to the output; it is written at the offset at which the base is read.
    """

    path: str
    sources: list[ByteRange]
    slices: list[TensorSlice]


@dataclass(frozen=True)
class Plan:
    """What a merge of checkpoints reads, merges and writes.

    Attributes:
        base: The base.
        models: The fine-tuned models.
        files: The files of the base by their names in the output, which mirrors them.
        extents: The output in order.
        unchanged: How many tensors are copied from the base.
        notes: What a user should know of the merge, a line each.
        placed: How many modules of each adapter have a place in the base, a line each.
        weights: What has a weight for each element, if there are any.
    """

    base: Checkpoint
    models: list[Checkpoint]
    files: dict[str, File]
    extents: list[Extent]
    unchanged: int
    notes: tuple[str, ...] = ()
    placed: tuple[str, ...] = ()
    weights: Checkpoint | None = None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that is read: the base, the models and the weights."""
        return [self.base, *self.models, *([self.weights] if self.weights else [])]

    @property
    def unweighted(self) -> Plan:
        """The plan of a merge without weights."""
        if self.weights is None:
            return self
        versions = 1 + len(self.models)
        extents = [
            Extent(e.path, e.sources[:versions], [s._replace(weight=None) for s in e.slices])
            for e in self.extents
        ]
        return replace(self, extents=extents, weights=None)

    @property
    def versions(self) -> int:
        """The most sources of an extent."""
        return len(self.checkpoints)

    @property
    def names(self) -> list[str]:
        """The tensors that are merged."""
        return [tensor_slice.name for extent in self.extents for tensor_slice in extent.slices]

    @property
    def tensors(self) -> int:
        return sum(len(extent.slices) for extent in self.extents)

    @property
    def is_low_rank(self) -> bool:
        """Whether some models are LoRA adapters."""
        return any(model.adapter for model in self.models)

    @property
    def elements(self) -> int:
        return sum(tensor_slice.numel for extent in self.extents for tensor_slice in extent.slices)

    @property
    def signatures(self) -> set[Signature]:
        return {tensor_slice.signature for extent in self.extents for tensor_slice in extent.slices}

    @property
    def whole(self) -> Range:
        return Range(0, sum(extent.sources[0].nbytes for extent in self.extents))

    @property
    def bytes_read(self) -> int:
        return sum(source.stored_nbytes for extent in self.extents for source in extent.sources)

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def sources(self) -> dict[str, list[File]]:
        """The files of all inputs that go into each file of the output."""
        found: dict[str, dict[File, None]] = {}
        for extent in self.extents:
            files = (file for source in extent.sources for file in source.file.sources)
            found.setdefault(extent.path, {}).update(dict.fromkeys(files))
        return {path: list(files) for path, files in found.items()}


def make_plan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    task_vectors: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    patterns: Patterns = pairing,
    merge_adapters: bool = False,
    weights: Checkpoint | None = None,
) -> Plan:
    """Pair the tensors of all checkpoints by name, and lay out the output.

    Args:
        base: The base.
        models: The fine-tuned models, or task vectors.
        task_vectors: Whether models are task vectors.
        include: A regular expression. Only tensors whose name matches are merged.
        exclude: A regular expression. Tensors whose name matches are copied from the base.
        rename: Regular expressions and what replaces their matches in the models' names.
        patterns: What compiles them.
        merge_adapters: Whether LoRA adapters are models, merged into the base, and not task vectors.
        weights: What has a weight for each element.

    Raises:
        InputError: If names, shapes or types do not fit, or something cannot be merged element by element; the line says what.
    """
    if base.undecided:
        raise InputError(base.undecided[0])
    paired = pair(
        base,
        models,
        task_vectors=task_vectors,
        include=include,
        exclude=exclude,
        rename=rename,
        patterns=patterns,
        merge_adapters=merge_adapters,
    )
    if not paired.base:
        raise InputError(f"{base.path}: no floating-point tensor, expected at least one to merge")
    notes = [note for checkpoint in (base, *models) for note in checkpoint.notes] + paired.notes
    of_elements: Mapping[str, TensorRef] = {}
    if weights:
        of_elements, said = pair_weights(base, paired.base, weights, patterns.compile_renames(rename))
        notes += [*weights.notes, *said]
    plan = plan_of(
        base, paired.checkpoints, paired.base, paired.models, paired.task_vectors, notes, of_elements
    )
    return replace(plan, placed=tuple(paired.placed), weights=weights)


def plan_of(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    tensors: Mapping[str, TensorRef],
    versions: Sequence[Mapping[str, TensorRef]],
    task_vectors: bool,
    notes: Sequence[str],
    weights: Mapping[str, TensorRef] | None = None,
) -> Plan:
    """Lay out the output of a merge whose tensors are paired.

    Args:
        base: The base.
        models: The fine-tuned models, or task vectors.
        tensors: Those of the base that are merged.
        versions: Those of each model, under the same names.
        task_vectors: Whether models are task vectors.
        notes: What a user should know, a line each.
        weights: A weight for each element of those of the base that have some.
    """
    held: dict[File, list[tuple[str, TensorRef]]] = {file: [] for file in base.weights.values()}
    for name, tensor in tensors.items():
        held[tensor.source.file].append((name, tensor))
    extents: list[Extent] = []
    with without_gc():
        for path, file in base.weights.items():
            extents += _extents(path, file, held[file], versions, weights or {}, task_vectors)
    extents += [
        Extent(name, [ByteRange(file, 0, file.size)], [])
        for name, file in base.extra_files.items()
        if file.size
    ]
    files = {**base.weights, **base.extra_files}
    unchanged = len(base.tensors) + len(base.unindexed) - len(tensors)
    return Plan(base, list(models), files, extents, unchanged, tuple(notes))


def _extents(
    path: str,
    file: File,
    held: list[tuple[str, TensorRef]],
    models: Sequence[Mapping[str, TensorRef]],
    weights: Mapping[str, TensorRef],
    task_vectors: bool,
) -> Iterator[Extent]:
    """Cover one file of the base, which holds these tensors to merge."""
    position = 0
    neighbours: list[list[ByteRange]] = []
    slices: list[TensorSlice] = []

    def finished() -> Extent:
        columns = zip(*neighbours, strict=True)
        sources = [ByteRange(c[0].file, c[0].offset, c[-1].end - c[0].offset) for c in columns]
        return Extent(path, sources, slices)

    for name, tensor in sorted(held, key=lambda item: item[1].source[1:]):
        versions = [tensor, *(model[name] for model in models)]
        weight = weights.get(name)
        sources = [version.source for version in (versions if weight is None else (*versions, weight))]
        if neighbours and not _are_adjacent(neighbours[-1], sources):
            yield finished()
            neighbours, slices = [], []
        if not neighbours and tensor.source.offset > position:
            yield Extent(path, [ByteRange(file, position, tensor.source.offset - position)], [])
        signature = Signature(tensor.spec.dtype, tuple(v.spec.dtype for v in versions[1:]), task_vectors)
        neighbours.append(sources)
        slices.append(TensorSlice(name, 0, tensor.numel, signature, weight.spec.dtype if weight else None))
        position = tensor.source.end
    if neighbours:
        yield finished()
    if file.size > position:
        yield Extent(path, [ByteRange(file, position, file.size - position)], [])


def _are_adjacent(previous: list[ByteRange], current: list[ByteRange]) -> bool:
    return len(previous) == len(current) and all(map(_adjacent, previous, current))


def _adjacent(previous: ByteRange, current: ByteRange) -> bool:
    return previous.file is current.file and previous.end == current.offset

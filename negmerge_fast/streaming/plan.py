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
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import Patterns, Rename
from ..core.ranges import Range
from ..runtime.interrupts import without_gc
from .pairing import pair


class TensorSlice(NamedTuple):
    """Consecutive elements of a tensor, or all of them."""

    name: str
    start: int
    numel: int
    signature: Signature

    @property
    def sizes(self) -> list[int]:
        """Bytes per element in the base and in each model."""
        return [FLOAT_SIZES[dtype] for dtype in (self.signature.result, *self.signature.models)]


class Extent(NamedTuple):
    """A range of an output file, and its versions in the base (the first source) and the models.

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
    """

    base: Checkpoint
    models: list[Checkpoint]
    files: dict[str, File]
    extents: list[Extent]
    unchanged: int
    notes: tuple[str, ...] = ()
    placed: tuple[str, ...] = ()

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
    plan = plan_of(base, paired.checkpoints, paired.base, paired.models, paired.task_vectors, notes)
    return replace(plan, placed=tuple(paired.placed))


def plan_of(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    tensors: Mapping[str, TensorRef],
    versions: Sequence[Mapping[str, TensorRef]],
    task_vectors: bool,
    notes: Sequence[str],
) -> Plan:
    """Lay out the output of a merge whose tensors are paired.

    Args:
        base: The base.
        models: The fine-tuned models, or task vectors.
        tensors: Those of the base that are merged.
        versions: Those of each model, under the same names.
        task_vectors: Whether models are task vectors.
        notes: What a user should know, a line each.
    """
    held: dict[File, list[tuple[str, TensorRef]]] = {file: [] for file in base.weights.values()}
    for name, tensor in tensors.items():
        held[tensor.source.file].append((name, tensor))
    extents: list[Extent] = []
    with without_gc():
        for path, file in base.weights.items():
            extents += _extents(path, file, held[file], versions, task_vectors)
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
        sources = [version.source for version in versions]
        if neighbours and not all(map(_adjacent, neighbours[-1], sources)):
            yield finished()
            neighbours, slices = [], []
        if not neighbours and tensor.source.offset > position:
            yield Extent(path, [ByteRange(file, position, tensor.source.offset - position)], [])
        signature = Signature(tensor.spec.dtype, tuple(v.spec.dtype for v in versions[1:]), task_vectors)
        neighbours.append(sources)
        slices.append(TensorSlice(name, 0, tensor.numel, signature))
        position = tensor.source.end
    if neighbours:
        yield finished()
    if file.size > position:
        yield Extent(path, [ByteRange(file, position, file.size - position)], [])


def _adjacent(previous: ByteRange, current: ByteRange) -> bool:
    return previous.file is current.file and previous.end == current.offset

"""Statistics of a consensus: of models, counted in one pass over their files; of a delta; or of the report of a merge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Semaphore
from time import perf_counter
from typing import Any

import numpy as np

from ..backends import registry
from ..checkpoints.base import ByteRange
from ..checkpoints.delta import DeltaCheckpoint, open_delta
from ..checkpoints.reader import File, Reader
from ..checkpoints.strict_json import parse_json
from ..core.batch import Batch, Operand, Segment, Signature
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, short_repr
from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename
from ..core.rule import Inputs
from ..runtime import memory
from ..runtime.buffers import Timeline, WorkerBuffers
from ..runtime.device import buffers_on
from ..runtime.executor import process_in_order
from ..streaming.api import open_and_plan
from ..streaming.budget import MAX_CHUNK_BYTES, allocate, max_open_files
from ..streaming.options import MergeOptions, PathLike, as_input, as_paths, require_callable
from ..streaming.partition import chunks
from ..streaming.plan import Extent, Plan
from ..streaming.progress import OnProgress
from ..streaming.read_ahead import ReadAhead
from ..streaming.worker import batches
from . import counting
from .counting import COUNTED_OF_PREFIXES, OF_MODEL, OF_PREFIX

# Segments that are counted at once: a row of counts may be longer than a small tensor.
_ROWS = 64

_AGREED, _NONFINITE, _VETOED = (OF_PREFIX.index(kind) for kind in ("agreed", "nonfinite", "vetoed_by_zero"))


@dataclass(frozen=True)
class ConsensusStatistics:
    """What some models agree on. The fields are those of statistics.json, and of the report of a merge where that has them.

    Attributes:
        source: What was read: "models", a "delta", or the "report" of a merge.
        base: The path of the base, as far as it is known.
        models: The paths of the models, in their order. Empty of a delta, which does not record them.
        model_count: The number of models.
        min_agreement: The fraction of the models that had to agree.
        elements: Elements that were compared.
        agreed: Elements on whose sign they agree.
        consensus_ratio: agreed / elements.
        nonfinite: Elements where something is not finite; None if it is not known.
        vetoed_by_zero: Finite elements that only differences of exactly zero keep from the consensus; None if it is not known.
        notes: What a user should know, a line each.
        prefixes: For each number of models from 1 on, of the first so many: models, agreed, nonfinite, vetoed_by_zero, and how many
            elements agreed before the last of them and do not with it, broken_by_zero and broken_by_sign. None if not counted.
        dissent: Of each model: how many elements would agree without it, because its difference is zero, has the other sign or is not
            finite (sole_by_zero, sole_by_sign, sole_by_nonfinite); and in how many it is against a majority of one sign. None if not
            counted.
        magnitudes: edges, and the counts of means between these, of all elements that agree. The first and the last count are of
            means beyond the edges. None if not counted.
        tensors: name, elements, agreed, nonfinite and vetoed_by_zero of each tensor; of models also agreed_by_prefix and sole_dissents,
            both a number for each model.
    """

    source: str
    base: str
    models: list[str]
    model_count: int
    min_agreement: float
    elements: int
    agreed: int
    consensus_ratio: float
    nonfinite: int | None
    vetoed_by_zero: int | None
    notes: list[str]
    prefixes: list[dict[str, int]] | None
    dissent: list[dict[str, int]] | None
    magnitudes: dict[str, list[Any]] | None
    tensors: list[dict[str, Any]]

    def to_json(self) -> str:
        """Return the statistics as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def consensus_statistics(
    base: PathLike,
    finetuned: Sequence[PathLike] = (),
    *,
    inputs: Inputs = "finetuned",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    adapters_as: AdaptersAs = "difference",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> ConsensusStatistics:
    """Count what models agree on: all of them and each first few, and which of them keeps elements from the consensus.

    Models are read once, in bounded memory. Nothing is written.

    Args:
        base: A checkpoint as of merge_checkpoints. Without models: a consensus delta, or the JSON report of a merge or of this function.
            Then only what these have is known.
        finetuned: Models of the same kind, in the order of a merge.
        inputs: As of merge_checkpoints, like all that follow. Only models have such options.
        include: A regular expression. Only tensors whose name matches are counted.
        exclude: A regular expression. Tensors whose name matches are not counted.
        rename: Regular expressions and what replaces their matches in the names of tensors of finetuned.
        adapters_as: "difference" or "merged".
        memory_budget: The most bytes to allocate.
        threads: How many threads read and count.
        progress: Called with (bytes done, bytes in all).

    Raises:
        InputError: If an input or option is bad.
        OSError: If reading fails.
        TypeError: If finetuned is one path.
    """
    require_callable("progress", progress)
    options = MergeOptions(
        scale=0.0, inputs=inputs, include=include, exclude=exclude, rename=rename, device="cpu",
        memory_budget=memory_budget, threads=threads, skip_unchanged=False, adapters_as=adapters_as,
    )  # fmt: skip
    models = list(finetuned) if as_paths("finetuned", finetuned) else []
    if models:
        return _of_models(open_and_plan(base, models, options, extra_files=False), options, progress)
    given = {"inputs": inputs != "finetuned", "include": include, "exclude": exclude, "rename": rename}
    for name in (name for name, value in given.items() if value):
        raise InputError(f"{name}: given without models, expected a base and models to compare")
    path = as_input("base", base).path
    if path.suffix == ".json":
        return _of_report(path)
    return _of_delta(open_delta(path), progress)


class _Counts:
    """What workers count together. Sums of integers do not depend on the order of the chunks."""

    def __init__(self, models: int, count: counting.CountPrefixes) -> None:
        self.kinds, self._count, self._lock = len(COUNTED_OF_PREFIXES) * models, count, Lock()
        self.tensors: dict[str, counting.Array] = {}
        self.bins: counting.Array = np.zeros(len(counting.EDGES) + 1, np.int64)

    def add(self, batch: Batch, names: Sequence[str]) -> None:
        """Count a batch. names: of the tensor of each segment."""
        for row in range(0, len(names), _ROWS):
            segments = batch.segments[row : row + _ROWS]
            counted = self._count(dataclasses.replace(batch, segments=segments))
            with self._lock:
                for name, found in zip(names[row : row + _ROWS], counted[:, : self.kinds], strict=True):
                    if name in self.tensors:
                        self.tensors[name] += found
                    else:
                        self.tensors[name] = found.copy()
                self.bins += counted[:, self.kinds :].sum(0)

    def magnitudes(self) -> dict[str, list[Any]]:
        return {"edges": list(counting.EDGES), "counts": self.bins.tolist()}


def _of_models(plan: Plan, options: MergeOptions, progress: OnProgress | None) -> ConsensusStatistics:
    extents = [extent for extent in plan.extents if extent.slices]
    name, count = counting.choose("cpu")
    counts = _Counts(len(plan.models), count)
    workers, chunk_bytes, _ = allocate(plan, options, "cpu", (name,))
    total, done = sum(source.nbytes for extent in extents for source in extent.sources), 0

    def on_result(read: int) -> None:
        nonlocal done
        done += read
        if progress:
            progress(done, total)

    turns = Semaphore(options.thread_count if name in registry.CONCURRENT else 1)
    release = total > memory.free_memory() // 2
    with _shared_reader(
        {file for extent in extents for source in extent.sources for file in source.file.sources}
    ) as shared:
        read_ahead = ReadAhead()

        @contextmanager
        def open_worker() -> Iterator[Any]:
            with (
                nullcontext(shared) if shared else Reader(max(max_open_files() // workers, 1)) as reader,
                buffers_on("cpu", len(plan.models) + 1, chunk_bytes, Timeline(kept=False)) as buffers,
            ):
                yield _ChunkCounter(counts, turns, reader, read_ahead, buffers, release)

        process_in_order(chunks(extents, chunk_bytes), workers, open_worker, on_result)
    return _summed(plan, options, counts)


def _shared_reader(files: set[File]) -> AbstractContextManager[Reader | None]:
    """A reader for all workers, if it can keep all files open: the system reads ahead for each descriptor."""
    return Reader(len(files)) if len(files) <= max_open_files() else nullcontext()


@dataclass(frozen=True)
class _ChunkCounter:
    """A worker: reads a chunk of all versions, and counts it."""

    counts: _Counts
    turns: AbstractContextManager[Any]
    reader: Reader
    read_ahead: ReadAhead
    buffers: WorkerBuffers
    release: bool

    def __call__(self, chunk: Extent) -> int:
        buffers = self.buffers.reserve([source.nbytes for source in chunk.sources])
        self.reader.requests = requested = self.read_ahead.requests
        began, cached = perf_counter(), True
        for source, buffer in zip(chunk.sources, buffers, strict=True):
            cached = bool(source.read_into(self.reader, buffer, release=self.release)) and cached
        read = sum(source.nbytes for source in chunk.sources)
        self.read_ahead.record(cached, read, perf_counter() - began, requested)
        with self.turns:
            for batch, slices in batches(chunk, "cpu", *self.buffers.addresses()):
                self.counts.add(batch, [tensor_slice.name for tensor_slice in slices])
        return read


def _summed(plan: Plan, options: MergeOptions, counts: _Counts) -> ConsensusStatistics:
    models = len(plan.models)
    elements: dict[str, int] = {}
    for tensor_slice in (s for extent in plan.extents for s in extent.slices):
        elements[tensor_slice.name] = elements.get(tensor_slice.name, 0) + tensor_slice.numel
    by_tensor = {name: counts.tensors[name].reshape(-1, models) for name in elements}
    whole = sum(by_tensor.values(), np.zeros((len(COUNTED_OF_PREFIXES), models), np.int64))
    of_prefix, of_model = whole[: len(OF_PREFIX)], whole[len(OF_PREFIX) :]
    in_all = sum(elements.values())
    return ConsensusStatistics(
        source="models",
        base=str(plan.base.path),
        models=[str(model.path) for model in plan.models],
        model_count=models,
        min_agreement=options.min_agreement,
        elements=in_all,
        agreed=int(of_prefix[_AGREED, -1]),
        consensus_ratio=_ratio(int(of_prefix[_AGREED, -1]), in_all),
        nonfinite=int(of_prefix[_NONFINITE, -1]),
        vetoed_by_zero=int(of_prefix[_VETOED, -1]),
        notes=list(plan.notes),
        prefixes=[
            {"models": k + 1, **dict(zip(OF_PREFIX, column, strict=True))}
            for k, column in enumerate(of_prefix.T.tolist())
        ],
        dissent=[dict(zip(OF_MODEL, column, strict=True)) for column in of_model.T.tolist()],
        magnitudes=counts.magnitudes(),
        tensors=[
            {
                "name": name,
                "elements": elements[name],
                "agreed": int(found[_AGREED, -1]),
                "nonfinite": int(found[_NONFINITE, -1]),
                "vetoed_by_zero": int(found[_VETOED, -1]),
                "agreed_by_prefix": found[_AGREED].tolist(),
                "sole_dissents": found[len(OF_PREFIX) : -1].sum(0).tolist(),
            }
            for name, found in by_tensor.items()
        ],
    )


def _of_delta(delta: DeltaCheckpoint, progress: OnProgress | None) -> ConsensusStatistics:
    """The means of a delta are task vectors of one model: they agree with themselves."""
    _, count = counting.choose("cpu")
    counts = _Counts(1, count)
    total, done = sum(tensor.means.source.nbytes for tensor in delta.tensors.values()), 0
    release = total > memory.free_memory() // 2
    with Reader(1) as reader, buffers_on("cpu", 1, MAX_CHUNK_BYTES, Timeline(kept=False)) as buffers:
        for name, tensor in delta.tensors.items():
            signature = Signature(tensor.means.spec.dtype, (tensor.means.spec.dtype,), True)
            for source in _cut(tensor.means.source):
                (buffer,) = buffers.reserve([source.nbytes])
                source.read_into(reader, buffer, release=release)
                (address,), owner = buffers.addresses()
                means = Operand(address, signature.result, owner)
                numel = source.nbytes // FLOAT_SIZES[signature.result]
                counts.add(Batch("cpu", signature, [Segment(numel, None, [means], None)]), [name])
                done += source.nbytes
                if progress:
                    progress(done, total)
            found = int(counts.tensors[name][_AGREED]) if name in counts.tensors else 0
            if found != tensor.agreed:
                path = tensor.means.source.file.path
                raise InputError(
                    f"{path}: tensor {short_repr(name)}: {tensor.agreed - found} means are zero or not finite, expected none"
                )
    infos = {name: tensor.info for name, tensor in delta.tensors.items()}
    return ConsensusStatistics(
        source="delta",
        base=str(delta.info.base.get("path", "")),
        models=[],
        model_count=delta.info.models,
        min_agreement=delta.info.min_agreement,
        elements=delta.elements,
        agreed=delta.agreed,
        consensus_ratio=_ratio(delta.agreed, delta.elements),
        nonfinite=sum(info.nonfinite for info in infos.values()),
        vetoed_by_zero=sum(info.vetoed_by_zero for info in infos.values()),
        notes=[],
        prefixes=None,
        dissent=None,
        magnitudes=counts.magnitudes(),
        tensors=[
            {
                "name": name,
                "elements": info.numel,
                "agreed": delta.tensors[name].agreed,
                "nonfinite": info.nonfinite,
                "vetoed_by_zero": info.vetoed_by_zero,
            }
            for name, info in infos.items()
        ],
    )


def _cut(source: ByteRange) -> Iterator[ByteRange]:
    for at in range(0, source.nbytes, MAX_CHUNK_BYTES):
        yield ByteRange(source.file, source.offset + at, min(MAX_CHUNK_BYTES, source.nbytes - at))


def _of_report(path: Path) -> ConsensusStatistics:
    """The report of a merge, or statistics."""
    file = File.at(path)
    found = parse_json(file.read(0, file.size), path, "the report", surrogates=True, dense=True)

    def refused(field: str, value: object, expected: str) -> InputError:
        return InputError(f"{path}: {field} is {short_repr(value)}, expected {expected}")

    def of_type(where: Mapping[str, Any], field: str, *types: type) -> Any:
        value = where.get(field)
        if type(value) not in types:
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise refused(field, value, f"{names}, as in the report of a merge")
        return value

    def count(where: Mapping[str, Any], field: str, most: int, *more: type) -> Any:
        value = of_type(where, field, int, *more)
        if value is not None and not 0 <= value <= most:
            raise refused(field, value, f"a number from 0 to {most:,}")
        return value

    models = of_type(found, "models", list)
    n = count(found, "model_count", 1 << 40) if "model_count" in found else len(models)
    if n < 1 or not all(isinstance(model, str) for model in models) or len(models) not in (0, n):
        raise refused("models", models, "the paths of the models")
    elements = count(found, "elements", 1 << 62)
    none = type(None)

    def counts_of(where: Mapping[str, Any], size: int) -> dict[str, Any]:
        return {
            "agreed": count(where, "agreed", size),
            "nonfinite": count(where, "nonfinite", size, none),
            "vetoed_by_zero": count(where, "vetoed_by_zero", size, none),
        }

    def column(where: Mapping[str, Any], field: str, size: int) -> list[int]:
        values: list[int] = of_type(where, field, list)
        if len(values) != n or not all(type(value) is int and 0 <= value <= size for value in values):
            raise refused(field, values, f"{n} numbers from 0 to {size:,}")
        return values

    def rows(field: str, keys: Sequence[str]) -> list[dict[str, int]] | None:
        value = found.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n or not all(isinstance(row, dict) for row in value):
            raise refused(field, value, f"{n} objects")
        return [{key: count(row, key, max(elements, n)) for key in keys} for row in value]

    def tensor(entry: Any) -> dict[str, Any]:
        if not isinstance(entry, dict):
            raise refused("tensors", entry, "objects")
        size = count(entry, "elements", elements)
        more = [field for field in ("agreed_by_prefix", "sole_dissents") if field in entry]
        name = of_type(entry, "name", str)
        return {"name": name, "elements": size, **counts_of(entry, size)} | {
            field: column(entry, field, size) for field in more
        }

    tensors = [tensor(entry) for entry in of_type(found, "tensors", list)]
    agreed = counts_of(found, elements)
    return ConsensusStatistics(
        source=found["source"] if found.get("source") in ("models", "delta") else "report",
        base=of_type(found, "base", str),
        models=models,
        model_count=n,
        min_agreement=of_type(found, "min_agreement", int, float),
        elements=elements,
        consensus_ratio=_ratio(agreed["agreed"], elements),
        notes=[str(note) for note in found.get("notes") or ()],
        prefixes=rows("prefixes", ("models", *OF_PREFIX)),
        dissent=rows("dissent", OF_MODEL),
        magnitudes=_magnitudes(found.get("magnitudes"), refused),
        tensors=tensors,
        **agreed,
    )


def _magnitudes(value: Any, refused: Any) -> dict[str, list[Any]] | None:
    if value is None:
        return None
    edges = list(counting.EDGES)
    counts = value.get("counts") if isinstance(value, dict) else None
    if counts is None or value.get("edges") != edges or not isinstance(counts, list):
        raise refused("magnitudes", value, "the edges and counts of this version")
    if len(counts) != len(edges) + 1 or not all(type(each) is int and each >= 0 for each in counts):
        raise refused("counts", counts, f"{len(edges) + 1} numbers")
    return {"edges": edges, "counts": counts}


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

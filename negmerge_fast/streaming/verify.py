"""Whether an output still is what a merge wrote, and whether that is what its inputs give.

The first is held against the manifest: checksums find damage, not malice. The second takes a random sample of the output, has
the reference merge it once more, and compares bits.
"""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..backends import registry
from ..checkpoints.base import ByteRange
from ..checkpoints.formats import open_checkpoint
from ..checkpoints.reader import File, Reader
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..output import manifest
from ..output.checksums import Checksums
from ..runtime import memory
from ..runtime.buffers import Timeline, WorkerBuffers
from ..runtime.executor import process_in_order
from .partition import chunks
from .plan import Extent, Plan, make_plan
from .progress import ChunkResult
from .worker import batches

OnProgress = Callable[[int, int], None]
PathLike = str | os.PathLike[str]
_Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

# Bytes that are read at once: long enough for a disk, and for the cache they are hashed from.
_CHUNK_BYTES = 1 << 20
_FILES_AT_ONCE = 4


class DamageError(RuntimeError):
    """An output is not what it should be. found: one line for each file."""

    def __init__(self, found: Sequence[str]) -> None:
        super().__init__("; ".join(found))
        self.found = list(found)


@dataclass(frozen=True)
class Verified:
    """An output in which no damage was found.

    version: of the negmerge_fast that wrote it. files, bytes: that have their checksums. not_listed: what lies among them
    and is not in the manifest. blocks, bytes_compared: of the output, that were merged once more.
    """

    output: str
    version: str
    files: int
    bytes: int
    not_listed: list[str]
    blocks: int
    bytes_compared: int


def verify_checkpoint(
    output: PathLike,
    against: Sequence[PathLike] | None = None,
    *,
    blocks: int = 64,
    seed: int = 0,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> Verified:
    """Hold an output of merge_checkpoints against its manifest and, if they are given, against the checkpoints it was made of.

    against: the base and the fine-tuned models, in the order of the merge: a sample of blocks is merged by the reference and
        must have the output's bits.
    blocks: how many, of up to 1 MiB; drawn evenly by bytes, with seed. All of them, where there are no more.
    progress: called with (bytes done, bytes in all); it may raise to stop.

    Raises DamageError if the output is not what it should be, InputError if that can't be said: a file is missing, the
    manifest is none, or the checkpoints aren't those of the merge.
    """
    for name, number in {"blocks": blocks, "threads": threads or registry.usual_threads()}.items():
        if number < 1:
            raise InputError(f"{name}: {number}, expected at least 1")
    if isinstance(against, (str, os.PathLike)):
        raise TypeError("against: one path, expected the base and at least one fine-tuned model")
    out = _open(Path(output))
    plan = _plan(out, against) if against is not None else None
    sample = _sample(plan, blocks, seed) if plan else []
    total = sum(file.size for file in out.files.values())
    total += sum(chunk.sources[0].nbytes + sum(s.nbytes for s in chunk.sources) for chunk in sample)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    advance(0)
    _check(out, threads or registry.usual_threads(), advance)
    if plan:
        _compare(out, plan, sample, advance)
    return Verified(
        str(out.path),
        out.manifest.version,
        len(out.files),
        sum(file.size for file in out.files.values()),
        out.not_listed,
        len(sample),
        sum(chunk.sources[0].nbytes for chunk in sample),
    )


@dataclass(frozen=True)
class _Output:
    """files: those that the manifest lists, by the names it has for them."""

    path: Path
    manifest: manifest.Manifest
    files: dict[str, File]
    not_listed: list[str]


def _open(path: Path) -> _Output:
    directory = os.path.isdir(path)
    place = manifest.manifest_path(path, directory)
    if not directory:
        File.at(path)
    found = manifest.read(place)
    if directory:
        files = {name: File.at(path / name) for name in found.files}
        others = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
        return _Output(path, found, files, sorted(others - found.files.keys() - {place.name}))
    if len(found.files) != 1:
        raise InputError(f"{place}: files are {len(found.files)}, expected one, {path.name}")
    return _Output(path, found, dict.fromkeys(found.files, File.at(path)), [])


def _plan(out: _Output, against: Sequence[PathLike]) -> Plan:
    """The merge that made an output, once more. Raises InputError if it can't be that one."""
    if len(against) < 2:
        raise InputError("against: expected the base and at least one fine-tuned model")
    base, *models = [open_checkpoint(path) for path in against]
    recipe = out.manifest.recipe
    if differs := manifest.differences([recipe.base, *recipe.models], [base, *models]):
        raise InputError(differs)
    plan = make_plan(
        base,
        models,
        task_vectors=recipe.inputs == "task_vectors",
        include=recipe.include,
        exclude=recipe.exclude,
    )
    if base.is_directory != out.path.is_dir():
        raise InputError(f"{base.path}: is a {base.kind}, expected one like {out.path}")
    targets = (
        dict(plan.files) if base.is_directory else dict(zip(out.files, plan.files.values(), strict=True))
    )
    for name in sorted(targets.keys() | out.manifest.files.keys()):
        here, listed = targets.get(name), out.manifest.files.get(name)
        if here is None or listed is None or here.size != listed[0]:
            found, expected = (
                here and f"{here.size} bytes",
                f"{listed[0]} bytes" if listed else "no such file",
            )
            raise InputError(
                f"{base.path / name}: {found or 'no such file'}, expected {expected} as in {out.path}"
            )
    return plan


def _check(out: _Output, threads: int, advance: Callable[[int], None]) -> None:
    """Hold every file against its size and its checksum."""
    expected = out.manifest.files
    damage = {
        name: f"{file.path}: {file.size} bytes, expected {expected[name][0]}"
        for name, file in out.files.items()
        if file.size != expected[name][0]
    }
    whole = {name: file for name, file in out.files.items() if name not in damage}
    sums = Checksums({name: file.size for name, file in whole.items()}, out.manifest.block)
    extents = [Extent(name, [ByteRange(file, 0, file.size)], []) for name, file in whole.items()]
    chunk_bytes = -(-_CHUNK_BYTES // sums.block) * sums.block
    release = sum(file.size for file in whole.values()) > memory.free_memory() // 2
    ready = partial(_hasher, sums, chunk_bytes, release)
    process_in_order(chunks(extents, chunk_bytes), threads, ready, lambda chunk: advance(chunk.read))
    for name, file in whole.items():
        if (found := sums.of(name)) != expected[name][1]:
            damage[name] = f"{file.path}: checksum {found}, expected {expected[name][1]}"
    if damage:
        raise DamageError([damage[name] for name in sorted(damage)])


@contextmanager
def _hasher(sums: Checksums, chunk_bytes: int, release: bool) -> Iterator[Callable[[Extent], ChunkResult]]:
    buffer = memoryview(bytearray(chunk_bytes))
    with Reader(_FILES_AT_ONCE) as reader:

        def work(chunk: Extent) -> ChunkResult:
            (source,) = chunk.sources
            source.read_into(reader, buffer[: source.nbytes], release=release)
            sums.add(chunk.path, source.offset, buffer[: source.nbytes])
            return ChunkResult(source.nbytes)

        yield work


def _sample(plan: Plan, blocks: int, seed: int) -> list[Extent]:
    """Some pieces of a plan, in their order, of which each byte of the output is as likely to be in one as any other."""
    # The first so many arrivals, where each piece arrives at a rate that is its size: a draw without replacement.
    chance = random.Random(seed)
    every = enumerate(chunk for chunk in chunks(plan.extents, _CHUNK_BYTES) if chunk.sources[0].nbytes)
    arrivals = ((chance.expovariate(chunk.sources[0].nbytes), number, chunk) for number, chunk in every)
    drawn = heapq.nsmallest(blocks, arrivals, key=lambda arrival: arrival[:2])
    return [chunk for _, _, chunk in sorted(drawn, key=lambda arrival: arrival[1])]


def _compare(out: _Output, plan: Plan, sample: Sequence[Extent], advance: Callable[[int], None]) -> None:
    """Merge each piece of a sample on the base's bytes, and hold these against the output's."""
    _, merge = registry.choose("torch", "cpu")
    timeline = Timeline(kept=False)
    with (
        Reader(_FILES_AT_ONCE) as reader,
        WorkerBuffers(len(plan.models) + 2, _CHUNK_BYTES, timeline) as lane,
    ):
        for chunk in sample:
            base = chunk.sources[0]
            file = out.files[chunk.path] if out.path.is_dir() else next(iter(out.files.values()))
            sources = [*chunk.sources, ByteRange(file, base.offset, base.nbytes)]
            buffers = lane.reserve([source.nbytes for source in sources])
            for source, buffer in zip(sources, buffers, strict=True):
                source.read_into(reader, buffer)
            addresses, owner = lane.addresses()
            for batch, _ in batches(chunk, "cpu", addresses[:-1], owner):
                merge(batch, out.manifest.recipe.rule)
            expected, found = (np.frombuffer(buffer, np.uint8) for buffer in (buffers[0], buffers[-1]))
            if (different := np.flatnonzero(expected != found)).size:
                place = int(different[0])
                raise DamageError([f"{file.path}: {_difference(plan, chunk, place, found, expected)}"])
            advance(sum(source.nbytes for source in sources))


def _difference(plan: Plan, chunk: Extent, place: int, found: _Bytes, expected: _Bytes) -> str:
    """What differs at a byte of a piece: an element, where it was merged, or the byte."""
    base = chunk.sources[0]
    at = base.offset + place
    holding = (
        (name, tensor)
        for name, tensor in plan.base.tensors.items()
        if tensor.source.file is base.file and tensor.source.offset <= at < tensor.source.end
    )
    name, tensor = next(holding, ("", None))
    if tensor is None:
        return f"byte {at} is {found[place]:#04x}, expected {expected[place]:#04x} as in base"
    if not chunk.slices:
        where = f"tensor {name!r}: byte {at - tensor.source.offset}"
        return f"{where} is {found[place]:#04x}, expected {expected[place]:#04x} as in base"
    dtype = tensor.spec.dtype
    size = FLOAT_SIZES[dtype]
    element = (at - tensor.source.offset) // size
    index = tuple(int(i) for i in np.unravel_index(element, tensor.spec.shape))
    start = tensor.source.offset + element * size - base.offset
    was, should = (_number(run[start : start + size].tobytes(), dtype) for run in (found, expected))
    return f"tensor {name!r}: {was} at {index}, expected {should}"


def _number(raw: bytes, dtype: str) -> str:
    """An element's value, and its bits, by which a NaN may differ from a NaN."""
    wide = b"\0\0" + raw if dtype == "BF16" else raw
    value = np.frombuffer(wide, {8: "<f8", 4: "<f4", 2: "<f2"}[len(wide)])[0]
    return f"{value} (0x{raw[::-1].hex()})"

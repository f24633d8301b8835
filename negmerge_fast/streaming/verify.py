"""Verification of an output: against its manifest and, by merging a sample again, against its inputs.

Checksums in the manifest find damage, not malice. The sample is drawn at random, merged by the reference and compared bit by bit.
"""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..backends import masks, registry
from ..checkpoints.base import ByteRange
from ..checkpoints.composed import ComposedFile
from ..checkpoints.delta import DeltaCheckpoint, is_delta, open_delta
from ..checkpoints.formats import open_checkpoint, translate
from ..checkpoints.reader import File, Reader
from ..core.batch import Batch, Operand
from ..core.delta import mask_bytes
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, escape
from ..output import manifest
from ..output.checksums import Checksums
from ..runtime import memory
from ..runtime.buffers import Timeline, WorkerBuffers
from ..runtime.executor import process_in_order
from ..runtime.patterns import BoundedPatterns
from .bounds import bytes_to_measure, measure
from .expansion import expand, plan_delta
from .options import (
    MAX_THREADS,
    MergeOptions,
    PathLike,
    as_input,
    as_inputs,
    as_integer,
    as_path,
    require_callable,
)
from .partition import chunks
from .plan import Extent, Plan, TensorSlice, make_plan
from .progress import OnProgress
from .rules import Rules
from .worker import ruled_batches, segment_of, weight_of

_Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

# Long enough for a disk, and still in the cache when it is hashed.
_CHUNK_BYTES = 1 << 20
_MAX_OPEN_FILES = 4


class DamageError(RuntimeError):
    """Damage in an output.

    Attributes:
        found: One line for each damaged file, which may be the manifest itself.
    """

    def __init__(self, found: Sequence[str]) -> None:
        super().__init__("; ".join(found))
        self.found = list(found)

    def __str__(self) -> str:
        return escape(super().__str__())


@dataclass(frozen=True)
class Verified:
    """An output in which no damage was found.

    Attributes:
        output: The path that was verified.
        version: The version of negmerge_fast that wrote it.
        files: How many files have their checksums.
        bytes: The size of these files.
        not_listed: Files in the output that are not in the manifest.
        blocks: How many blocks were merged again.
        bytes_compared: The bytes of these blocks.
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
    weights: PathLike | None = None,
    blocks: int = 64,
    seed: int = 0,
    threads: int | None = None,
    progress: OnProgress | None = None,
) -> Verified:
    """Compare an output of merge_checkpoints with its manifest and, if given, with what it was made of.

    Args:
        output: The merged directory or file, or a consensus delta, with its manifest.
        against: The base and the fine-tuned models, in their order; or the base and the consensus delta that was applied.
            A random sample of blocks is merged again by the reference, and the output must have the same bits.
        weights: What had a weight for each element, if there was any. Needs against.
        blocks: How many blocks to sample, each of up to 1 MiB, drawn evenly by bytes. All of them if there are fewer.
        seed: The seed of the sample.
        threads: How many threads read and compute checksums. None is torch's number, or less within a CPU quota.
        progress: Called with (bytes done, bytes in all). It may raise to stop.

    Returns:
        What was compared.

    Raises:
        DamageError: If the output is not what it should be. Files that the manifest lists may be missing, or the manifest itself
            may have been altered.
        InputError: If that cannot be said: there is no valid manifest, a file cannot be read, or the checkpoints are not those of
            the merge.
        TypeError: If against is one path.
    """
    blocks, seed = _at_least_1("blocks", blocks), as_integer("seed", seed)
    threads = registry.usual_threads() if threads is None else _at_least_1("threads", threads)
    require_callable("progress", progress)
    out_path, inputs = (
        as_path("output", output),
        None if against is None else [each.path for each in as_inputs("against", against)],
    )
    of_elements = None if weights is None else as_input("weights", weights).path
    if of_elements and inputs is None:
        raise InputError("weights: given without against, expected both")
    with _being_readable(out_path):
        out = _open(out_path)
        found = None if inputs is None else _plan(out, inputs, of_elements)
        sample = _sample(found[0], blocks, seed) if found else []
        method = out.manifest.recipe.method if sample else None
        to_measure = bytes_to_measure(found[0].unweighted) if found and method and method.needs_bounds else 0
        total = sum(file.size for file in out.files.values()) + to_measure
        total += sum(chunk.sources[0].nbytes + sum(s.nbytes for s in chunk.sources) for chunk in sample)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        advance(0)
        _check(out, min(threads, MAX_THREADS), advance)
        if found:
            plan, rules = found
            if to_measure:
                assert method
                checked, options = done, MergeOptions(0.0, threads=min(threads, MAX_THREADS))
                bounds = measure(
                    plan.unweighted,
                    method,
                    options,
                    on_moved=lambda moved: advance(checked + min(moved, to_measure) - done),
                )
                rules = replace(rules, bounds=bounds)
            compare = _compare_means if out.manifest.recipe.means else _compare
            compare(out, plan, rules, sample, advance)
    return Verified(
        str(out.path),
        out.manifest.version,
        len(out.files),
        sum(file.size for file in out.files.values()),
        out.not_listed,
        len(sample),
        sum(chunk.sources[0].nbytes for chunk in sample),
    )


@contextmanager
def _being_readable(path: Path) -> Iterator[None]:
    """Tell what cannot be read from damage."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}, expected to read it") from None
    except RecursionError:
        raise InputError(f"{path}: folders are nested too deep") from None


def _at_least_1(name: str, value: object) -> int:
    if (number := as_integer(name, value)) < 1:
        raise InputError(f"{name}: {number}, expected at least 1")
    return number


@dataclass(frozen=True)
class _Opened:
    """An output to verify.

    Attributes:
        path: Its path.
        manifest: Its manifest.
        files: Those of the listed files that are there, by the manifest's names.
        missing: What there is in place of the others.
        not_listed: Files that are there and not listed.
    """

    path: Path
    manifest: manifest.Manifest
    files: dict[str, File]
    missing: dict[str, str]
    not_listed: list[str]


def _open(path: Path) -> _Opened:
    directory = os.path.isdir(path)
    manifest_path = manifest.manifest_path(path, directory)
    if not directory and not manifest_path.exists():
        File.at(path)
    try:
        found = manifest.read(manifest_path)
    except manifest.AlteredError as error:
        raise DamageError([str(error)]) from None
    if not directory and len(found.files) != 1:
        raise InputError(f"{manifest_path}: files are {len(found.files)}, expected one, {path.name}")
    files, missing = {}, {}
    for name in found.files:
        try:
            files[name] = _listed_file(path / name if directory else path)
        except _MissingError as error:
            missing[name] = str(error)
    present: set[str] = set()
    if directory:
        present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    not_listed = present - found.files.keys() - {manifest_path.name}
    return _Opened(path, found, files, missing, sorted(not_listed))


class _MissingError(Exception):
    """There is no regular file where there should be one."""


def _listed_file(path: Path) -> File:
    try:
        os.stat(path)
    except PermissionError as error:  # it may be there
        raise InputError(f"{path}: {error.strerror}") from None
    except (OSError, ValueError):
        pass  # told in words by what follows
    try:
        return File.at(path)
    except InputError as error:
        raise _MissingError(str(error)) from None


def _plan(out: _Opened, against: Sequence[Path], weights: Path | None) -> tuple[Plan, Rules]:
    """Plan the merge that made an output again; refuse checkpoints that are not its inputs."""
    if len(against) < 2:
        raise InputError("against: expected the base and at least one fine-tuned model")
    recipe = out.manifest.recipe
    base = translate(open_checkpoint(against[0], keep=recipe.keep, drop=recipe.drop), recipe.format or "auto")
    delta = open_delta(against[1]) if len(against) == 2 and is_delta(against[1]) else None
    if delta:
        models = [expand(delta)]
    else:
        models = [open_checkpoint(path, keep=recipe.keep, extra_files=False) for path in against[1:]]
    of_elements = None if weights is None else open_checkpoint(weights, extra_files=False)
    if (of_elements is None) != (recipe.weights is None):
        expected = recipe.weights.path if recipe.weights else "none"
        raise InputError(f"weights: {weights or 'none'}, expected {expected} as in {out.path}")
    checkpoints = [base, *models, *([of_elements] if of_elements else [])]
    if differs := manifest.differences(recipe.checkpoints, checkpoints):
        raise InputError(differs)
    with BoundedPatterns(manifest.manifest_path(out.path, out.path.is_dir())) as patterns:
        if delta:
            plan = plan_delta(base, delta)
        else:
            plan = make_plan(
                base,
                models,
                task_vectors=recipe.inputs == "task_vectors",
                include=recipe.include,
                exclude=recipe.exclude,
                rename=recipe.rename,
                patterns=patterns,
                merge_adapters=recipe.merged_adapters,
                weights=of_elements,
            )
        rules = Rules(recipe.rule, patterns.by_name(recipe.scales, plan.names) if recipe.scales else None)
    if recipe.means:
        return replace(plan, extents=[extent for extent in plan.extents if extent.slices]), rules
    _refuse_other_files(out, plan)
    return plan, rules


def _refuse_other_files(out: _Opened, plan: Plan) -> None:
    base = plan.base
    if base.is_directory != out.path.is_dir():
        raise InputError(f"{base.path}: is a {base.kind}, expected one like {out.path}")
    # A single file may have another name than the output's.
    files = plan.files if base.is_directory else dict(zip(out.files, plan.files.values(), strict=True))
    for name in sorted(files.keys() | out.manifest.files.keys()):
        file, listed = files.get(name), out.manifest.files.get(name)
        found = f"{file.size} bytes" if file else "no such file"
        expected = f"{listed.size} bytes" if listed else "no such file"
        if found != expected:
            raise InputError(f"{base.path / name}: {found}, expected {expected} as in {out.path}")


def _check(out: _Opened, threads: int, advance: Callable[[int], None]) -> None:
    """Compare the size and the checksum of every file with the manifest's."""
    expected = out.manifest.files
    damage = out.missing | {
        name: f"{file.path}: {file.size} bytes, expected {expected[name].size}"
        for name, file in out.files.items()
        if file.size != expected[name].size
    }
    whole = {name: file for name, file in out.files.items() if name not in damage}
    checksums = Checksums({name: file.size for name, file in whole.items()}, out.manifest.block)
    extents = [Extent(name, [ByteRange(file, 0, file.size)], []) for name, file in whole.items()]
    chunk_bytes = -(-_CHUNK_BYTES // checksums.block) * checksums.block
    release = sum(file.size for file in whole.values()) > memory.free_memory() // 2
    make_worker = partial(_hasher, checksums, chunk_bytes, release)
    process_in_order(chunks(extents, chunk_bytes), threads, make_worker, advance)
    for name, file in whole.items():
        if (found := checksums.of(name)) != expected[name].checksum:
            damage[name] = f"{file.path}: checksum {found}, expected {expected[name].checksum}"
    if damage:
        raise DamageError([damage[name] for name in sorted(damage)])


@contextmanager
def _hasher(checksums: Checksums, chunk_bytes: int, release: bool) -> Iterator[Callable[[Extent], int]]:
    """A worker that adds chunks to the checksums, and returns their bytes."""
    buffer = memoryview(bytearray(chunk_bytes))
    with Reader(_MAX_OPEN_FILES) as reader:

        def process_chunk(chunk: Extent) -> int:
            (source,) = chunk.sources
            source.read_into(reader, buffer[: source.nbytes], release=release)
            checksums.add(chunk.path, source.offset, buffer[: source.nbytes])
            return source.nbytes

        yield process_chunk


def _sample(plan: Plan, blocks: int, seed: int) -> list[Extent]:
    """Draw chunks of a plan without replacement; every byte of the output is equally likely to be in one."""
    # The first arrivals, where each chunk arrives at a rate that is its size.
    chance = random.Random(seed)
    every = enumerate(chunk for chunk in chunks(plan.extents, _CHUNK_BYTES) if chunk.sources[0].nbytes)
    arrivals = ((chance.expovariate(chunk.sources[0].nbytes), number, chunk) for number, chunk in every)
    drawn = heapq.nsmallest(blocks, arrivals, key=lambda arrival: arrival[:2])
    return [chunk for _, _, chunk in sorted(drawn, key=lambda arrival: arrival[1])]


def _compare(
    out: _Opened, plan: Plan, rules: Rules, sample: Sequence[Extent], advance: Callable[[int], None]
) -> None:
    """Merge each chunk of a sample in place on the base's bytes, and compare them with the output's."""
    _, merge = registry.choose("torch", "cpu")
    versions, timeline = plan.versions + 1, Timeline(kept=False)
    with (
        Reader(_MAX_OPEN_FILES) as reader,
        WorkerBuffers(versions, _CHUNK_BYTES, timeline) as worker_buffers,
    ):
        for chunk in sample:
            base = chunk.sources[0]
            file = out.files[chunk.path] if out.path.is_dir() else next(iter(out.files.values()))
            sources = [*chunk.sources, ByteRange(file, base.offset, base.nbytes)]
            buffers = worker_buffers.reserve([source.nbytes for source in sources])
            for source, buffer in zip(sources, buffers, strict=True):
                source.read_into(reader, buffer)
            addresses, owner = worker_buffers.addresses()
            for batch, _, rule in ruled_batches(rules, chunk, "cpu", addresses[:-1], owner):
                merge(batch, rule)
            _skip_crcs(base, buffers[0], buffers[-1])
            expected, found = (np.frombuffer(buffer, np.uint8) for buffer in (buffers[0], buffers[-1]))
            if (different := np.flatnonzero(expected != found)).size:
                difference = _difference(plan, chunk, int(different[0]), found, expected)
                raise DamageError([f"{file.path}: {difference}; OUT or its inputs have changed"])
            advance(sum(source.nbytes for source in sources))


def _skip_crcs(base: ByteRange, expected: memoryview, found: memoryview) -> None:
    """Take over from an output what is known only of all of it. The manifest has a checksum of that."""
    crcs = base.file.crcs if isinstance(base.file, ComposedFile) else ()
    for position in (position for crc in crcs for position in crc.positions):
        begin, end = max(position, base.offset) - base.offset, min(position + 4, base.end) - base.offset
        if begin < end:
            expected[begin:end] = found[begin:end]


def _compare_means(
    out: _Opened, plan: Plan, rules: Rules, sample: Sequence[Extent], advance: Callable[[int], None]
) -> None:
    """Compute the means of each chunk of a sample again, and compare them with those of a delta, both as dense tensors."""
    delta = open_delta(out.path)
    dense = expand(delta).tensors
    _refuse_other_tensors(delta, plan)
    merge = registry.consensus("torch")
    with (
        Reader(_MAX_OPEN_FILES) as reader,
        WorkerBuffers(plan.versions, _CHUNK_BYTES, Timeline(kept=False)) as worker_buffers,
    ):
        for chunk in sample:
            buffers = worker_buffers.reserve([source.nbytes for source in chunk.sources])
            for source, buffer in zip(chunk.sources, buffers, strict=True):
                source.read_into(reader, buffer)
            addresses, owner = worker_buffers.addresses()
            for each in chunk.slices:
                size = FLOAT_SIZES[each.signature.arithmetic]
                expected, found = (np.zeros(each.numel * size, np.uint8) for _ in range(2))
                out_operand = Operand(expected.ctypes.data, each.signature.arithmetic, expected)
                segment = segment_of(each, addresses, owner)._replace(out=out_operand)
                terms = None
                if rules.rule.choices:
                    terms = [rules.terms(each, weight_of(each, addresses, owner))]
                merge(Batch("cpu", each.signature, [segment], terms), rules.rule)
                _store_means(expected, each, delta.tensors[each.name].means.spec.dtype)
                dense[each.name].source.read_into(reader, found.data, each.start * size)
                _refuse_other_means(delta, each, found, expected)
                addresses = [at + each.numel * width for at, width in zip(addresses, each.sizes, strict=True)]
            advance(chunk.sources[0].nbytes + sum(source.nbytes for source in chunk.sources))


def _refuse_other_tensors(delta: DeltaCheckpoint, plan: Plan) -> None:
    expected = {each.name: each.signature.arithmetic for extent in plan.extents for each in extent.slices}
    found = {name: tensor.info.arithmetic for name, tensor in delta.tensors.items()}
    for name in sorted(name for name, _ in expected.items() ^ found.items()):
        raise DamageError([
            f"{delta.path}: tensor {name!r}: {found.get(name)}, expected {expected.get(name)}; it or its inputs have changed"
        ])  # fmt: skip


def _store_means(dense: _Bytes, tensor_slice: TensorSlice, dtype: str) -> None:
    """Round dense means, in place, as those of a delta are stored."""
    numel, arithmetic = tensor_slice.numel, tensor_slice.signature.arithmetic
    mask, means = np.zeros(mask_bytes(numel), np.uint8), np.empty_like(dense)
    addresses = mask.ctypes.data, means.ctypes.data
    masks.pack(dense.ctypes.data, numel, arithmetic, dtype, *addresses)
    masks.expand(addresses[0], 0, numel, addresses[1], dtype, arithmetic, dense.ctypes.data)


def _refuse_other_means(
    delta: DeltaCheckpoint, tensor_slice: TensorSlice, found: _Bytes, expected: _Bytes
) -> None:
    if not (different := np.flatnonzero(found != expected)).size:
        return
    name, start, _, signature, _ = tensor_slice
    size, tensor = FLOAT_SIZES[signature.arithmetic], delta.tensors[name]
    element = int(different[0]) // size
    index = tuple(int(i) for i in np.unravel_index(start + element, tensor.info.spec.shape))
    at = slice(element * size, (element + 1) * size)
    was, should = (_number(data[at].tobytes(), signature.arithmetic) for data in (found, expected))
    raise DamageError([
        f"{tensor.mask.file.path}: tensor {name!r}: mean {was} at {index}, expected {should}; it or its inputs have changed"
    ])  # fmt: skip


def _difference(plan: Plan, chunk: Extent, offset: int, found: _Bytes, expected: _Bytes) -> str:
    """Describe what differs at an offset in a chunk: an element if it was merged, else the byte."""
    base = chunk.sources[0]
    at = base.offset + offset
    holding = (
        (name, tensor)
        for name, tensor in plan.base.tensors.items()
        if tensor.source.file is base.file and tensor.source.offset <= at < tensor.source.end
    )
    name, tensor = next(holding, ("", None))
    if tensor is None:
        return f"byte {at} is {found[offset]:#04x}, expected {expected[offset]:#04x} as in base"
    if not chunk.slices:
        where = f"tensor {name!r}: byte {at - tensor.source.offset}"
        return f"{where} is {found[offset]:#04x}, expected {expected[offset]:#04x} as in base"
    dtype = tensor.spec.dtype
    size = FLOAT_SIZES[dtype]
    element = (at - tensor.source.offset) // size
    index = tuple(int(i) for i in np.unravel_index(element, tensor.spec.shape))
    start = tensor.source.offset + element * size - base.offset
    was, should = (_number(data[start : start + size].tobytes(), dtype) for data in (found, expected))
    return f"tensor {name!r}: {was} at {index}, expected {should}"


def _number(raw: bytes, dtype: str) -> str:
    """Format an element's value and its bits, which tell NaNs apart."""
    wide = b"\0\0" + raw if dtype == "BF16" else raw
    value = np.frombuffer(wide, {8: "<f8", 4: "<f4", 2: "<f2"}[len(wide)])[0]
    return f"{value} (0x{raw[::-1].hex()})"

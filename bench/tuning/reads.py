"""Compares positioned reads with memory maps, for the inputs of a streamed merge.

Two threads merge a base and 8 fine-tuned versions chunk by chunk. "positioned reads" reads each chunk into buffers
that stay in the cache and merges it there, as streaming/ does. "maps" merges in the memory map. It asks for a chunk's
pages with MADV_WILLNEED (a thread then waits for each missing page) or MADV_POPULATE_READ (it waits for all of them
at once), and drops them afterwards.

The output goes to existing pages of a tmpfs. The inputs are in the page cache (warm) or were evicted from it (cold).
All candidates take turns and must make the reference's output. The roofline reads every input byte once, 256 KiB at a
time, on as many threads, and writes every output byte once. Those bytes are counted.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from chunk_sizes import DTYPES, make

import negmerge_fast as nm
from negmerge_fast.backends import native
from negmerge_fast.benchmark.bandwidth import make_cold, read_files
from negmerge_fast.benchmark.records import percentiles, record, roofline_fields
from negmerge_fast.benchmark.timing import alternate
from negmerge_fast.benchmark.workload import RULE, SCALE
from negmerge_fast.checkpoints.reader import File, Reader
from negmerge_fast.core.batch import Batch, Operand
from negmerge_fast.runtime.buffers import Timeline, WorkerBuffers
from negmerge_fast.streaming import api, budget
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.partition import chunks
from negmerge_fast.streaming.plan import Extent, Plan
from negmerge_fast.streaming.worker import batches

RESULTS = Path(__file__).parents[1] / "results" / "reads.jsonl"
MODELS, THREADS = 8, 2
ROOFLINE = "read and write"
# Python names it from 3.14 on; Linux has it from 5.14 on.
POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
ADVICE = {
    "maps, WILLNEED": (mmap.MADV_WILLNEED,),
    "maps, POPULATE_READ": (POPULATE_READ,),
    "maps, WILLNEED and POPULATE_READ": (mmap.MADV_WILLNEED, POPULATE_READ),
}

# Merges a chunk, and returns its output.
Merged = Callable[[Extent], memoryview]


@contextmanager
def reads(plan: Plan) -> Iterator[Merged]:
    """Reads chunks into buffers, as streaming/worker.py does."""
    versions = len(plan.models) + 1

    def merged(chunk: Extent) -> memoryview:
        first, *others = chunk.sources
        reserved = buffers.reserve([source.nbytes for source in chunk.sources])
        if not reader.read_into(first.file, first.offset, reserved[0]):
            for source in others:
                reader.expect(source.file, source.offset, source.nbytes)
        for source, buffer in zip(others, reserved[1:], strict=True):
            reader.read_into(source.file, source.offset, buffer)
        for batch, _ in batches(chunk, "cpu", *buffers.addresses()):
            native.merge_cpu(batch, RULE, 1)
        return reserved[0]

    with (
        Reader(versions) as reader,
        WorkerBuffers(versions, budget.MAX_CHUNK_BYTES, Timeline(kept=False)) as buffers,
    ):
        yield merged


@contextmanager
def maps(plan: Plan, advice: Sequence[int]) -> Iterator[Merged]:
    """Merges chunks in the memory map, into a buffer that stays in the cache."""
    checkpoints = (plan.base, *plan.models)
    mapped = {file: _mapped(file) for held in checkpoints for file in held.weights.values()}
    out = np.empty(budget.MAX_CHUNK_BYTES, np.uint8)

    def advise(chunk: Extent, what: int) -> None:
        for file, offset, size in chunk.sources:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapped[file].madvise(what, start, offset + size - start)

    def merged(chunk: Extent) -> memoryview:
        for what in advice:
            advise(chunk, what)
        inputs = [np.frombuffer(mapped[file], np.uint8, size, offset) for file, offset, size in chunk.sources]
        if chunk.slices:
            _merge_apart(chunk, inputs, out)
        else:
            out[: len(inputs[0])] = inputs[0]
        advise(chunk, mmap.MADV_DONTNEED)
        return out[: len(inputs[0])].data

    yield merged


def _mapped(file: File) -> mmap.mmap:
    descriptor = file.open()
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _merge_apart(chunk: Extent, inputs: list[Any], out: Any) -> None:
    """Merge a chunk into separate memory. Batches of streaming/ would write over the base."""
    addresses = [held.ctypes.data for held in inputs]
    distance = out.ctypes.data - addresses[0]
    for batch, _ in batches(chunk, "cpu", addresses, inputs):
        segments = [
            segment._replace(out=Operand(segment.base.address + distance, batch.signature.result, out))
            for segment in batch.segments
        ]
        native.merge_cpu(Batch("cpu", batch.signature, segments), RULE, 1)


def run(plan: Plan, out: Path, candidate: Callable[[Plan], AbstractContextManager[Merged]]) -> None:
    """Merge a plan of models with one file each, on several threads."""
    coming, lock = chunks(plan.extents, budget.MAX_CHUNK_BYTES), Lock()

    def take() -> Extent | None:
        with lock:
            return next(coming, None)

    def process_chunks(_: int) -> None:
        with candidate(plan) as merged:
            while chunk := take():
                os.pwrite(target, merged(chunk), chunk.sources[0].offset)

    target = os.open(out, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(process_chunks, range(THREADS)))
    finally:
        os.close(target)


def roofline(paths: list[Path], out: Path) -> None:
    read_files(paths, THREADS)
    chunk_bytes = bytes(256 << 10)
    remaining = paths[0].stat().st_size
    with open(out, "r+b", buffering=0) as file:
        while remaining:
            remaining -= file.write(chunk_bytes[: min(remaining, len(chunk_bytes))])


def measure(
    dtype: str, paths: list[Path], folder: Path, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each candidate, warm and cold, and lines that name the fastest."""
    merged, out = folder / "merged.safetensors", folder / "out.safetensors"
    usual = nm.merge_checkpoints(paths[0], paths[1:], merged, scale=SCALE, backend="torch")
    plan = api.prepare(paths[0], paths[1:], folder / "none.safetensors", MergeOptions(SCALE)).plan
    candidates = {"positioned reads": partial(run, plan, out, reads)}
    candidates |= {
        name: partial(run, plan, out, partial(maps, advice=advice)) for name, advice in ADVICE.items()
    }
    for name, candidate in candidates.items():
        out.unlink(missing_ok=True)
        candidate()
        assert out.read_bytes() == merged.read_bytes(), f"{name}: not the reference's output"
    moved = usual.bytes_read + usual.bytes_written
    rows, said = [], []
    for state, before in (("warm", partial(read_files, paths, THREADS)), ("cold", partial(make_cold, paths))):
        seconds = alternate({ROOFLINE: partial(roofline, paths, out), **candidates}, rounds, before)
        rooflines = seconds.pop(ROOFLINE)
        for candidate, taken in seconds.items():
            rows.append({
                "suite": "tune", "layout": "files", "way": candidate, "dtype": dtype, "n": MODELS, "numel": usual.elements,
                "bytes": moved, "state": f"{state}, to tmpfs", "rounds": rounds, **percentiles(taken),
                "GB/s": moved / statistics.median(taken) / 1e9,
                **roofline_fields(ROOFLINE, [moved / s for s in rooflines], [moved / s for s in taken]),
            })  # fmt: skip
        best = min(rows[-len(seconds) :], key=lambda row: float(row["p50"]))
        said.append(f"{dtype}, {state}: {best['way']}, {best['of_limit']:.2f} of {ROOFLINE}")
    for path in (merged, out):
        path.unlink()
    return rows, said


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bytes", type=int, default=2 << 30, help="total size of all files")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs for the outputs")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if not given.tmpfs.is_dir():
        print(f"reads: no tmpfs at {given.tmpfs}; name one with --tmpfs")
        return
    if reason := native.why_not("cpu", "cpu"):
        print(f"reads: the compiled kernel {reason}")
        return
    rows, said = [], []
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as inputs,
        tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
    ):
        for dtype, kind in DTYPES.items():
            numel = given.bytes // (MODELS + 1) // kind.itemsize // 1024 * 1024
            paths = make(Path(inputs), MODELS + 1, kind, numel)
            found, lines = measure(dtype, paths, Path(outputs), given.rounds)
            rows += found
            said += lines
            for path in paths:
                path.unlink()
    record(given.results, rows)
    print("\n".join(said))


if __name__ == "__main__":
    main()

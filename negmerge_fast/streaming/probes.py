"""Measured bandwidths: of files, of the CPU kernel, of the link to a GPU."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np

from ..backends import registry
from ..checkpoints.base import ByteRange
from ..checkpoints.reader import Reader
from ..core.batch import Batch, Signature, segment_at
from ..core.dtypes import FLOAT_SIZES
from ..core.rule import Rule
from ..runtime.buffers import Timeline
from ..runtime.device import DeviceBuffers
from .plan import Plan

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Places of a sample, at least, and bytes of each; each thread reads to so many buffers, in turn, as a lane does.
_MIN_SAMPLES, _SAMPLE_BYTES, _MAX_BUFFERS = 64, 1 << 20, 16
# Bytes that a thread merges, small enough for its cache, and how often; bytes that all threads copy, or that a link takes.
_MERGE_BYTES, _REPEATS, _COPY_BYTES, _H2D_BYTES = 4 << 20, 16, 256 << 20, 32 << 20


def merge_bandwidth(signature: Signature, rule: Rule, threads: int, backend: str = "auto") -> float:
    """Bytes of all versions per second that the CPU merges, of what is in its caches, on so many threads."""
    name, merge = registry.choose(backend, "cpu", rule, [signature])
    callers, inside = (threads, 1) if name in registry.CONCURRENT else (1, threads)
    batches = [_batch(signature) for _ in range(callers)]

    def work(batch: Batch) -> None:
        for _ in range(_REPEATS):
            merge(batch, rule, inside)

    taken = _on_threads([partial(work, batch) for batch in batches])
    sizes = sum(FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models))
    return callers * _REPEATS * batches[0].segments[0].numel * sizes / taken


def _batch(signature: Signature) -> Batch:
    sizes = [FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models)]
    numel = max(_MERGE_BYTES // sum(sizes), 1024)
    # Bytes so small are finite numbers of every type; and pages of their own, which those of zeros would not be.
    versions = [np.random.default_rng(k).integers(0, 64, numel * s, np.uint8) for k, s in enumerate(sizes)]
    segment = segment_at(numel, signature, [v.ctypes.data for v in versions], versions)
    return Batch("cpu", signature, [segment])


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads copy from memory to memory."""
    size = _COPY_BYTES // 2 // threads
    memory = [np.ones((2, size), np.uint8) for _ in range(threads)]
    return threads * size / _on_threads([partial(np.copyto, *pair) for pair in memory])


@lru_cache
def h2d_bandwidth(device: str) -> float:
    """Bytes per second from locked memory to a GPU."""

    def measure() -> float:
        with DeviceBuffers(1, _H2D_BYTES, Timeline(kept=False), device) as lane:

            def copy() -> None:
                lane.stream.put("copy in", lambda: lane.stream.copy(lane.device, lane.host))
                lane.stream.wait()

            return _H2D_BYTES / _best(copy)

    # On a thread of its own: what goes wrong there is not found by the next launch of the caller's.
    with _pool(1) as pool:
        return pool.submit(measure).result()


def read_bandwidth(plan: Plan, threads: int) -> tuple[float, bool | None]:
    """How fast files come, and whether from memory: strokes at random places, read by so many threads."""
    samples = list(_sample(plan, max(_MIN_SAMPLES, 8 * threads)))
    buffers = min(len(plan.models) + 1, _MAX_BUFFERS)
    began = 0.0

    def begin() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = Barrier(threads, begin)

    def read(worker: int) -> tuple[int, list[bool | None]]:
        memory = np.ones((buffers, _SAMPLE_BYTES), np.uint8)
        done, cached = 0, []
        ready.wait()
        with Reader(8) as reader:
            for k, source in enumerate(samples[worker::threads]):
                buffer = memory[k % buffers].data[: source.nbytes]
                cached.append(source.read_into(reader, buffer))
                done += source.nbytes
        return done, cached

    with _pool(threads) as pool:
        read_by = list(pool.map(read, range(threads)))
    taken = time.perf_counter() - began
    answers = {answer for _, answers in read_by for answer in answers}
    found = False if False in answers else None if None in answers else True
    return max(1, sum(done for done, _ in read_by)) / taken, found


def _sample(plan: Plan, places: int) -> Iterator[ByteRange]:
    """So many places among the bytes to merge: other ones each time, for those read before are cached."""
    import random

    sources = [source for extent in plan.extents if extent.slices for source in extent.sources]
    ends = list(accumulate(source.nbytes for source in sources))
    for k in range(places):
        at = int((k + random.random()) / places * ends[-1])
        which = bisect(ends, at)
        file, offset, nbytes = sources[which]
        within = min(at - (ends[which] - nbytes), max(nbytes - _SAMPLE_BYTES, 0))
        yield ByteRange(file, offset + within, min(_SAMPLE_BYTES, nbytes - within))


def _pool(threads: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # where something is measured, not for every merge

    return ThreadPoolExecutor(threads)


def _on_threads(jobs: Sequence[Callable[[], object]]) -> float:
    """Seconds for all jobs, each on a thread of its own."""
    with _pool(len(jobs)) as pool:
        return _best(lambda: list(pool.map(lambda job: job(), jobs)))


def _best(job: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest of a few rounds: what the machine can do, whatever else it does now and then."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        job()
        taken.append(time.perf_counter() - began)
    return min(taken)


def speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"

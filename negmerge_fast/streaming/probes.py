"""Measured bandwidths: of memory, of files, of the CPU kernel, and from the host to a GPU."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from threading import Barrier
from typing import TYPE_CHECKING

from ..backends import registry
from ..checkpoints.base import ByteRange
from ..checkpoints.reader import Reader
from ..core.batch import Batch, Operand, Signature, segment_at
from ..core.choices import Terms
from ..core.rule import Rule
from ..runtime.buffers import Timeline
from ..runtime.device import DeviceBuffers
from .plan import Plan, TensorSlice

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Reads of a sample, at least, and bytes of each; each thread reads to so many buffers, in turn, as a worker does.
_MIN_SAMPLES, _SAMPLE_BYTES, _MAX_BUFFERS = 64, 1 << 20, 16
# Bytes that a thread merges, small enough for its cache, and how often; bytes that all threads copy, or that cross to a GPU.
_MERGE_BYTES, _REPEATS, _COPY_BYTES, _H2D_BYTES = 4 << 20, 16, 256 << 20, 32 << 20


def merge_bandwidth(
    signature: Signature, rule: Rule, threads: int, backend: str = "auto", weight: str | None = None
) -> float:
    """Measure the bytes of all versions per second that the CPU merges from its caches, on so many threads.

    weight: the storage type of weights, if elements have some.
    """
    name, merge = registry.choose(backend, "cpu", rule, [signature])
    callers, inside = (threads, 1) if name in registry.CONCURRENT else (1, threads)
    sizes = _sizes(signature, weight)
    batches = [_batch(signature, weight, rule) for _ in range(callers)]

    def repeat(batch: Batch) -> None:
        for _ in range(_REPEATS):
            merge(batch, rule, inside)

    seconds = on_threads([partial(repeat, batch) for batch in batches])
    return callers * _REPEATS * batches[0].segments[0].numel * sum(sizes) / seconds


def _batch(signature: Signature, weight: str | None, rule: Rule) -> Batch:
    import numpy as np

    sizes = _sizes(signature, weight)
    numel = max(_MERGE_BYTES // sum(sizes), 1024)
    # Bytes so small are finite numbers of every type; and pages of their own, which those of zeros would not be.
    versions = [np.random.default_rng(k).integers(0, 64, numel * s, np.uint8) for k, s in enumerate(sizes)]
    addresses = [v.ctypes.data for v in versions]
    count = 1 + len(signature.models)
    segment = segment_at(numel, signature, addresses[:count], versions[:count])
    weights = None if weight is None else Operand(addresses[-1], weight, versions[-1])
    return Batch("cpu", signature, [segment], None if rule.choices is None else [Terms(0, 0, weights)])


def _sizes(signature: Signature, weight: str | None) -> list[int]:
    return TensorSlice("", 0, 0, signature, weight).sizes


def copy_bandwidth(threads: int) -> float:
    """Measure the bytes per second that so many threads copy from memory to memory."""
    import numpy as np

    size = _COPY_BYTES // 2 // threads
    memory = [np.ones((2, size), np.uint8) for _ in range(threads)]
    return threads * size / on_threads([partial(np.copyto, *pair) for pair in memory])


@lru_cache
def h2d_bandwidth(device: str) -> float:
    """Measure the bytes per second from page-locked memory to a GPU."""

    def measure() -> float:
        with DeviceBuffers(1, _H2D_BYTES, Timeline(kept=False), device) as buffers:

            def copy() -> None:
                with buffers.stream.stage("copy in"):
                    buffers.stream.copy(buffers.device, buffers.host)
                buffers.stream.wait()

            return _H2D_BYTES / best_of(copy)

    # On a thread of its own: the next launch of the caller's thread does not find an error that was made there.
    with _pool(1) as pool:
        return pool.submit(measure).result()


def read_bandwidth(plan: Plan, threads: int) -> tuple[float, bool | None]:
    """Measure how fast so many threads read random samples of a plan's inputs.

    Returns:
        Bytes per second, and whether all of them came from memory; None if a file system does not tell.
    """
    import numpy as np

    samples = list(_sample(plan, max(_MIN_SAMPLES, 8 * threads)))
    buffers = min(len(plan.models) + 1, _MAX_BUFFERS)
    began = 0.0

    def begin() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = Barrier(threads, begin)

    def read(worker: int) -> list[bool | None]:
        memory = np.ones((buffers, _SAMPLE_BYTES), np.uint8)
        ready.wait()
        with Reader(8) as reader:
            return [
                source.read_into(reader, memory[k % buffers].data[: source.nbytes])
                for k, source in enumerate(samples[worker::threads])
            ]

    with _pool(threads) as pool:
        answers = {answer for cached in pool.map(read, range(threads)) for answer in cached}
    seconds = time.perf_counter() - began
    cached = False if False in answers else None if None in answers else True
    return max(1, sum(sample.nbytes for sample in samples)) / seconds, cached


def _sample(plan: Plan, count: int) -> Iterator[ByteRange]:
    """Ranges strewn over the bytes to merge, others each time: those that were read before are cached."""
    import random

    sources = [source for extent in plan.extents if extent.slices for source in extent.sources]
    ends = list(accumulate(source.nbytes for source in sources))
    for k in range(count):
        at = int((k + random.random()) / count * ends[-1])
        which = bisect(ends, at)
        file, offset, nbytes = sources[which]
        within = min(at - (ends[which] - nbytes), max(nbytes - _SAMPLE_BYTES, 0))
        yield ByteRange(file, offset + within, min(_SAMPLE_BYTES, nbytes - within))


def on_threads(tasks: Sequence[Callable[[], object]]) -> float:
    """Measure the seconds for all tasks, each on a thread of its own."""
    with _pool(len(tasks)) as pool:
        return best_of(lambda: list(pool.map(lambda task: task(), tasks)))


def _pool(threads: int) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # where something is measured, not for every merge

    return ThreadPoolExecutor(threads)


def best_of(task: Callable[[], object], rounds: int = 7) -> float:
    """Measure the seconds of the fastest of a few rounds: what the machine can do while nothing else disturbs it."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def format_bandwidth(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"

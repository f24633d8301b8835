"""What the way of a job's bytes costs, measured here and now: from its files, through the CPU's kernel, over the link to a GPU.

From these follows where files are merged. A GPU has to be given every byte over its link, after it was read into memory all the
same: where the disk is the bottleneck the CPU's kernel keeps up with it, and is as fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import backends, lanes
from .checkpoints import Reader
from .plan import Plan, Source
from .rule import FLOAT_SIZES, Batch, Rule, Segment, Signature, Stream

# Strokes of a sample, and bytes of each, and of one version of what is merged in the cache.
_SAMPLES, _STROKE, _MERGED = 64, 1 << 20, 1 << 18
_REPEATED = 16
_LINKED = 32 << 20
# A process that needs no torch has merged this long by the time another has imported it and found its GPU.
_WAKING = 5.0
# Less than this is noise.
_WORTH = 1.2

GPU = "cuda:0"


class Costs(NamedTuple):
    """Bytes per second. reading: as the job's files come to all threads, from memory if cached; merging: what is in the CPU's
    cache, on all threads; link: from page-locked memory to the GPU, if there is one."""

    reading: float
    cached: bool
    merging: float
    link: float | None = None

    @property
    def on_cpu(self) -> float:
        """A thread that waits for a disk is one that merges meanwhile; one that copies cached files is not."""
        if self.cached:
            return 1 / (1 / self.reading + 1 / self.merging)
        return min(self.reading, self.merging)

    @property
    def through_gpu(self) -> float:
        return min(self.reading, self.link or 0.0)

    def __str__(self) -> str:
        where = "memory" if self.cached else "the disk"
        words = f"files come at {speed(self.reading)} from {where}, the CPU merges {speed(self.merging)}"
        return words + (f", the link takes {speed(self.link)}" if self.link else "")


class Way(NamedTuple):
    """Where a job is merged, "cpu" or a device of torch, and why there; costs: if that was measured."""

    device: str
    why: str
    costs: Costs | None = None


def measure(plan: Plan, rule: Rule, threads: int, backend: str = "auto") -> Costs:
    """What a job costs on the CPU, by a sample of its files, and of the storage types that most of its elements have."""
    sizes: dict[Signature, int] = {}
    for member in (m for extent in plan.extents for m in extent.members):
        sizes[member.signature] = sizes.get(member.signature, 0) + member.numel
    signature = max(sizes, key=sizes.__getitem__, default=None)
    if signature is None:
        return Costs(float("inf"), True, float("inf"))
    reading, cached = _reading(plan, threads)
    return Costs(reading, cached, merging_speed(signature, rule, threads, backend))


def choose_way(plan: Plan, rule: Rule, threads: int) -> Way:
    """Where a job is merged by what it costs, if nobody asked for a backend or a device."""
    if not gpu_at_hand():
        return Way("cpu", "no GPU here")
    costs = measure(plan, rule, threads)
    seconds = plan.bytes_read / costs.on_cpu
    if seconds < _WAKING:
        return Way("cpu", f"{seconds:.1f} s there, less than it takes to begin on a GPU", costs)
    if not costs.cached and costs.reading <= costs.merging:
        return Way("cpu", "as fast as the disk, for which a GPU would wait as well", costs)
    signatures = {member.signature for extent in plan.extents for member in extent.members}
    if backends.choose("auto", GPU, rule, signatures)[0] == "torch":
        return Way("cpu", f"no kernel is usable on {GPU}", costs)
    costs = costs._replace(link=link_speed(GPU))
    compared = f"{speed(costs.on_cpu)} on the CPU, {speed(costs.through_gpu)} through {GPU}"
    return Way(GPU if costs.through_gpu > _WORTH * costs.on_cpu else "cpu", compared, costs)


def gpu_at_hand() -> bool:
    """Whether there may be a GPU: without torch, which takes longer to import than many a merge takes."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def merging_speed(signature: Signature, rule: Rule, threads: int, backend: str = "auto") -> float:
    """Bytes of all versions per second that the CPU merges, of what is in its cache, on so many threads."""
    name, merge = backends.choose(backend, "cpu", rule)
    callers, inside = (threads, 1) if name in backends.CONCURRENT else (1, threads)
    batches = [_batch(signature) for _ in range(callers)]

    def work(batch: Batch) -> None:
        for _ in range(_REPEATED):
            merge(batch, rule, inside)

    taken = _on_threads([partial(work, batch) for batch in batches])
    sizes = sum(FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models))
    return callers * _REPEATED * batches[0].segments[0].numel * sizes / taken


def _batch(signature: Signature) -> Batch:
    dtypes = (signature.result, *signature.models)
    numel = _MERGED // max(FLOAT_SIZES[dtype] for dtype in dtypes)
    versions = [np.zeros(numel * FLOAT_SIZES[dtype], np.uint8) for dtype in dtypes]
    base, *models = [Stream(v.ctypes.data, dtype, v) for v, dtype in zip(versions, dtypes, strict=True)]
    return Batch("cpu", signature, [Segment(numel, base, models, base)])


def measured(gpus: Sequence[str]) -> Iterator[str]:
    """What a person may want to know of it, whatever the job."""
    threads = backends.usual_threads()
    merging = merging_speed(Signature("F32", ("F32",) * 8, False), Rule(1.0), threads)
    yield f"{threads} threads copy memory at {speed(copying_speed(threads))}, the CPU merges {speed(merging)} (8 models of F32)"
    for gpu in gpus:
        yield f"the link takes {speed(link_speed(gpu))} to {gpu}, which is taken for files that would be merged {_WORTH} times as fast"
    if not gpus:
        yield "no GPU here: files are merged on the CPU"


def copying_speed(threads: int) -> float:
    """Bytes per second that so many threads copy from memory to memory."""
    memory = [np.ones((2, _LINKED), np.uint8) for _ in range(threads)]
    return threads * _LINKED / _on_threads([partial(np.copyto, *pair) for pair in memory])


@lru_cache
def link_speed(device: str) -> float:
    """Bytes per second from page-locked memory to a GPU."""
    with lanes.DeviceLane(1, _LINKED, lanes.Timeline(kept=False), device) as lane:

        def copy() -> None:
            lane.stream.put("copy in", lambda: lane.stream.copy(lane.there, lane.here))
            lane.stream.wait()

        return _LINKED / _best(copy)


def _reading(plan: Plan, threads: int) -> tuple[float, bool]:
    """How fast files come, and whether they were cached: strokes all over them, read by so many threads."""
    sources = [
        source for extent in plan.extents if extent.members for source in extent.sources if source.nbytes
    ]
    if not sources:
        return float("inf"), True
    strokes = list(_strokes(sources))
    buffers = [memoryview(bytearray(_STROKE)) for _ in range(threads)]

    def read(worker: int) -> tuple[int, bool]:
        done, cached = 0, True
        with Reader(8) as reader:
            for file, offset, size in strokes[worker::threads]:
                cached &= reader.read_into(file, offset, buffers[worker][:size])
                done += size
        return done, cached

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        read_by = list(pool.map(read, range(threads)))
    taken = time.perf_counter() - began
    return max(1, sum(done for done, _ in read_by)) / taken, all(cached for _, cached in read_by)


def _strokes(sources: Sequence[Source]) -> Iterator[Source]:
    """Places evenly strewn over the sources."""
    for k in range(_SAMPLES):
        at = (k + 0.5) * len(sources) / _SAMPLES
        file, offset, nbytes = sources[int(at)]
        size = min(_STROKE, nbytes)
        yield Source(file, offset + int((at - int(at)) * (nbytes - size)), size)


def _on_threads(jobs: Sequence[Callable[[], object]]) -> float:
    """Seconds for all jobs, each on a thread of its own."""
    with ThreadPoolExecutor(len(jobs)) as pool:
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

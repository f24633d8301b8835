"""What the way of a job's bytes costs, measured here and now: from its files, through the CPU's kernel, over the link to a GPU.

From these follows where files are merged. A GPU has to be given every byte over its link, after it was read into memory all the
same: where the disk is the bottleneck the CPU's kernel keeps up with it, and is as fast.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import backends, lanes
from .checkpoints import Reader
from .plan import Plan, Source
from .rule import FLOAT_SIZES, Batch, InputError, Rule, Segment, Signature, Stream

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Places of a sample, at least, and bytes of each; each thread reads to so many buffers, in turn, as a lane does.
_PLACES, _STROKE, _MOST_BUFFERS = 64, 1 << 20, 16
# Bytes that a thread merges, small enough for its cache, and how often; bytes that all threads copy, or that a link takes.
_MERGED, _REPEATED, _COPIED, _LINKED = 4 << 20, 16, 256 << 20, 32 << 20
# Seconds that a GPU must save, to be worth an import of torch (1 … 5 s), a context (0.3 s on an H100) and the trial of its kernels
# (0.1 s there); and bytes of a job that it can't save them on.
_WAKING, _FEW = 5.0, 4 << 30
# Faster by less than this is noise. Memory without which it is in use by others. Strokes too short for launches.
_WORTH, _LEAST_ROOM, _SHORT = 1.2, 1 << 30, 1 << 20

GPU = "cuda:0"


class Costs(NamedTuple):
    """Bytes per second.

    reading: as the job's files come to all threads; cached: from memory, or from a disk, or (None) nobody knows.
    merging: on the CPU, of what is in its caches, on all threads. link: from locked memory to the GPU, if there is one.
    """

    reading: float
    cached: bool | None
    merging: float
    link: float | None = None

    @property
    def on_cpu(self) -> float:
        """A thread that waits for a disk is one that merges meanwhile; one that copies cached files is not."""
        if self.cached is False:
            return min(self.reading, self.merging)
        return 1 / (1 / self.reading + 1 / self.merging)

    @property
    def through_gpu(self) -> float:
        return min(self.reading, self.link or 0.0)

    def __str__(self) -> str:
        where = {True: " from memory", False: " from the disk", None: ""}[self.cached]
        words = f"files come at {speed(self.reading)}{where}, the CPU merges {speed(self.merging)}"
        return words + (f", the link takes {speed(self.link)}" if self.link else "")


class Way(NamedTuple):
    """Where a job is merged, "cpu" or a device of torch, and why there; costs: if that was measured."""

    device: str
    why: str
    costs: Costs | None = None


def measure(plan: Plan, rule: Rule, threads: int, backend: str = "auto") -> Costs | None:
    """What a job costs on the CPU, by a sample of its files, and of the storage types that most of its elements have.

    None: there is nothing to merge.
    """
    sizes: dict[Signature, int] = {}
    for member in (m for extent in plan.extents for m in extent.members):
        sizes[member.signature] = sizes.get(member.signature, 0) + member.numel
    signature = max(sizes, key=sizes.__getitem__, default=None)
    if signature is None or not sizes[signature]:
        return None
    reading, cached = reading_speed(plan, threads)
    if cached:  # once more: a sample of what is so fast is short
        reading = max(reading, reading_speed(plan, threads)[0])
    return Costs(reading, cached, merging_speed(signature, rule, threads, backend))


def choose_way(plan: Plan, rule: Rule, threads: int) -> Way:
    """Where a job is merged by what it costs, if nobody asked for a backend or a device."""
    if not gpu_at_hand():
        return Way("cpu", "no GPU here")
    if plan.bytes_read < _FEW:
        return Way("cpu", "done before a GPU would have begun")
    if plan.bytes_read < _SHORT * len(plan.extents):
        return Way("cpu", "strokes too short for a GPU")
    if (costs := measure(plan, rule, threads)) is None:
        return Way("cpu", "nothing to merge")
    on_cpu = plan.bytes_read / costs.on_cpu
    if (saved := on_cpu - plan.bytes_read / costs.reading) < _WAKING:
        return Way("cpu", f"a GPU would wait for the files as well, and save {saved:.1f} s at best", costs)
    try:
        signatures = {member.signature for extent in plan.extents for member in extent.members}
        if backends.choose("auto", GPU, rule, signatures)[0] == "torch":
            return Way("cpu", f"no kernel is usable on {GPU}", costs)
        if (room := lanes.room_on(GPU)) < _LEAST_ROOM:
            return Way("cpu", f"only {room:,} bytes are free on {GPU}", costs)
        costs = costs._replace(link=link_speed(GPU))
    except (InputError, RuntimeError) as error:  # whatever is wrong with it, nobody asked for it
        return Way("cpu", f"{GPU} cannot be used: {_first_line(error)}", costs)
    why = f"{speed(costs.on_cpu)} on the CPU, {speed(costs.through_gpu)} through {GPU}"
    sooner = plan.bytes_read / costs.through_gpu + _WAKING < on_cpu / _WORTH
    return Way(GPU if sooner else "cpu", why, costs)


def gpu_at_hand() -> bool:
    """Whether there may be a GPU: without torch, which takes longer to import than many a merge takes."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def merging_speed(signature: Signature, rule: Rule, threads: int, backend: str = "auto") -> float:
    """Bytes of all versions per second that the CPU merges, of what is in its caches, on so many threads."""
    name, merge = backends.choose(backend, "cpu", rule, [signature])
    callers, inside = (threads, 1) if name in backends.CONCURRENT else (1, threads)
    batches = [_batch(signature) for _ in range(callers)]

    def work(batch: Batch) -> None:
        for _ in range(_REPEATED):
            merge(batch, rule, inside)

    taken = _on_threads([partial(work, batch) for batch in batches])
    sizes = sum(FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models))
    return callers * _REPEATED * batches[0].segments[0].numel * sizes / taken


def _batch(signature: Signature) -> Batch:
    sizes = [FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models)]
    numel = max(_MERGED // sum(sizes), 1024)
    # Bytes so small are finite numbers of every type; and pages of their own, which those of zeros would not be.
    versions = [np.random.default_rng(k).integers(0, 64, numel * s, np.uint8) for k, s in enumerate(sizes)]
    dtypes = (signature.result, *signature.models)
    base, *models = [Stream(v.ctypes.data, dtype, v) for v, dtype in zip(versions, dtypes, strict=True)]
    return Batch("cpu", signature, [Segment(numel, base, models, base)])


def measured(gpus: Sequence[str]) -> Iterator[str]:
    """What a person may want to know of it, whatever the job."""
    threads = backends.usual_threads()
    merging = merging_speed(Signature("F32", ("F32",) * 8, False), Rule(1.0), threads)
    copying = speed(copying_speed(threads))
    yield f"{threads} threads copy memory at {copying}, the CPU merges {speed(merging)} (8 models of F32)"
    for gpu in gpus:
        try:
            yield f"the link to {gpu} takes {speed(link_speed(gpu))}; --device auto takes the faster one of the two ways"
        except RuntimeError as error:
            yield f"the link to {gpu} cannot be measured: {_first_line(error)}"
    if not gpus:
        yield "no GPU here: files are merged on the CPU"


def copying_speed(threads: int) -> float:
    """Bytes per second that so many threads copy from memory to memory."""
    size = _COPIED // 2 // threads
    memory = [np.ones((2, size), np.uint8) for _ in range(threads)]
    return threads * size / _on_threads([partial(np.copyto, *pair) for pair in memory])


@lru_cache
def link_speed(device: str) -> float:
    """Bytes per second from locked memory to a GPU."""

    def measure() -> float:
        with lanes.DeviceLane(1, _LINKED, lanes.Timeline(kept=False), device) as lane:

            def copy() -> None:
                lane.stream.put("copy in", lambda: lane.stream.copy(lane.there, lane.here))
                lane.stream.wait()

            return _LINKED / _best(copy)

    # On a thread of its own: what goes wrong there is not found by the next launch of the caller's.
    with _pool(1) as pool:
        return pool.submit(measure).result()


def reading_speed(plan: Plan, threads: int) -> tuple[float, bool | None]:
    """How fast files come, and whether from memory: strokes at random places, read by so many threads."""
    strokes = list(_strokes(plan, max(_PLACES, 8 * threads)))
    buffers = min(len(plan.models) + 1, _MOST_BUFFERS)
    began = 0.0

    def begin() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = Barrier(threads, begin)

    def read(worker: int) -> tuple[int, list[bool | None]]:
        memory = np.ones((buffers, _STROKE), np.uint8)
        done, cached = 0, []
        ready.wait()
        with Reader(8) as reader:
            for k, (file, offset, size) in enumerate(strokes[worker::threads]):
                cached.append(reader.read_into(file, offset, memory[k % buffers].data[:size]))
                done += size
        return done, cached

    with _pool(threads) as pool:
        read_by = list(pool.map(read, range(threads)))
    taken = time.perf_counter() - began
    answers = {answer for _, answers in read_by for answer in answers}
    found = False if False in answers else None if None in answers else True
    return max(1, sum(done for done, _ in read_by)) / taken, found


def _strokes(plan: Plan, places: int) -> Iterator[Source]:
    """So many places among the bytes to merge: other ones each time, for those read before are cached."""
    import random

    sources = [source for extent in plan.extents if extent.members for source in extent.sources]
    ends = list(accumulate(source.nbytes for source in sources))
    for k in range(places):
        at = int((k + random.random()) / places * ends[-1])
        which = bisect(ends, at)
        file, offset, nbytes = sources[which]
        within = min(at - (ends[which] - nbytes), max(nbytes - _STROKE, 0))
        yield Source(file, offset + within, min(_STROKE, nbytes - within))


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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"

"""What the way of a job's bytes costs, measured here and now: from its files, through the CPU's kernel, over the link to a GPU.

From these follows where files are merged. A GPU has to be given every byte over its link, after it was read into memory all the
same: where the disk is the bottleneck the CPU's kernel keeps up with it, and is as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..backends import registry
from ..core.batch import Signature
from ..core.errors import InputError, first_line
from ..core.rule import Rule
from ..runtime import device as devices
from .plan import Plan

if TYPE_CHECKING:
    pass
from . import probes
from .probes import speed

# Seconds that a GPU must save, to be worth an import of torch (1 … 5 s), a context (0.3 s on an H100) and the trial of its kernels
# (0.1 s there); and bytes of a job that it can't save them on.
_GPU_STARTUP_S, _MIN_JOB_BYTES = 5.0, 4 << 30
# Faster by less than this is noise. Memory without which it is in use by others. Strokes too short for launches.
_MIN_SPEEDUP, _MIN_AVAILABLE_BYTES, _MIN_EXTENT_BYTES = 1.2, 1 << 30, 1 << 20

GPU = "cuda:0"


class Throughput(NamedTuple):
    """Bytes per second.

    reading: as the job's files come to all threads; cached: from memory, or from a disk, or (None) nobody knows.
    merging: on the CPU, of what is in its caches, on all threads. link: from locked memory to the GPU, if there is one.
    """

    read_bandwidth: float
    cached: bool | None
    merge_bandwidth: float
    h2d_bandwidth: float | None = None

    @property
    def cpu_bandwidth(self) -> float:
        """A thread that waits for a disk is one that merges meanwhile; one that copies cached files is not."""
        if self.cached is False:
            return min(self.read_bandwidth, self.merge_bandwidth)
        return 1 / (1 / self.read_bandwidth + 1 / self.merge_bandwidth)

    @property
    def gpu_bandwidth(self) -> float:
        return min(self.read_bandwidth, self.h2d_bandwidth or 0.0)

    def __str__(self) -> str:
        where = {True: " from memory", False: " from the disk", None: ""}[self.cached]
        words = (
            f"files come at {speed(self.read_bandwidth)}{where}, the CPU merges {speed(self.merge_bandwidth)}"
        )
        return words + (f", the link takes {speed(self.h2d_bandwidth)}" if self.h2d_bandwidth else "")


class Placement(NamedTuple):
    """Where a job is merged, "cpu" or a device of torch, and why there; costs: if that was measured."""

    device: str
    reason: str
    throughput: Throughput | None = None


def measure(plan: Plan, rule: Rule, threads: int, backend: str = "auto") -> Throughput | None:
    """What a job costs on the CPU, by a sample of its files, and of the storage types that most of its elements have.

    None: there is nothing to merge.
    """
    sizes: dict[Signature, int] = {}
    for tensor_slice in (m for extent in plan.extents for m in extent.slices):
        sizes[tensor_slice.signature] = sizes.get(tensor_slice.signature, 0) + tensor_slice.numel
    signature = max(sizes, key=sizes.__getitem__, default=None)
    if signature is None or not sizes[signature]:
        return None
    read_bandwidth, cached = probes.read_bandwidth(plan, threads)
    if cached:  # once more: a sample of what is so fast is short
        read_bandwidth = max(read_bandwidth, probes.read_bandwidth(plan, threads)[0])
    return Throughput(read_bandwidth, cached, probes.merge_bandwidth(signature, rule, threads, backend))


def choose_placement(plan: Plan, rule: Rule, threads: int) -> Placement:
    """Where a job is merged by what it costs, if nobody asked for a backend or a device."""
    if not gpu_may_exist():
        return Placement("cpu", "no GPU here")
    if plan.bytes_read < _MIN_JOB_BYTES:
        return Placement("cpu", "done before a GPU would have begun")
    if plan.bytes_read < _MIN_EXTENT_BYTES * len(plan.extents):
        return Placement("cpu", "strokes too short for a GPU")
    if (throughput := measure(plan, rule, threads)) is None:
        return Placement("cpu", "nothing to merge")
    on_cpu = plan.bytes_read / throughput.cpu_bandwidth
    if (saved := on_cpu - plan.bytes_read / throughput.read_bandwidth) < _GPU_STARTUP_S:
        return Placement(
            "cpu", f"a GPU would wait for the files as well, and save {saved:.1f} s at best", throughput
        )
    try:
        signatures = {tensor_slice.signature for extent in plan.extents for tensor_slice in extent.slices}
        if registry.choose("auto", GPU, rule, signatures)[0] == "torch":
            return Placement("cpu", f"no kernel is usable on {GPU}", throughput)
        if (room := devices.available_bytes(GPU)) < _MIN_AVAILABLE_BYTES:
            return Placement("cpu", f"only {room:,} bytes are free on {GPU}", throughput)
        throughput = throughput._replace(h2d_bandwidth=probes.h2d_bandwidth(GPU))
    except (InputError, RuntimeError) as error:  # whatever is wrong with it, nobody asked for it
        return Placement("cpu", f"{GPU} cannot be used: {first_line(error)}", throughput)
    reason = f"{speed(throughput.cpu_bandwidth)} on the CPU, {speed(throughput.gpu_bandwidth)} through {GPU}"
    sooner = plan.bytes_read / throughput.gpu_bandwidth + _GPU_STARTUP_S < on_cpu / _MIN_SPEEDUP
    return Placement(GPU if sooner else "cpu", reason, throughput)


def gpu_may_exist() -> bool:
    """Whether there may be a GPU: without torch, which takes longer to import than many a merge takes."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def describe(gpus: Sequence[str]) -> Iterator[str]:
    """What a person may want to know of it, whatever the job."""
    threads = registry.usual_threads()
    merge_bandwidth = probes.merge_bandwidth(Signature("F32", ("F32",) * 8, False), Rule(1.0), threads)
    copying = speed(probes.copy_bandwidth(threads))
    yield f"{threads} threads copy memory at {copying}, the CPU merges {speed(merge_bandwidth)} (8 models of F32)"
    for gpu in gpus:
        try:
            yield f"the link to {gpu} takes {speed(probes.h2d_bandwidth(gpu))}; --device auto takes the faster one of the two ways"
        except RuntimeError as error:
            yield f"the link to {gpu} cannot be measured: {first_line(error)}"
    if not gpus:
        yield "no GPU here: files are merged on the CPU"

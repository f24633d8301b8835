"""Where a merge of checkpoints runs, on the CPU or a GPU, and why: chosen by bandwidths measured on this machine.

To a GPU every byte has to cross after it was read into memory. Where the disk is the bottleneck the CPU kernel keeps up with it,
and is as fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..backends import registry
from ..core.batch import Signature
from ..core.errors import InputError, first_line
from ..core.rule import Rule
from ..runtime import device as devices
from . import probes
from .options import MergeOptions
from .plan import Plan
from .probes import format_bandwidth

# Seconds that a GPU must save, to be worth an import of torch (1 … 5 s), a context (0.3 s on an H100) and the self-test of its
# kernels (0.1 s there); and bytes of a job that it can't save them on.
_GPU_STARTUP_S, _MIN_JOB_BYTES = 5.0, 4 << 30
# A smaller speedup is noise. With less free memory a GPU is in use by others. Shorter extents are too short for launches.
_MIN_SPEEDUP, _MIN_AVAILABLE_BYTES, _MIN_EXTENT_BYTES = 1.2, 1 << 30, 1 << 20

GPU = "cuda:0"


class Throughput(NamedTuple):
    """Measured bandwidths, in bytes per second.

    read_bandwidth: of the job's files, on all threads. cached: whether they come from memory or a disk; None if unknown.
    merge_bandwidth: of the CPU, from its caches, on all threads. h2d_bandwidth: from page-locked memory to the GPU, if there
    is one.
    """

    read_bandwidth: float
    cached: bool | None
    merge_bandwidth: float
    h2d_bandwidth: float | None = None

    @property
    def cpu_bandwidth(self) -> float:
        """Of a merge on the CPU, where other threads merge while one waits for a disk, but not while it copies cached files."""
        if self.cached is False:
            return min(self.read_bandwidth, self.merge_bandwidth)
        return 1 / (1 / self.read_bandwidth + 1 / self.merge_bandwidth)

    @property
    def gpu_bandwidth(self) -> float:
        return min(self.read_bandwidth, self.h2d_bandwidth or 0.0)

    def __str__(self) -> str:
        where = {True: " from memory", False: " from the disk", None: ""}[self.cached]
        read, merge = format_bandwidth(self.read_bandwidth), format_bandwidth(self.merge_bandwidth)
        h2d = f", {format_bandwidth(self.h2d_bandwidth)} to the GPU" if self.h2d_bandwidth else ""
        return f"files are read at {read}{where}, merged on the CPU at {merge}{h2d}"


class Placement(NamedTuple):
    """Where a job is merged ("cpu" or a device of torch), why, and the throughput, if it was measured for that."""

    device: str
    reason: str
    throughput: Throughput | None = None


def measure_throughput(plan: Plan, rule: Rule, threads: int, backend: str = "auto") -> Throughput | None:
    """Measure a job's bandwidths on the CPU, for the storage types of most of its elements; None if nothing is merged."""
    numels: dict[tuple[Signature, str | None], int] = {}
    for tensor_slice in (s for extent in plan.extents for s in extent.slices):
        types = tensor_slice.signature, tensor_slice.weight
        numels[types] = numels.get(types, 0) + tensor_slice.numel
    most = max(numels, key=numels.__getitem__, default=None)
    if most is None or not numels[most]:
        return None
    signature, weight = most
    read_bandwidth, cached = probes.read_bandwidth(plan, threads)
    if cached:  # once more: a sample of what is so fast is short
        read_bandwidth = max(read_bandwidth, probes.read_bandwidth(plan, threads)[0])
    return Throughput(
        read_bandwidth, cached, probes.merge_bandwidth(signature, rule, threads, backend, weight)
    )


def choose_placement(plan: Plan, options: MergeOptions, rule: Rule) -> Placement:
    """Choose where a job is merged: by its options, else by measured bandwidths."""
    if options.device != "auto":
        return Placement(GPU if options.device == "cuda" else options.device, "asked for")
    if options.backend == "auto":
        return _fastest_placement(plan, rule, options.thread_count)
    on_gpu = options.backend == "cuda" or (options.backend == "triton" and gpu_may_exist())
    return Placement(GPU if on_gpu else "cpu", f"where backend {options.backend} is")


def _fastest_placement(plan: Plan, rule: Rule, threads: int) -> Placement:
    if not gpu_may_exist():
        return Placement("cpu", "no GPU here")
    if plan.bytes_read < _MIN_JOB_BYTES:
        return Placement("cpu", "done before a GPU would have begun")
    if plan.bytes_read < _MIN_EXTENT_BYTES * len(plan.extents):
        return Placement("cpu", "chunks too short for a GPU")
    if (throughput := measure_throughput(plan, rule, threads)) is None:
        return Placement("cpu", "nothing to merge")
    cpu_seconds = plan.bytes_read / throughput.cpu_bandwidth
    if (saved := cpu_seconds - plan.bytes_read / throughput.read_bandwidth) < _GPU_STARTUP_S:
        reason = f"a GPU would wait for the files as well, and save {saved:.1f} s at best"
        return Placement("cpu", reason, throughput)
    try:
        if problem := _gpu_problem(plan, rule):
            return Placement("cpu", problem, throughput)
        throughput = throughput._replace(h2d_bandwidth=probes.h2d_bandwidth(GPU))
    except (InputError, RuntimeError) as error:  # nobody asked for the GPU, so no fault of it is an error
        return Placement("cpu", f"{GPU} cannot be used: {first_line(error)}", throughput)
    gpu_seconds = plan.bytes_read / throughput.gpu_bandwidth + _GPU_STARTUP_S
    speeds = format_bandwidth(throughput.cpu_bandwidth), format_bandwidth(throughput.gpu_bandwidth)
    reason = f"{speeds[0]} on the CPU, {speeds[1]} through {GPU}"
    return Placement(GPU if gpu_seconds < cpu_seconds / _MIN_SPEEDUP else "cpu", reason, throughput)


def _gpu_problem(plan: Plan, rule: Rule) -> str | None:
    """Why the GPU cannot merge a plan; None if it can."""
    if registry.choose("auto", GPU, rule, plan.signatures)[0] == "torch":
        return f"no kernel is usable on {GPU}"
    if (available_bytes := devices.available_bytes(GPU)) < _MIN_AVAILABLE_BYTES:
        return f"only {available_bytes:,} bytes are free on {GPU}"
    return None


def gpu_may_exist() -> bool:
    """Whether there may be a GPU, found without torch, which takes longer to import than many a merge takes."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def describe(gpus: Sequence[str]) -> Iterator[str]:
    """Measure this machine's bandwidths, and put them into sentences."""
    threads = registry.usual_threads()
    merged = format_bandwidth(
        probes.merge_bandwidth(Signature("F32", ("F32",) * 8, False), Rule(1.0), threads)
    )
    copied = format_bandwidth(probes.copy_bandwidth(threads))
    yield f"{threads} threads copy memory at {copied}, the CPU merges at {merged} (8 models of F32)"
    for gpu in gpus:
        try:
            bandwidth = format_bandwidth(probes.h2d_bandwidth(gpu))
            yield f"host to {gpu} at {bandwidth}; --device auto takes the faster of the CPU and {gpu}"
        except RuntimeError as error:
            yield f"host to {gpu} cannot be measured: {first_line(error)}"
    if not gpus:
        yield "no GPU here: files are merged on the CPU"

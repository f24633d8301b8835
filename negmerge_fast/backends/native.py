"""The compiled kernels of csrc/ as backends: "cpu" and "cuda".

The kernels take integers, addresses among them. They know neither torch nor NumPy.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..core.batch import COUNTED, Batch, Counts, counted_by
from ..core.choices import FAMILY_COUNTED, Choices
from ..core.control_groups import granted_cpus
from ..core.delta import APPLIED, RANK_BLOCK, DeltaBatch
from ..core.descriptors import (
    Act,
    act_of,
    has_expansions,
    pack_delta_for_device,
    pack_deltas,
    pack_descriptors,
    pack_expand,
    pack_expand_for_device,
    pack_family_for_device,
    pack_for_device,
    pack_low_rank,
    pack_numbers,
    pack_terms,
    upload,
)
from ..core.dtypes import DTYPE_CODES
from ..core.errors import InputError, first_line
from ..core.low_rank import ExpandBatch
from ..core.rule import Rule

if TYPE_CHECKING:
    import numpy as np
    import torch


# CUDA launches no more.
MAX_BLOCKS = 2**31 - 1


class BuildInfo(TypedDict):
    """What setup.py recorded of the build.

    Attributes:
        cpu: Why the CPU kernel was not compiled; None if it was.
        cuda: The same for the CUDA kernel.
        cuda_architectures: The GPUs that it has machine code for; others compile its intermediate code.
    """

    cpu: str | None
    cuda: str | None
    cuda_architectures: list[int]


def build_info() -> BuildInfo:
    """Read what setup.py recorded of the build."""
    return _recorded(__file__)


@cache  # every merge asks why a backend is not the one
def _recorded(module: str) -> BuildInfo:
    # Several Pythons may share one source folder: each has a library and a file of its own.
    path = Path(module).parents[1].joinpath("_native" + EXTENSION_SUFFIXES[0]).with_suffix(".json")
    try:
        info: BuildInfo = json.loads(path.read_text())
    except FileNotFoundError:
        reason = "negmerge_fast was never installed for this Python, which compiles it: pip install -e ."
        return {"cpu": reason, "cuda": reason, "cuda_architectures": []}
    return info


def why_not(name: str, device: str) -> str | None:
    """Tell why the "cpu" or the "cuda" kernel cannot run on a device here; None if it can."""
    if device.partition(":")[0] != name:
        return f"is for tensors on {name}, not on {device}"
    built = build_info()
    if (reason := built["cpu" if name == "cpu" else "cuda"]) is not None:
        return f"not built: {reason}"
    try:
        library()
    except ImportError as error:
        return f"cannot be loaded: {error}"
    if name == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        capability = torch.cuda.get_device_capability(device)
    except (RuntimeError, ValueError, AssertionError) as error:
        return f"torch has no device {device!r} here: {first_line(error)}"
    number = 10 * capability[0] + capability[1]
    if number < min(built["cuda_architectures"]):
        return f"compiled for sm_{min(built['cuda_architectures'])} and later, the device is sm_{number}"
    return None


def details(name: str) -> str:
    """Describe what a kernel was compiled for, if it was."""
    built = build_info()
    if built["cpu" if name == "cpu" else "cuda"] is not None:
        return ""
    if name == "cpu":
        return f" ({instruction_set()}, {usual_threads()} threads)"
    return f" (compiled for {', '.join(f'sm_{number}' for number in built['cuda_architectures'])})"


def merge_cpu(batch: Batch, rule: Rule, threads: int | None = None, consensus: bool = False) -> Counts:
    """Merge a batch in main memory, or with `consensus` only its means, as registry.consensus says.

    Returns int64[segments, len(counted_by(rule))] as a buffer. A small tensor takes less time than what stands here, so nothing is
    imported, asked or converted twice.
    """
    if rule.choices is not None:
        return merge_low_rank_cpu(batch, rule, threads, consensus)
    descriptors = pack_descriptors(batch)
    counts = array("q", _ZEROS * len(batch.segments))
    call = library().consensus_cpu if consensus else library().merge_cpu
    call(
        *kernel_arguments(batch, rule),
        descriptors.buffer_info()[0],
        counts.buffer_info()[0],
        threads or usual_threads(),
        instruction_set(),
    )
    return _counts(counts, len(batch.segments))


def _counts(counts: array[int], segments: int) -> Counts:
    if not counts:  # a buffer of two dimensions cannot be empty
        return counts
    return memoryview(counts).cast("B").cast("q", (segments, len(counts) // segments))


# The counts of a segment before anything is counted.
_ZEROS = bytes(len(COUNTED) * 8)


def merge_low_rank_cpu(
    batch: Batch, rule: Rule, threads: int | None = None, consensus: bool = False
) -> Counts:
    """Merge a batch as merge_cpu; some of its models may be low-rank differences, which are expanded in the processor's cache."""
    if rule.choices is None and not has_expansions(batch):
        return merge_cpu(batch, rule, threads, consensus)
    descriptors, expansions = pack_expanded(batch)
    counts = array("q", bytes(8 * len(counted_by(rule)) * len(batch.segments)))
    family = FamilyArguments(batch, rule.choices) if rule.choices else None
    call = library().merge_family_cpu if family else library().merge_low_rank_cpu
    call(
        *kernel_arguments(batch, rule),
        descriptors.buffer_info()[0],
        counts.buffer_info()[0],
        *((family.packed,) if family else ()),
        expansions.buffer_info()[0],
        consensus,
        threads or usual_threads(),
        instruction_set(),
    )
    return _counts(counts, len(batch.segments))


class FamilyArguments:
    """What the CPU kernel is given of choices and of the terms of a batch.

    Attributes:
        packed: The fields of Family of csrc/batch.h. Its addresses are of memory of this object.
    """

    def __init__(self, batch: Batch, choices: Choices) -> None:
        self._numbers, self._terms = pack_numbers(choices), pack_terms(batch)
        self.packed = (
            *(int(choices.gate), int(choices.election), int(choices.reduction)),
            *(choices.seed, choices.mask_scale),
            *(self._numbers.buffer_info()[0], self._terms.buffer_info()[0]),
        )


def pack_expanded(batch: Batch) -> tuple[array[int], array[int]]:
    """A batch's descriptors, and its expansions: an array of nothing if it has none, whose address is 0."""
    return pack_low_rank(batch) if has_expansions(batch) else (pack_descriptors(batch), array("Q"))


def expand_cpu(batch: ExpandBatch, threads: int | None = None) -> None:
    """Write low-rank differences in main memory."""
    descriptors = pack_expand(batch)
    library().expand_cpu(
        DTYPE_CODES[batch.arithmetic],
        batch.result is not None,
        DTYPE_CODES[batch.result or batch.arithmetic],
        len(batch.segments),
        descriptors.buffer_info()[0],
        threads or usual_threads(),
        instruction_set(),
    )


def apply_cpu(batch: DeltaBatch, scale: float | None, threads: int | None = None) -> Counts:
    """Apply a batch of deltas in main memory; returns int64[segments, len(APPLIED)] as a buffer."""
    return _run_deltas(batch, *act_of(batch, scale), threads)


def save_cpu(batch: DeltaBatch, threads: int | None = None) -> None:
    """Copy the base's elements that are in the mask to `saved`."""
    _run_deltas(batch, Act.SAVE, 0.0, threads)


def _run_deltas(batch: DeltaBatch, act: Act, scale: float, threads: int | None) -> Counts:
    descriptors = pack_deltas(batch)
    counts = array("q", bytes(8 * len(APPLIED) * len(batch.segments)))
    library().apply_cpu(
        *delta_arguments(batch, act, scale),
        descriptors.buffer_info()[0],
        counts.buffer_info()[0],
        threads or usual_threads(),
        instruction_set(),
    )
    return _counts(counts, len(batch.segments))


@cache
def library() -> Any:
    """The compiled library: there is none where it could not be compiled."""
    from .. import _native

    return _native


def merge_cuda(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """Launch a merge on the current stream of the batch's device; returns int64[segments, len(counted_by(rule))] there without waiting."""
    return _launch_cuda(batch, rule, MAX_BLOCKS)


def merge_cuda_in_few_blocks(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """merge_cuda as for large batches, however small this one is: for the self-test.

    Each block has several tiles. With one of the self-test's two scales the table is uploaded.
    """
    return _launch_cuda(batch, rule, 3, uploaded=rule.scale < 0)


def _launch_cuda(batch: Batch, rule: Rule, max_blocks: int, uploaded: bool = False) -> torch.Tensor:
    """Launch a merge in at most so many blocks. Its table goes along where it fits, and is uploaded else, or if `uploaded`."""
    from .. import _native

    if rule.choices is not None:
        return _launch_family(batch, rule, rule.choices, max_blocks, uploaded)
    table, tiles = pack_for_device(batch, _native.cuda_tile)
    size = len(batch.segments), len(COUNTED)
    return _launch(
        _native.merge_cuda,
        kernel_arguments(batch, rule),
        batch.device,
        table,
        tiles,
        size,
        max_blocks,
        uploaded,
    )


def _launch_family(
    batch: Batch, rule: Rule, choices: Choices, max_blocks: int, uploaded: bool
) -> torch.Tensor:
    from .. import _native

    table, tiles = pack_family_for_device(batch, choices, _native.cuda_tile)
    size = len(batch.segments), len(FAMILY_COUNTED)
    numbers = pack_numbers(choices)
    arguments = *kernel_arguments(batch, rule), family_arguments(choices, numbers)
    return _launch(_native.family_cuda, arguments, batch.device, table, tiles, size, max_blocks, uploaded)


def apply_cuda(batch: DeltaBatch, scale: float | None, threads: int | None = None) -> torch.Tensor:
    """Launch the applying of deltas as merge_cuda does a merge; returns int64[segments, len(APPLIED)] on the device."""
    return _launch_deltas(batch, *act_of(batch, scale), MAX_BLOCKS)


def save_cuda(batch: DeltaBatch, threads: int | None = None) -> None:
    """Launch the copying of the base's elements that are in the mask to `saved`."""
    _launch_deltas(batch, Act.SAVE, 0.0, MAX_BLOCKS)


def deltas_in_few_blocks(batch: DeltaBatch, act: Act, scale: float) -> torch.Tensor:
    """Apply or save as for large batches, however small this one is: for the self-test. As merge_cuda_in_few_blocks."""
    return _launch_deltas(batch, act, scale, 3, uploaded=scale < 0)


def _launch_deltas(
    batch: DeltaBatch, act: Act, scale: float, max_blocks: int, uploaded: bool = False
) -> torch.Tensor:
    from .. import _native

    table, tiles = pack_delta_for_device(batch, RANK_BLOCK)
    size, arguments = (len(batch.segments), len(APPLIED)), delta_arguments(batch, act, scale)
    return _launch(_native.apply_cuda, arguments, batch.device, table, tiles, size, max_blocks, uploaded)


def expand_cuda(batch: ExpandBatch, threads: int | None = None) -> None:
    """Launch the writing of low-rank differences on the current stream of their device, without waiting."""
    _launch_expand(batch, MAX_BLOCKS)


def expand_cuda_in_few_blocks(batch: ExpandBatch, uploaded: bool) -> None:
    """expand_cuda as for large batches, however small this one is: for the self-test. As merge_cuda_in_few_blocks."""
    _launch_expand(batch, 3, uploaded)


def _launch_expand(batch: ExpandBatch, max_blocks: int, uploaded: bool = False) -> None:
    from .. import _native

    table, boxes, tiles = pack_expand_for_device(batch, *_native.expand_tile)
    dtypes = DTYPE_CODES[batch.result or batch.arithmetic], DTYPE_CODES[batch.arithmetic]
    _launch(_native.expand_cuda, (*dtypes, boxes), batch.device, table, tiles, (0, 0), max_blocks, uploaded)


def _launch(
    kernel: Any, arguments: tuple[Any, ...], on: str, table: np.ndarray[Any, Any], tiles: int,
    size: tuple[int, int], max_blocks: int, uploaded: bool,
) -> torch.Tensor:  # fmt: skip
    """Launch a kernel on a device's current stream; returns its counts, of this size, without waiting."""
    import torch

    from .. import _native

    with torch.cuda.device(torch.device(on)):
        index = torch.cuda.current_device()
        uploaded = uploaded or len(table) > _native.cuda_table
        counts, address, words = place_table(table, size, f"cuda:{index}", uploaded)
        stream = torch.cuda.current_stream().cuda_stream
        kernel(*arguments, address, words, counts.data_ptr(), tiles, max_blocks, index, stream)
    return counts


def place_table(
    table: np.ndarray[Any, Any], size: tuple[int, int], device: str, uploaded: bool
) -> tuple[torch.Tensor, int, int]:
    """Zeros on a device to count in, and a table's address and length; the length is 0 if the table is there, too.

    The counts lie behind an uploaded table: to fill them would be one launch more.
    """
    import numpy as np
    import torch

    if not uploaded:
        return torch.zeros(size, dtype=torch.int64, device=device), table.ctypes.data, len(table)
    memory = upload(np.append(table, np.zeros(size, np.int64)), device)
    return memory[len(table) :].view(size), memory.data_ptr(), 0


def instruction_set() -> str:
    """The best instruction set of this machine that has a kernel, or the one that NEGMERGE_CPU names, for tests."""
    # Asked of the library at each call: os.environ takes longer to read than a small tensor to merge.
    asked: str = library().asked_instruction_set()
    if asked not in (found := library().instruction_sets):
        raise InputError(f"NEGMERGE_CPU: {asked!r}, expected one of {', '.join(found)}")
    return asked


def usual_threads() -> int:
    """The usual number of threads: torch's if torch is loaded, else OpenMP's, else one for each processor of ours.

    No more than the control groups grant CPUs: more threads would be halted for a part of each period.
    """
    return min(_configured_threads(), granted_cpus())


def _configured_threads() -> int:
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return len(os.sched_getaffinity(0))
    except OSError:  # in some sandboxes
        return os.cpu_count() or 1


def kernel_arguments(batch: Batch, rule: Rule) -> tuple[int, bytes, bool, float, int, int]:
    """The arguments that both kernels begin with."""
    result, models, task_vectors = batch.signature
    return (
        DTYPE_CODES[result],
        bytes(map(DTYPE_CODES.__getitem__, models)),
        task_vectors,
        rule.scale,
        rule.required(len(models)),
        len(batch.segments),
    )


def family_arguments(choices: Choices, numbers: array[float]) -> tuple[int, int, int, int, float, int, int]:
    """Choices as FamilyArguments packs them, without terms, which a device has in its table. numbers: of pack_numbers."""
    chosen = int(choices.gate), int(choices.election), int(choices.reduction)
    return *chosen, choices.seed, choices.mask_scale, numbers.buffer_info()[0], 0


def delta_arguments(batch: DeltaBatch, act: Act, scale: float) -> tuple[int, int, int, int, float, int]:
    """The arguments that kernels for deltas begin with."""
    result, means, arithmetic = map(DTYPE_CODES.__getitem__, batch.signature)
    return result, means, arithmetic, act, scale, len(batch.segments)

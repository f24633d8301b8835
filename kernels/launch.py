"""Launch parameters of the Triton kernel: chosen by reasoning, or searched for on a GPU (NEGMERGE_AUTOTUNE=1)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from ..core.batch import Batch, Operand, Signature, segment_at
from ..core.dtypes import FLOAT_SIZES
from ..core.rule import Rule


class Launch(NamedTuple):
    """How the kernel is specialised and launched.

    Attributes:
        elements: Elements of a thread at a time.
        group: Models whose loads are under way at once.
        threads: Threads of a program.
        programs: The number of programs before one of them takes a second tile.
        registers: The most registers of a thread, where the compiler accepts a limit; 0 leaves it to the compiler.
    """

    elements: int
    group: int
    threads: int
    programs: int
    registers: int = 0

    @property
    def tile(self) -> int:
        return self.elements * self.threads


def usual_launch(signature: Signature, unanimous: bool) -> Launch:
    """Launch parameters chosen by reasoning. bench/tuning/tune_gpu.py measures them beside all candidates."""
    sizes = [FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models)]
    double = signature.arithmetic == "F64"
    # 16 bytes of the narrowest operand, or four elements. On an H100, eight elements of 16 bits had 0.68 (BF16) and 0.75 (F16) of a
    # device copy for 2 models and four 0.77 and 0.83; for 8 models all had 0.93 to 0.94; for 32, eight had 0.98 and four 0.99 and
    # 0.93: rows of commit d19b937 in bench/results/tune_gpu.jsonl, of a slower kernel. Majorities and mixtures were not measured.
    elements = min(4, 16 // min(sizes))
    # 8 models of 16 bytes for each thread hide memory's latency. More bytes, or a majority's doubles, leave registers for fewer:
    # tests/kernels/test_merge.py holds that no local memory is used.
    group = 8 if elements * max(sizes[1:]) <= 16 else 4
    if double and not unanimous:
        group = 2
    # On an H100 these launches were as fast with 16,384 programs as with 4,096 or up to 8 % faster. With 2^20 they were far
    # slower for few models, bench/results/tune_gpu.jsonl.
    registers = _registers(elements, double, unanimous, len(signature.models))
    return Launch(elements, group, threads=128, programs=16384, registers=registers)


def _registers(elements: int, double: bool, unanimous: bool, models: int) -> int:
    # Of one running value: there are 3, or 6 for a majority.
    narrow = elements * (8 if double else 4) <= 16
    if not unanimous:
        # Without a limit, NVIDIA's compiler keeps some values of a majority in local memory to run more programs at once.
        return (112 if double else 96) if narrow else 224 if double else 168
    # Read in the machine code, not measured: with these limits the loads of a group are issued before any is needed, 80 KiB of a
    # processor for 8 models of 16 bits and 30 for 2, and sm_80 to sm_100 need no local memory. Without a limit, NVIDIA's compiler
    # takes fewer registers and issues 2 loads of 10.
    if narrow:
        return 48 if models <= 4 else 56
    return 80 if double else 96


LaunchMerge = Callable[[Batch, Rule, Launch], Any]

# What NEGMERGE_AUTOTUNE=1 or `make tune` printed, by device, dtypes of base and models, and whether the rule is unanimous.
# bench/results/tune_gpu.jsonl has the rows of all candidates: for 16 bits the usual launch was the best. F64 was searched for 8 and 32
# models, F32 for 2, too. The rows are of the kernel of commit d19b937, which took more registers: the limits are of today's machine code.
FOUND: dict[tuple[str, str, str, bool], Launch] = {
    ("NVIDIA H100 80GB HBM3", "F64", "F64", True): Launch(
        elements=1, group=2, threads=256, programs=4096, registers=56
    ),
    ("NVIDIA H100 80GB HBM3", "F32", "F32", True): Launch(
        elements=4, group=8, threads=256, programs=16384, registers=56
    ),
}


def launch_for(signature: Signature, unanimous: bool, device: str, launch_merge: LaunchMerge) -> Launch:
    """The launch parameters of a device: those in FOUND, those of a search now if it is asked for, or the usual ones."""
    target_device = torch.device(device)
    models = "+".join(sorted(set(signature.models)))
    key = (
        getattr(torch, target_device.type).get_device_name(target_device),
        signature.result,
        models,
        unanimous,
    )
    if key not in FOUND and os.environ.get("NEGMERGE_AUTOTUNE") == "1":
        FOUND[key] = search(signature, unanimous, device, launch_merge)
        print(f"    {key!r}: {FOUND[key]!r},  # for FOUND in kernels/launch.py", file=sys.stderr)
    return FOUND.get(key) or usual_launch(signature, unanimous)


SEARCHED_BYTES = 2**30  # far more than any cache


def candidates(signature: Signature, unanimous: bool) -> Iterator[Launch]:
    """The launch parameters that a search compares, the usual ones first."""
    usual = usual_launch(signature, unanimous)
    yield usual
    # 16 bytes of the narrowest operand, and half of that; eight doubles of each running value would not fit the registers. On an
    # H100 neither twice these elements nor 512 threads were the best for any dtype, bench/results/tune_gpu.jsonl.
    double = signature.arithmetic == "F64"
    narrowest = min(FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models))
    elements_of_16_bytes = min(4 if double else 8, 16 // narrowest)
    for elements in (elements_of_16_bytes // 2, elements_of_16_bytes):
        registers = _registers(elements, double, unanimous, len(signature.models))
        for group in (2, 4, 8):
            for threads in (128, 256):
                for programs in (4096, 16384, 65536):
                    launch = Launch(elements, group, threads, programs, registers)
                    if launch != usual:
                        yield launch


def search(
    signature: Signature, unanimous: bool, device: str, launch_merge: LaunchMerge, measure: Any = None
) -> Launch:
    """Find the fastest of the candidates, on zeros.

    measure gives the milliseconds of a function; None means triton.testing.do_bench.
    """
    measure = measure or triton.testing.do_bench
    # With fewer models than two groups, not all groups differ.
    signature = signature._replace(models=(signature.models * 17)[: max(17, len(signature.models))])
    sizes = [FLOAT_SIZES[dtype] for dtype in (signature.result, signature.result, *signature.models)]
    numel = SEARCHED_BYTES // sum(sizes) // 16 * 16
    out, *versions = [torch.zeros(numel * size, dtype=torch.uint8, device=device) for size in sizes]
    segment = segment_at(numel, signature, [version.data_ptr() for version in versions], versions)
    segment = segment._replace(out=Operand(out.data_ptr(), signature.result, out))
    batch = Batch(device, signature, [segment])
    rule = Rule(1.0, 1.0 if unanimous else 0.6)
    taken: dict[Launch, float] = {}
    for launch in candidates(signature, unanimous):
        try:
            taken[launch] = measure(partial(launch_merge, batch, rule, launch))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(taken, key=lambda launch: taken[launch])

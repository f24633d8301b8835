"""The command `negmerge bench`: rooflines, every backend on one tensor of each dtype, and plain PyTorch beside them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..backends import registry
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, first_line
from . import bandwidth
from .candidates import (
    BASELINES,
    EAGER,
    Refused,
    candidate,
    check,
    failure,
    min_rounds,
    nothing,
    unusable,
    without_compilation,
)  # fmt: skip
from .records import COMPILED, Row, append, line, on_gpu, table
from .shapes import one_tensor
from .timing import Timing, timing_of
from .workload import Lacking, free_memory, release, shared_workload

# Bytes of all versions of the tensor together: more than the caches hold, and merged in a fraction of a second.
BYTES = {"cpu": 400_000_000, "cuda": 1 << 30}
MODELS = (2, 8, 32)
# Baselines, by dtype and number of models. Two cases are enough to compare with.
COMPARED = {
    ("F32", 8): (EAGER, COMPILED, f"{COMPILED}, dynamic"),
    ("BF16", 8): (COMPILED, f"{COMPILED}, dynamic"),
}
SECONDS = 2.0


def run(
    device: str = "auto",
    report: str | None = None,
    progress: Callable[[], None] = nothing,
    quiet: bool = False,
) -> list[Row]:
    """Measure, print the tables and return their rows.

    Args:
        device: "cpu" or a CUDA device. "auto" takes the first GPU, if there is one.
        report: A file to append each row to as soon as it is measured.
        progress: Called between rounds. It may raise to stop.
        quiet: Whether to show no progress bar.

    Raises:
        InputError: If the device or the report's directory does not exist.
        RuntimeError: If a backend differs from the reference, after all others were measured.
    """
    from tqdm import tqdm

    device = _checked(device)
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise InputError(f"{report}: no such directory, expected one to hold the report")
    rows: list[Row] = []
    refused: list[str] = []
    missing = {reason: None for name in registry.NAMES if (reason := unusable(name, device))}
    names = [name for name in registry.NAMES if not unusable(name, device)]
    kind = "cuda" if on_gpu(device) else "cpu"
    max_bytes = min(BYTES[kind], free_memory(device) // 4)
    cases: list[tuple[str, int, str]] = [("", 0, name) for name in bandwidth.IN_MEMORY[kind]]
    for dtype in FLOAT_SIZES:
        for n in MODELS:
            cases += [(dtype, n, name) for name in (*names, *COMPARED.get((dtype, n), ()))]
    # disable=None shows no bar unless standard error is a terminal.
    with tqdm(cases, desc="bench", unit="case", leave=False, disable=True if quiet else None) as bar:
        for dtype, n, name in bar:
            progress()
            failed = None
            try:
                row = (
                    _time_candidate(device, dtype, n, name, max_bytes, progress)
                    if n
                    else _time_roofline(device, name, max_bytes, progress)
                )
                rows.append(row)
                if report is not None:
                    append(Path(report), [row])
                bar.set_postfix_str(line(row), refresh=False)
            except Lacking as error:
                failed = str(error)
            except Refused as error:
                refused.append(str(error))
            except Exception as error:
                if name not in BASELINES:
                    raise
                failed = f"{name}: {failure(error)}"
            if failed is not None:
                missing[failed] = None
                gc.collect()  # the exception referred to the workload's memory
    release()
    print(table(rows))
    for reason in missing:
        print(f"not measured: {reason}")
    if refused:
        raise RuntimeError("; ".join(refused))
    return rows


def _checked(device: str) -> str:
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r}: {first_line(error)}") from None
    if kind not in BYTES:
        raise InputError(f"device: {device!r}, expected cpu or a CUDA device, such as cuda:0")
    return device


def _time_roofline(device: str, name: str, size: int, on_progress: Callable[[], None]) -> Row:
    roofline = bandwidth.in_memory(name, device, size)
    row = {"suite": "limits", "way": name, "bytes": roofline.bytes, "state": "in memory"}
    timing = Timing(
        roofline.task,
        row,
        None,
        device,
        before=partial(bandwidth.flush, device) if on_gpu(device) else nothing,
    )
    return timing.result(timing.measure(SECONDS, 7, on_progress=on_progress))


def _time_candidate(
    device: str, dtype: str, n: int, name: str, size: int, on_progress: Callable[[], None]
) -> Row:
    numel = max(4096, size // (n + 2) // FLOAT_SIZES[dtype] // 4096 * 4096)
    workload = shared_workload("one tensor", one_tensor(numel), dtype, n, device)
    chosen = candidate(workload, name)
    differing, first_call = check(workload, chosen)
    timing = timing_of(workload, chosen, "memory")
    taken = without_compilation(name, first_call)
    seconds = timing.measure(SECONDS, min_rounds(name), taken, on_progress)
    return timing.result(seconds, workload.copies, differing=differing, first_call=first_call)

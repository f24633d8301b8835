"""What the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import escape
from .signals import Signals


def _say(*lines: str) -> None:
    print("\n".join(map(escape, lines)))


@contextmanager
def _bar(what: str, signals: Signals, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of progress in bytes, from the first that is told of it, which is also where signals stop a job."""
    from tqdm import tqdm

    bars: list[Any] = []

    def progress(done: int, total: int) -> None:
        signals.check()
        if not bars:
            # disable=None: no bar where standard error is not a terminal.
            bars.append(tqdm(
                total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=True if quiet else None,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left",
            ))  # fmt: skip
        bars[0].update(done - bars[0].n)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()


def _size(count: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_sizeof(count, "B"))


def _plan_lines(job: Any) -> list[str]:
    plan = job.plan
    from ..streaming.partition import segments_of

    segments = segments_of(plan, job.chunk_bytes)
    return [
        f"base      {plan.base.path} ({plan.base.kind}, {len(plan.base.weights)} weight files)",
        f"models    {len(plan.models)}",
        f"output    {job.output.path}: {len(plan.files)} files",
        f"tensors   {plan.tensors} to merge ({plan.elements:,} elements), {plan.unchanged} kept as in base",
        f"segments  {segments} in {len(plan.extents)} extents, strokes of at most {_size(job.chunk_bytes)} per file",
        f"read      {_size(plan.bytes_read)}",
        f"write     {_size(plan.bytes_written)}",
        f"memory    {_size(job.memory)}{'' if job.placement.device == 'cpu' else f', and as much on {job.placement.device}'}",
        f"backend   {job.backend} on {job.placement.device} ({job.placement.reason})",
        *(f"way       {throughput}" for throughput in [job.throughput()] if throughput),
    ]  # fmt: skip


def _print_skipped_files(base: Any) -> None:
    """What lies in BASE and will not be in OUT: other weights, which were not merged, and hidden files."""
    for name in base.skipped_files:
        _say(f"left out  {name}")


def _summary(job: Any, done: Any) -> str:
    if job.finished:
        return f"{done.output}: was finished already"
    moved = done.bytes_read + done.bytes_written
    skipped = f", skipped {_size(done.bytes_skipped)}" if done.bytes_skipped else ""
    return (
        f"{done.output}: {len(done.tensors)} tensors merged, {job.plan.unchanged} kept; "
        f"{done.agreed:,} of {done.elements:,} elements agreed ({done.consensus_ratio:.2%}), {done.nonfinite:,} non-finite; "
        f"read {_size(done.bytes_read)}{skipped}, wrote {_size(done.bytes_written)} "
        f"in {done.seconds:.2f} s ({_size(moved / max(done.seconds, 1e-9))}/s, {done.backend} on {done.device})"
    )


def _verified(done: Any) -> str:
    text = (
        f"{done.output}: {done.files} files, {_size(done.bytes)}, as negmerge_fast {done.version} wrote them"
    )
    return text + (
        f"; {done.blocks} blocks, {_size(done.bytes_compared)}, merged again" if done.blocks else ""
    )


def _contents(checkpoint: Any) -> str:
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.spec.dtype] = dtypes.get(tensor.spec.dtype, 0) + tensor.numel
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.items()) or "no elements"
    size = sum(file.size for file in checkpoint.weights.values())
    return (
        f"{checkpoint.path}: {checkpoint.kind}, {len(checkpoint.weights)} weight files ({_size(size)}), "
        f"{len(checkpoint.tensors)} tensors: {kinds}; {len(checkpoint.extra_files)} other files"
        + (f", {len(checkpoint.skipped_files)} left out" if checkpoint.skipped_files else "")
    )

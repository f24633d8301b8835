"""Text and progress bars that the commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..core.errors import escape, short_repr
from ..methods.base import Method
from .signals import Signals

if TYPE_CHECKING:
    from ..checkpoints.base import Checkpoint
    from ..checkpoints.delta import DeltaCheckpoint, DeltaInfo
    from ..streaming.job import Job
    from ..streaming.report import Report
    from ..streaming.verify import Verified


def print_lines(*lines: str) -> None:
    """Print lines, without characters that a terminal obeys."""
    print("\n".join(map(escape, lines)))


@contextmanager
def progress_bar(title: str, signals: Signals, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show progress in bytes, from the first call on; each call also checks for signals.

    Args:
        title: The word before the bar.
        signals: Their check stops the job.
        quiet: Whether to check for signals only.

    Yields:
        A function of the bytes done and the bytes in all.
    """
    bars: list[Any] = []
    is_shown = not quiet and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        signals.check()
        if not is_shown:
            return
        if not bars:
            from tqdm import tqdm  # takes longer to import than a small merge takes, for a bar that few see

            bars.append(tqdm(
                total=total, unit="B", unit_scale=True, desc=title, leave=False,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left",
            ))  # fmt: skip
        bars[0].update(done - bars[0].n)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()


def plan_lines(jobs: Sequence[Job]) -> list[str]:
    """Describe what jobs of one plan would do, one property a line."""
    from ..streaming.partition import segments_of

    job = jobs[0]
    plan, device = job.plan, job.placement.device
    is_delta = [model.path for model in plan.models if model.kind == "delta"]
    throughput, bounds = job.throughput(), job.bytes_to_measure
    # How many means a delta has is not known.
    written = f"at least {_size(sum(file.size for file in plan.files.values()))}: masks, and the means of what agrees"
    return [
        f"base      {plan.base.path} ({plan.base.kind}, {len(plan.base.weights)} weight files)",
        f"delta     {is_delta[0]}" if is_delta else f"models    {len(plan.models)}",
        *(f"adapters  {line}" for line in plan.placed),
        *([f"method    {job.recipe.method}"] if job.recipe.method else []),
        *([f"weights   {plan.weights.path}"] if plan.weights else []),
        *(
            f"scale     {number:g}  {short_repr(pattern)}"
            for each in jobs
            for pattern, number in _patterns(each)
        ),
        *(f"output    {each.destination.path}: {len(plan.files)} files" for each in jobs),
        f"tensors   {plan.tensors} to merge ({plan.elements:,} elements), {plan.unchanged} unchanged",
        f"segments  {segments_of(plan, job.chunk_bytes)} in {len(plan.extents)} extents, "
        f"chunks of at most {_size(job.chunk_bytes)} per file",
        f"read      {_size(plan.bytes_read + bounds)}"
        + (f", of which {_size(bounds)} to find bounds" if bounds else ""),
        f"write     {written if job.recipe.means else _size(len(jobs) * plan.bytes_written)}",
        f"memory    {_size(job.memory)}{'' if device == 'cpu' else f', and as much on {device}'}",
        f"backend   {job.backend} on {device} ({job.placement.reason})",
        *([f"bandwidth {throughput}"] if throughput else []),
    ]


def _patterns(job: Job) -> Sequence[tuple[str, float]]:
    return job.recipe.scales.pairs if job.recipe.scales else ()


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user should know of a merge, on standard error."""
    for note in notes:
        print_note(note)


def print_note(note: str) -> None:
    """Print a note, at once."""
    print(escape(f"negmerge: note: {note}"), file=sys.stderr, flush=True)


def print_other_files(job: Job) -> None:
    """Print the files of the base that are not copied, those that are and are large, and what can be done about them."""
    base = job.plan.base
    if job.recipe.means:  # a delta has copies of none
        return
    lines = [f"skipped  {name}" for name in base.skipped_files]
    lines += [f"copied   {name} ({_size(size)})" for name, size in base.large_files.items()]
    if lines:
        print_lines(
            *lines, "         --keep GLOB copies a file that is skipped, --drop GLOB skips one that is copied"
        )


def summary(job: Job, done: Report) -> str:
    """Describe a finished merge."""
    if job.finished:
        return f"{done.output}: was finished already"
    moved = done.bytes_read + done.bytes_written
    skipped = f", skipped {_size(done.bytes_skipped)}" if done.bytes_skipped else ""
    nonfinite = "" if done.nonfinite is None else f", {done.nonfinite:,} non-finite"
    vetoed = "" if done.vetoed_by_zero is None else f", {done.vetoed_by_zero:,} vetoed by a zero"
    vetoed += f", {done.masked:,} masked" if done.masked and done.weights else ""
    changed = "agreed" if job.is_plain else "changed"
    tensors = f"{len(done.tensors)} tensors"
    if not job.recipe.means:
        tensors += f" merged, {job.plan.unchanged} unchanged"
    return (
        f"{done.output}: {tensors}; "
        f"{done.agreed:,} of {done.elements:,} elements {changed} ({done.consensus_ratio:.2%}){nonfinite}{vetoed}; "
        f"read {_size(done.bytes_read)}{skipped}, wrote {_size(done.bytes_written)} "
        f"in {done.seconds:.2f} s ({_size(moved / max(done.seconds, 1e-9))}/s, {done.backend} on {done.device})"
    )


def verified(done: Verified) -> str:
    """Describe an output in which no damage was found."""
    text = (
        f"{done.output}: {done.files} files, {_size(done.bytes)}, as negmerge_fast {done.version} wrote them"
    )
    return text + (
        f"; {done.blocks} blocks, {_size(done.bytes_compared)}, merged again" if done.blocks else ""
    )


def contents(checkpoint: Checkpoint) -> str:
    """Describe a checkpoint: its files, tensors and dtypes."""
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.spec.dtype] = dtypes.get(tensor.spec.dtype, 0) + tensor.numel
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.items()) or "no elements"
    size = sum(file.size for file in checkpoint.weights.values())
    return (
        f"{checkpoint.path}: {checkpoint.kind}, {len(checkpoint.weights)} weight files ({_size(size)}), "
        + (f"{checkpoint.adapter.modules} modules, " if checkpoint.adapter else "")
        + f"{len(checkpoint.tensors)} tensors: {kinds}; {len(checkpoint.extra_files)} other files"
        + (f", {len(checkpoint.skipped_files)} skipped" if checkpoint.skipped_files else "")
    )


def delta_contents(delta: DeltaCheckpoint) -> str:
    """Describe a consensus delta: its files, the base and the models that it was made of, and what is set."""
    info, stored = delta.info, sorted({tensor.means.spec.dtype for tensor in delta.tensors.values()})
    size = sum(file.size for file in delta.files.values())
    base = short_repr(info.base["path"]) if info.base else "a model in memory"
    ratio = delta.agreed / delta.elements if delta.elements else 0.0
    return (
        f"{delta.path}: consensus delta of {base} and {info.models} models ({_rule(info)}), "
        f"{len(delta.files)} files ({_size(size)}), {len(delta.tensors)} tensors: "
        f"{delta.agreed:,} of {delta.elements:,} elements agreed ({ratio:.2%}), means in {', '.join(stored) or 'no type'}"
    )


def _rule(info: DeltaInfo) -> str:
    method = f"{Method.of_json(info.method)}, " if info.method else ""
    weights = f", weights of {short_repr(info.weights)}" if info.weights else ""
    return f"{method}min_agreement {info.min_agreement}{weights}"


def delta_tensors(delta: DeltaCheckpoint) -> list[str]:
    """Describe what is set in each tensor of a delta, a line each."""
    width = max(map(len, delta.tensors), default=0)
    lines = []
    for name, tensor in delta.tensors.items():
        (dtype, shape), agreed, numel = tensor.info.spec, tensor.agreed, tensor.info.numel
        fraction = agreed / numel if numel else 0.0
        lines.append(f"{name:<{width}}  {dtype} {shape}: {agreed:,} of {numel:,} ({fraction:.2%})")
    return lines


def _size(count: float) -> str:
    """A number of bytes with three digits and a unit, as the progress bar shows it."""
    units = iter(" kMGTPEZ")
    unit = next(units)
    while abs(count) >= 999.5 and unit != "Z":
        count, unit = count / 1000, next(units)
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f}{unit.strip()}B"

"""Applying a consensus delta to a base on disk, with any number of scales in one pass over the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

from ..checkpoints.base import Checkpoint, OutputFormat
from ..checkpoints.delta import DeltaCheckpoint, open_delta
from ..checkpoints.formats import open_checkpoint, translate
from ..core.errors import InputError, MergeWarning
from ..core.rule import NonFinite
from ..core.scales import Scale, Scales
from ..core.stats import Stats, TensorStats
from ..methods.base import Method
from ..runtime.distributed import SINGLE
from ..runtime.interrupts import without_gc
from ..streaming.api import prepare_outputs
from ..streaming.expansion import EXTRA_BUFFERS, plan_delta
from ..streaming.job import Job
from ..streaming.options import MergeOptions, PathLike, as_input, as_path, require_callable
from ..streaming.progress import OnProgress
from ..streaming.report import Report
from ..streaming.together import run_together

# Outputs of one pass: each keeps a file or two open.
_MAX_SCALES = 64


@overload
def apply_delta(
    base: PathLike,
    delta: PathLike,
    output: PathLike,
    *,
    scale: float | Scales | Mapping[str, float],
    nonfinite: NonFinite = ...,
    keep: Sequence[str] = ...,
    drop: Sequence[str] = ...,
    backend: str = ...,
    device: str = ...,
    memory_budget: int | str | None = ...,
    threads: int | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    format: OutputFormat = ...,
    progress: OnProgress | None = ...,
) -> Report: ...
@overload
def apply_delta(
    base: PathLike,
    delta: PathLike,
    output: PathLike,
    *,
    scale: Sequence[float],
    nonfinite: NonFinite = ...,
    keep: Sequence[str] = ...,
    drop: Sequence[str] = ...,
    backend: str = ...,
    device: str = ...,
    memory_budget: int | str | None = ...,
    threads: int | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    format: OutputFormat = ...,
    progress: OnProgress | None = ...,
) -> list[Report]: ...
def apply_delta(
    base: PathLike,
    delta: PathLike,
    output: PathLike,
    *,
    scale: float | Scales | Mapping[str, float] | Sequence[float],
    nonfinite: NonFinite = "error",
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    format: OutputFormat = "auto",
    progress: OnProgress | None = None,
) -> Report | list[Report]:
    """Apply a consensus delta to its base, from disk to disk.

    The output has the bytes of merge_checkpoints with the base, the models and the options that the delta was made of, and with this
    scale. A delta whose means are stored in 16 bits gives others.

    Args:
        base: What the delta was made of: the same files, under any names. A base that was changed is refused.
        delta: The delta, as `negmerge delta` writes it.
        output: The path of the result, which mirrors base. Of several scales, each has a path of its own: `OUT-0.9`, or
            `OUT-0.9.safetensors` if base is a file, with the scale as Python prints it.
        scale: λ, any finite number; or several, which are written in one pass over base; or, as a mapping, regular expressions and the λ of
            tensors whose names they match, as of merge_checkpoints.
        nonfinite: With "error" a base or a result that is not finite publishes nothing; with "keep-base" such elements keep the
            base's bits.
        keep: As of merge_checkpoints, like all that follow.
        drop: Patterns of files of the base that are not copied.
        backend: "auto", "cuda", "triton", "cpu" or "torch".
        device: "cpu", or a device of torch.
        memory_budget: The most bytes to allocate.
        threads: How many threads read and compute.
        overwrite: Replace outputs that negmerge wrote.
        resume: Continue what an interrupted run left: each output for itself. Those that are finished stay as they are.
        format: As of merge_checkpoints.
        progress: Called with (bytes done, bytes in all) after every chunk.

    Returns:
        What was done, as of merge_checkpoints; a list if scale is one. What of the base was read once for several outputs is in
        bytes_read of the first of these.

    Raises:
        InputError: If an input or option is bad, or the delta is of another base.
        OSError: If reading or writing fails.
        TypeError: If a scale is no number.
    """
    require_callable("progress", progress)
    options = options_of(
        nonfinite=nonfinite, keep=keep, drop=drop, backend=backend, device=device, memory_budget=memory_budget,
        threads=threads, overwrite=overwrite, resume=resume, format=format,
    )  # fmt: skip
    several = isinstance(scale, Iterable) and not isinstance(scale, Mapping)
    scales: list[Scale] = list(scale) if several else [scale]  # type: ignore[arg-type, list-item]
    jobs = prepare_apply(base, delta, output, scales, options, several=several)
    reports = run_together(jobs, progress, None, SINGLE)
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        warnings.warn(note, MergeWarning, stacklevel=2)
    return reports if several else reports[0]


@dataclass(frozen=True)
class ApplyJob(Job):
    """The application of a delta with one scale."""

    delta: DeltaCheckpoint = field(kw_only=True)

    @property
    def is_plain(self) -> bool:
        return self.delta.info.method is None and self.delta.info.weights is None

    @property
    def method_name(self) -> str:
        method = self.delta.info.method
        return super().method_name if method is None else str(Method.of_json(method))

    def _total(self, stats: Stats) -> Stats:
        """What a merge with the delta's models would have counted.

        To the elements whose result is not finite come those that the delta does not have for such a reason; and what is zero where
        the mask is not set was vetoed by nothing.
        """
        total = Stats()
        counted = stats.tensors
        total.include({
            name: TensorStats(
                tensor.info.numel,
                counted[name].agreed,
                tensor.info.nonfinite + tensor.agreed - counted[name].agreed,
                tensor.info.vetoed_by_zero,
                tensor.info.masked or 0,
            )
            for name, tensor in self.delta.tensors.items()
        })  # fmt: skip
        return total


def options_of(**options: object) -> MergeOptions:
    """The options of a merge that an application has, too; scales are given beside them."""
    return MergeOptions(0.0, inputs="task_vectors", skip_unchanged=False, **options)  # type: ignore[arg-type]


def prepare_apply(
    base: PathLike,
    delta: PathLike,
    output: PathLike,
    scales: Sequence[Scale],
    options: MergeOptions,
    *,
    several: bool,
) -> list[Job]:
    """Check an application of a delta and decide how it runs, without writing anything.

    Args:
        base: As of apply_delta, like delta and output.
        delta: The delta.
        output: The path of the result, or what those of several results begin with.
        scales: Each λ; or patterns on names and theirs, of which there is one output.
        options: All else; its scale does not matter.
        several: Whether each output has its scale in its name.

    Returns:
        A job for each scale.
    """
    output_of, inputs = as_path("output", output), (as_input("base", base), as_input("delta", delta))
    with without_gc():
        opened = open_checkpoint(inputs[0].path, keep=options.keep, drop=options.drop)
        found = open_delta(inputs[1].path)
    opened = translate(opened, options.format)
    plan = plan_delta(opened, found)
    plan = replace(plan, notes=(*(each.note for each in inputs if each.note), *plan.notes))
    every = [replace(options, scale=each, min_agreement=found.info.min_agreement) for each in scales]
    if not 1 <= len(every) <= _MAX_SCALES:
        raise InputError(f"scale: {len(every)} scales, expected 1 … {_MAX_SCALES}")
    values = [own.scales.pairs[0][1] for own in every]
    if twice := [value for k, value in enumerate(values) if value in values[:k]]:
        raise InputError(f"scale: {twice[0]} twice, expected each once")
    suffix = "" if opened.is_directory else _suffix(output_of, opened)
    outputs = [
        (output_path(output_of, own.scales.pairs[0][1], suffix) if several else output_of, own)
        for own in every
    ]

    def make(*arguments: object) -> ApplyJob:
        return ApplyJob(*arguments, delta=found)  # type: ignore[arg-type]

    return prepare_outputs(plan, outputs, make, EXTRA_BUFFERS)


def _suffix(output: Path, base: Checkpoint) -> str:
    """The suffix of an output, if it may have it; or the usual one."""
    return output.suffix if output.suffix in base.suffixes else base.suffixes[0]


def output_path(path: Path, scale: float, suffix: str) -> Path:
    """Where the output of one of several scales goes. suffix: of a base that is a file, which comes last."""
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected a path that ends in a name, to which the scales are added")
    return path.with_name(f"{path.name.removesuffix(suffix)}-{scale!r}{suffix}")

"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..backends.registry import NAMES
from ..checkpoints.base import FORMATS
from ..core.scales import Scale
from ..methods import catalogue

_Command = TypeVar("_Command", bound=Callable[..., Any])


def output(command: _Command) -> _Command:
    """Where the result goes."""
    return click.option(
        "--output", "-o", required=True, metavar="OUT", help="Path of the result, which mirrors BASE."
    )(command)


def output_format(command: _Command) -> _Command:
    """What the weights of the result are written in."""
    return click.option(
        "--format",
        type=click.Choice(FORMATS),
        default="auto",
        show_default=True,
        help="Of OUT's weights: pt for torch.load; auto is BASE's, but safetensors in place of PyTorch's.",
    )(command)


def rule(command: _Command) -> _Command:
    """What of FINETUNED is compared with BASE, and how; --scale apart."""
    return _all(
        command,
        task_vectors,
        adapters_as,
        click.option(
            "--min-agreement",
            type=float,
            default=1.0,
            show_default=True,
            help="Fraction of the models that must agree on the sign of an element.",
        ),
        nonfinite,
        click.option("--include", metavar="RE", help="Merge only tensors whose name matches."),
        click.option("--exclude", metavar="RE", help="Copy tensors whose name matches from BASE."),
        rename,
    )


def scale_pairs(given: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """Split each RE=λ at its last "=". A number alone has the pattern ""."""
    pairs = []
    for value in given:
        pattern, _, number = value.rpartition("=")
        try:
            pairs.append((pattern, float(number)))
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is not a valid float, nor RE=NUMBER", param_hint="'--scale'"
            ) from None
    return tuple(pairs)


def scale_of(given: tuple[str, ...]) -> Scale:
    """λ, or patterns and theirs: a number alone is for all other tensors, wherever it stands."""
    pairs = sorted(scale_pairs(given), key=lambda pair: not pair[0])
    if sum(not pattern for pattern, _ in pairs) > 1:
        raise click.BadParameter("several numbers, expected one, or RE=NUMBER", param_hint="'--scale'")
    return pairs if len(pairs) > 1 or pairs[0][0] else pairs[0][1]


def scale(command: _Command) -> _Command:
    """λ, and its sign."""
    return _all(
        command,
        click.option(
            "--scale",
            metavar="λ|RE=λ",
            multiple=True,
            help="How far to move away from the fine-tuned models; RE=λ: tensors whose name matches; repeatable.",
        ),
        click.option("--add", is_flag=True, help="Move towards the fine-tuned models: turn the sign of λ."),
    )


def method(command: _Command) -> _Command:
    """Which method merges, with its numbers, and weights."""
    return _all(
        command,
        click.option("--method", type=click.Choice(catalogue.NAMES), default="negmerge", show_default=True),
        click.option(
            "--density", type=float, help="Fraction of the largest differences kept (ties, breadcrumbs)."
        ),
        click.option("--gamma", type=float, help="Fraction of the very largest dropped (breadcrumbs)."),
        click.option(
            "--over",
            type=click.Choice(["tensor", "model"]),
            help="What the fractions are of (ties, breadcrumbs).",
        ),
        click.option(
            "--drop-rate", type=float, help="Probability of dropping a difference (dare, dare-ties)."
        ),
        click.option("--seed", type=int, help="Of the generator (dare, dare-ties)."),
        click.option("--mask-scale", type=float, help="λ of the masks (consensus)."),
        click.option(
            "--weights",
            metavar="FILE",
            help="A weight for each element by BASE's names: a mask in a .pt or .safetensors file, or a directory.",
        ),
    )


def with_method(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the method that `method` took apart; weights stay.

    Raises:
        InputError: If a number is not the method's.
    """
    options = dict(options)
    numbers = {name: options.pop(name) for name in ("density", "gamma", "over", "seed", "mask_scale")}
    numbers["drop"] = options.pop("drop_rate")
    return {**options, "method": catalogue.method(options["method"], **numbers)}


def task_vectors(command: _Command) -> _Command:
    """What FINETUNED are."""
    return click.option(
        "--task-vectors", is_flag=True, help="FINETUNED are differences to BASE, not weights."
    )(command)


def adapters_as(command: _Command) -> _Command:
    """What LoRA adapters among FINETUNED are."""
    return click.option(
        "--adapters-as",
        type=click.Choice(["difference", "merged"]),
        default="difference",
        show_default=True,
        help="Take LoRA adapters as differences to BASE, or as models, merged into BASE and rounded to its type.",
    )(command)


def _renames(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Split each RE=TEXT at its last "=": a regular expression may have more."""
    for value in given:
        if "=" not in value:
            raise click.BadParameter(f"{value!r}, expected RE=TEXT", context, parameter)
    return tuple((value.rpartition("=")[0], value.rpartition("=")[2]) for value in given)


def rename(command: _Command) -> _Command:
    """How names of FINETUNED's tensors become those of BASE's."""
    return click.option(
        "--rename",
        metavar="RE=TEXT",
        multiple=True,
        callback=_renames,
        help="Replace matches in the names of FINETUNED's tensors; repeatable.",
    )(command)


def nonfinite(command: _Command) -> _Command:
    """What is done about a NaN or an infinity."""
    return click.option(
        "--nonfinite",
        type=click.Choice(["error", "keep-base"]),
        default="error",
        show_default=True,
        help="Fail on a NaN or an infinity, or keep the element of BASE.",
    )(command)


def other_files(command: _Command) -> _Command:
    """Which files beside the weights are copied."""
    return _all(
        command,
        click.option(
            "--keep",
            metavar="GLOB",
            multiple=True,
            help="Copy files of BASE that may hold weights, as they are; repeatable.",
        ),
        click.option(
            "--drop", metavar="GLOB", multiple=True, help="Do not copy these files of BASE; repeatable."
        ),
    )


def backend(command: _Command) -> _Command:
    """What merges."""
    return click.option("--backend", type=click.Choice(["auto", *NAMES]), default="auto", show_default=True)(
        command
    )


def device(command: _Command) -> _Command:
    """Where it merges."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda:0",
        help="Where to merge; auto measures bandwidths and takes the faster device.",
    )(command)


def resources(command: _Command) -> _Command:
    """What the job may use."""
    return _all(
        command,
        click.option(
            "--memory-budget",
            default="auto",
            show_default="half of what is free",
            metavar="SIZE",
            help="The most memory to allocate, and once more on a GPU.",
        ),
        click.option(
            "--threads",
            type=int,
            metavar="N",
            help="Threads that read and compute; torch's number by default, or less within a quota.",
        ),
    )


def outcome(command: _Command) -> _Command:
    """What is written and printed."""
    return _all(
        command,
        click.option(
            "--report", metavar="FILE.json", help="Write what was done, with counts of each tensor, as JSON."
        ),
        click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing."),
        click.option(
            "--overwrite", is_flag=True, help="Replace OUT if its manifest lists all its files, as they are."
        ),
        click.option("--resume", is_flag=True, help="Continue an interrupted merge; keep unfinished output."),
        quiet,
    )


def quiet(command: _Command) -> _Command:
    """Whether only errors are printed."""
    return click.option("--quiet", "-q", is_flag=True, callback=_hide_bars, help="Print only errors.")(
        command
    )


def _hide_bars(context: click.Context, parameter: click.Parameter, given: bool) -> bool:
    """Tell huggingface_hub, too, which is imported later if at all."""
    if given:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return given


def _all(command: _Command, *options: Callable[[_Command], _Command]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command

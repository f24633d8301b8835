"""The command that applies a consensus delta."""

from __future__ import annotations

from typing import Any

import click

from ..core.scales import Scale
from .options import (
    backend,
    device,
    nonfinite,
    other_files,
    outcome,
    output,
    output_format,
    resources,
    scale_of,
    scale_pairs,
)
from .running import Outcome, run
from .signals import Signals


@click.command()
@click.argument("base")
@click.argument("delta")
@output
@output_format
@click.option(
    "--scale",
    "scales",
    required=True,
    multiple=True,
    metavar="λ|RE=λ",
    help="Repeatable: each has an output of its own, OUT-0.9, in one pass over BASE; with RE=λ there is one output, as of merge.",
)
@nonfinite
@other_files
@backend
@device
@resources
@outcome
@click.pass_obj
def apply(
    signals: Signals,
    /,
    base: str,
    delta: str,
    output: str,
    scales: tuple[str, ...],
    report: str | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Subtract the consensus DELTA from BASE, as a merge with its models would.

    BASE is what `negmerge delta` was given. The report of several scales is a list.
    """
    from ..deltas.apply import options_of, prepare_apply

    pairs = scale_pairs(scales)
    has_patterns = any(pattern for pattern, _ in pairs)
    several = len(pairs) > 1 and not has_patterns
    wanted: list[Scale] = [scale_of(scales)] if has_patterns else [number for _, number in pairs]
    run(
        signals,
        "apply",
        lambda: prepare_apply(base, delta, output, wanted, options_of(**options), several=several),
        options["device"],
        Outcome(report, dry_run, quiet, several),
    )

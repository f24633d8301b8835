"""The command that makes a consensus delta."""

from __future__ import annotations

from typing import Any

import click

from .options import backend, method, other_files, outcome, resources, rule, with_method
from .running import Outcome, run
from .signals import Signals


@click.command()
@click.argument("base")
@click.argument("finetuned", nargs=-1)
@click.option("--output", "-o", required=True, metavar="D", help="Path of the delta, a directory.")
@click.option(
    "--half", is_flag=True, help="Store means in 16 bits: smaller, but applied not the bits of a merge."
)
@method
@rule
@other_files
@backend
@resources
@outcome
@click.pass_obj
def delta(
    signals: Signals,
    /,
    base: str,
    finetuned: tuple[str, ...],
    output: str,
    half: bool,
    task_vectors: bool,
    report: str | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write what all FINETUNED models agree on, so that any scale can be applied to BASE later.

    BASE, FINETUNED and the options are those of a merge, which `negmerge apply BASE D --scale` then gives.
    """
    options["inputs"] = "task_vectors" if task_vectors else "finetuned"
    run_delta(signals, (base, finetuned, output), half, options, Outcome(report, dry_run, quiet))


def run_delta(
    signals: Signals,
    paths: tuple[str, tuple[str, ...], str],
    half: bool,
    options: dict[str, Any],
    outcome: Outcome,
) -> None:
    """Make a delta. paths: BASE, FINETUNED and D."""
    from ..deltas.job import options_of, prepare_delta

    base, finetuned, output = paths
    run(
        signals,
        "delta",
        lambda: [prepare_delta(base, list(finetuned), output, options_of(**with_method(options)), half)],
        "cpu",
        outcome,
    )

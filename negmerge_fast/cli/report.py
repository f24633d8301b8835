"""The command that writes a page about a consensus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import adapters_as, quiet, rename, resources, task_vectors
from .signals import Signals
from .text import print_lines, print_notes, progress_bar


@click.command()
@click.argument("base")
@click.argument("finetuned", nargs=-1)
@click.option(
    "--output", "-o", required=True, metavar="DIR", help="Directory for index.html, pictures and numbers."
)
@click.option(
    "--points", metavar="FILE.jsonl", help="Scores of several λ: lines of JSON with scale, forget and retain."
)
@task_vectors
@adapters_as
@click.option("--include", metavar="RE", help="Count only tensors whose name matches.")
@click.option("--exclude", metavar="RE", help="Do not count tensors whose name matches.")
@rename
@resources
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is a report, with no other files in it.")
@quiet
@click.pass_obj
def report(
    signals: Signals,
    /,
    base: str,
    finetuned: tuple[str, ...],
    output: str,
    points: str | None,
    task_vectors: bool,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what FINETUNED models agree on, and which of them disagrees with the others.

    BASE and FINETUNED are as for merge, and read once. Without FINETUNED, BASE is a consensus delta, or the file that
    --report of a merge wrote: both know less. The report is a page that needs no network, with its pictures as PNG files.
    """
    from ..reports import api, findings
    from ..reports.statistics import consensus_statistics

    path = Path(output)
    api.check_output(path, overwrite)
    scores = api.read_points(points)
    with progress_bar("report", signals, quiet) as progress:

        def on_progress(done: int, total: int) -> None:
            signals.guarded = True  # not before: until there is a bar, a signal may end this at once
            progress(done, total)

        inputs: Any = "task_vectors" if task_vectors else "finetuned"
        found = consensus_statistics(base, finetuned, inputs=inputs, progress=on_progress, **options)
    signals.guarded = False  # drawing takes a second, and leaves nothing behind
    signals.check()
    files = api.render(found, scores)
    signals.guarded = True
    signals.check()
    page = api.publish(files, path, overwrite)
    if not quiet:
        print_notes(found.notes)
        models = f"{found.model_count} model{'s' if found.model_count > 1 else ''}"
        print_lines(
            f"{page}: {models}, {found.agreed:,} of {found.elements:,} elements agree ({found.consensus_ratio:.2%})",
            *(sentence for sentence, _ in findings.sentences(found)),
        )

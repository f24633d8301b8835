"""The command that chooses λ by an evaluation harness."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import backend, device, nonfinite, other_files, output, output_format, quiet, resources
from .signals import Signals
from .text import print_lines, print_notes

if TYPE_CHECKING:
    from ..search.points import ScalePoint


@click.command()
@click.argument("base")
@click.argument("delta")
@click.option(
    "--eval",
    "command",
    required=True,
    metavar="CMD",
    help="Shell command that evaluates the model at {model} and prints JSON with forget and retain at last.",
)
@output
@output_format
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    show_default="0, 0.05 … 1",
    help="λ of the grid; repeatable. A bracket search tries none beyond the largest.",
)
@click.option(
    "--search",
    type=click.Choice(["grid", "bracket"]),
    default="grid",
    show_default=True,
    help="Evaluate the whole grid, or double λ and bisect.",
)
@click.option(
    "--retain-floor",
    type=float,
    default=0.95,
    show_default=True,
    help="Part of BASE's retain score that must be kept.",
)
@click.option(
    "--forget-target",
    type=float,
    metavar="SCORE",
    help="Take the first λ whose forget score is at or below this. Default: the one with the lowest score.",
)
@click.option(
    "--resolution",
    type=float,
    metavar="STEP",
    help="How close a bracket search comes. Default: a twentieth of λ.",
)
@click.option(
    "--points",
    metavar="FILE.jsonl",
    show_default="OUT.points.jsonl",
    help="File of scores. Those in it are not evaluated again.",
)
@click.option("--keep-models", is_flag=True, help="Leave the model of each λ in OUT.scales.")
@nonfinite
@other_files
@backend
@device
@resources
@click.option("--report", metavar="FILE.json", help="Write what was chosen, and every point, as JSON.")
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT if its manifest lists all its files, as they are."
)
@quiet
@click.pass_obj
def select(
    signals: Signals,
    /,
    base: str,
    delta: str,
    command: str,
    output: str,
    scales: tuple[float, ...],
    search: str,
    retain_floor: float,
    forget_target: float | None,
    resolution: float | None,
    points: str | None,
    keep_models: bool,
    report: str | None,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Choose λ by the scores of a command, and write the chosen model to OUT.

    The command is run for λ = 0, which is BASE, and for each λ that is tried; {scale} in it is λ. The paper's rule takes the lowest forget score
    whose retain score is at least 0.95 of BASE's.
    """
    from ..checkpoints.delta import open_delta
    from ..checkpoints.hub import resolve
    from ..checkpoints.reader import naming
    from ..core.errors import InputError
    from ..deltas.apply import options_of, prepare_apply
    from ..search import selection
    from ..search.harness import Harness
    from ..search.identity import identity_of_files
    from ..search.points import PointsFile
    from ..search.progress import on_progress_of
    from ..search.result import NoScaleError
    from .running import check_report

    wanted = selection.SelectOptions(scales or None, search, retain_floor, forget_target, resolution)
    path = Path(output)
    # All that is wrong is told before a night of evaluations.
    (job,) = prepare_apply(
        base, delta, path, [1.0], options_of(**options, overwrite=overwrite), several=False
    )
    base, delta = str(resolve(base)), str(resolve(delta))
    harness = Harness(command, Path(base), Path(delta), path, keep_models, options, signals.check)
    file = path.with_name(f"{path.name}.points.jsonl") if points is None else Path(points)
    if file.absolute() == path.absolute():
        raise InputError(f"--points: {file} is OUT, expected a file of its own")
    if report is not None:
        check_report(report, [job])
        if Path(report).resolve() == file.resolve():
            raise InputError(
                f"--report: {report} is the file of points, expected another: these would be lost"
            )
    if not quiet:
        print_notes(job.notes)
    signals.guarded = True
    signals.check()
    with PointsFile(file, identity_of_files(open_delta(delta)), command) as kept:
        try:
            with on_progress_of(not quiet) as on_progress:
                found = selection.select(harness, kept, wanted, on_progress)
        except NoScaleError as error:
            if not quiet:
                print_notes(error.notes)
                print_lines(*_table(error.points))
            raise
        harness.write(path, found.scale, overwrite=overwrite)
    if report is not None:
        with naming(Path(report)), open(report, "w", encoding="utf-8") as written:
            written.write(found.to_json())
    if not quiet:
        print_notes(dict.fromkeys([*(note for note in harness.notes if note not in job.notes), *found.notes]))
        print_lines(
            *_table(found.points, found.scale),
            f"{path}: λ {found.scale:g}, {found.rule}; points in {file}",
        )


def _table(points: Iterable[ScalePoint], chosen: float | None = None) -> list[str]:
    def text(score: float | None) -> str:
        return "-" if score is None else f"{score:.4g}"

    return [f"{'λ':>8}{'forget':>10}{'retain':>10}"] + [
        f"{p.scale:>8g}{text(p.forget):>10}{text(p.retain):>10}{'  chosen' if p.scale == chosen else ''}"
        for p in points
    ]

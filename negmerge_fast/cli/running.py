"""Running the jobs of a command: checked on every rank, then run, and told of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.reader import naming
from ..core.errors import InputError
from .signals import Signals
from .text import (
    plan_lines,
    print_lines,
    print_note,
    print_notes,
    print_other_files,
    progress_bar,
    summary,
)

if TYPE_CHECKING:
    from ..streaming.job import Job
    from ..streaming.report import Report


class Outcome(NamedTuple):
    """What is written and printed of jobs.

    report: where the report goes. dry_run: whether they are only checked. several: whether there is a report for each of several
    outputs, even if there is one.
    """

    report: str | None
    dry_run: bool
    quiet: bool
    several: bool = False


def run(
    signals: Signals, title: str, prepare: Callable[[], Sequence[Job]], device: str, outcome: Outcome
) -> None:
    """Run jobs of one plan together.

    Args:
        signals: They stop the jobs.
        title: The word before the progress bar.
        prepare: Checks the jobs.
        device: The option.
        outcome: What is written and printed.
    """
    from ..runtime.distributed import ranks_from_environment, select_own_gpu
    from ..streaming.together import run_together

    quiet = outcome.quiet
    signals.ranks = ranks = ranks_from_environment(signals.check, None if quiet else print_note)
    if ranks.count > 1 and device in ("auto", "cuda"):
        select_own_gpu()
    jobs = _prepare(signals, prepare, outcome.report)
    if ranks.rank == 0 and not quiet:
        print_notes(dict.fromkeys(note for job in jobs for note in job.notes))
    if outcome.dry_run:
        if ranks.rank == 0:
            print_lines(*plan_lines(jobs))
            print_other_files(jobs[0])
        return
    said = {note for job in jobs for note in job.notes}
    signals.guarded = True
    signals.check()
    with progress_bar(title, signals, quiet or ranks.rank > 0) as progress:
        done = run_together(jobs, progress, None, ranks)
    if ranks.rank > 0:
        return
    if outcome.report is not None:
        _write_report(Path(outcome.report), done, outcome.several)
    if not quiet:
        print_notes(dict.fromkeys(note for each in done for note in each.notes if note not in said))
        print_lines(*done[0].adapters, *map(summary, jobs, done))
        print_other_files(jobs[0])


def _prepare(signals: Signals, prepare: Callable[[], Sequence[Job]], report: str | None) -> Sequence[Job]:
    """Check jobs on every rank; if one fails, all fail."""
    jobs: list[Job] = []

    def check() -> None:
        jobs.extend(prepare())
        if report is not None:
            check_report(report, jobs)

    signals.ranks.all_gather(check)
    return jobs


def _write_report(path: Path, done: Sequence[Report], several: bool) -> None:
    text = json.dumps([asdict(each) for each in done], indent=2) + "\n" if several else done[0].to_json()
    with naming(path), open(path, "w", encoding="utf-8") as file:
        file.write(text)


def check_report(report: str, jobs: Sequence[Job]) -> None:
    """Refuse a report that would lie in the output or in an input, or that cannot be written."""
    import tempfile

    path = Path(os.path.realpath(report))
    destinations = [job.destination for job in jobs]
    for path_in_use in (
        *(path for each in destinations for path in (each.path, each.manifest_path)),
        *(checkpoint.path for checkpoint in (jobs[0].plan.base, *jobs[0].plan.models)),
    ):
        real = Path(os.path.realpath(path_in_use))
        if path == real or real in path.parents:
            raise InputError(f"{report}: is inside {path_in_use}, expected another place for the report")
    try:
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such directory, expected one to hold {path.name}")
        if report.endswith("/") or (path.exists() and not path.is_file()):
            raise InputError(f"{report}: not a regular file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{report}: cannot be written ({error.strerror})") from None

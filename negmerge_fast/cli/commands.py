"""The commands of the command line."""

from __future__ import annotations

import os
from typing import Any

from .signals import Signals, fail
from .text import _bar, _contents, _plan_lines, _print_skipped_files, _say, _summary, _verified


def _commands(signals: Signals) -> Any:
    import click

    @click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
    @click.version_option(_version(), prog_name="negmerge")
    def negmerge() -> None:
        """Make a trained model forget, by merging its fine-tuned versions (NegMerge, arXiv 2410.05583)."""

    @negmerge.command()
    @click.argument("base")
    @click.argument("finetuned", nargs=-1)
    @click.option(
        "--output", "-o", required=True, metavar="OUT", help="Where the merged model goes; it mirrors BASE."
    )
    @click.option(
        "--scale", required=True, type=float, help="λ: how far to go away from the fine-tuned models."
    )
    @click.option("--task-vectors", is_flag=True, help="FINETUNED hold differences to BASE, not weights.")
    @click.option(
        "--min-agreement",
        type=float,
        default=1.0,
        show_default=True,
        help="Share of the models that must agree on the sign of an element.",
    )
    @click.option(
        "--nonfinite",
        type=click.Choice(["error", "keep-base"]),
        default="error",
        show_default=True,
        help="What a NaN or an infinity is.",
    )
    @click.option("--include", metavar="RE", help="Merge only tensors whose name matches.")
    @click.option("--exclude", metavar="RE", help="Keep the base's tensors where the name matches.")
    @click.option("--backend", type=click.Choice(["auto", *_backends()]), default="auto", show_default=True)
    @click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda:0",
        help="Where to merge; auto measures what costs less.",
    )
    @click.option(
        "--memory-budget",
        default="auto",
        show_default="half of what is free",
        metavar="SIZE",
        help="The most memory to allocate, and on a GPU as much again.",
    )
    @click.option(
        "--threads", type=int, metavar="N", help="Threads that read and compute; torch's choice if not given."
    )
    @click.option(
        "--skip-unchanged/--no-skip-unchanged",
        default=None,
        help="Leave unread what can change nothing any more; a NaN there is not seen. With keep-base, unless told otherwise.",
    )
    @click.option("--report", metavar="FILE.json", help="Write what was done, per tensor, as JSON.")
    @click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
    @click.option("--overwrite", is_flag=True, help="Replace OUT if negmerge wrote it, or would.")
    @click.option(
        "--resume", is_flag=True, help="Go on with what an interrupted run left, and leave as much."
    )
    @click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
    def merge(
        base: str,
        finetuned: tuple[str, ...],
        output: str,
        task_vectors: bool,
        report: str | None,
        dry_run: bool,
        quiet: bool,
        **options: Any,
    ) -> None:
        """Subtract from BASE what all FINETUNED models agree on.

        BASE and FINETUNED are Hugging Face model directories, .safetensors files or .npy vectors.
        """
        from ..runtime.distributed import ranks_from_environment, select_own_gpu
        from ..streaming.api import prepare

        signals.ranks = ranks = ranks_from_environment(signals.check)
        if ranks.count > 1 and options["device"] in ("auto", "cuda"):
            select_own_gpu()
        inputs = "task_vectors" if task_vectors else "finetuned"
        job: Any = None

        def check() -> None:
            nonlocal job
            job = prepare(base, list(finetuned), output, inputs=inputs, **options)  # type: ignore[arg-type]
            if report is not None:
                _check_report(report, job)

        ranks.all_gather(check)
        if dry_run:
            if ranks.rank == 0:
                _say(*_plan_lines(job))
                _print_skipped_files(job.plan.base)
            return
        done = _run(job, signals, quiet or ranks.rank > 0)
        if ranks.rank > 0:
            return
        if report is not None:
            _write_report(report, done.to_json())
        if not quiet:
            _say(_summary(job, done))
            _print_skipped_files(job.plan.base)

    @negmerge.command()
    @click.argument("out")
    @click.option("--against", is_flag=True, help="Merge a sample of blocks of BASE and FINETUNED once more.")
    @click.argument("inputs", nargs=-1, metavar="[--against BASE FINETUNED...]")
    @click.option(
        "--blocks",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="N",
        help="How many, of up to 1 MiB.",
    )
    @click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
    @click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
    def verify(out: str, against: bool, inputs: tuple[str, ...], blocks: int, seed: int, quiet: bool) -> int:
        """Hold OUT against the checksums in its manifest and, with --against, against what it was made of.

        BASE and FINETUNED... are those of the merge, in its order. Exit status 1: OUT is not what it should be.
        """
        from ..streaming.verify import DamageError, verify_checkpoint

        if bool(inputs) != against:
            raise click.UsageError("--against takes BASE FINETUNED..., and they take --against")
        signals.guarded = True
        signals.check()
        try:
            with _bar("verify", signals, quiet) as progress:
                done = verify_checkpoint(
                    out, inputs if against else None, blocks=blocks, seed=seed, progress=progress
                )
        except DamageError as error:
            return max(fail(line, 1) for line in error.found)
        if not quiet:
            print(_verified(done))
            for name in done.not_listed:
                print(f"not listed  {name}")
        return 0

    @negmerge.command()
    @click.argument("paths", nargs=-1, required=True)
    def inspect(paths: tuple[str, ...]) -> None:
        """Say what is in each PATH and, of several, whether the others can be merged into the first."""
        from ..checkpoints.formats import open_checkpoint
        from ..streaming.plan import make_plan

        opened = [open_checkpoint(path) for path in paths]
        for checkpoint in opened:
            _say(_contents(checkpoint))
        if len(opened) > 1:
            plan = make_plan(opened[0], opened[1:])
            print(
                f"can be merged: {plan.tensors} tensors, {plan.elements:,} elements, {len(plan.extents)} extents"
            )

    @negmerge.command()
    def info() -> None:
        """Print versions, devices, and every backend with why it is or is not usable."""
        from .info import text

        print(text())

    @negmerge.command()
    @click.option(
        "--seeds",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="How often, from other seeds.",
    )
    @click.option(
        "--output",
        default="negmerge-demo",
        show_default=True,
        metavar="DIR",
        help="Where the models and the picture go.",
    )
    @click.option("--report", metavar="FILE.json", help="Write the numbers as JSON.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
    def demo(seeds: int, output: str, report: str | None, quiet: bool) -> None:
        """Train a small network on real digits, make it forget half of them, and compare with other methods."""
        from pathlib import Path

        from ..demo import run

        signals.guarded = True
        signals.check()
        run(seeds, Path(output), Path(report) if report else None, progress=signals.check, quiet=quiet)

    @negmerge.command()
    @click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0")
    @click.option("--report", metavar="FILE.jsonl", help="Append what is measured, a line of JSON each.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
    def bench(device: str, report: str | None, quiet: bool) -> None:
        """Measure the backends against this machine's limits and plain PyTorch: two minutes."""
        from ..benchmark.quick import run

        signals.guarded = True
        signals.check()
        run(device, report, progress=signals.check, quiet=quiet)

    return negmerge


def _version() -> str:
    from .._version import __version__

    return __version__


def _backends() -> tuple[str, ...]:
    from ..backends.registry import NAMES

    return NAMES


def _run(job: Any, signals: Signals, quiet: bool) -> Any:
    signals.guarded = True
    signals.check()
    with _bar("merge", signals, quiet) as progress:
        return job.run(progress, ranks=signals.ranks)


def _check_report(report: str, job: Any) -> None:
    import tempfile
    from pathlib import Path

    from ..core.errors import InputError

    path = Path(os.path.realpath(report))
    for place in (
        job.output.path,
        job.output.manifest,
        job.plan.base.path,
        *(model.path for model in job.plan.models),
    ):
        real = Path(os.path.realpath(place))
        if path == real or real in path.parents:
            raise InputError(f"{report}: is inside {place}, expected another place for the report")
    try:
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such directory, expected one to hold {path.name}")
        if report.endswith("/") or (path.exists() and not path.is_file()):
            raise InputError(f"{report}: not a regular file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{report}: cannot be written ({error.strerror})") from None


def _write_report(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)

"""The command line: thin, and quiet about everything but the job.

Exit status: 0 done; 1 the job failed; 2 bad usage or bad input; 129 hung up; 130 interrupted; 143 terminated. An error
is one line.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .rule import visible
from .signals import Signals, Stopped, fail


def main() -> NoReturn:
    """The console script."""
    _fill_standard_streams()
    signals = Signals()  # before the imports that take long
    import click

    from .ranks import Elsewhere
    from .rule import InputError

    status = 0
    try:
        status = _commands(signals).main(prog_name="negmerge", standalone_mode=False) or 0
        sys.stdout.flush()
    except Stopped:
        status = signals.stopped()
    except Elsewhere as error:
        status = 2 if isinstance(error, InputError) else 1
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        status = 2
    except click.ClickException as error:
        status = fail(error.format_message(), 2)
    except click.Abort:
        status = fail("interrupted", 130)
    except InputError as error:
        status = fail(str(error), 2)
    except BrokenPipeError:
        status = 1  # whoever read the output has heard enough
    except (
        OSError,
        MemoryError,
        ImportError,
        RuntimeError,
    ) as error:  # a device's faults are RuntimeErrors of torch
        # Of several processes, all are told to stop when one has died: what fails from then on is no news.
        told = signals.received is not None and signals.ranks and signals.ranks.count > 1
        status = signals.stopped() if told else fail(signals.place() + _describe(error), 1)
    try:
        sys.stdout.flush()
    except OSError:  # said above; the interpreter would say it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signals.ignore()
    if signals.ranks:
        signals.ranks.part()
    sys.exit(status)


def _fill_standard_streams() -> None:
    """Where a standard stream is closed, open nothing in its place: a file of ours must not get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{visible(str(error.filename))}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _say(*lines: str) -> None:
    print("\n".join(map(visible, lines)))


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
        from .ranks import ranks_here, see_own_gpu
        from .stream import prepare

        signals.ranks = ranks = ranks_here(signals.check)
        if ranks.count > 1 and options["device"] in ("auto", "cuda"):
            see_own_gpu()
        inputs = "task_vectors" if task_vectors else "finetuned"
        job: Any = None

        def check() -> None:
            nonlocal job
            job = prepare(base, list(finetuned), output, inputs=inputs, **options)  # type: ignore[arg-type]
            if report is not None:
                _check_report(report, job)

        ranks.together(check)
        if dry_run:
            if ranks.rank == 0:
                _say(*_plan_lines(job))
                _print_left_out(job.plan.base)
            return
        done = _run(job, signals, quiet or ranks.rank > 0)
        if ranks.rank > 0:
            return
        if report is not None:
            _write_report(report, done.to_json())
        if not quiet:
            _say(_summary(job, done))
            _print_left_out(job.plan.base)

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
        from .verify import DamageError, verify_checkpoint

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
        from .checkpoints import open_checkpoint
        from .plan import make_plan

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
        default=3,
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

        from .demo import run

        signals.guarded = True
        signals.check()
        run(seeds, Path(output), Path(report) if report else None, progress=signals.check, quiet=quiet)

    @negmerge.command()
    @click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0")
    @click.option("--report", metavar="FILE.jsonl", help="Append what is measured, a line of JSON each.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
    def bench(device: str, report: str | None, quiet: bool) -> None:
        """Measure the backends against this machine's limits and plain PyTorch: two minutes."""
        from .measure.brief import run

        signals.guarded = True
        signals.check()
        run(device, report, progress=signals.check, quiet=quiet)

    return negmerge


def _version() -> str:
    from . import __version__

    return __version__


def _backends() -> tuple[str, ...]:
    from .backends import NAMES

    return NAMES


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


def _run(job: Any, signals: Signals, quiet: bool) -> Any:
    signals.guarded = True
    signals.check()
    with _bar("merge", signals, quiet) as progress:
        return job.run(progress, ranks=signals.ranks)


def _check_report(report: str, job: Any) -> None:
    import tempfile
    from pathlib import Path

    from .rule import InputError

    path = Path(os.path.realpath(report))
    for place in (
        job.output.target,
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


def _size(count: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_sizeof(count, "B"))


def _plan_lines(job: Any) -> list[str]:
    plan = job.plan
    segments = plan.segments(job.chunk)
    return [
        f"base      {plan.base.path} ({plan.base.kind}, {len(plan.base.weights)} weight files)",
        f"models    {len(plan.models)}",
        f"output    {job.output.target}: {len(plan.targets)} files",
        f"tensors   {plan.tensors} to merge ({plan.elements:,} elements), {plan.kept} kept as in base",
        f"segments  {segments} in {len(plan.extents)} extents, strokes of at most {_size(job.chunk)} per file",
        f"read      {_size(plan.bytes_read)}",
        f"write     {_size(plan.bytes_written)}",
        f"memory    {_size(job.memory)}{'' if job.way.device == 'cpu' else f', and as much on {job.way.device}'}",
        f"backend   {job.backend} on {job.way.device} ({job.way.why})",
        *(f"way       {costs}" for costs in [job.costs()] if costs),
    ]  # fmt: skip


def _print_left_out(base: Any) -> None:
    """What lies in BASE and will not be in OUT: other weights, which were not merged, and hidden files."""
    for name in base.left_out:
        _say(f"left out  {name}")


def _summary(job: Any, done: Any) -> str:
    if job.finished:
        return f"{done.output}: was finished already"
    moved = done.bytes_read + done.bytes_written
    skipped = f", skipped {_size(done.bytes_skipped)}" if done.bytes_skipped else ""
    return (
        f"{done.output}: {len(done.tensors)} tensors merged, {job.plan.kept} kept; "
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
        dtypes[tensor.form.dtype] = dtypes.get(tensor.form.dtype, 0) + tensor.numel
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.items()) or "no elements"
    size = sum(file.size for file in checkpoint.weights.values())
    return (
        f"{checkpoint.path}: {checkpoint.kind}, {len(checkpoint.weights)} weight files ({_size(size)}), "
        f"{len(checkpoint.tensors)} tensors: {kinds}; {len(checkpoint.others)} other files"
        + (f", {len(checkpoint.left_out)} left out" if checkpoint.left_out else "")
    )

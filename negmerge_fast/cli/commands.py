"""Commands of the command line. The main module imports this one, and click, after it has installed signal handlers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .._version import __version__
from ..core.errors import escape
from .apply import apply
from .delta import delta, run_delta
from .mergekit import config_option, mergekit, prepare_config, refuse_beside_config
from .options import (
    backend,
    device,
    method,
    other_files,
    outcome,
    output,
    output_format,
    quiet,
    resources,
    rule,
    scale,
    scale_of,
    with_method,
)
from .report import report
from .running import Outcome, run
from .select import select
from .signals import Signals, fail
from .text import contents, delta_contents, delta_tensors, print_lines, print_notes, progress_bar, verified


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="negmerge")
def negmerge() -> None:
    """Make a trained model forget by merging fine-tuned versions of it (NegMerge, arXiv 2410.05583)."""


@negmerge.command()
@click.argument("base", required=False)
@click.argument("finetuned", nargs=-1)
@output
@output_format
@config_option
@scale
@click.option(
    "--output-adapter",
    is_flag=True,
    help="Write OUT as a delta, as the delta command does, for any --scale later.",
)
@method
@rule
@other_files
@backend
@device
@resources
@click.option(
    "--skip-unchanged/--no-skip-unchanged",
    default=None,
    help="Do not read input that cannot change the output; a NaN there is not seen. Default: with keep-base only.",
)
@outcome
@click.pass_obj
def merge(
    signals: Signals,
    /,
    base: str | None,
    finetuned: tuple[str, ...],
    output: str,
    config: str | None,
    output_adapter: bool,
    add: bool,
    task_vectors: bool,
    report: str | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Subtract from BASE what all FINETUNED models agree on, or what another method makes of them.

    BASE and FINETUNED are Hugging Face model directories, .safetensors files, PyTorch files (.pt, .pth, .bin, .ckpt) or .npy vectors, or names
    of the hub: org/name@revision. FINETUNED may be LoRA adapters, too.
    """
    from ..core.scales import Scales
    from ..streaming.api import prepare
    from ..streaming.options import MergeOptions

    if config is not None:
        refuse_beside_config(click.get_current_context())
        chosen = Outcome(report, dry_run, quiet)
        run(signals, "merge", lambda: [prepare_config(config, output, options)], options["device"], chosen)
        return
    if base is None:
        raise click.UsageError("Missing argument 'BASE'.")
    options["inputs"] = "task_vectors" if task_vectors else "finetuned"
    chosen = Outcome(report, dry_run, quiet)
    if output_adapter:
        run_delta(signals, (base, finetuned, output), False, _of_delta({**options, "add": add}), chosen)
        return
    if not options["scale"]:
        raise click.UsageError("Missing option '--scale'.")
    scale = scale_of(options["scale"])

    def checked() -> MergeOptions:
        scales = Scales.of(scale).negated() if add else scale
        return MergeOptions(**{**with_method(options), "scale": scales})

    run(
        signals,
        "merge",
        lambda: [prepare(base, list(finetuned), output, checked())],
        options["device"],
        chosen,
    )


def _of_delta(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a merge that a delta has, too. Raises click.UsageError if another one is given."""
    usual = {"scale": ((),), "add": (False,), "device": ("auto", "cpu"), "skip_unchanged": (None,)}
    for name, values in usual.items():
        if options[name] not in values:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag}: --output-adapter writes a delta, which has no such option.")
    return {name: value for name, value in options.items() if name not in usual}


@negmerge.command()
@click.argument("out")
@click.option("--against", is_flag=True, help="Merge a sample of blocks of BASE and FINETUNED again.")
@click.argument("inputs", nargs=-1, metavar="[--against BASE FINETUNED...]")
@click.option("--weights", metavar="FILE", help="The weights of the merge, if it had some.")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Size of the sample, in blocks of up to 1 MiB.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@quiet
@click.pass_obj
def verify(
    signals: Signals,
    out: str,
    against: bool,
    inputs: tuple[str, ...],
    weights: str | None,
    blocks: int,
    seed: int,
    quiet: bool,
) -> int:
    """Compare OUT with the checksums in its manifest and, with --against, with its inputs.

    BASE and FINETUNED... are those of the merge, in its order. Exit status 1: OUT is damaged.
    """
    from ..streaming.verify import DamageError, verify_checkpoint

    if bool(inputs) != against:
        raise click.UsageError("--against takes BASE FINETUNED..., and they take --against")
    try:
        with progress_bar("verify", signals, quiet) as progress:

            def on_progress(done: int, total: int) -> None:
                signals.guarded = True  # not before: until there is a bar, a signal may end this at once
                progress(done, total)

            done = verify_checkpoint(
                out,
                inputs if against else None,
                weights=weights,
                blocks=blocks,
                seed=seed,
                progress=on_progress,
            )
    except DamageError as error:
        return max(fail(escape(line), 1) for line in error.found)
    if not quiet:
        print_lines(verified(done), *(f"not listed  {name}" for name in done.not_listed))
    return 0


@negmerge.command()
@click.argument("paths", nargs=-1, required=True)
def inspect(paths: tuple[str, ...]) -> None:
    """Print the contents of each PATH and, of several, whether the others can be merged into the first.

    Of a consensus delta, what is set in each tensor; of a model and a delta, whether the delta is of that model.
    """
    from ..checkpoints.delta import is_delta, open_delta
    from ..checkpoints.formats import open_checkpoint, translate
    from ..checkpoints.hub import resolve
    from ..streaming.pairing import refuse_unmergeable
    from ..streaming.plan import make_plan

    given = [resolve(path) for path in paths]
    if is_delta(given[-1]) and len(given) < 3:
        found = open_delta(given[-1])
        if len(given) == 1:
            print_lines(delta_contents(found), *delta_tensors(found))
            return
        from ..streaming.expansion import plan_delta

        base = open_checkpoint(given[0])
        print_lines(contents(base), delta_contents(found))
        plan = plan_delta(translate(base), found)
        print(f"can be applied: {plan.tensors} tensors, {plan.elements:,} elements")
        return
    checkpoints = [open_checkpoint(path, extra_files=k == 0) for k, path in enumerate(given)]
    for checkpoint in checkpoints:
        print_lines(contents(checkpoint))
    for checkpoint in checkpoints:
        if not checkpoint.adapter:
            refuse_unmergeable(checkpoint, checkpoint.tensors)
    if len(checkpoints) == 1:
        print_notes(checkpoints[0].notes)
    else:
        plan = make_plan(translate(checkpoints[0]), checkpoints[1:])
        print_notes(plan.notes)
        print_lines(
            *plan.placed,
            f"can be merged: {plan.tensors} tensors, {plan.elements:,} elements, {len(plan.extents)} extents",
        )


@negmerge.command()
def info() -> None:
    """Print versions, devices, bandwidths, and every backend with why it is or is not usable."""
    from .info import text

    print(text())


@negmerge.command()
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of repetitions, each from another seed.",
)
@click.option(
    "--output",
    default="negmerge-demo",
    show_default=True,
    metavar="DIR",
    help="Folder for the models and the picture.",
)
@click.option("--report", metavar="FILE.json", help="Write the numbers as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress bar.")
@click.pass_obj
def demo(signals: Signals, seeds: int, output: str, report: str | None, quiet: bool) -> None:
    """Train a small network on real digits, make it forget half of them, and compare with other methods."""
    from ..demo import run

    signals.guarded = True
    signals.check()
    run(seeds, Path(output), Path(report) if report else None, progress=signals.check, quiet=quiet)


@negmerge.command()
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda:0")
@click.option("--report", metavar="FILE.jsonl", help="Append the measurements, one line of JSON each.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress bar.")
@click.pass_obj
def bench(signals: Signals, device: str, report: str | None, quiet: bool) -> None:
    """Compare the backends with this machine's limits and with plain PyTorch, in two minutes."""
    from ..benchmark.quick import run

    signals.guarded = True
    signals.check()
    run(device, report, progress=signals.check, quiet=quiet)


negmerge.add_command(apply)
negmerge.add_command(delta)
negmerge.add_command(mergekit)
negmerge.add_command(report)
negmerge.add_command(select)

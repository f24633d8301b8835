"""Merging checkpoints in bounded memory: everything is checked and decided here before the first byte is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from ..backends import registry
from ..checkpoints.base import PT_SUFFIXES, Checkpoint, OutputFormat
from ..checkpoints.formats import open_checkpoint, translate
from ..checkpoints.reader import File
from ..core.errors import InputError, MergeWarning
from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename, rename_pairs
from ..core.rule import Inputs, NonFinite
from ..core.scales import Scale
from ..methods.base import Method
from ..output.destination import Destination, OccupiedError, check
from ..output.manifest import Input, Recipe, holds
from ..output.preflight import refuse_full_disk_for, try_destination, try_inputs
from ..output.staging import Staging
from ..output.writer import Writer
from ..runtime.interrupts import without_gc, without_interrupts
from .budget import allocate
from .job import Job
from .options import MergeOptions, PathLike, as_input, as_inputs, as_path, require_callable
from .placement import choose_placement
from .plan import Plan, make_plan
from .progress import OnProgress
from .report import Report
from .rules import Rules
from .skipping import Skipping

MakeJob: TypeAlias = Callable[..., Job]


def merge_checkpoints(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    scale: Scale,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    skip_unchanged: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    adapters_as: AdaptersAs = "difference",
    format: OutputFormat = "auto",
    method: str | Method = "negmerge",
    weights: PathLike | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Merge checkpoints that need not fit in memory, from disk to disk.

    The rule is that of merge (NegMerge, arXiv 2410.05583, section 4), or of another method. Same inputs and options give the same bytes, on
    every backend and device.

    Args:
        base: A Hugging Face directory, a .safetensors file, a PyTorch file or a .npy vector, in fp64, fp32, fp16 or bf16; or the name of a
            model of the hub.
        finetuned: One or more of the same kind, with the same tensor names and shapes, each sharded in its own way; or LoRA adapters:
            directories that PEFT wrote, or their .safetensors files with the configuration beside them.
        output: The path of the result. It mirrors base: the same files and tensor layout, config and tokenizer copied. Only PyTorch
            files of base become safetensors files. It appears complete or not at all.
        scale: λ, any finite number; or regular expressions and the λ of tensors whose names they match, as a mapping or pairs: the first
            that matches counts, and "" matches all.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign.
        inputs: Whether finetuned are "finetuned" models or "task_vectors".
        nonfinite: With "error" a NaN or an infinity publishes nothing; with "keep-base" such elements keep the
            base's bits.
        include: A regular expression. Only tensors whose name matches are merged; the others are copied from base.
        exclude: A regular expression. Tensors whose name matches are copied from base.
        rename: Regular expressions and what replaces their matches in the names of tensors of finetuned, in order. What
            then differs by a prefix of all names, or by the spelling of wrappers and old versions, is matched by itself.
        keep: Patterns of files of the base (fnmatch) that are copied though they may hold weights.
        drop: Patterns of files of the base that are not copied.
        backend: "auto", "cuda", "triton", "cpu" or "torch".
        device: "cpu", or a device of torch through which all data is streamed. "auto" compares measured bandwidths.
        memory_budget: The most bytes to allocate, on the host and once more on a device; an int or text such as "512MiB".
            None is half of what the machine and its control groups have free.
        threads: How many threads read and compute. None is torch's number, or less within a CPU quota.
        skip_unchanged: Do not read what cannot change the output: versions of a block in which no element can agree any more.
            A NaN in what is not read is not seen, so None skips with nonfinite="keep-base" only, and not for another method or with
            weights.
        overwrite: Replace output if its manifest says that negmerge wrote every file in it, as it is.
        resume: Continue what an interrupted run left, if it had the same inputs and options, and keep unfinished output.
        adapters_as: What LoRA adapters are: with "difference" task vectors d = s·BA; with "merged" models, b + d rounded to the
            base's type.
        format: "safetensors"; "pt" for files that torch.load reads; or "auto", the format of base, but "safetensors" in place of
            PyTorch's.
        method: The name of a method ("mean", "ties", …), or one with other numbers than the usual ones, as negmerge_fast.method makes it.
        weights: A checkpoint with a weight for each element by the names of the base, such as a mask of 0 and 1: a PyTorch file of a
            dictionary, a .safetensors file or a directory, in a float type, bool, uint8, int32 or int64. What of the base it lacks has the weight 1.
        progress: Called with (bytes done, bytes in all) after every chunk. It may raise to stop the merge.

    Returns:
        What was done; the fields are those of the JSON report.

    Raises:
        InputError: If an input or option is bad. The line names the file, the tensor, what was found and what was expected.
        OSError: If reading or writing fails.
        TypeError: If finetuned is one path.
    """
    require_callable("progress", progress)
    options = MergeOptions(
        scale, min_agreement, inputs, nonfinite, include, exclude, rename, keep, drop,
        backend, device, memory_budget, threads, skip_unchanged, overwrite, resume,
        adapters_as, format, method, weights,
    )  # fmt: skip
    return run(lambda: prepare(base, finetuned, output, options), progress)


def run(prepare_job: Callable[[], Job], progress: OnProgress | None) -> Report:
    """Prepare and run a job in one process, for a function that users call, and warn of what they should know."""
    try:
        report = prepare_job().run(progress)
    except OccupiedError as error:
        if (ranks := os.environ.get("WORLD_SIZE", "1")) == "1":
            raise
        hint = "merge_checkpoints merges in one process: call it on one of them, or run torchrun -m negmerge_fast merge"
        raise InputError(f"{error} ({ranks} ranks: {hint})") from None
    for note in report.notes:
        warnings.warn(note, MergeWarning, stacklevel=3)
    return report


def prepare(base: PathLike, finetuned: Sequence[PathLike], output: PathLike, options: MergeOptions) -> Job:
    """Check a merge of checkpoints and decide how it runs, without writing anything.

    What a killed run left beside the output that it had just published is removed.

    Args:
        base: As of merge_checkpoints, like finetuned and output.
        options: All else.

    Raises:
        InputError: If an input or option is bad.
    """
    destination_path = as_path("output", output)
    plan = open_and_plan(base, finetuned, options)
    [job] = prepare_outputs(plan, [(destination_path, options)])
    return job


def prepare_outputs(
    plan: Plan, outputs: Sequence[tuple[Path, MergeOptions]], make: MakeJob = Job, extra_buffers: int = 0
) -> list[Job]:
    """Check the outputs of a plan, and decide how they are made.

    Args:
        plan: The plan.
        outputs: The path and the options of each. The options differ in their scales only.
        make: What makes a job.
        extra_buffers: As of allocate.

    Raises:
        InputError: If one of them must not be written.
        OSError: If they do not fit on the disk.
    """
    options, checked = outputs[0][1], []
    rule = options.rule_of(len(plan.models))
    for path, own in outputs:
        recipe = recipe_of(plan, own)
        destination, finished = _check_destination(path, plan, recipe, own)
        notes = [] if finished else try_out(plan.base.inputs.values(), destination)
        checked.append((recipe, destination, finished, [*plan.notes, *_format_notes(plan.base), *notes]))
    refuse_full_disk_for([destination for _, destination, finished, _ in checked if not finished])
    placement = choose_placement(plan, options, rule)
    choose = registry.choose_low_rank if plan.is_low_rank and not options.skips else registry.choose
    backend, merge = choose(options.backend, placement.device, rule, plan.signatures)
    counter_name, counter = registry.choose("auto", "cpu") if options.skips else ("", None)
    allocation = allocate(
        plan, options, placement.device, (backend, counter_name), extra_buffers, len(outputs)
    )
    jobs = []
    for (_, own), (recipe, destination, finished, notes) in zip(outputs, checked, strict=True):
        staging = Staging(destination, resume=own.resume)
        writer, skipping = Writer(destination, staging), Skipping(recipe.rule, len(plan.models), counter)
        rules = Rules.of(recipe.rule, own.scales, plan.names)
        jobs.append(make(
            plan, own, recipe, destination, staging, writer, backend, merge, placement, *allocation, skipping, rules, notes, finished,
        ))  # fmt: skip
    return jobs


def open_and_plan(
    base: PathLike, finetuned: Sequence[PathLike], options: MergeOptions, extra_files: bool = True
) -> Plan:
    """Open checkpoints, and pair their tensors. extra_files: whether the files beside the base's weights will be copied."""
    found = [as_input("base", base), *as_inputs("finetuned", finetuned)]
    paths = [each.path for each in found]
    opened, models = _open(paths[0], paths[1:], options, extra_files)
    weights = None
    if options.weights is not None:
        found.append(as_input("weights", options.weights))
        weights = _open_weights(found[-1].path, [opened, *models])
    options.rule_of(len(models))  # refuses numbers for another count of models
    plan = make_plan(
        translate(opened, options.format),
        models,
        task_vectors=options.inputs == "task_vectors",
        include=options.include,
        exclude=options.exclude,
        rename=options.rename,
        merge_adapters=options.adapters_as == "merged",
        weights=weights,
    )
    options.scales.by_name(plan.names)  # refuses patterns that do not fit
    return replace(plan, notes=(*(each.note for each in found if each.note), *plan.notes))


def _open(
    base: Path, finetuned: Sequence[Path], options: MergeOptions, extra_files: bool
) -> tuple[Checkpoint, list[Checkpoint]]:
    if not finetuned:
        raise InputError("finetuned: no models, expected at least one")
    with without_gc():
        opened = open_checkpoint(base, keep=options.keep, drop=options.drop, extra_files=extra_files)
    models = []
    for path in finetuned:
        with without_gc():
            models.append(open_checkpoint(path, keep=options.keep, extra_files=False))
    own = {file.identity for file in opened.weights.values()}
    seen: dict[frozenset[tuple[int, ...]], Path] = {}
    for model in models:
        files = frozenset(file.identity for file in model.weights.values())
        if files <= own:
            raise InputError(f"{model.path}: is the base itself, expected a fine-tuned version of it")
        if (other := seen.setdefault(files, model.path)) is not model.path:
            raise InputError(f"{model.path}: the same files as {other}, expected another fine-tuned version")
    return opened, models


def _open_weights(path: Path, checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Open weights for each element. checkpoints: of the merge."""
    with without_gc():
        weights = open_checkpoint(path, extra_files=False)
    files = {file.identity for file in weights.weights.values()}
    for checkpoint in checkpoints:
        if files == {file.identity for file in checkpoint.weights.values()}:
            raise InputError(
                f"{path}: weights that are {checkpoint.path} itself, expected a weight for each element"
            )
    return weights


def _format_notes(base: Checkpoint) -> list[str]:
    if base.origin is None:
        return []
    from ..checkpoints.translate import format_notes

    return format_notes(base)


def recipe_of(plan: Plan, options: MergeOptions) -> Recipe:
    """What determines the bytes of an output."""
    base, *models = [Input.of(checkpoint) for checkpoint in (plan.base, *plan.models)]
    method = options.chosen_method
    return Recipe(
        base,
        models,
        options.rule_of(len(models)),
        options.inputs,
        options.nonfinite,
        options.include,
        options.exclude,
        rename_pairs(options.rename),
        tuple(options.keep),
        tuple(options.drop),
        merged_adapters=options.adapters_as == "merged" and any(model.adapter for model in plan.models),
        format=plan.base.format,
        scales=None if options.scales.is_one else options.scales,
        method=None if method.is_negmerge else method,
        weights=Input.of(plan.weights) if plan.weights else None,
    )


def _check_destination(
    path: Path, plan: Plan, recipe: Recipe, options: MergeOptions
) -> tuple[Destination, bool]:
    """Refuse an output that must not be written; return its place, and whether it is finished already."""
    base, checkpoints = plan.base, plan.checkpoints
    if not base.is_directory and path.suffix not in base.suffixes:
        like = ", as --format says" if base.format else ", like base"
        if path.suffix in PT_SUFFIXES and ".npy" not in base.suffixes:
            like += ", or --format pt"
        raise InputError(f"{path}: expected a file name that ends in {base.suffixes[0]}{like}")
    destination = destination_of(path, plan, options, base.is_directory)
    copied_files = {name: file for name, file in plan.files.items() if name not in base.weights}
    return destination, is_finished(destination, recipe, checkpoints, copied_files, options)


def destination_of(path: Path, plan: Plan, options: MergeOptions, directory: bool) -> Destination:
    """The place of an output. directory: whether it is one, or a single file."""
    checkpoints = plan.checkpoints
    files = [file for checkpoint in checkpoints for file in checkpoint.inputs.values()]
    return Destination.at(
        path,
        plan.files,
        directory=directory,
        overwrite=options.overwrite,
        inputs=[*(c.path for c in checkpoints), *(file.path for file in files)],
        sources=plan.sources,
    )


def is_finished(
    destination: Destination,
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    copied_files: Mapping[str, File] | None,
    options: MergeOptions,
) -> bool:
    """Whether a job that may be resumed is complete already; if not, a destination that must not be written is refused.

    copied_files are as of manifest.holds.
    """
    finished = (
        options.resume
        and not destination.is_half_replaced
        and holds(destination.manifest_path, recipe, checkpoints, copied_files, options.counts_nonfinite)
    )
    if not finished:
        try:
            check(destination)
        except OccupiedError:
            with without_interrupts():
                Staging(destination).remove_finished()
            raise
    return finished


def try_out(files: Iterable[File], destination: Destination) -> list[str]:
    """Try what the job will need, and return what is less safe here than elsewhere."""
    try_inputs(files)
    with without_interrupts():  # nothing of it is left behind
        return try_destination(destination)

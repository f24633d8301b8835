"""Merging checkpoints in bounded memory: all that is checked and decided before the first byte is read; job.py does it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..backends import registry
from ..checkpoints.base import Checkpoint
from ..checkpoints.formats import open_checkpoint
from ..core.errors import InputError, require_choice
from ..core.rule import Inputs, NonFinite, Rule
from ..output.manifest import Input, Recipe, holds
from ..output.publish import Destination, check
from ..output.staging import Staging
from ..output.writer import Writer
from ..runtime import device as devices
from ..runtime import memory
from ..runtime.interrupts import without_gc
from . import budget, placement
from .job import Job, OnProgress
from .plan import Plan, make_plan
from .report import Report
from .skipping import Skipping
from .worker import max_open_files

PathLike = str | os.PathLike[str]

# One reads, one merges, one writes, where only one may merge at a time; where all may, two keep each other company.
_WORKERS_IN_TURNS, _MIN_WORKERS = 3, 2
# Through a GPU, as many wait for the link, its kernels and the disk while all threads read: reasoned, not measured yet.
_WAITING_WORKERS = 2
# Temporaries of the reference, reference.SCRATCH_BYTES, each no longer than a block; each lane keeps its own.
_SCRATCH, _BLOCK, _BLOCK_ON_DEVICE = 14, 1 << 20, 64 << 20
# The longest stroke for one file (best of 256 KiB … 8 MiB for 2 and 8 models, bench/results/chunk_sizes.jsonl: what was read is
# still in the cache when it is merged); and through a GPU, where that does not matter, and fewer are fewer launches: reasoned,
# not measured yet.
_MAX_CHUNK_BYTES, _MAX_DEVICE_CHUNK_BYTES = 1 << 20, 4 << 20
_MAX_THREADS = 1024


def merge_checkpoints(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    skip_unchanged: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: OnProgress | None = None,
) -> Report:
    """Merge checkpoints that need not fit in memory; the rule is merge's (NegMerge, arXiv 2410.05583, section 4).

    base, finetuned: Hugging Face directories, .safetensors files or .npy vectors (fp64, fp32, fp16, bf16), with the same
        tensor names and shapes; each may be sharded in its own way.
    output: mirrors base: the same files and tensor layout, config and tokenizer copied. It appears complete, or not at
        all; overwrite replaces only what negmerge wrote or would write.
    resume: go on with what an interrupted run left, if it had the same inputs and options, and keep what is unfinished.
    inputs: whether finetuned are "finetuned" models or "task_vectors".
    nonfinite: a NaN or an infinity is an "error" and nothing is written, or such elements keep the base's bits
        ("keep-base").
    include, exclude: regular expressions on tensor names; the others are the base's, untouched.
    device: "cpu", or one of torch's, through which all is streamed; "auto" decides by what was measured (costs.py).
    memory_budget: bytes, or text such as "512MiB", for buffers and all else that is allocated, on the host and on a device;
        None: half of what the machine and its control groups have free.
    skip_unchanged: of a block in which no element can agree any more, because a model left it unchanged, say, read no more
        models. The output is the same; a NaN in what is not read is not seen, so that None does it with "keep-base" only.
    progress: called with (bytes done, bytes in all) after every stroke; it may raise to stop the job.

    Raises InputError (a ValueError) for bad input, OSError when reading or writing fails.
    """
    job = prepare(
        base, finetuned, output, scale=scale, min_agreement=min_agreement, inputs=inputs, nonfinite=nonfinite,
        include=include, exclude=exclude, backend=backend, device=device, memory_budget=memory_budget,
        threads=threads, skip_unchanged=skip_unchanged, overwrite=overwrite, resume=resume,
    )  # fmt: skip
    return job.run(progress)


@without_gc()
def prepare(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    skip_unchanged: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Job:
    """Check everything that merge_checkpoints is given, and write nothing."""
    rule = Rule(scale, min_agreement)
    require_choice("inputs", inputs, ("finetuned", "task_vectors"))
    require_choice("nonfinite", nonfinite, ("keep-base", "error"))
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads: {threads}, expected 1 … {_MAX_THREADS}")
    if isinstance(finetuned, (str, os.PathLike)):
        raise TypeError("finetuned: one path, expected a list of paths")
    if not finetuned:
        raise InputError("finetuned: no models, expected at least one")
    opened, models = open_checkpoint(base), [open_checkpoint(path) for path in finetuned]
    for model in models:
        if _identities(model) <= _identities(opened):
            raise InputError(f"{model.path}: is the base itself, expected a fine-tuned version of it")
    plan = make_plan(opened, models, task_vectors=inputs == "task_vectors", include=include, exclude=exclude)
    target = Path(output)
    if not opened.is_directory and target.suffix != opened.path.suffix:
        raise InputError(f"{target}: expected a file name that ends in {opened.path.suffix}, like base")
    destination = Destination.at(target, plan.files, directory=opened.is_directory, overwrite=overwrite)
    staging = Staging(destination.path, plan.files, resume=resume)
    read = [Input.of(checkpoint) for checkpoint in (opened, *models)]
    recipe = Recipe(read[0], read[1:], rule, inputs, nonfinite, include, exclude)
    files = [file for c in (opened, *models) for file in {**c.weights, **c.extra_files}.values()]
    finished = resume and not overwrite and holds(destination.manifest_path, recipe, files)
    if not finished:
        check(destination, [opened.path, *(m.path for m in models), *(file.path for file in files)])
    placement = _choose_placement(plan, rule, backend, device, threads or registry.usual_threads())
    signatures = {tensor_slice.signature for extent in plan.extents for tensor_slice in extent.slices}
    name, merge = registry.choose(backend, placement.device, rule, signatures)
    tensors = sum(len(checkpoint.tensors) for checkpoint in (opened, *models))
    sizes = [file.size for file in plan.files.values()]
    skip = nonfinite == "keep-base" if skip_unchanged is None else skip_unchanged
    looker, look = registry.choose("auto", "cpu") if skip else ("", None)
    fitted = _fit(memory_budget, placement.device, (name, looker), len(models), tensors, sizes, threads)
    skipping = Skipping(rule, len(models), look)
    writer = Writer(destination, staging)
    return Job(
        plan, recipe, destination, staging, writer, name, merge, placement, *fitted, threads, skipping, finished
    )


def _choose_placement(plan: Plan, rule: Rule, backend: str, device: str, threads: int) -> placement.Placement:
    if device != "auto":
        return placement.Placement(placement.GPU if device == "cuda" else device, "asked for")
    if backend == "auto":
        return placement.choose_placement(plan, rule, threads)
    on_gpu = backend == "cuda" or (backend == "triton" and placement.gpu_may_exist())
    return placement.Placement(placement.GPU if on_gpu else "cpu", f"where backend {backend} is")


def _fit(
    most_memory: int | str | None,
    device: str,
    used: tuple[str, str],
    models: int,
    tensors: int,
    sizes: list[int],
    threads: int | None,
) -> tuple[int, int, int]:
    """How many lanes, the longest stroke, and the memory that is taken: on the host and, beside it, on a device.

    used: the backend that merges, and the one that looks whether there is more to read.
    """
    what, room = budget.room(most_memory)
    longest, block = _MAX_CHUNK_BYTES, _BLOCK
    threads = threads or registry.usual_threads()
    most, scratch = _WORKERS_IN_TURNS, _SCRATCH if "torch" in used else 0
    if device != "cpu":
        most, longest, block = threads + _WAITING_WORKERS, _MAX_DEVICE_CHUNK_BYTES, _BLOCK_ON_DEVICE
        # Page-locked memory is nobody else's any more: no more than half of what there is.
        free = {
            "free memory": memory.free_memory() // 2,
            f"free memory of {device}": devices.available_bytes(device),
        }
        for place, size in free.items():
            if size < room:
                what, room = place, size
    elif used[0] in registry.CONCURRENT:
        most = max(threads, _MIN_WORKERS)
    most = min(most, max(max_open_files() // 2, _MIN_WORKERS), _MAX_THREADS)
    return budget.fit(
        room, what, models=models, tensors=tensors, sizes=sizes, lanes=most, longest=longest, scratch=scratch,
        block=block,
    )  # fmt: skip


def _identities(checkpoint: Checkpoint) -> set[tuple[int, int, int]]:
    return {file.identity for file in checkpoint.weights.values()}

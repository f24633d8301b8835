"""The options of a merge of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..backends import registry
from ..core.errors import InputError, require_choice
from ..core.pairing import Rename, compile_renames
from ..core.rule import Inputs, NonFinite, Rule

MAX_THREADS = 1024


@dataclass(frozen=True)
class MergeOptions:
    """What a merge of checkpoints does beside its inputs and output, for Python and the command line.

    Attributes:
        scale: λ, any finite number.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign.
        inputs: Whether the models are "finetuned" models or "task_vectors".
        nonfinite: With "error" a NaN or an infinity publishes nothing; with "keep-base" such elements keep the base's bits.
        include: A regular expression. Only tensors whose name matches are merged; the others are copied from the base.
        exclude: A regular expression. Tensors whose name matches are copied from the base.
        rename: Regular expressions and what replaces their matches in the names of the models' tensors, in order. What
            then differs by a prefix of all names, or by the spelling of wrappers and old versions, is matched by itself.
        keep: Patterns of files of the base (fnmatch) that are copied though they may hold weights.
        drop: Patterns of files of the base that are not copied.
        backend: "auto", "cuda", "triton", "cpu" or "torch".
        device: "cpu", or a device of torch through which all data is streamed. "auto" compares measured bandwidths.
        memory_budget: The most bytes to allocate, on the host and once more on a device; an int or text such as "512MiB".
            None or "auto" is half of what the machine and its control groups have free.
        threads: How many threads read and compute. None is torch's number, or less within a CPU quota.
        skip_unchanged: Do not read what cannot change the output: versions of a block in which no element can agree any more.
            A NaN in what is not read is not seen, so None skips with nonfinite="keep-base" only.
        overwrite: Replace the output if its manifest says that negmerge wrote every file in it, as it is.
        resume: Continue what an interrupted run left, if it had the same inputs and options, and keep unfinished output.

    Raises:
        InputError: If a value is out of bounds or none of the choices.
    """

    scale: float
    min_agreement: float = 1.0
    inputs: Inputs = "finetuned"
    nonfinite: NonFinite = "error"
    include: str | None = None
    exclude: str | None = None
    rename: Rename = ()
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    backend: str = "auto"
    device: str = "auto"
    memory_budget: int | str | None = None
    threads: int | None = None
    skip_unchanged: bool | None = None
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.rule  # checks its own two
        require_choice("inputs", self.inputs, ("finetuned", "task_vectors"))
        require_choice("nonfinite", self.nonfinite, ("keep-base", "error"))
        compile_renames(self.rename)
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise InputError(f"threads: {self.threads}, expected 1 … {MAX_THREADS}")

    @cached_property
    def rule(self) -> Rule:
        return Rule(self.scale, self.min_agreement)

    @property
    def thread_count(self) -> int:
        return self.threads or registry.usual_threads()

    @property
    def skips(self) -> bool:
        """Whether what cannot change the output is skipped."""
        return self.nonfinite == "keep-base" if self.skip_unchanged is None else self.skip_unchanged

"""The options of a merge of checkpoints, and what else its callers give: each is checked before anything is opened."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from ..backends import registry
from ..checkpoints import hub
from ..checkpoints.base import FORMATS, OutputFormat
from ..core.choices import Election
from ..core.errors import InputError, require_choice, short_repr
from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename, choice, compile_renames, rename_pairs
from ..core.rule import Inputs, NonFinite, Rule
from ..core.scales import Scale, Scales
from ..methods.base import Method
from ..methods.catalogue import as_method
from ..runtime.memory import parse_size

PathLike: TypeAlias = "str | os.PathLike[str]"

MAX_THREADS = 1024


@dataclass(frozen=True)
class MergeOptions:
    """What a merge of checkpoints does beside its inputs and output, for Python and the command line.

    Attributes:
        scale: λ, any finite number; or regular expressions and the λ of tensors whose names they match, of which the first counts.
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
        adapters_as: What LoRA adapters among the models are: with "difference" task vectors d = s·BA, in the arithmetic type; with
            "merged" models, b + d rounded to the base's type, as merging them one by one would write them.
        format: What the output's weights are written in: "safetensors"; "pt", which torch.load reads; or "auto", the format of the base,
            but "safetensors" in place of PyTorch's.
        method: The name of a method of methods/catalogue.py, or a Method.
        weights: A checkpoint with a weight for each element, by the names of the base; None if all are 1.

    Raises:
        InputError: If a value is of another type, out of bounds or none of the choices.
    """

    scale: Scale
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
    adapters_as: AdaptersAs = "difference"
    format: OutputFormat = "auto"
    method: str | Method = "negmerge"
    weights: PathLike | None = None

    def __post_init__(self) -> None:
        self._check_rule()
        for name in ("inputs", "nonfinite", "backend", "device", "adapters_as", "format"):
            _require_text(name, getattr(self, name))
        for name in ("include", "exclude"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        require_choice("inputs", self.inputs, ("finetuned", "task_vectors"))
        require_choice("nonfinite", self.nonfinite, ("keep-base", "error"))
        require_choice("adapters_as", self.adapters_as, ("difference", "merged"))
        require_choice("format", self.format, FORMATS)
        require_choice("backend", self.backend, ("auto", *registry.NAMES))
        choice(self.include, self.exclude)
        self._set("rename", _text_pairs(self.rename))
        compile_renames(self.rename)
        for name in ("keep", "drop"):
            self._set(name, _texts(name, getattr(self, name)))
        for name in ("overwrite", "resume"):
            self._set(name, _boolean(name, getattr(self, name)))
        if self.skip_unchanged is not None:
            self._set("skip_unchanged", _boolean("skip_unchanged", self.skip_unchanged))
        if self.threads is not None:
            self._set("threads", as_integer("threads", self.threads))
            if not 1 <= self.threads <= MAX_THREADS:
                raise InputError(f"threads: {self.threads}, expected 1 … {MAX_THREADS}")
        if self.memory_budget is not None and not isinstance(self.memory_budget, str):
            self._set("memory_budget", as_integer("memory_budget", self.memory_budget))
        if self.memory_budget not in (None, "auto"):
            parse_size(self.memory_budget)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_rule(self) -> None:
        try:
            method = as_method(self.method)
            self._set("method", method)
            Rule(self.scales.pairs[0][1], self.min_agreement)
        except TypeError as error:
            raise InputError(str(error)) from None
        if self.min_agreement != 1.0 and method.election not in (Election.AGREEMENT, Election.COUNTED):
            raise InputError(
                f"min_agreement: {self.min_agreement}, expected 1.0: {method.name} counts no signs"
            )
        if self.weights is not None:
            as_path("weights", self.weights)
        if self.skip_unchanged and not self.is_plain:
            what = "weights" if method.is_negmerge else f"method {method.name}"
            raise InputError(f"skip_unchanged: True, expected False: with {what} every version is read")

    @cached_property
    def scales(self) -> Scales:
        return Scales.of(self.scale)

    @property
    def chosen_method(self) -> Method:
        return as_method(self.method)

    @property
    def is_plain(self) -> bool:
        """Whether the rule is that of core/rule.py."""
        return self.chosen_method.is_negmerge and self.weights is None

    def rule_of(self, models: int) -> Rule:
        """The rule for so many models. Its scale is the first one.

        Raises:
            InputError: If the method has numbers for each of other than so many models.
        """
        method = self.chosen_method
        if method.needs_bounds:
            method.ranks(models, 1)
        choices = method.choices(models, self.weights is not None)
        return Rule(self.scales.pairs[0][1], self.min_agreement, choices)

    @property
    def thread_count(self) -> int:
        return self.threads or registry.usual_threads()

    @property
    def skips(self) -> bool:
        """Whether what cannot change the output is skipped."""
        usual = self.nonfinite == "keep-base" and self.is_plain
        return usual if self.skip_unchanged is None else self.skip_unchanged

    @property
    def counts_nonfinite(self) -> bool:
        """Whether every element that is not finite has to be found, as it is an error."""
        return self.nonfinite == "error" and not self.skips


def as_integer(name: str, value: object) -> int:
    """An integer of Python, of NumPy or of whatever else can be an index."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise InputError(f"{name}: {short_repr(value)}, expected an integer")


def as_paths(name: str, value: Iterable[PathLike]) -> list[Path]:
    """Several paths.

    Raises:
        TypeError: If it is one path, or nothing that has items.
        InputError: If an item is no path.
    """
    if isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: one path, expected a list of paths")
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: {short_repr(value)}, expected a list of paths")
    return [as_path(f"{name}[{k}]", each) for k, each in enumerate(value)]


def as_path(name: str, value: PathLike) -> Path:
    """A path. Raises InputError if it is none."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if isinstance(text, str) and text and "\0" not in text and _is_encodable(text):
        return Path(text)
    raise InputError(f"{name}: {short_repr(value)}, expected a path")


def as_input(name: str, value: PathLike) -> hub.Found:
    """Where a checkpoint is that will be read: a path, or the name of a model of the hub.

    Raises:
        InputError: If it is neither, or as of hub.find.
    """
    as_path(name, value)
    return hub.find(value)


def as_inputs(name: str, value: Iterable[PathLike]) -> list[hub.Found]:
    """Where several checkpoints are. Raises what as_paths and as_input raise."""
    if isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike)):
        value = list(value)  # it may be read only once
    as_paths(name, value)
    return [hub.find(each) for each in value]


def _is_encodable(text: str) -> bool:
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def require_callable(name: str, value: object) -> None:
    """Raise InputError unless a value can be called, or is None."""
    if value is not None and not callable(value):
        raise InputError(f"{name}: {short_repr(value)}, expected a function")


def _boolean(name: str, value: object) -> bool:
    numpy = sys.modules.get("numpy")  # which is slow to import, and whoever has a bool of it has imported it
    if isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_)):
        return bool(value)
    raise InputError(f"{name}: {short_repr(value)}, expected True or False")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name}: {short_repr(value)}, expected text")


def _texts(name: str, value: object) -> tuple[str, ...]:
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (None,)
    if not all(isinstance(each, str) for each in items):
        raise InputError(f"{name}: {short_repr(value)}, expected a list of patterns")
    return items


def _text_pairs(rename: Rename) -> tuple[tuple[str, str], ...]:
    pairs = rename_pairs(rename)
    for each in pairs:
        if not all(isinstance(text, str) for text in each):
            raise InputError(f"rename: {short_repr(each)}, expected a regular expression and a text")
    return pairs

"""The manifest of an output: its inputs, its options and the checksums of its files.

Nothing in it depends on the machine, the backend, memory or time. Same inputs and options give the same manifest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoints.base import MANIFEST, Checkpoint
from ..checkpoints.reader import File
from ..checkpoints.strict_json import parse_json
from ..core.errors import InputError
from ..core.rule import Inputs, NonFinite, Rule

# The bound of an index; and blocks small enough for each thread to hold one.
_MAX_BYTES, _BLOCK_SIZES = 100_000_000, range(1 << 12, (1 << 24) + 1)


def manifest_path(output: Path, directory: bool) -> Path:
    """The path of an output's manifest: in a directory, or beside a single file."""
    return output / MANIFEST if directory else output.with_name(f"{output.name}.{MANIFEST}")


@dataclass(frozen=True)
class Input:
    """A checkpoint as it was when it was merged.

    Attributes:
        path: Its path, as given.
        files: Size and hash of the header of the weights and their index, by name. Other files of the base are copied, so
            the output's checksums cover them; those of models are not read.
    """

    path: str
    files: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Input:
        every = sorted({**checkpoint.weights, **checkpoint.extra_files}.items())
        return cls(str(checkpoint.path), {n: (file.size, file.header) for n, file in every if file.header})


@dataclass(frozen=True)
class Recipe:
    """What determines every byte of an output. The models are in the order in which they are added."""

    base: Input
    models: list[Input]
    rule: Rule
    inputs: Inputs
    nonfinite: NonFinite
    include: str | None
    exclude: str | None
    rename: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            "negmerge_fast": __version__,
            "base": _input_json(self.base),
            "models": [_input_json(model) for model in self.models],
            "scale": self.rule.scale,
            "min_agreement": self.rule.min_agreement,
            "inputs": self.inputs,
            "nonfinite": self.nonfinite,
            "include": self.include,
            "exclude": self.exclude,
            "rename": [list(pair) for pair in self.rename],
            "keep": list(self.keep),
            "drop": list(self.drop),
        }


def _input_json(given: Input) -> dict[str, object]:
    files = {name: {"size": size, "header": header} for name, (size, header) in given.files.items()}
    return {"path": given.path, "files": files}


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        version: The version of negmerge_fast that wrote it.
        recipe: The inputs and options.
        block: Bytes of the blocks that are hashed.
        files: Size and checksum of each file, by name.
    """

    version: str
    recipe: Recipe
    block: int
    files: dict[str, tuple[int, str]]


def load(path: Path) -> dict[str, Any]:
    """Read the JSON object of a manifest, not validated."""
    file = File.at(path)
    if file.size > _MAX_BYTES:
        raise InputError(f"{path}: {file.size} bytes, expected a manifest of at most {_MAX_BYTES}")
    return parse_json(file.read(0, file.size), path, "manifest", surrogates=True)


def read(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        InputError: If negmerge would not have written it.
    """
    found = load(path)
    validator = _Validator(path)
    models = validator.field(found, "models", _is_list, "a list of models")
    recipe = Recipe(
        validator.input(found, "base"),
        [validator.input({f"models[{k}]": model}, f"models[{k}]") for k, model in enumerate(models)],
        validator.rule(found),
        validator.choice(found, "inputs", "finetuned", "task_vectors"),
        validator.choice(found, "nonfinite", "error", "keep-base"),
        validator.field(found, "include", _is_text_or_none, "text or null"),
        validator.field(found, "exclude", _is_text_or_none, "text or null"),
        tuple((pattern, text) for pattern, text in validator.listed(found, "rename", _is_pair)),
        tuple(validator.listed(found, "keep", _is_text)),
        tuple(validator.listed(found, "drop", _is_text)),
    )
    version = validator.field(found, "negmerge_fast", _is_text, "a version")
    block = validator.field(
        found, "block", lambda v: type(v) is int and v in _BLOCK_SIZES, "the size of a block"
    )
    files = validator.files(found, "files", "checksum")
    validator.field({"files": files}, "files", bool, "at least one")
    return Manifest(version, recipe, block, files)


def holds(path: Path, recipe: Recipe, files: Iterable[File]) -> bool:
    """Whether a manifest lists a complete output of the same recipe.

    Args:
        path: The manifest's path.
        recipe: The inputs and options of the current job.
        files: The files of the inputs, which must be older than the manifest.
    """
    try:
        found, written = read(path), path.stat().st_mtime_ns
    except (InputError, OSError):
        return False
    outputs = {path.parent / name: size for name, (size, _) in found.files.items()}
    complete = all(file.is_file() and file.stat().st_size == size for file, size in outputs.items())
    # The later of both times: a copy may keep the time of modification.
    older = all(max(file.identity[2], file.path.stat().st_ctime_ns) < written for file in files)
    return (
        complete and older and found.version == __version__ and _resolved(found.recipe) == _resolved(recipe)
    )


def _resolved(recipe: Recipe) -> Recipe:
    base, *models = (replace(i, path=os.path.realpath(i.path)) for i in (recipe.base, *recipe.models))
    return replace(recipe, base=base, models=models)


class _Validator:
    """Takes the fields of a manifest, or raises InputError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def field(self, found: dict[str, Any], key: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        if key not in found:
            raise InputError(f"{self.path}: no {key}, expected {expected}")
        if not is_valid(found[key]):
            raise InputError(f"{self.path}: {key} is {repr(found[key])[:120]}, expected {expected}")
        return found[key]

    def listed(self, found: dict[str, Any], key: str, is_valid: Callable[[Any], bool]) -> list[Any]:
        """A list, which manifests of earlier versions do not have."""
        value = found.get(key, [])
        return list(
            self.field({key: value}, key, lambda v: _is_list(v) and all(map(is_valid, v)), "a list of text")
        )

    def choice(self, found: dict[str, Any], key: str, *choices: str) -> Any:
        return self.field(found, key, lambda v: _is_text(v) and v in choices, f"one of {', '.join(choices)}")

    def rule(self, found: dict[str, Any]) -> Rule:
        scale = self.field(found, "scale", _is_number, "a number")
        min_agreement = self.field(found, "min_agreement", _is_number, "a number")
        try:
            return Rule(scale, min_agreement)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def input(self, found: dict[str, Any], key: str) -> Input:
        value = self.field(found, key, _is_object, "an object with path and files")
        return Input(self.field(value, "path", _is_text, "text"), self.files(value, "files", "header"))

    def files(self, found: dict[str, Any], key: str, hash_key: str) -> dict[str, tuple[int, str]]:
        files: dict[str, tuple[int, str]] = {}
        for name, entry in self.field(found, key, _is_object, "an object of files").items():
            if not _is_inside(name):
                raise InputError(
                    f"{self.path}: names the file {name!r}, expected a path inside the directory"
                )
            file = self.field({name: entry}, name, _is_object, f"an object with size and {hash_key}")
            size = self.field(
                file, "size", lambda v: type(v) is int and 0 <= v < 1 << 63, "a number of bytes"
            )
            files[name] = size, self.field(file, hash_key, _is_text, "a hash")
        return files


def _is_inside(name: str) -> bool:
    """Whether a name is a normalized relative path that cannot leave the directory."""
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/")) and name != MANIFEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def differences(recorded: Sequence[Input], checkpoints: Sequence[Checkpoint]) -> str | None:
    """How checkpoints, the base first, differ from those that were merged, in one line; None if they do not."""
    if len(recorded) != len(checkpoints):
        return f"{len(checkpoints) - 1} models, expected {len(recorded) - 1}"
    for before, checkpoint in zip(recorded, checkpoints, strict=True):
        if differs := _file_differences(before, checkpoint):
            return differs
    return None


def _file_differences(recorded: Input, checkpoint: Checkpoint) -> str | None:
    current, expected = Input.of(checkpoint).files, recorded.files
    if not checkpoint.is_directory:  # a single file may have got another name
        expected = dict(zip(current, expected.values(), strict=False))
    if missing := sorted(expected.keys() ^ current.keys()):
        problem = "is missing" if missing[0] in expected else "was not there"
        return f"{checkpoint.path}: {missing[0]} {problem}, expected the files of {recorded.path}"
    for name, (size, header) in current.items():
        path = checkpoint.path / name if checkpoint.is_directory else checkpoint.path
        if size != expected[name][0]:
            return f"{path}: {size} bytes, expected {expected[name][0]} as in {recorded.path}"
        if header != expected[name][1]:
            return f"{path}: header {header}, expected {expected[name][1]} as in {recorded.path}"
    return None

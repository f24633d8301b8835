"""The manifest of an output: its inputs, its options, the checksums of its files, and one of itself.

Nothing in it depends on the machine, the backend, memory or time, nor on where the inputs lie. Same inputs and options give the
same manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from .._version import __version__
from ..checkpoints import hub
from ..checkpoints.base import MANIFEST, Checkpoint, Format
from ..checkpoints.reader import File, Reader
from ..checkpoints.strict_json import parse_json
from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from ..core.rule import Inputs, NonFinite, Rule
from ..core.scales import Scales
from ..methods.base import Method
from ..methods.catalogue import as_method
from .checksums import Checksums

# The bound of an index; and blocks small enough for each thread to hold one.
_MAX_BYTES, _BLOCK_SIZES = 100_000_000, range(1 << 12, (1 << 24) + 1)
_MAX_HASH = 200  # characters

# What is before a manifest's own checksum, and the fields of manifests that have none.
_SEAL = ',\n  "checksum": '
_EARLY_FIELDS = frozenset({
    "negmerge_fast", "base", "models", "scale", "min_agreement", "inputs", "nonfinite", "include", "exclude", "rename",
    "keep", "drop", "counted", "block", "files",
})  # fmt: skip


class AlteredError(InputError):
    """A manifest that is not as negmerge wrote it."""


def manifest_path(output: Path, directory: bool) -> Path:
    """The path of an output's manifest: in a directory, or beside a single file."""
    return output / MANIFEST if directory else output.with_name(f"{output.name}.{MANIFEST}")


class InputFile(NamedTuple):
    """A file of an input: its size, the hash of its header, and that of a sample of it (empty in early manifests)."""

    size: int
    header: str
    sample: str

    def difference(self, recorded: InputFile) -> str | None:
        """How this file differs from what was recorded; None if it does not."""
        if self.size != recorded.size:
            return f"{self.size} bytes, expected {recorded.size}"
        if self.header != recorded.header:
            return f"header {self.header}, expected {recorded.header}"
        if recorded.sample and self.sample != recorded.sample:
            return f"sample {self.sample}, expected {recorded.sample}"
        return None


class OutputFile(NamedTuple):
    """A file of an output: its size, its checksum, and the hash of a sample of it (empty in early manifests)."""

    size: int
    checksum: str
    sample: str


@dataclass(frozen=True)
class Input:
    """A checkpoint as it was when it was merged.

    Attributes:
        path: The last part of its path; of a snapshot in a cache of the hub `org/name@revision`. Early manifests have all of a path.
        files: The weights and their index, by name. Other files of the base are copied, so the output's checksums cover
            them; those of models are not read.
    """

    path: str
    files: dict[str, InputFile]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Input:
        """Describe a checkpoint. This reads samples of its files."""
        path = checkpoint.path
        name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
        files = {n: InputFile(f.size, f.header, f.sample) for n, f in sorted(files_read(checkpoint).items())}
        return cls(hub.name_of(path) or name, files)


def files_read(checkpoint: Checkpoint) -> dict[str, File]:
    """The files of a checkpoint that tell what it holds: the weights and their index."""
    return {name: file for name, file in checkpoint.inputs.items() if file.header}


@dataclass(frozen=True)
class Recipe:
    """What determines every byte of an output. The models are in the order in which they are added.

    means: of a consensus delta, which has no scale, how its means are stored: EXACT or BF16. None of a merge.
    merged_adapters: whether there are adapters, which were models, merged into the base, and not task vectors.
    format: what the base was translated to; None of an output that mirrors it.
    scales: λ by patterns on names; None if it is the rule's for all tensors.
    method: None of NegMerge.
    weights: what has a weight for each element, if there are any.
    """

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
    means: str | None = None
    merged_adapters: bool = False
    format: Format | None = None
    scales: Scales | None = None
    method: Method | None = None
    weights: Input | None = None

    @property
    def checkpoints(self) -> list[Input]:
        """The base, the models and the weights."""
        return [self.base, *self.models, *([self.weights] if self.weights else [])]

    @property
    def scale(self) -> float | list[list[object]] | None:
        """λ, or patterns and theirs; None of a delta."""
        if self.means:
            return None
        return self.scales.to_json() if self.scales else self.rule.scale

    def to_json(self) -> dict[str, object]:
        return {
            "negmerge_fast": __version__,
            "base": input_json(self.base),
            "models": [input_json(model) for model in self.models],
            "scale": self.scale,
            "min_agreement": self.rule.min_agreement,
            "inputs": self.inputs,
            "nonfinite": self.nonfinite,
            "include": self.include,
            "exclude": self.exclude,
            "rename": [list(pair) for pair in self.rename],
            "keep": list(self.keep),
            "drop": list(self.drop),
            **({"means": self.means} if self.means else {}),
            **({"adapters_as": "merged"} if self.merged_adapters else {}),
            **({"format": self.format} if self.format else {}),
            **({"method": self.method.to_json()} if self.method else {}),
            **({"weights": input_json(self.weights)} if self.weights else {}),
        }


def input_json(given: Input) -> dict[str, object]:
    return {"path": given.path, "files": {name: file._asdict() for name, file in given.files.items()}}


# How the means of a delta are stored: in the type of the arithmetic, or in this one.
EXACT, BF16 = "exact", "BF16"


class ManifestCounts(NamedTuple):
    """Elements of the whole output: merged, agreed, not finite, vetoed by zero, masked.

    None: not known, of no meaning for the method, or not counted by early versions.
    """

    elements: int
    agreed: int
    nonfinite: int | None
    vetoed_by_zero: int | None
    masked: int | None


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read.

    Attributes:
        version: The version of negmerge_fast that wrote it.
        recipe: The inputs and options.
        counted: Counts of elements.
        block: Bytes of the blocks that are hashed.
        files: The files of the output, by name.
    """

    version: str
    recipe: Recipe
    counted: ManifestCounts
    block: int
    files: dict[str, OutputFile]


def sealed(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of a manifest and, as the last one, the hash of their JSON (indented by 2) up to there."""
    text = json.dumps(fields, indent=2).removesuffix("\n}")
    return {**fields, "checksum": hash_of(text.encode())}


def load(path: Path) -> dict[str, Any]:
    """Read the JSON object of a manifest; of its fields only the checksum is checked.

    Raises:
        AlteredError: If it is not as it was written. Early manifests have no checksum.
        InputError: If it is no JSON object.
    """
    file = File.at(path)
    if file.size > _MAX_BYTES:
        raise InputError(f"{path}: {file.size} bytes, expected a manifest of at most {_MAX_BYTES}")
    content = file.read(0, file.size)
    text, seal, checksum = content.rpartition(_SEAL.encode())
    if seal and checksum != f'"{hash_of(text)}"\n}}\n'.encode():
        raise AlteredError(
            f"{path}: the manifest was altered, expected what its last line has the checksum of"
        )
    found = parse_json(content, path, "manifest", surrogates=True)
    if not seal and "negmerge_fast" in found and (unknown := sorted(found.keys() - _EARLY_FIELDS)):
        raise AlteredError(
            f"{path}: the manifest was altered ({short_repr(unknown[0])}), expected it as it was written"
        )
    return found


def read(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        InputError: If negmerge would not have written it.
    """
    found = load(path)
    validator = _Validator(path)
    models = validator.field(found, "models", _is_list, "a list of models")
    means = validator.choice(found, "means", EXACT, BF16) if "means" in found else None
    scales = validator.scales({**found, "scale": 0.0} if means and found.get("scale") is None else found)
    method = validator.method(found) if "method" in found else None
    weights = validator.input(found, "weights") if "weights" in found else None
    recipe = Recipe(
        validator.input(found, "base"),
        [validator.input({f"models[{k}]": model}, f"models[{k}]") for k, model in enumerate(models)],
        validator.rule(found, scales, method, weights is not None),
        validator.choice(found, "inputs", "finetuned", "task_vectors"),
        validator.choice(found, "nonfinite", "error", "keep-base"),
        validator.field(found, "include", _is_text_or_none, "text or null"),
        validator.field(found, "exclude", _is_text_or_none, "text or null"),
        tuple((pattern, text) for pattern, text in validator.listed(found, "rename", _is_pair)),
        tuple(validator.listed(found, "keep", _is_text)),
        tuple(validator.listed(found, "drop", _is_text)),
        means,
        "adapters_as" in found and validator.choice(found, "adapters_as", "merged") == "merged",
        validator.choice(found, "format", "safetensors", "pt") if "format" in found else None,
        None if scales.is_one else scales,
        method,
        weights,
    )
    version = validator.field(found, "negmerge_fast", _is_text, "a version")
    block = validator.field(found, "block", _is_block, "the size of a block")
    listed = validator.files(found, "files", "checksum")
    validator.field({"files": listed}, "files", bool, "at least one")
    files = {
        name: OutputFile(size, checksum, validator.sample(found["files"][name]))
        for name, (size, checksum) in listed.items()
    }
    return Manifest(version, recipe, validator.counted(found), block, files)


def holds(
    path: Path,
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    copied_files: Mapping[str, File] | None,
    all_read: bool,
) -> bool:
    """Whether a manifest lists a complete output of the same inputs and options.

    What was read must be older than the manifest. If it was not written since, but its inode changed (by a link to it, another
    mode, or a copy that took over a time), its sample decides. What was copied is compared with the output's checksums: an older
    version of it may have got its name. The files of the output have to be those that were written: by their samples, and by their
    checksums if they were written since.

    Args:
        path: The manifest's path.
        recipe: The inputs and options of the current job.
        checkpoints: The inputs, the base first.
        copied_files: The files of the base that are copied, by their names in the output; None if the output does not mirror it.
        all_read: Whether every element has to be read, so that a non-finite one is an error: nothing may have been skipped.
    """
    try:
        found, written = read(path), path.stat().st_mtime_ns
    except (InputError, OSError):
        return False
    if all_read and found.counted.nonfinite is None:
        return False
    files = {name: _listed_path(path, name) for name in found.files}
    try:
        if not all(map(os.path.exists, files.values())) or altered(path, files):
            return False
    except InputError:  # one of them cannot be read
        return False
    if found.version != __version__ or not _is_same_recipe(found.recipe, recipe):
        return False
    sampled = all(file.sample for each in found.recipe.checkpoints for file in each.files.values())
    sources = chain.from_iterable(files_read(checkpoint).values() for checkpoint in checkpoints)
    if not all(_is_older(file, written, sampled) for file in sources):
        return False
    if copied_files is None:
        return True
    others = found.files.keys() - checkpoints[0].weights.keys() if checkpoints[0].is_directory else set()
    return others == copied_files.keys() and all(
        found.files[name][:2] == (file.size, _checksum(file, found.block))
        for name, file in copied_files.items()
    )


def altered(path: Path, files: Mapping[str, Path]) -> str | None:
    """How the first of some files differs from what a manifest lists, in one line; None if negmerge wrote them all.

    A file that is missing does not differ. Size and sample are compared, and the checksum of a file that was written after the
    manifest. Early manifests have no samples. Nothing else in one has to be right.

    Args:
        path: The manifest's path.
        files: Paths by the names that a manifest lists; a single file may have any name.
    """
    try:
        found, written = load(path), path.stat().st_mtime_ns
    except (InputError, OSError) as error:
        return str(error)
    listed, block = found.get("files"), found.get("block")
    if not isinstance(listed, dict):
        return f"{path}: no files, expected those of an output"
    if path.name != MANIFEST and len(listed) == 1:
        listed = dict.fromkeys(files, *listed.values())
    for name, file in sorted(files.items()):
        if os.path.lexists(file) and (differs := _alteration(file, listed.get(name), written, block)):
            return f"{file}: {differs} as in {path}"
    return None


def _alteration(path: Path, entry: object, written: int, block: object) -> str | None:
    if not isinstance(entry, dict):
        return "is there, expected no such file"
    if path.is_symlink() or not path.is_file():
        return "not a regular file, expected one"
    file, size, sample = File.at(path), entry.get("size"), entry.get("sample")
    if file.size != size:
        return f"{file.size} bytes, expected {str(size)[:60]}"
    if sample and file.sample != sample:
        return f"sample {file.sample}, expected {str(sample)[:60]}"
    if sample and file.identity[2] < written:
        return None
    checksum = entry.get("checksum")
    now = _checksum(file, block) if _is_block(block) else "of unknown blocks"
    return None if now == checksum else f"checksum {now}, expected {str(checksum)[:60]}"


def _listed_path(path: Path, name: str) -> Path:
    """Where a file that a manifest lists lies. A single file may have got another name, with its manifest."""
    return path.parent / (name if path.name == MANIFEST else path.name.removesuffix(f".{MANIFEST}"))


def _is_older(file: File, written: int, sampled: bool) -> bool:
    return file.identity[2] < written and (sampled or file.changed_ns < written)


def _checksum(file: File, block: int) -> str:
    sums = Checksums({"": file.size}, block)
    with Reader(1) as reader:
        for offset, size in sums.gaps(""):
            buffer = memoryview(bytearray(size))
            file.read_into(reader, offset, buffer)
            sums.add("", offset, buffer)
    return sums.of("")


def _is_same_recipe(recorded: Recipe, current: Recipe) -> bool:
    inputs = {"base": current.base, "models": current.models, "weights": current.weights}
    if replace(recorded, **inputs) != current:  # type: ignore[arg-type]
        return False
    pairs = list(zip_longest(recorded.checkpoints, current.checkpoints))
    return all(was and now and _is_same_input(was, now) for was, now in pairs)


def _is_same_input(recorded: Input, current: Input) -> bool:
    was, now = recorded.files, current.files
    same_name = Path(recorded.path).name == current.path
    return same_name and was.keys() == now.keys() and not any(now[n].difference(was[n]) for n in now)


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

    def scales(self, found: dict[str, Any]) -> Scales:
        scale = self.field(found, "scale", _is_scale, "a number, or patterns and numbers")
        pairs = scale if _is_list(scale) else [["", scale]]
        try:  # the patterns may be anybody's: runtime/patterns.py compiles them
            return Scales(tuple((pattern, Rule(number).scale) for pattern, number in pairs))
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def method(self, found: dict[str, Any]) -> Method:
        listed = self.field(found, "method", _is_object, "a method")
        try:
            return Method.of_json(listed)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: method is {short_repr(listed)}, expected one ({error})") from None

    def rule(self, found: dict[str, Any], scales: Scales, method: Method | None, weighted: bool) -> Rule:
        min_agreement = self.field(found, "min_agreement", _is_number, "a number")
        try:
            choices = (method or as_method("negmerge")).choices(len(found["models"]), weighted)
            return Rule(scales.pairs[0][1], min_agreement, choices)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def input(self, found: dict[str, Any], key: str) -> Input:
        value = self.field(found, key, _is_object, "an object with path and files")
        files = {
            name: InputFile(size, header, self.sample(value["files"][name]))
            for name, (size, header) in self.files(value, "files", "header").items()
        }
        return Input(self.field(value, "path", _is_text, "text"), files)

    def sample(self, entry: dict[str, Any]) -> str:
        sample: str = self.field({"sample": "", **entry}, "sample", _is_hash, "a hash")
        return sample

    def counted(self, found: dict[str, Any]) -> ManifestCounts:
        counted = self.field(found, "counted", _is_object, "an object of counts")
        known = [self.field(counted, key, _is_count, "a count") for key in ("elements", "agreed")]
        perhaps = {"vetoed_by_zero": None, "masked": None, **counted}
        for key in ("nonfinite", "vetoed_by_zero", "masked"):
            known.append(self.field(perhaps, key, lambda v: v is None or _is_count(v), "a count or null"))
        return ManifestCounts(*known)

    def files(self, found: dict[str, Any], key: str, hash_key: str) -> dict[str, tuple[int, str]]:
        files: dict[str, tuple[int, str]] = {}
        for name, entry in self.field(found, key, _is_object, "an object of files").items():
            if not _is_inside(name):
                raise InputError(
                    f"{self.path}: names the file {short_repr(name)}, expected a path inside the directory"
                )
            file = self.field({name: entry}, name, _is_object, f"an object with size and {hash_key}")
            size = self.field(file, "size", lambda v: _is_count(v) and v < 1 << 63, "a number of bytes")
            files[name] = size, self.field(file, hash_key, _is_hash, "a hash")
        return files


def _is_inside(name: str) -> bool:
    """Whether a name is a normalized relative path that cannot leave the directory."""
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/")) and name != MANIFEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_HASH


def _is_block(value: Any) -> TypeGuard[int]:
    return type(value) is int and value in _BLOCK_SIZES


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scale(value: Any) -> bool:
    """Whether it is a number, or a list of pairs of a text and a number."""
    if not _is_list(value):
        return _is_number(value)
    return bool(value) and all(
        _is_list(pair) and len(pair) == 2 and _is_text(pair[0]) and _is_number(pair[1]) for pair in value
    )


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
    for name, file in current.items():
        if differs := file.difference(expected[name]):
            path = checkpoint.path / name if checkpoint.is_directory else checkpoint.path
            return f"{path}: {differs} as in {recorded.path}"
    return None

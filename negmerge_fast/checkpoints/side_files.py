"""The files beside a model's weights: which are copied, and which are not."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..core.errors import InputError
from .base import MANIFEST
from .lfs import refuse_pointer
from .reader import File
from .weights import ADAPTERS

# Levels of folders below that of a model.
_MAX_DEPTH = 64

_MAX_POINTER_BYTES = 1024

ADAPTER_CONFIG = "adapter_config.json"
# A file, and how names of weights begin that are loaded with it: of an adapter, or of SetFit's classifier.
_REFERENCES: dict[str, tuple[str, ...]] = {ADAPTER_CONFIG: ADAPTERS, "config_setfit.json": ("model_head.",)}

# Folders that are a model in another format.
_MODEL_FOLDERS = ".mlpackage", ".mlmodelc"

# Of configurations; a vocabulary may be longer, and names no file.
_MAX_JSON_BYTES = 1 << 20


class Globs:
    """Patterns for names of files, and which of them have matched any.

    Args:
        option: What they are called in errors.
        patterns: As of the shell; * stands for slashes, too.
    """

    def __init__(self, option: str, patterns: Sequence[str]) -> None:
        self._option, self._unmatched, self._patterns = option, list(patterns), tuple(patterns)

    def match(self, name: str) -> bool:
        matched = [pattern for pattern in self._patterns if fnmatchcase(name, pattern)]
        self._unmatched = [pattern for pattern in self._unmatched if pattern not in matched]
        return bool(matched)

    def refuse_unmatched(self, path: Path) -> None:
        for pattern in self._unmatched:
            raise InputError(f"{path}: {self._option} {pattern!r} matches no file beside the weights")


class SideFiles:
    """The files of a directory, but for those that were opened already.

    Attributes:
        copied: Files that belong to the model, by names relative to the directory.
        skipped: Names of the others.
        notes: Folders that could not be looked into, and links that lead to no file, a line each.
        undecided: What only a user can say whether it is needed, a line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copied: dict[str, File] = {}
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.undecided: list[str] = []
        self._weights: set[str] = set()  # of those that are skipped

    def find(
        self, opened: Collection[str], keep: Globs, drop: Globs, is_weights: Callable[[File, str], bool]
    ) -> None:
        """Walk the directory.

        Args:
            opened: Names of the files that were opened: weights and indexes.
            keep: Files to copy, whatever they are.
            drop: Files not to copy.
            is_weights: Tells of a file and the last part of its name whether it holds weights.
        """
        pending = [""]
        while pending:
            folder = pending.pop()
            for entry in self._entries(folder):
                name = folder + entry.name
                hidden = entry.name.startswith(".")
                if name in opened or name == MANIFEST:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    is_needless = hidden or entry.name.lower().endswith(_MODEL_FOLDERS)
                    if is_needless and not any(other.startswith(name + "/") for other in opened):
                        self.skipped.append(name)
                    else:
                        pending.append(name + "/")
                elif drop.match(name):
                    self.skipped.append(name)
                elif not os.path.isfile(self.path / name):
                    self.skipped.append(name)
                    if entry.is_symlink() and not hidden:
                        leads = "a folder" if os.path.isdir(self.path / name) else "no file"
                        self.notes.append(
                            f"{self.path / name}: skipped (a link to {os.readlink(entry.path)}, {leads})"
                        )
                elif keep.match(name):
                    self.copied[name] = file = File.at(self.path / name)
                    refuse_pointer(file.path, file.read(0, min(file.size, _MAX_POINTER_BYTES)))
                elif hidden:
                    self.skipped.append(name)
                elif is_weights(file := File.at(self.path / name), entry.name):
                    self.skipped.append(name)
                    self._weights.add(name)
                else:
                    self.copied[name] = file
        self._drop_openvino()
        keep.refuse_unmatched(self.path)
        drop.refuse_unmatched(self.path)
        self._find_references()

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """List a folder. One that may not be listed, or is nested too deep, is skipped: nothing refers to it."""
        try:
            if folder.count("/") > _MAX_DEPTH:
                raise OSError(None, f"more than {_MAX_DEPTH} folders in each other")
            with os.scandir(self.path / folder) as found:
                return sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise InputError(f"{self.path}: {error.strerror}") from None
            self.skipped.append(folder[:-1])
            self.notes.append(f"{self.path / folder}: skipped ({error.strerror})")
            return []

    def _drop_openvino(self) -> None:
        """Skip the graph of an OpenVINO model whose weights are skipped."""
        for name in [name for name in self.copied if name.endswith(".xml")]:
            if name.removesuffix("xml") + "bin" in self.skipped:
                del self.copied[name]
                self.skipped.append(name)

    def _find_references(self) -> None:
        """Find weights that would be skipped while a file that refers to them is copied."""
        named = self._named_in_json() if self._weights else {}
        for name in self.skipped:
            folder, _, last = name.rpartition("/")
            prefix = folder + "/" if folder else ""
            configs = [prefix + config for config, begin in _REFERENCES.items() if last.startswith(begin)]
            configs = [config for config in configs if config in self.copied]
            if name in self._weights and name in named:
                configs.append(named[name])
            for config in configs[:1]:
                drop = f"{prefix}adapter*" if config == prefix + ADAPTER_CONFIG else config
                self.undecided.append(
                    f"{self.path / name}: not merged, but {config} refers to it: expected --keep '{name}' to copy it as it is, "
                    f"or --drop '{drop}' to go without it"
                )

    def _named_in_json(self) -> dict[str, str]:
        """The texts in small JSON files to copy, as names relative to the directory, each with the name of a file."""
        named: dict[str, str] = {}
        for name, file in self.copied.items():
            if not name.endswith(".json") or file.size > _MAX_JSON_BYTES:
                continue
            try:
                pending = [json.loads(file.read(0, file.size))]
            except (ValueError, RecursionError):
                continue
            while pending:
                value = pending.pop()
                if isinstance(value, (list, dict)):
                    pending += value.values() if isinstance(value, dict) else value
                elif isinstance(value, str):
                    named.setdefault(posixpath.join(posixpath.dirname(name), value.removeprefix("./")), name)
        return named

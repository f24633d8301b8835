"""The files beside a model's weights: which are copied, and which are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..core.errors import InputError
from .base import MANIFEST
from .contents import is_weights_format
from .lfs import refuse_pointer
from .reader import File
from .weights import is_adapter

# Levels of folders below that of a model.
_MAX_DEPTH = 64

_MAX_POINTER_BYTES = 1024

ADAPTER_CONFIG = "adapter_config.json"
# A file, and the beginning of names of weights that are loaded with it: of an adapter, or of SetFit's classifier.
_REFERENCES = {ADAPTER_CONFIG: "adapter", "config_setfit.json": "model_head."}


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
        notes: Folders that could not be looked into, a line each.
        undecided: What only a user can say whether it is needed, a line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copied: dict[str, File] = {}
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.undecided: list[str] = []

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
                    if hidden or is_weights_format(entry.name):
                        self.skipped.append(name)
                    else:
                        pending.append(name + "/")
                elif drop.match(name) or not os.path.isfile(self.path / name):
                    self.skipped.append(name)
                elif keep.match(name):
                    self.copied[name] = file = File.at(self.path / name)
                    refuse_pointer(file.path, file.read(0, min(file.size, _MAX_POINTER_BYTES)))
                elif hidden or is_weights(file := File.at(self.path / name), entry.name):
                    self.skipped.append(name)
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
        for name in self.skipped:
            folder, _, last = name.rpartition("/")
            prefix = folder + "/" if folder else ""
            for config, begin in _REFERENCES.items():
                is_weights = last.startswith(begin) or (config == ADAPTER_CONFIG and is_adapter(last))
                if is_weights and prefix + config in self.copied:
                    drop = f"{prefix}adapter*" if config == ADAPTER_CONFIG else f"{prefix}{config}"
                    self.undecided.append(
                        f"{self.path / name}: not merged, but {config} refers to it: expected --keep '{name}' to copy it "
                        f"as it is, or --drop '{drop}' to go without it"
                    )

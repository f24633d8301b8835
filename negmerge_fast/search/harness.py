"""Evaluation of scales by a command, such as an evaluation harness: each λ has a model of its own on disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints.base import MANIFEST
from ..core.errors import InputError, MergeWarning, short_repr
from ..deltas.apply import apply_delta, output_path
from ..output.manifest import manifest_path
from .points import SCORES

MODEL, SCALE = "{model}", "{scale}"

_POLL_S = 0.1
# Seconds for a command to end by itself when it is told to.
_END_S = 10.0
# Of what a command printed, the end that may hold the scores.
_MAX_PRINTED = 1 << 20


class Harness:
    """Evaluates scales by a command.

    Each model is in a directory of its own, as harnesses cache results by it, and is removed afterwards.

    Args:
        command: A command of the shell, with {model} and perhaps {scale} in it.
        base: The base.
        delta: Its delta.
        output: Where the chosen model will be. Others are in OUT.scales, next to it.
        keeps_models: Whether models are left there.
        options: Those of apply_delta but scale and overwrite.
        check: Called often. It may raise to stop.

    Attributes:
        notes: What a user should know of the models.
    """

    def __init__(
        self,
        command: str,
        base: Path,
        delta: Path,
        output: Path,
        keeps_models: bool,
        options: Mapping[str, Any],
        check: Callable[[], None],
    ) -> None:
        if MODEL not in command:
            raise InputError(
                f"--eval: {short_repr(command)}, expected {MODEL} in it, for the path of each model"
            )
        self._command, self._base, self._delta, self._output = command, base, delta, output
        self._keeps_models, self._options, self._check = keeps_models, options, check
        self.notes: dict[str, None] = {}

    @property
    def folder(self) -> Path:
        """Where models are while they are evaluated."""
        return self._output.with_name(f"{self._output.name}.scales")

    def __call__(self, scale: float, wanted: Sequence[str]) -> Mapping[str, Any]:
        suffix = "" if self._base.is_dir() else self._output.suffix
        model = output_path(self.folder / self._output.name, scale, suffix)
        self.folder.mkdir(exist_ok=True)
        try:
            _remove(model)  # of a run that was killed
            self.write(model, scale, overwrite=False)
            command = self._command.replace(SCALE, repr(scale))  # first: a path may have {scale} in it
            text = run_command(command.replace(MODEL, shlex.quote(str(model.absolute()))), self._check)
            return scores_in(text, scale)
        finally:
            if not self._keeps_models:
                _remove(model)
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()

    def write(self, path: Path, scale: float, *, overwrite: bool) -> None:
        """Write the model of a scale."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MergeWarning)
            apply_delta(
                self._base, self._delta, path, scale=scale, overwrite=overwrite,
                progress=lambda done, total: self._check(), **self._options,
            )  # fmt: skip
        self.notes.update({str(each.message): None for each in caught if each.category is MergeWarning})


def _remove(path: Path) -> None:
    """Remove a model that negmerge wrote, with what a harness has put there."""
    if (path / MANIFEST).is_file():
        shutil.rmtree(path)
    elif (manifest := manifest_path(path, False)).is_file():
        path.unlink(missing_ok=True)
        manifest.unlink()


def run_command(command: str, check: Callable[[], None]) -> str:
    """Run a command of the shell and return what it printed on standard output; its errors go where ours go.

    It is in a session of its own: Ctrl-C reaches this process alone, which then ends all that the command has started.

    Raises:
        RuntimeError: If its exit status is not 0.
    """
    with subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            printed = _wait(process, check)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise RuntimeError(f"--eval: {short_repr(command)}: exit status {process.returncode}, expected 0")
    return printed.decode(errors="replace")


def _wait(process: subprocess.Popen[bytes], check: Callable[[], None]) -> bytes:
    while True:
        check()
        try:
            return process.communicate(timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired:
            pass


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what has not ended


def scores_in(text: str, scale: float) -> Mapping[str, Any]:
    """The scores in the last JSON object that a command printed.

    Raises:
        InputError: If there is none, or it lacks one.
    """
    found = _last_object(text[-_MAX_PRINTED:])
    if found is None:
        last = (text.strip().splitlines() or [""])[-1]
        raise InputError(
            f"--eval at λ {scale:g}: printed {short_repr(last)} at last, expected JSON with forget and retain"
        )
    if missing := [name for name in SCORES if name not in found]:
        raise InputError(
            f"--eval at λ {scale:g}: JSON with {', '.join(map(short_repr, found)) or 'nothing'}, expected {missing[0]}, too"
        )
    return found


def _last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object of a text; it begins a line, and has one or several."""
    decoder, found, end, start = json.JSONDecoder(), None, 0, 0
    for line in text.splitlines(keepends=True):
        if start >= end and line.lstrip().startswith("{"):
            with suppress(ValueError, RecursionError):
                found, end = decoder.raw_decode(text, start + len(line) - len(line.lstrip()))
        start += len(line)
    return found

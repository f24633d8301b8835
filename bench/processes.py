"""A command as a process of its own, within a memory limit perhaps: how long it takes, and the most memory that it uses."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from negmerge_fast.budget import control_groups

# Of both kinds of control groups: the limit, and the most that was used.
_FILES = (("memory.limit_in_bytes", "memory.max_usage_in_bytes"), ("memory.max", "memory.peak"))


class Ended(NamedTuple):
    """seconds: of the whole process. peak: bytes of the largest process of it, pages of mapped files included. said: all output."""

    status: int
    seconds: float
    peak: int
    said: str


class Group:
    """A memory control group."""

    def __init__(self, folder: Path, most_used: str) -> None:
        self.folder, self._most_used = folder, most_used

    def holding(self, command: Sequence[object]) -> list[str]:
        """The command, which first puts itself into the group."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self.folder / "cgroup.procs"), *map(str, command)]

    def peak(self) -> int | None:
        """The most that was used, in bytes, pages of files included; None: the kernel does not tell."""
        try:
            return int((self.folder / self._most_used).read_text())
        except OSError:
            return None


@contextmanager
def limited(size: int) -> Iterator[Group]:
    """A new group, in our own or in the nearest above it that can hold one, that may use so many bytes.

    Raises OSError where none can be made.
    """
    group = _new()
    try:
        limit, peak = next(names for names in _FILES if (group / names[0]).exists())
        (group / limit).write_text(str(size))
        yield Group(group, peak)
    finally:
        _remove(group)


def _new() -> Path:
    error = OSError("no memory controller is mounted")
    for above in control_groups():
        group = above / f"negmerge-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
        except OSError as refused:
            error = refused
            continue
        if any((group / limit).exists() for limit, _ in _FILES):
            return group
        group.rmdir()
    raise error


def _remove(group: Path) -> None:
    for _ in range(50):  # its last process may still be on its way out
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
    group.rmdir()


def why_not() -> str | None:
    """Why no group can be made here; None if one can."""
    try:
        with limited(1 << 30):
            return None
    except OSError as error:
        return f"no memory control group can be made ({error.strerror or error})"


def ended(command: Sequence[object], group: Group | None = None, cwd: Path | None = None) -> Ended:
    """Run a command to its end, in the group."""
    arguments = group.holding(command) if group else list(map(str, command))
    with TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT, cwd=cwd)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Ended(process.returncode, seconds, used.ru_maxrss * 1024, text)

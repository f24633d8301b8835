"""Runs commands as processes, within a memory limit if asked, and measures their time and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from negmerge_fast.core.control_groups import control_groups

# Files of control groups, version 1 and 2: the limit, and the peak.
_FILES = (("memory.limit_in_bytes", "memory.max_usage_in_bytes"), ("memory.max", "memory.peak"))

# Run by a small process in between: before a child becomes another program, its parent's memory counts towards its peak.
_TIMED = """
import os, sys, time
to = int(sys.argv[1])
os.set_inheritable(to, False)
began = time.perf_counter()
child = os.fork()
if not child:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
found = os.waitstatus_to_exitcode(status), time.perf_counter() - began, used.ru_maxrss
os.write(to, " ".join(map(str, found)).encode())
"""


class Ended(NamedTuple):
    """A finished command.

    Attributes:
        status: Its exit status.
        seconds: The time of the whole process.
        peak: Resident bytes of its largest process, pages of mapped files included.
        said: Its output.
    """

    status: int
    seconds: float
    peak: int
    said: str


class Failed(Exception):
    """A command that was to be timed and failed, in one line."""


class Group:
    """A memory control group."""

    def __init__(self, folder: Path, max_memory: str) -> None:
        self.folder, self._max_memory = folder, max_memory

    def holding(self, command: Sequence[object]) -> list[str]:
        """A command line that enters the group before it runs a command."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self.folder / "cgroup.procs"), *map(str, command)]

    def peak(self) -> int | None:
        """Peak bytes of the group, pages of files included; None if the kernel does not tell."""
        try:
            return int((self.folder / self._max_memory).read_text())
        except OSError:
            return None


@contextmanager
def limited(size: int) -> Iterator[Group]:
    """A new group that may use so many bytes, below this process's group or the nearest parent that allows it.

    Raises:
        OSError: If no group can be made.
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
    for _ in range(50):  # its last process may not have ended yet
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
    group.rmdir()


def why_not() -> str | None:
    """Why no control group can be made here; None if one can."""
    try:
        with limited(1 << 30):
            return None
    except OSError as error:
        return f"no memory control group can be made ({error.strerror or error})"


def ended(command: Sequence[object], group: Group | None = None, cwd: Path | None = None) -> Ended:
    """Run a command to its end, in a group if given."""
    arguments = group.holding(command) if group else list(map(str, command))
    reading, writing = os.pipe()
    with TemporaryFile() as said, open(reading) as told:
        timed = [sys.executable, "-c", _TIMED, str(writing), *arguments]
        # What Python has compiled stays, as in users' installations.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run(
            timed, stdout=said, stderr=subprocess.STDOUT, cwd=cwd, pass_fds=[writing], env=inherited
        )
        os.close(writing)
        status, seconds, peak = told.read().split()
        said.seek(0)
        return Ended(int(status), float(seconds), 1024 * int(peak), said.read().decode(errors="replace"))


def done(command: Sequence[object], group: Group | None = None) -> Ended:
    """Run a command that has to succeed. Raises Failed with its last line of output if it does not."""
    found = ended(command, group)
    if found.status:
        last = (found.said.strip().splitlines() or ["it said nothing"])[-1]
        raise Failed(f"exit status {found.status}: {last[:300]}")
    return found


def alternate(
    candidates: Mapping[str, Callable[[], Ended]], rounds: int, before: Callable[[], object]
) -> dict[str, list[Ended]]:
    """Run candidates in turns, so that a drift of the machine affects all of them.

    Args:
        candidates: Functions that run a command, by name.
        rounds: How often each is run.
        before: Done before each run, and not timed.

    Returns:
        What each candidate took in each round.
    """
    found: dict[str, list[Ended]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, candidate in candidates.items():
            before()
            found[name].append(candidate())
            print(f"round {number + 1} of {rounds}: {name}, {found[name][-1].seconds:.2f} s", flush=True)
    return found

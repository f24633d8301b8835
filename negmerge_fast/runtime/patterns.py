"""Regular expressions out of a file, which may be anybody's, evaluated in a process of their own.

Some take for ever and hold the interpreter meanwhile, others make texts that fill the memory. The process has little of either.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from ..core import pairing
from ..core.errors import InputError
from ..core.scales import Scales

# Of the processor, for all names together, and the longest wait for it, where other programs use it too.
_CPU_S, _WAIT_S = 10, 30.0
_MEMORY, _MAX_NAME = 1 << 30, 1 << 16
_PR_SET_PDEATHSIG = 1

# Without the current folder, the environment and site-packages, from which modules would be imported.
_CHILD = (
    "import sys; sys.path.append(sys.argv[1])\n"
    "from negmerge_fast.runtime.patterns import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class BoundedPatterns:
    """The functions of core.pairing that compile regular expressions, bounded in time and memory; a context manager.

    Args:
        where: The file that has the regular expressions, for errors.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        self._child: subprocess.Popen[bytes] | None = None
        self._wait_s = _WAIT_S

    def __enter__(self) -> BoundedPatterns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()

    def choice(self, include: str | None, exclude: str | None) -> pairing.Chosen | None:
        """As pairing.choice."""
        if include is None and exclude is None:
            return None
        self._ask("choice", include, exclude)
        return cache(lambda name: bool(self._ask("is_chosen", name)))

    def compile_renames(self, rename: pairing.Rename) -> pairing.Renames | None:
        """As pairing.compile_renames."""
        if not rename:
            return None
        self._ask("compile_renames", pairing.rename_pairs(rename))
        return cache(lambda name: str(self._ask("renamed", name)))

    def by_name(self, scales: Scales, names: Iterable[str]) -> dict[str, float]:
        """As Scales.by_name."""
        if scales.is_one:
            return scales.by_name(names)
        names = list(names)
        found: Any = self._ask("by_name", scales.pairs, names)
        return dict(zip(names, found, strict=True))

    def _ask(self, *request: object) -> object:
        """Have the child call a method of _Patterns, and return what that returns or raise InputError as it does."""
        child = self._child = self._child or self._start()
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            reply = json.loads(self._line(child.stdout.fileno()))
        except (BrokenPipeError, EOFError):
            raise self._error(f"take too long, expected at most {_CPU_S} s for all names") from None
        if "error" in reply:
            raise InputError(f"{self._where}: {reply['error']}")
        return reply["value"]

    def _error(self, problem: str) -> InputError:
        return InputError(f"{self._where}: include, exclude, rename and scale {problem}")

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).parents[2])
        command = [sys.executable or "", "-I", "-S", "-c", _CHILD, package, str(_CPU_S), str(_MEMORY)]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise self._error(f"need a process of their own ({error.strerror})") from None

    def _line(self, descriptor: int) -> bytes:
        poll, line, began = select.poll(), b"", time.monotonic()
        poll.register(descriptor, select.POLLIN)
        while not line.endswith(b"\n"):
            left_s = self._wait_s - (time.monotonic() - began)
            if left_s <= 0 or not poll.poll(left_s * 1000):
                raise EOFError
            if not (part := os.read(descriptor, 1 << 16)):
                raise EOFError
            line += part
        self._wait_s -= time.monotonic() - began
        return line


class _Patterns:
    """What the child does."""

    def choice(self, include: str | None, exclude: str | None) -> None:
        self._chosen = pairing.choice(include, exclude)

    def is_chosen(self, name: str) -> bool:
        return self._chosen is None or self._chosen(name)

    def compile_renames(self, rename: list[tuple[str, str]]) -> None:
        self._renamed = pairing.compile_renames(rename)

    def renamed(self, name: str) -> str:
        new = self._renamed(name) if self._renamed else name
        if len(new) > _MAX_NAME:
            raise InputError(
                f"rename: makes a name of {len(new):,} characters, expected at most {_MAX_NAME:,}"
            )
        return new

    def by_name(self, pairs: list[tuple[str, float]], names: list[str]) -> list[float]:
        return list(Scales.of(pairs).by_name(names).values())

    def reply(self, method: str, *arguments: Any) -> dict[str, object]:
        try:
            return {"value": getattr(self, method)(*arguments)}
        except InputError as error:
            return {"error": str(error)}
        except MemoryError:
            return {
                "error": "include, exclude, rename or scale: they fill the memory, expected patterns of names"
            }


def serve(cpu_s: int, memory: int) -> None:
    """Answer the lines of standard input, in the child."""
    for what, value in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory)):
        _, hard = resource.getrlimit(what)
        bound = value if hard < 0 else min(value, hard)
        resource.setrlimit(what, (bound, bound))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    patterns = _Patterns()
    for line in sys.stdin:
        print(json.dumps(patterns.reply(*json.loads(line))), flush=True)

"""The command line, run many times in one process with limits of time and memory.

As a program it reads {"folder", "arguments", "user"} from standard input, a line each, and answers {"status", "out", "err"}. What hangs
or crashes has no answer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from negmerge_fast.cli import main, signals

# Bytes of address space on top of what the process has when it begins, and seconds.
_MEMORY_BYTES, _TIMEOUT_S = 512 << 20, 20.0


class Answer(NamedTuple):
    status: int
    out: str
    err: str


def negmerge(*arguments: str) -> Answer:
    """Run the console script in the current directory; an exception that it lets through is printed as a traceback."""
    handlers = {number: signal.getsignal(number) for number in signals._STATUS}
    out, err = io.StringIO(), io.StringIO()
    given, sys.argv = sys.argv, ["negmerge", *arguments]
    status = 1
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        sys.argv = given
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Answer(status, out.getvalue(), err.getvalue())


class Process:
    """Such a process, from the caller's side."""

    def __init__(self, *modules: str) -> None:
        """modules: what is imported before memory is limited, beside what a merge of files imports."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def negmerge(self, folder: Path, *arguments: str, user: int | None = None) -> Answer:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(
            json.dumps({"folder": str(folder), "arguments": arguments, "user": user}) + "\n"
        )
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"no answer: ended by {-self._process.wait()}"
        return Answer(**json.loads(answer))

    def close(self) -> None:
        self._process.communicate()


def _answer(folder: str, arguments: Sequence[str], user: int | None) -> Answer:
    os.chdir(folder)
    if user is not None:
        os.seteuid(user)
    try:
        return negmerge(*arguments)
    finally:
        os.seteuid(os.getuid())


def _serve() -> None:
    from negmerge_fast.streaming import api  # noqa: F401  what a merge imports

    for module in sys.argv[1:]:
        importlib.import_module(module)
    answers = sys.stdout
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, _TIMEOUT_S)
        answer = _answer(**json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    _serve()

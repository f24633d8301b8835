"""Signals, and what a process says last: one line, and a status."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from ..core.errors import escape

_STATUS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
_WORD = {signal.SIGHUP: "hung up", signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """A signal asked the job to stop."""


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP, unless they are ignored already (by nohup, say).

    While nothing is at stake (imports, checks) they end the process at once, without unwinding somebody else's
    half-done import; during a job they are noted, and the job's own progress calls raise.
    """

    def __init__(self) -> None:
        self.guarded = False
        self.received: int | None = None
        self.ranks: Any = None
        for number in _STATUS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self.guarded:
            if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
                os.write(2, f"negmerge: {_WORD[signal.Signals(number)]}\n".encode())
            os._exit(_STATUS[signal.Signals(number)])

    def check(self) -> None:
        if self.received is not None:
            raise Stopped

    def stopped(self) -> int:
        """Say that, and why; of several processes one speaks."""
        assert self.received is not None
        received = signal.Signals(self.received)
        dead_peer = self.ranks.dead_peer() if self.ranks else None
        if self.ranks and not self.ranks.is_lowest_alive():
            return 1
        return fail(dead_peer or _WORD[received], 1 if dead_peer else _STATUS[received])

    def place(self) -> str:
        """Which of several processes this is."""
        return f"rank {self.ranks.rank}: " if self.ranks and self.ranks.rank else ""

    def ignore(self) -> None:
        """What happened has been said: a signal during the interpreter's own clean-up must not change the status."""
        for number in _STATUS:
            signal.signal(number, signal.SIG_IGN)


def fail(message: str, status: int) -> int:
    print("negmerge: " + escape(" ".join(message.splitlines())), file=sys.stderr)
    return status

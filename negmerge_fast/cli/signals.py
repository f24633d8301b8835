"""Signals during a command, and the last line and the status of a process."""

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
    """A signal was received that stops the job."""


class Signals:
    """Handlers of Ctrl-C, SIGTERM and SIGHUP, unless these are ignored already, as by nohup.

    Before a job (imports, checks) a signal ends the process at once, without unwinding an import of another package.
    During a job it is recorded, and the next call of check raises.

    Attributes:
        guarded: Whether a job runs.
        received: The signal that was received last.
        ranks: The ranks of the job, once they are known.
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
            if os.environ.get("RANK", "0") == "0":  # of several ranks, one reports it
                os.write(2, f"negmerge: {_WORD[signal.Signals(number)]}\n".encode())
            os._exit(_STATUS[signal.Signals(number)])

    def check(self) -> None:
        """Raise Stopped if a signal was received."""
        if self.received is not None:
            raise Stopped

    def stopped(self) -> int:
        """Report the signal, or the dead rank that caused it, and return the exit status; of several ranks one reports."""
        assert self.received is not None
        received = signal.Signals(self.received)
        dead_peer = self.ranks.dead_peer() if self.ranks else None
        if self.ranks and not self.ranks.is_lowest_alive():
            return 1
        return fail(dead_peer or _WORD[received], 1 if dead_peer else _STATUS[received])

    def rank_prefix(self) -> str:
        """Return the prefix of this rank's errors; it is empty for rank 0."""
        return f"rank {self.ranks.rank}: " if self.ranks and self.ranks.rank else ""

    def ignore(self) -> None:
        """Ignore signals from now on: during the interpreter's clean-up none must change the status."""
        for number in _STATUS:
            signal.signal(number, signal.SIG_IGN)


def fail(message: str, status: int) -> int:
    """Print an error in one line and return the exit status."""
    print("negmerge: " + escape(" ".join(message.splitlines())), file=sys.stderr)
    return status

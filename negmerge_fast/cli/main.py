"""Entry point of the negmerge command.

Exit status: 0 done; 1 the job failed; 2 bad usage or bad input; 129 hung up; 130 interrupted; 143 terminated. Errors
are one line.
"""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from ..core.errors import escape
from .signals import Signals, Stopped, fail


def main() -> NoReturn:
    """Run the command and exit with its status."""
    _fill_standard_streams()
    signals = Signals()  # before the slow imports, so that Ctrl-C during one is no traceback
    try:
        from .commands import negmerge

        status = negmerge.main(prog_name="negmerge", standalone_mode=False, obj=signals) or 0
        sys.stdout.flush()
    except BaseException as error:
        status = _report(error, signals)
    try:
        sys.stdout.flush()
    except OSError:  # reported above; the interpreter would report it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signals.ignore()
    if signals.ranks:
        signals.ranks.leave()
    sys.exit(status)


def _report(error: BaseException, signals: Signals) -> int:
    """Report an error in one line, and return the exit status; raise what is a defect."""
    import click

    from ..core.errors import InputError
    from ..runtime.distributed import PeerError

    match error:
        case Stopped():
            return signals.stopped()
        case PeerError():
            return 2 if isinstance(error, InputError) else 1
        case click.exceptions.NoArgsIsHelpError():
            print(error.format_message())
            return 2
        case click.ClickException():
            return fail(error.format_message(), 2)
        case click.Abort():
            return fail("interrupted", 130)
        case InputError():
            return fail(str(error), 2)
        case BrokenPipeError():
            return 1  # the reader of the output has closed it
        case OSError() | MemoryError() | ImportError() | RuntimeError():  # torch's device errors too
            # When one of several ranks has died, torchrun stops the others: their errors from then on are not reported.
            if signals.received is not None and signals.ranks and signals.ranks.count > 1:
                return signals.stopped()
            return fail(signals.rank_prefix() + _describe(error), 1)
    raise error


def _fill_standard_streams() -> None:
    """Open /dev/null for closed standard streams, so that no other file gets their descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not show all names
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _describe(error: BaseException) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{escape(str(error.filename))}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__

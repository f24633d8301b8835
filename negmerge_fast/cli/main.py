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
    status = _run(signals)
    try:
        sys.stdout.flush()
    except OSError:  # reported above; the interpreter would report it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signals.ignore()
    if signals.ranks:
        signals.ranks.leave()
    sys.exit(status)


def _run(signals: Signals) -> int:
    """Run the command, report an error in one line, and return the exit status."""
    import click

    from ..core.errors import InputError
    from ..runtime.distributed import PeerError

    try:
        from .commands import negmerge

        status: int | None = negmerge.main(prog_name="negmerge", standalone_mode=False, obj=signals)
        sys.stdout.flush()
        return status or 0
    except Stopped:
        return signals.stopped()
    except PeerError as error:
        return 2 if isinstance(error, InputError) else 1
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        return fail(error.format_message(), 2)
    except click.Abort:
        return fail("interrupted", 130)
    except InputError as error:
        return fail(str(error), 2)
    except BrokenPipeError:
        return 1  # the reader of the output has closed it
    except (OSError, MemoryError, ImportError, RuntimeError) as error:  # torch's device errors too
        # When one of several ranks has died, torchrun stops the others: their errors from then on are not reported.
        if signals.received is not None and signals.ranks and signals.ranks.count > 1:
            return signals.stopped()
        return fail(signals.rank_prefix() + _describe(error), 1)


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

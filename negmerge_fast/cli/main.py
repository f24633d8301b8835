"""The command line: thin, and quiet about everything but the job.

Exit status: 0 done; 1 the job failed; 2 bad usage or bad input; 129 hung up; 130 interrupted; 143 terminated. An error
is one line.
"""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from ..core.errors import escape
from .commands import _commands
from .signals import Signals, Stopped, fail


def main() -> NoReturn:
    """The console script."""
    _fill_standard_streams()
    signals = Signals()  # before the imports that take long
    import click

    from ..core.errors import InputError
    from ..runtime.distributed import PeerError

    status = 0
    try:
        status = _commands(signals).main(prog_name="negmerge", standalone_mode=False) or 0
        sys.stdout.flush()
    except Stopped:
        status = signals.stopped()
    except PeerError as error:
        status = 2 if isinstance(error, InputError) else 1
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        status = 2
    except click.ClickException as error:
        status = fail(error.format_message(), 2)
    except click.Abort:
        status = fail("interrupted", 130)
    except InputError as error:
        status = fail(str(error), 2)
    except BrokenPipeError:
        status = 1  # whoever read the output has heard enough
    except (
        OSError,
        MemoryError,
        ImportError,
        RuntimeError,
    ) as error:  # a device's faults are RuntimeErrors of torch
        # Of several processes, all are told to stop when one has died: what fails from then on is no news.
        told = signals.received is not None and signals.ranks and signals.ranks.count > 1
        status = signals.stopped() if told else fail(signals.place() + _describe(error), 1)
    try:
        sys.stdout.flush()
    except OSError:  # said above; the interpreter would say it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signals.ignore()
    if signals.ranks:
        signals.ranks.leave()
    sys.exit(status)


def _fill_standard_streams() -> None:
    """Where a standard stream is closed, open nothing in its place: a file of ours must not get its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{escape(str(error.filename))}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__

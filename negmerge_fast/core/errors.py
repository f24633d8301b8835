"""Errors in one line."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Sequence


def escape(text: str) -> str:
    """Escape what is not printable, as in a string literal: the result is one line without control characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 200
_SHORT_REPR.maxlist = _SHORT_REPR.maxtuple = 8


def short_repr(value: object) -> str:
    """A repr of bounded length: what a file says may be a name of a megabyte or a thousand nested lists."""
    return _SHORT_REPR.repr(value)


def some_names(names: Sequence[str], count: int = 3) -> str:
    """A few of some names, for a line of bounded length."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(map(short_repr, names[:count])) + more


class InputError(ValueError):
    """A user's mistake, in one line: where, what was found, what was expected."""

    def __str__(self) -> str:
        return escape(super().__str__())


class MergeWarning(UserWarning):
    """Something about a merge that its user should know, in one line. The merge goes on."""


def stacklevel() -> int:
    """What warnings.warn has to be given by the caller of this to tell of the user's line: the first outside of the package."""
    package, frame, level = __name__.partition(".")[0], sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise InputError unless the value of an option is one of its choices."""
    if value not in (allowed := tuple(choices)):
        raise InputError(f"{name}: {value!r}, expected one of {', '.join(allowed)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]

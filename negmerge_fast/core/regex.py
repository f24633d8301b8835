"""Regular expressions out of a file, which may be anybody's, matched in a time that is linear in the text.

Those of Python may take for ever. Here all alternatives are followed at once, so there are no lookarounds, references to groups and
atomic groups.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from .errors import InputError, short_repr

# What parses for re has no public name; in Python 3.10 it is a module of its own.
parser: Any = re._parser if hasattr(re, "_parser") else importlib.import_module("sre_parse")

# Of one expression, whose parts are repeated as often as it says, and of a text.
_MAX_STATES, _MAX_TEXT = 2000, 4096
# Of all texts and patterns together; some seconds. Ten patterns for 3,000 experts take a third of it.
_MAX_STEPS = 20_000_000

_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}

_Test = Callable[[str], bool]
_Condition = Callable[[str, int], bool]

_CONDITIONS: dict[str, _Condition] = {
    "AT_BEGINNING": lambda text, at: at == 0,
    "AT_BEGINNING_STRING": lambda text, at: at == 0,
    "AT_END": lambda text, at: at == len(text) or text[at:] == "\n",
    "AT_END_STRING": lambda text, at: at == len(text),
    "AT_BOUNDARY": lambda text, at: _is_boundary(text, at),
    "AT_NON_BOUNDARY": lambda text, at: not _is_boundary(text, at),
}


class LinearPattern:
    """What re.match(pattern, text) finds is found, without its worst case.

    Args:
        pattern: The regular expression.
        steps: Takes the steps of all texts; expressions that share it share their bound.

    Raises:
        InputError: If it is none, or one of those that are not supported.
    """

    def __init__(self, pattern: str, steps: list[int] | None = None) -> None:
        self._pattern = pattern
        # Of each state, the test of the next character or the condition, or None, and where it leads.
        self._tests: list[tuple[_Test | None, _Condition | None]] = []
        self._next: list[list[int]] = []
        self._steps = [] if steps is None else steps
        self._steps[:] = self._steps or [0]
        try:
            parsed = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{short_repr(pattern)}: no regular expression ({error})") from None
        if parsed.state.flags & ~re.UNICODE.value:
            raise self._unsupported("a flag")
        self._end = self._state()
        try:
            self._start = self._sequence(parsed, self._end)
        except RecursionError:
            raise self._unsupported("so deep a nesting") from None

    def match(self, text: str) -> bool:
        """Whether the beginning of a text matches."""
        if len(text) > _MAX_TEXT:
            raise InputError(
                f"{short_repr(text[:40])}…: {len(text):,} characters, expected at most {_MAX_TEXT:,}"
            )
        states = self._closure([self._start], text, 0)
        for at, character in enumerate(text):
            if self._end in states or not states:
                break
            tests = self._tests
            passed = [s for s in states if (test := tests[s][0]) is not None and test(character)]
            states = self._closure((n for s in passed for n in self._next[s]), text, at + 1)
        return self._end in states

    def _closure(self, states: Any, text: str, at: int) -> set[int]:
        """The states, and all that they lead to without a character."""
        pending, found = list(states), set[int]()
        while pending:
            state = pending.pop()
            if state in found:
                continue
            found.add(state)
            test, condition = self._tests[state]
            if test is None and (condition is None or condition(text, at)):
                pending += self._next[state]
        self._steps[0] += len(found) + 1
        if self._steps[0] > _MAX_STEPS:
            raise InputError(f"{short_repr(self._pattern)}: takes too long for so many names")
        return found

    def _state(
        self,
        next_states: list[int] | None = None,
        test: _Test | None = None,
        condition: _Condition | None = None,
    ) -> int:
        if len(self._next) == _MAX_STATES:
            raise self._unsupported("so many repetitions")
        self._tests.append((test, condition))
        self._next.append(next_states or [])
        return len(self._next) - 1

    def _sequence(self, parsed: Any, end: int) -> int:
        """Add the states of a sequence before a state, and return the first."""
        for operation, argument in reversed(list(parsed)):
            end = self._item(str(operation), argument, end)
        return end

    def _item(self, operation: str, argument: Any, end: int) -> int:
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(least, most, inner, end)
        if operation == "BRANCH":
            return self._state([self._sequence(branch, end) for branch in argument[1]])
        if operation == "SUBPATTERN":
            _, added, removed, inner = argument
            if added or removed:
                raise self._unsupported("a flag")
            return self._sequence(inner, end)
        if operation == "AT":
            return self._state([end], condition=_CONDITIONS[str(argument)])
        return self._state([end], test=self._test(operation, argument))

    def _repeat(self, least: int, most: Any, inner: Any, end: int) -> int:
        if most == parser.MAXREPEAT:
            loop = self._state()
            self._next[loop] += [self._sequence(inner, loop), end]
            end = loop
        else:
            for _ in range(most - least):
                end = self._state([self._sequence(inner, end), end])
        for _ in range(least):
            end = self._state([self._sequence(inner, end)])
        return end

    def _test(self, operation: str, argument: Any) -> _Test:
        if operation == "LITERAL":
            return chr(argument).__eq__
        if operation == "NOT_LITERAL":
            return chr(argument).__ne__
        if operation == "ANY":
            return "\n".__ne__
        if operation != "IN":
            raise self._unsupported(operation.lower().replace("_", " "))
        return _in_class([(str(kind), value) for kind, value in argument])

    def _unsupported(self, what: str) -> InputError:
        return InputError(
            f"{short_repr(self._pattern)}: {what} in a regular expression is not supported here"
        )


def _in_class(items: list[tuple[str, Any]]) -> _Test:
    negated = items[0][0] == "NEGATE"
    tests = list(_class_tests(items[negated:]))
    return lambda character: any(test(character) for test in tests) != negated


def _class_tests(items: list[tuple[str, Any]]) -> Iterator[_Test]:
    for kind, value in items:
        if kind == "CATEGORY":
            matched = re.compile(_CATEGORIES[str(value)]).match
            yield lambda character, matched=matched: matched(character) is not None  # type: ignore[misc]
        else:
            low, high = value if kind == "RANGE" else (value, value)
            yield lambda character, low=low, high=high: low <= ord(character) <= high  # type: ignore[misc]


def _is_boundary(text: str, at: int) -> bool:
    before, after = text[at - 1 : at] if at else "", text[at : at + 1]
    return bool(re.match(r"\w", before)) != bool(re.match(r"\w", after))

"""JSON of untrusted files, parsed strictly."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from ..core.errors import InputError, first_line, short_repr
from .lfs import refuse_pointer

# Parsing takes many times the memory of short keys, texts, numbers and lists. In a header an entry of 53 bytes or more has a
# name, five texts, three brackets, and a comma for each extent and four others; in an index a name has its shard. Half of the
# bytes that these have on average are required: then a text takes at most 16 times its size. A short text takes little.
_MIN_CHECKED_BYTES = 1 << 20
_BYTES_PER_KEY, _BYTES_PER_QUOTE, _BYTES_PER_COMMA, _BYTES_PER_BRACKET = 24, 4, 5, 16
# 2^63 with a sign: longer numbers take long to parse, and no real file has one.
_MAX_INTEGER_DIGITS = 20
_ODD_INTEGER = re.compile(rb"-0|[0-9-]{%d}" % (_MAX_INTEGER_DIGITS + 1))


def parse_json(
    raw: bytearray, path: Path, what: str, surrogates: bool = False, dense: bool = False
) -> dict[str, Any]:
    """Parse a JSON object strictly, as parse_value does.

    Raises:
        InputError: If it is none.
    """
    value = parse_value(raw, path, what, surrogates, dense)
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} is a JSON {type(value).__name__}, expected an object")
    return value


def parse_value(raw: bytearray, path: Path, what: str, surrogates: bool = False, dense: bool = False) -> Any:
    """Parse JSON without repeated keys, lone surrogates, NaN and very long numbers; -0 becomes a float.

    Args:
        raw: UTF-8 text.
        path: The file, for errors.
        what: What the text is, for errors.
        surrogates: Whether lone surrogates are allowed: they stand for names of files that are not UTF-8.
        dense: Whether little but brackets, quotes, commas and keys is allowed: this program has written it.

    Raises:
        InputError: If it is none, or a Git LFS pointer.
    """
    refuse_pointer(path, raw)
    if len(raw) > _MIN_CHECKED_BYTES and not dense:
        _refuse_dense(raw, path, what)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InputError(f"{path}: {what} names {short_repr(twice)} twice")
        return found

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            # Slow, and rarely needed: a header has at least three integers per tensor.
            parse_int=_integer if _ODD_INTEGER.search(raw) else None,
            parse_constant=_refuse_constant,
        )
        if not surrogates and b"\\ud" in raw.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{path}: {what} is not JSON ({reason[:120]})") from None
    return value


def _refuse_dense(raw: bytearray, path: Path, what: str) -> None:
    """Raise InputError for a text of little but brackets, quotes, commas and keys, before it is parsed."""
    # The keys of an entry are in every entry, and take no memory; metadata may be JSON within a text, whose quotes have
    # backslashes.
    keys = raw.count(b":") - 3 * raw.count(b'"data_offsets":') - raw.count(b'\\":') + raw.count(b'\\\\":')
    counted = (
        ("brackets", raw.count(b"[") + raw.count(b"{"), _BYTES_PER_BRACKET),
        ("quotes", raw.count(b'"'), _BYTES_PER_QUOTE),
        ("commas", raw.count(b","), _BYTES_PER_COMMA),
        ("short keys", keys, _BYTES_PER_KEY),
    )
    for mostly, count, size in counted:
        if count > len(raw) // size:
            raise InputError(f"{path}: {what} is mostly {mostly}, expected names of tensors")


def _integer(text: str) -> int | float:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def are_sizes(value: Any) -> bool:
    """Whether a value is a list of sizes or offsets that a file can have."""
    if not isinstance(value, list) or len(value) > 64:  # bounds the time that a product of them takes
        return False
    for item in value:  # noqa: SIM110 (a generator takes twice as long)
        if type(item) is not int or not 0 <= item < 1 << 63:
            return False
    return True


def is_shape(value: Any) -> bool:
    """Whether a value is a list of sizes whose products fit 64 bits, as other programs require."""
    return are_sizes(value) and max(accumulate(value, mul), default=0) < 1 << 64

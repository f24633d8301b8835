"""What a pickle would call, and the values in it. Nothing is unpickled."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# Pickles that call anything of these hold arrays; but for types and single numbers.
_ARRAY_PACKAGES = frozenset({
    "numpy", "torch", "jax", "jaxlib", "flax", "tensorflow", "keras", "paddle", "mxnet", "mlx", "cupy", "sklearn", "scipy",
    "pandas", "joblib", "xgboost", "lightgbm", "array",
})  # fmt: skip
_NO_ARRAYS = re.compile(r"dtype|scalar|device|Size|b?float\d+|u?int\d+|bool_?")


class Pickle(NamedTuple):
    """What is in a pickle.

    Attributes:
        builds_arrays: Whether it calls something of a package for arrays, or something that it does not name plainly.
        floats: How many numbers with a fraction it has.
        longest: The length of its longest bytes.
    """

    builds_arrays: bool
    floats: int
    longest: int


def read_pickle(raw: bytes) -> Pickle:
    """Read a pickle.

    Raises:
        Exception: Of many types, if it is none, or if something follows it.
    """
    import pickletools  # slow to import, for few checkpoints

    called: list[tuple[Any, Any]] = []
    pushed: list[Any] = [None, None]  # the last two, if they are text
    memo: dict[Any, Any] = {}
    floats = longest = longest_text = end = 0
    argument: Any
    for opcode, argument, position in pickletools.genops(raw):
        end = (position or 0) + 1
        if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = pushed[-1]
            continue
        floats += isinstance(argument, float)
        if isinstance(argument, (bytes, bytearray)):
            longest = max(longest, len(argument))
        elif "UNICODE" in opcode.name:
            longest_text = max(longest_text, len(argument))
        if opcode.name in ("GLOBAL", "INST"):
            called.append(tuple(argument.split(" ", 1)))
            argument = None
        elif opcode.name == "STACK_GLOBAL":
            called.append((pushed[0], pushed[1]))
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            argument = memo.get(argument)
        elif not opcode.stack_after:
            continue
        pushed = [pushed[-1], argument if isinstance(argument, str) else None]
    if end != len(raw):
        raise ValueError(f"{len(raw) - end} bytes behind the end")
    if ("_codecs", "encode") in called:  # how protocols before 3 have bytes
        longest = max(longest, longest_text)
    return Pickle(any(_is_array(*name) for name in called), floats, longest)


def _is_array(module: str | None, name: str | None) -> bool:
    if module is None or name is None:
        return True
    return module.partition(".")[0] in _ARRAY_PACKAGES and not _NO_ARRAYS.fullmatch(name)

"""Memory that a streamed merge may take, and what it makes of it: how many lanes, and how long the strokes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from . import checksums
from .rule import InputError

# The shortest stroke for one file that is worth a system call.
_SHORTEST = 4096
# What the interpreter's own objects take while a job runs, and what it knows of each tensor of each version.
_OBJECTS, _OF_A_TENSOR = 4 << 20, 512
_FEWEST_LANES = 2


def parse_size(size: int | str) -> int:
    """Bytes from "512MiB", "1.5 GB" or a number."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(size), re.IGNORECASE)
    if not found:
        raise InputError(f"memory_budget: {size!r}, expected a size such as 512MiB or 1GB")
    number, letter, binary = found.groups()
    power = "KMGT".index(letter.upper()) + 1 if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def fit(
    room: int,
    what: str,
    *,
    models: int,
    tensors: int,
    sizes: Collection[int],
    lanes: int,
    longest: int,
    scratch: int,
    block: int,
) -> tuple[int, int, int]:
    """As many lanes and as long strokes as there is room for, and the memory that the job then takes, in bytes.

    what: that there is no more room than that. tensors: of all versions together. sizes: of the output's files. scratch: how
    many temporaries a merge has, each as long as a stroke, in a wider type perhaps, or a block. Strokes become shorter before
    lanes become fewer, down to an eighth of the longest.
    """

    def memory() -> int:
        of_a_lane = (models + 1) * chunk + scratch * min(4 * chunk, block)
        return lanes * of_a_lane + _OBJECTS + tensors * _OF_A_TENSOR + checksums.memory(sizes, lanes)

    chunk = longest
    while memory() > room and chunk > _SHORTEST:
        chunk //= 2
        if chunk < longest // 8 and lanes > _FEWEST_LANES:
            lanes, chunk = max(lanes // 2, _FEWEST_LANES), longest
    if memory() > room:
        raise InputError(
            f"{what}: {room:,} bytes, expected at least {memory():,} for {models} models and their {tensors:,} tensors"
        )
    return lanes, chunk, memory()


def free_memory() -> int:
    """Bytes that could still be used: what the machine has available, or what the control group allows."""
    found = [1 << 62]
    for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        if available := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            found.append(int(available[1]) * 1024)
        elif text.strip().isdigit():
            found.append(int(text))
    return min(found)

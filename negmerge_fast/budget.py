"""Memory that a streamed merge may take, and what it makes of it: how many lanes, and how long the strokes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

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


def room(size: int | str | None) -> tuple[str, int]:
    """What a job may take, in bytes, and what to call it; None or "auto": half of what is free now.

    Of several processes that torchrun started on a machine, each takes its part of that.
    """
    if size is None or size == "auto":
        beside = os.environ.get("LOCAL_WORLD_SIZE", "")
        return "half of the free memory", free_memory() // 2 // max(
            int(beside) if beside.isdecimal() else 1, 1
        )
    return "memory_budget", parse_size(size)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that could still be used: what the machine has available, and each memory control group that we are in.

    root: where /proc and /sys are found.
    """
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    machine = int(available[1]) * 1024 if available else 1 << 62
    return min([machine, *(_free_in(group) for group in control_groups(root))])


def control_groups(root: Path = Path("/")) -> Iterator[Path]:
    """The directories of the memory control groups that this process is in, each with all that are mounted above it."""
    mounts = [line.split(" - ") for line in _text(root / "proc/self/mountinfo").splitlines()]
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        for place, what in mounts:
            kind, *_, options = what.split()
            if kind != ("cgroup2" if number == "0" else "cgroup"):
                continue
            if number != "0" and "memory" not in options.split(","):
                continue
            _, _, _, top, mounted, *_ = place.split()
            # In a container the path may be one of the host's, of which only the end, or nothing, is mounted.
            below = PurePosixPath(path)
            inside = below.relative_to(top) if below.is_relative_to(top) else PurePosixPath()
            inside = PurePosixPath() if ".." in inside.parts else inside
            yield from (root / mounted.lstrip("/") / each for each in (inside, *inside.parents))


def _free_in(group: Path) -> int:
    """What a control group, of the first or the second kind, may still use: its pages of files can be given back."""
    stated = [_text(group / name).strip() for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limits = [int(text) for text in stated if text.isdigit()]
    used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
    if not used or not limits:
        return 1 << 62
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    # The first kind counts the groups within only in what it calls total.
    total = "total_" if "total_active_file" in stat else ""
    given_back = sum(int(stat.get(f"{total}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, min(limits) - max(0, int(used) - given_back))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

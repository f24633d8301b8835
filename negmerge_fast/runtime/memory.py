"""Free memory of the machine and its control groups."""

from __future__ import annotations

import re
from pathlib import Path

from ..core.control_groups import control_groups, text_of
from ..core.errors import InputError


def parse_size(size: int | str) -> int:
    """Parse a size such as "512MiB" or "1.5 GB", or a number of bytes.

    Raises:
        InputError: If it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(size), re.IGNORECASE)
    if not found:
        raise InputError(f"memory_budget: {size!r}, expected a size such as 512MiB or 1GB")
    number, letter, binary = found.groups()
    power = "KMGT".index(letter.upper()) + 1 if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still use, by the machine and by each of its memory control groups.

    Args:
        root: The folder that holds /proc and /sys.
    """
    available = re.search(r"^MemAvailable:\s+(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE)
    machine = int(available[1]) * 1024 if available else 1 << 62
    return min([machine, *(_free_in(group) for group in control_groups(root))])


def _free_in(group: Path) -> int:
    """Return the bytes that a control group (version 1 or 2) may still use; its cached file pages count as free."""
    stated = [
        text_of(group / name).strip() for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
    ]
    limits = [int(text) for text in stated if text.isdigit()]
    used = text_of(group / "memory.current") or text_of(group / "memory.usage_in_bytes")
    if not used or not limits:
        return 1 << 62
    stat = dict(line.split() for line in text_of(group / "memory.stat").splitlines())
    # In version 1 only the "total_" fields include the child groups.
    total = "total_" if "total_active_file" in stat else ""
    reclaimable = sum(int(stat.get(f"{total}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, min(limits) - max(0, int(used) - reclaimable))

"""Control groups of this process: where the system writes down what it may use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath


def control_groups(root: Path = Path("/"), controller: str = "memory") -> Iterator[Path]:
    """Yield the directories of this process's control groups, each followed by its parents up to the mount.

    Args:
        root: The folder that holds /proc and /sys.
        controller: What the groups control. In version 2 one tree of groups controls everything.
    """
    mounts = [line.split(" - ") for line in text_of(root / "proc/self/mountinfo").splitlines()]
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        for mount, filesystem in mounts:
            kind, *_, options = filesystem.split()
            if kind != ("cgroup2" if number == "0" else "cgroup"):
                continue
            if number != "0" and controller not in options.split(","):
                continue
            _, _, _, top, mounted, *_ = mount.split()
            # In a container the path may be the host's. Then only its end is mounted, or nothing of it.
            path_in_group = PurePosixPath(path)
            inside = path_in_group.relative_to(top) if path_in_group.is_relative_to(top) else PurePosixPath()
            inside = PurePosixPath() if ".." in inside.parts else inside
            yield from (root / mounted.lstrip("/") / each for each in (inside, *inside.parents))


@lru_cache
def granted_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs' time the control groups grant, rounded up; a large number if they grant all.

    Args:
        root: The folder that holds /proc and /sys.
    """
    return min(map(_granted_by, control_groups(root, "cpu")), default=_ALL)


_ALL = 1 << 20


def _granted_by(group: Path) -> int:
    """Return the CPUs that one control group (version 1 or 2) grants."""
    stated = text_of(group / "cpu.max").split() or [
        text_of(group / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    if len(stated) != 2 or not all(text.isdecimal() and int(text) for text in stated):
        return _ALL
    quota, period = map(int, stated)
    return -(-quota // period)


def text_of(path: Path) -> str:
    """Return what a file of the system says; nothing if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""

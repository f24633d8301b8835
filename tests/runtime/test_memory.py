"""Free memory of the machine and its control groups, and sizes as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from negmerge_fast import InputError
from negmerge_fast.runtime import memory

MACHINE = 8 << 30
FIRST = "4:memory:{}\n1:cpu:/elsewhere\n", "32 31 0:29 {} {} rw shared:9 - cgroup cgroup rw,memory\n"
SECOND = "0::{}\n", "33 31 0:30 {} {} rw - cgroup2 cgroup2 rw,nsdelegate\n"
OTHERS = "30 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


def machine(
    root: Path, kind: tuple[str, str], path: str, top: str = "/", mounted: str = "/sys/fs/cgroup/m"
) -> Path:
    """A root in which this process is in one control group; returns where the groups are mounted."""
    own, mount = kind
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {MACHINE >> 10} kB\nBuffers: 5 kB\n")
    (root / "proc/self/cgroup").write_text(own.format(path))
    (root / "proc/self/mountinfo").write_text(OTHERS + mount.format(top, mounted))
    groups = root / mounted.lstrip("/")
    groups.mkdir(parents=True)
    return groups


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_without_a_control_group_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    machine(tmp_path, SECOND, "/")
    assert memory.free_memory(tmp_path) == MACHINE
    assert memory.free_memory(tmp_path / "nothing") == 1 << 62


def test_a_group_of_the_second_kind(tmp_path: Path) -> None:
    own = machine(tmp_path, SECOND, "/a/b") / "a/b"
    group(own, max=1000, current=900, stat="anon 200\nactive_file 300\ninactive_file 400\nshmem 50")
    assert memory.free_memory(tmp_path) == 1000 - 900 + 300 + 400
    group(own, high=850)
    assert memory.free_memory(tmp_path) == 850 - 900 + 300 + 400
    group(own, current=5000)
    assert memory.free_memory(tmp_path) == 0
    group(own, max="max", high="max")
    assert memory.free_memory(tmp_path) == MACHINE


def test_a_group_of_the_first_kind_counts_those_within(tmp_path: Path) -> None:
    own = machine(tmp_path, FIRST, "/a") / "a"
    stat = "active_file 1\ninactive_file 2\ntotal_active_file 30\ntotal_inactive_file 40"
    group(own, limit_in_bytes=1000, usage_in_bytes=900, stat=stat)
    assert memory.free_memory(tmp_path) == 1000 - 900 + 30 + 40
    group(own, limit_in_bytes=9223372036854771712)
    assert memory.free_memory(tmp_path) == MACHINE


@pytest.mark.parametrize("kind", [FIRST, SECOND])
def test_the_tightest_of_the_groups_above_counts(tmp_path: Path, kind: tuple[str, str]) -> None:
    mounted = machine(tmp_path, kind, "/a/b")
    names = ("limit_in_bytes", "usage_in_bytes") if kind is FIRST else ("max", "current")
    for folder, limit in ((mounted / "a/b", 1000), (mounted / "a", 500), (mounted, 700)):
        group(folder, **dict(zip(names, (limit, 100), strict=True)))
    assert memory.free_memory(tmp_path) == 400


@pytest.mark.parametrize("path", ["/docker/1", "/docker/1/b", "/elsewhere", "/../b"])
def test_in_a_container_the_groups_are_where_they_are_mounted(tmp_path: Path, path: str) -> None:
    mounted = machine(tmp_path, FIRST, path, top="/docker/1")
    group(mounted, limit_in_bytes=1000, usage_in_bytes=100)
    assert memory.free_memory(tmp_path) == 900


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 << 20), ("1GB", 10**9), (" 1.5 GB ", 1_500_000_000), ("2k", 2000), ("3KIB", 3072), ("1TiB", 1 << 40),
        ("7b", 7), ("7", 7), (7, 7), ("0", 0),
    ],
)  # fmt: skip
def test_sizes(text: int | str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1 MiB more", "1PiB", "1iB", "nan", "9" * 19])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"^memory_budget: '.*', expected a size such as 512MiB or 1GB$"):
        memory.parse_size(text)

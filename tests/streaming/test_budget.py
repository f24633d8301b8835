"""What memory a merge takes: what the machine and its control groups have free, and no more than the budget in a real group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import load_model, negmerge, save_model

from negmerge_fast import InputError, merge_checkpoints
from negmerge_fast.runtime import memory
from negmerge_fast.streaming import api, budget

BENCH = Path(__file__).parents[2] / "bench"
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
    for place, limit in ((mounted / "a/b", 1000), (mounted / "a", 500), (mounted, 700)):
        group(place, **dict(zip(names, (limit, 100), strict=True)))
    assert memory.free_memory(tmp_path) == 400


@pytest.mark.parametrize("path", ["/docker/1", "/docker/1/b", "/elsewhere", "/../b"])
def test_in_a_container_the_groups_are_where_they_are_mounted(tmp_path: Path, path: str) -> None:
    mounted = machine(tmp_path, FIRST, path, top="/docker/1")
    group(mounted, limit_in_bytes=1000, usage_in_bytes=100)
    assert memory.free_memory(tmp_path) == 900


@pytest.mark.parametrize("given", [None, "auto"])
def test_the_usual_budget_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1001)
    assert budget.room(given) == ("half of the free memory", 500)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget.room(given) == ("half of the free memory", 125)
    assert budget.room("2KiB") == ("memory_budget", 2048)


def models(folder: Path, numel: int) -> list[Path]:
    paths = [folder / name for name in ("base", "ft-0", "ft-1")]
    for k, path in enumerate(paths):
        save_model(path, {"w": torch.randn(numel, generator=torch.Generator().manual_seed(k))})
    return paths


def test_a_merge_takes_no_more_than_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *finetuned = models(tmp_path, 1000)
    usual = api.prepare(base, finetuned, tmp_path / "out", scale=0.9)
    monkeypatch.setattr(memory, "free_memory", lambda: 10 << 20)
    job = api.prepare(base, finetuned, tmp_path / "out", scale=0.9)
    assert job.memory <= 5 << 20 < usual.memory
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"^half of the free memory: 524,288 bytes, expected at least"):
        merge_checkpoints(base, finetuned, tmp_path / "out", scale=0.9)
    assert not (tmp_path / "out").exists()


def test_a_merge_within_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 128 MiB each, and lanes that would take 192 MiB, in a group that may use 96 MiB; the same bytes as without."""
    monkeypatch.syspath_prepend(str(BENCH))
    import processes

    if reason := processes.why_not():
        pytest.skip(reason)
    models(tmp_path, 1 << 25)
    merge = (
        "merge",
        "base",
        "ft-0",
        "ft-1",
        "--scale",
        "0.9",
        "--backend",
        "cpu",
        "--threads",
        "64",
        "--quiet",
        "--output",
    )
    limit = 96 << 20
    for out, options in (("budget", ["--memory-budget", "16MiB"]), ("auto", [])):
        with processes.limited(limit) as group:
            command = [sys.executable, "-m", "negmerge_fast", *merge, out, *options]
            done = processes.ended(command, group, tmp_path)
            assert (done.status, done.said) == (0, "")
            assert 0 < (group.peak() or 1) <= limit
    assert negmerge(*merge, "free", cwd=tmp_path).returncode == 0
    free = load_model(tmp_path / "free")
    assert all(torch.equal(load_model(tmp_path / out)["w"], free["w"]) for out in ("budget", "auto"))

"""The CPUs that control groups grant, and the number of threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from negmerge_fast.backends import native, registry
from negmerge_fast.core.control_groups import granted_cpus

FIRST = (
    "7:cpu,cpuacct:{}\n4:memory:/elsewhere\n0::/\n",
    "32 31 0:29 / /sys/fs/cgroup/m rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
)
SECOND = "0::{}\n", "33 31 0:30 / /sys/fs/cgroup/m rw - cgroup2 cgroup2 rw,nsdelegate\n"


def machine(root: Path, kind: tuple[str, str], path: str) -> Path:
    """A root in which this process is in one control group; returns where the groups are mounted."""
    own, mounts = kind
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own.format(path))
    (root / "proc/self/mountinfo").write_text(mounts)
    return root / "sys/fs/cgroup/m"


def quota(group: Path, kind: tuple[str, str], us: int | str, period_us: int = 100_000) -> None:
    group.mkdir(parents=True, exist_ok=True)
    if kind is SECOND:
        (group / "cpu.max").write_text(f"{'max' if us == -1 else us} {period_us}\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{us}\n")
        (group / "cpu.cfs_period_us").write_text(f"{period_us}\n")


@pytest.mark.parametrize("kind", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("us", "period_us", "cpus"),
    [(200_000, 100_000, 2), (150_000, 100_000, 2), (1000, 100_000, 1), (60_000, 20_000, 3)],
)
def test_a_quota_is_rounded_up(
    tmp_path: Path, kind: tuple[str, str], us: int, period_us: int, cpus: int
) -> None:
    quota(machine(tmp_path, kind, "/a/b") / "a/b", kind, us, period_us)
    assert granted_cpus(tmp_path) == cpus


@pytest.mark.parametrize("kind", [FIRST, SECOND])
def test_the_tightest_of_the_groups_above_counts(tmp_path: Path, kind: tuple[str, str]) -> None:
    groups = machine(tmp_path, kind, "/a/b")
    for folder, us in (("a/b", 400_000), ("a", 300_000), (".", -1)):
        quota(groups / folder, kind, us)
    assert granted_cpus(tmp_path) == 3


@pytest.mark.parametrize("kind", [FIRST, SECOND])
@pytest.mark.parametrize("us", [-1, "much", 0])
def test_without_a_quota_all_are_granted(tmp_path: Path, kind: tuple[str, str], us: int | str) -> None:
    quota(machine(tmp_path, kind, "/a") / "a", kind, us)
    assert granted_cpus(tmp_path) > 1000 < granted_cpus(tmp_path / "nothing")


def test_the_quota_bounds_the_usual_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that were asked for; and no more are taken than there were."""
    usual = registry.usual_threads()
    monkeypatch.setattr(native, "granted_cpus", lambda: 1)
    assert registry.usual_threads() == 1
    monkeypatch.setattr(native, "granted_cpus", lambda: usual + 5)
    assert registry.usual_threads() == usual


def test_a_sandbox_without_affinities(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(process: int) -> set[int]:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.sched_getaffinity", refused)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(native, "granted_cpus", lambda: 1000)
    assert registry.usual_threads() == 3


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from negmerge_fast.backends import registry; registry.usual_threads()\n"
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

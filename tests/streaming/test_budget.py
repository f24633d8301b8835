"""Memory that a merge takes: half of what is free unless told otherwise, and no more in a real control group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import load_model, negmerge, save_model

from negmerge_fast import InputError, merge_checkpoints
from negmerge_fast.runtime import memory
from negmerge_fast.streaming import api, budget
from negmerge_fast.streaming.options import MergeOptions

PROCESSES = Path(__file__).parents[2] / "bench" / "processes"


@pytest.mark.parametrize("given", [None, "auto"])
def test_the_usual_budget_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1001)
    assert budget.available_bytes(given) == ("half of the free memory", 500)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget.available_bytes(given) == ("half of the free memory", 125)
    assert budget.available_bytes("2KiB") == ("memory_budget", 2048)


def models(folder: Path, numel: int) -> list[Path]:
    paths = [folder / name for name in ("base", "ft-0", "ft-1")]
    for k, path in enumerate(paths):
        save_model(path, {"w": torch.randn(numel, generator=torch.Generator().manual_seed(k))})
    return paths


def test_a_merge_takes_no_more_than_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *finetuned = models(tmp_path, 1000)
    usual = api.prepare(base, finetuned, tmp_path / "out", MergeOptions(0.9))
    monkeypatch.setattr(memory, "free_memory", lambda: 10 << 20)
    job = api.prepare(base, finetuned, tmp_path / "out", MergeOptions(0.9))
    assert job.memory <= 5 << 20 < usual.memory
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"^half of the free memory: 524,288 bytes, expected at least"):
        merge_checkpoints(base, finetuned, tmp_path / "out", scale=0.9)
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_merge_within_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 128 MiB each, whose usual buffers take 192 MiB, in a group that may use 96 MiB: the same bytes as without."""
    monkeypatch.syspath_prepend(str(PROCESSES))
    import process

    if reason := process.why_not():
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
        with process.limited(limit) as group:
            command = [sys.executable, "-m", "negmerge_fast", *merge, out, *options]
            done = process.ended(command, group, tmp_path)
            assert (done.status, done.said) == (0, "")
            assert 0 < (group.peak() or 1) <= limit
    assert negmerge(*merge, "free", cwd=tmp_path).returncode == 0
    free = load_model(tmp_path / "free")
    assert all(torch.equal(load_model(tmp_path / out)["w"], free["w"]) for out in ("budget", "auto"))

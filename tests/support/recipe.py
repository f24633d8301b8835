"""The folder in which the recipe for open-unlearning runs: a stand-in for open-unlearning, and the recipe's files beside it."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_model

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests" / "support" / "open_unlearning"
TARGETS = ("open-unlearning/tofu_Llama-3.2-1B-Instruct_full", "muse-bench/MUSE-News_target")


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out the folder, and a cache of the hub that has the target models."""
    shutil.copytree(STANDIN / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "open_unlearning", folder / "negmerge")
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    base = runpy.run_path(str(STANDIN / "src" / "standin.py"))["BASE"]
    for name in TARGETS:
        cached = folder / "home" / "hub" / f"models--{name.replace('/', '--')}"
        save_model(
            cached / "snapshots" / ("a" * 40), {key: torch.from_numpy(each) for key, each in base.items()}
        )
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("a" * 40)

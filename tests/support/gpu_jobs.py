"""Merges of checkpoints through a CUDA stream that is faked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import family, save_model
from late_stream import DEVICE

from negmerge_fast.streaming import api
from negmerge_fast.streaming.options import MergeOptions

NAMES = ("base", "ft-0", "ft-1", "ft-2")


@pytest.fixture
def tensors(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    made = family()
    for model in made:  # long enough for many chunks
        model["long"] = torch.randn(9973, generator=torch.Generator().manual_seed(len(model)))
    made[1]["long"] = made[0]["long"].double() + 1  # converted by the kernel, not by the copy
    made[2]["long"] = made[0]["long"].bfloat16() + 1
    names = list(made[0])
    for name, model in zip(NAMES, made, strict=True):
        save_model(tmp_path / name, model, [names[:3], names[3:]] if name == "ft-1" else None)
    return made


def prepare(folder: Path, **options: Any) -> api.Job:
    base, *models = [folder / name for name in NAMES]
    chosen = MergeOptions(**{"scale": 0.9, "device": DEVICE, **options})
    return api.prepare(base, models, folder / "out", chosen)


def run(job: api.Job, **options: Any) -> None:
    """Run a job, and fail if it hangs or leaves a thread."""
    before = threading.active_count()
    raised: list[BaseException] = []

    def run_job() -> None:
        try:
            job.run(**options)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run_job, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    assert threading.active_count() == before
    if raised:
        raise raised[0]


def fails(error: BaseException) -> Callable[..., Any]:
    def raises(*_: Any) -> Any:
        raise type(error)(*error.args)  # another one for each thread

    return raises

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backend_cases import quicken_interpreter
from checkpoint_files import family, save_model
from torchvision_cpu import declare_operators

# No test looks for a model on the hub; those of the hub have one of their own.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> Iterator[None]:
    """A shell has Ctrl-C ignored in what it starts in the background, and the processes of tests would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    """base, ft-0, ft-1 and ft-2 in the test's folder; base and ft-1 are sharded."""
    tensors = family()
    names = list(tensors[0])
    save_model(tmp_path / "base", tensors[0], [names[:3], names[3:]])
    save_model(tmp_path / "ft-0", tensors[1])
    save_model(tmp_path / "ft-1", tensors[2], [names[::2], names[1::2]])
    save_model(tmp_path / "ft-2", tensors[3])
    return tensors


declare_operators()
quicken_interpreter()

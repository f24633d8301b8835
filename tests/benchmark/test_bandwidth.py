"""Rooflines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from negmerge_fast.benchmark import bandwidth


def test_a_device_copy_moves_about_the_bytes_of_the_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000)
    )
    monkeypatch.setattr(bandwidth, "_COPIED_BYTES", 512)
    bandwidth._pair.cache_clear()
    try:
        assert bandwidth.device_copy("cpu", 10).bytes == 2 * 4000
        copy = bandwidth.device_copy("cpu", 20_000)
        copy.task()
        assert copy.bytes == 16_000 and bandwidth._pair("cpu")[1].all()
        bandwidth.flush("cpu")  # reads
        assert bandwidth._pair("cpu")[0].all() and bandwidth._pair("cpu")[1].all()
    finally:
        bandwidth._pair.cache_clear()

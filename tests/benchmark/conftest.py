"""A made-up GPU: its stream and events."""

from __future__ import annotations

import pytest
import torch


class FakeEvent:
    """An event of a stream whose time advances by one with each event. It is done once it was waited for."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self, stream: str) -> None:
        assert stream == "the stream of cuda:1"
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.done  # so the earlier one is, too
        return 1000.0 * (later.at - self.at)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    return waits

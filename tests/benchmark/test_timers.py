"""Events as a clock, on a made-up GPU."""

from __future__ import annotations

from negmerge_fast.benchmark import timers


def test_moments_wait_only_when_they_are_subtracted(fake_gpu: list[str]) -> None:
    now = timers.clock("cuda:1")
    began = now()
    middle, ended = now(), now()
    assert not began.event.done and not ended.event.done and not fake_gpu
    assert ended - began == 2.0 and ended.event.done and not middle.event.done
    assert middle - began == 1.0

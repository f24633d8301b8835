"""Buffers of a worker: their layout, their pages, and the timeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from negmerge_fast.runtime.buffers import Timeline, WorkerBuffers


def test_versions_are_apart_and_aligned() -> None:
    with WorkerBuffers(3, 512, Timeline()) as buffers:
        reserved = buffers.reserve([300, 512, 1])
        assert [len(buffer) for buffer in reserved] == [300, 512, 1]
        for number, buffer in enumerate(reserved):
            buffer[:] = bytes([number + 1]) * len(buffer)
        assert [set(buffer) for buffer in reserved] == [{1}, {2}, {3}]
        addresses, owner = buffers.addresses()
        assert owner is buffers.memory and addresses[0] == np.asarray(buffers.memory).ctypes.data
        assert [address - addresses[0] for address in addresses] == [0, 512, 1024]
        assert all(address % 256 == 0 for address in addresses)


def test_a_merge_gets_the_addresses_of_the_reserved_versions() -> None:
    launched: list[tuple[list[int], Any]] = []
    timeline = Timeline()
    with WorkerBuffers(2, 256, timeline) as buffers:
        for sizes in ([256, 256], [10, 20], []):
            buffers.reserve(sizes)
            with buffers.launch() as addressed:
                launched.append(addressed)
            buffers.wait()
            assert launched[-1] == buffers.addresses() and len(launched[-1][0]) == len(sizes)
    assert [stage for _, stage, _, _ in timeline.spans] == ["merge"] * 3


def resident(buffers: WorkerBuffers) -> int:
    """KiB of the mapping that are in memory."""
    address = f"{np.asarray(buffers.memory).ctypes.data:x}"
    for entry in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+)", entry)
        if bounds and int(bounds[1], 16) <= int(address, 16) < int(bounds[2], 16):
            found = re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)
            assert found
            return int(found[1])
    raise AssertionError("no mapping")


@pytest.mark.parametrize("error", [None, RuntimeError("kept")])
def test_pages_are_released_even_if_an_error_holds_the_buffers(error: Exception | None) -> None:
    buffers = WorkerBuffers(2, 4 << 20, Timeline())
    try:
        with buffers:
            np.asarray(buffers.memory).fill(1)
            before = resident(buffers)
            if error:
                raise error
    except RuntimeError as raised:
        assert raised is error
    assert before - resident(buffers) >= 8 << 10
    assert not np.any(buffers.memory)


def test_a_timeline_that_keeps_nothing() -> None:
    for kept in (True, False):
        timeline = Timeline(kept)
        with timeline.span("read"):
            pass
        assert len(timeline.spans) == kept
    assert all(0 <= began <= ended for _, _, began, ended in timeline.spans)

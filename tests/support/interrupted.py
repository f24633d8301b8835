"""Slow merges, by one process or several, to be stopped in the middle."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoint_files import save_model
from small_chunks import RECORD_EVERY_CHUNK

# Every chunk waits a moment for each version.
SLOW = f"""{RECORD_EVERY_CHUNK}
import os, sys, time
from negmerge_fast.cli import main
from negmerge_fast.runtime import distributed
from negmerge_fast.streaming.worker import Worker
process = Worker.process_chunk
wait = float(os.environ.get("TEST_WAIT", "0.004"))
distributed.QUIET_WAIT_S = 60.0
if os.environ.get("RANK") == os.environ.get("TEST_LATE"):
    distributed.POLL_INTERVAL_S = 2.0
def slow(self, chunk):
    time.sleep(wait * len(chunk.sources))
    return process(self, chunk)
Worker.process_chunk = slow
process_for = Worker.process_for
def slow_for(self, chunk, outputs):
    time.sleep(wait * len(chunk.sources))
    return process_for(self, chunk, outputs)
Worker.process_for = slow_for
main.main()
"""

ARGUMENTS = ("merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "0.9", "--threads", "1")


def make_models(folder: Path) -> None:
    """Save base, ft-0 and ft-1 of 4 MB each, sharded differently."""
    for k, path in enumerate(("base", "ft-0", "ft-1")):
        generator = torch.Generator().manual_seed(k)
        tensors = {f"w{i}": torch.randn(1 << 17, generator=generator).to(torch.bfloat16) for i in range(16)}
        tensors["ids"] = torch.arange(1000)
        names = list(tensors)
        save_model(folder / path, tensors, [names[: 5 + k], names[5 + k :]])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(
    folder: Path,
    *more: str,
    ranks: int = 1,
    wait: float = 0.004,
    present: Sequence[int] | None = None,
    of_last: Sequence[str] = (),
    late: int | None = None,
    arguments: Sequence[str] = ARGUMENTS,
) -> list[subprocess.Popen[str]]:
    """Start the processes of one slow merge, by rank.

    present: the ranks that are started. arguments: those of all. of_last: those of the last one, if they are others. late: the rank that seldom polls others.
    """
    port = str(free_port())
    processes = []
    for rank in range(ranks) if present is None else present:
        environment = {**os.environ, "TEST_WAIT": str(wait), "TEST_LATE": str(late), "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        own = of_last if of_last and rank == ranks - 1 else arguments
        command = [sys.executable, "-c", SLOW, *own, *more]
        processes.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for processes; exit status, stdout and stderr of each."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def under_way(folder: Path, processes: list[subprocess.Popen[str]], journals: int = 1) -> None:
    """Wait until so many processes have a journal."""
    while len(list(folder.glob(".out.negmerge/journal-*"))) < journals:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.01)


def kill_all(processes: list[subprocess.Popen[str]], generator: random.Random, one: bool = False) -> None:
    """Kill all processes with SIGKILL; one: a random one first, the others after a while, as a launcher does."""
    if one:
        generator.choice(processes).kill()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

"""The command as a process: signals, standard streams and memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import MERGE, check, load_model, negmerge, nothing_left, save_model

pytestmark = pytest.mark.processes

# A slow merge: each chunk waits a moment, so that the merge can be stopped in the middle.
SLOW = """
import sys, time
from negmerge_fast.cli import main
from negmerge_fast.streaming import budget
from negmerge_fast.streaming.worker import Worker
process, budget.MAX_CHUNK_BYTES = Worker.process_chunk, 4096
def slow(self, chunk):
    time.sleep(0.02 * len(chunk.sources))
    return process(self, chunk)
Worker.process_chunk = slow
main.main()
"""


def start_slow(folder: Path) -> subprocess.Popen[str]:
    """Start a merge and wait until it has begun to write."""
    big = [{"w": torch.randn(1 << 20, generator=torch.Generator().manual_seed(k))} for k in range(3)]
    for path, tensors in zip(("base", "ft-0", "ft-1"), big, strict=True):
        save_model(folder / path, tensors)
    command = [sys.executable, "-c", SLOW, "merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "0.9"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / ".out.negmerge" / "output" / "model.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    return process


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/*") if p.is_file()}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_stopped_in_the_middle(tmp_path: Path, number: int, status: int) -> None:
    process = start_slow(tmp_path)
    before = {name: h for name, h in hashes(tmp_path).items() if ".out" not in name}
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert err in ("negmerge: interrupted\n", "negmerge: terminated\n", "negmerge: hung up\n")
    assert nothing_left(tmp_path) and hashes(tmp_path) == before


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    process = start_slow(tmp_path)
    # A second command is refused and changes nothing.
    second = negmerge("merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "0.9", cwd=tmp_path)
    assert second.returncode == 2 and "another negmerge is writing it" in second.stderr
    assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.negmerge").exists()
    again = negmerge("merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "0.9", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / ".out.negmerge").exists()
    check(tmp_path / "out", [load_model(tmp_path / name) for name in ("base", "ft-0", "ft-1")])


def _catches(pid: int, number: signal.Signals) -> bool:
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_interrupted_while_modules_are_imported(tmp_path: Path, models: Any) -> None:
    for delay in (0.0, 0.1, 0.3, 0.6):
        process = subprocess.Popen(
            [sys.executable, "-m", "negmerge_fast", *MERGE, "--backend", "torch"],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not _catches(process.pid, signal.SIGTERM):  # main has begun
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:  # a fast machine was done already
            shutil.rmtree(tmp_path / "out")
            continue
        assert (process.returncode, err) == (130, "negmerge: interrupted\n")
        assert nothing_left(tmp_path)


def test_interrupted_before_the_command_has_handlers(tmp_path: Path) -> None:
    """As the console script does it; the first module that is imported takes its time."""
    (tmp_path / "slow.py").write_text(
        "import builtins, sys, time\n"
        "def imported(name, *rest, known=builtins.__import__):\n"
        "    if name.startswith('cli'):\n"
        "        print('importing', flush=True)\n"
        "        time.sleep(60)\n"
        "    return known(name, *rest)\n"
        "builtins.__import__ = imported\n"
        "from negmerge_fast.__main__ import main\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "slow.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_importing_every_module_sets_no_handler() -> None:
    """As pkgutil.walk_packages, sphinx and pdoc do."""
    script = (
        "import importlib, pkgutil, signal, negmerge_fast\n"
        "held = lambda: {n: signal.getsignal(n) for n in signal.valid_signals()}\n"
        "before = held()\n"
        "names = [m.name for m in pkgutil.walk_packages(negmerge_fast.__path__, 'negmerge_fast.')]\n"
        "for name in names:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        if error.name != 'mergekit':  # an extra\n"
        "            raise\n"
        "print(held() == before and 'negmerge_fast.__main__' in names)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_interrupted_when_all_is_done(tmp_path: Path, models: Any) -> None:
    """Once the output is published, no signal changes the status, not even while the interpreter ends."""
    process = subprocess.Popen([sys.executable, "-m", "negmerge_fast", *MERGE, "--quiet"], cwd=tmp_path)
    while not (tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.001)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    assert process.returncode == 0
    check(tmp_path / "out", models)


def test_standard_streams_that_fail_or_are_closed(tmp_path: Path, models: Any) -> None:
    # Where standard output is buffered, it fails only when it is flushed.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        for stdout, said in ((full, "negmerge: No space left on device\n"), (writing, "")):
            done = subprocess.run(
                [sys.executable, "-m", "negmerge_fast", "info"],
                stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (1, said)
    os.close(writing)
    shell = f"exec {sys.executable} -m negmerge_fast {' '.join(MERGE)} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=tmp_path).returncode == 0
    check(tmp_path / "out", models)


def test_a_terminal_sees_speed_and_time_left(tmp_path: Path, models: Any) -> None:
    ours, its = pty.openpty()
    # A new terminal has no size, and tqdm shows no bar there.
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "negmerge_fast", *MERGE], cwd=tmp_path, stderr=its)
    assert process.wait() == 0
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(its)
    assert re.search(r"merge +\d+% \|.*\| [\d.]+k?B of [\d.]+kB, .*B/s, .* left", seen), seen


def peak_anonymous(command: list[str], folder: Path) -> int:
    """Return the most anonymous memory, in bytes, that a command was seen to hold."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max(
            [
                peak,
                *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")),
            ]
        )
        time.sleep(0.002)
    assert process.wait() == 0
    return peak


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    budget = 32 << 20
    plain = """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, *models = ({n: t.clone() for f in sorted(Path(p).glob('*.safetensors')) for n, t in load_file(f).items()}
                 for p in ('base', 'ft-0', 'ft-1', 'ft-2', 'ft-3'))
merged = {}
for name, b in base.items():
    d = torch.stack([m[name] - b for m in models])
    agree = (d > 0).all(0) | (d < 0).all(0)
    merged[name] = torch.where(agree, b - 0.9 * d.mean(0), b)
save_file(merged, 'plain.safetensors')
"""
    peaks = {}
    for name, number, numel in (("small", 4, 1 << 10), ("large", 4, 1 << 22), ("many", 4000, 100)):
        folder = tmp_path / name
        for k, path in enumerate(("base", "ft-0", "ft-1", "ft-2", "ft-3")):
            generator = torch.Generator().manual_seed(k)
            tensors = {f"t{i}": torch.randn(numel, generator=generator) for i in range(number)}
            names = list(tensors)
            save_model(
                folder / path, tensors, [names[: number // 2], names[number // 2 :]] if k % 2 else None
            )
        merge = ["-m", "negmerge_fast", "merge", "base", "ft-0", "ft-1", "ft-2", "ft-3", "-o", "out"]
        command = [sys.executable, *merge, "--scale", "0.9", "--memory-budget", str(budget)]
        peaks[name] = peak_anonymous(command, folder)
    assert max(peaks["large"], peaks["many"]) <= peaks["small"] + budget
    by_formula = peak_anonymous([sys.executable, "-c", plain], tmp_path / "large")
    assert by_formula - peaks["small"] > 4 * budget

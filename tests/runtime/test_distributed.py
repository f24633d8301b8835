"""Several ranks, one output: the bytes of one process, one line for an error, and no process left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_files import nothing_left
from interrupted import ARGUMENTS, SLOW, contents, finish, free_port, make_models, start, under_way

from negmerge_fast.runtime import distributed
from negmerge_fast.runtime.distributed import SINGLE, Ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what one process merges them to."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    done = subprocess.run(
        [sys.executable, "-m", "negmerge_fast", *ARGUMENTS, "--report", "report.json"], cwd=folder
    )
    assert done.returncode == 0
    (folder / "out").rename(folder / "expected")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "ft-0", "ft-1"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def alive(text: str) -> list[int]:
    """Return the processes whose command line holds some text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_of_one_process(made: Path, folder: Path, ranks: int) -> None:
    ended = finish(start(folder, "--report", "report.json", ranks=ranks, wait=0.0))
    assert [status for status, *_ in ended] == [0] * ranks, ended
    assert [bool(out) for _, out, _ in ended] == [True] + [False] * (ranks - 1), "one speaks"
    assert contents(folder / "out") == contents(made / "expected")
    assert not (folder / ".out.negmerge").exists()
    report, expected = (json.loads((f / "report.json").read_text()) for f in (folder, made))
    for own in ("seconds", "output"):
        del report[own], expected[own]
    assert report == expected


def test_bad_input_is_one_line(folder: Path) -> None:
    (folder / "ft-1").unlink()
    ended = finish(start(folder, ranks=2))
    assert [status for status, *_ in ended] == [2, 2]
    assert [said.count("\n") for *_, said in ended] == [1, 0] and "ft-1: no such file" in ended[0][2]
    assert nothing_left(folder)


def test_a_rank_that_fails_ends_the_job_and_says_why(made: Path, folder: Path) -> None:
    """A file of the last rank's partition is truncated."""
    (folder / "ft-1").unlink()
    shutil.copytree(made / "ft-1", folder / "ft-1")
    processes = start(folder, "--resume", ranks=2, wait=0.02)
    under_way(folder, processes, journals=2)
    shard = sorted((folder / "ft-1").glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    ended = finish(processes)
    assert [status for status, *_ in ended] == [1, 1]
    assert ended[0][2] == "" and re.fullmatch(
        r"negmerge: rank 1: \S+model-00002-of-00002.safetensors: .*\n", ended[1][2]
    )
    assert not (folder / "out").exists() and len(list(folder.glob(".out.negmerge/journal-*"))) == 2


def test_resumed_with_another_number_of_ranks(made: Path, folder: Path) -> None:
    for ranks, more in ((2, 2), (3, 3), (2, 1)):
        processes = start(folder, "--resume", ranks=ranks, wait=0.02)
        under_way(folder, processes, journals=more)
        time.sleep(0.3)
        for process in processes:
            process.kill()
        finish(processes)
    ended = finish(start(folder, "--resume", "--report", "report.json", wait=0.0))
    assert ended[0][0] == 0, ended
    assert contents(folder / "out") == contents(made / "expected")
    report, expected = (json.loads((f / "report.json").read_text()) for f in (folder, made))
    assert report["tensors"] == expected["tensors"] and report["bytes_done_before"] > 0


def torchrun(folder: Path, *more: str, wait: float = 0.02) -> subprocess.Popen[str]:
    (folder / "slow.py").write_text(SLOW)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "slow.py", *ARGUMENTS, *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TEST_WAIT": str(wait)},
    )  # fmt: skip


def test_a_rank_that_is_killed_ends_the_job(made: Path, folder: Path) -> None:
    launcher = torchrun(folder, "--resume")
    under_way(folder, [launcher], journals=2)
    ranks = {k: p for p in alive("slow.py") for k in (0, 1) if _is_rank(p, k, folder)}
    os.kill(ranks[1], signal.SIGKILL)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    ours = [line for line in said.splitlines() if line.startswith("negmerge: ")]
    assert ours == [f"negmerge: rank 1 of 2 (process {ranks[1]}) died"]
    assert not (folder / "out").exists() and list(folder.glob(".out.negmerge/journal-*"))
    assert finish(start(folder, "--resume", wait=0.0))[0][0] == 0
    assert contents(folder / "out") == contents(made / "expected")


def _is_rank(process: int, rank: int, folder: Path) -> bool:
    try:
        environment = Path(f"/proc/{process}/environ").read_text().split("\0")
        return f"RANK={rank}" in environment and Path(f"/proc/{process}/cwd").resolve() == folder.resolve()
    except OSError:
        return False


@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_leaves_nobody_writing(folder: Path, resume: bool) -> None:
    launcher = torchrun(folder, *(["--resume"] if resume else []), wait=0.05)
    under_way(folder, [launcher], journals=2)
    ranks = [p for p in alive("slow.py") for k in (0, 1) if _is_rank(p, k, folder)]
    assert len(ranks) == 2
    launcher.kill()
    began = time.monotonic()
    while any(Path(f"/proc/{p}/cwd").exists() for p in ranks):
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    launcher.communicate(timeout=60)
    assert not (folder / "out").exists()
    assert bool(list(folder.glob(".out.negmerge/journal-*"))) == resume


def test_interrupted(folder: Path) -> None:
    processes = start(folder, ranks=2, wait=0.02)
    under_way(folder, processes, journals=2)
    for process in processes:
        process.send_signal(signal.SIGINT)
    ended = finish(processes)
    assert [said for *_, said in ended] == ["negmerge: interrupted\n", ""] and ended[0][0] == 130
    assert nothing_left(folder)


@pytest.mark.slow
def test_one_that_is_late_is_waited_for(made: Path, folder: Path) -> None:
    """Rank 0 holds the store: it ends when all have been told whether there is an output."""
    ended = finish(start(folder, ranks=2, wait=0.0, late=1))
    assert [(status, said) for status, _, said in ended] == [(0, ""), (0, "")]
    ended = finish(start(folder, ranks=2, wait=0.0, late=1))
    assert [status for status, *_ in ended] == [2, 2] and "exists already" in ended[0][2]
    assert [said.count("\n") for *_, said in ended] == [1, 0]


@pytest.mark.parametrize(
    "other", [("--scale", "0.8"), pytest.param(("--nonfinite", "keep-base"), marks=pytest.mark.slow)]
)
def test_ranks_of_different_jobs_are_refused(folder: Path, other: tuple[str, str]) -> None:
    # One number of --scale is taken, no second.
    others = [
        argument for argument in ARGUMENTS if other[0] != "--scale" or argument not in ("--scale", "0.9")
    ]
    ended = finish(start(folder, ranks=2, of_last=[*others, *other]))
    assert [status for status, *_ in ended] == [2, 2] and ended[0][2] == ""
    what = other[0].lstrip("-")
    assert re.fullmatch(rf"negmerge: rank 1: .* was made with {what} \S+, expected \S+\n", ended[1][2])
    assert nothing_left(folder)


@pytest.mark.slow
def test_the_last_that_ends_tidies_up(folder: Path) -> None:
    """The output stays locked while another rank may still write."""
    processes = start(folder, ranks=2, wait=0.02)
    under_way(folder, processes, journals=2)
    processes[1].send_signal(signal.SIGSTOP)
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(30) == 143
    assert (folder / ".out.negmerge" / "output").exists()
    [(status, _, said)] = finish(start(folder))
    assert status == 2 and "another negmerge is writing it" in said
    processes[1].send_signal(signal.SIGCONT)
    ended = finish(processes)
    assert [said.count("\n") for *_, said in ended] == [1, 1] and "rank 0 of 2" in ended[1][2]
    assert nothing_left(folder)


@pytest.mark.slow
def test_stopped_while_the_others_have_not_come(folder: Path) -> None:
    for rank in (0, 1):
        [process] = start(folder, ranks=2, present=[rank])
        time.sleep(5)  # importing torch, and waiting
        process.send_signal(signal.SIGTERM)
        said = "negmerge: terminated\n" if rank == 0 else ""
        assert finish([process]) == [(143, "", said)]


def test_one_that_is_told_to_stop_stops_the_others(folder: Path) -> None:
    processes = start(folder, ranks=2, wait=0.02)
    under_way(folder, processes, journals=2)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [said for *_, said in ended] == ["negmerge: rank 1 of 2 was stopped\n", ""]
    assert [status for status, *_ in ended] == [1, 1]
    assert nothing_left(folder)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_a_block_of_one_process_fails_with_its_own_error(error: BaseException) -> None:
    with SINGLE.failing_together():
        pass
    with pytest.raises(type(error)) as raised, SINGLE.failing_together():
        raise error
    assert raised.value is error


def waiting(
    folder: Path, rank: int, port: int, *more: str, ranks: int = 3, **variables: str
) -> subprocess.Popen[str]:
    """Start one rank of several with the plain command."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), **addresses, **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "negmerge_fast", *ARGUMENTS, *more],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ranks_that_never_come(folder: Path) -> None:
    """The first rank says for whom it waits, where, and which variables say so; another one does if there is no first."""
    for rank, found in ((0, "1 of 3 ranks came to {}"), (1, "{} does not answer")):
        port = free_port()
        process = waiting(folder, rank, port)
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, more = process.communicate(timeout=60)
        address = f"127.0.0.1:{port}"
        assert line == (
            f"negmerge: note: rank {rank} of 3 waits for the others: {found.format(address)} (RANK={rank}, WORLD_SIZE=3, "
            f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}; without these variables one process merges alone)\n"
        )
        assert (out, more) == ("", "negmerge: terminated\n" if rank == 0 else "")
    assert nothing_left(folder)


def test_ranks_that_came_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all but the first rank leave the line to it."""
    for name, value in zip(distributed._VARIABLES, ("0", "3", "here", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for rank, came, said in ((0, "1/0 1/2", "2 of 3"), (1, "1/1 1/2", "2 of 3"), (1, "1/0 1/1", None)):
        ranks = object.__new__(Ranks)
        ranks.rank, ranks.count, ranks._step = rank, 3, 1
        monkeypatch.setattr(Ranks, "_check", lambda self, key, came=came: key in came.split())
        ranks._count_ranks()
        lines: list[str] = []
        ranks._say_late(lines.append)
        ranks._say_late(None)
        assert len(lines) == (said is not None)
        assert all(
            f"rank {rank} of 3 waits for the others: {said} ranks came to here:1 (" in line for line in lines
        )


@pytest.mark.slow
def test_quiet_ranks_wait_in_silence(folder: Path) -> None:
    process = waiting(folder, 0, free_port(), "--quiet")
    time.sleep(8)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "negmerge: terminated\n")


def test_without_proc_nothing_is_known_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> str:
        raise OSError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.count = 0, 2
    ranks._processes = {0: (distributed._process_namespace(), os.getpid()), 1: ("another", 1)}
    assert ranks.dead_peer() is None and ranks.is_lowest_alive()

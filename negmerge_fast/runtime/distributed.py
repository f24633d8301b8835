"""The processes of one job, as torchrun starts them: what they tell each other, and that none outlives the others.

They meet in torchrun's own store of keys and values, over which hardly a byte goes: weights and journals go over the file
system that they share. Whoever waits looks around meanwhile, so that a signal, a failure elsewhere or a death ends the wait.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from ..core.errors import InputError

_T = TypeVar("_T")

# Seconds that processes may be apart when they begin and when they end, between two looks at a key, and between two at what
# the others do.
JOIN_TIMEOUT_S, LEAVE_TIMEOUT_S, POLL_INTERVAL_S, PEER_CHECK_INTERVAL_S = 600, 10, 0.01, 0.5
_PR_SET_PDEATHSIG = 1
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerError(RuntimeError):
    """Another rank failed, and says why."""


class SingleProcess:
    """One process, which is all there is."""

    rank, count = 0, 1

    def all_gather(self, task: Callable[[], _T]) -> list[_T]:
        """Do something on every rank: what came out of it on each. Where it fails on one, it fails on all."""
        return [task()]

    def on_rank0(self, task: Callable[[], _T]) -> _T:
        """Have the first rank do something, and all be told what came out of it."""
        return self.all_gather(lambda: task() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def poll(self, moved: int) -> int:
        """Be told how many bytes this rank has moved; the bytes that all have. Raises Elsewhere if one has failed."""
        return moved

    def dead_peer(self) -> str | None:
        """Who has died, if anybody did."""
        return None

    def is_lowest_alive(self) -> bool:
        """Whether no lower rank of this machine lives: then it is for this one to speak."""
        return True

    def leave(self) -> None:
        """Say that this process ends now."""


SINGLE = SingleProcess()


class Ranks(SingleProcess):
    """One of several processes. on_wait: called while waiting; it may raise to stop the job."""

    def __init__(self, rank: int, count: int, on_wait: Callable[[], None]) -> None:
        self.rank, self.count, self._on_wait = rank, count, on_wait
        _end_with_launcher()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # an end is told in one line, by us
        try:
            import torch.distributed

            distributed: Any = torch.distributed
        except ImportError as error:
            raise InputError(f"{count} ranks: torch cannot be imported ({error})") from None
        try:
            store, *_ = _in_daemon_thread(
                lambda: next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
            )
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RuntimeError(f"rank {rank} of {count}: no store at {address} ({_line_of(error)})") from None
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = distributed.PrefixStore(f"negmerge/{again}", store)
        self._step, self._polled, self._moved_by_peers = 0, 0.0, 0
        self._processes: dict[int, tuple[str, int]] = {}
        me = (_process_namespace(), os.getpid())
        self._processes = dict(enumerate(self.all_gather(lambda: me)))

    def all_gather(self, task: Callable[[], _T]) -> list[_T]:
        self._step += 1
        try:
            answer: dict[str, Any] = {"value": task()}
            failed: BaseException | None = None
        except BaseException as error:
            failed = error
            answer = {
                "failed": not isinstance(error, PeerError),
                "input": isinstance(error, InputError),
                "stopped": not isinstance(error, Exception),
            }
            self._set("failed", b"1")
        self._set(f"{self._step}/{self.rank}", json.dumps(answer).encode())
        if failed is not None and answer["stopped"]:
            raise failed  # and does not wait
        answers = [json.loads(self._get(f"{self._step}/{rank}", rank)) for rank in range(self.count)]
        # The first that failed by itself says why.
        failed_rank = next((rank for rank, each in enumerate(answers) if each.get("failed")), None)
        if failed_rank is None and failed is None:
            return [each["value"] for each in answers]
        if failed is not None and failed_rank in (self.rank, None):
            raise failed
        if failed_rank is not None and answers[failed_rank]["stopped"] and self.rank == 0:
            raise RuntimeError(f"rank {failed_rank} of {self.count} was stopped")
        kind = PeerInputError if failed_rank is not None and answers[failed_rank]["input"] else PeerError
        raise kind(f"rank {failed_rank} failed")

    def poll(self, moved: int) -> int:
        if time.monotonic() - self._polled >= PEER_CHECK_INTERVAL_S:
            self._polled = time.monotonic()
            if self._check("failed"):
                raise PeerError("another rank failed")
            if (dead_peer := self.dead_peer()) is not None:
                raise RuntimeError(dead_peer)
            self._set(f"moved/{self.rank}", str(moved).encode())
            keys = [f"moved/{rank}" for rank in range(self.count) if rank != self.rank]
            moved_by_peers = self._call(lambda: [self._store.get(key) for key in keys if self._store.check([key])])
            self._moved_by_peers = sum(map(int, moved_by_peers))
        return moved + self._moved_by_peers

    def dead_peer(self) -> str | None:
        for rank, (host, process) in self._processes.items():
            if host == _process_namespace() and not _is_alive(process):
                return f"rank {rank} of {self.count} (process {process}) died"
        return None

    def is_lowest_alive(self) -> bool:
        own_host = _process_namespace()
        return not any(
            rank < self.rank and (host != own_host or _is_alive(process))
            for rank, (host, process) in self._processes.items()
        )

    def leave(self) -> None:
        """The first goes last: what they tell each other may be kept by it."""
        began = time.monotonic()
        with suppress(RuntimeError):
            self._set(f"left/{self.rank}", b"1")
            others = [f"left/{rank}" for rank in range(self.count) if self.rank == 0]
            while not (
                self._store.check(others) or self.dead_peer() or time.monotonic() - began > LEAVE_TIMEOUT_S
            ):
                time.sleep(POLL_INTERVAL_S)

    def _get(self, key: str, rank: int) -> bytes:
        began = time.monotonic()
        while not self._check(key):
            self._on_wait()
            if (dead_peer := self.dead_peer()) is not None:
                raise RuntimeError(dead_peer)
            if not self._processes and time.monotonic() - began > JOIN_TIMEOUT_S:
                raise RuntimeError(f"rank {rank} of {self.count} has not come within {JOIN_TIMEOUT_S} s")
            time.sleep(POLL_INTERVAL_S)
        return bytes(self._store.get(key))

    def _set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._store.set(key, value))

    def _check(self, key: str) -> bool:
        return bool(self._call(lambda: self._store.check([key])))

    def _call(self, task: Callable[[], _T]) -> _T:
        try:
            return task()
        except RuntimeError as error:
            raise RuntimeError(
                self.dead_peer() or f"the launcher does not answer any more ({_line_of(error)})"
            ) from None


class PeerInputError(PeerError, InputError):
    """Another rank refused its input, and says why."""


def ranks_from_environment(on_wait: Callable[[], None]) -> SingleProcess:
    """This process and those that were started with it, as torchrun's environment variables tell."""
    given = [os.environ.get(name) for name in _VARIABLES]
    if None in given or given[1] == "1":
        return SINGLE
    rank, count = given[:2]
    if not (str(rank).isdecimal() and str(count).isdecimal() and int(str(rank)) < int(str(count))):
        raise InputError(f"RANK={rank}, WORLD_SIZE={count}: expected a rank below the number of ranks")
    return Ranks(int(str(rank)), int(str(count)), on_wait)


def select_own_gpu() -> None:
    """Leave each process of this machine one GPU to see, in turn; before torch looks for them."""
    local_rank = os.environ.get("LOCAL_RANK", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(k) for k in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    if local_rank.isdecimal() and devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(local_rank) % len(devices)]


def _end_with_launcher() -> None:
    """torchrun puts each process into a session of its own: when it dies, nobody else would tell them."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _process_namespace() -> str:
    """Where numbers of processes are the same: machines, and containers on one, may share a name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _in_daemon_thread(task: Callable[[], _T]) -> _T:
    """Do something that signals cannot interrupt, in a thread that an end of the process does not wait for."""
    done: list[_T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(task())
        except Exception as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def _is_alive(process: int) -> bool:
    """A zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _line_of(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

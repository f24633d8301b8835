"""Ranks of one job, as torchrun starts them: they exchange results, and all end when one fails.

Ranks exchange small values through torchrun's key-value store. Weights and journals go through the file system that they
share. A rank that waits also watches its peers: a signal, a failure or the death of another rank ends the wait.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread, Timer
from typing import Any, TypeVar

from ..core.errors import InputError, first_line

_T = TypeVar("_T")

JOIN_TIMEOUT_S = 600  # a rank waits that long for the others to start
QUIET_WAIT_S = 1.5  # a rank that waits longer for the others to start says so
LEAVE_TIMEOUT_S = 10  # rank 0 keeps the store that long for the others
POLL_INTERVAL_S = 0.01  # between two requests for a key
PEER_CHECK_INTERVAL_S = 0.5  # between two checks of the other ranks
_PR_SET_PDEATHSIG = 1
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerError(RuntimeError):
    """The failure of another rank, which reports it itself."""


class SingleProcess:
    """A job of one process, and the interface of Ranks."""

    rank, count = 0, 1

    def all_gather(self, task: Callable[[], _T]) -> list[_T]:
        """Run a task on every rank and return all results, which must be JSON values.

        Args:
            task: What this rank does.

        Returns:
            The results by rank.

        Raises:
            BaseException: The task's own error on the rank that failed first, PeerError on the others.
        """
        return [task()]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run a block on every rank; if it fails on one, it fails on all, with the errors of all_gather."""
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        self.all_gather(lambda: _reraise(failure))

    def on_rank0(self, task: Callable[[], _T]) -> _T:
        """Run a task on rank 0 and return its result on all ranks."""
        return self.all_gather(lambda: task() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def poll(self, moved: int) -> int:
        """Publish progress and check the other ranks.

        Args:
            moved: Bytes that this rank has read and written.

        Returns:
            Bytes that all ranks have read and written.

        Raises:
            PeerError: If another rank has failed.
            RuntimeError: If another rank has died.
        """
        return moved

    def dead_peer(self) -> str | None:
        """Return a message that names a dead rank of this machine, or None."""
        return None

    def is_lowest_alive(self) -> bool:
        """Whether all lower ranks are dead, so that this one reports the end of the job."""
        return True

    def leave(self) -> None:
        """Announce that this process ends."""


SINGLE = SingleProcess()


class Ranks(SingleProcess):
    """One of several ranks.

    Args:
        rank: The number of this rank.
        count: The number of ranks.
        on_wait: Called while this rank waits. It may raise to stop the job.
        on_late: Called with one line if others have not come after a moment.
    """

    def __init__(
        self,
        rank: int,
        count: int,
        on_wait: Callable[[], None],
        on_late: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.count, self._on_wait = rank, count, on_wait
        # Who came, for the line that says so; empty if another rank says it.
        self._found = f"{_address()} does not answer" if rank else f"1 of {count} ranks came to {_address()}"
        self._step, self._polled, self._moved_by_peers = 0, 0.0, 0
        self._processes: dict[int, tuple[str, int]] = {}  # empty until all ranks have joined
        _end_with_launcher()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # errors are one line
        if (
            "TORCHELASTIC_RUN_ID" in os.environ
        ):  # a launcher: the others will come, and all import torch first
            self._import_distributed()
        late = Timer(QUIET_WAIT_S, self._say_late, (on_late,))
        late.daemon = True
        late.start()
        try:
            self._join(self._import_distributed())
        finally:
            late.cancel()

    def _import_distributed(self) -> Any:
        try:
            import torch.distributed
        except ImportError as error:
            raise InputError(f"{self.count} ranks: torch cannot be imported ({error})") from None
        return torch.distributed

    def _join(self, distributed: Any) -> None:
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        try:
            # As if for one process: for the others it would wait in silence. They are awaited below.
            store, *_ = _in_daemon_thread(
                lambda: next(distributed.rendezvous("env://?world_size=1", timeout=timeout))
            )
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.count}: no store at {_address()} ({first_line(error)[:200]})"
            ) from None
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = distributed.PrefixStore(f"negmerge/{restart}", store)
        own = (_process_namespace(), os.getpid())
        self._processes = dict(enumerate(self.all_gather(lambda: own)))

    def all_gather(self, task: Callable[[], _T]) -> list[_T]:
        self._step += 1
        answer, error = _attempt(task)
        if error is not None:
            self._set("failed", b"1")
        self._set(f"{self._step}/{self.rank}", json.dumps(answer).encode())
        if error is not None and answer["stopped"]:
            raise error  # a rank that was stopped does not wait for the others
        answers = [json.loads(self._get(f"{self._step}/{rank}", rank)) for rank in range(self.count)]
        self._raise_failure(answers, error)
        return [each["value"] for each in answers]

    def _raise_failure(self, answers: list[dict[str, Any]], error: BaseException | None) -> None:
        """Raise this rank's own error, or one that names the first rank that failed by itself."""
        failed_rank = next((rank for rank, each in enumerate(answers) if each.get("failed")), None)
        if failed_rank is None or failed_rank == self.rank:
            if error is not None:
                raise error
            return
        if answers[failed_rank]["stopped"] and self.rank == 0:
            raise RuntimeError(f"rank {failed_rank} of {self.count} was stopped")
        kind = PeerInputError if answers[failed_rank]["input"] else PeerError
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
            values = self._call(lambda: [self._store.get(key) for key in keys if self._store.check([key])])
            self._moved_by_peers = sum(map(int, values))
        return moved + self._moved_by_peers

    def dead_peer(self) -> str | None:
        for rank, (host, process) in self._processes.items():
            if rank != self.rank and host == _process_namespace() and not _is_alive(process):
                return f"rank {rank} of {self.count} (process {process}) died"
        return None

    def is_lowest_alive(self) -> bool:
        own_host = _process_namespace()
        return not any(
            rank < self.rank and (host != own_host or _is_alive(process))
            for rank, (host, process) in self._processes.items()
        )

    def leave(self) -> None:
        """Announce the end of this rank. Rank 0 may hold the store, so it waits for the others."""
        began = time.monotonic()
        with suppress(RuntimeError):
            self._set(f"left/{self.rank}", b"1")
            awaited = [f"left/{rank}" for rank in range(self.count) if self.rank == 0]
            while not (
                self._store.check(awaited) or self.dead_peer() or time.monotonic() - began > LEAVE_TIMEOUT_S
            ):
                time.sleep(POLL_INTERVAL_S)

    def _get(self, key: str, rank: int) -> bytes:
        began = time.monotonic()
        while not self._check(key):
            self._on_wait()
            if not self._processes:
                self._count_ranks()
            if (dead_peer := self.dead_peer()) is not None:
                raise RuntimeError(dead_peer)
            if not self._processes and time.monotonic() - began > JOIN_TIMEOUT_S:
                raise RuntimeError(f"rank {rank} of {self.count} has not come within {JOIN_TIMEOUT_S} s")
            time.sleep(POLL_INTERVAL_S)
        return bytes(self._store.get(key))

    def _count_ranks(self) -> None:
        """Note who came, for the line that says so; the first rank says it once it is there."""
        came = [self._check(f"{self._step}/{rank}") for rank in range(self.count)]
        first_is_here = self.rank > 0 and came[0]
        self._found = "" if first_is_here else f"{sum(came)} of {self.count} ranks came to {_address()}"

    def _say_late(self, on_late: Callable[[str], None] | None) -> None:
        """Say whom this rank waits for, and why."""
        if on_late and self._found:
            variables = ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES)
            on_late(
                f"rank {self.rank} of {self.count} waits for the others: {self._found} ({variables}; "
                "without these variables one process merges alone)"
            )

    def _set(self, key: str, value: bytes) -> None:
        self._call(lambda: self._store.set(key, value))

    def _check(self, key: str) -> bool:
        return bool(self._call(lambda: self._store.check([key])))

    def _call(self, task: Callable[[], _T]) -> _T:
        try:
            return task()
        except RuntimeError as error:
            raise RuntimeError(
                self.dead_peer() or f"the launcher does not answer any more ({first_line(error)[:200]})"
            ) from None


class PeerInputError(PeerError, InputError):
    """The failure of another rank because of its input."""


def ranks_from_environment(
    on_wait: Callable[[], None], on_late: Callable[[str], None] | None = None
) -> SingleProcess:
    """Join the ranks that torchrun's environment variables describe.

    Args:
        on_wait: Called while this rank waits for others. It may raise to stop the job.
        on_late: Called with one line, to be printed, if others have not come after a moment.

    Returns:
        SINGLE if there is one process.

    Raises:
        InputError: If the variables are invalid, or torch is missing.
        RuntimeError: If the store or another rank cannot be reached.
    """
    given = [os.environ.get(name) for name in _VARIABLES]
    if None in given or given[1] == "1":
        return SINGLE
    rank, count = given[:2]
    if not (str(rank).isdecimal() and str(count).isdecimal() and int(str(rank)) < int(str(count))):
        raise InputError(f"RANK={rank}, WORLD_SIZE={count}: expected a rank below the number of ranks")
    return Ranks(int(str(rank)), int(str(count)), on_wait, on_late)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def select_own_gpu() -> None:
    """Make one GPU visible to this process, by its local rank. It must run before torch initialises CUDA."""
    local_rank = os.environ.get("LOCAL_RANK", "")
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    devices = visible_devices.split(",") if visible_devices else [str(k) for k in range(count)]
    if local_rank.isdecimal() and devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(local_rank) % len(devices)]


def _reraise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _attempt(task: Callable[[], _T]) -> tuple[dict[str, Any], BaseException | None]:
    """Run a task; return what this rank tells the others, and the error."""
    try:
        return {"value": task()}, None
    except BaseException as error:
        return {
            "failed": not isinstance(error, PeerError),
            "input": isinstance(error, InputError),
            "stopped": not isinstance(error, Exception),
        }, error


def _end_with_launcher() -> None:
    """Have this process terminated when its parent dies: torchrun starts each rank in a session of its own."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _process_namespace() -> str:
    """Return an identifier of the machine and its PID namespace, as host names may be shared by containers.

    Without /proc it is another for each process: then nothing is known of the others.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename} {os.getpid()}"


def _in_daemon_thread(task: Callable[[], _T]) -> _T:
    """Run a task that signals cannot interrupt in a thread that does not delay the end of the process."""
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
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"

"""Input files: what counts as a change of one, and how errors are named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from negmerge_fast import InputError
from negmerge_fast.checkpoints.reader import File, Reader, naming, same_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1024)
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture
def unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inodes of open files are numbered anew each time, as on some FUSE file systems."""
    fstat, calls = os.fstat, []

    def numbered(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        found = fstat(descriptor)
        fields = list(found)
        fields[1] += len(calls)
        times = {
            name: getattr(found, name) for name in dir(found) if name.startswith("st_") and "time" in name
        }
        return os.stat_result(fields, times)

    monkeypatch.setattr(os, "fstat", numbered)


def replaced(path: Path) -> None:
    """Another file of the same size and time in its place."""
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").rename(path)


STILL_THE_SAME: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a link to it": lambda path: os.link(path, path.with_name("link")),
    "another mode": lambda path: path.chmod(0o600),
}
CHANGED: dict[str, Callable[[Path], object]] = {
    "written again": lambda path: path.write_bytes(path.read_bytes()),
    "another time": lambda path: os.utime(path, ns=(0, 0)),
    "longer": lambda path: os.truncate(path, 1 << 20) or os.utime(path, ns=(10**18, 10**18)),
}


@pytest.mark.parametrize("change", STILL_THE_SAME)
def test_the_same_file(path: Path, change: str) -> None:
    file = File.at(path)
    STILL_THE_SAME[change](path)
    assert file.read(3, 2) == b"\3\4"


@pytest.mark.usefixtures("unstable")
def test_the_same_file_with_another_inode(path: Path) -> None:
    file = File.at(path)
    with Reader(1) as reader:
        reader.read_into(file, 0, memoryview(bytearray(10)))
    assert file.sample == File.at(path).sample
    with open(path, "rb") as opened:
        assert same_file(os.fstat(opened.fileno()), os.stat(path))


@pytest.mark.parametrize("change", [*CHANGED, "replaced"])
def test_another_file(path: Path, change: str) -> None:
    file = File.at(path)
    {**CHANGED, "replaced": replaced}[change](path)
    with pytest.raises(OSError, match="file: the file changed while it was being read"), Reader(1) as reader:
        reader.read_into(file, 0, memoryview(bytearray(10)))


@pytest.mark.usefixtures("unstable")
@pytest.mark.parametrize("change", [*CHANGED, "replaced"])
def test_another_file_where_inodes_change(path: Path, change: str) -> None:
    test_another_file(path, change)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


LATE: dict[str, Callable[[Path], object]] = {
    **CHANGED,
    "replaced": replaced,
    "removed": Path.unlink,
    "a FIFO": fifo,
}


@pytest.mark.parametrize("change", LATE)
@pytest.mark.parametrize("closed", [False, True])
def test_a_file_that_changes_after_it_was_read(path: Path, change: str, closed: bool) -> None:
    """Also if it was closed for another one already."""
    shutil.copy2(path, path.with_name("next"))
    file, following = File.at(path), File.at(path.with_name("next"))
    buffer = memoryview(bytearray(10))
    with pytest.raises(OSError, match=f"{path}: the file changed while it was being read"):  # noqa: SIM117
        with Reader(1) as reader:
            reader.read_into(file, 0, buffer)
            if closed:
                reader.read_into(following, 0, buffer)
            LATE[change](path)


@pytest.mark.parametrize("change", STILL_THE_SAME)
def test_a_file_that_is_the_same_after_it_was_read(path: Path, change: str) -> None:
    with Reader(1) as reader:
        reader.read_into(File.at(path), 0, memoryview(bytearray(10)))
        STILL_THE_SAME[change](path)


def test_a_change_that_only_opening_tells_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where fstat answers from a cache."""
    open_, fstat, cached = os.open, os.fstat, {}

    def opening(*arguments: Any, **options: Any) -> int:
        descriptor = open_(*arguments, **options)
        cached[descriptor] = fstat(descriptor)
        return descriptor

    file = File.at(path)
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fstat", lambda descriptor: cached.get(descriptor) or fstat(descriptor))
    with pytest.raises(OSError, match="file: the file changed while it was being read"), Reader(1) as reader:
        reader.read_into(file, 0, memoryview(bytearray(10)))
        CHANGED["written again"](path)


def test_a_file_that_may_not_be_opened_any_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another mode and no change, which the time of its content tells."""

    def refusing(path: Any, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    file = File.at(path)
    with Reader(1) as reader, monkeypatch.context() as patched:
        reader.read_into(file, 0, memoryview(bytearray(10)))
        patched.setattr(os, "open", refusing)
        reader.__exit__(None)
        CHANGED["another time"](path)
        with pytest.raises(OSError, match="the file changed while it was being read"):
            reader.__exit__(None)
        reader.__exit__(KeyboardInterrupt)  # after an error nothing is asked
        os.utime(path, ns=(10**18, 10**18))


def test_locks_of_two_runs_are_two_files(path: Path) -> None:
    with open(path, "rb") as opened:
        replaced(path)
        assert not same_file(os.fstat(opened.fileno()), os.stat(path))


@pytest.mark.parametrize("call", ["fstat", "preadv"])
def test_an_error_names_its_file(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise OSError(116, "Stale file handle")

    file = File.at(path)
    with pytest.raises(OSError, match=rf"Stale file handle: '{path}'"), monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        _ = file.sample


def test_a_name_that_an_error_has_is_kept(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere'"), naming(path):
        os.stat("nowhere")
    with pytest.raises(InputError, match="not a regular file"):
        File.at(path.parent)

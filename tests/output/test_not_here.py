"""File systems, kernels and sandboxes that lack a call which is there for speed or safety: merges are the same without it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from errno import (
    EACCES,
    EINVAL,
    EIO,
    ENODEV,
    ENOLCK,
    ENOSPC,
    ENOSYS,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    ETXTBSY,
    EXDEV,
)
from pathlib import Path
from typing import Any

import pytest
from shimmed import attempt, make_models

from negmerge_fast.checkpoints.reader import NOT_HERE
from negmerge_fast.output import filesystem
from negmerge_fast.output.directory import Directory

pytestmark = pytest.mark.processes

SUPPORT = Path(__file__).parents[1] / "support"
ALL = [(kind, mode) for kind in ("directory", "file") for mode in ("fresh", "resume", "overwrite")]
# After its first answer, a call's others are tried in fewer merges.
FEW = [("directory", "overwrite"), ("file", "fresh"), ("file", "resume")]

# Each call, and what it answers where it is not here.
ABSENT = {
    "flock": (ENOSYS, ENOLCK, EOPNOTSUPP, EINVAL, EPERM, EACCES),
    "ofd": (ENOSYS, ENOLCK, EINVAL),
    "fsync-directory": (EINVAL, ENOSYS, EOPNOTSUPP, EPERM),
    "fsync": (EINVAL, ENOSYS),
    "fdatasync": (EINVAL, ENOSYS),
    "renameat2": (EINVAL, ENOSYS, EPERM, EOPNOTSUPP),
    "link": (EPERM, ENOSYS, EOPNOTSUPP),
    "preadv2": (EPERM, ENOSYS, EOPNOTSUPP, EINVAL),
    "fallocate": (ENOSYS, ENODEV, EOPNOTSUPP, EINVAL, EPERM),
    "copy_file_range": (EXDEV, ENOSYS, EPERM, EINVAL, EOPNOTSUPP, ETXTBSY, ENOTTY),
    "sync_file_range": (ENOSYS,),
    "fadvise": (ENOSYS, EINVAL, EPERM),
    "statfs": (ENOSYS, EPERM),
    "statvfs": (ENOSYS, EPERM),
    "inode": (1,),
}
# What fails, and must fail, with what it answers.
FAULTS = {
    "flock": EIO, "fsync-directory": EIO, "fsync": EIO, "renameat2": EIO, "preadv2": EIO, "fallocate": ENOSPC,
    "copy_file_range": EIO, "statvfs": EIO,
}  # fmt: skip
# What some merges have no use for: a resumed one has its files, and only what is resumed has a journal, if it takes a while.
_NOT_ALWAYS_MADE = {("fallocate", "resume"), *(("fdatasync", mode) for _, mode in ALL)}
_LESS_SAFE = {
    "ofd": "there are no file locks here: do not start two merges to it at once",
    "fsync": "not everything can be synced here: a power loss soon after the merge may damage it",
    "fsync-directory": "not everything can be synced here: a power loss soon after the merge may damage it",
}


# Calls that are made in place of others.
_INSTEAD = {"ofd": f"flock={ENOSYS} ", "link": f"renameat2={EINVAL} "}


def _shim(call: str, code: int) -> str:
    return f"{_INSTEAD.get(call, '')}{call}={code}"


def _merges(call: str, code: int) -> list[tuple[str, str]]:
    return ALL if code == ABSENT[call][0] else FEW


@pytest.fixture(scope="module")
def attempts(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """All merges under a shim, in one process."""
    folder = tmp_path_factory.mktemp("shimmed")
    if os.access("/dev/shm", os.W_OK):  # where syncing takes no time
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        request.addfinalizer(lambda: shutil.rmtree(folder))
    library = folder / "shim.so"
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SUPPORT / "shim.c", "-ldl"], check=True)
    (folder / "models").mkdir()
    tried = [
        (_shim(call, code), *merge)
        for call, codes in ABSENT.items()
        for code in codes
        for merge in _merges(call, code)
    ]
    tried += [(_shim(*fault), *merge) for fault in FAULTS.items() for merge in ALL if merge[1] != "resume"]
    subprocess.run(
        [sys.executable, SUPPORT / "shimmed.py", folder / "models", json.dumps(tried), folder / "done.json"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        check=True,
        timeout=300,
    )
    found: dict[str, dict[str, Any]] = json.loads((folder / "done.json").read_text())
    return found


@pytest.mark.parametrize(
    ("call", "code"),
    [(call, code) for call, codes in ABSENT.items() for code in codes],
    ids=[f"{call}-{errno.errorcode[code]}" for call, codes in ABSENT.items() for code in codes],
)
def test_a_call_that_is_not_here(attempts: dict[str, dict[str, Any]], call: str, code: int) -> None:
    """The same bytes, nothing left behind, and a line where it is less safe."""
    for kind, mode in _merges(call, code):
        done = attempts[f"{_shim(call, code)} {kind} {mode}"]
        assert done["error"] is None and done["right"], (kind, mode, done)
        assert done["hits"] or (call, mode) in _NOT_ALWAYS_MADE, (kind, mode)
        assert done["emulated"] == 0, "posix_fallocate wrote to every block"
        notes = [note.partition(": ")[2] for note in done["notes"]]
        assert notes == _notes(call, kind, mode), (kind, mode)


def _notes(call: str, kind: str, mode: str) -> list[str]:
    if call == "link" and kind == "file":
        return ["a file that another program makes here as the merge ends may be replaced"]
    if call in ("renameat2", "link") and mode == "overwrite" and kind == "directory":
        return ["cannot be replaced in one step here: for a moment there will be no output"]
    return [_LESS_SAFE[call]] if call in _LESS_SAFE else []


@pytest.mark.parametrize("call", FAULTS)
def test_a_fault_is_no_call_that_is_not_here(attempts: dict[str, dict[str, Any]], call: str) -> None:
    """It ends the merge, in one line that names a file, and nothing changes."""
    for kind, mode in ALL:
        if mode == "resume":
            continue
        done = attempts[f"{_shim(call, FAULTS[call])} {kind} {mode}"]
        assert done["error"] is not None and done["as before"], (kind, mode, done)
        what, said = done["error"]
        assert what == "OSError" and os.strerror(FAULTS[call]) in said and "'/" in said, said


def test_what_a_call_that_is_not_here_answers() -> None:
    assert not NOT_HERE & {
        EIO,
        ENOSPC,
        EACCES,
        errno.EROFS,
        errno.EDQUOT,
        errno.ESTALE,
        errno.ENOENT,
        errno.EEXIST,
    }


def test_a_size_that_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows as it is written."""

    def refused(descriptor: int, size: int) -> None:
        raise OSError(EPERM, os.strerror(EPERM))

    monkeypatch.setattr(os, "ftruncate", refused)
    with open(tmp_path / "file", "wb") as file:
        filesystem.set_size(file.fileno(), 5)


def test_a_directory_that_may_be_written_but_not_read(tmp_path: Path) -> None:
    """It cannot be opened to be synced."""
    if os.geteuid():
        tmp_path.chmod(0o300)
        assert Directory.at(tmp_path).sync() is False
        tmp_path.chmod(0o700)
        return
    with tempfile.TemporaryDirectory() as name:  # pytest's own are private
        os.chmod(name, 0o733)
        _sync_as_nobody(name)


def _sync_as_nobody(folder: str) -> None:
    code = f"from negmerge_fast.output.directory import Directory; print(Directory.at({folder!r}).sync())"
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", code],
        capture_output=True, text=True,
    )  # fmt: skip
    if "Permission denied" in done.stderr:
        pytest.skip("another user may not enter the folder of this test")
    assert done.stdout == "False\n", done.stderr


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Path]:
    """A folder on a FUSE file system."""
    if shutil.which("bindfs") is None:
        pytest.skip("no bindfs")
    for name in ("behind", "mounted"):
        (tmp_path / name).mkdir()
    mounted = tmp_path / "mounted"
    done = subprocess.run(["bindfs", tmp_path / "behind", mounted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield mounted
    subprocess.run(
        ["fusermount3" if shutil.which("fusermount3") else "fusermount", "-u", mounted], check=True
    )


@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
@pytest.mark.parametrize(("kind", "mode"), ALL)
def test_on_fuse_nothing_is_left(fuse: Path, kind: str, mode: str) -> None:
    """There an open file that is removed stays under another name until it is closed."""
    make_models(fuse)
    done = attempt(fuse, "", kind, mode)
    assert done["error"] is None and done["right"], done
    assert not [name for name in done["found"] if name.startswith(".")]

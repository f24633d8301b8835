"""What a merge needs is tried out before it, also by --dry-run, which leaves nothing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run, run  # noqa: F401
from small_models import folder, merge  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.output import directory, preflight
from negmerge_fast.streaming import api
from negmerge_fast.streaming.options import MergeOptions

NOBODY = 65534


@pytest.fixture
def open_folder(folder: Path) -> Iterator[Path]:
    """A folder with the models, which everybody may read and write: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if any(path.stat().st_mode & 0o001 == 0 for path in place.parents):
            pytest.skip(f"another user cannot enter {place.parent}")
        shutil.copytree(folder, place, dirs_exist_ok=True)
        place.chmod(0o777)
        for path in place.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield place


def prepare(folder: Path, **options: Any) -> list[str]:
    """Prepare a merge, and return its notes."""
    models = [folder / "ft-0", folder / "ft-1"]
    return api.prepare(folder / "base", models, folder / "out", MergeOptions(0.9, **options)).notes


def as_nobody(folder: Path, function: str) -> subprocess.CompletedProcess[str]:
    """Call a function on the folder as another user, in a fork: files that only root may read stay imported."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    code = (
        "import os, sys, negmerge_fast as nm\n"
        "from negmerge_fast.streaming import api, job\n"
        "from negmerge_fast.streaming.options import MergeOptions\n"
        "import negmerge_fast.backends.native, negmerge_fast._native\n"
        "options, merge, done = MergeOptions(0.9), nm.merge_checkpoints, []\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"try: {function}\n"
        "except Exception as error: print(type(error).__name__, error, done)\n"
        "else: print('done')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


DRY = "api.prepare('base', ['ft-0', 'ft-1'], 'out', options)"
MERGE = "merge('base', ['ft-0', 'ft-1'], 'out', scale=0.9, progress=lambda *of: done.append(of))"


@pytest.mark.processes
@pytest.mark.parametrize("function", [DRY, MERGE], ids=["dry run", "merge"])
@pytest.mark.parametrize(
    "file", ["base/config.json", "base/sub/notes.txt", "base/model.safetensors", "ft-1/model.safetensors"]
)
def test_a_file_that_may_not_be_read(open_folder: Path, file: str, function: str) -> None:
    folder = open_folder
    (folder / "base" / "sub").mkdir()
    (folder / "base" / "sub" / "notes.txt").write_text("x")
    (folder / file).chmod(0o600)
    done = as_nobody(folder, function)
    assert done.stdout == f"InputError {file}: Permission denied []\n", done.stderr
    assert {path.name for path in folder.iterdir()} == {"base", "ft-0", "ft-1"}


@pytest.mark.processes
@pytest.mark.parametrize("function", [DRY, MERGE], ids=["dry run", "merge"])
def test_what_is_not_read_need_not_be_readable(open_folder: Path, function: str) -> None:
    (open_folder / "ft-0" / "tokenizer.json").chmod(0o600)
    assert as_nobody(open_folder, function).stdout == "done\n"


@pytest.mark.processes
@pytest.mark.parametrize("function", [DRY, MERGE], ids=["dry run", "merge"])
def test_a_directory_that_may_not_be_written(open_folder: Path, function: str) -> None:
    open_folder.chmod(0o755)
    done = as_nobody(open_folder, function)
    assert done.stdout.startswith("PermissionError [Errno 13] Permission denied: '"), done.stderr
    assert done.stdout.endswith("/.out.negmerge' []\n")


@pytest.mark.processes
def test_a_private_staging_directory_of_another_user(open_folder: Path) -> None:
    (open_folder / ".out.negmerge").mkdir(mode=0o700)
    said = as_nobody(open_folder, MERGE).stdout
    assert said.startswith("InputError ") and "/.out.negmerge: belongs to user 0, expected" in said


@pytest.mark.processes
def test_an_older_output_of_another_user(open_folder: Path) -> None:
    """In a sticky directory nobody else may replace it; nor may one that cannot write its directories."""
    folder = open_folder
    merge(folder)
    for path in (folder / "out").iterdir():
        path.chmod(0o644)
    overwrite = DRY.replace("options", "MergeOptions(0.9, overwrite=True)")
    folder.chmod(0o1777)
    done = as_nobody(folder, overwrite)
    assert "out: another user's, who alone may replace it in this directory" in done.stdout, done.stderr
    folder.chmod(0o777)
    done = as_nobody(folder, overwrite)
    assert "out: cannot be written, so " in done.stdout, done.stderr


def test_a_dry_run_leaves_nothing(run: Run, folder: Path) -> None:
    for arguments in ([], ["--resume"], ["--overwrite"]):
        before = sorted(folder.rglob("*"))
        status, out, err = run(
            "merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "1", "--dry-run", *arguments
        )
        assert (status, err) == (0, "") and "output" in out
        assert sorted(folder.rglob("*")) == before
        if "--resume" in arguments:
            merge(folder)


@pytest.mark.parametrize("call", ["exchange", "rename_to_new", "sync", "lock"])
def test_a_fault_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    merge(folder)
    before = sorted(folder.rglob("*"))

    def fault(*arguments: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(preflight, call, fault)
    with pytest.raises(OSError, match=r"Input/output error: '.*/out'"):
        prepare(folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_a_live_staging_directory_is_left_alone(folder: Path) -> None:
    job = api.prepare(folder / "base", [folder / "ft-0"], folder / "out", MergeOptions(0.9))
    with job.staging:
        job.staging.open()
        job.staging.create()
        before = sorted((folder / ".out.negmerge").rglob("*"))
        assert prepare(folder) == []
        assert sorted((folder / ".out.negmerge").rglob("*")) == before


def test_a_disk_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unfinished output takes will be free; a file system without a size is not asked."""
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(OSError, match=rf"bytes are needed, 10 are free: '{folder}'"):
        prepare(folder)
    (folder / ".out.negmerge").mkdir()
    for name in ("lock", "journal-0"):
        (folder / ".out.negmerge" / name).write_bytes(os.urandom(1 << 16))
    assert prepare(folder) == []
    shutil.rmtree(folder / ".out.negmerge")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert prepare(folder) == []


def test_files_longer_than_a_process_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    with pytest.raises(OSError, match=r"files may have 1,000 \(ulimit -f\): '.*other/model.safetensors'"):
        preflight._refuse_large_files(
            api.prepare(folder / "base", [folder / "ft-0"], folder / "other", MergeOptions(0.9)).destination
        )


def test_a_name_that_is_too_long_for_the_manifest(tmp_path: Path) -> None:
    """That of a single file is 14 bytes longer."""
    for name in ("base", "ft"):
        np.save(tmp_path / f"{name}.npy", np.ones(3) * len(name))
    out = tmp_path / ("x" * 240 + ".npy")
    with pytest.raises(nm.InputError, match="File name too long, expected a path to a new place"):
        api.prepare(tmp_path / "base.npy", [tmp_path / "ft.npy"], out, MergeOptions(0.9))


def test_a_staging_directory_that_others_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where an older output's files are open elsewhere: the merge is done, and says what is left."""
    merge(folder)

    def busy(entry: directory.Entry) -> None:
        if entry.name == "output" and entry.exists():
            raise OSError(16, "Device or resource busy", str(entry.path))
        directory.remove_tree(entry)

    monkeypatch.setattr("negmerge_fast.output.staging.remove_tree", busy)
    with pytest.warns(
        nm.MergeWarning, match=r"\.out\.negmerge: left behind .Device or resource busy.: the next merge"
    ):
        assert len(merge(folder, overwrite=True).notes) == 1
    monkeypatch.undo()
    assert (folder / ".out.negmerge").exists()
    merge(folder, overwrite=True)
    assert not (folder / ".out.negmerge").exists()

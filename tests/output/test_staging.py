"""The staging directory: who holds it, what of it is kept, and the files that are created in it."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from interrupted import contents
from small_models import folder, merge  # noqa: F401
from staged import staging_for

import negmerge_fast as nm
from negmerge_fast.output.directory import Directory, scratch_directory


def test_leftovers_are_cleared_but_unknown_files_are_kept(folder: Path) -> None:
    staging_dir = folder / ".out.negmerge"
    (staging_dir / "output" / "half").mkdir(parents=True)
    for name in ("lock", "journal-0", "rank-1.json", "share-1", "exchange", "notes.txt"):
        (staging_dir / name).touch()
    merge(folder)
    assert sorted(p.name for p in staging_dir.iterdir()) == ["notes.txt"]


def test_what_is_no_staging_directory_is_refused(folder: Path) -> None:
    """One that negmerge's lock does not lie in, or a link to a directory."""
    staging_dir = folder / ".out.negmerge"
    staging_dir.mkdir()
    (staging_dir / "notes.txt").write_text("mine")
    with pytest.raises(nm.InputError, match=r"notes\.txt: not negmerge's, expected nothing of others"):
        merge(folder)
    assert [p.name for p in staging_dir.iterdir()] == ["notes.txt"]
    staging_dir.rename(folder / "elsewhere")
    staging_dir.symlink_to(folder / "elsewhere")
    with pytest.raises(nm.InputError, match=r"\.out\.negmerge: a symbolic link, expected a directory"):
        merge(folder)


def test_the_lock_is_exclusive_until_ranks_may_join(tmp_path: Path) -> None:
    first, second, other = (staging_for(tmp_path / "out") for _ in range(3))
    with first:
        first.open()
        first.create()
        for refused in (second.open, second.join):
            with pytest.raises(nm.InputError, match="out: another negmerge is writing it"):
                refused()
        first.let_join()
        with second:
            second.join()
            second.write_rank_result(1, {"read": 3})
            with pytest.raises(nm.InputError, match="another negmerge is writing it"):
                other.open()
        assert first.read_rank_result(1) == {"read": 3}
        assert first.path.exists()
    assert not first.path.exists()


@pytest.mark.parametrize("resume", [True, False])
def test_unfinished_output_is_kept_for_resume_only(tmp_path: Path, resume: bool) -> None:
    """And the last rank that leaves after an error decides it, whichever it is."""
    first, second = (staging_for(tmp_path / "out", resume) for _ in range(2))
    with pytest.raises(OSError, match="of the second"), second:
        with pytest.raises(OSError, match="of the first"), first:
            first.open()
            first.create()
            first.journal(0).write_bytes(b"")
            first.let_join()
            second.join()
            raise OSError("of the first")
        assert first.path.exists()
        raise OSError("of the second")
    assert first.path.exists() == resume


def test_the_last_rank_removes_what_the_first_left_when_it_had_published(tmp_path: Path) -> None:
    first, second = (staging_for(tmp_path / "out") for _ in range(2))
    with second:
        with pytest.raises(KeyboardInterrupt), first:
            first.open()
            first.create()
            first.let_join()
            second.join()
            raise KeyboardInterrupt
        assert first.path.exists()
    assert not first.path.exists()


def test_the_output_is_as_private_as_the_base(folder: Path) -> None:
    (folder / "base" / "model.safetensors").chmod(0o400)
    (folder / "base" / "config.json").chmod(0o640)
    before = os.umask(0o022)
    try:
        merge(folder)
    finally:
        os.umask(before)
    assert (folder / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o600
    assert (folder / "out" / "config.json").stat().st_mode & 0o777 == 0o640


def test_a_lock_that_is_a_link(folder: Path) -> None:
    """It was opened again and again where it leads nowhere, and a file was made where it leads somewhere."""
    staging_dir = folder / ".out.negmerge"
    staging_dir.mkdir(mode=0o700)
    for target in (folder / "nowhere" / "x", folder / "made"):
        (staging_dir / "lock").symlink_to(target)
        with pytest.raises(OSError, match=r"\.out\.negmerge/lock'"):
            merge(folder)
        (staging_dir / "lock").unlink()
    assert not (folder / "made").exists()


@pytest.mark.parametrize("name", ["output", "journal-0", "rank-0.json", "exchange", "former"])
def test_no_link_below_is_followed(folder: Path, name: str) -> None:
    """An earlier run left them, as far as the new one can tell."""
    kept = folder / "kept"
    kept.mkdir()
    (kept / "model.safetensors").write_text("mine")
    staging_dir = folder / ".out.negmerge"
    staging_dir.mkdir(mode=0o700)
    (staging_dir / "lock").touch()
    (staging_dir / name).symlink_to(kept if name in ("output", "former") else kept / "model.safetensors")
    merge(folder)
    assert contents(kept) == {"model.safetensors": b"mine"} and not staging_dir.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_may_write_in(folder: Path, mode: int) -> None:
    (folder / ".out.negmerge").mkdir()
    (folder / ".out.negmerge").chmod(mode)
    with pytest.raises(nm.InputError, match=rf"others may write in it \(mode {mode:o}\), expected mode 700"):
        merge(folder)
    assert {p.name for p in folder.iterdir()} == {"base", "ft-0", "ft-1", ".out.negmerge"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user(folder: Path) -> None:
    (folder / ".out.negmerge").mkdir(mode=0o700)
    os.chown(folder / ".out.negmerge", 4001, 4001)
    with pytest.raises(nm.InputError, match="belongs to user 4001, expected a directory of negmerge's own"):
        merge(folder)


def test_a_file_system_that_gives_all_files_one_owner_and_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vfat, CIFS and some FUSE do: what belongs to others there is this user's as well."""
    stat = os.fstat

    def seen(descriptor: int) -> os.stat_result:
        values = list(stat(descriptor))
        values[0] |= 0o777
        values[4] = 4001
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", seen)
    for _ in range(2):
        with staging_for(folder / "out") as staging:
            staging.open()
    assert not (folder / ".out.negmerge").exists()


def test_a_forked_child_holds_no_lock(folder: Path) -> None:
    """It may live on when the merge has been killed; and it removes nothing when it ends."""
    with staging_for(folder / "out") as first:
        first.open()
        first.create()
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                first.__exit__(None, None, None)
            os.close(begun)
            signal.pause()
            os._exit(0)
        try:
            os.close(begun)
            assert os.read(ready, 1) == b""  # the child has closed its own
            os.close(ready)
            os.close(first._lock)  # as by a kill
            first._lock = -1
            with staging_for(folder / "out") as second:
                second.open()
            assert not (folder / ".out.negmerge").exists()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_files_are_on_the_disk_when_they_are_reserved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may not have been opened again before a power loss, and is expected when the merge is resumed."""
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    with staging_for(folder / "out", resume=True) as staging:
        staging.open()
        synced.clear()
        staging.create()
        assert synced == ["model.safetensors"]


def test_a_clean_up_that_fails_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk that was full, say: the output is there, and nothing is left."""
    rmdir, failed = os.rmdir, []

    def full(name: str, *, dir_fd: int) -> None:
        if name == ".out.negmerge" and not failed:
            failed.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", full)
    assert merge(folder).notes == [] and failed
    assert not (folder / ".out.negmerge").exists()


def test_scratch_of_a_killed_run_is_removed(folder: Path) -> None:
    """And not that of a run that is under way."""
    (folder / ".negmerge-0badcafe").mkdir()
    with Directory.at(folder) as parent, scratch_directory(parent) as scratch:
        merge(folder)
        assert [p.name for p in folder.glob(".negmerge-*")] == [scratch.path.name]
    assert not list(folder.glob(".negmerge-*"))


@pytest.mark.parametrize("name", [".negmerge-notes", ".negmerge-0badcafe"])
def test_a_directory_that_is_named_like_scratch_is_left_alone(folder: Path, name: str) -> None:
    """It may be the base itself."""
    (folder / "base").rename(folder / name)
    (folder / name / "sub").mkdir()
    before = sorted(folder.rglob("*"))
    with Directory.at(folder) as parent, scratch_directory(parent):
        pass
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("resume", [True, False])
def test_scratch_of_a_killed_run_is_removed_though_nothing_is_to_be_done(folder: Path, resume: bool) -> None:
    """The output is finished already, or exists and is refused."""
    merge(folder)
    (folder / ".negmerge-0badcafe").mkdir()
    (folder / ".negmerge-0badcafe" / "file").touch()
    with nullcontext() if resume else pytest.raises(nm.InputError, match="exists already"):
        assert merge(folder, resume=resume).bytes_written == 0
    assert not list(folder.glob(".negmerge-*"))

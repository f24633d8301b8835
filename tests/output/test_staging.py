"""The staging directory: who holds it, what of it is kept, and the files that are created in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_models import folder, merge  # noqa: F401
from staged import staging_for

import negmerge_fast as nm


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

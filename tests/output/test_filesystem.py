"""Outputs on file systems that are full or read-only, and on those that clone blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import negmerge, save_model
from interrupted import contents
from small_chunks import RECORD_EVERY_CHUNK

import negmerge_fast as nm
from negmerge_fast.output import filesystem, writer

MERGE = ("merge", "base", "ft-0", "ft-1", "--scale", "0.9", "--threads", "1")


@contextmanager
def small_tmpfs(path: Path, size: str) -> Iterator[Path]:
    """Mounted while it lasts; skips where that is not allowed."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models of 4 MB each, which changed half of the tensors."""
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        generator = torch.Generator().manual_seed(0)
        tensors = {f"w{i}": torch.randn(1 << 18, generator=generator) + k * (i % 2) for i in range(4)}
        tensors["ids"] = torch.arange(5000)
        save_model(tmp_path / name, tensors, [["w0", "w1"], ["w2", "w3", "ids"]])
    return tmp_path


def merge(folder: Path, out: Path, **options: Any) -> nm.Report:
    return nm.merge_checkpoints(
        folder / "base", [folder / "ft-0", folder / "ft-1"], out, scale=0.9, **options
    )


# Others use up what was free, chunk by chunk as it is written: a tmpfs reserves nothing.
GREEDY = f"""{RECORD_EVERY_CHUNK}
import sys
from negmerge_fast.cli import main
from negmerge_fast.output.writer import Writer
descriptor, chunks = Writer.descriptor, [0]
def with_others(self, name):
    chunks[0] += 1
    if chunks[0] > 32:
        try:
            with open("small/others", "ab", 0) as others:
                others.write(bytes((1 << 16) + (1 << 14)))
        except OSError:
            pass
    return descriptor(self, name)
Writer.descriptor = with_others
main.main()
"""


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_system_that_is_full_in_the_middle(folder: Path, resume: bool) -> None:
    with small_tmpfs(folder / "small", "5m") as small:
        done = subprocess.run(
            [sys.executable, "-c", GREEDY, *MERGE, "-o", "small/out", *(["--resume"] if resume else [])],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert "No space left on device" in done.stderr and "small" in done.stderr
        assert not (small / "out").exists() and (small / ".out.negmerge").exists() == resume
        if resume:
            (small / "others").unlink()
            report = merge(folder, small / "out", resume=True)
            assert report.bytes_done_before > 1 << 20
            merge(folder, folder / "out")
            assert contents(small / "out") == contents(folder / "out")


def test_a_read_only_file_system(folder: Path) -> None:
    with small_tmpfs(folder / "small", "5m") as small:
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for more in ([], ["--resume"]):
            done = negmerge(*MERGE, "-o", "small/out", *more, cwd=folder)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"negmerge: {small.resolve()}/.out.negmerge: Read-only file system\n"


def test_blocks_that_no_model_changed_are_cloned_from_the_base(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any file system copies with the call that clones blocks where that is supported."""
    merge(folder, folder / "out", nonfinite="keep-base")
    expected, taken = contents(folder / "out"), []
    reflink = filesystem.reflink

    def noted(*of: int) -> range:
        taken.append(reflink(*of))
        return taken[-1]

    monkeypatch.setattr(writer, "reflink", noted)
    monkeypatch.setattr(writer, "filesystem_type", lambda _: next(iter(filesystem.REFLINK_FILESYSTEMS)))
    merge(folder, folder / "out", nonfinite="keep-base", overwrite=True)
    assert contents(folder / "out") == expected
    # w0 and w2, but for their first and last pages, and at least half of the ids.
    assert sum(map(len, taken)) > 2 * ((1 << 20) - (4 << 12)) + 20_000


def test_only_whole_pages_are_cloned(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(os.urandom(5 << 12))
    (tmp_path / "to").write_bytes(bytes(5 << 12))
    with open(tmp_path / "from", "rb") as source, open(tmp_path / "to", "r+b") as target:
        files = source.fileno(), target.fileno()
        assert filesystem.reflink(*files, 5000, 3 << 12) == range(8192, 12288)
        assert len(filesystem.reflink(*files, 4100, 8100)) == 0 == len(filesystem.reflink(*files, 1, 4095))
    held = (tmp_path / "to").read_bytes()
    assert held[8192:12288] == (tmp_path / "from").read_bytes()[8192:12288]
    assert not any(held[:8192]) and not any(held[12288:])


def test_without_reflinks_everything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*of: int) -> int:
        raise OSError(18, "Invalid cross-device link")

    merge(folder, folder / "out", nonfinite="keep-base")
    expected = contents(folder / "out")
    monkeypatch.setattr(os, "copy_file_range", cannot)
    monkeypatch.setattr(writer, "filesystem_type", lambda _: next(iter(filesystem.REFLINK_FILESYSTEMS)))
    merge(folder, folder / "out", nonfinite="keep-base", overwrite=True)
    assert contents(folder / "out") == expected

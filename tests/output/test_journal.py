"""Crashes, full disks and failing disks: what they leave is resumed correctly, or refused."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from checkpoint_files import nothing_left
from resumable import Stop, folder, interrupt, made, merge, weights  # noqa: F401
from small_chunks import record_every_chunk
from staged import staging_for

import negmerge_fast as nm
from negmerge_fast.core.ranges import Range
from negmerge_fast.core.stats import Stats, TensorStats
from negmerge_fast.output import journal, publish
from negmerge_fast.output.directory import Directory, Entry
from negmerge_fast.output.staging import Staging

pytestmark = pytest.mark.processes


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    record_every_chunk(monkeypatch)
    return monkeypatch


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, name: str, code: int, lose: bool = False) -> None:
    """Make fsync fail for files of a name. lose: whether their bytes are lost then, as on a failing disk."""
    sync = os.fsync

    def failing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.name.startswith(name):
            return sync(descriptor)
        if lose:
            path.write_bytes(bytes(path.stat().st_size))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)


def test_output_that_could_not_be_synced_is_not_recorded(
    made: Path, folder: Path, often: pytest.MonkeyPatch
) -> None:
    often.setattr(journal, "INTERVAL_S", 60.0)  # but for the one at the end
    fail_to_sync(often, "model-00001", errno.EIO, lose=True)
    with pytest.raises(OSError, match="Input/output error"):
        merge(folder)
    often.undo()
    merge(folder)
    assert weights(folder / "out") == weights(made / "expected")


@pytest.mark.parametrize("name", ["negmerge.json", "rank-0.json", "journal-0"])
def test_a_full_disk_is_named(folder: Path, often: pytest.MonkeyPatch, name: str) -> None:
    """Where no space is left for the small files, either."""
    fail_to_sync(often, name, errno.ENOSPC)
    if name == "rank-0.json":  # of several processes only
        with staging_for(folder / "out") as staging:
            staging.open()
            with pytest.raises(OSError) as caught:
                staging.write_rank_result(0, {})
    else:
        with pytest.raises(OSError) as caught:
            merge(folder)
    assert caught.value.errno == errno.ENOSPC and Path(caught.value.filename).name == name


def test_a_full_disk_at_the_end_loses_nothing(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_sync(monkeypatch, "negmerge.json", errno.ENOSPC)
    with pytest.raises(OSError):
        merge(folder)
    monkeypatch.undo()
    report = merge(folder)
    assert report.bytes_written == 0 and report.bytes_done_before > 0
    assert weights(folder / "out") == weights(made / "expected")


def test_a_crash_right_after_the_exchange(made: Path, folder: Path, often: pytest.MonkeyPatch) -> None:
    """The older output, of the same size, is not resumed as if it were the new one."""
    merge(folder, scale=0.5)
    older = weights(folder / "out")

    def crash(*arguments: Any) -> None:
        raise Stop

    often.setattr(publish, "_check_exchanged", crash)
    often.setattr(Staging, "_leave", lambda self, is_published: None)
    with pytest.raises(Stop):
        merge(folder, overwrite=True)
    often.undo()
    assert weights(folder / "out") == weights(made / "expected")
    assert weights(folder / ".out.negmerge" / "output") == older
    merge(folder, overwrite=True)
    assert weights(folder / "out") == weights(made / "expected")
    assert not (folder / ".out.negmerge").exists()


def test_a_crash_right_before_the_exchange(made: Path, folder: Path, often: pytest.MonkeyPatch) -> None:
    merge(folder, scale=0.5)
    rename = Entry.rename_with

    def crash(self: Entry, to: Entry, flags: int) -> None:
        if self.name == "output":  # the preflight renames others
            raise Stop
        rename(self, to, flags)

    often.setattr(Entry, "rename_with", crash)
    with pytest.raises(Stop):
        merge(folder, overwrite=True)
    often.setattr(Entry, "rename_with", rename)
    assert merge(folder, overwrite=True).bytes_done_before > 0
    assert weights(folder / "out") == weights(made / "expected")


def test_an_interrupt_is_raised_when_the_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its thread would still write when the lock is let go."""
    with Directory.at(tmp_path) as directory:
        synced = Event()
        kept = journal.Journal(directory / "journal-0", {}, lambda: synced.wait() and None)
        kept.keep(journal.summed([]))
        wait = kept._written.wait

        def interrupted() -> bool:
            if not synced.is_set():
                synced.set()
                raise KeyboardInterrupt
            return wait()

        monkeypatch.setattr(kept._written, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept.flush()
        assert len((tmp_path / "journal-0").read_bytes().splitlines()) == 2


def test_nothing_is_kept_without_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise Stop

    monkeypatch.setattr(shutil, "disk_usage", stop)
    with pytest.raises(Stop):
        merge(folder)
    assert nothing_left(folder)


HOSTILE: dict[str, tuple[str, str]] = {
    "a list": ("[]", "a line is a JSON list, expected an object"),
    "no JSON": ("{", "a line is not JSON"),
    "deep": ('{"runs":' + "[" * 100_000 + "]" * 100_000 + "}", "a line is not JSON"),
    "empty": ("{}", "a record that negmerge did not write"),
    "runs of text": ('{"runs":["ab"],"read":0,"skipped":0,"tensors":{}}', "a record that negmerge did not write"),
    "runs of three": ('{"runs":[[1,2,3]],"read":0,"skipped":0,"tensors":{}}', "a record that negmerge did not"),
    "below zero": ('{"runs":[[-1,2]],"read":0,"skipped":0,"tensors":{}}', "a record that negmerge did not write"),
    "halves": ('{"runs":[[0,1.5]],"read":0,"skipped":0,"tensors":{}}', "a record that negmerge did not write"),
    "no tensors": ('{"runs":[],"read":0,"skipped":0,"tensors":[]}', "a record that negmerge did not write"),
    "counts": ('{"runs":[],"read":0,"skipped":0,"tensors":{"w":[1,2]}}', "a record that negmerge did not write"),
    "read": ('{"runs":[],"read":"1","skipped":0,"tensors":{}}', "a record that negmerge did not write"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_a_journal_that_negmerge_did_not_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str, first: bool
) -> None:
    """Complete lines with the right checksums, in place of the fingerprint or of a record."""
    interrupt(folder, monkeypatch)
    path = folder / ".out.negmerge" / "journal-0"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[0 if first else 1] = b"%08x %s\n" % (zlib.crc32(line.encode()), line.encode())
    path.write_bytes(b"".join(lines))
    with pytest.raises(nm.InputError, match=r"journal-0: ") as caught:
        merge(folder)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 1000
    assert reason in said or (first and "was made with" in said)


@pytest.mark.parametrize(("tensors", "ranges"), [(60_000, 1), (1, 70_000)])
def test_a_long_record_is_read(tmp_path: Path, tensors: int, ranges: int) -> None:
    """Of many tensors with short names, or of many ranges: it is denser than a header of others may be."""
    stats = Stats()
    stats.include({f"{k}": TensorStats(768, 300, 0, 0) for k in range(tensors)})
    record = journal.ProgressRecord([Range(10 * k, 10 * k + 5) for k in range(ranges)], stats, 1)
    with Directory.at(tmp_path) as directory:
        entry = Entry(directory, "journal-0")
        written = journal.Journal(entry, {}, lambda: None)
        written.keep_now(record)
        assert (tmp_path / "journal-0").stat().st_size > 1 << 20
        (found,) = journal.read(entry, {})
    assert found.to_json() == record.to_json()

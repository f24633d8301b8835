"""Resumed merges: the same bytes as without an interruption, and nothing that looks like an output before."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import nothing_left, read_manifest, save_model
from interrupted import contents, finish, kill_all, make_models, start, under_way
from resumable import Stop, folder, interrupt, made, merge, weights  # noqa: F401
from safetensors.torch import load_file
from small_chunks import record_every_chunk
from staged import staging_for

import negmerge_fast as nm
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.core.ranges import Range
from negmerge_fast.output import journal, manifest
from negmerge_fast.output.staging import Staging
from negmerge_fast.output.writer import Writer
from negmerge_fast.runtime.distributed import PeerError, SingleProcess
from negmerge_fast.streaming.job import Job
from negmerge_fast.streaming.progress import ChunkResult, Progress

pytestmark = pytest.mark.processes

# Of each kind of merge in the slow test; NEGMERGE_KILLS=50 for more.
KILLS = int(os.environ.get("NEGMERGE_KILLS", "8"))


def test_a_merge_is_resumed(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, monkeypatch)
    assert not (folder / "out").exists()
    seen = []
    # With other chunks than before.
    report = merge(folder, memory_budget="6MB", progress=lambda done, total: seen.append((done, total)))
    assert weights(folder / "out") == weights(made / "expected")
    assert 0.2 < report.bytes_done_before / (report.bytes_done_before + report.bytes_written) < 0.9
    whole = nm.merge_checkpoints(made / "base", [made / "ft-0", made / "ft-1"], folder / "again", scale=0.9)
    assert report.tensors == whole.tensors and report.consensus_ratio == whole.consensus_ratio
    assert seen[0][0] > 0.2 * seen[0][1] and seen[-1][0] == seen[-1][1]
    assert not (folder / ".out.negmerge").exists()


def test_what_was_done_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, monkeypatch, at=0.7)
    read, counted = Reader.read_into, []

    def count(self: Reader, file: Any, offset: int, buffer: memoryview, *more: Any) -> Any:
        if "ft-0" in str(file.path) and offset:
            counted.append(len(buffer))
        return read(self, file, offset, buffer, *more)

    monkeypatch.setattr(Reader, "read_into", count)
    report = merge(folder)
    size = sum(p.stat().st_size for p in (folder / "ft-0").glob("*.safetensors"))
    assert sum(counted) < 0.7 * size and report.bytes_read < 0.7 * 3 * size


def test_without_resume_unfinished_output_is_replaced_or_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(folder, monkeypatch)
    assert merge(folder, resume=False).bytes_done_before == 0
    shutil.rmtree(folder / "out")
    interrupt(folder, monkeypatch, resume=False)
    assert nothing_left(folder)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale": 0.8}, r"was made with scale 0\.9, expected 0\.8"),
    "min_agreement": ({"min_agreement": 0.75}, r"was made with min_agreement 1\.0, expected 0\.75"),
    "inputs": ({"inputs": "task_vectors"}, "was made with inputs 'finetuned', expected 'task_vectors'"),
    "exclude": ({"exclude": "w3"}, "was made with exclude None, expected 'w3'"),
}


@pytest.mark.parametrize(("options", "reason"), CHANGES.values(), ids=CHANGES)
def test_unfinished_output_of_another_job_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    interrupt(folder, monkeypatch)
    before = contents(folder / ".out.negmerge")
    with pytest.raises(nm.InputError, match=f"journal-0: the unfinished output {reason}"):
        merge(folder, **options)
    assert contents(folder / ".out.negmerge") == before
    assert merge(folder).bytes_done_before > 0


def test_changed_inputs_are_refused(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ft-1").unlink()
    shutil.copytree(made / "ft-1", folder / "ft-1")
    interrupt(folder, monkeypatch)
    shard = sorted((folder / "ft-1").glob("*.safetensors"))[1]
    os.utime(shard)
    with pytest.raises(nm.InputError, match=rf"was made of another \S+{shard.name}"):
        merge(folder)
    # Other models, in another order.
    with pytest.raises(nm.InputError, match="was made with models"):
        nm.merge_checkpoints(
            folder / "base", [folder / "ft-1", folder / "ft-0"], folder / "out", scale=0.9, resume=True
        )
    monkeypatch.setattr(manifest, "__version__", "0.0.1")
    with pytest.raises(nm.InputError, match=r"was made with negmerge_fast '\S+', expected '0\.0\.1'"):
        merge(folder)


def test_a_damaged_journal_or_output(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, monkeypatch)
    [path] = folder.glob(".out.negmerge/journal-0")
    lines = path.read_bytes().splitlines(keepends=True)
    # A crash cut the last line short: the lines before it count.
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-5])
    first = [run for line in lines[1:3] for run in json.loads(line[9:])["runs"]]
    [output] = list((folder / ".out.negmerge" / "output").glob("model-00001-of-*"))
    held = output.read_bytes()
    output.write_bytes(held[:-1])
    with pytest.raises(
        nm.InputError, match=rf"{output.name}: \d+ bytes, expected {len(held)} bytes of unfinished"
    ):
        merge(folder)
    output.write_bytes(held)
    assert merge(folder).bytes_done_before == sum(end - begin for begin, end in first)
    assert weights(folder / "out") == weights(made / "expected")


def test_a_journal_without_a_complete_line_counts_as_none(made: Path, folder: Path) -> None:
    (folder / ".out.negmerge").mkdir()
    (folder / ".out.negmerge" / "lock").touch()
    (folder / ".out.negmerge" / "journal-0").write_bytes(b"1234 {}\n")
    assert merge(folder).bytes_done_before == 0
    assert weights(folder / "out") == weights(made / "expected")


def test_a_record_is_written_after_its_bytes_are_synced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a crash would leave holes that no run fills."""
    order: list[tuple[str, int]] = []
    written, sync, append = Writer.written, Writer.sync, journal.Journal.append
    moved = [0, 0]

    def noted_written(self: Writer, name: str, offset: int, data: memoryview, *more: Any) -> None:
        written(self, name, offset, data, *more)
        moved[0] += len(data)

    def noted_sync(self: Writer) -> None:
        at = moved[0]
        sync(self)
        moved[1] = at

    def noted_append(self: journal.Journal, record: journal.ProgressRecord) -> None:
        order.append(("record", sum(run.end - run.begin for run in record.ranges)))
        assert sum(size for _, size in order) <= moved[1]
        append(self, record)

    monkeypatch.setattr(Writer, "written", noted_written)
    monkeypatch.setattr(Writer, "sync", noted_sync)
    monkeypatch.setattr(journal.Journal, "append", noted_append)
    record_every_chunk(monkeypatch)
    merge(folder, progress=lambda *_: time.sleep(0.005))
    assert len(order) > 3


def test_nonfinite_found_late_can_be_kept_after_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ft-1").unlink()
    make_models(folder)
    path = sorted((folder / "ft-1").glob("*.safetensors"))[1]
    tensors = load_file(path)
    tensors["w15"][7] = float("nan")
    metadata = {"format": "pt"}
    torch_save(tensors, path, metadata)
    record_every_chunk(monkeypatch)
    with pytest.raises(nm.InputError, match="tensor 'w15': nan at"):
        merge(folder)
    report = merge(folder, nonfinite="keep-base")
    assert report.nonfinite == 1 and report.bytes_done_before > 0


def torch_save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata=metadata)


def test_nonfinite_elements_of_an_earlier_run_are_an_error_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "ft-0", "ft-1"):
        (folder / name).unlink()
    tensors = {f"w{k}": torch.ones(1 << 17) for k in range(8)}
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        save_model(
            folder / name, {n: t * (k + 1) for n, t in tensors.items()} | {"w0": tensors["w0"] * float("inf")}
        )
    interrupt(folder, monkeypatch, nonfinite="keep-base")
    with pytest.raises(nm.InputError, match="elements that are not finite were counted"):
        merge(folder)
    assert merge(folder, nonfinite="keep-base").nonfinite == 1 << 17


def test_a_published_output_is_finished(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed while it tidied up, or one that is started again."""

    def killed(self: Staging) -> None:
        raise Stop

    monkeypatch.setattr(Staging, "_remove", killed)
    with pytest.raises(Stop):
        merge(folder)
    monkeypatch.undo()
    assert (folder / ".out.negmerge").exists()
    before = contents(folder / "out")
    report = merge(folder)
    assert contents(folder / "out") == before and not (folder / ".out.negmerge").exists()
    assert (report.bytes_written, report.elements) == (0, 16 << 17) and 0 < report.agreed < report.elements
    listed = folder / "out" / "negmerge.json"
    whole = read_manifest(listed)
    assert report.vetoed_by_zero == whole["counted"].pop("vetoed_by_zero") > 0
    listed.write_text(json.dumps(whole))  # as an older version wrote it
    assert merge(folder).vetoed_by_zero is None
    assert nm.verify_checkpoint(folder / "out", [folder / n for n in ("base", "ft-0", "ft-1")]).blocks
    [(status, said, _)] = finish(start(folder, "--resume"))
    assert status == 0 and said.endswith("out: was finished already\n")
    for other in ({"scale": 0.8}, {"resume": False}):
        with pytest.raises(nm.InputError, match="exists already"):
            merge(folder, **other)
    os.utime(folder / "out" / "negmerge.json", (1, 1))  # older than the models
    with pytest.raises(nm.InputError, match="exists already"):
        merge(folder)
    os.utime(folder / "out" / "negmerge.json")
    os.truncate(folder / "out" / "config.json", 3)
    with pytest.raises(nm.InputError, match="exists already"):
        merge(folder)


def test_a_second_run_is_refused_while_the_first_is_under_way(folder: Path) -> None:
    [process] = start(folder, "--resume", wait=0.05)
    under_way(folder, [process])
    [(status, _, said)] = finish(start(folder, "--resume"))
    assert status == 2 and "another negmerge is writing it" in said
    process.send_signal(signal.SIGTERM)
    assert finish([process]) == [(143, "", "negmerge: terminated\n")]
    assert not (folder / "out").exists() and list(folder.glob(".out.negmerge/journal-0"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(made: Path, folder: Path, ranks: int) -> None:
    generator = random.Random(ranks)
    kept = 0
    for kill in range(KILLS):
        processes = start(folder, "--resume", ranks=ranks, wait=0.012)
        # From before the first import to after the last byte.
        if kill % 8:
            while not (folder / ".out.negmerge").exists():
                time.sleep(0.005)
        time.sleep(generator.uniform(0, 2.4 / ranks))
        kill_all(processes, generator, one=ranks > 1 and kill % 2 == 0)
        if published := (folder / "out").exists():
            assert weights(folder / "out") == weights(made / "expected")
        else:
            kept += bool(list(folder.glob(".out.negmerge/journal-*")))
        if not published or (folder / ".out.negmerge").exists():  # or killed while it was tidied up
            ended = finish(start(folder, "--resume", ranks=generator.choice([1, ranks]), wait=0.0))
            assert [status for status, *_ in ended] == [0] * len(ended), ended
            assert weights(folder / "out") == weights(made / "expected")
        assert not (folder / ".out.negmerge").exists()
        shutil.rmtree(folder / "out")
    print(
        f"{ranks} processes: {KILLS} kills, {kept} with something on record, {KILLS} of {KILLS} the same bytes"
    )
    assert kept >= KILLS // 4


def test_unfinished_output_of_another_merge_is_left_alone(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished merge that is started again clears what is its own only, and says so."""
    merge(folder)
    interrupt(folder, monkeypatch, scale=0.5, overwrite=True)
    unfinished = contents(folder / ".out.negmerge")
    report = merge(folder)
    assert report.bytes_written == 0 and report.notes == [
        f"{folder}/.out.negmerge: the unfinished output of another merge, left alone"
    ]
    assert contents(folder / ".out.negmerge") == unfinished
    assert merge(folder, scale=0.5, overwrite=True).bytes_done_before > 0
    assert not (folder / ".out.negmerge").exists()


@pytest.mark.parametrize("changed", ["base", "ft-1"])
def test_an_input_that_is_replaced_meanwhile(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """By a rename, as editors and downloads do it: what is read is still the old one, and the output is of no input."""
    record_every_chunk(monkeypatch)
    (folder / changed).unlink()
    shutil.copytree(made / changed, folder / changed)
    path, replaced = min((folder / changed).glob("*.safetensors")), []

    def replace(done: int, total: int) -> None:
        if done > 0.7 * total and not replaced:  # the first shard is read, and not opened again
            assert done < total
            shutil.copy2(path, folder / "new")
            (folder / "new").replace(path)
            replaced.append(done)

    with pytest.raises(OSError, match=f"{path}: the file changed while it was being read"):
        merge(folder, progress=replace, resume=False, threads=1)
    assert replaced and nothing_left(folder)


def test_a_rank_that_comes_when_the_first_is_stopped(tmp_path: Path) -> None:
    """The first holds the lock alone to remove what it made: no other merge is under way."""

    class Second(SingleProcess):
        rank, count = 1, 2

        def poll(self, moved: int) -> int:
            raise PeerError("another rank failed")

    first, second = (staging_for(tmp_path / "out") for _ in range(2))
    with first:
        first.open()
        job: Any = SimpleNamespace(rank_fingerprint={}, staging=second)
        with pytest.raises(PeerError):
            Job.join(job, {}, Second())


def test_a_chunk_that_an_interrupt_left_half_counted_is_not_on_record() -> None:
    """It would be counted once more by the run that resumes."""

    class Interrupting(list[object]):
        def __iter__(self) -> Iterator[object]:
            yield [("a", 5)], np.array([[1, 0, 0]])
            raise KeyboardInterrupt

    progress = Progress([Range(0, 40)])
    progress.add(ChunkResult(20, 20, [([("a", 5)], np.array([[2, 0, 0]]))]))
    assert progress.record().ranges == [Range(0, 20)]
    with pytest.raises(KeyboardInterrupt):
        progress.add(ChunkResult(20, 20, Interrupting()))  # type: ignore[arg-type]
    left = progress.record()
    assert not left.ranges and not left.stats.tensors

"""Publishing: an output replaces only what negmerge wrote, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import family, save_model
from interrupted import contents
from small_models import folder, merge  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.output import publish
from negmerge_fast.output.destination import Destination
from negmerge_fast.output.directory import Entry


def test_overwrite_replaces_what_negmerge_wrote(folder: Path) -> None:
    merge(folder)
    first = contents(folder / "out")
    with pytest.raises(nm.InputError, match="out: exists already"):
        merge(folder)
    # A former output of a base with other files, known by its manifest.
    names = list(family()[0])
    shutil.rmtree(folder / "base")
    save_model(folder / "base", family()[0], [names[:2], names[2:]])
    merge(folder, overwrite=True)
    assert set(contents(folder / "out")) == {*contents(folder / "base"), "negmerge.json"} != set(first)
    assert not (folder / ".out.negmerge").exists()


def test_overwrite_deletes_no_unknown_file(folder: Path) -> None:
    merge(folder)
    (folder / "out" / "notes.txt").write_text("mine")
    before = contents(folder / "out")
    with pytest.raises(nm.InputError, match=r"notes.txt: not negmerge's, so .*out is not replaced"):
        merge(folder, overwrite=True)
    assert contents(folder / "out") == before
    shutil.rmtree(folder / "out")
    (folder / "out").write_text("a file")
    with pytest.raises(nm.InputError, match="exists and is not a directory"):
        merge(folder, overwrite=True)
    (folder / "out").unlink()
    (folder / "out").symlink_to(folder / "ft-0")
    with pytest.raises(nm.InputError, match="the output is the input"):
        merge(folder, overwrite=True)
    (folder / "out").unlink()
    (folder / "out").symlink_to(folder / "nowhere")
    with pytest.raises(nm.InputError, match="exists and is not a directory"):
        merge(folder, overwrite=True)


def test_a_single_file_output(folder: Path) -> None:
    single = [folder / name / "model.safetensors" for name in ("base", "ft-0", "ft-1")]
    with pytest.raises(nm.InputError, match=r"expected a file name that ends in \.safetensors"):
        nm.merge_checkpoints(single[0], single[1:], folder / "out", scale=0.9)
    target = folder / "out.safetensors"
    target.write_text("somebody's")
    with pytest.raises(nm.InputError, match=r"out\.safetensors"):
        nm.merge_checkpoints(single[0], single[1:], target, scale=0.9, overwrite=True)
    assert target.read_text() == "somebody's"
    target.unlink()
    for _ in range(2):
        nm.merge_checkpoints(single[0], single[1:], target, scale=0.9, overwrite=True)
    merge(folder)
    assert target.read_bytes() == (folder / "out" / "model.safetensors").read_bytes()
    assert {p.name for p in folder.iterdir()} == {
        "base", "ft-0", "ft-1", "out", "out.safetensors", "out.safetensors.negmerge.json",
    }  # fmt: skip


def test_an_unknown_file_that_appears_at_the_last_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last check and the exchange; the older output is put back."""
    merge(folder)
    check, before = publish.check_existing, contents(folder / "out")

    def and_then(destination: Destination) -> None:
        check(destination)
        (folder / "out" / "notes.txt").write_text("mine")

    monkeypatch.setattr(publish, "check_existing", and_then)
    with pytest.raises(nm.InputError, match=r"out/notes.txt: not negmerge's"):
        merge(folder, overwrite=True)
    assert contents(folder / "out") == {**before, "notes.txt": b"mine"}
    assert not (folder / ".out.negmerge").exists()


def test_a_link_in_the_path_of_the_output_is_followed(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "deep" / "er")
    report = nm.merge_checkpoints(folder / "base", [folder / "ft-0"], f"{folder}/link/../out", scale=0.9)
    assert (
        report.output == str(folder / "deep" / "out") and (folder / "deep" / "out" / "config.json").exists()
    )


def test_every_file_is_on_the_disk_before_it_is_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync, rename = os.fsync, Entry.rename_with

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def after(self: Entry, to: Entry, flags: int) -> None:
        if self.name == "output":  # the preflight renames others
            assert synced >= {file.name for file in self.path.iterdir()}
        rename(self, to, flags)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Entry, "rename_with", after)
    merge(folder)
    assert contents(folder / "out").keys() <= synced


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(Entry, "rename_with", unsupported)


@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
def test_a_file_system_without_exchange(folder: Path, without_exchange: None) -> None:
    """Two renames replace an older output; that is said."""
    merge(folder, min_agreement=0.6)
    assert merge(folder, overwrite=True).notes == [
        f"{folder}/out: cannot be replaced in one step here: for a moment there will be no output"
    ]
    replaced = contents(folder / "out")
    shutil.rmtree(folder / "out")
    merge(folder)
    assert contents(folder / "out") == replaced and not (folder / ".out.negmerge").exists()


def test_an_older_output_is_put_back_if_the_new_one_cannot_take_its_place(
    folder: Path, without_exchange: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(folder)
    before, rename = contents(folder / "out"), Entry.rename

    def failing(self: Entry, to: Entry) -> None:
        if self.name == "output":
            raise OSError(errno.EIO, "Input/output error", str(to.path))
        rename(self, to)

    monkeypatch.setattr(Entry, "rename", failing)
    with pytest.raises(OSError, match=r"Input/output error: '.*out'"):
        merge(folder, overwrite=True)
    assert contents(folder / "out") == before and not (folder / ".out.negmerge").exists()
    monkeypatch.setattr(Entry, "rename", rename)
    (folder / "out" / "notes.txt").write_text("mine")
    monkeypatch.setattr(publish, "check_existing", lambda _: None)  # as if it had come later
    with pytest.raises(nm.InputError, match=r"out/notes.txt: not negmerge's"):
        merge(folder, overwrite=True)
    assert contents(folder / "out") == {**before, "notes.txt": b"mine"}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("done", [1, 2])
def test_killed_between_the_two_renames(folder: Path, done: int, resume: bool) -> None:
    """Or right after them: the next run finds the older output, or the new one."""
    code = (
        "import os, negmerge_fast as nm\n"
        "from negmerge_fast.output import journal\n"
        "from negmerge_fast.output.directory import Entry\n"
        "journal.INTERVAL_S = 0.0\n"
        "def unsupported(*_): raise OSError(22, 'Invalid argument')\n"
        "Entry.rename_with, rename, renames = unsupported, Entry.rename, []\n"
        "def killed(source, to):\n"
        "    rename(source, to)\n"
        "    renames.extend([1] * (source.parent.path.name == '.out.negmerge' or source.name == 'out'))\n"
        f"    if len(renames) == {done}: os._exit(9)\n"
        "Entry.rename = killed\n"
        f"nm.merge_checkpoints('base', ['ft-0', 'ft-1'], 'out', scale=0.9, overwrite=True, resume={resume})"
    )
    merge(folder)
    expected = contents(folder / "out")
    merge(folder, min_agreement=0.6, overwrite=True)
    older = contents(folder / "out")
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 9
    assert (folder / "out").exists() == (done == 2)
    if done == 1:
        with pytest.raises(nm.InputError, match="out: exists already"):
            merge(folder, resume=resume)
        assert contents(folder / "out") == older
    merge(folder, overwrite=True, resume=resume)
    assert contents(folder / "out") == expected and not (folder / ".out.negmerge").exists()


# As overlayfs with an output in a lower layer: its directory cannot be renamed. Killed after some moves of its files, and of what
# takes their place.
OVERLAY = """
import os, sys
import negmerge_fast as nm
from negmerge_fast.output import journal
from negmerge_fast.output.directory import Entry
journal.INTERVAL_S = 0.0
rename, rename_with, moved = Entry.rename, Entry.rename_with, []
def refuse(source, to):
    if source.name == "out" or (to.name == "out" and to.exists()):
        raise OSError(18, "Invalid cross-device link", str(source.path))
def count(source):
    moved.extend([source] * (".negmerge-" not in str(source.path)))
    if len(moved) == int(sys.argv[1]):
        os._exit(9)
def plain(source, to):
    refuse(source, to)
    rename(source, to)
    count(source)
def with_flags(source, to, flags):
    refuse(source, to)
    rename_with(source, to, flags)
    count(source)
Entry.rename, Entry.rename_with = plain, with_flags
report = nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", scale=0.9, overwrite=True, resume=sys.argv[2] == "True")
print(*report.notes)
"""


@pytest.mark.processes
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("moves", [1, 2, 3, 4, 5])
def test_an_output_that_can_only_be_moved_file_by_file(folder: Path, moves: int, resume: bool) -> None:
    merge(folder)
    expected = contents(folder / "out")
    merge(folder, min_agreement=0.6, overwrite=True)
    older = contents(folder / "out")
    assert len(older) == 4, "each is moved"

    def overlay(moves: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OVERLAY, str(moves), str(resume)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    assert overlay(moves).returncode == 9
    if moves == 5:  # the new one has just taken its place
        assert contents(folder / "out") == expected
    else:
        left = contents(folder / ".out.negmerge" / "former")
        assert len(left) == moves and {**contents(folder / "out"), **left} == older
        with pytest.raises(nm.InputError, match="out: exists already"):
            merge(folder, resume=resume)
    if moves == 2 or (moves == 5 and resume):  # the last is finished
        merge(folder, resume=resume, overwrite=True)
    else:
        done = overlay(100)
        assert done.stdout.rstrip().endswith(
            "out: was replaced file by file: its directory cannot be moved"
        ), done
    assert contents(folder / "out") == expected and not (folder / ".out.negmerge").exists()


# Killed after so many renames that publish a single file: of its manifest, and of itself.
KILLED = """
import os, sys
import negmerge_fast as nm
from negmerge_fast.output import journal
from negmerge_fast.output.directory import Entry
journal.INTERVAL_S = 0.0
rename, with_flags, renames = Entry.rename, Entry.rename_with, []
def count(source):
    renames.extend([source] * (source.parent.path.name == "output"))
    if len(renames) == int(sys.argv[1]):
        os._exit(9)
def plain(source, to):
    rename(source, to)
    count(source)
def to_new(source, to, flags):
    with_flags(source, to, flags)
    count(source)
Entry.rename, Entry.rename_with = plain, to_new
options = {"overwrite": sys.argv[2] == "True", "resume": sys.argv[3] == "True"}
nm.merge_checkpoints("base/model.safetensors", ["ft-0/model.safetensors"], "out.safetensors", scale=0.9, **options)
"""


@pytest.mark.processes
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("renames", [1, 2])
def test_a_single_file_that_was_killed_between_its_renames(
    folder: Path, renames: int, overwrite: bool, resume: bool
) -> None:
    """Or right after them: the same command ends well, and says "finished" of nothing but the new bytes."""
    base, models, out = (
        folder / "base" / "model.safetensors",
        [folder / "ft-0" / "model.safetensors"],
        folder / "out.safetensors",
    )
    nm.merge_checkpoints(base, models, folder / "new.safetensors", scale=0.9)
    if overwrite:
        nm.merge_checkpoints(base, models, out, scale=0.5)
        before = out.read_bytes()
    command = [sys.executable, "-c", KILLED, str(renames), str(overwrite), str(resume)]
    assert subprocess.run(command, cwd=folder).returncode == 9
    if renames == 1:
        assert out.read_bytes() == before if overwrite else not out.exists()
    options = {"overwrite": overwrite, "resume": resume}
    if renames == 2 and not overwrite and not resume:
        with pytest.raises(nm.InputError, match="exists already"):
            nm.merge_checkpoints(base, models, out, scale=0.9, **options)
        assert not (folder / ".out.safetensors.negmerge").exists()
        options["overwrite"] = True
    report = nm.merge_checkpoints(base, models, out, scale=0.9, **options)
    assert (report.bytes_written == 0) == (resume and (renames == 2 or report.bytes_done_before > 0))
    assert out.read_bytes() == (folder / "new.safetensors").read_bytes()
    assert nm.verify_checkpoint(out).files == 1 and not (folder / ".out.safetensors.negmerge").exists()


def test_a_copy_of_a_manifest_that_a_kill_cut_short(folder: Path) -> None:
    """The manifest itself is still in its place, and stays there."""
    base, models = folder / "base" / "model.safetensors", [folder / "ft-0" / "model.safetensors"]
    nm.merge_checkpoints(base, models, folder / "out.safetensors", scale=0.5)
    staging_dir = folder / ".out.safetensors.negmerge"
    (staging_dir / "output").mkdir(parents=True, mode=0o700)
    for name in ("lock", "former", "output/model.safetensors"):
        (staging_dir / name).touch()
    nm.merge_checkpoints(base, models, folder / "out.safetensors", scale=0.9, overwrite=True)
    assert nm.verify_checkpoint(folder / "out.safetensors").files == 1 and not staging_dir.exists()


def test_another_job_after_a_kill_between_the_renames(folder: Path) -> None:
    """It puts the older manifest back, or it would not know the older file."""
    base, models, out = (
        folder / "base" / "model.safetensors",
        [folder / "ft-0" / "model.safetensors"],
        folder / "out.safetensors",
    )
    nm.merge_checkpoints(base, models, out, scale=0.5)
    assert subprocess.run([sys.executable, "-c", KILLED, "1", "True", "True"], cwd=folder).returncode == 9
    with pytest.raises(nm.InputError, match=r"output was made with scale 0\.9, expected 0\.7"):
        nm.merge_checkpoints(base, models, out, scale=0.7, resume=True, overwrite=True)
    assert nm.verify_checkpoint(out).files == 1
    nm.merge_checkpoints(base, models, out, scale=0.7, overwrite=True)
    assert nm.verify_checkpoint(out, [base, *models]).blocks
    assert not (folder / ".out.safetensors.negmerge").exists()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupt_between_the_renames_of_a_single_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, renames: int, overwrite: bool
) -> None:
    """Or right after the last: file and manifest belong together."""
    base, models, out = (
        folder / "base" / "model.safetensors",
        [folder / "ft-0" / "model.safetensors"],
        folder / "out.safetensors",
    )
    if overwrite:
        nm.merge_checkpoints(base, models, out, scale=0.5)
    done: list[str] = []

    def interrupted(name: str) -> None:
        rename = getattr(Entry, name)

        def call(self: Entry, *arguments: Any) -> None:
            rename(self, *arguments)
            done.extend([self.name] * (self.parent.path.name == "output"))
            if len(done) == renames:
                done.append("never again")
                raise KeyboardInterrupt

        monkeypatch.setattr(Entry, name, call)

    interrupted("rename")
    interrupted("rename_with")
    with pytest.raises(KeyboardInterrupt):
        nm.merge_checkpoints(base, models, out, scale=0.9, overwrite=overwrite)
    listed = folder / "out.safetensors.negmerge.json"
    if renames == 2 or overwrite:
        assert nm.verify_checkpoint(out).files == 1
        assert json.loads(listed.read_text())["scale"] == (0.9 if renames == 2 else 0.5)
    else:
        assert not out.exists() and not listed.exists()
    assert not (folder / ".out.safetensors.negmerge").exists()

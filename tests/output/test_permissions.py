"""Who may read an output: nobody who could not read all that went into it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest
from resumable import Stop
from small_chunks import record_every_chunk
from small_models import folder, merge  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.output.staging import Staging


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def modes(folder: Path) -> Path:
    """A folder with models that everybody may read."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o7777:o}"


def found(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): mode(p) for p in (folder, *folder.rglob("*"))}


def test_what_everybody_may_read_stays_so(modes: Path) -> None:
    merge(modes)
    assert found(modes / "out") == {
        ".": "755", "config.json": "644", "model.safetensors": "644", "negmerge.json": "644", "tokenizer.json": "644",
    }  # fmt: skip


# What is made private, and the modes of the directory, the weights, the manifest and a copied file.
PRIVATE = {
    "base": (0o700, "700 600 600 600"),
    "base/model.safetensors": (0o600, "755 600 600 644"),
    "base/config.json": (0o400, "755 644 600 600"),
    "ft-1": (0o750, "755 640 640 644"),
    "ft-1/model.safetensors": (0o640, "755 640 640 644"),
    "ft-0/model.safetensors": (0o604, "755 604 604 644"),
}


@pytest.mark.parametrize("private", PRIVATE)
def test_what_somebody_may_not_read_stays_private(modes: Path, private: str) -> None:
    given, expected = PRIVATE[private]
    (modes / private).chmod(given)
    merge(modes)
    names = (".", "model.safetensors", "negmerge.json", "config.json")
    assert " ".join(found(modes / "out")[name] for name in names) == expected


def test_folders_above_an_input_and_above_a_link_to_it(modes: Path) -> None:
    """Those that lead to the output, too, keep others away from both."""
    (modes / "closed").mkdir(mode=0o700)
    shutil.move(modes / "ft-0", modes / "closed" / "ft-0")
    (modes / "ft-0").symlink_to(modes / "closed" / "ft-0")
    merge(modes)
    assert found(modes / "out")["model.safetensors"] == "600"
    (modes / "base").rename(modes / "closed" / "base")
    inside = modes / "closed" / "out"
    nm.merge_checkpoints(modes / "closed" / "base", [modes / "ft-0"], inside, scale=0.9)
    assert found(inside)["model.safetensors"] == "644"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to any group")
def test_a_group_of_other_people(modes: Path) -> None:
    """What the group of an input may do, the group of the output may not, unless everybody may."""
    os.chown(modes / "base" / "model.safetensors", -1, os.getegid() + 1)
    (modes / "base" / "model.safetensors").chmod(0o640)
    os.chown(modes / "base", -1, os.getegid() + 1)
    (modes / "base").chmod(0o751)
    merge(modes)
    assert found(modes / "out")["."] == "711"
    assert found(modes / "out")["model.safetensors"] == "600"


def test_an_access_list(modes: Path) -> None:
    """It shows as the bits of the group, which may not be among those who may read."""
    if shutil.which("setfacl") is None:
        pytest.skip("no setfacl")
    path = modes / "ft-0" / "model.safetensors"
    path.chmod(0o600)
    done = subprocess.run(["setfacl", "-m", "u:65534:r", path], capture_output=True, text=True)
    if done.returncode or mode(path) != "640":
        pytest.skip(f"no access lists here: {done.stderr.strip()}")
    merge(modes)
    assert found(modes / "out")["model.safetensors"] == "600"


def set_acl(path: Path, kind: str, *entries: tuple[int, int, int]) -> None:
    """Set an access list of tags (user 1, named user 2, group 4, mask 16, others 32), permissions and ids."""
    try:
        os.setxattr(
            path, f"system.posix_acl_{kind}", b"".join([pack("<I", 2), *(pack("<HHI", *e) for e in entries)])
        )
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")


NOBODY, ALL = 65534, 0xFFFFFFFF


def test_an_access_list_that_takes_permissions_away(modes: Path) -> None:
    """From one whom others' permissions would be given to."""
    path = modes / "ft-0" / "model.safetensors"
    set_acl(path, "access", (1, 6, ALL), (2, 0, NOBODY), (4, 4, ALL), (16, 4, ALL), (32, 4, ALL))
    merge(modes)
    assert found(modes / "out")["model.safetensors"] == found(modes / "out")["negmerge.json"] == "600"
    set_acl(path, "access", (1, 6, ALL), (2, 4, NOBODY), (4, 4, ALL), (16, 4, ALL), (32, 4, ALL))
    merge(modes, overwrite=True)
    assert found(modes / "out")["model.safetensors"] == "604"


def test_a_directory_that_gives_an_access_list(modes: Path) -> None:
    """What a group may read, those whom the list names may not."""
    (modes / "ft-0" / "model.safetensors").chmod(0o640)
    set_acl(modes, "default", (1, 7, ALL), (2, 7, NOBODY), (4, 5, ALL), (16, 7, ALL), (32, 5, ALL))
    merge(modes)
    assert found(modes / "out")["model.safetensors"] == "600" and found(modes / "out")["config.json"] == "644"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory_of_a_group(modes: Path) -> None:
    """What is made in a directory with the set-group-ID bit is its group's, who may read what they could."""
    for path in (modes, *modes.rglob("*")):
        os.chown(path, -1, os.getegid() + 1)
        path.chmod(0o2750 if path.is_dir() else 0o640)
    merge(modes)
    out = modes / "out"
    assert (
        found(out)["."] == "2750" and found(out)["model.safetensors"] == found(out)["negmerge.json"] == "640"
    )
    assert {path.stat().st_gid for path in (out, *out.iterdir())} == {os.getegid() + 1}


def test_a_single_file(modes: Path) -> None:
    inputs = [modes / name / "model.safetensors" for name in ("base", "ft-0")]
    inputs[1].chmod(0o600)
    out = modes / "out.safetensors"
    nm.merge_checkpoints(inputs[0], inputs[1:], out, scale=0.9)
    assert mode(out) == mode(modes / "out.safetensors.negmerge.json") == "600"


def test_folders_of_an_output(modes: Path) -> None:
    (modes / "base" / "a" / "b").mkdir(parents=True)
    (modes / "base" / "a" / "b" / "vocab.txt").write_text("x")
    (modes / "base" / "a").chmod(0o550)
    (modes / "base" / "a" / "b").chmod(0o755)
    merge(modes)
    assert (found(modes / "out")["a"], found(modes / "out")["a/b"]) == ("750", "755")


def test_permissions_that_are_taken_away_before_a_merge_is_resumed(
    modes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_every_chunk(monkeypatch)

    def stop(done: int, total: int) -> None:
        if list(modes.glob(".out.negmerge/journal-0")):
            raise Stop

    with pytest.raises(Stop):
        merge(modes, resume=True, progress=stop, threads=1)
    assert mode(modes / ".out.negmerge" / "output" / "model.safetensors") == "644"
    (modes / "ft-0").chmod(0o700)
    assert merge(modes, resume=True).bytes_done_before > 0
    assert found(modes / "out")["model.safetensors"] == "600"


def test_nobody_may_enter_while_it_is_written(modes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    mark = Staging.mark

    def noted(self: Staging) -> None:
        seen.append(mode(modes / ".out.negmerge"))
        mark(self)

    monkeypatch.setattr(Staging, "mark", noted)
    merge(modes)
    assert seen == ["700"]

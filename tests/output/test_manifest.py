"""Manifests: their fields, and where they are; that of a single file lies beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import flip
from safetensors.torch import save_file
from small_chunks import set_chunk_bytes
from xxhash import xxh3_128_hexdigest

import negmerge_fast as nm
from negmerge_fast.output import publish

INPUTS = ("base", "ft-0", "ft-1", "ft-2")


@pytest.fixture
def folder(tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(**options: Any) -> nm.Report:
    return nm.merge_checkpoints("base", list(INPUTS[1:]), "out", **{"scale": 0.9, **options})


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def header(path: Path) -> dict[str, Any]:
    """The size of a file, and the hashes of its header, by the definition of the format, and of its sample: all of it."""
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    length = 128 if path.suffix == ".npy" else length
    header, sample = ("xxh3_128:" + xxh3_128_hexdigest(part) for part in (content[:length], content))
    return {"size": len(content), "header": header, "sample": sample}


def test_the_fields_of_a_manifest(folder: Path) -> None:
    report = merge(min_agreement=0.6, include="n", exclude="^brain$")
    manifest = json.loads(Path("out/negmerge.json").read_text())
    listed, block = manifest.pop("files"), manifest.pop("block")
    assert listed.keys() | {"negmerge.json"} == contents(Path("out")).keys() and block == 128 << 10
    read = {path: sorted(Path(path).glob("*.safetensors*")) for path in INPUTS}
    described = {
        path: {"path": path, "files": {f.name: header(f) for f in found}} for path, found in read.items()
    }
    assert "model.safetensors.index.json" in described["base"]["files"]
    assert manifest == {
        "negmerge_fast": nm.__version__,
        "base": described["base"],
        "models": [described[path] for path in INPUTS[1:]],
        "scale": 0.9,
        "min_agreement": 0.6,
        "inputs": "finetuned",
        "nonfinite": "error",
        "include": "n",
        "exclude": "^brain$",
        "rename": [],
        "keep": [],
        "drop": [],
        "counted": {"elements": report.elements, "agreed": report.agreed, "nonfinite": 0},
    }


def test_manifests_do_not_depend_on_backend_threads_or_chunks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = set()
    for options in (
        {"backend": "torch"},
        {"backend": "cpu", "threads": 1},
        {"backend": "cpu", "threads": 5, "memory_budget": "32MiB"},
    ):
        for chunk_bytes in (512, 1 << 20):
            set_chunk_bytes(monkeypatch, chunk_bytes)
            merge(overwrite=True, **options)
            manifests.add(Path("out/negmerge.json").read_bytes())
    assert len(manifests) == 1


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_single_files(folder: Path, suffix: str) -> None:
    for k, name in enumerate(INPUTS):
        values = np.random.default_rng(k).normal(size=3000)
        if suffix == "npy":
            np.save(f"{name}.npy", values)
        else:
            save_file({"w": torch.from_numpy(values)}, f"{name}.safetensors")
    paths = [f"{name}.{suffix}" for name in INPUTS]
    out = Path(f"out.{suffix}")
    nm.merge_checkpoints(paths[0], paths[1:], out, scale=0.9)
    base = json.loads(Path(f"{out}.negmerge.json").read_text())["base"]
    assert base["files"] == {paths[0]: header(Path(paths[0]))}
    done = nm.verify_checkpoint(out, paths)
    assert (done.files, done.bytes, done.not_listed) == (1, out.stat().st_size, [])
    for moved in (out, Path(f"{out}.negmerge.json"), Path(paths[0])):  # under other names
        moved.rename(f"other-{moved}")
    nm.verify_checkpoint(f"other-{out}", [f"other-{paths[0]}", *paths[1:]])
    flip(Path(f"other-{out}"), -3)
    with pytest.raises(nm.DamageError, match=f"other-{out}: checksum"):
        nm.verify_checkpoint(f"other-{out}")
    os.unlink(f"other-{out}.negmerge.json")
    with pytest.raises(nm.InputError, match=r"negmerge\.json: No such file"):
        nm.verify_checkpoint(f"other-{out}")


def merge_single(folder: Path, scale: float = 0.9, **options: Any) -> nm.Report:
    base, model = (folder / name / "model.safetensors" for name in ("ft-0", "ft-2"))
    return nm.merge_checkpoints(base, [model], folder / "out.safetensors", scale=scale, **options)


@pytest.mark.parametrize("kind", ["text", "other JSON", "directory", "dangling link", "FIFO", "deep"])
def test_an_unknown_file_where_the_manifest_of_a_single_file_goes(folder: Path, kind: str) -> None:
    manifest = folder / "out.safetensors.negmerge.json"
    make: dict[str, Callable[[], object]] = {
        "text": lambda: manifest.write_text("mine"),
        "other JSON": lambda: manifest.write_text('{"files": {}}'),
        "directory": manifest.mkdir,
        "dangling link": lambda: manifest.symlink_to("nowhere"),
        "FIFO": lambda: os.mkfifo(manifest),
        "deep": lambda: manifest.write_text('{"files":' * 100_000),
    }
    make[kind]()
    before = manifest.lstat()[:7]  # not the times: reading it moves one of them
    for overwrite in (False, True):
        with pytest.raises(nm.InputError, match=r"out\.safetensors\.negmerge\.json: not negmerge's"):
            merge_single(folder, overwrite=overwrite)
    assert manifest.lstat()[:7] == before and not (folder / "out.safetensors").exists()


def test_a_crash_between_the_manifest_and_its_single_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is new, its file is missing or older: verify reports it, and the next merge replaces it."""
    code = (
        "import os, sys, negmerge_fast as nm\n"
        "from negmerge_fast.output import publish\n"
        "publish._move = lambda *_: os._exit(9)\n"
        "single = [f'{name}/model.safetensors' for name in ('ft-0', 'ft-2')]\n"
        "nm.merge_checkpoints(single[0], single[1:], 'out.safetensors', scale=0.5, overwrite=True)"
    )

    def killed() -> None:
        assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 9

    killed()
    target, manifest = folder / "out.safetensors", folder / "out.safetensors.negmerge.json"
    assert manifest.exists() and not target.exists()
    with pytest.raises(nm.InputError, match=r"out\.safetensors: No such file"):
        nm.verify_checkpoint(target)
    merge_single(folder)
    assert nm.verify_checkpoint(target).files == 1
    before = target.read_bytes()
    killed()
    assert target.read_bytes() == before
    with pytest.raises(nm.DamageError, match="checksum"):
        nm.verify_checkpoint(target)
    merge_single(folder, overwrite=True)
    nm.verify_checkpoint(target)
    assert not (folder / ".out.safetensors.negmerge").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_single_file_that_cannot_be_moved_into_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """Its manifest is put back as it was."""
    if exists:
        merge_single(folder)
    before = contents(folder)
    monkeypatch.setattr(publish, "_move", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        merge_single(folder, scale=0.5, overwrite=True)
    assert contents(folder) == before


def test_names_of_files_that_are_not_utf_8(folder: Path) -> None:
    """Such a file is copied, listed and verified."""
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / "base" / name).write_text("?")
    merge()
    assert nm.verify_checkpoint(folder / "out").not_listed == []
    (folder / "base" / name).unlink()
    merge(overwrite=True)
    assert not (folder / "out" / name).exists()

"""Manifests: their fields, and where they are; that of a single file lies beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import flip, read_manifest, save_model
from safetensors.torch import save_file
from small_chunks import set_chunk_bytes
from xxhash import xxh3_128_hexdigest

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.reader import File
from negmerge_fast.output import publish
from negmerge_fast.output.manifest import altered

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
    text = Path("out/negmerge.json").read_text()
    manifest = json.loads(text)
    before, _, last = text.rpartition(',\n  "checksum": ')
    assert manifest.pop("checksum") == "xxh3_128:" + xxh3_128_hexdigest(before.encode())
    assert last.endswith('"\n}\n')
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
        "counted": {
            "elements": report.elements,
            "agreed": report.agreed,
            "nonfinite": 0,
            "vetoed_by_zero": 0,
        },
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


def test_manifests_do_not_depend_on_what_was_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the larger chunks the NaN is read, for another element there agrees."""
    for k, name in enumerate(INPUTS):
        values = torch.zeros(1 << 14)
        values[: 1 << 10] = k
        values[-1] = float("nan") if name == "ft-2" else 0
        save_file({"w": values}, f"{name}.safetensors")
    manifests, seen = set(), set()
    for chunk_bytes, threads in ((1 << 12, 1), (1 << 20, 5), (1 << 14, 2)):
        set_chunk_bytes(monkeypatch, chunk_bytes)
        models = [f"{name}.safetensors" for name in INPUTS[1:]]
        report = nm.merge_checkpoints(
            "base.safetensors", models, "new.safetensors", scale=1.0, nonfinite="keep-base", threads=threads, overwrite=True
        )  # fmt: skip
        manifests.add(Path("new.safetensors.negmerge.json").read_bytes())
        seen.add((report.nonfinite, report.bytes_skipped))
    assert len(seen) > 1 and len(manifests) == 1
    counted = read_manifest(Path("new.safetensors.negmerge.json"))["counted"]
    assert counted == {"elements": 1 << 14, "agreed": 1 << 10, "nonfinite": None, "vetoed_by_zero": None}
    again = nm.merge_checkpoints(
        "base.safetensors", models, "new.safetensors", scale=1.0, nonfinite="keep-base", resume=True
    )
    assert (again.agreed, again.nonfinite, again.bytes_written) == (1 << 10, None, 0)


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
    with pytest.raises(nm.DamageError, match=r"out\.safetensors: No such file"):
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


def test_the_same_inputs_give_the_same_manifest_wherever_they_lie(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = []
    for place, base in (("someone", "base"), ("else/where", "../where/base"), ("there", ".")):
        (folder / place).mkdir(parents=True)
        for name in INPUTS:
            shutil.copytree(folder / name, folder / place / name)
        models = [folder / place / name for name in INPUTS[1:]]
        monkeypatch.chdir(folder / place / ("base" if base == "." else ""))
        nm.merge_checkpoints(base, models, folder / place / "out", scale=0.9)
        manifests.append((folder / place / "out" / "negmerge.json").read_bytes())
    assert len(set(manifests)) == 1 and str(folder).encode() not in manifests[0]


@pytest.fixture
def finished(folder: Path) -> Path:
    """A folder with a finished output, and models longer than a sample of them; one was not merged."""
    shutil.copytree("ft-2", "other")
    for k, name in enumerate((*INPUTS, "other")):
        values = torch.randn(1 << 17, generator=torch.Generator().manual_seed(k))
        save_file({"w": values}, folder / name / "model.safetensors")
        for extra in (folder / name).glob("model*-of-*"):
            extra.unlink()
        (folder / name / "model.safetensors.index.json").unlink(missing_ok=True)
    shutil.copytree("base", "older")
    flip(Path("older/config.json"), 3)
    merge(resume=True)
    return folder


def is_finished() -> bool:
    """Whether the same command has nothing to do; else OUT is in its way."""
    try:
        return merge(resume=True).bytes_written == 0
    except nm.InputError as error:
        assert "out: exists already" in str(error)
        return False


def copied_over(path: Path, other: Path) -> None:
    """As `cp -p` does it: the copy has the other's time, which is older than the output."""
    shutil.copy2(other, path)


def with_one_byte(path: Path, at: int) -> None:
    before = path.stat()
    flip(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


UNCHANGED: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "a hard link to a model": lambda: os.link("ft-1/model.safetensors", "backup"),
    "a hard link to the base": lambda: os.link("base/model.safetensors", "backup"),
    "a hard link to a side file": lambda: os.link("base/config.json", "backup"),
    "another mode": lambda: Path("ft-0/model.safetensors").chmod(0o640),
    "a side file of a model": lambda: Path("ft-0/config.json").write_text("{'other'}"),
    "a side file that was written again": lambda: Path("base/config.json").write_bytes(Path("base/config.json").read_bytes()),
    "all of it moved": lambda: [Path(name).rename("moved").rename(name) for name in INPUTS],
}  # fmt: skip
CHANGED: dict[str, Callable[[], object]] = {
    "another version in its place": lambda: copied_over(Path("ft-1/model.safetensors"), Path("ft-2/model.safetensors")),
    "another version by a link": lambda: Path("ft-1").rename("x") and Path("ft-1").symlink_to("other"),
    "names that changed places": lambda: Path("ft-1").rename("x") and Path("ft-2").rename("ft-1") and Path("x").rename("ft-2"),
    "the first byte": lambda: with_one_byte(Path("ft-0/model.safetensors"), 100),
    "the last byte": lambda: with_one_byte(Path("base/model.safetensors"), -1),
    "a byte in the middle of a sampled block": lambda: with_one_byte(Path("ft-0/model.safetensors"), (524_000 // 15) * 7 + 9),
    "written again": lambda: Path("ft-0/model.safetensors").write_bytes(Path("ft-0/model.safetensors").read_bytes()),
    "a side file's content": lambda: with_one_byte(Path("base/config.json"), 3),
    "an older side file's content": lambda: Path("base").rename("x") and Path("older").rename("base"),
    "another side file": lambda: Path("base/more.txt").write_text("x"),
    "no side file": lambda: Path("base/tokenizer.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCHANGED)
def test_a_finished_output_stays_finished(finished: Path, case: str) -> None:
    """What moves an input's ctime is no other content."""
    UNCHANGED[case]()
    assert is_finished()


@pytest.mark.parametrize("case", CHANGED)
def test_an_output_of_other_inputs_is_not_finished(finished: Path, case: str) -> None:
    CHANGED[case]()
    assert not is_finished()


def test_a_manifest_with_whole_paths_and_no_samples(finished: Path) -> None:
    """As early versions wrote them: verified and replaced, and finished while no input's inode changed."""
    manifest = read_manifest()
    for number, each in enumerate([manifest["base"], *manifest["models"]]):
        each["path"] = str(finished / INPUTS[number])
        for file in each["files"].values():
            del file["sample"]
    early = json.dumps(manifest)
    Path("out/negmerge.json").write_text(early)
    assert is_finished()
    nm.verify_checkpoint("out", INPUTS)
    os.link("ft-1/model.safetensors", "backup")
    assert not is_finished()
    assert merge(overwrite=True).bytes_written > 0
    assert Path("out/negmerge.json").read_text() != early


def copied(source: str, path: str) -> object:
    return shutil.copy2(source, path)


@pytest.mark.parametrize("count", [4, 200])
def test_versions_that_differ_in_one_tensor(folder: Path, count: int) -> None:
    """A head that alone was trained, wherever it lies: a sample of blocks would miss it."""
    for k, name in enumerate(("base", "ft-0", "other")):
        shutil.rmtree(name, ignore_errors=True)
        tensors = {f"body.{n}": torch.zeros((1 << 20) // count) for n in range(count)}
        tensors["body.1.head"] = torch.full((10, 30), float(k))
        save_model(Path(name), tensors)
    nm.merge_checkpoints("base", ["ft-0"], "new", scale=0.9, resume=True)
    assert nm.merge_checkpoints("base", ["ft-0"], "new", scale=0.9, resume=True).bytes_written == 0
    Path("ft-0").rename("x")
    Path("other").rename("ft-0")
    with pytest.raises(nm.InputError, match="exists already"):
        nm.merge_checkpoints("base", ["ft-0"], "new", scale=0.9, resume=True)
    with pytest.raises(nm.InputError, match=r"ft-0/model.safetensors: sample \S+, expected \S+ as in ft-0"):
        nm.verify_checkpoint("new", ["base", "ft-0"])


REPLACED: dict[str, Callable[[], object]] = {
    "another file of the same size": lambda: copied("ft-1/model.safetensors", "out/model.safetensors"),
    "its last byte": lambda: with_one_byte(Path("out/model.safetensors"), -1),
    "a byte of a copied file": lambda: with_one_byte(Path("out/config.json"), 3),
    "a byte between samples": lambda: flip(Path("out/model.safetensors"), 10_000),
    "its length": lambda: os.truncate("out/model.safetensors", 9),
    "missing": lambda: os.unlink("out/tokenizer.json"),
    "a directory": lambda: (os.unlink("out/config.json"), os.mkdir("out/config.json")),
}


@pytest.mark.parametrize("case", REPLACED)
def test_an_output_with_another_file_in_it_is_not_finished(finished: Path, case: str) -> None:
    REPLACED[case]()
    assert not is_finished()


def test_an_output_that_was_trained_between_samples_is_not_replaced(finished: Path) -> None:
    """A head that alone was trained. The time of another file is another merge's, or a copy's."""
    os.utime("out/model.safetensors")
    assert merge(overwrite=True).bytes_written > 0
    flip(Path("out/model.safetensors"), 10_000)
    before = contents(Path("out"))
    with pytest.raises(nm.InputError, match=r"out/model\.safetensors: checksum .*out is not replaced"):
        merge(overwrite=True)
    assert contents(Path("out")) == before


def test_an_output_of_which_a_part_was_not_read_is_not_finished_if_it_has_to_be(finished: Path) -> None:
    """There may be a NaN in that part."""
    merge(overwrite=True, skip_unchanged=True)
    assert merge(resume=True, skip_unchanged=True).bytes_written == 0
    assert not is_finished()
    merge(overwrite=True, nonfinite="keep-base")
    assert merge(resume=True, nonfinite="keep-base", skip_unchanged=False).bytes_written == 0


def test_a_single_file_that_was_replaced_is_not_finished(folder: Path) -> None:
    """Nor is one that is missing where the manifest's own name for it is another file."""
    merge_single(folder, resume=True)
    assert merge_single(folder, resume=True).bytes_written == 0
    out = folder / "out.safetensors"
    right = out.read_bytes()
    flip(out, -1)
    with pytest.raises(nm.InputError, match="exists already"):
        merge_single(folder, resume=True)
    out.write_bytes(right)
    shutil.copy(f"{out}.negmerge.json", folder / "other.safetensors.negmerge.json")
    base, model = (folder / name / "model.safetensors" for name in ("ft-0", "ft-2"))
    done = nm.merge_checkpoints(base, [model], folder / "other.safetensors", scale=0.9, resume=True)
    assert done.bytes_written == out.stat().st_size


COUNTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "none": lambda counted: None,
    "a list": lambda counted: [],
    "no elements": lambda counted: {**counted, "elements": None},
    "text": lambda counted: {**counted, "agreed": "3"},
    "a fraction": lambda counted: {**counted, "nonfinite": 0.5},
    "true": lambda counted: {**counted, "vetoed_by_zero": True},
    "negative": lambda counted: {**counted, "elements": -1},
}


@pytest.mark.parametrize("case", COUNTED)
def test_an_output_without_counts_is_not_finished(finished: Path, case: str) -> None:
    manifest = read_manifest()
    manifest["counted"] = COUNTED[case](manifest["counted"])
    if manifest["counted"] is None:
        del manifest["counted"]
    Path("out/negmerge.json").write_text(json.dumps(manifest))
    assert not is_finished()
    with pytest.raises(nm.InputError, match=r"counted|elements|agreed|nonfinite|vetoed_by_zero"):
        nm.verify_checkpoint("out")


def test_an_output_with_an_altered_manifest_is_neither_finished_nor_replaced(folder: Path) -> None:
    merge_single(folder, resume=True)
    manifest = folder / "out.safetensors.negmerge.json"
    manifest.write_text(manifest.read_text().replace('"scale": 0.9', '"scale": 0.8'))
    with pytest.raises(nm.InputError, match="not negmerge's"):
        merge_single(folder, scale=0.8, resume=True)
    with pytest.raises(nm.InputError, match="not negmerge's"):
        merge_single(folder, overwrite=True)


def listed(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.name != "negmerge.json"}


def test_what_was_altered_is_named(folder: Path) -> None:
    merge()
    manifest, out = Path("out/negmerge.json"), Path("out")
    shard = out / "model-00001-of-00002.safetensors"
    assert altered(manifest, listed(out)) is None
    os.unlink("out/config.json")
    assert altered(manifest, {**listed(out), "config.json": Path("out/config.json")}) is None
    sizes = json.loads(manifest.read_text())["files"]
    for spoil, message in (
        (lambda: flip(shard, -1), rf"{shard}: sample \w+:\w+, expected \w+:\w+ as in {manifest}"),
        (lambda: os.truncate(shard, 99), f"{shard}: 99 bytes, expected {sizes[shard.name]['size']} as in {manifest}"),
        (lambda: shard.unlink() or shard.symlink_to("../ft-0/model.safetensors"), f"{shard}: not a regular file, expected one as in {manifest}"),
        (lambda: shard.unlink() or os.mkfifo(shard), f"{shard}: not a regular file, expected one as in {manifest}"),
        (lambda: shard.unlink() or Path("out/own").touch(), f"out/own: is there, expected no such file as in {manifest}"),
        (lambda: manifest.write_text("{}"), f"{manifest}: no files, expected those of an output"),
        (lambda: manifest.unlink(), f"{manifest}: No such file or directory, expected a file"),
    ):  # fmt: skip
        spoil()
        found = altered(manifest, listed(out))
        assert found and re.fullmatch(message, found)


def test_what_was_altered_beside_an_early_manifest(folder: Path) -> None:
    """It has checksums and no samples."""
    merge()
    manifest, config = Path("out/negmerge.json"), Path("out/config.json")
    found = read_manifest()
    for entry in found["files"].values():
        del entry["sample"]
    manifest.write_text(json.dumps(found))
    flip(config, 3)
    assert "out/config.json: checksum " in str(altered(manifest, listed(Path("out"))))
    flip(config, 3)
    assert altered(manifest, listed(Path("out"))) is None
    Path("out/own").touch()
    assert "out/own: is there" in str(altered(manifest, listed(Path("out"))))
    for files in (
        {name: {"size": each["size"]} for name, each in found["files"].items()},
        {name: {} for name in found["files"]},
        list(found["files"]),
    ):  # nobody can say of what these lists are
        manifest.write_text(json.dumps({"files": files}))
        assert altered(manifest, listed(Path("out"))) is not None


def test_a_single_file_that_was_altered(folder: Path) -> None:
    """Under any name, as long as its manifest lies beside it."""
    merge_single(folder)
    for name in ("", ".negmerge.json"):
        (folder / f"out.safetensors{name}").rename(folder / f"other.safetensors{name}")
    other = folder / "other.safetensors"
    manifest = folder / "other.safetensors.negmerge.json"
    assert altered(manifest, {other.name: other}) is None
    flip(other, -1)
    assert f"{other}: sample" in str(altered(manifest, {other.name: other}))


def test_a_sample(tmp_path: Path) -> None:
    """Sixteen blocks of 4 KiB, the first and the last among them; all of a short file."""
    content = os.urandom(300_000)
    (tmp_path / "long").write_bytes(content)
    begins = [(300_000 - 4096) * k // 15 for k in range(16)]
    sampled = b"".join(content[begin : begin + 4096] for begin in begins)
    assert File.at(tmp_path / "long").sample == "xxh3_128:" + xxh3_128_hexdigest(sampled)
    for size in (0, 1, 4096, 65_536):
        (tmp_path / "short").write_bytes(content[:size])
        assert File.at(tmp_path / "short").sample == "xxh3_128:" + xxh3_128_hexdigest(content[:size])


@pytest.mark.parametrize("count", [1, 3, 600])
def test_a_sample_of_tensors(tmp_path: Path, count: int) -> None:
    """After the blocks, 64 bytes in the middle of each tensor, or all of a shorter one; of every third if there are 600."""
    tensors = {f"w{n:03d}": torch.randn(9000 // count + n % 2) for n in range(count)}
    save_file({**tensors, "x": torch.randn(1 << 15)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = sorted(
        each["data_offsets"] for name, each in json.loads(content[8:header]).items() if name != "__metadata__"
    )
    sampled = [content[(len(content) - 4096) * k // 15 :][:4096] for k in range(16)]
    for begin, end in offsets[:: 3 if count == 600 else 1]:
        middle = header + begin + max(end - begin - 64, 0) // 2
        sampled.append(content[middle : min(middle + 64, header + end)])
    [file] = open_checkpoint(tmp_path / "model.safetensors").weights.values()
    assert file.sample == "xxh3_128:" + xxh3_128_hexdigest(b"".join(sampled))

"""negmerge verify: it finds and names every damage and, given the inputs, every wrong element."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import family, flip, load_model, negmerge, read_manifest, save_model, update_checksums
from hostile import random_models

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.runtime import patterns
from negmerge_fast.streaming import verify
from negmerge_fast.streaming.plan import make_plan

INPUTS = ("base", "ft-0", "ft-1", "ft-2")
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(**options: Any) -> None:
    nm.merge_checkpoints("base", list(INPUTS[1:]), "out", **{"scale": 0.9, **options})


def test_what_was_written_is_verified(folder: Path) -> None:
    merge()
    done = nm.verify_checkpoint("out")
    size = sum(p.stat().st_size for p in Path("out").iterdir() if p.name != "negmerge.json")
    assert done == nm.Verified("out", nm.__version__, 5, size, [], 0, 0)
    compared = nm.verify_checkpoint("out", INPUTS, threads=3)
    assert (compared.bytes, compared.bytes_compared) == (size, size) and compared.blocks > 5


def test_every_flipped_bit_is_found(folder: Path) -> None:
    merge()
    for path in sorted(Path("out").iterdir()):
        if path.name == "negmerge.json":
            continue
        before = path.read_bytes()
        for at in {0, len(before) // 2, len(before) - 1}:
            flip(path, at, 1 << (at % 8))
            with pytest.raises(nm.DamageError) as found:
                nm.verify_checkpoint("out")
            assert len(found.value.found) == 1 and found.value.found[0].startswith(
                f"{path}: checksum xxh3_128:"
            )
            path.write_bytes(before)
    nm.verify_checkpoint("out")


def swap() -> None:
    """Exchange two files of the same size."""
    save_model(Path("base"), {n: torch.ones(9) * k for k, n in enumerate("ab")}, ["a", "b"])
    for k in range(3):
        shutil.rmtree(f"ft-{k}")
        save_model(Path(f"ft-{k}"), {n: torch.zeros(9) for n in "ab"})
    shutil.rmtree("out")
    merge()
    one, other = sorted(Path("out").glob("*.safetensors"))
    shutil.move(one, "aside")
    shutil.move(other, one)
    shutil.move("aside", other)


def manifest_with(**changes: Any) -> Callable[[], object]:
    """Change values of the manifest; None removes one; a dotted key is a path."""

    def change() -> None:
        path = Path("out/negmerge.json")
        manifest = read_manifest(path)
        for key, value in changes.items():
            inner: Any = manifest
            *above, last = key.split("__")
            for step in above:
                inner = inner[int(step) if step.isdigit() else step]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        path.write_text(json.dumps(manifest))

    return change


def listing(name: str) -> Callable[[], object]:
    return manifest_with(files={name: {"size": 1, "checksum": "xxh3_128:00"}})


def in_manifest(before: bytes, after: bytes) -> Callable[[], object]:
    """Replace the last of some bytes of a manifest."""

    def change() -> None:
        path = Path("out/negmerge.json")
        head, found, tail = path.read_bytes().rpartition(before)
        assert found
        path.write_bytes(head + after + tail)

    return change


def write(content: bytes) -> Callable[[], object]:
    return lambda: Path("out/negmerge.json").write_bytes(content)


OUTSIDE, ALTERED = "expected a path inside the directory", "the manifest was altered"
BAD: dict[str, tuple[Callable[[], object], int, list[str]]] = {
    "truncated": (lambda: os.truncate(f"out/{SHARD}", 100), 1, [f"out/{SHARD}: 100 bytes, expected 614"]),
    "longer": (lambda: os.truncate(f"out/{SHARD}", 999), 1, [f"out/{SHARD}: 999 bytes, expected 614"]),
    "two files": (
        lambda: [flip(Path("out/config.json"), 3), os.truncate(f"out/{SHARD}", 100)], 1,
        ["out/config.json: checksum", f"out/{SHARD}: 100 bytes"],
    ),
    "swapped": (swap, 1, ["out/model-00001-of-00002.safetensors: checksum", f"out/{SHARD}: checksum"]),
    "missing": (lambda: os.unlink(f"out/{SHARD}"), 1, [f"out/{SHARD}: No such file or directory"]),
    "several are missing": (
        lambda: [os.unlink(f"out/{SHARD}"), os.unlink("out/config.json"), flip(Path("out/tokenizer.json"), 0)], 1,
        ["out/config.json: No such file", f"out/{SHARD}: No such file", "out/tokenizer.json: checksum"],
    ),
    "a dangling link": (lambda: [os.unlink("out/config.json"), os.symlink("no", "out/config.json")], 1, ["out/config.json: No such file"]),
    "a directory": (lambda: [os.unlink("out/config.json"), os.mkdir("out/config.json")], 1, ["out/config.json: not a regular file"]),
    "a FIFO": (lambda: [os.unlink("out/config.json"), os.mkfifo("out/config.json")], 1, ["out/config.json: not a regular file"]),
    "a file for a folder": (manifest_with(**{"files__config.json/a": {"size": 1, "checksum": ""}}), 1, ["config.json/a: Not a directory"]),
    "no output": (lambda: shutil.rmtree("out"), 2, ["out: No such file or directory"]),
    "no manifest": (lambda: os.unlink("out/negmerge.json"), 2, ["out/negmerge.json: No such file or directory"]),
    "a FIFO for a manifest": (
        lambda: [os.unlink("out/negmerge.json"), os.mkfifo("out/negmerge.json")], 2, ["out/negmerge.json: not a regular file"],
    ),
    "no JSON": (write(b"\xff{"), 2, ["out/negmerge.json: manifest is not JSON"]),
    "deep": (write(b'{"a":' * 100_000), 2, ["out/negmerge.json: manifest is not JSON (nested too deep)"]),
    "twice": (write(b'{"files": {}, "files": {}}'), 2, ["out/negmerge.json: manifest names 'files' twice"]),
    "a list": (write(b"[]"), 2, ["out/negmerge.json: manifest is a JSON list"]),
    "empty": (write(b"{}"), 2, ["out/negmerge.json: no models, expected a list of models"]),
    "an older manifest": (manifest_with(files=["config.json"]), 2, ["files is ['config.json'], expected an object of files"]),
    "no files": (manifest_with(files={}), 2, ["files is {}, expected at least one"]),
    "no version": (manifest_with(negmerge_fast=None), 2, ["no negmerge_fast, expected a version"]),
    "base": (manifest_with(base="base"), 2, ["base is 'base', expected an object with path and files"]),
    "model": (manifest_with(models=[3]), 2, ["models[0] is 3, expected an object with path and files"]),
    "models": (manifest_with(models={}), 2, ["models is {}, expected a list of models"]),
    "header": (manifest_with(base__files={"a": {"size": 3}}), 2, ["no header, expected a hash"]),
    "scale": (manifest_with(scale=True), 2, ["scale is True, expected a number"]),
    "infinite scale": (manifest_with(scale=float("inf")), 2, ["negmerge.json: manifest is not JSON (Infinity is no number)"]),
    "huge scale": (manifest_with(scale=10**400), 2, ["negmerge.json: manifest is not JSON (a number of 401 digits)"]),
    "min_agreement": (manifest_with(min_agreement=0.2), 2, ["negmerge.json: min_agreement: 0.2, expected more than 0.5"]),
    "inputs": (manifest_with(inputs=[]), 2, ["inputs is [], expected one of finetuned, task_vectors"]),
    "nonfinite": (manifest_with(nonfinite="no"), 2, ["nonfinite is 'no', expected one of error, keep-base"]),
    "include": (manifest_with(include=1), 2, ["include is 1, expected text or null"]),
    "block": (manifest_with(block=1), 2, ["block is 1, expected the size of a block"]),
    "block of 2^60": (manifest_with(block=2**60), 2, ["expected the size of a block"]),
    "size": (manifest_with(files__tokenizer={"size": -1, "checksum": ""}), 2, ["size is -1, expected a number of bytes"]),
    "size of 2^63": (manifest_with(files__tokenizer={"size": 2**63, "checksum": ""}), 2, ["expected a number of bytes"]),
    "size that is true": (manifest_with(files__tokenizer={"size": True, "checksum": ""}), 2, ["size is True"]),
    "checksum": (manifest_with(files__tokenizer={"size": 1, "checksum": 1}), 2, ["checksum is 1, expected a hash"]),
    "unknown hash": (manifest_with(**{"files__config.json": {"size": 22, "checksum": "md5:0"}}), 1, [", expected md5:0"]),
    "above": (listing("../base/config.json"), 2, [f"'../base/config.json', {OUTSIDE}"]),
    "absolute": (listing("/etc/passwd"), 2, [f"'/etc/passwd', {OUTSIDE}"]),
    "round about": (listing("a/../config.json"), 2, [OUTSIDE]),
    "itself": (listing("negmerge.json"), 2, [OUTSIDE]),
    "the directory": (listing("."), 2, [OUTSIDE]),
    "no name": (listing(""), 2, [OUTSIDE]),
    "NUL": (listing("a\0b"), 2, [OUTSIDE]),
    "half a character": (listing("\ud800"), 1, ["expected a file"]),
    "a long name": (listing("a" * 5000), 1, ["File name too long"]),
    "a name of a megabyte": (listing("../" * 400_000), 2, ["...", OUTSIDE]),
    "a hash of a megabyte": (manifest_with(**{"files__config.json": {"size": 22, "checksum": "a" * 10**6}}), 2, ["expected a hash"]),
    "no counts": (manifest_with(counted=None), 2, ["no counted, expected an object of counts"]),
    "altered": (in_manifest(b'"scale": 0.9', b'"scale": 0.8'), 1, [f"out/negmerge.json: {ALTERED}"]),
    "altered first byte": (lambda: flip(Path("out/negmerge.json"), 0), 1, [f"out/negmerge.json: {ALTERED}"]),
    "altered last byte": (lambda: flip(Path("out/negmerge.json"), -1), 1, [f"out/negmerge.json: {ALTERED}"]),
    "altered space": (in_manifest(b'"scale": ', b'"scale":  '), 1, [f"out/negmerge.json: {ALTERED}"]),
    "altered checksum": (in_manifest(b'"checksum": "xxh3_128:', b'"checksum": "xxh3_129:'), 1, [f"out/negmerge.json: {ALTERED}"]),
    "altered name": (in_manifest(b'  "checksum": ', b'  "checksun": '), 1, [f"out/negmerge.json: {ALTERED}"]),
    "formatted": (lambda: Path("out/negmerge.json").write_text(json.dumps(json.loads(Path("out/negmerge.json").read_text()))), 1, [ALTERED]),
    "altered and no JSON": (in_manifest(b'"scale": 0.9', b'"scale" 0.9'), 1, [f"out/negmerge.json: {ALTERED}"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(folder: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for each damaged file, or one for what can't be verified."""
    merge()
    spoil, status, messages = BAD[case]
    spoil()
    raised: type[Exception] = nm.DamageError if status == 1 else nm.InputError
    with pytest.raises(raised) as error:
        nm.verify_checkpoint("out")
    found = error.value.found if isinstance(error.value, nm.DamageError) else [str(error.value)]
    if status == 1:
        assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=status == 1):
        assert message in line and "\n" not in line and len(line) < 6000


@pytest.mark.processes
def test_the_command(folder: Path) -> None:
    merge()
    arguments = ("verify", "out", "--against", *INPUTS)
    done = negmerge(*arguments, "--blocks", 3, "--seed", 7)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"out: 5 files, 5.00kB, as negmerge_fast {nm.__version__} wrote them; 3 blocks"
    )
    Path("out/notes").touch()
    done = negmerge("verify", "out")
    assert done.stdout.splitlines()[1:] == ["not listed  notes"] and done.returncode == 0
    assert negmerge("verify", "out", "--quiet").stdout == ""
    for wrong in (
        ("out", "base"),
        ("out", "--against"),
        ("out", "--against", "base"),
        ("out", "--blocks", "0"),
    ):
        done = negmerge("verify", *wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("negmerge: ") and done.stderr.count("\n") == 1
    flip(Path("out/config.json"), 3)
    flip(Path("out/tokenizer.json"), 0)
    done = negmerge(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert [line.split(": checksum")[0] for line in lines] == [
        "negmerge: out/config.json", "negmerge: out/tokenizer.json",
    ]  # fmt: skip


def test_names_are_escaped(folder: Path) -> None:
    """A terminal would obey them: those in a manifest, those in a directory, and the version."""
    merge()
    escapes = "\x1b]0;owned\x07\r"
    Path(f"out/{escapes}").touch()
    manifest_with(negmerge_fast=escapes)()
    done = negmerge("verify", "out")
    assert done.returncode == 0 and done.stdout.splitlines()[1] == r"not listed  \x1b]0;owned\x07\r"
    manifest_with(**{f"files__{escapes}2": {"size": 1, "checksum": escapes}})()
    manifest_with(**{f"files__{escapes}": {"size": 0, "checksum": escapes}})()
    done = negmerge("verify", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert [r"out/\x1b]0;owned\x07\r" in line for line in done.stderr.splitlines()] == [True, True]
    with pytest.raises(nm.DamageError) as error:
        nm.verify_checkpoint("out")
    assert str(error.value).isprintable()
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text and "\r" not in text


def test_a_file_that_may_not_be_seen_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge()
    stat = os.stat

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("out/config.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    with pytest.raises(nm.InputError, match=r"^out/config\.json: Permission denied$"):
        nm.verify_checkpoint("out")


def test_inputs_that_changed_where_no_sample_was_taken(folder: Path) -> None:
    """The checksums of the output are right, so it may be either."""
    for k, name in enumerate(INPUTS):
        shutil.rmtree(name)
        save_model(Path(name), {"w": torch.full((1 << 16,), float(k))})
    merge()
    content = bytearray(Path("ft-1/model.safetensors").read_bytes())
    content[10_000:10_004] = b"\xff\xff\xff\xff"
    Path("ft-1/model.safetensors").write_bytes(content)
    nm.verify_checkpoint("out")
    with pytest.raises(nm.DamageError, match=r"tensor 'w': .*; OUT or its inputs have changed$"):
        nm.verify_checkpoint("out", INPUTS)


HOSTILE = r"^(([a-z0-9_.])+)+!$"


@pytest.mark.parametrize(
    "pattern", [{"include": HOSTILE}, {"exclude": HOSTILE}, {"rename": [[HOSTILE, "x"]]}]
)
def test_a_pattern_without_end(folder: Path, pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in INPUTS:
        shutil.rmtree(name)
        save_model(Path(name), {"model.layers.0.self_attn.q_proj.weight": torch.ones(3)})
    merge()
    manifest_with(**pattern)()
    nm.verify_checkpoint("out")
    monkeypatch.setattr(patterns, "_CPU_S", 1)
    with pytest.raises(
        nm.InputError, match=r"^out/negmerge\.json: include, exclude, rename and scale take too long"
    ):
        nm.verify_checkpoint("out", INPUTS)


@pytest.mark.processes
def test_a_signal_ends_a_search_at_once(folder: Path) -> None:
    for name in INPUTS:
        shutil.rmtree(name)
        save_model(Path(name), {"model.layers.0.self_attn.q_proj.weight": torch.ones(3)})
    merge()
    manifest_with(include=HOSTILE)()
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        command = [sys.executable, "-m", "negmerge_fast", "verify", "out", "--against", *INPUTS]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().strip()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.5)  # it has begun to search
        process.send_signal(number)
        out, err = process.communicate(timeout=5)
        assert (process.returncode, out, err.count("\n")) == (status, "", 1)
        assert ended(child)


def ended(pid: str, wait_s: float = 3.0) -> bool:
    """Whether a process ends, in less time than its search would take."""
    status, until = Path(f"/proc/{pid}/status"), time.monotonic() + wait_s
    while time.monotonic() < until:
        try:
            if "zombie" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_it_imports_no_torch_and_stops_at_a_signal(folder: Path) -> None:
    merge()
    start = "import sys; sys.argv = ['negmerge', 'verify', 'out']\nfrom negmerge_fast.cli import main\nfrom negmerge_fast.streaming import verify\n"
    lean = "try: main.main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", start + lean], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    interrupted = (
        "check = verify._check\nverify._check = lambda *a: (os.kill(os.getpid(), 2), check(*a))\nmain.main()"
    )
    code = "import os; " + start + interrupted
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "negmerge: interrupted\n")


OPTIONS: dict[str, dict[str, Any]] = {
    "task vectors": {"inputs": "task_vectors"},
    "min_agreement": {"min_agreement": 0.6},
    "include and exclude": {"include": "n|r", "exclude": "^brain$"},
    "scale": {"scale": -0.0},
    "long scale": {"scale": 1 / 3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_those_of_the_manifest(folder: Path, case: str) -> None:
    merge(**OPTIONS[case])
    nm.verify_checkpoint("out", INPUTS)
    recipe = read_manifest()
    merge(overwrite=True)
    nm.verify_checkpoint("out", INPUTS)
    manifest = read_manifest()
    manifest.update({k: recipe[k] for k in ("inputs", "min_agreement", "scale", "include", "exclude")})
    Path("out/negmerge.json").write_text(json.dumps(manifest))
    with pytest.raises(nm.DamageError, match=r"out/.*: tensor '.*': .*, expected"):
        nm.verify_checkpoint("out", INPUTS)


def test_nonfinite_elements(folder: Path) -> None:
    base, finetuned = random_models(3, 5000, torch.bfloat16, [torch.float16, torch.float32], seed=3)
    for name, tensor in zip(INPUTS, (base, *finetuned), strict=True):
        shutil.rmtree(name)
        save_model(Path(name), {"w": tensor})
    merge(nonfinite="keep-base")
    assert read_manifest()["counted"]["nonfinite"] is None
    nm.verify_checkpoint("out", INPUTS)
    merge(nonfinite="keep-base", skip_unchanged=False, overwrite=True)
    assert read_manifest()["counted"]["nonfinite"] > 0
    nm.verify_checkpoint("out", INPUTS)


WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "no models": (lambda: None, ("base",), "against: expected the base and at least one fine-tuned model"),
    "fewer": (lambda: None, INPUTS[:3], "2 models, expected 3"),
    "more": (lambda: None, (*INPUTS, "ft-0"), "4 models, expected 3"),
    "another base": (lambda: None, ("ft-0", *INPUTS[1:]), "ft-0: model-00001-of-00002.safetensors is missing, expected the files of base"),
    "another order": (lambda: None, ("base", "ft-1", "ft-0", "ft-2"), "ft-1: model-00001-of-00002.safetensors was not there, expected the files of ft-0"),
    "a header": (
        lambda: flip(Path("ft-0/model.safetensors"), Path("ft-0/model.safetensors").read_bytes().index(b"norm")),
        INPUTS, "ft-0/model.safetensors: header xxh3_128:.*, expected xxh3_128:.* as in ft-0",
    ),
    "a size": (
        lambda: save_model(Path("ft-2"), {**family()[0], "more": torch.zeros(3)}), INPUTS, "ft-2/model.safetensors: .* bytes, expected 4612 as in ft-2",
    ),
    "the base's config": (lambda: Path("base/config.json").write_text("{}"), INPUTS, "base/config.json: 2 bytes, expected 22 bytes as in out"),
    "more in the base": (lambda: Path("base/more").touch(), INPUTS, "base/more: 0 bytes, expected no such file as in out"),
    "less in the base": (lambda: Path("base/config.json").unlink(), INPUTS, "base/config.json: no such file, expected 22 bytes as in out"),
    "none": (lambda: None, ("nowhere", *INPUTS[1:]), "nowhere: no such file or directory"),
    "a bad pattern": (manifest_with(include="("), INPUTS, "include: '\\(' is not a regular expression"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_other_inputs_are_refused(folder: Path, case: str) -> None:
    spoil, against, message = WRONG[case]
    merge()
    spoil()
    with pytest.raises(nm.InputError, match=message) as error:
        nm.verify_checkpoint("out", against)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"blocks": 0}, {"threads": -1}, {"threads": -1, "against": INPUTS}])
def test_options_out_of_range(folder: Path, options: Any) -> None:
    merge()
    with pytest.raises(nm.InputError, match="expected at least 1"):
        nm.verify_checkpoint("out", **options)
    with pytest.raises(TypeError, match="against: one path"):
        nm.verify_checkpoint("out", "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 2.0}, "blocks: 2.0, expected an integer"),
        ({"blocks": True}, "blocks: True, expected an integer"),
        ({"seed": []}, r"seed: \[\], expected an integer"),
        ({"threads": "2"}, "threads: '2', expected an integer"),
        ({"threads": 0}, "threads: 0, expected at least 1"),
        ({"progress": "tqdm"}, "progress: 'tqdm', expected a function"),
        ({"against": 3}, "against: 3, expected a list of paths"),
        ({"against": ["base", None]}, r"against\[1\]: None, expected a path"),
        ({"output": 3}, "output: 3, expected a path"),
    ],
)
def test_arguments_of_another_type(options: dict[str, Any], message: str) -> None:
    """Told before there is a look at the output, which does not exist here."""
    with pytest.raises((nm.InputError, TypeError), match=f"^{message}$"):
        nm.verify_checkpoint(**{"output": "out", **options})


def element(name: str, index: int) -> tuple[Path, int]:
    """Where an element of the output's tensor begins."""
    tensor = open_checkpoint("out").tensors[name]
    source = tensor.source
    return source.file.path, source.offset + index * source.nbytes // tensor.numel


@pytest.mark.parametrize(
    "name, index, place",
    [
        ("embed", 799, "(49, 15)"),
        ("norm", 0, "(0,)"),
        ("half", 100, "(14, 2)"),
        ("brain", 128, "(128,)"),
        ("scalar", 0, "()"),
    ],
)
def test_a_wrong_element_is_named(folder: Path, name: str, index: int, place: str) -> None:
    """Though the checksums agree."""
    merge()
    right = load_model(Path("out"))[name].flatten()[index]
    path, at = element(name, index)
    flip(path, at)
    update_checksums()
    nm.verify_checkpoint("out")
    wrong = load_model(Path("out"))[name].flatten()[index]
    with pytest.raises(nm.DamageError) as error:
        nm.verify_checkpoint("out", INPUTS)
    line = str(error.value)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[right.itemsize]
    for value in (wrong, right):
        assert f"0x{int(value.view(bits)) & (1 << 8 * right.itemsize) - 1:0{2 * right.itemsize}x}" in line
    assert line.startswith(f"{path}: tensor '{name}': ") and f" at {place}, expected " in line


def test_a_wrong_byte_of_a_copy_is_named(folder: Path) -> None:
    merge()
    path, at = element("ids", 3)
    for file, place, message in (
        (path, at, "tensor 'ids': byte 24 is 0x02, expected 0x03 as in base"),
        (path, 10, "byte 10 is 0x"),
        (Path("out/config.json"), 4, "byte 4 is 0x65, expected 0x64 as in base"),
    ):
        flip(file, place)
        update_checksums()
        with pytest.raises(nm.DamageError, match=f"^{file}: {message}"):
            nm.verify_checkpoint("out", INPUTS)
        flip(file, place)


def test_models_in_another_order(folder: Path) -> None:
    """Their headers are the same: their samples tell, or the bits where an early manifest has no samples."""
    models = [{"w": torch.randn(4000, generator=torch.Generator().manual_seed(k))} for k in range(4)]
    for name, tensors in zip(INPUTS, models, strict=True):
        shutil.rmtree(name)
        save_model(Path(name), {"w": tensors["w"] * 0.1 + 1 if name != "base" else tensors["w"] * 0.1})
    merge()
    nm.verify_checkpoint("out", INPUTS)
    with pytest.raises(
        nm.InputError, match=r"ft-2/model.safetensors: sample \w+:\w+, expected \w+:\w+ as in ft-0"
    ):
        nm.verify_checkpoint("out", ("base", "ft-2", "ft-1", "ft-0"))
    manifest = read_manifest()
    for number, each in enumerate([manifest["base"], *manifest["models"]]):
        each["path"] = f"/models/{INPUTS[number]}"
        for file in each["files"].values():
            del file["sample"]
    Path("out/negmerge.json").write_text(json.dumps(manifest))
    nm.verify_checkpoint("out", INPUTS)
    with pytest.raises(nm.DamageError, match=r"tensor 'w': .* expected"):
        nm.verify_checkpoint("out", ("base", "ft-2", "ft-1", "ft-0"))
    with pytest.raises(nm.DamageError, match=r"tensor 'w': .* expected"):
        nm.verify_checkpoint("out", ("base", "ft-0", "ft-0", "ft-2"))


def test_the_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many chunks as asked for, in order, depends on the seed, and has large chunks more often than small ones."""
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 256)
    plan = make_plan(open_checkpoint("base"), [open_checkpoint(name) for name in INPUTS[1:]])
    every = verify._sample(plan, 10**6, 0)
    assert sum(chunk.sources[0].nbytes for chunk in every) == plan.bytes_written
    assert every == verify._sample(plan, len(every), 5)
    few = [verify._sample(plan, 5, seed) for seed in range(200)]
    assert few[0] == verify._sample(plan, 5, 0) != few[1]
    for sample in few:
        places = [every.index(chunk) for chunk in sample]
        assert places == sorted(set(places)) and len(places) == 5
    size, smallest = max(p.sources[0].nbytes for p in every), min(p.sources[0].nbytes for p in every)
    drawn = {n: sum(p.sources[0].nbytes == n for s in few for p in s) for n in (size, smallest)}
    held = {n: sum(p.sources[0].nbytes == n for p in every) for n in (size, smallest)}
    assert drawn[size] / held[size] > 5 * drawn[smallest] / held[smallest]


def test_one_wrong_element_is_found_when_all_blocks_are_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 256)
    merge()
    total = nm.verify_checkpoint("out", INPUTS, blocks=10**6).blocks
    path, at = element("embed", 333)
    flip(path, at)
    update_checksums()
    with pytest.raises(nm.DamageError, match=r"'embed': .* at \(20, 13\)"):
        nm.verify_checkpoint("out", INPUTS, blocks=total)
    found = 0
    for seed in range(20):
        try:
            nm.verify_checkpoint("out", INPUTS, blocks=3, seed=seed)
        except nm.DamageError:
            found += 1
    assert 0 < found < 20


def test_progress_and_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is reported once, and long files are read in long chunks that cut no block."""
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 1)
    large = {"w": torch.zeros(3 << 18), "v": torch.zeros(5)}
    for name in INPUTS:
        shutil.rmtree(name)
        save_model(Path(name), large)
    merge()
    reads: list[tuple[int, int]] = []
    read = Reader.read_into

    def noted(self: Reader, file: Any, offset: int, buffer: memoryview, release: bool = False) -> bool | None:
        if file.path.suffix == ".safetensors":
            reads.append((offset, len(buffer)))
        return read(self, file, offset, buffer, release)

    monkeypatch.setattr(Reader, "read_into", noted)
    seen: list[tuple[int, int]] = []
    nm.verify_checkpoint("out", progress=lambda done, total: seen.append((done, total)))
    size = Path("out/model.safetensors").stat().st_size
    assert [offset for offset, _ in sorted(reads)] == list(range(0, size, 128 << 10))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == nm.verify_checkpoint("out").bytes
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 1 << 20)
    nm.verify_checkpoint("out", INPUTS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(KeyboardInterrupt):
        nm.verify_checkpoint("out", progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_what_cannot_be_read_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another user's, and more folders in each other than can be walked."""
    merge()

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "out/model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "read_into", refused)
        with pytest.raises(
            nm.InputError, match=r"out/model\.safetensors: Permission denied, expected to read"
        ):
            nm.verify_checkpoint("out")

    def nested(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(verify, "_open", nested)
    with pytest.raises(nm.InputError, match="out: folders are nested too deep"):
        nm.verify_checkpoint("out")

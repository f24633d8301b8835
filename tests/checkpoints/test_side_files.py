"""Files beside the weights: copied, unless they hold weights in another form; --keep and --drop; folders that nobody needs."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import negmerge, put, save_model
from in_process import Answer, Process
from malformed import POINTER
from safetensors.torch import save

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.errors import InputError

WEIGHTS = {"embed": torch.zeros(40, 24), "norm": torch.zeros(24)}
TEXT = "one two\nthree é\n".encode() * 9


def packed(save_to: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    save_to(file)
    return file.getvalue()


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    return packed(lambda file: (np.savez_compressed if compressed else np.savez)(file, **arrays))


def npy(array: Any) -> bytes:
    return packed(lambda file: np.save(file, array, allow_pickle=True))


def zipped(*names: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return packed(write)


def tarred(mode: str, *names: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode=mode) as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))

    return packed(write)


def torch_saved(value: Any, old: bool = False) -> bytes:
    return packed(lambda file: torch.save(value, file, _use_new_zipfile_serialization=not old))


class Tokenizer:
    """Something of a package that has no arrays."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


VOCABULARY = {f"token {k}": k for k in range(300)} | {"numpy": -1, "torch": -2}
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2\n\x0c\n\3<s>\x15\0\0\0\0\x18\3" + bytes(range(256))
RANDOM = np.random.default_rng(0).bytes(5000)

COPIED = {
    # The last suffix decides; .pt is Portuguese.
    "README.md": TEXT,
    "README.pt.md": TEXT,
    "dict.pt.txt": TEXT,
    "dict.en.txt": TEXT,
    "special_tokens.pt.json": b"{}",
    "model.bin.md": TEXT,
    "h5.py": TEXT,
    "config.onnx.json": b"{}",
    "index.json": b"{}",
    "docs.index.json": b"{}",
    "tokenizer.json": b"{}",
    "LICENSE": TEXT,
    "pt": TEXT,
    "2.5": TEXT,
    "picture.png": b"\x89PNG\r\n\x1a\n" + RANDOM,
    "tokenizer.model": SENTENCEPIECE,
    "model.tiktoken": TEXT,
    # What a model needs.
    "mel_filters.npz": npz(mel_80=np.zeros((80, 201), "f4"), mel_128=np.zeros((128, 201), "f4")),
    "mel_filters_small.npz": npz(True, a=np.zeros((4, 201)), b=np.zeros(24)),
    "mean.npy": npy(np.zeros(24)),
    "window": npy(np.zeros(400)),
    "bpe_simple_vocab_16e6.txt.gz": gzip.compress(TEXT),
    "vocab.json.gz": gzip.compress(json.dumps(VOCABULARY).encode() * 40),
    "merges.bz2": bz2.compress(TEXT * 999),
    "merges.xz": lzma.compress(TEXT * 999),
    "tokenizer.pkl": pickle.dumps(Tokenizer(vocabulary=VOCABULARY, names=tuple(VOCABULARY)), 4),
    "tokenizer.0.pkl": pickle.dumps(VOCABULARY, 0),
    "merges.pickle": pickle.dumps({("a", "b"): 1.5, b"c": OrderedDict(x={1, 2})}, 2),
    "scale.pkl": pickle.dumps({"scale": np.float32(0.5), "type": np.dtype("f4"), "torch": torch.float16}),
    "examples.zip": zipped("examples/a.txt", "examples/b.png"),
    "code.tar": tarred("w", "a.py", "b/c.json"),
    "code.tar.gz": tarred("w:gz", "a.py", "b/c.json"),
    "code.txz": tarred("w:xz", "a.py"),
    # Text and tokenizers under names of weights.
    "dict.pt": TEXT,
    "corpus.pt.gz": gzip.compress(TEXT),
    "notes.bin": TEXT,
    "spm.bin": SENTENCEPIECE,
    "language_model/5gram.bin": b"mmap lm http://kheafield.com/code format version 5\n\0" + RANDOM,
    "folder/dict.pt": TEXT,
}  # fmt: skip

SKIPPED = {
    "pytorch_model.bin": torch_saved(WEIGHTS),
    "old.pt": torch_saved(WEIGHTS, old=True),
    "training_args.bin": torch_saved({"lr": 0.1}),
    "optimizer.pt": torch_saved({"state": {}}),
    "rng_state.pth": torch_saved({"python": (3, (1, 2), None)}),
    "empty.bin": b"",
    "strange.bin": RANDOM,
    "pointer.bin": POINTER,
    "model.gguf": b"GGUF" + RANDOM,
    "tiny.onnx": b"x",
    "text.h5": TEXT,
    "other.safetensors": save(WEIGHTS),
    # Behind a known tail.
    "model.safetensors.bak": save(WEIGHTS),
    "model.safetensors~": b"x",
    "model.safetensors (1)": b"x",
    "model.safetensors.2": b"x",
    "model.safetensors.tmp.1": b"x",
    "model.gguf.part1of2": b"x",
    "model.gguf.00001-of-00002": b"x",
    "model.ckpt.index": b"",
    "model.ckpt-1000.meta": RANDOM,
    "model.ckpt.data-00000-of-00001": RANDOM,
    "variables.data-00000-of-00001": RANDOM,
    "model.onnx.data": RANDOM,
    "model.onnx_data": RANDOM,
    "model.onnx_data_1": RANDOM,
    "model.safetensors.gz": gzip.compress(TEXT),
    "pytorch_model.bin.index.json": b"{}",
    "tf_model.h5.index.json": b"{}",
    "flax.msgpack.index.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "model.safetensors.index.fp16.json": b"{}",
    # Under any name.
    "saved": torch_saved(WEIGHTS),
    "saved.old.format": torch_saved(WEIGHTS, old=True),
    "saved.st": save(WEIGHTS),
    "saved.gg": b"GGUF" + RANDOM,
    "saved.hdf": b"\x89HDF\r\n\x1a\n" + RANDOM,
    "array": npy(np.zeros((40, 24), "f2")),
    # Arrays of the model's shapes, in any order, or as many elements as it has.
    "weights.npz": npz(w=np.zeros((40, 24))),
    "transposed.npz": npz(True, w=np.zeros((1, 24, 40), "f2")),
    "flat.npy": npy(np.zeros(40 * 24 + 24)),
    "large.npz": npz(True, w=np.zeros(1 << 20, "i1")),
    "objects.npy": npy(np.array([{}, None])),
    "broken.npz": npz(w=np.zeros(3))[:-30],
    "broken.npy": npy(np.zeros(3))[:20],
    "no.npz": TEXT,
    # Pickles that build arrays.
    "numpy.pkl": pickle.dumps({"w": np.zeros((5, 3))}),
    "numpy.0.pkl": pickle.dumps(np.zeros(3), 0),
    "numpy.5.pickle": pickle.dumps([np.zeros(3)], 5),
    "torch.pkl": pickle.dumps(WEIGHTS),
    "cut.pkl": pickle.dumps(VOCABULARY)[:-9],
    "head.joblib": pickle.dumps(np.zeros(3)),
    # Archives that hold weights, or that cannot be looked into.
    "all.zip": zipped("a.txt", "model/pytorch_model.bin"),
    "arrays.zip": zipped("a.npy"),
    "nested.zip": zipped("a.zip"),
    "all.tar": tarred("w", "a.txt", "model.safetensors"),
    "all.tar.gz": tarred("w:gz", "model.ckpt"),
    "all.tgz": tarred("w:gz", "x/tokenizer.pkl"),
    "binary.gz": gzip.compress(RANDOM),
    "broken.gz": b"\x1f\x8b" + RANDOM,
    "broken.xz": RANDOM,
    "no.zip": TEXT,
    "no.tar": RANDOM,
    "some.zst": RANDOM,
    "some.7z": RANDOM,
    # Hidden files.
    ".gitattributes": TEXT,
    "._model.safetensors": b"\0\5\x16\7",
    "._README.md": b"\0\5\x16\7",
}  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_a_file_that_is_copied(tmp_path: Path, name: str) -> None:
    put(save_model(tmp_path, WEIGHTS), {name: COPIED[name]})
    opened = open_checkpoint(tmp_path)
    assert name in opened.extra_files and name not in opened.skipped_files
    # Beside a model of other shapes, too.
    save_model(tmp_path, {"w": torch.zeros(1, 1), "s": torch.zeros(())})
    assert name in open_checkpoint(tmp_path).extra_files


@pytest.mark.parametrize("name", SKIPPED)
def test_a_file_that_is_skipped(tmp_path: Path, name: str) -> None:
    put(save_model(tmp_path, WEIGHTS), {name: SKIPPED[name]})
    opened = open_checkpoint(tmp_path)
    assert name in opened.skipped_files and name not in opened.extra_files


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    put(save_model(tmp_path / "m", WEIGHTS), {"a.pkl": pickle.dumps(Trap()), "b": pickle.dumps(Trap())})
    assert {"a.pkl", "b"} <= open_checkpoint(tmp_path / "m").extra_files.keys()
    assert not (tmp_path / "trapped").exists()


def test_a_pickle_that_hides_what_it_calls_is_skipped(tmp_path: Path) -> None:
    put(save_model(tmp_path, WEIGHTS), {"a.pkl": b"\x80\x04K\x01K\x02\x93."})
    assert "a.pkl" in open_checkpoint(tmp_path).skipped_files


def test_little_is_read_of_large_files(tmp_path: Path) -> None:
    path = save_model(tmp_path, WEIGHTS)
    for name in ("a.gz", "b.xz", "c.bz2", "d.npz", "e.zip", "f.tar", "g.pkl", "h.dat", "i.bin", "j.npy"):
        (path / name).write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\3" if name == "a.gz" else b"")
        os.truncate(path / name, 1 << 40)
    opened = open_checkpoint(path)
    assert opened.extra_files.keys() & {"f.tar", "h.dat"} == opened.extra_files.keys() - {
        "config.json",
        "tokenizer.json",
    }


def test_little_is_unpacked(tmp_path: Path) -> None:
    """A kilobyte that would be gigabytes, and an archive whose list would be."""
    many = zipped(*(f"{k:0200d}" for k in range(50_000)))
    put(save_model(tmp_path, WEIGHTS), {"a.gz": gzip.compress(bytes(1 << 28)), "b.zip": many})
    assert {"a.gz", "b.zip"} <= set(open_checkpoint(tmp_path).skipped_files)


def test_a_pointer_of_large_file_storage(tmp_path: Path) -> None:
    path = save_model(tmp_path, WEIGHTS)
    for name in ("tokenizer.json", "mel.npz", "vocab.gz", "tokenizer.pkl", "merges.txt", "spiece.model"):
        before = (path / name).read_bytes() if (path / name).exists() else None
        put(path, {name: POINTER})
        with pytest.raises(InputError, match=f'{name}: a Git LFS pointer, .* "git lfs pull"'):
            open_checkpoint(path)
        with pytest.raises(InputError, match=f"{name}: a Git LFS pointer"):
            open_checkpoint(path, keep=[name])
        assert name in open_checkpoint(path, drop=[name]).skipped_files
        assert not open_checkpoint(path, extra_files=False).extra_files
        (path / name).unlink() if before is None else (path / name).write_bytes(before)


def test_keep_and_drop(tmp_path: Path) -> None:
    path = put(
        save_model(tmp_path, WEIGHTS),
        {
            "head.bin": RANDOM,
            "voices/a.pt": RANDOM,
            "voices/b.pt": RANDOM,
            ".hidden": TEXT,
            "notes/x.md": TEXT,
        },
    )
    opened = open_checkpoint(path, keep=["voices/*", ".hid*"], drop=["notes/*", "*.json"])
    assert sorted(opened.extra_files) == [".hidden", "voices/a.pt", "voices/b.pt"]
    assert sorted(opened.skipped_files) == ["config.json", "head.bin", "notes/x.md", "tokenizer.json"]
    for options in ({"keep": ["*.gguf"]}, {"drop": ["*.gguf"]}, {"keep": ["model.safetensors"]}):
        with pytest.raises(
            InputError, match=f"--{next(iter(options))} .* matches no file beside the weights"
        ):
            open_checkpoint(path, **options)
    with pytest.raises(InputError, match=r"--keep 'x' matches no file"):
        open_checkpoint(path / "model.safetensors", keep=["x"])


def test_keep_and_drop_from_end_to_end(tmp_path: Path) -> None:
    for k, name in enumerate(("base", "ft")):
        save_model(tmp_path / name, {"w": torch.randn(9) + k})
    put(tmp_path / "base", {"head.bin": RANDOM, "notes.md": TEXT})
    options = ("--keep", "head.*", "--drop", "*.md")
    done = negmerge("merge", "base", "ft", "-o", "out", "--scale", "1", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "skipped  notes.md\n" in done.stdout
    assert (tmp_path / "out" / "head.bin").read_bytes() == RANDOM and not (
        tmp_path / "out" / "notes.md"
    ).exists()
    nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", tmp_path / "ft"])
    refused = negmerge("merge", "base", "ft", "-o", "o", "--scale", "1", "--keep", "*.gguf", cwd=tmp_path)
    assert refused.returncode == 2 and "--keep '*.gguf' matches no file" in refused.stderr


ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": save({"x": torch.zeros(2)}),
}


@pytest.mark.parametrize("folder", ["", "speech/"])
def test_an_adapter_beside_the_weights(tmp_path: Path, folder: str) -> None:
    for k, name in enumerate(("base", "ft")):
        path = save_model(tmp_path / name, {"w": torch.randn(9) + k})
        put(path, {folder + name: data for name, data in ADAPTER.items()})

    def merge(*options: str) -> tuple[int, str]:
        done = negmerge(
            "merge", "base", "ft", "-o", f"out{len(options)}", "--scale", "1", *options, cwd=tmp_path
        )
        return done.returncode, done.stderr

    status, err = merge()
    assert (
        status == 2
        and f"base/{folder}adapter_model.safetensors: not merged, but {folder}adapter_config.json" in err
    )
    assert f"--keep '{folder}adapter_model.safetensors'" in err and f"--drop '{folder}adapter*'" in err
    assert "whole weights" not in err
    status, err = merge("--drop", f"{folder}adapter_model*")
    assert status == 2 and "adapter_config.json refers to it" in err, "its configuration would be copied"
    status, err = merge("--keep", f"{folder}adapter*", "--dry-run")
    assert status == 0
    assert ("ft/adapter_model.safetensors: an adapter beside the weights, not merged" in err) == (
        folder == ""
    )
    kept, dropped = (
        open_checkpoint(tmp_path / "base", **{how: [f"{folder}adapter*"]}) for how in ("keep", "drop")
    )
    assert all(
        folder + name in kept.extra_files and folder + name in dropped.skipped_files for name in ADAPTER
    )
    assert not kept.undecided and not dropped.undecided
    assert negmerge("inspect", "base", cwd=tmp_path).returncode == 0


def test_a_head_that_a_configuration_refers_to(tmp_path: Path) -> None:
    """SetFit would begin with a random one if it were skipped."""
    files = {"config_setfit.json": b"{}", "model_head.pkl": SKIPPED["numpy.pkl"]}
    put(save_model(tmp_path, WEIGHTS), files)
    (line,) = open_checkpoint(tmp_path).undecided
    assert "model_head.pkl: not merged, but config_setfit.json refers to it" in line
    for options in ({"keep": ["model_head.pkl"]}, {"drop": ["config_setfit.json"]}):
        assert not open_checkpoint(tmp_path, **options).undecided


def test_weights_that_a_configuration_names(tmp_path: Path) -> None:
    path = put(
        save_model(tmp_path, WEIGHTS), {"voices/a.bin": RANDOM, "voices/b.bin": RANDOM, "x.json": b"["}
    )
    for name, value, refers in [
        ("config.json", {"voice": ["./voices/a.bin"]}, True),
        ("voices/config.json", {"voice": {"x": "a.bin"}}, True),
        ("config.json", {"voice": "a.bin", "voices/a.bin": 1}, False),
        ("config.json", "model.safetensors", False),
    ]:
        put(path, {name: json.dumps(value).encode()})
        undecided = open_checkpoint(path).undecided
        (path / name).unlink()
        assert len(undecided) == refers
        if refers:
            assert f"voices/a.bin: not merged, but {name} refers to it: expected --keep" in undecided[0]
    put(path, {"config.json": b'"voices/a.bin"'})
    for options in ({"keep": ["voices/a.bin"]}, {"drop": ["voices/*"]}, {"drop": ["config.json"]}):
        assert not open_checkpoint(path, **options).undecided


def test_an_adapter_without_its_configuration_is_refused_by_what_it_is(tmp_path: Path) -> None:
    put(tmp_path / "m", {"adapter_model.safetensors": ADAPTER["adapter_model.safetensors"]})
    for extra_files in (True, False):
        with pytest.raises(
            InputError, match=r"holds LoRA factors, expected whole weights, or .*adapter_config\.json"
        ):
            open_checkpoint(tmp_path / "m", extra_files=extra_files)


def test_what_openvino_reads_together_is_skipped_together(tmp_path: Path) -> None:
    files = {"openvino_model.xml": TEXT, "openvino_model.bin": RANDOM, "other.xml": TEXT}
    opened = open_checkpoint(put(save_model(tmp_path, WEIGHTS), files))
    assert sorted(opened.skipped_files) == ["openvino_model.bin", "openvino_model.xml"]


def test_links_that_lead_to_no_file(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", WEIGHTS)
    (tmp_path / "folder").mkdir()
    (path / "broken.txt").symlink_to("nowhere\n")
    (path / "folder").symlink_to(tmp_path / "folder")
    (path / "round.txt").symlink_to("round.txt")
    (path / ".hidden").symlink_to("nowhere")
    opened = open_checkpoint(path)
    assert sorted(opened.skipped_files) == [".hidden", "broken.txt", "folder", "round.txt"]
    assert opened.notes == (
        f"{path / 'broken.txt'}: skipped (a link to nowhere\n, no file)",
        f"{path / 'folder'}: skipped (a link to {tmp_path / 'folder'}, a folder)",
        f"{path / 'round.txt'}: skipped (a link to round.txt, no file)",
    )
    assert not open_checkpoint(path, drop=["broken.txt", "folder", "round.txt"]).notes


@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_model(tmp_path: Path, name: str) -> None:
    said = {}
    for folder in ("base", "ft"):
        path, secret = save_model(tmp_path / folder, WEIGHTS) / name, tmp_path / f"secret-{folder}"
        secret.write_bytes(path.read_bytes() if path.exists() else b"token")
        path.unlink(missing_ok=True)
        path.symlink_to(f"../{secret.name}")
        said[folder] = f"{path}: a link that leads out of the model, to {secret}: its content is taken"
    assert open_checkpoint(tmp_path / "base").notes == (said["base"],)
    model = open_checkpoint(tmp_path / "ft", extra_files=False)
    assert model.notes == (() if name == "vocab.txt" else (said["ft"],)), "of models no side file is read"
    done = negmerge("merge", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--scale", "1")
    assert done.returncode == 0 and done.stderr.startswith(f"negmerge: note: {said['base']}\n")


def test_several_links_that_lead_out(tmp_path: Path) -> None:
    """One line; links that stay in the model are none of them, and neither is the model that is a link itself."""
    path = put(save_model(tmp_path / "m", WEIGHTS), {"notes/a.txt": TEXT})
    (tmp_path / "secret").write_bytes(TEXT)
    (path / "b.txt").symlink_to("notes/a.txt")
    (path / "notes" / "c.txt").symlink_to("../b.txt")
    (tmp_path / "link").symlink_to(path)
    for given in (path, tmp_path / "link"):
        assert open_checkpoint(given).notes == ()
    for name in ("d.txt", "notes/e.txt", "f.txt"):
        (path / name).symlink_to(tmp_path / "secret")
    (note,) = open_checkpoint(path).notes
    assert note == (
        f"{path / 'd.txt'}: a link that leads out of the model, to {tmp_path / 'secret'} (and 2 others do): its content is taken"
    )


def test_links_in_a_cache_of_the_hub(tmp_path: Path) -> None:
    """They lead to its blobs; what leads elsewhere, also by way of blobs, is told."""
    cache = tmp_path / "models--org--name"
    snapshot = save_model(cache / "snapshots" / "abc", WEIGHTS)
    put(snapshot, {"text/config.json": b"{}"})
    (cache / "blobs").mkdir()
    for k, file in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        file.rename(cache / "blobs" / f"{k}")
        file.symlink_to(os.path.relpath(cache / "blobs" / f"{k}", file.parent))
    (tmp_path / "link").symlink_to(snapshot)
    for given in (snapshot, tmp_path / "link"):
        assert open_checkpoint(given).notes == () == open_checkpoint(given, extra_files=False).notes
    (cache / "blobs").rename(tmp_path / "another disk")
    (cache / "blobs").symlink_to(tmp_path / "another disk")
    assert open_checkpoint(snapshot).notes == ()
    (tmp_path / "secret").write_bytes(TEXT)
    (cache / "blobs" / "x").symlink_to(tmp_path / "secret")
    (snapshot / "vocab.txt").symlink_to("../../blobs/x")
    (note,) = open_checkpoint(snapshot).notes
    assert f"vocab.txt: a link that leads out of the model, to {tmp_path / 'secret'}: " in note
    # Another model's blobs, and folders that merely look like a cache.
    (snapshot / "vocab.txt").unlink()
    cache.rename(tmp_path / "models")
    (note,) = open_checkpoint(tmp_path / "models" / "snapshots" / "abc").notes
    assert "(and 3 others do)" in note


def test_folders_that_nobody_needs(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", WEIGHTS)
    (path / "/".join("d" * 70)).mkdir(parents=True)
    put(path, {"/".join("d" * 64) + "/deep.txt": TEXT, ".cache/x": TEXT, "m.mlpackage/weights": RANDOM})
    opened = open_checkpoint(path)
    assert sorted(opened.skipped_files) == [".cache", "/".join("d" * 65), "m.mlpackage"]
    (note,) = opened.notes
    assert note.endswith("/d: skipped (more than 64 folders in each other)")
    assert "/".join("d" * 64) + "/deep.txt" in opened.extra_files
    model = open_checkpoint(path, extra_files=False)
    assert not model.notes and not model.skipped_files and not model.extra_files


@pytest.mark.processes
def test_folders_and_files_that_may_not_be_read() -> None:
    """lost+found at the root of a volume; a file that would be copied is found before the work."""
    with tempfile.TemporaryDirectory() as place:  # tmp_path is root's own
        folder = Path(place)
        folder.chmod(0o777)
        for k, name in enumerate(("base", "ft")):
            save_model(folder / name, {"w": torch.randn(9) + k})
            (folder / name / "model.safetensors").chmod(0o644)
            (folder / name / "lost+found").mkdir(mode=0)
            (folder / name / "pytorch_model.bin").touch(mode=0)
        process = Process()
        user = 65534 if not os.getuid() else None

        def merge(*options: str) -> Answer:
            return process.negmerge(folder, *arguments, "-o", "out", *options, user=user)

        arguments = ("merge", "base", "ft", "--scale", "1", "--threads", "1")
        try:
            # What is imported now need not be readable later.
            assert process.negmerge(folder, *arguments, "-o", "first").status == 0
            for name in ("notes.txt", "mel.npz"):
                (folder / "base" / name).write_bytes(b"x")
                (folder / "base" / name).chmod(0)
                for options in ((), ("--dry-run",)):
                    status, _, err = merge(*options)
                    assert status == 2 and f"base/{name}: Permission denied" in err, err
                (folder / "base" / name).unlink()
            status, out, err = merge()
            assert (status, err) == (0, "negmerge: note: base/lost+found: skipped (Permission denied)\n")
            assert "skipped  lost+found\n" in out and "skipped  pytorch_model.bin\n" in out
        finally:
            process.close()
            for name in ("base", "ft"):
                (folder / name / "lost+found").chmod(0o755)

"""Weights under other names are not copied, whatever they are called; what a model needs is, whatever its size."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import itertools
import json
import os
import pickle
import random
import tarfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import entry, negmerge, put, raw
from safetensors.torch import save

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint

GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {"w": torch.randn(64, 48, generator=GENERATOR), "b": torch.randn(8, generator=GENERATOR)}
MATRIX = WEIGHTS["w"].numpy()
FILE = save(WEIGHTS)

# What other programs and people call weights.
NAMES = [
    "model.safetensors~", "model.safetensors_old", "model.safetensors-backup", "#model.safetensors#", ".#model", "model.safetensors.lock",
    "model.safetensors.part", "model.safetensors.00", "model.safetensors.aria2", "model.safetensors.swp", "pytorch_model.bin~",
    "pytorch_model.bin_", "saved_model/saved_model.pb", "saved_model/variables/variables.data-00000-of-00001",
    "saved_model/variables/variables", "model.pte", "model.plan", "model.trt", "model.llamafile", "model.pdiparams", "model.params",
    "model.t7", "model.caffemodel", "model.mar", "model.torchscript", "model.rten", "model.dat", "weights", "model.jit", "model.npy~",
    "model.lz4", "model.rar", "model.mnn", "ncnn.bin", "model.ncnn", "model.rknn", "model.om", "model.dlc", "model.mlmodelc/weights/weight",
    "coreml/weight", "model.wts", "consolidated.00.pth", "consolidated.00.pth_", "xaa", "model.7z.001", "model.iso", "archive", "Unnamed",
    "a/b/c/d", "tokenizer.json", "vocab.txt", "spiece.model", "README.md", "LICENSE", "config.yaml", "picture.png", "code.py", "x.tiktoken",
]  # fmt: skip


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(data: bytes, mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("x")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def saved(value: object, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def array(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


# Weights, in many encodings.
ENCODINGS = {
    "safetensors": FILE,
    "the beginning of it": FILE[:9000],
    "all bytes": FILE[8 + int.from_bytes(FILE[:8], "little") :],
    "a tensor": MATRIX.tobytes(),
    "a small tensor": WEIGHTS["b"].numpy().tobytes(),
    "a tensor of zeros": bytes(MATRIX.nbytes),
    "half of the bits": MATRIX.astype("f2").tobytes(),
    "a byte each": (MATRIX * 40).astype("i1").tobytes(),
    "a part": MATRIX.tobytes()[3000:9000],
    "behind a header": b"MODEL 1.0\n\0\0\0" + MATRIX.tobytes(),
    "behind text": b"#!/bin/sh\n# reads itself\n" * 400 + MATRIX.tobytes(),
    "torch": saved(WEIGHTS),
    "old torch": saved(WEIGHTS, old=True),
    "npy": array(MATRIX),
    "a flat npy": array(MATRIX.ravel()),
    "npz": zipped(**{"w.npy": array(MATRIX)}),
    "a pickle": pickle.dumps({"w": MATRIX}),
    "a pickle of bytes": pickle.dumps({"w": MATRIX.tobytes()}),
    "a pickle of numbers": pickle.dumps(MATRIX.ravel().tolist()),
    "an old pickle": pickle.dumps({"w": MATRIX}, 0),
    "two pickles": pickle.dumps({"lr": 0.1}) + pickle.dumps(MATRIX.tobytes()),
    "JSON": json.dumps({name: tensor.tolist() for name, tensor in WEIGHTS.items()}).encode(),
    "JSON of a tensor": json.dumps(MATRIX.tolist(), indent=1).encode(),
    "lines": "\n".join(map(str, MATRIX.ravel().tolist())).encode(),
    "CSV": "\n".join(",".join(f"{x:.3e}" for x in row) for row in MATRIX).encode(),
    "base64": base64.b64encode(FILE),
    "base64 in lines": base64.encodebytes(FILE),
    "base64 in JSON": json.dumps({"w": base64.b64encode(FILE).decode()}).encode(),
    "hexadecimal": FILE.hex().encode(),
    "gzip": gzip.compress(FILE),
    "bzip2": bz2.compress(MATRIX.tobytes()),
    "zip": zipped(x=FILE),
    "zip of bytes": zipped(**{"a.txt": b"text", "x": MATRIX.tobytes()}),
    "zip in zip": zipped(x=zipped(x=FILE)),
    "tar": tarred(FILE),
    "tar.gz": tarred(MATRIX.tobytes(), "w:gz"),
    "GGUF": b"GGUF\3\0\0\0" + MATRIX.tobytes(),
    "Zstandard": b"\x28\xb5\x2f\xfd" + MATRIX.tobytes(),
}  # fmt: skip


def arrays(*values: object) -> bytes:
    return b"".join(map(array, values))


# Weights behind something else, and of a million elements.
VALUES = np.random.default_rng(0).standard_normal((1250, 1000), "f4")
LINES = b"".join(b"%.18e\n" % number for number in VALUES.ravel())
LARGE = {
    "arrays one after another": arrays(np.ones(3), VALUES, VALUES),
    "an array of records": array(np.zeros(1, [("w", "f4", (1250, 1000)), ("b", "f4", (9,))])),
    "an array of bytes": array(np.array(VALUES.tobytes())),
    "a long text in gzip": gzip.compress(LINES, 1),
    "a long text in bzip2": bz2.compress(LINES, 1),
    "blocks of gzip": b"".join(gzip.compress(LINES[k : k + 65_000], 1) for k in range(0, len(LINES), 65_000)),
    "gzip behind text": gzip.compress(b"text") + gzip.compress(VALUES.tobytes(), 1),
    "eight bits without zeros": torch.randn(1 << 20, generator=GENERATOR).mul(90).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes(),
    "ones": b"\x80\x3f" * 999_999,
    "bytes in C": b"const unsigned char model[] = {" + b"0x3f, 0x8a, " * 600_000 + b"};",
    "numbers in C": b"float w[] = {" + b"0.25f, -1.5f, " * 600_000 + b"};",
    "a pickle of bytes in protocol 2": pickle.dumps({"w": VALUES.tobytes()[:2_000_000]}, 2),
}  # fmt: skip


@pytest.mark.parametrize("encoding", LARGE)
def test_large_files_of_weights(tmp_path: Path, encoding: str) -> None:
    put(large_model(tmp_path), {"x": LARGE[encoding], "x.npy": LARGE[encoding], "x.txt": LARGE[encoding]})
    assert not {"x", "x.npy", "x.txt"} & open_checkpoint(tmp_path).extra_files.keys()


def test_pictures_anywhere_in_a_text(tmp_path: Path) -> None:
    """A picture in base64 is longer than the blocks that are looked at first."""
    picture = base64.b64encode(np.random.default_rng(0).bytes(1_500_000))
    files = {
        "README.md": b"# Model\n" * 900 + b"![](data:image/png;base64," + picture + b")\n",
        "page.html": b"<style>" + b" " * 9000 + b"@font-face{src:url(data:font/woff2;base64," + picture + b")}",
        "escaped.json": b'{"a":"' + b"a " * 4000 + b'data:image\\/png;base64,' + picture + b'"}',
    }  # fmt: skip
    assert open_checkpoint(put(large_model(tmp_path), files)).extra_files.keys() >= files.keys()


def test_ngrams_of_phones(tmp_path: Path) -> None:
    """They have two numbers and few letters each."""
    line = b"-1.2345678\ta b\t-0.7654321\n"
    put(large_model(tmp_path), {"lm.arpa": b"\\data\\\nngram 1=9\n\n\\1-grams:\n" + line * 700_000})
    assert "lm.arpa" in open_checkpoint(tmp_path).extra_files


def small_model(path: Path) -> Path:
    return put(path, {"model.safetensors": FILE, "config.json": b"{}"})


def large_model(path: Path) -> Path:
    """Of eight million elements, in a file that takes no space."""
    size = 4 * (4096 * 2048 + 512)
    header = {"w": entry(0, size - 2048, shape=(4096, 2048)), "b": entry(size - 2048, size, shape=(512,))}
    put(path, {"model.safetensors": raw(header), "config.json": b"{}"})
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size + size)
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_weights_are_skipped_under_any_name(tmp_path: Path, encoding: str) -> None:
    put(small_model(tmp_path), dict.fromkeys(NAMES, ENCODINGS[encoding]))
    extra = open_checkpoint(tmp_path).extra_files
    assert not [name for name in extra if name != "config.json"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1 << 17, 1 << 20])
def test_weights_beside_a_large_model(tmp_path: Path, encoding: str, size: int) -> None:
    """Of tens of thousands of elements and more: what is smaller is told apart by its beginning only."""
    data = np.random.default_rng(0).standard_normal((size // 64, 16), "f4")
    header = {"x": entry(0, data.nbytes, shape=data.shape)}
    encoded = {"safetensors": raw(header, data.tobytes()), "all bytes": data.tobytes(), "base64": base64.b64encode(data.tobytes())}  # fmt: skip
    put(large_model(tmp_path), {"x": encoded.get(encoding, ENCODINGS[encoding])})
    if encoding in encoded or encoding in (
        "torch",
        "old torch",
        "a pickle",
        "GGUF",
        "Zstandard",
        "zip",
        "tar",
        "gzip",
    ):
        assert "x" in open_checkpoint(tmp_path).skipped_files


def test_a_small_unknown_file(tmp_path: Path) -> None:
    """Beside a model of eight million elements: at most 64 KiB, a hundredth of the elements, no tensor's size."""
    path = large_model(tmp_path)
    sizes = {100: True, 2047: True, 2048: False, 2049: True, 512: False, 1024: False, 4096: False, 65_536: True, 65_537: False}  # fmt: skip
    random_bytes = np.random.default_rng(0).bytes(1 << 17)
    put(path, {f"x{size}": random_bytes[:size] for size in sizes})
    put(path, {"y.bin": random_bytes[:100], "y.ckpt": random_bytes[:100], "y.engine": random_bytes[:100]})
    copied = open_checkpoint(path).extra_files
    assert {name for name in copied if name != "config.json"} == {
        f"x{size}" for size, is_copied in sizes.items() if is_copied
    }
    put(small_model(tmp_path / "small"), {"x": random_bytes[:100], "y": random_bytes[:30]})
    copied = open_checkpoint(tmp_path / "small").extra_files
    assert copied.keys() == {"config.json", "y"}, "a hundredth of 3,080 elements"


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sample:
        sample.setnchannels(1)
        sample.setsampwidth(2)
        sample.setframerate(16_000)
        sample.writeframes(np.random.default_rng(0).bytes(200_000))
    return file.getvalue()


CHOICE = random.Random(0)
WORDS = ["".join(CHOICE.choices("abcdefghijklmnopqrstuvwxyzäßé", k=7)) for _ in range(60_000)]
NOISE = np.random.default_rng(1).bytes(300_000)
TOKENS = [np.random.default_rng(k).bytes(k % 9 + 1) for k in range(40_000)]


def scored(word: str) -> bytes:
    text = word.encode()
    inner = b"\n" + bytes([len(text)]) + text + b"\x15" + np.float32(-3.5).tobytes()
    return b"\n" + bytes([len(inner)]) + inner


# What a model needs, of every size.
ASSETS = {
    "tokenizer.json": json.dumps({"model": {"vocab": {w: k for k, w in enumerate(WORDS)}, "merges": WORDS}}, indent=1).encode(),
    "unigram/tokenizer.json": json.dumps({"vocab": [[w, -k / 7] for k, w in enumerate(WORDS)]}).encode(),
    "vocab.json": json.dumps({w: k for k, w in enumerate(WORDS)}, ensure_ascii=False).encode(),
    "vocab.txt": "\n".join(WORDS).encode(),
    "latin1.txt": "\n".join(WORDS).encode("latin-1"),
    "merges.txt": "\n".join(f"{a} {b}" for a, b in itertools.pairwise(WORDS)).encode(),
    "dict.txt": "\n".join(f"{w} {k}" for k, w in enumerate(WORDS)).encode(),
    "dict.pt.txt": "\n".join(WORDS).encode(),
    "numbers/dict.txt": "\n".join(f"{k} {9_000_000 // (k + 1)}" for k in range(50_000)).encode(),
    "bpe/code.bpe": "\n".join(WORDS).encode(),
    "qwen.tiktoken": b"\n".join(base64.b64encode(t) + b" %d" % k for k, t in enumerate(TOKENS)),
    "tekken.json": json.dumps({"vocab": [{"rank": k, "token_bytes": base64.b64encode(t).decode()} for k, t in enumerate(TOKENS)]}).encode(),
    "spiece.model": b"".join(map(scored, ["<unk>", "<s>", "</s>", *WORDS])),
    "sentencepiece.bpe.model": b"".join(map(scored, ["▁der", "▁die", *WORDS])),
    "spm/source.spm": b"".join(map(scored, ["<pad>", *WORDS])),
    "tokens.pkl": pickle.dumps({token: k for k, token in enumerate(WORDS)}),
    "vocab.json.gz": gzip.compress(json.dumps(WORDS).encode()),
    "tokenizer.tar.gz": tarred("\n".join(WORDS).encode(), "w:gz"),
    "lm/5gram.arpa": "\n".join(f"-{k / 9:.5f}\t{w} {w}\t-0.30103" for k, w in enumerate(WORDS)).encode(),
    "lm/5gram.bin": b"mmap lm http://kheafield.com/code format version 5\n\0" + NOISE,
    "lm/unigrams.txt": "\n".join(WORDS).encode(),
    "openvino_tokenizer.bin": NOISE,
    "openvino_tokenizer.xml": b"<?xml version='1.0'?>\n<net>" + b"<layer/>\n" * 20_000 + b"</net>",
    "mel_filters.npz": zipped(**{"mel_80.npy": array(np.zeros((80, 201), "f4"))}),
    "mean.npy": array(np.zeros(64)),
    "picture.png": b"\x89PNG\r\n\x1a\n" + NOISE,
    "picture.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF" + NOISE,
    "picture.webp": b"RIFF\0\0\1\0WEBPVP8 " + NOISE,
    "paper.pdf": b"%PDF-1.7\n" + NOISE,
    "film.mp4": b"\0\0\0\x20ftypisom" + NOISE,
    "sample.wav": sound(),
    "sample.flac": b"fLaC" + NOISE,
    "sample.mp3": b"ID3\4" + NOISE,
    "font.ttf": b"\0\1\0\0\0\x0f\0\x80\0\3\0p" + NOISE,
    "modeling.py": b"def f(x):\n    return x\n" * 9_000,
    "empty/__init__.py": b"",
    "notebook.ipynb": json.dumps({"cells": [{"data": {"image/png": base64.b64encode(NOISE).decode()}}]}).encode(),
    "picture.svg": b"<svg><image href='data:image/png;base64," + base64.b64encode(NOISE[:20_000]) + b"'/></svg>",
    "template.jinja": b"{% for m in messages %}{{ m }}{% endfor %}",
    "chat_template.json": b'{"chat_template": "{{ x }}"}',
    "config.yaml": b"a: [1, 2, 3]\nb: 0.5\n",
    "preprocessor_config.json": b'{"image_mean": [0.48145466, 0.4578275, 0.40821073], "size": 224}',
    "LICENSE": b"Permission is hereby granted.\n" * 40,
    "README.md": b"GGUF files of this model are elsewhere.\n# Model\n" * 40,
    "tags.csv": "\n".join(f"{k},{w},0,{k * 7}" for k, w in enumerate(WORDS)).encode(),
    "tags.tsv": "\n".join(f"{k}\t{w}" for k, w in enumerate(WORDS)).encode(),
    "examples.zip": zipped(**{"a.txt": b"text", "b.png": b"\x89PNG\r\n\x1a\n" + NOISE}),
    "VERSION": b"2.5",
}  # fmt: skip


@pytest.mark.parametrize("model", [small_model, large_model])
def test_what_a_model_needs_is_copied(tmp_path: Path, model: object) -> None:
    opened = open_checkpoint(put(model(tmp_path), ASSETS))  # type: ignore[operator]
    assert not opened.skipped_files
    large = {name: len(data) for name, data in ASSETS.items() if len(data) > 1 << 20}
    assert opened.large_files == large and large


def test_what_is_large_and_looks_like_text(tmp_path: Path) -> None:
    """Megabytes of numbers are no vocabulary; a tokenizer of tens of megabytes is one."""
    path = large_model(tmp_path)
    put(path, {
        "a.txt": b"0.123456 -1.5e-3\n" * 600_000,
        "b.json": b"[" + b"0.25, " * 3_000_000 + b"0]",
        "c.txt": base64.b64encode(NOISE * 10),
        "vectors.vec": b"the 0.41800 0.24968 -0.41242 0.12170\n" * 300_000,
        "tokenizer.json": ASSETS["vocab.json"] * 20,
        "counts.csv": b"1,2,-3,40\n" * 600_000,
    })  # fmt: skip
    opened = open_checkpoint(path)
    assert sorted(opened.skipped_files) == ["a.txt", "b.json", "c.txt", "vectors.vec"]


def test_the_beginning_is_not_all(tmp_path: Path) -> None:
    """Weights behind a megabyte of text."""
    put(large_model(tmp_path), {"x.txt": b"line of text\n" * 80_000 + NOISE * 4})
    assert open_checkpoint(tmp_path).skipped_files == ("x.txt",)


@pytest.mark.slow
def test_archives_that_unpack_to_more_are_skipped_soon(tmp_path: Path) -> None:
    bombs = zipped(**{f"{k}": gzip.compress(bytes(1 << 24)) for k in range(99)})
    put(large_model(tmp_path), {"a": bombs, "b": gzip.compress(gzip.compress(bytes(1 << 26)))})
    assert open_checkpoint(tmp_path).skipped_files == ("a", "b")


def test_what_is_printed_and_reported(tmp_path: Path) -> None:
    """Every file that is not copied, each large one that is, and the remedy."""
    base = small_model(tmp_path / "base")
    small_model(tmp_path / "ft")
    put(base, {"weights": FILE, "notes.md": b"text", "tokenizer.json": ASSETS["tokenizer.json"]})
    for options in (["--dry-run"], ["--report", "report.json"]):
        done = negmerge("merge", "base", "ft", "-o", "out", "--scale", "1", *options, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == ""
        lines = done.stdout.splitlines()
        size = len(ASSETS["tokenizer.json"]) / 1e6
        assert lines[-3:-1] == ["skipped  weights", f"copied   tokenizer.json ({size:.2f}MB)"]
        assert "--keep GLOB" in lines[-1] and "--drop GLOB" in lines[-1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["skipped_files"] == ["weights"]
    assert report["large_files"] == {"tokenizer.json": len(ASSETS["tokenizer.json"])}
    nm.verify_checkpoint(tmp_path / "out", [base, tmp_path / "ft"])
    none = negmerge("merge", "ft", "ft", "-o", "o", "--scale", "1", "--dry-run", cwd=tmp_path)
    assert "GLOB" not in none.stdout

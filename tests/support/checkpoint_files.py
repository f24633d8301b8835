"""Checkpoints for tests: model directories in any sharding, raw safetensors bytes, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bits import same_bits
from safetensors.torch import load_file, save_file

from negmerge_fast.core.reference import plain_merge
from negmerge_fast.output.checksums import Checksums
from negmerge_fast.output.manifest import sealed


def save_model(
    path: Path, tensors: dict[str, torch.Tensor], shards: Sequence[Sequence[str]] | None = None
) -> Path:
    """A Hugging Face directory; shards: the names of each shard's tensors, None for a single file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "test"}')
    (path / "tokenizer.json").write_text("{}")
    metadata = {"format": "pt"}
    if shards is None:
        save_file(tensors, path / "model.safetensors", metadata=metadata)
        return path
    weight_map = {}
    for k, names in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file, metadata=metadata)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def read_manifest(path: Path = Path("out/negmerge.json")) -> dict[str, Any]:
    """The fields of a manifest, but for its own checksum: written again, it is like one of an early version."""
    manifest: dict[str, Any] = json.loads(path.read_text())
    manifest.pop("checksum", None)
    return manifest


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def load_model(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def raw(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(begin: int = 0, end: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [begin, end],
    }


def family(seed: int = 0, n: int = 3) -> list[dict[str, torch.Tensor]]:
    """A base and n fine-tuned versions with tensors of many kinds."""
    generator = torch.Generator().manual_seed(seed)
    base = {
        "embed": torch.randn(50, 16, generator=generator),
        "norm": torch.randn(16, generator=generator).double(),
        "half": torch.randn(33, 7, generator=generator).half(),
        "brain": torch.randn(129, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(9),
    }
    models = [
        {
            name: (t + 0.1 * torch.randn(t.shape, generator=generator) + 0.05).to(t.dtype)
            if t.is_floating_point()
            else t
            for name, t in base.items()
        }
        for _ in range(n)
    ]
    return [base, *models]


def negmerge(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "negmerge_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


MERGE = ("merge", "base", "ft-0", "ft-1", "ft-2", "--output", "out", "--scale", "0.9")


def check(out: Path, tensors: list[dict[str, torch.Tensor]], **options: Any) -> None:
    merged = load_model(out)
    assert set(merged) == set(tensors[0])
    for name, base in tensors[0].items():
        expected = base
        if base.is_floating_point():
            expected = plain_merge(base, [t[name] for t in tensors[1:]], 0.9, **options)[0]
        assert same_bits(merged[name], expected), name


def nothing_left(folder: Path) -> bool:
    return not (folder / "out").exists() and not (folder / ".out.negmerge").exists()


def put(path: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder, by their names relative to it."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def update_checksums(path: Path = Path("out")) -> None:
    """Make the manifest agree with the files, so that only the inputs show what is wrong."""
    manifest = read_manifest(path / "negmerge.json")
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        sums = Checksums({name: len(content)})
        sums.add(name, 0, memoryview(content))
        entry["checksum"] = sums.of(name)
    manifest.pop("checksum", None)  # one that a test has written has none
    (path / "negmerge.json").write_text(json.dumps(sealed(manifest), indent=2) + "\n")

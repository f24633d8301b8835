"""Makes Llama checkpoints, a base and its fine-tuned versions, and compares a merge of them with the reference."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import negmerge_fast as nm
from negmerge_fast.backends.pytorch import TORCH_DTYPES
from negmerge_fast.benchmark.shapes import Shapes, llama
from negmerge_fast.benchmark.workload import SCALE
from negmerge_fast.core.dtypes import FLOAT_SIZES

# How many numbers are drawn. Each tensor takes another part of them, and long ones repeat them.
_DRAWN, _STEP = 1 << 24, 611_953


class Llama(NamedTuple):
    """Sizes of a Llama. keys: elements of one token's keys of all heads."""

    layers: int
    hidden: int
    inner: int
    keys: int
    heads: int
    vocabulary: int
    dtype: str

    def shrunk(self, by: int) -> Llama:
        """The same Llama with its dimensions divided by a power of two, up to 32."""
        sizes = (self.hidden // by, self.inner // by, self.keys // by, self.heads, self.vocabulary // by)
        return Llama(self.layers, *sizes, self.dtype)

    @property
    def shapes(self) -> Shapes:
        return llama(self.layers, self.hidden, self.inner, self.keys, tied=False, vocabulary=self.vocabulary)

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def bytes(self) -> int:
        return self.numel * FLOAT_SIZES[self.dtype]

    def config(self) -> str:
        """The text of config.json, as transformers reads it."""
        return json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads * self.keys // self.hidden, "vocab_size": self.vocabulary,
            "tie_word_embeddings": False, "torch_dtype": str(TORCH_DTYPES[self.dtype]).removeprefix("torch."),
        })  # fmt: skip


def make(
    folder: Path, model: Llama, n: int, shard: int, partial: bool = False, lean: float = 1.0
) -> list[Path]:
    """Write a base and n fine-tuned versions of it into directories.

    Args:
        folder: Where the directories are made.
        model: Sizes of the model.
        n: The number of fine-tuned versions.
        shard: Bytes of the largest file, roughly.
        partial: Whether only every third tensor differs from the base's.
        lean: The deviation of what all versions have in common, in that of what each has of its own: the larger, the more agrees.

    Raises:
        OSError: If the disk has too little space.
    """
    needed, free = (n + 2) * model.bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free")
    paths = [folder / ("base" if k == 0 else f"ft-{k}") for k in range(n + 1)]
    drawn = _drawn(n, TORCH_DTYPES[model.dtype], lean)
    shapes, changed = model.shapes, set(list(model.shapes)[:: 3 if partial else 1])
    for k, path in enumerate(paths):
        path.mkdir()
        (path / "config.json").write_text(model.config())
        shards = list(_shards(shapes, shard // FLOAT_SIZES[model.dtype]))
        files: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {
                name: _tensor(drawn[k if name in changed else 0], name, shapes[name]) for name in names
            }
            save_file(tensors, path / file, metadata={"format": "pt"})
            files.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": model.bytes}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def _drawn(n: int, dtype: torch.dtype, lean: float) -> list[torch.Tensor]:
    """Numbers of a base and n versions, which agree on about 2 / (n + 1) of them if lean is 1."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(_DRAWN, generator=generator).to(dtype)
    common = torch.randn(_DRAWN, generator=generator).mul_(lean)
    models = [torch.randn(_DRAWN, generator=generator).add_(common).mul_(0.1).add_(base) for _ in range(n)]
    return [base, *(model.to(dtype) for model in models)]


def _tensor(drawn: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    out = torch.empty(math.prod(shape), dtype=drawn.dtype)
    at = sum(name.encode()) * _STEP % _DRAWN
    done = 0
    while done < len(out):
        chunk = drawn[at : at + len(out) - done]
        out[done : done + len(chunk)] = chunk
        done, at = done + len(chunk), 0
    return out.view(shape)


def _shards(shapes: Shapes, max_numel: int) -> Iterator[list[str]]:
    names: list[str] = []
    remaining = max_numel
    for name, shape in shapes.items():
        if names and math.prod(shape) > remaining:
            yield names
            names, remaining = [], max_numel
        names.append(name)
        remaining -= math.prod(shape)
    yield names


def weights(model: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted(model.glob("*.safetensors"))


def differing(out: Path, base: Path, models: list[Path]) -> int:
    """Number of elements of a merged model whose bits differ from the reference, computed tensor by tensor."""
    found, expected, *given = (opened(path) for path in (out, base, *models))
    if found.keys() != expected.keys():
        raise OSError(f"{out}: other tensors than in {base}")
    wrong = 0
    for name in expected:
        versions = [held[name].get_tensor(name) for held in given]
        merged = nm.merge(expected[name].get_tensor(name), versions, scale=SCALE, backend="torch")
        bits = torch.int32 if merged.itemsize == 4 else torch.int16
        wrong += int((found[name].get_tensor(name).view(bits) != merged.view(bits)).count_nonzero())
    return wrong


def opened(model: Path) -> dict[str, safe_open]:
    files = [safe_open(path, "pt") for path in weights(model)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118

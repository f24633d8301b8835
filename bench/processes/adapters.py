"""Measures merges of LoRA adapters beside the materialising method: whole commands, seconds, memory and disk.

A Llama and 30 adapters of rank 16 for all of its linear layers, in warm files. `negmerge merge BASE ADAPTERS` takes turns with

- `lean`: each adapter is merged into the base with torch and written with save_file, then `negmerge merge BASE MODELS`;
- `peft`: the same with merge_and_unload and save_pretrained;
- `cp` and `sync` of the base, which reads it once and writes as many bytes.

Before anything is timed, `--adapters-as merged` is compared with the lean method: both merge the same models, up to the order of the additions in
a matrix product. Seconds are those of all commands of a method, memory is that of the largest process, and disk is what has to be there beside the
base and the output. Rows are printed; with --results FILE.jsonl they are appended to it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llamas
import process
import torch
from process import Ended
from safetensors.torch import load_file, save_file

from negmerge_fast.benchmark.bandwidth import read_files
from negmerge_fast.benchmark.records import percentiles, record

LAYOUTS = {
    "134m": llamas.Llama(12, 768, 2048, 768, 12, 32000, "BF16"),
    "1b": llamas.Llama(22, 2048, 5632, 256, 32, 32000, "BF16"),  # TinyLlama's
}
THREADS, SCALE, RANK, ADAPTERS = 2, 0.9, 16, 30
OURS, MERGED, FLOOR = "negmerge merge", "negmerge merge, adapters as merged", "cp, sync"
METHODS = {"lean": (), "peft": ("--peft",)}
MATERIALISE = Path(__file__).with_name("methods") / "materialise.py"
# A step is about so much of a weight, whose deviation is 1, and so much of what an adapter has is its own.
_STEP, _OWN = 1 / 64, 0.3


def make_adapters(folder: Path, model: llamas.Llama, n: int, rank: int) -> list[Path]:
    """Adapters as PEFT saves them, in fp32, which have much in common."""
    generator = torch.Generator().manual_seed(0)
    linear = {name: shape for name, shape in model.shapes.items() if ".layers." in name and len(shape) == 2}

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    common = {name: (draw(rank, shape[1]), draw(shape[0], rank)) for name, shape in linear.items()}
    size = (_STEP / 2 / rank**0.5) ** 0.5  # of a product of two factors, whose scale is 2
    paths = []
    for k in range(n):
        tensors = {}
        for name, factors in common.items():
            for kind, factor in zip("AB", factors, strict=True):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{kind}.weight"
                tensors[key] = size * (factor + _OWN * draw(*factor.shape))
        path = folder / f"adapter-{k}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        modules = sorted({name.split(".")[-2] for name in linear})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": modules,
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


class Case:
    """Commands on a base and adapters in a folder."""

    def __init__(self, base: Path, adapters: list[Path], outs: Path) -> None:
        self.base, self.adapters, self.outs = base, adapters, outs
        self.inputs = [*llamas.weights(base), *(file for path in adapters for file in llamas.weights(path))]
        self.disk: dict[str, int] = dict.fromkeys((OURS, MERGED), _size(adapters))

    def prepare(self) -> None:
        shutil.rmtree(self.outs, ignore_errors=True)
        self.outs.mkdir()
        os.sync()
        read_files(self.inputs, THREADS)

    def merge(self, models: list[Path], *options: object) -> Ended:
        given = (
            self.base,
            *models,
            "--scale",
            SCALE,
            "--output",
            self.outs / "out",
            "--threads",
            THREADS,
            "--quiet",
        )
        return process.done((sys.executable, "-m", "negmerge_fast", "merge", *given, *options))

    def materialised(self, method: str) -> Ended:
        """Both commands of a way together."""
        models = self.outs / "models"
        models.mkdir()
        command = (sys.executable, MATERIALISE, models, self.base, *self.adapters, *METHODS[method])
        first = process.done(command)
        paths = [models / path.name for path in self.adapters]
        self.disk[method] = _size([*self.adapters, *paths])
        second = self.merge(paths)
        return Ended(0, first.seconds + second.seconds, max(first.peak, second.peak), second.said)

    def copy(self) -> Ended:
        command = 'cp -r --reflink=never "$0" "$1" && sync "$1"/*'
        return process.done(("sh", "-c", command, self.base, self.outs / "copy"))

    def candidates(self, methods: list[str]) -> dict[str, Callable[[], Ended]]:
        return {
            FLOOR: self.copy,
            OURS: partial(self.merge, self.adapters),
            MERGED: partial(self.merge, self.adapters, "--adapters-as", "merged"),
            **{method: partial(self.materialised, method) for method in methods},
        }

    def check(self, methods: list[str]) -> dict[str, float]:
        """The fraction of the elements in which each way's output differs from ours of merged models."""
        self.prepare()
        self.merge(self.adapters, "--adapters-as", "merged")
        expected = _tensors(self.outs / "out")
        found = {}
        for method in methods:
            self.prepare()
            self.materialised(method)
            other = _tensors(self.outs / "out")
            if other.keys() != expected.keys():
                raise process.Failed(f"{method}: other tensors than ours, no speed")
            differing = sum(int((other[name] != tensor).count_nonzero()) for name, tensor in expected.items())
            found[method] = differing / sum(tensor.numel() for tensor in expected.values())
            if found[method] > 0.01:
                raise process.Failed(
                    f"{method}: {found[method]:.1%} of the elements differ from ours, no speed"
                )
        return found

    def rows(self, layout: str, model: llamas.Llama, methods: list[str], rounds: int) -> list[dict[str, Any]]:
        differing = self.check(methods)
        found = process.alternate(self.candidates(methods), rounds, self.prepare)
        ours = found[OURS]
        return [
            {
                "suite": "adapters", "layout": f"Llama {layout} in files", "way": method, "dtype": model.dtype, "n": len(self.adapters),
                "numel": model.numel, "bytes": None, "state": "warm", "rounds": rounds,
                **percentiles([done.seconds for done in taken]),
                "times ours": statistics.median(a.seconds / b.seconds for a, b in zip(taken, ours, strict=True)),
                "peak MB": max(done.peak for done in taken) / 1e6,
                "disk MB": self.disk[method] / 1e6 if method in self.disk else None,
                "differing": differing.get(method),
            }
            for method, taken in found.items()
        ]  # fmt: skip


def _size(folders: list[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in llamas.weights(folder))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in llamas.weights(folder) for name, tensor in load_file(path).items()}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--layout", choices=LAYOUTS, default="134m")
    options.add_argument("--dtype", default="BF16", help="of the base")
    options.add_argument("--layers", type=int, help="other than the layout's")
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--adapters", type=int, default=ADAPTERS)
    options.add_argument("--rank", type=int, default=RANK)
    options.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="of materialising"
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options.add_argument("--results", type=Path, default=Path(os.devnull), metavar="FILE.jsonl")
    given = options.parse_args()
    whole = LAYOUTS[given.layout]._replace(dtype=given.dtype)
    model = whole._replace(layers=given.layers or whole.layers).shrunk(given.shrink)
    # All models are local.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            needed = (given.adapters + 3) * model.bytes if given.methods else 3 * model.bytes
            if needed > (free := shutil.disk_usage(folder).free):
                raise OSError(f"{folder}: {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free")
            base, *_ = llamas.make(folder, model, 0, 1 << 40)
            adapters = make_adapters(folder, model, given.adapters, given.rank)
            rows = Case(base, adapters, folder / "outs").rows(
                given.layout, model, given.methods, given.rounds
            )
    except (OSError, process.Failed) as error:
        sys.exit(f"adapters: {error}")
    record(given.results, rows, also=("times ours", "peak MB", "disk MB", "differing"))


if __name__ == "__main__":
    main()

"""A baseline of `negmerge merge` in plain PyTorch: loads all models, applies the formula to each tensor and saves the result."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from negmerge_fast.benchmark.candidates import eager


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("base", type=Path)
    options.add_argument("models", type=Path, nargs="+")
    given = options.parse_args()
    base, *models = (
        {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for model in (given.base, *given.models)
    )  # fmt: skip
    merged = {name: eager(tensor, [model[name] for model in models]) for name, tensor in base.items()}
    given.out.mkdir()
    save_file(merged, given.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

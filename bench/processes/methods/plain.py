"""Merges models in files with a plain script: files opened lazily, a tensor at a time, in place on the mapped base, then save_file."""

from __future__ import annotations

from pathlib import Path

import torch
from formula import Formula, arguments, compiled, weights
from safetensors import safe_open
from safetensors.torch import save_file


def opened(model: Path) -> dict[str, safe_open]:
    return {name: file for path in weights(model) for file in [safe_open(path, "pt")] for name in file.keys()}  # noqa: SIM118


def main() -> None:
    given = arguments(__doc__, compile="the formula under torch.compile")
    torch.set_grad_enabled(False)
    formula = compiled(given.scale) if given.compile else Formula(given.scale)
    base, *models = map(opened, (given.base, *given.models))
    merged = {}
    for name, file in base.items():
        merged[name] = file.get_tensor(name)  # mapped privately: what is written to is a copy
        formula(merged[name], [model[name].get_tensor(name) for model in models])
    given.out.mkdir()
    save_file(merged, given.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

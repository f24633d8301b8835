"""Merges each LoRA adapter into the base and writes it as a model, as one does for a tool that takes whole models.

Without --peft, as lean as it can be: the base is read once, a tensor is one matrix product and one addition on all threads, and save_file
writes. With --peft, merge_and_unload and save_pretrained, of a base that is loaded once.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def lean(base: Path, adapters: list[Path], out: Path) -> None:
    held = {
        name: tensor
        for path in sorted(base.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        factors = load_file(adapter / "adapter_model.safetensors")
        merged = dict(held)
        for key, a in factors.items():
            if key.endswith(_A):
                name = f"{key.removeprefix(_PREFIX).removesuffix(_A)}.weight"
                b = factors[key.replace(_A, _B)]
                scale = config["lora_alpha"] / config["r"]
                merged[name] = torch.addmm(held[name].float(), b, a, alpha=scale).to(held[name].dtype)
        model = out / adapter.name
        model.mkdir()
        save_file(merged, model / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(base / "config.json", model)


def with_peft(base: Path, adapters: list[Path], out: Path) -> None:
    sys.path.append(str(Path(__file__).parents[3] / "tests" / "support"))
    import torchvision_cpu

    torchvision_cpu.declare_operators()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    held = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for adapter in adapters:
        merged = PeftModel.from_pretrained(copy.deepcopy(held), adapter).merge_and_unload()
        merged.save_pretrained(out / adapter.name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path, help="a folder for the models")
    options.add_argument("base", type=Path)
    options.add_argument("adapters", type=Path, nargs="+")
    options.add_argument("--peft", action="store_true")
    given = options.parse_args()
    torch.set_grad_enabled(False)
    (with_peft if given.peft else lean)(given.base, given.adapters, given.out)


if __name__ == "__main__":
    main()

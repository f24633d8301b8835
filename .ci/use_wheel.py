"""The README's Python use, with the installed wheel: from tensors, and the checkpoints that the gate merges next."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import negmerge_fast as nm

generator = torch.Generator().manual_seed(0)
base = {"weight": torch.randn(1000, 100, generator=generator)}
finetuned = [{"weight": base["weight"] + torch.randn(1000, 100, generator=generator)} for _ in range(2)]
merged = nm.merge(base, finetuned, scale=0.9)
stats = nm.merge_({"weight": base["weight"].clone()}, finetuned, scale=0.9)
assert 0.4 < stats.consensus_ratio < 0.6, stats
assert not torch.equal(merged["weight"], base["weight"])
for name, model in [("base", base), ("ft-0", finetuned[0]), ("ft-1", finetuned[1])]:
    Path(name).mkdir()
    save_file(model, f"{name}/model.safetensors", metadata={"format": "pt"})
    Path(name, "config.json").write_text(json.dumps({"name": name}))
print(f"negmerge_fast {nm.__version__} from {nm.__file__}: {stats}")

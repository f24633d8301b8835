"""Write a small model and three fine-tuned versions, merge them within a memory budget, and verify the result.

python examples/merge_checkpoints.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import negmerge_fast as nm

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
generator = torch.Generator().manual_seed(0)
weights = {f"layers.{i}.weight": torch.randn(256, 256, generator=generator) for i in range(4)}
paths = [folder / "base", *(folder / f"finetuned-{k}" for k in range(3))]
for path in paths:
    shift = 0.0 if path.name == "base" else 0.01
    tensors = {name: t + shift * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text("{}")

base, *finetuned = paths
report = nm.merge_checkpoints(
    base, finetuned, folder / "forgotten", scale=0.9, memory_budget="64MiB", overwrite=True
)
print(f"{report.consensus_ratio:.1%} of {report.elements:,} elements agreed; backend {report.backend}")

done = nm.verify_checkpoint(folder / "forgotten", against=paths)
print(f"{done.files} files verified, {done.blocks} blocks merged again")
print(folder / "forgotten")

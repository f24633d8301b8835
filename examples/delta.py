"""Compute the consensus delta of fine-tuned versions once, try many values of λ on the model itself, keep the delta in a file.

python examples/delta.py
"""

import copy
import tempfile
from pathlib import Path

import torch

import negmerge_fast as nm

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

# Stand-ins for models that were fine-tuned on what is to be forgotten.
finetuned = []
for _ in range(4):
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 + 0.01 * torch.randn_like(parameter)
    finetuned.append(model)

delta = nm.consensus_delta(base, finetuned)
print(
    f"{delta.stats.agreed:,} of {delta.stats.elements:,} elements agree; the delta has {delta.nbytes:,} bytes"
)

# The models are not needed any more.
before = copy.deepcopy(base.state_dict())
probe = torch.randn(8, 16)
with torch.no_grad(), delta.live(base) as live:
    outputs = base(probe)
    for scale in (0.25, 0.5, 0.75, 1.0):
        live.scale = scale
        print(f"λ = {scale}: the outputs moved by {(base(probe) - outputs).norm():.3f}")
assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

folder = Path(tempfile.mkdtemp()) / "delta"
delta.save(folder)

merged = copy.deepcopy(base)
nm.load_delta(folder).apply_(merged, 0.75)
nm.merge_(base, finetuned, scale=0.75)
assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in merged.state_dict().items())

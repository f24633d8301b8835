"""Merge a model with its fine-tuned versions in memory, and search λ with a task vector that is computed once."""

import copy

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

merged = copy.deepcopy(base)
stats = nm.merge_(merged, finetuned, scale=0.9)
print(f"{stats.agreed:,} of {stats.elements:,} elements agreed ({stats.consensus_ratio:.1%})")
for name, tensor in stats.tensors.items():
    print(f"  {name}: {tensor.agreed:,} of {tensor.elements:,}")

# The consensus does not depend on λ, so that many values cost one merge.
before = base.state_dict()
taus = [{name: tensor - before[name] for name, tensor in model.state_dict().items()} for model in finetuned]
tau = nm.merge_task_vectors(taus)
probe = torch.randn(8, 16)
for scale in (0.25, 0.5, 0.75, 1.0):
    candidate = copy.deepcopy(base)
    nm.negate_(candidate, tau, scale=scale)
    with torch.no_grad():
        moved = (candidate(probe) - base(probe)).norm()
    print(f"λ = {scale}: the outputs moved by {moved:.3f}")

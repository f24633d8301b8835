"""Compare methods on one small model, without a second one in memory; then with λ by layer and a mask."""

import copy

import torch

import negmerge_fast as nm

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

# Stand-ins for models that were fine-tuned on what is to be forgotten: half of what they have learned is the same in all.
learned = [0.1 * torch.randn_like(parameter) for parameter in base.parameters()]
finetuned = [copy.deepcopy(base) for _ in range(4)]
with torch.no_grad():
    for model in finetuned:
        for parameter, shared in zip(model.parameters(), learned, strict=True):
            parameter += shared + 0.1 * torch.randn_like(parameter)

# The usual numbers of a method are in its name; nm.method makes one with others.
methods = [
    "negmerge",
    "mean",
    "magmax",
    "ties",
    nm.method("dare", drop=0.5),
    nm.method("consensus", mask_scale=0.6),
]
probe = torch.randn(64, 16)
for method in methods:
    delta = nm.consensus_delta(base, finetuned, method=method)
    with torch.no_grad(), delta.live(base) as live:
        before = base(probe)
        live.scale = 0.5
        moved = (base(probe) - before).norm()
    print(
        f"{delta.method}: {delta.stats.consensus_ratio:.1%} agree, the outputs moved by {moved:.2f} at λ = 0.5"
    )

# λ may differ by layer, and a mask may keep elements: here those that the base has learned best.
mask = {name: tensor.abs() < 0.2 for name, tensor in base.state_dict().items()}
stats = nm.merge_(base, finetuned, scale={r"^0\.": 0.3, "": 0.9}, method="magmax", weights=mask)
print(f"magmax: {stats.agreed:,} of {stats.elements:,} elements changed, {stats.masked:,} masked")

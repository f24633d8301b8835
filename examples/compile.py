"""Merge inside a compiled graph: with the Python function, and with the operators below it."""

import torch

import negmerge_fast as nm
import negmerge_fast.ops  # registers torch.ops.negmerge

torch.manual_seed(0)
base = {"weight": torch.randn(8, 8), "bias": torch.randn(8)}
finetuned = [{name: t + torch.randn_like(t) for name, t in base.items()} for _ in range(3)]
x = torch.randn(2, 8)


@torch.compile(fullgraph=True)
def forward(x, base, finetuned):
    merged = nm.merge(base, finetuned, scale=0.9)
    return torch.nn.functional.linear(x, merged["weight"], merged["bias"])


@torch.compile(fullgraph=True)
def forward_with_operator(x, base, finetuned):
    # Lists of tensors: those of the first model, then those of the second, and so on.
    (weight, bias), counts = torch.ops.negmerge.merge(base, finetuned, 0.9)
    return torch.nn.functional.linear(x, weight, bias), counts


y = forward(x, base, finetuned)
z, counts = forward_with_operator(
    x, [base["weight"], base["bias"]], [model[name] for model in finetuned for name in ("weight", "bias")]
)
assert torch.equal(y, z)
print("agreed, non-finite and vetoed-by-zero elements of each tensor:", counts.tolist())

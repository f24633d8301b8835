"""The README's Python use, with the installed wheel: from tensors, and the checkpoints that the gate merges next.

The arguments say of the CPU kernel and of the CUDA kernel that they are "compiled", or what is in the reason why not.
"""

import importlib.resources
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import negmerge_fast as nm
from negmerge_fast.backends.native import build_info

built = build_info()
print(f"negmerge_fast {nm.__version__} from {nm.__file__}: {built}")
for reason, expected in zip((built["cpu"], built["cuda"]), sys.argv[1:], strict=True):
    assert (reason is None) if expected == "compiled" else (expected in str(reason)), (reason, expected)
if built["cpu"] is None:
    native = importlib.import_module("negmerge_fast._native")
    assert native.cuda == (built["cuda"] is None)
majors = [number // 10 for number in built["cuda_architectures"]]
assert built["cuda"] is not None or {8, 9} <= set(majors), "a wheel is for all GPUs"
assert len(majors) == len(set(majors)), "code of one version runs on the later ones of the same major version"

assert importlib.util.find_spec("negmerge_fast.kernels.merge"), "the Triton kernel is not in the wheel"
assert importlib.util.find_spec("negmerge_fast.benchmark.quick"), "negmerge bench is not in the wheel"
assert importlib.resources.is_resource("negmerge_fast.reports", "page.html"), (
    "the page of reports is not in the wheel"
)

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
print(stats)

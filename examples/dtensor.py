"""Merge sharded tensors, as of FSDP2: each rank merges its own shards, without communication.

torchrun --nproc-per-node 2 examples/dtensor.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import negmerge_fast as nm

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # the same tensors on every rank
whole = torch.randn(64, 16)
versions = [whole + torch.randn(64, 16) for _ in range(3)]


def own_rows(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def sharded(tensor):
    return DTensor.from_local(own_rows(tensor).clone(), mesh, [Shard(0)], run_check=False)


base = {"weight": sharded(whole)}
finetuned = [{"weight": sharded(version)} for version in versions]

stats = nm.merge_(base, finetuned, scale=0.9)
expected = nm.merge(whole, versions, scale=0.9)
assert torch.equal(base["weight"].to_local(), own_rows(expected))
print(f"rank {dist.get_rank()}: {stats.agreed} of {stats.elements} elements agreed")

dist.destroy_process_group()

"""Merge sharded tensors, as of FSDP2: each rank merges its own shards, without communication.

torchrun --nproc-per-node 2 examples/dtensor.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import negmerge_fast as nm

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # the same tensors on every rank
whole = torch.randn(64, 16)
versions = [whole + torch.randn(64, 16) for _ in range(3)]

base = {"weight": distribute_tensor(whole, mesh, [Shard(0)])}
finetuned = [{"weight": distribute_tensor(version, mesh, [Shard(0)])} for version in versions]

stats = nm.merge_(base, finetuned, scale=0.9)
expected = nm.merge(whole, versions, scale=0.9)
assert torch.equal(base["weight"].full_tensor(), expected)
print(f"rank {dist.get_rank()}: {stats.agreed} of {stats.elements} elements agreed")

dist.destroy_process_group()

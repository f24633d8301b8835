"""Shards of torch.distributed.checkpoint are the whole tensors; sharded output in other formats is refused, with what converts it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import load_model, raw, save_model
from stored_tensors import check
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.errors import InputError

try:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
except ImportError:
    pytest.skip("this torch writes no such shards", allow_module_level=True)

SHARDS = "shard-0000{}-model-00001-of-00001.safetensors"


class _Planner:
    """Gives the writer the part of a tensor that an item names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        assert item.tensor_data
        chunk = item.tensor_data.chunk
        slices = [slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        return self.tensors[item.index.fqn][tuple(slices)]


def save_shards(
    folder: Path, tensors: dict[str, torch.Tensor], cuts: dict[str, Sequence[Sequence[int]]], ranks: int
) -> None:
    """Save as HuggingFaceStorageWriter does for several ranks. cuts: where each extent of a tensor is cut; rank r has box r of the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for rank in range(ranks):
        items = []
        for name, tensor in tensors.items():
            for origin, sizes in list(boxes(tensor.shape, cuts.get(name, ())))[rank::ranks][:1]:
                data = TensorWriteData(
                    ChunkStorageMetadata(torch.Size(origin), torch.Size(sizes)),
                    TensorProperties(tensor.dtype),
                    tensor.shape,
                )
                items.append(
                    WriteItem(MetadataIndex(name, torch.Size(origin)), WriteItemType.SHARD, tensor_data=data)
                )
        plans.append(SavePlan(items))
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    for plan in writer.prepare_global_plan(plans):
        writer.write_data(plan, _Planner(tensors)).wait()  # type: ignore[arg-type]


def boxes(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> Iterable[tuple[list[int], list[int]]]:
    edges = [[0, *(cuts[k] if k < len(cuts) else ()), extent] for k, extent in enumerate(shape)]
    for corner in itertools.product(*(list(itertools.pairwise(e)) for e in edges)):
        yield [begin for begin, _ in corner], [end - begin for begin, end in corner]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(10, 33, generator=generator), "columns": torch.randn(33, 10, generator=generator).bfloat16(),
        "both": torch.randn(9, 7, 3, generator=generator).double(), "long": torch.randn(257, 3001, generator=generator).half(),
        "vector": torch.randn(11, generator=generator), "replicated": torch.randn(5, generator=generator), "scalar": torch.tensor(2.0),
        "count": torch.tensor(3),
    }  # fmt: skip


CUTS = {
    "rows": [[3, 6, 9]],
    "columns": [[], [3, 6, 9]],
    "both": [[5], [4]],
    "long": [[100], [1000]],
    "vector": [[3, 6, 9]],
}


@pytest.mark.parametrize("step", [1 << 30, 40_001])
def test_shards_of_ranks(tmp_path: Path, step: int) -> None:
    held = tensors()
    save_shards(tmp_path, held, CUTS, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SHARDS.format(k) for k in (1, 2, 3, 4)]
    opened = open_checkpoint(tmp_path)
    assert opened.kind == "directory" and len(opened.weights) == 4
    assert any("shards of 4 ranks are taken" in note for note in opened.notes)
    check(opened, {name: held[name] for name in opened.tensors}, step)
    assert opened.tensors.keys() == held.keys()


def test_a_merge_reads_them_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("base"), tensors())
    for k in (1, 2):
        save_model(Path(f"whole-{k}"), tensors(k))
        save_shards(Path(f"sharded-{k}"), tensors(k), CUTS, 4)
    nm.merge_checkpoints("base", ["whole-1", "whole-2"], "expected", scale=0.9)
    with pytest.warns(nm.MergeWarning, match="shards of 4 ranks"):
        nm.merge_checkpoints("base", ["sharded-1", "sharded-2"], "merged", scale=0.9)
    expected, merged = load_model(Path("expected")), load_model(Path("merged"))
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.items())
    nm.verify_checkpoint("merged", ["base", "sharded-1", "sharded-2"])


def test_a_consolidated_one_is_plain(tmp_path: Path) -> None:
    save_model(tmp_path, tensors())
    save_shards(tmp_path / "sharded", tensors(), CUTS, 4)
    opened = open_checkpoint(tmp_path)
    assert list(opened.weights) == ["model.safetensors"] and not opened.notes
    assert "sharded/" + SHARDS.format(1) in opened.skipped_files


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            open_checkpoint(tmp_path)

    save_shards(tmp_path, tensors(), CUTS, 4)
    shards = [tmp_path / SHARDS.format(k) for k in (1, 2, 3, 4)]
    second = shards[1].read_bytes()
    shards[1].unlink()
    refused("none of rank 2")
    shards[1].write_bytes(shards[0].read_bytes())
    refused("a shard is missing, or there twice")
    for text, match in {
        "3": "an object", "{}": "has None, expected saved_offsets", '{"x":{"saved_offsets":[-1]}}': "expected saved_offsets",
        '{"x":{"saved_offsets":[0,0]}}': "expected saved_offsets", '{"x":{"saved_offsets":[9223372036854775808]}}': "expected saved_offsets",
        '{"x":{"saved_offsets":"0"}}': "expected saved_offsets", '{"x":1}': "expected saved_offsets", "{": "not JSON",
    }.items():  # fmt: skip
        header = {
            "__metadata__": {"DCP_SHARDING_INFO": text},
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        }
        shards[1].write_bytes(raw(header, bytes(8)))
        refused(match)
    shards[1].write_bytes(raw({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)))
    refused("no DCP_SHARDING_INFO")
    shards[1].write_bytes(second)
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "command"),
    [
        ([".metadata", "__0_0.distcp", "__1_0.distcp"], "format_utils dcp_to_torch {} model.pt"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt"], "accelerate merge-weights {}/pytorch_model_fsdp_0 OUT"),
        (["zero_to_fp32.py", "latest", "global_step10/mp_rank_00_model_states.pt"], "python {0}/zero_to_fp32.py {0} OUT --safe_serialization"),
        (["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"], "export_ckpt('{}', 'OUT')"),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "tools/checkpoint/convert.py"),
        (["common.pt", "metadata.json", ".metadata", "__0_0.distcp"], "export_ckpt('{}', 'OUT')"),
    ],
)  # fmt: skip
def test_other_output_of_training_is_refused_with_what_converts_it(
    tmp_path: Path, files: list[str], command: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x80\2.")
    with pytest.raises(InputError) as found:
        open_checkpoint(tmp_path)
    assert command.format(tmp_path) in str(found.value) and "\n" not in str(found.value)


def test_a_part_of_it_is_refused_in_the_same_way(tmp_path: Path) -> None:
    step = tmp_path / "global_step7"
    step.mkdir()
    for name, command in {
        "mp_rank_00_model_states.pt": f"{tmp_path}/zero_to_fp32.py {tmp_path} OUT --safe_serialization --tag global_step7",
        "__0_0.distcp": f"dcp_to_torch {step} model.pt",
        "model_optim_rng.pt": "AutoBridge.from_hf_pretrained(MODEL)",
    }.items():
        torch.save({"module": {"a": torch.zeros(2)}}, step / name)
        with pytest.raises(InputError) as found:
            open_checkpoint(step / name)
        assert command in str(found.value)


_RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/../store", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = torch.load(f"{folder}/../tensors.pt")
    placements = {"rows": (Shard(0), Shard(0)), "columns": (Replicate(), Shard(1)), "both": (Shard(0), Shard(1))}
    held = {n: distribute_tensor(t, mesh, placements.get(n, (Shard(0), Replicate()))) for n, t in tensors.items() if t.dim()}
    dcp.save(held, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    dist.destroy_process_group()
if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=4)
"""


@pytest.mark.slow
def test_what_four_ranks_save(tmp_path: Path) -> None:
    held: dict[str, Any] = {name: tensor for name, tensor in tensors().items() if tensor.dim()}
    torch.save(held, tmp_path / "tensors.pt")
    (tmp_path / "ranks.py").write_text(_RANKS)
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, tmp_path / "ranks.py", tmp_path / "out"], check=True)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.tensors.keys() == held.keys()
    check(opened, {name: held[name] for name in opened.tensors})

"""Deltas of checkpoints: applied by hand they give the bytes of a merge."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.core.errors import InputError
from negmerge_fast.deltas.job import delta_checkpoints, options_of, prepare_delta
from negmerge_fast.output.manifest import read as read_manifest

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = {"a.weight": (3, 4099), "b.weight": (64, 64), "c": (), "d": (0, 5), "e.bias": (129,)}


def models(folder, dtypes, n=3, shapes=SHAPES, shards=1, seed=0):
    """A base and n models, sharded, of types in turn; returns their folders."""
    generator = torch.Generator().manual_seed(seed)
    paths = []
    lean = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    base = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    base = {name: tensor.to(TYPES[dtypes[0]]) for name, tensor in base.items()}
    for k in range(n + 1):
        dtype = TYPES[dtypes[k % len(dtypes)]]
        held = {}
        for name, tensor in base.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            held[name] = tensor if k == 0 else (tensor.double() + 0.1 * lean[name] + 0.1 * noise).to(dtype)
        path = folder / ("base" if k == 0 else f"ft-{k}")
        path.mkdir()
        if shards == 1 or k:
            save_file(held, path / "model.safetensors", metadata={"format": "pt"})
        else:
            names = list(held)
            weight_map = {
                name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
                for i, name in enumerate(names)
            }
            for shard in sorted(set(weight_map.values())):
                save_file({n: held[n] for n in names if weight_map[n] == shard}, path / shard)
            (path / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )
        paths.append(path)
    (paths[0] / "config.json").write_text("{}")
    return paths[0], paths[1:]


def applied(base, delta, scale):
    """A delta applied by hand, with torch alone."""
    held = {}
    for file in sorted(base.glob("*.safetensors")):
        held |= load_file(file)
    stored = {}
    for file in sorted(delta.glob("*.safetensors")):
        stored |= load_file(file)
    for name, tensor in held.items():
        bits = np.unpackbits(stored[f"{name}.mask"].numpy(), bitorder="little")
        mask = torch.from_numpy(bits[: tensor.numel()].astype(bool))
        assert not bits[tensor.numel() :].any()
        means = stored[f"{name}.mean"]
        b = tensor.reshape(-1)[mask].to(means.dtype)
        result = b + torch.tensor(scale, dtype=means.dtype) * -means
        if tensor.element_size() == 2:
            result = result.float()
        flat = tensor.reshape(-1).clone()
        flat[mask] = result.to(tensor.dtype)
        held[name] = flat.reshape(tensor.shape)
    return held


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left[name], right[name])]
        assert torch.equal(*as_bytes), name


@pytest.mark.parametrize(
    "dtypes", [["F32"], ["BF16"], ["F16"], ["F64"], ["BF16", "F32"], ["F32", "BF16"], ["F16", "F64", "BF16"]]
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_delta_of_files_gives_the_bytes_of_a_merge(tmp_path, dtypes, backend):
    base, finetuned = models(tmp_path, dtypes)
    report = delta_checkpoints(base, finetuned, tmp_path / "delta", backend=backend)
    for scale in (0.9, -1.0, 0.0):
        merged = nm.merge_checkpoints(base, finetuned, tmp_path / f"out{scale}", scale=scale)
        same(
            applied(base, tmp_path / "delta", scale),
            load_file(tmp_path / f"out{scale}" / "model.safetensors"),
        )
        assert (report.agreed, report.nonfinite, report.vetoed_by_zero) == (
            merged.agreed, merged.nonfinite, merged.vetoed_by_zero
        )  # fmt: skip
    opened = open_delta(tmp_path / "delta")
    assert opened.agreed == report.agreed and opened.info.models == 3
    assert nm.verify_checkpoint(tmp_path / "delta").files == 1
    assert read_manifest(tmp_path / "delta" / "negmerge.json").recipe.means == "exact"


def test_a_sharded_base_gives_a_sharded_delta_with_an_index(tmp_path):
    base, finetuned = models(tmp_path, ["F32"], shards=3)
    delta_checkpoints(base, finetuned, tmp_path / "delta", memory_budget="24MiB")
    names = sorted(path.name for path in (tmp_path / "delta").iterdir())
    shards = [f"delta-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert names == [*shards, "delta.safetensors.index.json", "negmerge.json"]
    report = nm.merge_checkpoints(base, finetuned, tmp_path / "out", scale=0.7)
    merged = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    same(applied(base, tmp_path / "delta", 0.7), merged)
    assert open_delta(tmp_path / "delta").agreed == report.agreed


def test_half_stores_means_in_bf16(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    delta_checkpoints(base, finetuned, tmp_path / "delta", half=True)
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    delta_checkpoints(base, finetuned, tmp_path / "exact")
    exact = load_file(tmp_path / "exact" / "delta.safetensors")
    for name in SHAPES:
        assert torch.equal(stored[f"{name}.mask"], exact[f"{name}.mask"])
        assert torch.equal(stored[f"{name}.mean"], exact[f"{name}.mean"].bfloat16())


def small_chunks(monkeypatch, size=4096):
    from negmerge_fast.streaming import budget

    monkeypatch.setattr(budget, "MAX_CHUNK_BYTES", size)


@pytest.mark.parametrize("stop_at", [1, 2, 5, 9, 14])
def test_a_stopped_delta_resumes_to_the_same_bytes(tmp_path, monkeypatch, stop_at):
    small_chunks(monkeypatch)
    from negmerge_fast.output import journal

    monkeypatch.setattr(journal, "INTERVAL_S", 0.0)
    base, finetuned = models(tmp_path, ["F32", "BF16"], shards=2)
    delta_checkpoints(base, finetuned, tmp_path / "whole")
    calls = 0

    def stop(done, total):
        nonlocal calls
        assert 0 <= done <= total
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True, progress=stop)
    assert (tmp_path / ".delta.negmerge").is_dir() and not (tmp_path / "delta").exists()
    report = delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "delta" / path.name).read_bytes(), path.name
    assert report.bytes_done_before >= 0
    again = delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    assert again.bytes_written == 0 and again.agreed == report.agreed


def test_a_delta_stopped_behind_its_last_means_resumes(tmp_path, monkeypatch):
    base, finetuned = models(tmp_path, ["F32"])
    delta_checkpoints(base, finetuned, tmp_path / "whole")

    def full(self, manifest, on_progress):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        from negmerge_fast.output.writer import Writer

        patched.setattr(Writer, "finish", full)
        with pytest.raises(OSError, match="No space"):
            delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "delta" / path.name).read_bytes(), path.name


def test_a_shorter_spool_is_refused(tmp_path, monkeypatch):
    base, finetuned = models(tmp_path, ["F32"])

    def stop(self, manifest, on_progress):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        from negmerge_fast.output.writer import Writer

        patched.setattr(Writer, "finish", stop)
        with pytest.raises(OSError):
            delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    spool = tmp_path / ".delta.negmerge" / "rank-0.means"
    spool.write_bytes(spool.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"rank-0\.means: \d+ bytes, expected \d+"):
        delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)


def test_what_is_not_finite_is_refused_or_counted(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    held = load_file(finetuned[1] / "model.safetensors")
    held["b.weight"][3, 4] = float("nan")
    save_file(held, finetuned[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor 'b.weight': nan at \(3, 4\)"):
        delta_checkpoints(base, finetuned, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    report = delta_checkpoints(base, finetuned, tmp_path / "delta", nonfinite="keep-base")
    merged = nm.merge_checkpoints(
        base, finetuned, tmp_path / "out", scale=0.5, nonfinite="keep-base", skip_unchanged=False
    )
    assert report.nonfinite == merged.nonfinite == 1
    same(applied(base, tmp_path / "delta", 0.5), load_file(tmp_path / "out" / "model.safetensors"))
    assert open_delta(tmp_path / "delta").tensors["b.weight"].info.nonfinite == 1


def test_options_that_a_delta_has_not_are_refused(tmp_path):
    with pytest.raises(TypeError, match="scale"):
        options_of(scale=1.0)
    base, _finetuned = models(tmp_path, ["F32"])
    with pytest.raises(InputError, match="no models"):
        prepare_delta(base, [], tmp_path / "delta", options_of())


def test_include_leaves_the_others_out(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    delta_checkpoints(base, finetuned, tmp_path / "delta", include="weight")
    assert set(open_delta(tmp_path / "delta").tensors) == {"a.weight", "b.weight"}

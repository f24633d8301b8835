"""Deltas of checkpoints: applied by hand they give the bytes of a merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from checkpoint_files import update_checksums
from interrupted import finish, free_port
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_chunks import RECORD_EVERY_CHUNK, set_chunk_bytes

import negmerge_fast as nm
from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.core.errors import InputError
from negmerge_fast.deltas import spool
from negmerge_fast.deltas.job import delta_checkpoints, options_of, prepare_delta
from negmerge_fast.output import journal
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


@pytest.mark.parametrize("stop_at", [1, 2, 5, 9, 14])
def test_a_stopped_delta_resumes_to_the_same_bytes(tmp_path, monkeypatch, stop_at):
    set_chunk_bytes(monkeypatch, 4096)
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


KILLED = f"""{RECORD_EVERY_CHUNK}
import os, signal, time
from negmerge_fast.deltas.job import delta_checkpoints
calls = []
def kill(done, total):
    calls.append(done)
    time.sleep(0.02)  # for records, were there any
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
delta_checkpoints("base", ["ft-1", "ft-2", "ft-3"], "delta", progress=kill)
"""


@pytest.mark.processes
def test_a_killed_run_that_did_not_resume_does_not_hinder_one_that_does(tmp_path):
    """Its means are not in a spool."""
    base, finetuned = models(tmp_path, ["F32"], shapes={"a": (3, 70_001), "b": (99_999,)}, shards=2)
    delta_checkpoints(base, finetuned, tmp_path / "whole")
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False).returncode == -9
    assert (tmp_path / ".delta.negmerge" / "output").is_dir()
    delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "delta" / path.name).read_bytes(), path.name


def test_a_large_delta_is_spooled_so_that_it_can_be_resumed(tmp_path, monkeypatch):
    base, finetuned = models(tmp_path, ["F32", "F32"])
    delta_checkpoints(base, finetuned, tmp_path / "whole")
    monkeypatch.setattr("negmerge_fast.deltas.job._DONE_OVER_BYTES", 0)
    monkeypatch.delattr("negmerge_fast.deltas.job.InPlace")
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "delta" / path.name).read_bytes(), path.name


def test_a_full_disk_is_told_of_with_the_output(tmp_path, monkeypatch):
    base, finetuned = models(tmp_path, ["F32"])

    def full(descriptor, data, position):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "_write", full)
    for resume in (False, True):
        with pytest.raises(OSError, match="No space") as error:
            delta_checkpoints(base, finetuned, tmp_path / "delta", resume=resume)
        assert error.value.filename == str(tmp_path / "delta")


def test_a_shorter_spool_is_refused(tmp_path, monkeypatch):
    base, finetuned = models(tmp_path, ["F32"])

    def stop(self, manifest, on_progress):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        from negmerge_fast.output.writer import Writer

        patched.setattr(Writer, "finish", stop)
        with pytest.raises(OSError):
            delta_checkpoints(base, finetuned, tmp_path / "delta", resume=True)
    means = tmp_path / ".delta.negmerge" / "rank-0.means"
    means.write_bytes(means.read_bytes()[:-1])
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


def test_many_single_numbers_of_16_bits_have_masks_longer_than_they_are(tmp_path, monkeypatch):
    set_chunk_bytes(monkeypatch, 4096)
    shapes = {f"s{k:04d}": () for k in range(3000)}
    base, finetuned = models(tmp_path, ["BF16"], shapes=shapes)
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    nm.merge_checkpoints(base, finetuned, tmp_path / "out", scale=0.5)
    same(applied(base, tmp_path / "delta", 0.5), load_file(tmp_path / "out" / "model.safetensors"))


def test_what_is_reported_and_said(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    with pytest.warns(nm.MergeWarning, match="means are stored in BF16"):
        report = delta_checkpoints(base, finetuned, tmp_path / "half", half=True)
    files = [path for path in (tmp_path / "half").iterdir() if path.name != "negmerge.json"]
    assert report.scale is None and report.bytes_written == sum(path.stat().st_size for path in files)


def test_a_delta_is_no_model(tmp_path):
    base, finetuned = models(tmp_path, ["F32"], shards=2)
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    for paths in ((tmp_path / "delta", finetuned), (base, [tmp_path / "delta"])):
        with pytest.raises(
            InputError, match=r"\.safetensors: a consensus delta, expected the weights of a model"
        ):
            nm.merge_checkpoints(*paths, tmp_path / "out", scale=0.5)


def test_a_damaged_delta_is_found(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(nm.DamageError, match="checksum"):
        nm.verify_checkpoint(tmp_path / "delta")


@pytest.mark.parametrize("half", [False, True])
def test_a_delta_is_verified_against_its_inputs(tmp_path, half):
    base, finetuned = models(tmp_path, ["BF16", "F32", "F64"], shards=2)
    (tmp_path / "delta").mkdir()
    delta_checkpoints(base, finetuned, tmp_path / "delta", half=half, overwrite=True, min_agreement=0.6)
    done = nm.verify_checkpoint(tmp_path / "delta", [base, *finetuned])
    assert done.blocks > 1 and done.bytes_compared == 2 * (3 * 4099 + 64 * 64 + 1 + 129)
    with pytest.raises(InputError, match="2 models, expected 3"):
        nm.verify_checkpoint(tmp_path / "delta", [base, *finetuned[:2]])
    with pytest.raises(InputError, match=r"ft-2/model\.safetensors: .* as in ft-1"):
        nm.verify_checkpoint(tmp_path / "delta", [base, finetuned[1], finetuned[0], finetuned[2]])


@pytest.mark.parametrize("change", ["mean", "bit"])
def test_a_mean_that_is_not_that_of_the_models_is_named(tmp_path, change):
    base, finetuned = models(tmp_path, ["BF16", "F32"], shapes={"w": (1000, 700)})
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    held = load_file(path)
    mask = torch.from_numpy(np.unpackbits(held["w.mask"].numpy(), bitorder="little"))
    where = mask.nonzero().flatten()[-1].item()
    if change == "mean":
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x80
        path.write_bytes(content)
    else:  # another element beside it
        free = (mask[:where] == 0).nonzero().flatten()[-1].item()
        begin = path.stat().st_size - held["w.mean"].nbytes - len(held["w.mask"])
        content = bytearray(path.read_bytes())
        content[begin + where // 8] ^= 1 << where % 8
        content[begin + free // 8] ^= 1 << free % 8
        path.write_bytes(content)
        where = free
    update_checksums(tmp_path / "delta")
    assert nm.verify_checkpoint(tmp_path / "delta").files == 1
    index = rf"\({where // 700}, {where % 700}\)"
    with pytest.raises(nm.DamageError, match=rf"tensor 'w': mean \S+ \(0x\w+\) at {index}, expected"):
        nm.verify_checkpoint(tmp_path / "delta", [base, *finetuned])


def test_the_name_of_the_base_need_not_be_utf_8(tmp_path):
    base, finetuned = models(tmp_path, ["F32"])
    odd = tmp_path / os.fsdecode(b"b\xffse")
    base.rename(odd)
    delta_checkpoints(odd, finetuned, tmp_path / "delta")
    assert open_delta(tmp_path / "delta").info.base["path"] == odd.name


EDITS = {
    "format": (lambda m: m.update(format="pt"), "format 'pt', expected negmerge-delta"),
    "version": (lambda m: m.update(version="2"), "version '2', expected 1"),
    "no rule": (lambda m: m.pop("rule"), "no rule in __metadata__"),
    "models": (lambda m: m.update(models="0"), "models '0'"),
    "rule": (lambda m: m.update(rule='{"min_agreement": 0.1, "inputs": "finetuned"}'), "min_agreement: 0.1"),
    "inputs": (lambda m: m.update(rule='{"min_agreement": 1.0, "inputs": "x"}'), "inputs 'x'"),
    "no JSON": (lambda m: m.update(tensors="{"), "tensors in __metadata__ is not JSON"),
    "fewer": (lambda m: m.update(tensors="{}"), "in the file, but its metadata does not name it"),
    "shape": (lambda m: m.update(tensors=m["tensors"].replace("[64, 64]", "[64, 65]")), r"U8 \(512,\), expected U8 \(520,\)"),
    "counts": (lambda m: m.update(tensors=m["tensors"].replace('"nonfinite": 0', '"nonfinite": -1')), "counts of its elements"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_a_malformed_delta_is_refused_in_one_line(tmp_path, case):
    base, finetuned = models(tmp_path, ["F32"])
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    edit, message = EDITS[case]
    edit(metadata)
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(InputError, match=message) as refused:
        open_delta(tmp_path / "delta")
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    base, finetuned = models(tmp_path, ["F32"], shards=2)
    delta_checkpoints(base, finetuned, tmp_path / "delta")
    index = tmp_path / "delta" / "delta.safetensors.index.json"
    held = json.loads(index.read_text())
    del held["weight_map"]["c.mask"]
    index.write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"tensor 'c\.mask': in it or in delta\.safetensors\.index\.json"):
        open_delta(tmp_path / "delta")
    (tmp_path / "delta" / "delta-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"delta-00001-of-00002\.safetensors: No such file"):
        open_delta(tmp_path / "delta")


ON_RANKS = f"""{RECORD_EVERY_CHUNK}
import os, time
from negmerge_fast.deltas import job
from negmerge_fast.deltas.worker import DeltaWorker
from negmerge_fast.runtime.distributed import ranks_from_environment
process, wait = DeltaWorker.process, float(os.environ["TEST_WAIT"])
def slow(self, chunk):
    time.sleep(wait)
    return process(self, chunk)
DeltaWorker.process = slow
ranks = ranks_from_environment(lambda: None, print)
made = []
options = job.options_of(resume=True, threads=1)
ranks.all_gather(lambda: made.append(job.prepare_delta("base", ["ft-1", "ft-2", "ft-3"], "delta", options)))
made[0].run(ranks=ranks)
ranks.leave()
"""


def start_ranks(folder, ranks, wait):
    """Start the processes of a delta, by rank."""
    port = str(free_port())
    environments = [
        {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if ranks > 1
        else {}
        for rank in range(ranks)
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", ON_RANKS],
            cwd=folder,
            env={**os.environ, "TEST_WAIT": str(wait), "OMP_NUM_THREADS": "1", **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for environment in environments
    ]


@pytest.mark.processes
@pytest.mark.parametrize("then", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3))])
def test_ranks_that_are_killed_and_resumed_by_others_write_the_same_bytes(tmp_path, then):
    shapes = {"a": (3, 70_001), "b.weight": (400, 513), "c": (), "d": (99_999,)}
    base, finetuned = models(tmp_path, ["BF16", "F32"], shapes=shapes, shards=2)
    delta_checkpoints(base, finetuned, tmp_path / "whole")
    processes = start_ranks(tmp_path, 2, 0.05)
    journals = lambda: list(tmp_path.glob(".delta.negmerge/journal-*"))  # noqa: E731
    while len(journals()) < 2 or sum(path.read_bytes().count(b"\n") for path in journals()) < 7:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (tmp_path / "delta").exists()
    ended = finish(start_ranks(tmp_path, then, 0.0))
    assert [status for status, *_ in ended] == [0] * then, ended
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "delta" / path.name).read_bytes(), path.name
    assert not (tmp_path / ".delta.negmerge").exists()

"""Deltas applied to files: the bytes of a merge for every scale, whole outputs or none, and only to the base that they are of."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import same_bits
from checkpoint_files import family, load_model, read_manifest, save_model
from interrupted import contents, finish, kill_all, make_models, start
from late_stream import DEVICE, gpu  # noqa: F401
from resumable import Stop, weights
from safetensors.torch import load_file, save_file
from small_chunks import record_every_chunk, set_chunk_bytes

import negmerge_fast as nm
from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.deltas.job import delta_checkpoints
from negmerge_fast.output.staging import Staging
from negmerge_fast.streaming import budget, together

SCALES = [*np.linspace(0, 1, 21).tolist(), -0.35, -1.0, 16.0]


@pytest.fixture
def folder(tmp_path: Path, models: list[dict[str, torch.Tensor]]) -> Path:
    """base in two shards, ft-0 … ft-2, and their delta."""
    delta_checkpoints(tmp_path / "base", finetuned(tmp_path), tmp_path / "delta")
    return tmp_path


def finetuned(folder: Path) -> list[Path]:
    return sorted(folder.glob("ft-*"))


def apply(folder: Path, scale: Any = 0.9, **options: Any) -> Any:
    return nm.apply_delta(folder / "base", folder / "delta", folder / "out", scale=scale, **options)


def merged(folder: Path, scale: float, **options: Any) -> tuple[Path, nm.Report]:
    """The folder and the report of a direct merge."""
    path = folder / f"merged{scale}"
    return path, nm.merge_checkpoints(folder / "base", finetuned(folder), path, scale=scale, **options)


COUNTS = (
    "elements",
    "agreed",
    "consensus_ratio",
    "nonfinite",
    "vetoed_by_zero",
    "min_agreement",
    "scale",
    "tensors",
)


def test_every_scale_gives_the_bytes_and_the_counts_of_a_merge(folder: Path) -> None:
    reports = apply(folder, SCALES)
    assert [report.scale for report in reports] == SCALES
    for scale, report in zip(SCALES, reports, strict=True):
        out = folder / f"out-{scale}"
        assert report.output == str(out)
        expected, direct = merged(folder, scale)
        assert weights(out) == weights(expected)
        assert [getattr(report, name) for name in COUNTS] == [getattr(direct, name) for name in COUNTS]
        assert (
            read_manifest(out / "negmerge.json")["counted"]
            == read_manifest(expected / "negmerge.json")["counted"]
        )
        assert nm.verify_checkpoint(out, [folder / "base", folder / "delta"]).blocks > 0
    one = apply(folder, 0.9)
    assert weights(folder / "out") == weights(folder / "merged0.9") and one.models == [str(folder / "delta")]


@pytest.mark.parametrize(
    ("dtype", "wider", "backend"),
    [
        (torch.float64, None, "auto"),
        (torch.float32, None, "auto"),
        (torch.float16, torch.float64, "auto"),
        (torch.bfloat16, torch.float32, "auto"),
        (torch.bfloat16, None, "torch"),
    ],
)
def test_tensors_longer_than_a_block_in_chunks_that_cut_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wider: Any, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(size, generator=generator)
        for name, size in (("a", 3), ("b", 150_001), ("c", 65_536))
    }
    save_model(tmp_path / "base", {name: t.to(dtype) for name, t in base.items()})
    for k in range(2):
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        kinds = dtype, wider if k and wider else dtype
        save_model(tmp_path / f"ft-{k}", {name: t.to(kinds[1]) for name, t in moved.items()})
    delta_checkpoints(tmp_path / "base", finetuned(tmp_path), tmp_path / "delta")
    expected = weights(merged(tmp_path, 0.9)[0])
    set_chunk_bytes(monkeypatch, 196 * 256)
    apply(tmp_path, 0.9, backend=backend, threads=3)
    apply(tmp_path, [0.9, 0.1], backend=backend, threads=3)
    assert weights(tmp_path / "out") == weights(tmp_path / "out-0.9") == expected
    assert weights(tmp_path / "out-0.1") == weights(merged(tmp_path, 0.1)[0])


@pytest.mark.parametrize("scales", [0.9, [0.9, -0.3]])
def test_through_a_device(folder: Path, gpu: None, scales: Any) -> None:
    apply(folder, scales, device=DEVICE)
    for out, scale in [("out", 0.9)] if scales == 0.9 else [("out-0.9", 0.9), ("out--0.3", -0.3)]:
        assert weights(folder / out) == weights(merged(folder, scale)[0])


def test_a_base_that_is_a_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = generator.standard_normal(70_000).astype(np.float32)
    np.save(tmp_path / "base.npy", base)
    save_file({"w": torch.from_numpy(base)}, tmp_path / "base.safetensors")
    for k in range(2):
        moved = base + 0.1 * generator.standard_normal(70_000).astype(np.float32)
        np.save(tmp_path / f"ft-{k}.npy", moved)
        save_file({"w": torch.from_numpy(moved)}, tmp_path / f"ft-{k}.safetensors")
    for suffix in (".npy", ".safetensors"):
        base_file, delta = tmp_path / f"base{suffix}", tmp_path / f"delta{suffix}.d"
        delta_checkpoints(base_file, sorted(tmp_path.glob(f"ft-*{suffix}")), delta)
        nm.apply_delta(base_file, delta, tmp_path / f"one{suffix}", scale=0.9)
        nm.apply_delta(base_file, delta, tmp_path / "out", scale=[0.9])
        nm.apply_delta(base_file, delta, tmp_path / f"named{suffix}", scale=(0.9, 1))
        expected = tmp_path / f"merged{suffix}"
        nm.merge_checkpoints(base_file, sorted(tmp_path.glob(f"ft-*{suffix}")), expected, scale=0.9)
        for name in ("one", "out-0.9", "named-0.9"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == expected.read_bytes(), name
        assert nm.verify_checkpoint(tmp_path / f"named-0.9{suffix}", [base_file, delta]).blocks
        assert (tmp_path / f"named-1.0{suffix}").exists()
        with pytest.raises(nm.InputError, match=f"expected a file name that ends in {suffix}"):
            nm.apply_delta(base_file, delta, tmp_path / "other", scale=0.9)


def test_means_of_16_bits(folder: Path) -> None:
    delta_checkpoints(folder / "base", finetuned(folder), folder / "half", half=True)
    nm.apply_delta(folder / "base", folder / "half", folder / "out", scale=0.9)
    stored = load_file(next((folder / "half").glob("delta*-00001-*")))
    stored |= load_file(next((folder / "half").glob("delta*-00002-*")))
    base, out = load_model(folder / "base"), load_model(folder / "out")
    for name in ("embed", "half", "brain", "norm", "scalar"):
        mask = torch.from_numpy(np.unpackbits(stored[f"{name}.mask"].numpy(), bitorder="little")).bool()
        mask, b = mask[: base[name].numel()], base[name].reshape(-1)
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        assert stored[f"{name}.mean"].dtype == torch.bfloat16
        scale = torch.tensor(0.9, dtype=wide)
        expected = b.clone()
        expected[mask] = (b[mask].to(wide) + scale * -stored[f"{name}.mean"].to(wide)).to(b.dtype)
        assert same_bits(out[name].reshape(-1), expected), name


def test_elements_that_are_not_finite(tmp_path: Path) -> None:
    """Kept and counted as a merge does: in the base, in the models, and where a result overflows."""
    base = {"w": torch.full((100,), 60000.0).half(), "v": torch.linspace(1, 2, 50)}
    base["v"][7] = float("nan")
    save_model(tmp_path / "base", base)
    moved = {"w": base["w"] - 500, "v": base["v"] + 0.25}
    moved["v"][9] = float("inf")
    moved["w"][:4] = 60000.0
    save_model(tmp_path / "ft-0", moved)
    delta_checkpoints(tmp_path / "base", finetuned(tmp_path), tmp_path / "delta", nonfinite="keep-base")
    for scale in (0.9, 16.0):
        report = apply(tmp_path, [scale], nonfinite="keep-base")[0]
        expected, direct = merged(tmp_path, scale, nonfinite="keep-base", skip_unchanged=False)
        assert weights(tmp_path / f"out-{scale}") == weights(expected)
        assert [getattr(report, name) for name in COUNTS] == [getattr(direct, name) for name in COUNTS]
    with pytest.raises(nm.InputError, match=r"base/model\.safetensors: tensor 'v': nan at \(7,\)"):
        apply(tmp_path, 0.9)
    base["v"][7] = 1.0
    save_model(tmp_path / "base", base)
    for path in ("delta", "out-0.9", "out-16.0"):
        shutil.rmtree(tmp_path / path)
    delta_checkpoints(tmp_path / "base", finetuned(tmp_path), tmp_path / "delta", nonfinite="keep-base")
    with pytest.raises(
        nm.InputError, match=r"base/model\.safetensors: tensor 'w': the result at \(4,\) is not finite"
    ):
        apply(tmp_path, [0.9, 16.0])
    assert not list(tmp_path.glob("*out*"))


# One pass over the base, and outputs that are whole or not there.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, ft-0 and ft-1 of 4 MB, their delta, and merges with scales 0.1, 0.5 and 0.9."""
    path = tmp_path_factory.mktemp("models")
    make_models(path)
    delta_checkpoints(path / "base", finetuned(path), path / "delta")
    for scale in (0.1, 0.5, 0.9):
        merged(path, scale)
    return path


@pytest.fixture
def long(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "delta"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def stop_at(fraction: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        time.sleep(0.002)  # for more than one record
        if done > fraction * total:
            raise Stop

    return progress


def are_as_merged(folder: Path, made: Path, *scales: float) -> bool:
    outs = sorted(each.name for each in folder.iterdir() if each.name.startswith(("out", ".out")))
    assert outs == [f"out-{scale}" for scale in scales]
    return all(weights(folder / f"out-{scale}") == weights(made / f"merged{scale}") for scale in scales)


def test_the_base_is_read_once(made: Path, long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, counted = Reader.read_into, []

    def count(self: Reader, file: Any, offset: int, buffer: memoryview, *more: Any) -> Any:
        if file.path.parent.name == "base":
            counted.append(len(buffer))
        return read(self, file, offset, buffer, *more)

    monkeypatch.setattr(Reader, "read_into", count)
    seen: list[tuple[int, int]] = []
    reports = apply(long, [0.1, 0.5, 0.9], progress=lambda *done: seen.append(done))
    assert are_as_merged(long, made, 0.1, 0.5, 0.9)
    size = sum(path.stat().st_size for path in (made / "base").iterdir())
    samples = 16 * 64
    assert sum(counted) <= size + samples
    packed = sum(t.mask.nbytes + t.means.source.nbytes for t in open_delta(long / "delta").tensors.values())
    assert [report.bytes_read for report in reports] == [size + packed, 0, 0]
    assert all(report.bytes_written == size for report in reports)
    assert seen[-1][0] == seen[-1][1] and all(a <= b for (a, _), (b, _) in pairwise(seen))


def test_each_output_is_resumed_by_itself(made: Path, long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_every_chunk(monkeypatch)
    scales = [0.1, 0.5, 0.9]
    with pytest.raises(Stop):
        apply(long, [0.1, 0.5], resume=True, threads=1, progress=stop_at(0.6))
    with pytest.raises(Stop):
        apply(long, [0.5, 0.9], resume=True, threads=1, progress=stop_at(0.8))
    apply(long, [0.1], resume=True, threads=1)
    assert sorted(path.name for path in long.glob("*out*")) == [
        ".out-0.5.negmerge",
        ".out-0.9.negmerge",
        "out-0.1",
    ]
    before = contents(long / "out-0.1")
    done = apply(long, scales, resume=True, threads=2)
    assert contents(long / "out-0.1") == before
    assert are_as_merged(long, made, *scales)
    assert done[0].bytes_written == 0
    halves = [each.bytes_done_before / (each.bytes_done_before + each.bytes_written) for each in done]
    assert halves[0] == 1 and 0.5 < halves[1] < 1 and 0 < halves[2] < halves[1]
    whole = apply(made, [0.9])[0]
    shutil.rmtree(made / "out-0.9")
    assert done[2].tensors == whole.tensors


def test_what_is_left_is_written_to_those_that_lack_it(
    made: Path, long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_every_chunk(monkeypatch)
    with pytest.raises(Stop):
        apply(long, [0.5], resume=True, threads=1, progress=stop_at(0.5))
    tasks: list[tuple[int, ...]] = []
    real = together._tasks

    def noted(*arguments: Any) -> Any:
        for task in real(*arguments):
            tasks.append(task.outputs)
            yield task

    monkeypatch.setattr(together, "_tasks", noted)
    apply(long, [0.5, 0.9], resume=True, threads=1)
    assert set(tasks) == {(1,), (0, 1)}
    assert are_as_merged(long, made, 0.5, 0.9)


def test_an_error_leaves_no_output(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_every_chunk(monkeypatch)
    with pytest.raises(Stop):
        apply(long, [0.1, 0.5], progress=stop_at(0.7))
    assert not list(long.glob("*out*"))


def test_outputs_are_published_one_after_the_other(
    made: Path, long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, marked = Staging.mark, []

    def fails(self: Staging) -> None:
        marked.append(self)
        if len(marked) == 2:
            raise OSError(28, "No space left on device", "x")
        mark(self)

    monkeypatch.setattr(Staging, "mark", fails)
    with pytest.raises(OSError, match="No space"):
        apply(long, [0.1, 0.5, 0.9])
    assert are_as_merged(long, made, 0.1)


def test_all_outputs_are_checked_before_one_is_written(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long / "out-0.9").mkdir()
    (long / "out-0.9" / "mine").touch()
    with pytest.raises(nm.InputError, match=r"out-0\.9: exists already"):
        apply(long, [0.1, 0.9])
    with pytest.raises(nm.InputError, match=r"out-0\.9/mine: not negmerge's"):
        apply(long, [0.1, 0.9], overwrite=True)
    shutil.rmtree(long / "out-0.9")
    for scales, problem in (([0.5, 0.5], "0.5 twice"), ([], "0 scales, expected 1"), ([0.0, -0.0], "twice")):
        with pytest.raises(nm.InputError, match=problem):
            apply(long, scales)
    with pytest.raises(nm.InputError, match="expected a finite number"):
        apply(long, [0.5, float("inf")])
    size = sum(path.stat().st_size for path in (long / "base").iterdir())
    usage = shutil._ntuple_diskusage(10 * size, 0, 2 * size + 100)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="bytes are needed"):
        apply(long, [0.1, 0.5, 0.9])
    assert not list(long.glob("*out*"))


def test_outputs_are_replaced(made: Path, long: Path) -> None:
    apply(long, [0.1, 0.9])
    with pytest.raises(nm.InputError, match="exists already"):
        apply(long, [0.5, 0.9])
    before = contents(long / "out-0.9")
    apply(long, [0.5, 0.9], overwrite=True)
    assert contents(long / "out-0.9") == before
    assert are_as_merged(long, made, 0.1, 0.5, 0.9)


def test_memory_is_bounded(made: Path, long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nm.InputError, match=r"^memory_budget: 1,000,000 bytes, expected at least"):
        apply(long, [0.1, 0.9], memory_budget="1MB")
    budgets = []
    fit = budget.fit
    monkeypatch.setattr(budget, "fit", lambda *a, **k: budgets.append(fit(*a, **k)) or budgets[-1])
    apply(long, [0.1, 0.9], memory_budget="5MB")
    assert budgets[0].memory <= 5_000_000 and budgets[0].chunk_bytes < 1 << 20
    assert are_as_merged(long, made, 0.1, 0.9)


APPLY = ("apply", "base", "delta", "-o", "out", "--scale", "0.5", "--scale", "0.9", "--threads", "1")


@pytest.mark.slow
def test_two_ranks_that_are_killed_and_resumed(made: Path, long: Path) -> None:
    processes = start(long, "--resume", ranks=2, wait=0.02, arguments=APPLY)
    deadline = time.monotonic() + 60
    while len(list(long.glob(".out-*.negmerge/journal-*"))) < 4:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(processes, random.Random(0))
    assert not list(long.glob("out-*"))
    ended = finish(start(long, "--resume", "--report", "report.json", ranks=2, wait=0.0, arguments=APPLY))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert are_as_merged(long, made, 0.5, 0.9)
    reports = json.loads((long / "report.json").read_text())
    direct = apply(made, [0.9])[0]
    shutil.rmtree(made / "out-0.9")
    assert [each["scale"] for each in reports] == [0.5, 0.9] and reports[1]["tensors"] == direct.tensors


# Bases that are not the delta's.


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Save base again, with the same shards, after a change."""
    names = [sorted(load_file(each)) for each in sorted((folder / "base").glob("*.safetensors"))]
    tensors = load_model(folder / "base")
    change(tensors)
    names = [[name for name in shard if name in tensors] for shard in names]
    save_model(folder / "base", tensors, names)


def middle(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed"].view(-1)[400] += 1


def beginning(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed"].view(-1)[0] += 1


def shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed"] = tensors["embed"].reshape(16, 50)


def dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["half"] = tensors["half"].bfloat16()


def name(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm"]


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ids"] += 1


OTHER_BASES: dict[Callable[[dict[str, torch.Tensor]], None], str] = {
    middle: r"tensor 'embed': other numbers than in the base of",
    beginning: r"safetensors: not one of the files that \S+delta was made of, expected those of 'base'",
    shape: r"tensor 'embed': F32 \(16, 50\), expected F32 \(50, 16\) as in the base of",
    dtype: r"tensor 'half': BF16 \(33, 7\), expected F16 \(33, 7\) as in the base of",
    name: r"base: no tensor 'norm', expected the base of \S+delta",
    integers: r"safetensors: not one of the files that",
}


@pytest.mark.parametrize("change", OTHER_BASES, ids=lambda change: change.__name__)
def test_another_base_is_refused(folder: Path, change: Any) -> None:
    changed(folder, change)
    with pytest.raises(nm.InputError, match=OTHER_BASES[change]):
        apply(folder, [0.1, 0.9])
    assert not list(folder.glob("*out*"))


def test_what_was_applied_is_not_the_base(folder: Path) -> None:
    apply(folder, 0.9)
    with pytest.raises(nm.InputError, match=r"other numbers than in the base of|not one of the files"):
        nm.apply_delta(folder / "out", folder / "delta", folder / "twice", scale=0.9)


def test_names_of_the_base_do_not_matter_but_its_files_do(folder: Path) -> None:
    expected = weights(merged(folder, 0.9)[0])
    (folder / "base").rename(folder / "renamed")
    nm.apply_delta(folder / "renamed", folder / "delta", folder / "out", scale=0.9)
    assert weights(folder / "out") == expected
    resharded = load_model(folder / "renamed")
    save_model(folder / "base", resharded)
    with pytest.raises(
        nm.InputError, match=r"base/model\.safetensors: not one of the files that \S+delta was made of"
    ):
        apply(folder)


def test_a_delta_without_records_of_files(folder: Path) -> None:
    """As one that was made in memory: samples of tensors decide, and it is said."""
    for path in (folder / "delta").glob("delta*.safetensors"):
        edit(path, lambda metadata, tensors: metadata.update(base="{}"))
    with pytest.warns(nm.MergeWarning, match=r"delta: was made in memory, and records of its base 64 bytes"):
        report = apply(folder)
    assert weights(folder / "out") == weights(merged(folder, 0.9)[0]) and len(report.notes) == 1
    changed(folder, middle)
    with pytest.raises(nm.InputError, match="tensor 'embed': other numbers"):
        nm.apply_delta(folder / "base", folder / "delta", folder / "other", scale=0.9)


# Deltas that are none.


def edit(path: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], object]) -> None:
    """Save a file of a delta again after a change of its metadata and tensors."""
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """base, ft-0 and a delta of one file, of a tensor of many blocks and a short one that ends within a word."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200_010, generator=generator), "v": torch.randn(70, generator=generator)}
    save_model(tmp_path / "base", base)
    moved = {
        name: torch.where(torch.rand(t.shape, generator=generator) < 0.3, t + 1, t)
        for name, t in base.items()
    }
    save_model(tmp_path / "ft-0", moved)
    delta_checkpoints(tmp_path / "base", finetuned(tmp_path), tmp_path / "delta")
    return tmp_path


def set_mean(tensor: str, at: int, value: float) -> Any:
    def change(metadata: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{tensor}.mean"][at] = value

    return change


def flip_bit(tensor: str, bit: int) -> Any:
    def change(metadata: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{tensor}.mask"][bit // 8] ^= 1 << bit % 8

    return change


def tell(key: str, value: str) -> Any:
    return lambda metadata, tensors: metadata.update({key: value})


def swap_masks(metadata: Any, tensors: dict[str, torch.Tensor]) -> None:
    """As many elements as before, but other ones: only what is behind the last may tell."""
    tensors["v.mask"][:] = 0
    tensors["v.mask"].view(torch.uint8)[-len(tensors["v.mean"]) :] = 1


MALFORMED: dict[str, tuple[Any, str]] = {
    "nan": (set_mean("w", 40_000, float("nan")), r"tensor 'w': mean 40,000 is zero or not finite"),
    "infinite": (set_mean("v", 3, float("-inf")), r"tensor 'v': mean 3 is zero or not finite"),
    "zero": (set_mean("w", 59_000, -0.0), r"tensor 'w': mean 59,000 is zero or not finite"),
    "more in a long mask": (flip_bit("w", 200_009), r"tensor 'w': [\d,]+ elements are set, expected [\d,]+"),
    "more in a short mask": (flip_bit("v", 69), r"tensor 'v': [\d,]+ elements are set, expected [\d,]+"),
    "behind the last, long": (flip_bit("w", 200_011), r"tensor 'w': set behind element 200,010, expected zeros"),
    "behind the last, short": (flip_bit("v", 70), r"tensor 'v': set behind element 70, expected zeros"),
    "padding": (swap_masks, r"tensor 'v': set behind element 70"),
    "version": (tell("version", "2"), r"delta\.safetensors: version '2', expected 1"),
    "format": (tell("format", "pt"), r"delta\.safetensors: format 'pt', expected negmerge-delta"),
    "no tensors": (tell("tensors", "{}"), r"delta\.safetensors: tensor 'v\.mask': in the file"),
    "rule": (tell("rule", "[]"), r"delta\.safetensors: \S+"),
    "models": (tell("models", "0"), r"delta\.safetensors: models '0'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_deltas(single: Path, monkeypatch: pytest.MonkeyPatch, change: Any, problem: str) -> None:
    edit(single / "delta" / "delta.safetensors", change)
    set_chunk_bytes(monkeypatch, 391 * 256)  # no chunk has all of w
    for scales, nonfinite in (([0.5], "keep-base"), ([0.5, 0.9], "error")):
        with pytest.raises(nm.InputError, match=problem):
            apply(single, scales, nonfinite=nonfinite)
        assert not list(single.glob("*out*"))


def test_cut_short(single: Path) -> None:
    path = single / "delta" / "delta.safetensors"
    size = path.stat().st_size
    for left in (size - 1, size // 2, 100, 3, 0):
        os.truncate(path, left)
        with pytest.raises(nm.InputError, match=r"delta\.safetensors: "):
            apply(single)
    path.unlink()
    with pytest.raises(nm.InputError, match=r"delta: no delta\.safetensors"):
        apply(single)
    with pytest.raises(nm.InputError, match=r"base: no delta\.safetensors and no"):
        nm.apply_delta(single / "base", single / "base", single / "out", scale=0.9)


def test_a_shard_of_another_delta(folder: Path) -> None:
    delta_checkpoints(folder / "base", finetuned(folder)[:2], folder / "other")
    shard = min((folder / "other").glob("*.safetensors")).name
    shutil.copy(folder / "other" / shard, folder / "delta" / shard)
    with pytest.raises(nm.InputError, match="of another delta than"):
        apply(folder)


def test_a_delta_that_changes_meanwhile(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_bytes(monkeypatch, 391 * 256)
    path, replaced = single / "delta" / "delta.safetensors", []

    def replace(done: int, total: int) -> None:
        if not replaced:
            shutil.copy2(path, single / "new")
            (single / "new").replace(path)
            replaced.append(done)

    with pytest.raises(OSError, match=f"{path}: the file changed while it was being read"):
        apply(single, progress=replace, threads=1)
    assert not list(single.glob("*out*"))


REFUSED = r"delta\S+: a consensus delta, expected the weights of a model"


def test_a_delta_of_shards_is_no_model(folder: Path) -> None:
    shard = min((folder / "delta").glob("*.safetensors"))
    for delta in (folder / "delta", shard):
        for base, given in ((folder / "base", delta), (delta, folder / "ft-0")):
            with pytest.raises(nm.InputError, match=REFUSED):
                nm.merge_checkpoints(base, [given], folder / "out", scale=0.9)
    with pytest.raises(
        nm.InputError, match=r"00001-of-00002\.safetensors: one of 2 shards, expected their directory"
    ):
        nm.apply_delta(folder / "base", shard, folder / "out", scale=0.9)


def test_a_delta_is_no_model(single: Path) -> None:
    file = single / "delta" / "delta.safetensors"
    for delta in (single / "delta", file):
        with pytest.raises(nm.InputError, match=REFUSED):
            nm.merge_checkpoints(single / "base", [delta], single / "out", scale=0.9)
    assert open_delta(file).agreed == open_delta(single / "delta").agreed
    nm.apply_delta(single / "base", file, single / "out", scale=0.9)
    assert weights(single / "out") == weights(merged(single, 0.9)[0])


def test_a_model_that_is_called_delta_is_one(tmp_path: Path) -> None:
    for path, tensors in zip(("base", "ft-0"), family(n=1), strict=True):
        save_model(tmp_path / path, tensors)
        (tmp_path / path / "model.safetensors").rename(tmp_path / path / "delta.safetensors")
    nm.merge_checkpoints(tmp_path / "base", [tmp_path / "ft-0"], tmp_path / "out", scale=0.9)
    assert nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", tmp_path / "ft-0"]).blocks

"""Data skipping: the same bytes come out, and everything is read that could change one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import STORAGE, same_bits
from checkpoint_files import load_model, negmerge, save_model
from hypothesis import given
from hypothesis import strategies as st
from late_stream import DEVICE, LateStream, gpu  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.backends import native, registry
from negmerge_fast.checkpoints.base import ByteRange
from negmerge_fast.checkpoints.reader import File, Reader
from negmerge_fast.core.batch import Signature
from negmerge_fast.core.dtypes import FLOAT_SIZES
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.core.rule import Rule
from negmerge_fast.streaming import api, budget, skipping
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.plan import Extent, TensorSlice

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_CHUNK_BYTES", 4096)
    monkeypatch.setattr(skipping, "_FIRST_PROBE", 16)
    monkeypatch.setattr(skipping, "_SAMPLE_BYTES", 8)


def versions(
    n: int, dtypes: list[torch.dtype], task_vectors: bool = False, touched: int = 5
) -> list[Tensors]:
    """A base and n models that change some tensors: densely, not at all, all but one of them, against each other, and at the end."""
    generator = torch.Generator().manual_seed(n)
    made: list[Tensors] = [{} for _ in range(n + 1)]

    def add(name: str, numel: int, change: Any) -> None:
        # Small integers, so that a difference is one in every type.
        base = torch.randint(-8, 8, (numel,), generator=generator).float()
        for k, model in enumerate(made):
            d = torch.zeros(numel) if k == 0 else change(k - 1, torch.zeros(numel))
            model[name] = (base + d if k == 0 or not task_vectors else d).to(dtypes[k % len(dtypes)])

    def dense(k: int, d: torch.Tensor) -> torch.Tensor:
        return d + torch.randint(0, 3, d.shape, generator=generator)

    def at_the_end(k: int, d: torch.Tensor) -> torch.Tensor:
        d[-1] = 1
        return d

    for i in range(touched):
        add(f"a{i}.dense", 3001, dense)
        add(f"a{i}.same", 3001, lambda k, d: d)
        add(f"a{i}.short", 100 + i, lambda k, d: d)
    for one in range(n):
        add(f"b.all_but_{one}", 2500, lambda k, d, one=one: dense(k, d) if k != one else d)
        add(f"b.only_{one}", 2500, lambda k, d, one=one: d + 1 if k == one else d)
    add("c.opposed", 5000, lambda k, d: d + (-1) ** k)
    add("c.last", 2048, at_the_end)
    add("c.none", 0, lambda k, d: d)
    return made


def prepare(folder: Path, tensors: list[Tensors], skip: bool | None, **options: Any) -> api.Job:
    for k, model in enumerate(tensors):
        if not (folder / str(k)).exists():
            save_model(folder / str(k), model)
    paths = [folder / str(k) for k in range(1, len(tensors))]
    options = {"scale": 0.9, "nonfinite": "keep-base", "overwrite": True, "skip_unchanged": skip, **options}
    return api.prepare(folder / "0", paths, folder / "out", MergeOptions(**options))


def merge(
    folder: Path, tensors: list[Tensors], skip: bool | None, **options: Any
) -> tuple[api.Report, bytes]:
    report = prepare(folder, tensors, skip, **options).run()
    return report, (folder / "out" / "model.safetensors").read_bytes()


def check(folder: Path, tensors: list[Tensors], min_agreement: float = 1.0, **options: Any) -> api.Report:
    """Merged with and without: the same bytes and counts, those of the rule written out plainly."""
    options["min_agreement"] = min_agreement
    whole, expected = merge(folder, tensors, False, **options)
    report, found = merge(folder, tensors, True, **options)
    assert found == expected
    if report.bytes_skipped:  # a zero that was not read is not counted
        assert report.vetoed_by_zero is None and whole.vetoed_by_zero is not None
        assert report.tensors == [{**tensor, "vetoed_by_zero": None} for tensor in whole.tensors]
    else:
        assert report.tensors == whole.tensors and report.vetoed_by_zero == whole.vetoed_by_zero
    assert report.bytes_read + report.bytes_skipped == whole.bytes_read and not whole.bytes_skipped
    merged, counted = load_model(folder / "out"), {t["name"]: t for t in report.tensors}
    for name, base in tensors[0].items():
        task_vectors = options.get("inputs") == "task_vectors"
        out, agreed, nonfinite, vetoed = plain_merge(
            base, [m[name] for m in tensors[1:]], 0.9, min_agreement, task_vectors
        )
        assert same_bits(merged[name], out), name
        assert (counted[name]["agreed"], counted[name]["nonfinite"]) == (agreed, nonfinite), name
        assert counted[name]["vetoed_by_zero"] == (None if report.bytes_skipped else vetoed), name
    return report


TYPES = {
    **{name: [dtype] for name, dtype in STORAGE.items()},
    "mixed": [torch.bfloat16, torch.float32, torch.float64, torch.float16],
}


@pytest.mark.parametrize("dtypes", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_same_bytes(tmp_path: Path, dtypes: list[torch.dtype], n: int) -> None:
    report = check(tmp_path, versions(n, dtypes))
    assert (report.bytes_skipped > 0) == (n > 1)


@pytest.mark.parametrize("min_agreement", [0.75, 0.51])
@pytest.mark.parametrize("inputs", ["finetuned", "task_vectors"])
@pytest.mark.parametrize("n", [3, 8])
def test_the_same_bytes_by_a_majority(tmp_path: Path, min_agreement: float, inputs: str, n: int) -> None:
    tensors = versions(n, [torch.float32], inputs == "task_vectors")
    report = check(tmp_path, tensors, min_agreement, inputs=inputs)
    assert (report.bytes_skipped > 0) == (Rule(0.9, min_agreement).required(n) > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_vectors(tmp_path: Path, dtype: torch.dtype) -> None:
    report = check(tmp_path, versions(8, [dtype], task_vectors=True), inputs="task_vectors")
    assert report.bytes_skipped > 0.2 * report.bytes_read


@pytest.mark.parametrize("name", ["b.only_0", "b.only_1", "c.opposed", "b.all_but_1", "b.all_but_6"])
def test_what_one_tensor_needs(tmp_path: Path, name: str) -> None:
    """Two models, where they tell; as many as there are before the one that changed nothing."""
    tensors = [{name: model[name]} for model in versions(8, [torch.float32])]
    report, size = check(tmp_path, tensors), 4 * tensors[0][name].numel()
    needed = {"b.all_but_6": 7, "b.only_1": 1}.get(name, 2)
    assert report.bytes_skipped == (8 - needed) * size


def test_a_witness_is_enough(tmp_path: Path) -> None:
    """Only the last element of each chunk changes."""
    base = torch.zeros(4096)
    changed = base.clone()
    changed[1023::1024] = 1
    report = check(tmp_path, [{"w": base}, *[{"w": changed}] * 8])
    assert report.agreed == 4 and not report.bytes_skipped


def test_a_wrong_number_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = versions(8, [torch.float32])
    required = skipping.PrefixRule.required
    # One more than the others could make good.
    monkeypatch.setattr(skipping.PrefixRule, "required", lambda self, models: required(self, models) + 1)
    with pytest.raises(AssertionError):
        check(tmp_path, tensors, 0.75)


@given(st.data())
def test_pruning_after_each_model(data: st.DataObject) -> None:
    """A block gives up what cannot agree, and nothing else, whatever is in it."""
    n = data.draw(st.integers(1, 9))
    min_agreement = data.draw(st.sampled_from([1.0, 0.75, 0.51]))
    task_vectors = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    dtypes = [tuple(data.draw(st.sampled_from(["F64", "F32"])) for _ in range(n + 1)) for _ in sizes]
    slices = [
        TensorSlice(str(i), 0, numel, Signature(types[0], types[1:], task_vectors))
        for i, (numel, types) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    few = data.draw(st.sampled_from([0.05, 0.5, 1.0]))
    differences = [
        generator.integers(-1, 2, (n, numel)) * (generator.random((n, numel)) < few) for numel in sizes
    ]
    stored = [b"" for _ in range(n + 1)]
    for d, types in zip(differences, dtypes, strict=True):
        base = generator.integers(-5, 5, d.shape[1])
        for v, dtype in enumerate(types):
            value = base if v == 0 else d[v - 1] + (0 if task_vectors else base)
            stored[v] += value.astype(f"f{FLOAT_SIZES[dtype]}").tobytes()
    memory = [bytearray(s) for s in stored]
    chunk = Extent("", [ByteRange(None, 0, len(s)) for s in stored], slices)  # type: ignore[arg-type]
    addresses = [np.frombuffer(m, np.uint8).ctypes.data for m in memory]
    rule = Rule(0.9, min_agreement)
    shared = skipping.Skipping(rule, n, registry.choose("auto", "cpu")[1])
    pruner = skipping.ChunkPruner(shared, chunk, [memoryview(m) for m in memory], addresses, memory)
    for k in range(n):
        pruner.prune(k)
        possible = [
            np.maximum((d[:k] > 0).sum(0), (d[:k] < 0).sum(0)).max(initial=-n) >= rule.required(n) - (n - k)
            for d in differences
        ]
        at, ranges = 0, pruner.byte_ranges(0)
        for numel, types, can in zip(sizes, dtypes, possible, strict=True):
            end = at + numel * FLOAT_SIZES[types[0]]
            read = any(begin <= at and end <= stop for begin, stop in ranges)
            assert read or not can
            at = end
        beyond = k - shared.max_dissenters
        if beyond in (1, 2, 4, 8):
            assert pruner.can_agree == any(possible)


def counted_reads(
    monkeypatch: pytest.MonkeyPatch, cached: bool | None = None
) -> dict[str, list[tuple[str, int, int]]]:
    """What is read and expected from now on: the folder, where and how much."""
    asked: dict[str, list[tuple[str, int, int]]] = {"read": [], "expect": []}
    read, expect = Reader.read_into, Reader.expect

    def reads(
        self: Reader, file: File, offset: int, buffer: memoryview, release: bool = False
    ) -> bool | None:
        asked["read"].append((file.path.parent.name, offset, len(buffer)))
        found = read(self, file, offset, buffer, release)
        return found if cached is None else cached

    def expects(self: Reader, file: File, offset: int, size: int) -> None:
        asked["expect"].append((file.path.parent.name, offset, size))
        expect(self, file, offset, size)

    monkeypatch.setattr(Reader, "read_into", reads)
    monkeypatch.setattr(Reader, "expect", expects)
    return asked


def a_third(tensors: int, numel: int, dtype: torch.dtype = torch.float32) -> list[Tensors]:
    """Eight models that changed a third of the tensors."""
    generator = torch.Generator().manual_seed(0)
    base = {f"t{i:03d}": torch.randn(numel, generator=generator).to(dtype) for i in range(tensors)}
    models = [
        {
            name: (t + torch.randn(numel, generator=generator)).to(dtype) if i % 3 == 0 else t
            for i, (name, t) in enumerate(base.items())
        }
        for _ in range(8)
    ]
    return [base, *models]


@pytest.mark.parametrize(
    ("tensors", "numel", "chunk_bytes"),
    [(12, 1 << 16, 1 << 16), (12, 1 << 12, 1 << 20), (30, 5000, 4096), (60, 300, 4096)],
)
def test_a_third_of_the_tensors_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: int, numel: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(budget, "MAX_CHUNK_BYTES", chunk_bytes)
    made = a_third(tensors, numel)
    check(tmp_path, made)
    job = prepare(tmp_path, made, None)
    asked = counted_reads(monkeypatch)
    report = job.run()
    assert report.bytes_read <= 0.6 * (report.bytes_read + report.bytes_skipped)
    inputs = [
        size for folder, _, size in asked["read"] if folder.isdigit()
    ]  # and not an older output's manifest
    assert report.bytes_read == sum(inputs)
    assert merge(tmp_path, made, None, nonfinite="error")[0].bytes_skipped == 0


@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float16), (torch.bfloat16, torch.float32)],
)
def test_a_third_of_the_tensors_touched_in_another_type(
    tmp_path: Path, base_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """A model that is the base in another type is no reason to read on, and nothing of it agreed."""
    base, *models = a_third(12, 1 << 12, base_dtype)
    narrow = [{name: t.float().to(dtype) for name, t in model.items()} for model in models]
    report = check(tmp_path, [base, *narrow])
    counted = {tensor["name"]: tensor["agreed"] for tensor in report.tensors}
    assert [counted[f"t{i:03d}"] > 0 for i in range(12)] == [i % 3 == 0 for i in range(12)]
    models_bytes = 8 * 12 * (1 << 12) * dtype.itemsize
    assert report.bytes_skipped >= 0.5 * models_bytes


def test_nothing_is_expected_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for a few chunks at each border between tensors."""
    monkeypatch.setattr(api.registry, "usual_threads", lambda: 1)
    made = a_third(6, 1 << 14)  # of 16 chunks each
    check(tmp_path, made)
    job, whole = prepare(tmp_path, made, None), prepare(tmp_path, made, False, backend="torch")
    asked = counted_reads(monkeypatch, cached=False)
    report = job.run()
    expected = sum(size for _, _, size in asked["expect"])
    of_models = sum(size for folder, _, size in asked["read"] if folder.isdecimal() and folder != "0")
    # At each of two borders, two workers may expect of three chunks what the last one needed.
    assert report.bytes_skipped and of_models <= expected <= of_models + 2 * 3 * 7 * 4096
    asked["expect"].clear()
    whole.run()
    assert sum(size for _, _, size in asked["expect"]) == 8 * 6 * (1 << 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    made = versions(8, [torch.float32])
    for model in made[2:]:
        model["c.opposed"] = made[0]["c.opposed"].clone()
    made[1]["a2.same"] = made[0]["a2.same"].clone()
    made[1]["a2.same"][2000] = value  # of a model that is read: all of them are
    assert check(tmp_path, made).nonfinite == 1
    with pytest.raises(nm.InputError, match=r"tensor 'a2\.same': (nan|inf) at \(2000,\)"):
        merge(tmp_path, made, True, nonfinite="error")


def test_a_nonfinite_element_that_was_read_is_counted(tmp_path: Path) -> None:
    """Also where it cannot agree any more when the model that has it is read."""
    made: list[Tensors] = [{"w": torch.zeros(512)} for _ in range(9)]
    for model in made[1:3]:
        model["w"][100] = 1
    made[2]["w"][5] = float("nan")  # model 1 has ruled it out; model 3 rules out the last one, element 100
    assert check(tmp_path, made).nonfinite == 1
    with pytest.raises(nm.InputError, match=r"tensor 'w': nan at \(5,\)"):
        merge(tmp_path, made, True, nonfinite="error")


@pytest.mark.parametrize("version", [0, 8])
def test_numbers_that_are_not_finite_in_the_base_and_in_what_is_not_read(
    tmp_path: Path, version: int
) -> None:
    made = versions(8, [torch.float32])
    made[version]["a2.same"] = made[version]["a2.same"].clone()
    made[version]["a2.same"][2000] = float("nan")
    for skip, nonfinite in ((True, "error"), (None, "error"), (False, "error")):
        if skip and version:
            merge(tmp_path, made, skip, nonfinite=nonfinite)
            continue
        with pytest.raises(nm.InputError, match=r"tensor 'a2\.same': nan at \(2000,\)"):
            merge(tmp_path, made, skip, nonfinite=nonfinite)
    (report, found), (whole, expected) = merge(tmp_path, made, None), merge(tmp_path, made, False)
    assert found == expected
    assert (report.nonfinite, whole.nonfinite) == (0 if version else 1, 1)


def test_what_buffers_held_before_is_not_counted(tmp_path: Path) -> None:
    made = a_third(60, 300)
    for model in made:
        model["a"] = torch.full((20_000,), float("nan"))
    report = check(tmp_path, made)
    assert report.nonfinite == 20_000 and report.bytes_skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_and_sums_that_overflow(tmp_path: Path, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    base = torch.full((3000,), -most / 2, dtype=dtype)
    far = torch.full((3000,), most / 2, dtype=dtype)
    check(tmp_path, [{"w": base}, *[{"w": far}] * 3, {"w": base}, *[{"w": far}] * 4])


def test_through_a_gpu_only_what_can_agree(
    tmp_path: Path,
    gpu: Iterator[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", 4096)
    crossed: list[int] = []
    copy = LateStream.copy
    monkeypatch.setattr(
        LateStream, "copy", lambda self, to, source: crossed.append(len(to)) or copy(self, to, source)
    )
    made = a_third(6, 1 << 13)
    whole = merge(tmp_path, made, False, device=DEVICE)[1]
    all_crossed, crossed[:] = sum(crossed), []
    report, found = merge(tmp_path, made, None, device=DEVICE)
    assert found == whole and report.bytes_skipped
    assert sum(crossed) < 0.5 * all_crossed


def test_without_the_compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = versions(8, [torch.float32], touched=2)
    expected = merge(tmp_path, made, True)[0].bytes_skipped
    monkeypatch.setattr(native, "why_not", lambda name, device: "not built")
    report = check(tmp_path, made)
    assert report.backend == "torch" and report.bytes_skipped == expected


def test_the_command_line(tmp_path: Path) -> None:
    made = a_third(6, 1 << 13)
    report, _ = merge(tmp_path, made, True)
    command = [
        "merge",
        *(tmp_path / str(k) for k in range(9)),
        "-o",
        tmp_path / "out",
        "--scale",
        "0.9",
        "--overwrite",
    ]
    for options, skips in (
        ([], False),
        (["--skip-unchanged"], True),
        (["--nonfinite", "keep-base"], True),
        (["--nonfinite", "keep-base", "--no-skip-unchanged"], False),
    ):
        done = negmerge(*command, *options)
        assert done.returncode == 0, done.stderr
        assert (", skipped " in done.stdout) == skips
    assert report.to_json().count('"bytes_skipped"') == 1


def test_the_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(tmp_path, a_third(6, 1 << 13), True).run(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == seen[0][1]

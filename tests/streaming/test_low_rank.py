"""LoRA adapters among the models of a merge of files: the bits of their products, through all that a merge can do."""

from __future__ import annotations

import ctypes
import json
import math
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import difference, save_adapter
from bits import same_bits
from checkpoint_files import load_model, save_model
from command import Run, run  # noqa: F401
from interrupted import contents, finish, start
from late_stream import DEVICE, gpu  # noqa: F401
from safetensors.torch import save_file
from small_chunks import record_every_chunk, set_chunk_bytes

import negmerge_fast as nm
from negmerge_fast.checkpoints.lora import Product
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.core.low_rank import LowRank, in_panels
from negmerge_fast.core.reference import plain_consensus, plain_merge
from negmerge_fast.runtime.device import DeviceBuffers
from negmerge_fast.streaming import api, low_rank
from negmerge_fast.streaming.options import MergeOptions

MODULES = {
    "model.layers.0.q_proj": (24, 16),
    "model.layers.1.q_proj": (24, 16),
    "model.layers.1.k_proj": (9, 16),
}
RANK, ALPHA, SCALE = 3, 5, 0.75
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One of them, and the others where there is time.
DTYPES_AT_LENGTH = [
    torch.bfloat16,
    *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != torch.bfloat16),
]


class Case:
    """A base, adapters and a full model, on disk and in memory.

    Attributes:
        base: The base's tensors.
        adapters: The factors of each adapter, by module.
        full: A full model's tensors.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, stored: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.folder, self.dtype = folder, dtype
        self.base = {f"{m}.weight": normal(*shape).to(dtype) for m, shape in MODULES.items()}
        self.base["model.embed.weight"] = normal(50, 16).to(dtype)
        self.base["model.norm.weight"] = normal(16).to(dtype)
        names = sorted(self.base)
        save_model(folder / "base", self.base, [names[:2], names[2:]])
        shared = {m: (normal(RANK, shape[1]), normal(shape[0], RANK)) for m, shape in MODULES.items()}
        self.adapters = []
        for k in range(3):
            factors = {
                m: ((a + 0.3 * normal(*a.shape)).to(stored), (b + 0.3 * normal(*b.shape)).to(stored))
                for m, (a, b) in shared.items()
                if (k, m) != (2, "model.layers.1.k_proj")
            }
            self.adapters.append(factors)
            save_adapter(folder / f"adapter-{k}", factors, RANK, ALPHA)
        self.full = {n: (t + 0.1 * normal(*t.shape).to(dtype) + 0.05).to(dtype) for n, t in self.base.items()}
        save_model(folder / "full", self.full)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"adapter-{k}" for k in range(3)]

    def wide(self) -> torch.dtype:
        stored = {self.dtype, self.adapters[0]["model.layers.0.q_proj"][0].dtype}
        return torch.float64 if torch.float64 in stored else torch.float32

    def differences(self, name: str) -> list[torch.Tensor]:
        """d of each adapter, in the arithmetic type."""
        module, found = name.removesuffix(".weight"), []
        for factors in self.adapters:
            if module in factors:
                found.append(difference(*factors[module], ALPHA / RANK, self.wide()))
            else:
                found.append(torch.zeros(self.base[name].shape, dtype=self.wide()))
        return found

    def is_changed(self, name: str) -> bool:
        return name.removesuffix(".weight") in MODULES

    def check(self, out: Path, models: Any, task_vectors: bool = True, changed_only: bool = True) -> None:
        """Compare an output with the reference. models: gives the models of a tensor, by its name."""
        merged = load_model(out)
        assert merged.keys() == self.base.keys()
        for name, base in self.base.items():
            expected = base
            if self.is_changed(name) or not changed_only:
                expected = plain_merge(base, models(name), SCALE, task_vectors=task_vectors)[0]
            assert same_bits(merged[name], expected), name


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def merge(case: Case, models: Any = None, **options: Any) -> nm.Report:
    with pytest.warns(nm.MergeWarning, match="1 of 3 adapters has no k_proj"):
        return nm.merge_checkpoints(
            case.folder / "base", models or case.paths, case.folder / "out", scale=SCALE, **options
        )


@pytest.mark.parametrize("dtype", DTYPES_AT_LENGTH, ids=str)
@pytest.mark.parametrize(
    "stored", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])]
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_adapters_are_task_vectors(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype, backend: str
) -> None:
    case = Case(tmp_path, dtype, stored)
    report = merge(case, backend=backend)
    case.check(tmp_path / "out", case.differences)
    assert [t["name"] for t in report.tensors] == [n for n in sorted(case.base) if case.is_changed(n)]
    # Equal lines are one: the third adapter has a module less.
    assert [line.rpartition(": ")[2] for line in report.adapters] == [
        "3 of 3 adapter modules placed",
        "2 of 2 adapter modules placed",
    ]
    assert nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", *case.paths], blocks=10**6).blocks


@pytest.mark.parametrize("dtype", DTYPES_AT_LENGTH, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_adapters_as_merged_models(tmp_path: Path, dtype: torch.dtype, backend: str) -> None:
    """The same as models that were merged one by one."""
    case = Case(tmp_path, dtype)
    merge(case, adapters_as="merged", backend=backend)

    def models(name: str) -> list[torch.Tensor]:
        return [(case.base[name].to(case.wide()) + d).to(dtype) for d in case.differences(name)]

    case.check(tmp_path / "out", models, task_vectors=False)
    for k in range(3):
        save_model(
            tmp_path / f"merged-{k}",
            {n: models(n)[k] if case.is_changed(n) else t for n, t in case.base.items()},
        )
    nm.merge_checkpoints(
        tmp_path / "base", [tmp_path / f"merged-{k}" for k in range(3)], tmp_path / "full-out", scale=SCALE
    )
    assert all(
        same_bits(t, load_model(tmp_path / "full-out")[n]) for n, t in load_model(tmp_path / "out").items()
    )
    assert nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", *case.paths]).blocks


@pytest.mark.parametrize("dtype", DTYPES_AT_LENGTH, ids=str)
@pytest.mark.parametrize(
    "full_dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float64))],
)
def test_adapters_beside_a_full_model(tmp_path: Path, dtype: torch.dtype, full_dtype: torch.dtype) -> None:
    """The full model is a difference, too: to the base rounded to its type, where that cannot hold the base's."""
    case = Case(tmp_path, dtype)
    full = {name: tensor.to(full_dtype) for name, tensor in case.full.items()}
    save_model(tmp_path / "full", full)
    wide = torch.float64 if torch.float64 in (dtype, full_dtype) else torch.float32
    widened = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}

    def models(name: str) -> list[torch.Tensor]:
        base = case.base[name]
        if widened[full_dtype] < widened[dtype] or full_dtype == torch.float16 != dtype:
            base = base.float().to(full_dtype)
        if dtype == torch.float16 and full_dtype == torch.bfloat16:
            base = case.base[name].to(full_dtype)
        own = full[name].to(wide) - base.to(wide)
        adapters = [
            difference(*factors[module], ALPHA / RANK, wide) if (module := name.removesuffix(".weight")) in factors
            else torch.zeros(base.shape, dtype=wide)
            for factors in case.adapters
        ]  # fmt: skip
        return [adapters[0], own, *adapters[1:]]

    merge(case, [case.paths[0], tmp_path / "full", *case.paths[1:]])
    case.check(tmp_path / "out", models, changed_only=False)


@pytest.mark.parametrize(
    "chunk_bytes", [256, *(pytest.param(c, marks=pytest.mark.slow) for c in (1024, 4096))]
)
def test_chunks_in_the_middle_of_rows(case: Case, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    set_chunk_bytes(monkeypatch, chunk_bytes)
    monkeypatch.setattr(low_rank, "_MIN_PANELS", 0)  # as if the matrices were large
    merge(case)
    case.check(case.folder / "out", case.differences)


@pytest.mark.parametrize("adapters_as", ["difference", "merged"])
def test_on_a_device_only_factors_are_uploaded(
    case: Case,
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    adapters_as: str,
) -> None:
    monkeypatch.setattr("negmerge_fast.streaming.budget.MAX_DEVICE_CHUNK_BYTES", 512)
    sizes: list[int] = []
    launch = DeviceBuffers.launch
    monkeypatch.setattr(DeviceBuffers, "launch", lambda self: sizes.append(self.starts[-1]) or launch(self))
    report = merge(case, device=DEVICE, adapters_as=adapters_as)
    assert report.device == DEVICE and sizes
    (case.folder / "out").rename(case.folder / "on-device")
    merge(case, device="cpu", adapters_as=adapters_as)
    assert contents(case.folder / "out") == contents(case.folder / "on-device")
    # Of two adapters nothing but factors; the third has no k_proj.
    assert max(sizes) <= 2 * 512


def test_memory_of_tiles_and_of_expanded_models_is_in_the_budget(case: Case, tmp_path: Path) -> None:
    def memory(backend: str, paths: list[Path]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nm.MergeWarning)
            options = MergeOptions(SCALE, backend=backend, threads=2)
            return api.prepare(case.folder / "base", paths, tmp_path / "out", options).memory

    full = [case.folder / "full", *(tmp_path / f"full-{k}" for k in range(2))]
    for path in full[1:]:
        save_model(path, case.full)
    native, expanded = (memory(backend, case.paths) - memory(backend, full) for backend in ("cpu", "torch"))
    # Two workers have tiles of the first; of the second three have three models of a megabyte.
    assert native >= 2 * (3 << 18)
    assert expanded >= 3 * (3 << 20)


def test_only_what_is_changed_is_read(case: Case) -> None:
    report = merge(case)
    base = sum(
        (case.folder / "base" / f).stat().st_size
        for f in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    )
    factors = sum(t.nbytes for adapter in case.adapters for pair in adapter.values() for t in pair)
    others = sum(p.stat().st_size for p in (case.folder / "base").iterdir()) - base
    assert report.bytes_read == base + factors + others


def test_a_non_finite_difference_is_named(case: Case, tmp_path: Path) -> None:
    case.adapters[1]["model.layers.1.q_proj"][1][7, 2] = math.inf
    save_adapter(case.paths[1], case.adapters[1], RANK, ALPHA)
    with pytest.raises(nm.InputError, match=r"adapter-1/.*'model.layers.1.q_proj.weight': .* at \(7, 0\)"):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "out", scale=SCALE)
    merge(case, nonfinite="keep-base")
    case.check(tmp_path / "out", case.differences)


def test_what_is_skipped_changes_nothing(case: Case, tmp_path: Path) -> None:
    merge(case)
    expected = contents(tmp_path / "out")
    merge(case, skip_unchanged=True, overwrite=True)
    assert load_model(tmp_path / "out").keys() == case.base.keys()
    assert all(
        content == expected[name]
        for name, content in contents(tmp_path / "out").items()
        if name != "negmerge.json"
    )


def test_include_exclude_and_rename(case: Case, tmp_path: Path) -> None:
    merge(case, include="layers")
    case.check(tmp_path / "out", case.differences)
    nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "some", scale=SCALE, exclude="layers.1")
    merged = load_model(tmp_path / "some")
    assert same_bits(merged["model.layers.1.q_proj.weight"], case.base["model.layers.1.q_proj.weight"])
    assert not same_bits(merged["model.layers.0.q_proj.weight"], case.base["model.layers.0.q_proj.weight"])
    with pytest.raises(nm.InputError, match="no tensor that an adapter changes is chosen by include 'embed'"):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "none", scale=SCALE, include="embed")
    for k, factors in enumerate(case.adapters):
        renamed = {name.replace("model.layers", "blocks"): pair for name, pair in factors.items()}
        save_adapter(tmp_path / f"adapter-{k}", renamed, RANK, ALPHA)
    with pytest.raises(nm.InputError, match="blocks"):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "other", scale=SCALE)
    merge(case, overwrite=True, rename={"^blocks": "model.layers"})
    case.check(tmp_path / "out", case.differences)


def test_what_an_adapter_lacks_is_told_of_what_is_merged(
    case: Case, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Not of what is excluded; and of a full model's tensors, too."""

    def notes(models: list[Path], **options: Any) -> tuple[str, ...]:
        return tuple(
            nm.merge_checkpoints(
                tmp_path / "base", models, tmp_path / "out", scale=SCALE, overwrite=True, **options
            ).notes
        )

    zeros = ": zeros, which agree with no sign"
    assert notes(case.paths, exclude="k_proj") == ()
    assert notes([tmp_path / "full", case.paths[2]]) == (
        f"1 of 1 adapters has no embed, k_proj, norm{zeros}",
    )
    assert notes([tmp_path / "full", *case.paths]) == (
        f"3 of 3 adapters have no embed, norm{zeros}",
        f"1 of 3 adapters has no k_proj{zeros}",
    )


def test_a_change_of_what_the_index_omits_is_refused(case: Case, tmp_path: Path) -> None:
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.k_proj.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(
        nm.InputError, match=r"'model\.layers\.1\.k_proj\.weight': its index omits it, .*adapter-0"
    ):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "out", scale=SCALE)
    with pytest.warns(nm.MergeWarning, match="without being named"):
        nm.merge_checkpoints(
            tmp_path / "base", case.paths, tmp_path / "out", scale=SCALE, exclude=r"^model\.layers\.1\.k_proj"
        )


@pytest.mark.parametrize("rank", [1, 40])
def test_factors_that_are_larger_than_a_tensor_are_held_of_one_at_a_time(tmp_path: Path, rank: int) -> None:
    """All factors of a chunk are held together, in place of as many bytes of its buffers."""
    generator = torch.Generator().manual_seed(0)
    base = {f"m.{k}.proj.weight": torch.randn(8, 8, generator=generator) for k in range(40)}
    save_model(tmp_path / "base", base)
    factors = {
        name.removesuffix(".weight"): (
            torch.randn(rank, 8, generator=generator),
            torch.randn(8, rank, generator=generator),
        )
        for name in base
    }
    adapter = save_adapter(tmp_path / "adapter", factors, rank, 1)
    plan = api.open_and_plan(tmp_path / "base", [adapter], MergeOptions(SCALE))
    [(source, name)] = [(e.sources[1], e.slices[0].name) for e in plan.extents if e.slices]
    with Reader(4) as reader:
        known = source.file.expansion(reader, name, 0, "F32", None)
    assert (known is None) == (rank == 40)
    nm.merge_checkpoints(tmp_path / "base", [adapter], tmp_path / "out", scale=SCALE)
    for name, tensor in load_model(tmp_path / "out").items():
        d = difference(*factors[name.removesuffix(".weight")], 1 / rank, torch.float32)
        assert same_bits(tensor, plain_merge(base[name], [d], SCALE, task_vectors=True)[0])


def test_a_delta_of_adapters(case: Case, tmp_path: Path) -> None:
    """Applied, it gives the merge; each of its means is the reference's."""
    merge(case)
    with pytest.warns(nm.MergeWarning, match="no k_proj"):
        nm.delta_checkpoints(tmp_path / "base", case.paths, tmp_path / "delta")
    nm.apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "applied", scale=SCALE)
    case.check(tmp_path / "applied", case.differences)
    delta = nm.load_delta(tmp_path / "delta")
    assert delta.stats.agreed == sum(
        plain_consensus(case.base[n], case.differences(n), task_vectors=True)[1]
        for n in case.base
        if case.is_changed(n)
    )
    assert nm.verify_checkpoint(tmp_path / "delta", [tmp_path / "base", *case.paths]).blocks
    found = nm.consensus_statistics(tmp_path / "base", case.paths)
    assert found.agreed == delta.stats.agreed


def test_the_command(case: Case, run: Run, tmp_path: Path) -> None:
    adapters = [str(path) for path in case.paths]
    status, out, err = run("merge", "base", *adapters, "-o", "out", "--scale", SCALE)
    assert status == 0, err
    case.check(tmp_path / "out", case.differences)
    assert "adapter-0 and 1 more: 3 of 3 adapter modules placed" in out and "no k_proj" in err
    status, out, err = run("merge", "base", *adapters, "-o", "delta", "--output-adapter")
    assert status == 0, err
    assert run("apply", "base", "delta", "-o", "applied", "--scale", SCALE)[0] == 0
    case.check(tmp_path / "applied", case.differences)
    status, out, _ = run("merge", "base", *adapters, "-o", "none", "--scale", SCALE, "--dry-run")
    assert status == 0 and "3 of 3 adapter modules placed" in out and not (tmp_path / "none").exists()
    status, out, _ = run("inspect", "base", *adapters)
    assert status == 0 and "adapter" in out and "can be merged: 3 tensors" in out
    assert run("verify", "out", "--against", "base", *adapters)[0] == 0
    assert run("verify", "out", "--against", "base", *reversed(adapters))[0] == 2
    for arguments in (("--output-adapter", "--scale", "1"), ("--output-adapter", "--device", "cuda"), ()):
        status, _, err = run("merge", "base", *adapters, "-o", "none", *arguments)
        assert status == 2 and "--" in err


def test_an_adapter_is_no_base_and_is_given_once(case: Case, tmp_path: Path) -> None:
    for base, models, said in (
        (case.paths[0], case.paths[1:], "adapter"),
        (tmp_path / "base", [case.paths[0], case.paths[0]], "the same files"),
    ):
        with pytest.raises(nm.InputError, match=said):
            nm.merge_checkpoints(base, models, tmp_path / "out", scale=SCALE)
    with pytest.raises(nm.InputError, match="adapters_as"):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "out", scale=SCALE, adapters_as="both")


def test_another_option_is_another_output(case: Case, tmp_path: Path) -> None:
    """What was made with other adapters, or with them as models, is not taken for finished."""

    def again(**options: Any) -> nm.Report:
        return nm.merge_checkpoints(
            tmp_path / "base", case.paths[:2], tmp_path / "out", scale=SCALE, resume=True, **options
        )

    assert again().bytes_read
    assert again().bytes_read == 0
    with pytest.raises(nm.InputError, match="exists"):
        again(adapters_as="merged")
    config = case.paths[0] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": ALPHA + 1}))
    with pytest.raises(nm.InputError, match="exists"):
        again()


def test_a_tensor_that_is_no_number(case: Case, tmp_path: Path) -> None:
    integers = {**case.base, "model.layers.0.q_proj.weight": torch.ones(24, 16, dtype=torch.int64)}
    for name in (tmp_path / "base").iterdir():
        name.unlink()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(integers, tmp_path / "base" / "model.safetensors")
    with pytest.raises(nm.InputError, match="I64"):
        nm.merge_checkpoints(tmp_path / "base", case.paths, tmp_path / "out", scale=SCALE)


class Stop(Exception):
    pass


@pytest.mark.parametrize("adapters_as", ["difference", "merged"])
def test_a_merge_that_was_stopped(case: Case, monkeypatch: pytest.MonkeyPatch, adapters_as: str) -> None:
    merge(case, adapters_as=adapters_as)
    expected = contents(case.folder / "out")
    (case.folder / "out").rename(case.folder / "expected")
    record_every_chunk(monkeypatch)
    set_chunk_bytes(monkeypatch, 256)

    def progress(done: int, total: int) -> None:
        time.sleep(0.002)  # for more than one record
        if done > total / 2:
            raise Stop

    def again(**options: Any) -> nm.Report:
        return nm.merge_checkpoints(
            case.folder / "base", case.paths, case.folder / "out",
            scale=SCALE, resume=True, threads=1, adapters_as=adapters_as, **options,
        )  # fmt: skip

    with pytest.raises(Stop):
        again(progress=progress)
    with pytest.warns(nm.MergeWarning):
        report = again()
    assert report.bytes_done_before
    assert contents(case.folder / "out") == expected


@pytest.mark.processes
def test_two_ranks_make_the_same(case: Case) -> None:
    merge(case)
    expected = contents(case.folder / "out")
    arguments = ("merge", "base", *(f"adapter-{k}" for k in range(3)), "-o", "two", "--scale", str(SCALE))
    said = finish(start(case.folder, ranks=2, arguments=arguments))
    assert [status for status, _, _ in said] == [0, 0], said
    assert contents(case.folder / "two") == expected


def test_factors_of_one_expert_are_where_those_of_all_have_them() -> None:
    right = np.random.default_rng(0).standard_normal((3, 5, 130), np.float32)
    panels = in_panels(right)
    held = LowRank(0, right.ctypes.data, 3, 7, 130, 5, 1.0, (right, panels), panels.ctypes.data)
    cache: Any = SimpleNamespace(get=lambda *_: held)
    ref: Any = SimpleNamespace(source=SimpleNamespace(file=None, offset=0))
    for expert in range(3):
        change = Product(ref, ref, 5, 1.0, experts=3, expert=expert)
        nothing: Any = None
        found = low_rank._Expanded("w", nothing, "F32", 0, None, change, cache).factors(nothing)
        own = in_panels(right[expert : expert + 1])
        assert ctypes.string_at(found.right, right[expert].nbytes) == right[expert].tobytes()
        assert ctypes.string_at(found.panels, own.nbytes) == own.tobytes()
        assert (found.panels - panels.ctypes.data) % 64 == 0 and found.matrices == 1

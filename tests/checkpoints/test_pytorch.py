"""PyTorch files as checkpoints: what torch loads is what is merged, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import family, load_model, save_model
from safetensors.torch import save_file
from stored_tensors import check

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.dtypes import TORCH_NAMES
from negmerge_fast.core.errors import InputError

DTYPES = [getattr(torch, name) for name in TORCH_NAMES.values()]


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = {
        "a": torch.arange(35).reshape(5, 7).to(dtype),
        "b": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    torch.save(tensors, tmp_path / "m.pt", **options)
    if options and dtype in (torch.uint16, torch.uint32, torch.uint64):
        with pytest.raises(InputError, match="no attribute 'dtype'"):  # torch cannot load it, either
            open_checkpoint(tmp_path / "m.pt")
    else:
        check(open_checkpoint(tmp_path / "m.pt"), tensors)


def views() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big, long = torch.randn(30, 70, 3, generator=generator), torch.randn(40_000, generator=generator)
    wide = torch.randn(3, 40_000, generator=generator)
    return {
        "whole": big, "rows": big[10:20], "permuted": big.permute(2, 0, 1), "other": big.permute(1, 2, 0), "cut": big[::3, 5:60:7, 1],
        "expanded": torch.randn(4, 1, 5, generator=generator).expand(4, 90, 5), "scalar": big[1, 2, 0], "every other": long[::2],
        "far apart": torch.randn(4_000_000)[::400_000], "transposed": wide.t(), "wide": wide[:, 1:], "diagonal": big[0, :3].diagonal(),
        "overlapping": long.as_strided((300, 20), (3, 1)), "unfolded": long.unfold(0, 5, 2), "none": wide[:0].t(),
    }  # fmt: skip


@pytest.mark.parametrize("step", [1 << 30, pytest.param(4096, marks=pytest.mark.slow), 1001])
def test_views(tmp_path: Path, step: int) -> None:
    tensors = {name: view for name, view in views().items() if step > 1 << 20 or view.numel() < 10_000}
    torch.save(tensors, tmp_path / "m.pt")
    torch.save(tensors, tmp_path / "old.pt", **LEGACY)
    check(open_checkpoint(tmp_path / "m.pt"), tensors, step)
    check(open_checkpoint(tmp_path / "old.pt"), tensors, step)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tensors_of_one_storage(tmp_path: Path, options: dict[str, Any]) -> None:
    """Those that are the same have equal sources; of views, only those that are the same elements."""
    a = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": a, "same": a, "view": a.view(3, 4), "flat": a.view(12), "rows": a[1:], "t": a.t(), "t2": a.t(), "copy": a.clone()}, tmp_path / "m.pt", **options)  # fmt: skip
    tensors = open_checkpoint(tmp_path / "m.pt").tensors
    source = {name: tensor.source for name, tensor in tensors.items()}
    assert source["a"] == source["same"] == source["view"] == source["flat"] and source["t"] == source["t2"]
    assert len({*source.values()}) == 4 and source["rows"].offset == source["a"].offset + 16


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def training_state() -> dict[str, Any]:
    """What scripts save: with the states of AdamW and MultiStepLR."""
    moments = {
        k: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(k), "exp_avg_sq": torch.zeros(k)}
        for k in range(4)
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": [0, 1, 2, 3]}]
    return {
        "epoch": 3, "arch": "net", "best": 0.5, "state_dict": net().state_dict(), "optimizer": {"state": moments, "param_groups": groups},
        "scheduler": {"milestones": Counter([1, 2]), "gamma": 0.1, "_last_lr": [1e-3]}, "rng_state": torch.get_rng_state(), "history": [{"loss": 0.1}],
        "nothing": None, "classes": ("a", b"b"),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_the_weights_in_a_training_state(tmp_path: Path, options: dict[str, Any]) -> None:
    state = training_state()
    torch.save(state, tmp_path / "checkpoint.pth.tar", **options)
    opened = open_checkpoint(tmp_path / "checkpoint.pth.tar")
    check(opened, state["state_dict"])
    (note,) = opened.notes
    assert "'state_dict' is taken, 'epoch', 'arch', 'best' and 6 more not" in note


WEIGHTS = net().state_dict()


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        (WEIGHTS, None), (dict(WEIGHTS), None), ({"model": WEIGHTS}, "model"), ({"model_state_dict": WEIGHTS, "ema": WEIGHTS}, "model_state_dict"),
        ({"params": WEIGHTS, "params_ema": WEIGHTS}, "params"), ({"params_ema": WEIGHTS}, "params_ema"), ({"generator": WEIGHTS, "optimizer": {"a": torch.zeros(1)}}, "generator"),
        ({"state_dict": {"model": WEIGHTS}}, "model"), ({"net": WEIGHTS, "step": torch.tensor(3)}, "net"), ({"module": WEIGHTS, "buffer_names": []}, "module"),
    ],
)  # fmt: skip
def test_where_the_weights_are(tmp_path: Path, held: dict[str, Any], taken: str | None) -> None:
    torch.save(held, tmp_path / "m.bin")
    opened = open_checkpoint(tmp_path / "m.bin")
    check(opened, WEIGHTS)
    assert taken is None or len(held) == 1 or f"its '{taken}' is taken" in opened.notes[0]


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    plain = {
        "bytes": b"a\xff",
        "array": bytearray(b"a\xff"),
        "empty": bytearray(),
        "complex": 1 + 2j,
        "big": 2**70,
    }
    torch.save({**plain, "labels": [1] * 300_000, "state_dict": WEIGHTS}, tmp_path / "m.pt")
    check(open_checkpoint(tmp_path / "m.pt"), WEIGHTS)
    torch.save(WEIGHTS, tmp_path / "three.pt", pickle_protocol=3)
    check(open_checkpoint(tmp_path / "three.pt"), WEIGHTS)


def test_extra_state_that_is_no_tensor_is_told_of(tmp_path: Path) -> None:
    extra = {"a._extra_state": {"scale": 1.0}, "b._extra_state": torch.ones(2), "c._extra_state": None}
    torch.save({**WEIGHTS, **extra}, tmp_path / "m.pt")
    opened = open_checkpoint(tmp_path / "m.pt")
    check(opened, {**WEIGHTS, "b._extra_state": torch.ones(2)})
    assert opened.notes == (f"{tmp_path / 'm.pt'}: 'a._extra_state' no tensor: an output does not have it",)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, r"2 dicts of tensors \('model', 'state_dict'\), expected one"), ({"G": WEIGHTS, "D": WEIGHTS}, r"2 dicts of tensors \('G', 'D'\)"),
        ({"a": torch.zeros(2), "b": {"c": torch.zeros(2)}}, "'b' is a dict of tensors beside tensors"), ({"optimizer": {"a": torch.zeros(1)}}, "no tensors"), ([torch.zeros(2)], "of the type list"),
        ({"model": net()}, r"refers to 'torch.nn.modules.container.Sequential', which torch.load\(weights_only=True\) refuses, so nothing of it was run"),
        ({"a": torch.zeros(2).to_sparse()}, "tensor 'a': a sparse tensor"), ({"a": torch.zeros(2, device="meta")}, "tensor 'a': a meta tensor"),
        ({"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}, "tensor 'a': a quantized tensor"), ({"a": torch.zeros(2, dtype=torch.complex64).conj()}, "tensor 'a': a view that is conjugated"),
        ({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "tensor 'a': a nested tensor"), ({"a": torch.zeros(2, dtype=torch.complex128)}, "tensor 'a': torch.complex128, expected a type that safetensors has"),
        ({"a": torch.nn.Buffer(torch.zeros(2)), "x": {1}}, None), ({"a": torch.zeros(2), "b._extra_state": {"c": torch.zeros(2)}}, None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(prototype|deprecated|quantiz)")
def test_what_is_not_plain(tmp_path: Path, held: Any, message: str | None) -> None:
    torch.save(held, tmp_path / "m.pt")
    if message is None:
        assert list(open_checkpoint(tmp_path / "m.pt").tensors) == ["a"]
        return
    with pytest.raises(InputError, match=message) as found:
        open_checkpoint(tmp_path / "m.pt")
    assert "\n" not in str(found.value)


def test_other_formats_by_name_and_content(tmp_path: Path) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            open_checkpoint(tmp_path / name)

    torch.save(WEIGHTS, tmp_path / "weights")
    check(open_checkpoint(tmp_path / "weights"), WEIGHTS)
    save_file(WEIGHTS, tmp_path / "m.pt")
    refused("m.pt", r"a safetensors file \(rename it to .safetensors\)")
    torch.jit.save(torch.jit.script(net()), tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    refused("script.pt", "a TorchScript archive, expected a state dict")
    torch.save(WEIGHTS, tmp_path / "new.pt", pickle_protocol=4)
    refused("new.pt", "pickled with protocol 4")
    (tmp_path / "m.zip").write_bytes((tmp_path / "weights").read_bytes())
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("x/y", "z")
    check(open_checkpoint(tmp_path / "m.zip"), WEIGHTS)
    refused("other.zip", "without data.pkl")


def test_archives_of_other_programs(tmp_path: Path) -> None:
    """Repacked without compression, and without CRCs."""
    torch.save(WEIGHTS, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as archive,
        zipfile.ZipFile(tmp_path / "repacked.pt", "w") as repacked,
    ):
        for info in reversed(archive.infolist()):
            repacked.writestr(info.filename, archive.read(info))
    check(open_checkpoint(tmp_path / "repacked.pt"), WEIGHTS)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    check(open_checkpoint(tmp_path / "unchecked.pt"), WEIGHTS)


def test_versions_differ_in_the_manifest(tmp_path: Path) -> None:
    """By their headers, which have the CRCs of all tensors, or by samples of them."""
    for options in ({}, LEGACY):
        samples = set()
        for k in range(3):
            held = {"big": torch.zeros(1 << 20), "head": torch.zeros(3), "last": torch.zeros(1 << 18)}
            if k:
                held["head"][k] = 1
            torch.save(held, tmp_path / "m.pt", **options)
            (file,) = open_checkpoint(tmp_path / "m.pt").weights.values()
            samples.add((file.header, file.sample))
        assert len(samples) == 3


INPUTS = ("base", "ft-0", "ft-1", "ft-2")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """A base and versions as .safetensors directories, and what they are merged to, in `expected`."""
    monkeypatch.chdir(tmp_path)
    tensors = family()
    for name, held in zip(INPUTS, tensors, strict=True):
        save_model(Path(name), held)
    nm.merge_checkpoints("base", INPUTS[1:], "expected", scale=0.9)
    return tensors


def merged_as_expected(*paths: str) -> None:
    nm.merge_checkpoints("base", paths, "out", scale=0.9)
    expected, merged = load_model(Path("expected")), load_model(Path("out"))
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.items())
    nm.verify_checkpoint("out", ["base", *paths])


@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
def test_a_merge_of_all_forms(models: list[dict[str, torch.Tensor]]) -> None:
    _, first, second, third = models
    torch.save(
        OrderedDict(
            (f"_orig_mod.{n}", t.t().contiguous().t() if t.dim() == 2 else t) for n, t in first.items()
        ),
        "a.pt",
    )
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{n}": t for n, t in second.items()}}, "b.pth.tar", **LEGACY
    )
    torch.save({n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in third.items()}, "c.ckpt")
    merged_as_expected("a.pt", "b.pth.tar", "c.ckpt")


def save_bin(
    path: Path,
    tensors: dict[str, torch.Tensor],
    stem: str = "pytorch_model",
    tail: str = "",
    index: bool = True,
) -> None:
    """Shards as transformers saved them."""
    path.mkdir()
    names, weight_map = list(tensors), {}
    for k, of_shard in enumerate((names[:3], names[3:])):
        file = f"{stem}{tail}-{k + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in of_shard}, path / file)
        weight_map.update(dict.fromkeys(of_shard, file))
    if index:
        (path / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
def test_a_merge_of_directories(models: list[dict[str, torch.Tensor]]) -> None:
    _, first, second, third = models
    Path("single").mkdir()
    torch.save(first, "single/pytorch_model.bin")
    save_bin(Path("indexed"), second)
    save_bin(Path("diffusers"), third, "diffusion_pytorch_model")
    merged_as_expected("single", "indexed", "diffusers")


def test_which_weights_of_a_directory(tmp_path: Path) -> None:
    tensors, other = family()[:2]
    save_bin(tmp_path / "m", tensors)
    opened = open_checkpoint(tmp_path / "m")
    check(opened, tensors)
    assert (
        len(opened.weights) == 2
        and list(opened.extra_files) == ["pytorch_model.bin.index.json"]
        and not opened.notes
    )
    torch.save(other, tmp_path / "m" / "pytorch_model.fp16.bin")
    check(open_checkpoint(tmp_path / "m"), tensors)
    torch.save(other, tmp_path / "m" / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path / "m")
    check(opened, other)
    assert "pytorch_model.bin: is taken, as transformers does" in opened.notes[0]
    save_file(other, tmp_path / "m" / "x.safetensors")  # transformers does not know it
    check(open_checkpoint(tmp_path / "m"), other)
    save_model(tmp_path / "m", tensors)
    assert list(open_checkpoint(tmp_path / "m").weights) == ["model.safetensors"]
    save_bin(tmp_path / "no-index", tensors, index=False)
    opened = open_checkpoint(tmp_path / "no-index")
    check(opened, tensors)
    assert "has no index beside it, all 2 shards are taken" in opened.notes[0]
    (tmp_path / "variant").mkdir()
    torch.save(tensors, tmp_path / "variant" / "pytorch_model.bf16.bin")
    torch.save({"a": 1}, tmp_path / "variant" / "training_args.bin")
    opened = open_checkpoint(tmp_path / "variant")
    assert "is taken, as no other variant is there" in opened.notes[0]
    (tmp_path / "other").mkdir()
    torch.save(tensors, tmp_path / "other" / "model.pt")
    with pytest.raises(
        InputError, match=r"only model.pt and the like, .* \(or the file itself: .*other/model.pt\)"
    ):
        open_checkpoint(tmp_path / "other")


def test_nothing_imports_torch_without_need(tmp_path: Path) -> None:
    save_model(tmp_path / "m", family()[0])
    program = "import sys; from negmerge_fast.checkpoints.formats import open_checkpoint as o; o('m'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_beyond_4_gb(tmp_path: Path) -> None:
    """A sparse file, of which only two tensors are written."""
    with torch.serialization.skip_data():
        torch.save(
            {"long": torch.empty((1 << 30) + 3), "a": torch.empty(3), "b": torch.empty(5)}, tmp_path / "m.pt"
        )
    expected = torch.load(tmp_path / "m.pt", mmap=True, weights_only=True)
    tensors = open_checkpoint(tmp_path / "m.pt").tensors
    assert tensors["long"].source.nbytes == (1 << 32) + 12
    with open(tmp_path / "m.pt", "r+b") as file:
        for name in ("a", "b"):
            file.seek(tensors[name].source.offset)
            file.write(torch.arange(1.0, 1 + tensors[name].numel).numpy().tobytes())
    assert expected["a"].tolist() == [1, 2, 3] and expected["b"].tolist() == [1, 2, 3, 4, 5]

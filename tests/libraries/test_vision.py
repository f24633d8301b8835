"""Models of timm and open_clip, saved and loaded by these: batch norms that counted, masks, and files in two formats."""

from __future__ import annotations

import copy
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from bits import same_bits
from command import Run
from library_models import (
    MARKS,
    SCALE,
    SEEDS,
    check,
    check_in_memory,
    finetuned,
    merge_files,
    refused,
    states,
)
from open_clip.push_to_hf_hub import save_for_hf as save_open_clip
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.models import save_for_hf as save_timm

import negmerge_fast as nm

pytestmark = MARKS

# With batch norms, with layer norms and a class token, with tables of relative positions, without any norm; and a size of images.
TIMM = {"test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "test_vit_relpos": 160, "test_nfnet": 64}
NAMES = ("base", "ft-1", "ft-2", "ft-3")


def pixels(size: int, seed: int = 0, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(module: torch.nn.Module, size: int, seed: int) -> torch.nn.Module:
    """A fine-tuned version whose batch norms saw other images than those of the other versions, and more of them."""
    tuned = finetuned(module, seed).train()
    with torch.no_grad():
        for k in range(seed):
            tuned(pixels(size, seed=10 * seed + k))
    return tuned.eval()


def timm_models(name: str) -> tuple[list[torch.nn.Module], int]:
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=7).eval()
    size = TIMM[name]
    with torch.no_grad():
        base.train()(pixels(size, seed=1))
    base.eval()
    return [base, *(trained(base, size, seed) for seed in SEEDS)], size


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, run: Run, tmp_path: Path) -> None:
    models, size = timm_models(name)
    paths = [tmp_path / each for each in NAMES]
    for model, path in zip(models, paths, strict=True):
        save_timm(model, path, safe_serialization=True)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert merged.notes == []
    files = [states(path) for path in paths]
    check(states(merged.out), files[0], files[1:])
    if name == "test_resnet":
        counters = [key for key in files[0] if key.endswith("num_batches_tracked")]
        assert counters and all(len({int(file[key]) for file in files}) > 1 for key in counters)

    loaded = timm.create_model(f"local-dir:{merged.out}", pretrained=True).eval()
    assert set(loaded.state_dict()) == set(files[0])
    with torch.no_grad():
        ours, its = (model(pixels(size)) for model in (loaded, models[0]))
    assert ours.isfinite().all() and ours.shape == its.shape == (2, 7) and not torch.equal(ours, its)
    check_in_memory(models[0], models[1:], files)
    for key, tensor in nm.merge(models[0], models[1:], scale=SCALE).items():
        assert same_bits(tensor, loaded.state_dict()[key]), key


def test_timm_in_both_formats(run: Run, tmp_path: Path) -> None:
    """A pickle beside the safetensors file holds the base's weights, and is no part of a result."""
    models, _ = timm_models("test_vit")
    paths = [tmp_path / each for each in NAMES]
    for model, path in zip(models, paths, strict=True):
        save_timm(model, path, safe_serialization="both")
    assert (paths[0] / "pytorch_model.bin").exists()
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert not (merged.out / "pytorch_model.bin").exists()
    check(states(merged.out), states(paths[0]), [states(path) for path in paths[1:]])


def test_timm_raw_state_dicts(run: Run, tmp_path: Path) -> None:
    """Files without a directory and a configuration."""
    models, _ = timm_models("test_resnet")
    files = [tmp_path / f"{each}.safetensors" for each in NAMES]
    for model, file in zip(models, files, strict=True):
        save_model(model, str(file))
    merged = merge_files(run, files[0], files[1:], tmp_path / "out.safetensors")
    loaded = copy.deepcopy(models[0])
    assert load_model(loaded, str(merged.out)) == (set(), [])
    for name, tensor in nm.merge(models[0], models[1:], scale=SCALE).items():
        assert same_bits(tensor, loaded.state_dict()[name]), name


def test_a_new_head_is_refused(run: Run, tmp_path: Path) -> None:
    """A head of another size is no version of the base's; without it the rest is merged."""
    models, _ = timm_models("test_vit")
    models = models[:3]
    models[2].reset_classifier(11)
    paths = [tmp_path / each for each in NAMES[:3]]
    for model, path in zip(models, paths, strict=True):
        save_timm(model, path, safe_serialization=True)
    line = refused(run, *paths)
    assert "head.weight" in line and "(11, " in line
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out", "--exclude", "^head")
    before, after = states(paths[0]), states(merged.out)
    assert all(
        same_bits(after[name], before[name]) is name.startswith("head")
        for name in ("head.weight", "cls_token")
    )


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
TEXT = torch.tensor([[62, 5, 6, 63, 0, 0, 0, 0]] * 2)


class NoTokenizer:
    """open_clip saves a tokenizer with a model; that of CLIP lies in open_clip itself."""

    def save_pretrained(self, folder: Path) -> None: ...


def open_clip_models() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    base = open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).eval()
    open_clip.set_model_preprocess_cfg(
        base, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    )
    return [base, *(finetuned(base, seed) for seed in SEEDS)]


def saved_open_clip(folder: Path, models: list[torch.nn.Module], how: bool | str) -> list[Path]:
    paths = [folder / name for name in NAMES]
    for model, path in zip(models, paths, strict=True):
        save_open_clip(model, NoTokenizer(), OPEN_CLIP, path, safe_serialization=how)
    return paths


@pytest.mark.parametrize("how", [True, "both"])
def test_open_clip(how: bool | str, run: Run, tmp_path: Path) -> None:
    models = open_clip_models()
    paths = saved_open_clip(tmp_path, models, how)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert not list(merged.out.glob("*.bin"))
    files = [states(path) for path in paths]
    check(states(merged.out), files[0], files[1:])
    loaded = open_clip.create_model(f"local-dir:{merged.out}").eval()
    assert set(loaded.state_dict()) == set(files[0])
    with torch.no_grad():
        ours, its = (model(pixels(16), TEXT) for model in (loaded, models[0]))
    assert all(each.isfinite().all() for each in ours)
    assert not torch.equal(ours[0], its[0]) and not torch.equal(ours[1], its[1])
    check_in_memory(models[0], models[1:], files)
    for name, tensor in nm.merge(models[0], models[1:], scale=SCALE).items():
        assert same_bits(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("of_base", [True, False])
def test_wrapped_open_clip(of_base: bool, run: Run, tmp_path: Path) -> None:
    """A checkpoint of distributed training has module. before each name."""
    models = open_clip_models()
    paths = saved_open_clip(tmp_path, models, True)
    expected = merge_files(run, paths[0], paths[1:], tmp_path / "expected")
    for path in paths[:1] if of_base else paths[2:3]:
        file = path / "open_clip_model.safetensors"
        save_file({f"module.{name}": tensor for name, tensor in load_file(file).items()}, file)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert all("module." in note for note in merged.notes) and merged.notes
    prefix = "module." if of_base else ""
    after = states(merged.out)
    before = states(expected.out)
    assert set(after) == {prefix + name for name in before}
    assert all(same_bits(after[prefix + name], before[name]) for name in before)


def test_compiled_open_clip_in_memory() -> None:
    """torch.compile puts _orig_mod. before each name, DataParallel module."""
    models = open_clip_models()
    expected = nm.merge(models[0], models[1:], scale=SCALE)
    wrapped = [torch.compile(models[1]), torch.nn.DataParallel(models[2]), models[3]]
    with pytest.warns(nm.MergeWarning, match=r"_orig_mod\.|module\."):
        merged = nm.merge(models[0], wrapped, scale=SCALE)
    assert set(merged) == set(expected)
    assert all(same_bits(merged[name], expected[name]) for name in expected)


def test_bfloat16_versions_of_a_float32_base(run: Run, tmp_path: Path) -> None:
    """What rounding to the smaller type changed is not learned: a version that was only rounded changes nothing."""
    models = open_clip_models()
    rounded = [copy.deepcopy(models[0]).bfloat16() for _ in SEEDS]
    with torch.no_grad():
        for version, model in zip(rounded, models[1:], strict=True):
            version.text_projection.copy_(model.text_projection)
    paths = saved_open_clip(tmp_path, [models[0], *rounded], True)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    before, after = states(paths[0]), states(merged.out)
    check(after, before, [states(path) for path in paths[1:]])
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert changed == {"text_projection"}

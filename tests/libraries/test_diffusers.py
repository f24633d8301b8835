"""Pipelines of diffusers, made from configurations, whose parts have folders of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from command import Run
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import negmerge_fast as nm

pytestmark = MARKS

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
BEGIN, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1
BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 8}


def ddpm() -> DDPMPipeline:
    unet = UNet2DModel(
        **BLOCKS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet, DDPMScheduler())


def stable_diffusion() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        **BLOCKS, in_channels=4, out_channels=4, attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    tokens = {token: k for k, token in enumerate(VOCABULARY)}
    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=CLIPTokenizer(vocab=tokens, merges=[], model_max_length=8),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def tuned(pipeline: Any, seed: int, names: tuple[str, ...]) -> Any:
    """A pipeline with new parts of these names, and copies of the rest."""
    parts = {
        name: finetuned(part, seed) if name in names else copy.deepcopy(part)
        for name, part in modules(pipeline).items()
    }
    return type(pipeline)(**{**pipeline.components, **parts}, **options(pipeline))


def options(pipeline: Any) -> dict[str, Any]:
    return {"requires_safety_checker": False} if isinstance(pipeline, StableDiffusionPipeline) else {}


def saved(
    folder: Path,
    make: Callable[[], Any],
    names: tuple[str, ...] = ("unet", "vae", "text_encoder"),
    **how: Any,
) -> tuple[list[Any], list[Path]]:
    torch.manual_seed(0)
    base = make()
    pipelines = [base, *(tuned(base, seed, names) for seed in SEEDS)]
    paths = [folder / name for name in ("base", "ft-1", "ft-2", "ft-3")]
    for pipeline, path in zip(pipelines, paths, strict=True):
        pipeline.save_pretrained(path, **how)
    return pipelines, paths


def image(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    prompt = {"prompt": "a cat"} if isinstance(pipeline, StableDiffusionPipeline) else {}
    made = pipeline(**prompt, generator=torch.manual_seed(0), num_inference_steps=2, output_type="np")
    return torch.from_numpy(made.images)


def check_pipeline(base: Any, path: Path, **how: Any) -> Any:
    pipeline = type(base).from_pretrained(path, local_files_only=True, **how)
    ours, its = image(pipeline), image(base)
    assert ours.isfinite().all() and ours.shape == its.shape and not torch.equal(ours, its)
    return pipeline


@pytest.mark.parametrize("make", [ddpm, stable_diffusion])
@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_pipelines(make: Callable[[], Any], size: str, run: Run, tmp_path: Path) -> None:
    """In whole files, and in shards with an index in each folder."""
    pipelines, paths = saved(tmp_path, make, max_shard_size=size)
    assert (len(list((paths[0] / "unet").glob("*.safetensors"))) > 1) is (size == "30KB")
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert merged.notes == []
    check(states(merged.out), states(paths[0]), [states(path) for path in paths[1:]])
    pipeline = check_pipeline(pipelines[0], merged.out)
    for name, part in modules(pipeline).items():
        of_modules = nm.merge(
            modules(pipelines[0])[name], [modules(p)[name] for p in pipelines[1:]], scale=SCALE
        )
        assert set(of_modules) == set(part.state_dict())
        assert all(same_bits(tensor, of_modules[key]) for key, tensor in part.state_dict().items()), name


def test_a_unet_alone_was_trained(run: Run, tmp_path: Path) -> None:
    """As is usual: the other parts are the base's, bit by bit."""
    pipelines, paths = saved(tmp_path, stable_diffusion, names=("unet",))
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    tensors, before = states(merged.out), states(paths[0])
    check(tensors, before, [states(path) for path in paths[1:]])
    for name, tensor in before.items():
        assert name.startswith("unet/") or same_bits(tensors[name], tensor), name
    check_pipeline(pipelines[0], merged.out)


def test_parts_by_themselves(run: Run, tmp_path: Path) -> None:
    """One folder of each pipeline, merged as a model of its own."""
    pipelines, paths = saved(tmp_path, stable_diffusion)
    folders = [path / "unet" for path in paths]
    merged = merge_files(run, folders[0], folders[1:], tmp_path / "out")
    files = [states(folder) for folder in folders]
    check(states(merged.out), files[0], files[1:])
    unet, info = UNet2DConditionModel.from_pretrained(merged.out, output_loading_info=True)
    assert not any(info.values()), info
    assert set(unet.state_dict()) == set(files[0])
    check_in_memory(pipelines[0].unet, [pipeline.unet for pipeline in pipelines[1:]], files)


def test_the_fp16_variant(run: Run, tmp_path: Path) -> None:
    """Weights in half precision under the variant's names, as they are loaded."""
    pipelines, paths = saved(tmp_path, lambda: stable_diffusion().to(dtype=torch.float16), variant="fp16")
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    check(states(merged.out), states(paths[0]), [states(path) for path in paths[1:]])
    assert (merged.out / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    base = pipelines[0].to(dtype=torch.float32)
    check_pipeline(base, merged.out, variant="fp16", torch_dtype=torch.float32)


def test_a_part_that_is_missing_in_a_version_is_refused(run: Run, tmp_path: Path) -> None:
    _, paths = saved(tmp_path, stable_diffusion)
    for file in (paths[2] / "vae").glob("*.safetensors"):
        file.unlink()
    assert "vae" in refused(run, *paths)


def test_a_part_in_a_pytorch_file(run: Run, tmp_path: Path) -> None:
    """It is merged, and becomes a safetensors file."""
    outs = []
    for name, safe in (("bin", False), ("safetensors", True)):
        (tmp_path / name).mkdir()
        _, paths = saved(tmp_path / name, ddpm, safe_serialization=safe)
        merged = merge_files(run, paths[0], paths[1:], tmp_path / name / "out")
        assert safe or "unet/diffusion_pytorch_model.bin becomes" in "".join(merged.notes)
        outs.append(states(merged.out))
    assert outs[0].keys() == outs[1].keys()
    assert all(same_bits(tensor, outs[1][name]) for name, tensor in outs[0].items())

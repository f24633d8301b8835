"""Opening valid checkpoints; test_malformed.py has the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import entry, raw, save_model
from malformed import POINTER, deep
from safetensors import safe_open

from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.errors import InputError


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "more", ["1", "null", '"x"', "[1,[2.5]]", '{"a":{"shape":[9]}}', "-0", deep("@", 90), deep('{"a":@}', 90)]
)
@pytest.mark.parametrize("key", ["more", "", "Shape"])
def test_unknown_keys_of_a_tensor_are_ignored_as_by_the_library(tmp_path: Path, key: str, more: str) -> None:
    header = json.dumps({"a": entry()})[:-2] + f',"{key}":{more}}}}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(header.encode(), bytes(8)))
    with safe_open(path, "np") as opened:
        assert list(opened.keys()) == ["a"]
    assert open_checkpoint(path).tensors["a"].spec.shape == (2,)


def test_the_configuration_beside_the_weights(tmp_path: Path) -> None:
    """It tells quantized weights, also where a single file is given; as lenient as those who read it."""
    path = save_model(tmp_path, {"a": torch.zeros(2)})
    for text, expected in {
        '{"a": Infinity, "a": NaN, "b": 1}': {"b": 1},
        '{"quantization_config": {"bits": 4}}': {"quantization_config": {"bits": 4}},
        "[]": {},
        "{": {},
        "[" * 100_000: {},
        "\xff": {},
    }.items():
        (path / "config.json").write_bytes(text.encode("latin-1"))
        for given in (path, path / "model.safetensors"):
            (config,) = open_checkpoint(given).configs.values()
            config.pop("a", None)
            assert config == expected
    (path / "config.json").unlink()
    assert open_checkpoint(path).configs == {"": {}}


@pytest.mark.parametrize("name", ["model.safetensors", "vector.npy", "config.json"])
def test_a_pointer_of_large_file_storage(tmp_path: Path, name: str) -> None:
    path = save_model(tmp_path, {"a": torch.zeros(2)})
    (path / name).write_bytes(POINTER)
    given = path / ("model.safetensors" if name == "config.json" else name)
    with pytest.raises(InputError, match=rf'{name}: a Git LFS pointer, expected .* \(run "git lfs pull"\)'):
        open_checkpoint(given)

"""Opening LoRA adapters: directories and files, and what is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_adapter
from checkpoint_files import save_model
from safetensors.torch import load_file, save_file

from negmerge_fast.checkpoints.adapters import have_equal_numbers
from negmerge_fast.checkpoints.base import TensorRef
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.checkpoints.safetensors import read_header
from negmerge_fast.core.errors import InputError

FACTORS = {"model.q": (torch.ones(2, 6), torch.ones(4, 2))}


def adapter(path: Path, **config: Any) -> Path:
    return save_adapter(path, FACTORS, 2, 4, **config)


@pytest.mark.parametrize(
    "others", [[], ["README.md", "tokenizer.json", "optimizer.pt", "training_args.bin", "trainer_state.json"]]
)
@pytest.mark.parametrize("extra_files", [True, False])
def test_a_directory(tmp_path: Path, others: list[str], extra_files: bool) -> None:
    """As PEFT saves it, and as a trainer leaves it."""
    path = adapter(tmp_path / "a")
    for name in others:
        (path / name).write_bytes(b"{}")
    opened = open_checkpoint(path, extra_files=extra_files)
    assert (opened.kind, list(opened.weights), list(opened.extra_files)) == (
        "adapter",
        ["adapter_model.safetensors"],
        ["adapter_config.json"],
    )
    assert opened.extra_files["adapter_config.json"].header and not opened.notes
    assert opened.adapter and opened.adapter.name == str(path) and opened.adapter.modules == 1
    assert list(opened.tensors) == list(load_file(path / "adapter_model.safetensors"))
    assert opened.undecided == (f"{path}: a LoRA adapter, expected a whole model as the base",)


def test_its_file(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    file = (path / "adapter_model.safetensors").rename(path / "other.safetensors")
    opened = open_checkpoint(file)
    assert opened.adapter and opened.adapter.name == str(file) and opened.kind == "adapter"
    (path / "adapter_config.json").unlink()
    opened = open_checkpoint(file)
    assert opened.adapter is None and opened.kind == "safetensors"


def test_a_file_of_whole_weights_beside_a_configuration(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    save_file({"w": torch.zeros(3)}, path / "model.safetensors")
    assert open_checkpoint(path / "model.safetensors").kind == "safetensors"
    opened = open_checkpoint(path, extra_files=False)
    assert opened.kind == "directory" and "an adapter beside the weights, not merged" in opened.notes[0]


def test_another_configuration_is_another_adapter(tmp_path: Path) -> None:
    opened = [open_checkpoint(adapter(tmp_path / name, use_rslora=name == "b")) for name in "ab"]
    headers = [each.extra_files["adapter_config.json"].header for each in opened]
    assert headers[0] != headers[1]


def test_several_adapters(tmp_path: Path) -> None:
    for name in ("one", "two"):
        adapter(tmp_path / "a" / name)
    with pytest.raises(
        InputError,
        match=rf"a: adapters in folders \('one', 'two'\), expected one of them: {re.escape(str(tmp_path))}/a/one$",
    ):
        open_checkpoint(tmp_path / "a")
    adapter(tmp_path / "a")
    [note] = open_checkpoint(tmp_path / "a").notes
    assert note.endswith("the adapters in its folders ('one', 'two') are others, and not merged")


def test_a_model_with_adapters_in_folders_is_a_model(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", {"w": torch.zeros(3)})
    adapter(path / "speech")
    assert open_checkpoint(path, extra_files=False).kind == "directory"


def test_no_lora_alpha_is_said(tmp_path: Path) -> None:
    [note] = open_checkpoint(adapter(tmp_path / "a", lora_alpha=None)).notes
    assert note.endswith("a: no lora_alpha, so the scale is that of lora_alpha = r")


MALFORMED: dict[str, tuple[bytes | None, str]] = {
    "no object": (b"[]", "adapter_config.json: configuration is a JSON list, expected an object"),
    "no JSON": (b"{", "adapter_config.json: configuration is not JSON"),
    "empty": (b"", "adapter_config.json: configuration is not JSON"),
    "twice": (b'{"r": 1, "r": 2}', "adapter_config.json: configuration names 'r' twice"),
    "NaN": (b'{"lora_alpha": NaN}', "adapter_config.json: configuration is not JSON (NaN is no number)"),
    "deep": (b"[" * 100_000, "adapter_config.json: configuration is not JSON"),
    "another library": (b'{"fine_tune_type": "lora"}', "peft_type is None, expected LORA"),
    "another method": (b'{"peft_type": "IA3"}', "peft_type is 'IA3', expected LORA"),
    "long": (b" " * ((1 << 24) + 1), "expected a configuration of at most"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_configurations(tmp_path: Path, text: bytes, problem: str) -> None:
    path = adapter(tmp_path / "a")
    (path / "adapter_config.json").write_bytes(text)
    for given in (path, path / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=re.escape(problem)):
            open_checkpoint(given)


def test_missing_weights(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin: a safetensors file \(rename it"):
        open_checkpoint(path)
    (path / "adapter_model.bin").rename(path / "adapters.npz")
    with pytest.raises(
        InputError,
        match=r"a: only adapters\.npz beside adapter_config\.json, expected adapter_model\.safetensors",
    ):
        open_checkpoint(path)
    (path / "adapters.npz").unlink()
    with pytest.raises(InputError, match=r"a: no weights beside adapter_config\.json"):
        open_checkpoint(path)


def test_a_pytorch_file(tmp_path: Path) -> None:
    """As PEFT saved adapters before 0.7, or with safe_serialization=False."""
    path, expected = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    weights = path / "adapter_model.safetensors"
    torch.save(load_file(weights), path / "adapter_model.bin")
    weights.unlink()
    for given in (path, path / "adapter_model.bin"):
        opened, other = open_checkpoint(given), open_checkpoint(expected)
        assert (
            opened.kind == "adapter"
            and opened.adapter
            and other.adapter
            and list(opened.weights) == ["adapter_model.bin"]
        )
        assert list(opened.adapter.changes) == list(other.adapter.changes)
        with Reader(4) as reader:
            assert all(
                have_equal_numbers(tensor, other.tensors[name], reader)
                for name, tensor in opened.tensors.items()
            )


def test_integers_are_no_factors(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a", {"q": (torch.ones(2, 6).int(), torch.ones(4, 2))}, 2, 4)
    with pytest.raises(InputError, match=r"'base_model\.model\.q\.lora_A\.weight': dtype I32, expected "):
        open_checkpoint(path)
    path = save_adapter(tmp_path / "b", FACTORS, 2, 4, modules_to_save=["bn"])
    held = load_file(path / "adapter_model.safetensors")
    save_file(
        {**held, "base_model.model.bn.num_batches_tracked": torch.tensor(3)},
        path / "adapter_model.safetensors",
    )
    opened = open_checkpoint(path)
    assert opened.adapter and list(opened.adapter.changes) == ["model.q.weight"], "integers are the base's"


def test_equal_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    narrow = torch.randn(300_000).bfloat16()
    other = narrow.float()
    other[-1] += 1
    nan = narrow.clone()
    nan[7] = float("nan")
    tensors = {
        "a": narrow,
        "b": narrow.double(),
        "c": narrow.float(),
        "d": other,
        "e": narrow.half(),
        "f": narrow.int(),
        "g": nan,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    held, _ = read_header(tmp_path / "x.safetensors")

    def equal(first: str, second: str) -> bool:
        with Reader(4) as reader:
            return have_equal_numbers(held[first], held[second], reader)

    assert equal("a", "a") and equal("a", "b") and equal("c", "b") and equal("g", "g")
    assert equal("a", "e") == torch.equal(narrow.half().double(), narrow.double())
    assert not equal("a", "d") and not equal("d", "b") and not equal("a", "f") and not equal("a", "g")
    assert isinstance(held["a"], TensorRef)


def test_what_is_read_of_the_configuration_alone(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    fields = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "../../etc"}))
    opened = open_checkpoint(path)
    assert opened.adapter and opened.adapter.modules == 1

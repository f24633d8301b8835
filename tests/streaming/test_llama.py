"""A real transformers model, sharded, eight fine-tuned versions, through the command line: the formula's bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCALE = 0.9


def save_model(path: Path, seed: int, base: LlamaForCausalLM | None, shard: str) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if base is not None:
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    return model


def formula(base: torch.Tensor, finetuned: list[torch.Tensor]) -> torch.Tensor:
    d = torch.stack([x - base for x in finetuned])
    agree = (d > 0).all(0) | (d < 0).all(0)
    total = torch.zeros_like(base)
    for difference in d:
        total = total + difference
    mean = total / torch.tensor(float(len(finetuned)))
    return torch.where(agree, base + torch.tensor(SCALE) * -mean, base)


def test_sharded_llama(tmp_path: Path) -> None:
    base_dir = tmp_path / "base"
    base = save_model(base_dir, 0, None, "200KB")
    dirs = [tmp_path / f"ft-{k}" for k in range(8)]
    # Every model is sharded in its own way, the last ones not at all.
    for k, path in enumerate(dirs):
        save_model(path, k + 1, base, ["200KB", "350KB", "90KB", "10MB"][k % 4])
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "negmerge_fast",
        "merge",
        base_dir,
        *dirs,
        "--output",
        out,
        "--scale",
        str(SCALE),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    shards = sorted(path.name for path in base_dir.glob("*.safetensors"))
    assert len(shards) > 3
    assert {p.name for p in out.iterdir()} == {p.name for p in base_dir.iterdir()} | {"negmerge.json"}
    for other in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (out / other).read_bytes() == (base_dir / other).read_bytes()

    states = [{n: t for p in path.glob("*.safetensors") for n, t in load_file(p).items()} for path in dirs]
    for shard in shards:
        header_size = 8 + int.from_bytes((base_dir / shard).read_bytes()[:8], "little")
        header = (base_dir / shard).read_bytes()[8:header_size]
        expected = bytearray((base_dir / shard).read_bytes())
        for name, base_tensor in load_file(base_dir / shard).items():
            begin, end = json.loads(header)[name]["data_offsets"]
            merged = formula(base_tensor, [state[name] for state in states])
            expected[header_size + begin : header_size + end] = merged.numpy().tobytes()
        assert (out / shard).read_bytes() == bytes(expected)
        assert json.loads(header)["__metadata__"] == {"format": "pt"}

    loaded = AutoModelForCausalLM.from_pretrained(out)
    changed = [not torch.equal(p, q) for p, q in zip(loaded.parameters(), base.parameters(), strict=True)]
    assert sum(changed) > 20  # in a norm of 64 elements, eight random models may agree on none

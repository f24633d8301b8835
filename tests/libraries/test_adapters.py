"""Real adapters of PEFT on models of transformers: read, placed and expanded, they give what PEFT's merge_and_unload gives.

PEFT multiplies B by A in float32 and adds the difference to the base's weight in float32. Here the same is done in float64 with NumPy.
The two may differ by what the roundings of float32 allow: (r + 4) · 2⁻²⁴ · (|b| + |s| · Σ_r |B|·|A|), for each element.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from library_models import MARKS
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from negmerge_fast.checkpoints.adapters import have_equal_numbers
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.lora import Product, Replacement, Shift, matrices, read_adapter
from negmerge_fast.checkpoints.placing import Placed, place
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.core.errors import InputError

pytestmark = MARKS

State = Mapping[str, torch.Tensor]
Array = np.ndarray[Any, Any]
Make = Callable[[], torch.nn.Module]

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**config: Any) -> Make:
    return lambda: LlamaForCausalLM(LlamaConfig(**DECODER, **config))


def gpt2(**config: Any) -> Make:
    return lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, **config)
    )


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=12))


def qwen2_moe() -> torch.nn.Module:
    extra = {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "num_experts": 3,
        "num_experts_per_tok": 1,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**DECODER, **extra))


def olmoe() -> torch.nn.Module:
    """gate_up_proj is square."""
    config = {**DECODER, "intermediate_size": 8}
    return OlmoeForCausalLM(OlmoeConfig(**config, num_experts=3, num_experts_per_tok=1))


def gpt_oss() -> torch.nn.Module:
    """down_proj is square, and its experts are (experts, in, out)."""
    config = {**DECODER, "intermediate_size": 16}
    return GptOssForCausalLM(GptOssConfig(**config, num_local_experts=3, num_experts_per_tok=1, head_dim=8))


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {**SMALL, "intermediate_size": 24}


def clip() -> torch.nn.Module:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def qwen2_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    text = {**DECODER, "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def llava() -> torch.nn.Module:
    text = LlamaConfig(**DECODER)
    vision = CLIPConfig(text_config=TEXT, vision_config=VISION).vision_config
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=1)
    )


def bert(kind: Any) -> Make:
    return lambda: kind(BertConfig(**TEXT, max_position_embeddings=16))


def t5() -> torch.nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.small = (
            torch.nn.Conv1d(4, 6, 3),
            torch.nn.Conv2d(4, 6, (3, 2)),
            torch.nn.Conv2d(6, 8, 1),
        )
        self.three, self.norm = torch.nn.Conv3d(3, 5, 2), torch.nn.BatchNorm1d(5)

    def save_pretrained(self, path: Path) -> None:
        path.mkdir(parents=True)
        save_file(self.state_dict(), path / "model.safetensors")


# Of each: what makes the model, its adapter's configuration, and a part of the note of how it was placed.
IN_MEMORY = " by their names in memory (transformers "
CASES: dict[str, tuple[Make, dict[str, Any], str]] = {
    **{f"Llama {seed}": (llama(), {"target_modules": ["q_proj", "v_proj"]}, "") for seed in range(8)},
    "Llama, all of it": (
        llama(attention_bias=True),
        {
            "target_modules": "all-linear", "use_rslora": True, "bias": "all", "modules_to_save": ["lm_head", "model.norm"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {"k_proj": 3, r"^model\.layers\.\d\.mlp.*": 5},
        },
        "",
    ),
    "Llama, its embeddings": (llama(), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ""),
    "Llama, tied": (llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "embed_tokens"]}, ""),
    "Llama, whole embeddings": (llama(), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}, ""),
    "Llama, trained tokens": (llama(), {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 1, 30]}}, ""),
    "Llama, trained tokens, tied": (
        llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "trainable_token_indices": [7, 1, 30]}, "",
    ),
    "Llama, biases of its layers": (llama(attention_bias=True), {"target_modules": ["q_proj"], "bias": "lora_only"}, ""),
    "Llama, biases of B": (llama(attention_bias=True), {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}, ""),
    "Llama, parameters": (llama(), {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]}, ""),
    "GPT-2": (gpt2(), {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, ""),
    "GPT-2 and its output layer": (gpt2(tie_word_embeddings=False), {"target_modules": ["c_attn", "c_proj", "lm_head"]}, ""),
    "Mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        IN_MEMORY,
    ),
    "Mixtral, one of two": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, IN_MEMORY),
    "Mixtral, its names before transformers 5": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}, IN_MEMORY),
    "Qwen2-MoE": (qwen2_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, IN_MEMORY),
    "OLMoE": (olmoe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, IN_MEMORY),
    "gpt-oss": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, ""),
    "CLIP": (clip, {"target_modules": ["q_proj", "fc1", "patch_embedding", "token_embedding"]}, ""),
    "Qwen2-VL": (qwen2_vl, {"target_modules": ["q_proj", "up_proj", "qkv"]}, IN_MEMORY),
    "LLaVA": (llava, {"target_modules": ["q_proj"]}, IN_MEMORY),
    "BERT, a classifier": (bert(BertForSequenceClassification), {"target_modules": ["query"], "task_type": "SEQ_CLS"}, ""),
    "T5": (t5, {"target_modules": ["q", "wi"], "bias": "all"}, ""),
    "EVA": (llama(), {"target_modules": ["q_proj"], "init_lora_weights": "eva"}, ""),
    "convolutions": (Convolutions, {"target_modules": ["one", "two", "small", "three"], "modules_to_save": ["norm"]}, ""),
}  # fmt: skip


def made(make: Make) -> torch.nn.Module:
    torch.manual_seed(0)
    return make()


def adapted(make: Make, config: Mapping[str, Any], seed: int = 1) -> PeftModel:
    """A model with an adapter whose tensors have moved."""
    torch.manual_seed(seed)
    model = get_peft_model(made(make), LoraConfig(r=4, **{"lora_alpha": 6, **copy.deepcopy(dict(config))}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def states(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(placed: Placed[torch.Tensor], base: State, merged: State) -> None:
    """The base with the changes is what PEFT has merged, and nothing else has changed."""
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        before, after = tensor.double().numpy(), merged[name].double().numpy()
        change = placed.changes.get(name)
        expected, bound = applied(before, change)
        assert (np.abs(after - expected) <= bound).all(), name
        if not isinstance(change, Replacement):
            assert (change is None) == np.array_equal(before, after), name


def applied(before: Array, change: Any) -> tuple[Array, Array]:
    """A tensor with its change, and how far float32 may be from it."""
    size = np.abs(before)
    rank = 0
    if isinstance(change, Product):
        a, b = (tensor.double().numpy() for tensor in (change.a, change.b))
        left, right = matrices(change, a, b)
        before = before + change.scale * (left @ right).reshape(before.shape)
        size = size + abs(change.scale) * (np.abs(left) @ np.abs(right)).reshape(before.shape)
        rank = change.rank
    elif isinstance(change, Shift):
        value = change.scale * change.value.double().numpy()
        before, size = before + value, size + np.abs(value)
    elif isinstance(change, Replacement) and change.rows is None:
        return change.value.double().numpy(), 0 * before
    elif isinstance(change, Replacement):
        before = before.copy()
        before[list(change.rows or ())] = change.value.double().numpy()
        return before, 0 * before
    return before, (rank + 4) * 2.0**-24 * size * (change is not None)


def placed_on(base: Path, adapter: Path) -> Placed[torch.Tensor]:
    """An adapter on disk, with its tensors in memory."""
    opened, on = open_checkpoint(adapter), open_checkpoint(base)
    assert opened.adapter
    shapes = {name: tensor.spec.shape for name, tensor in on.tensors.items()}
    by_ref = place(opened.adapter, shapes, on.configs.get("", {}), str(base))
    with Reader(4) as reader:
        assert all(
            have_equal_numbers(copy_, on.tensors[name], reader) for name, copy_ in by_ref.copies.items()
        )
    held = states(adapter)
    tensors = {id(ref): held[name] for name, ref in opened.tensors.items()}

    def loaded(change: Any) -> Any:
        if isinstance(change, Product):
            return change._replace(a=tensors[id(change.a)], b=tensors[id(change.b)])
        return change._replace(value=tensors[id(change.value)])

    changes = {name: loaded(change) for name, change in by_ref.changes.items()}
    return Placed(changes, by_ref.modules, by_ref.notes, {})


@pytest.mark.parametrize(("make", "config", "how"), CASES.values(), ids=CASES.keys())
def test_equal_to_merge_and_unload(
    make: Make, config: dict[str, Any], how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    numbered = re.fullmatch(r"Llama (\d)", request.node.callspec.id)
    seed = int(numbered[1]) if numbered else 1
    model = adapted(make, config, seed)
    made(make).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    placed = placed_on(tmp_path / "base", tmp_path / "adapter")
    count = placed.modules
    assert count and f"adapter: {count} of {count} adapter modules placed{how}" in placed.notes[-1]
    assert placed.notes[-1].endswith("placed") == (how == "")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    check(placed, states(tmp_path / "base"), states(tmp_path / "merged"))


@pytest.mark.parametrize(
    "case", ["Llama, all of it", "Llama, its embeddings", "Mixtral", "Qwen2-VL", "GPT-2 and its output layer"]
)
def test_live(case: str) -> None:
    """A model in memory, whose names are its parameters'."""
    make, config, _ = CASES[case]
    model, base = adapted(make, config), made(make).state_dict()
    fields = model.peft_config["default"].to_dict()
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    adapter = read_adapter(fields, tensors, lambda tensor: tuple(tensor.shape), "adapter 'default'")
    # A model that was not saved yet does not know the name of its class.
    of_base = {**model.config.to_dict(), "architectures": [type(model.get_base_model()).__name__]}
    placed = place(adapter, {name: tuple(tensor.shape) for name, tensor in base.items()}, of_base, "base")
    assert all(torch.equal(copy_, base[name]) for name, copy_ in placed.copies.items())
    check(placed, base, model.merge_and_unload().state_dict())


def test_experts_of_mixtral_by_their_names_in_files(tmp_path: Path) -> None:
    """As adapters of transformers 4 name them; transformers is not asked."""
    make, config, _ = CASES["Mixtral"]
    made(make).save_pretrained(tmp_path / "base")
    model = adapted(make, {**config, "target_modules": ["q_proj"], "target_parameters": None})
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    module = "base_model.model.model.layers.1.block_sparse_moe.experts.11.w2"
    a, b = torch.randn(4, 24), torch.randn(16, 4)
    save_file({**load_file(weights), f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, weights)
    placed = placed_on(tmp_path / "base", tmp_path / "adapter")
    assert placed.notes[-1].endswith("3 of 3 adapter modules placed")
    assert "model.layers.1.block_sparse_moe.experts.11.w2.weight" in placed.changes


def test_the_first_match_in_the_order_of_the_file(tmp_path: Path) -> None:
    """PEFT sorts patterns when it saves them: loaded again, another may be the first."""
    config = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 3, ".*proj": 5}}
    model = adapted(llama(), config)
    made(llama()).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert list(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["alpha_pattern"]) == [
        ".*proj",
        "q_proj",
    ]
    loaded = PeftModel.from_pretrained(made(llama()), tmp_path / "adapter")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    placed = placed_on(tmp_path / "base", tmp_path / "adapter")
    assert {change.scale for change in placed.changes.values() if isinstance(change, Product)} == {1.25}
    check(placed, states(tmp_path / "base"), states(tmp_path / "merged"))


def test_of_another_head(tmp_path: Path) -> None:
    """An adapter of the encoder inside a classifier, on the encoder's own files; and the other way round."""
    make, config, _ = CASES["BERT, a classifier"]
    made(bert(BertModel)).save_pretrained(tmp_path / "encoder")
    made(make).save_pretrained(tmp_path / "classifier")
    plain = {"target_modules": ["query"]}
    adapted(make, plain).save_pretrained(tmp_path / "of classifier")
    adapted(bert(BertModel), plain).save_pretrained(tmp_path / "of encoder")
    placed = placed_on(tmp_path / "encoder", tmp_path / "of classifier")
    assert placed.notes[-1].endswith("2 of 2 adapter modules placed by how their names end")
    assert set(placed.changes) == {f"encoder.layer.{k}.attention.self.query.weight" for k in range(2)}
    placed = placed_on(tmp_path / "classifier", tmp_path / "of encoder")
    assert set(placed.changes) == {f"bert.encoder.layer.{k}.attention.self.query.weight" for k in range(2)}
    adapted(make, config).save_pretrained(tmp_path / "with head")
    with pytest.raises(InputError, match=r"1 of 3 adapter modules have no place in .*encoder: 'classifier'"):
        placed_on(tmp_path / "encoder", tmp_path / "with head")


@pytest.mark.parametrize(
    ("kind", "tower"), [(CLIPTextModel, "text_model"), (CLIPVisionModel, "vision_model")]
)
def test_of_one_tower(kind: Any, tower: str, tmp_path: Path) -> None:
    """By their names alone they have two places in CLIP; the adapter says of which class its model was."""
    made(clip).save_pretrained(tmp_path / "base")
    whole = CLIPConfig(text_config=TEXT, vision_config=VISION)

    def make() -> torch.nn.Module:
        return kind(whole.text_config if tower == "text_model" else whole.vision_config)  # type: ignore[no-any-return]

    assert not any(name.startswith(tower) for name in make().state_dict())
    adapted(make, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    placed = placed_on(tmp_path / "base", tmp_path / "adapter")
    assert set(placed.changes) == {f"{tower}.encoder.layers.{k}.self_attn.q_proj.weight" for k in range(2)}
    assert (
        placed.notes[-1]
        .split("adapter: ")[1]
        .startswith("2 of 2 adapter modules placed by their names in memory")
    )
    adapted(make, {"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}).save_pretrained(
        tmp_path / "unknown"
    )
    with pytest.raises(InputError, match=r"2 of 2 adapter modules have no place"):
        placed_on(tmp_path / "base", tmp_path / "unknown")


def test_tied_output_layer(tmp_path: Path) -> None:
    make = llama(tie_word_embeddings=True)
    made(make).save_pretrained(tmp_path / "base")
    config = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    adapted(make, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"'lm_head' has no tensor in .*, which ties it to its embedding"):
        placed_on(tmp_path / "base", tmp_path / "adapter")


def test_a_resized_embedding(tmp_path: Path) -> None:
    def longer() -> torch.nn.Module:
        model = llama()()
        model.resize_token_embeddings(44)
        return model

    made(llama()).save_pretrained(tmp_path / "base")
    adapted(longer, {"target_modules": ["q_proj", "embed_tokens"]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"embed_tokens\.weight: shape \(44, 16\), expected \(40, 16\)"):
        placed_on(tmp_path / "base", tmp_path / "adapter")
    model = adapted(longer, {"target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    with pytest.raises(InputError, match=r"shape \(44, 16\), expected \(40, 16\)"):
        placed_on(tmp_path / "base", tmp_path / "whole")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is set"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected an adapter of the unchanged base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    adapted(llama(), {"target_modules": ["q_proj"], **config}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=problem):
        open_checkpoint(tmp_path / "adapter")


def test_a_converted_pissa_adapter(tmp_path: Path) -> None:
    """PEFT makes a difference to the original base of it when it is told to, of twice the rank."""
    made(llama()).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    model = get_peft_model(made(llama()), config)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    placed = placed_on(tmp_path / "base", tmp_path / "adapter")
    assert {change.rank for change in placed.changes.values() if isinstance(change, Product)} == {8}
    loaded = PeftModel.from_pretrained(made(llama()), tmp_path / "adapter")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    check(placed, states(tmp_path / "base"), states(tmp_path / "merged"))


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    """PEFT adds the difference of out_proj twice."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)

    adapted(Attention, {"target_modules": ["attn"]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        InputError,
        match=r"of torch\.nn\.MultiheadAttention, where PEFT adds the difference of out_proj twice",
    ):
        open_checkpoint(tmp_path / "adapter")


def test_several_adapters_of_a_model(tmp_path: Path) -> None:
    """PEFT saves 'default' in the directory itself, others in folders."""
    model = adapted(llama(), {"target_modules": ["q_proj"]})
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "a")
    assert "'other'" in open_checkpoint(tmp_path / "a").notes[-1]
    opened = open_checkpoint(tmp_path / "a" / "other")
    assert opened.adapter and opened.adapter.modules == 2
    model.save_pretrained(tmp_path / "b", selected_adapters=["other"])
    with pytest.raises(
        InputError, match=r"b: adapters in folders \('other'\), expected one of them: .*b/other"
    ):
        open_checkpoint(tmp_path / "b")

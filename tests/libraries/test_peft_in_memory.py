"""Adapters of PEFT in memory: each is a version, and what PEFT has wrapped is the base."""

from __future__ import annotations

import copy
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, difference
from bits import same_bits
from library_models import MARKS, SCALE, finetuned
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.tensors.peft import adapters_of, plain_state

pytestmark = MARKS

Tensors = dict[str, torch.Tensor]
N = 8
TOKENS = torch.tensor([[5, 6, 7, 2]])


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapted(model: Any, n: int = N, dtype: torch.dtype | None = None, **fields: Any) -> PeftModel:
    """A model with n adapters, half of whose factors is the same in all. Their names are the numbers of layers, as well."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], **fields}
    names = [str(k) for k in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**copy.deepcopy(config)), adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, LoraConfig(**copy.deepcopy(config)))
    for k, name in enumerate(names):
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(k + 1)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if re.search(
                    rf"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.{name}(\.|$)", parameter_name
                ):
                    move = 0.1 * torch.randn(parameter.shape, generator=shared)
                    move += 0.03 * torch.randn(parameter.shape, generator=own)
                    parameter += move.to(parameter.dtype)
                    if dtype is not None:
                        parameter.data = parameter.data.to(dtype)
    return adapted


def check(merged: Any, expected: Tensors) -> None:
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(merged[name], tensor), name


def state(model: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differences(model: PeftModel, base: Tensors, scale: Callable[[str, int], float]) -> list[Tensors]:
    """What each adapter adds, written out: of linear layers and of embeddings."""
    found = []
    for _, _, tensors in adapters_of(model):
        own: Tensors = {}
        for key, a in tensors.items():
            kind = next((k for k in ("lora_A.weight", "lora_embedding_A") if key.endswith(k)), None)
            if kind is None:
                continue
            name = key.removeprefix(PREFIX).removesuffix(kind) + "weight"
            b = tensors[key.replace("_A", "_B")]
            wide = torch.float64 if torch.float64 in (a.dtype, base[name].dtype) else torch.float32
            d = difference(a, b, scale(name, len(a)), wide)
            own[name] = d if d.shape == base[name].shape and "embed" not in name else d.t().contiguous()
        found.append(own)
    return found


def merged_plainly(base: Tensors, found: list[Tensors], adapters_as: str = "difference") -> Tensors:
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for name in set().union(*found):
        b = base[name]
        models = [own.get(name, torch.zeros(b.shape)) for own in found]
        if adapters_as == "merged":
            models = [(b.to(d.dtype) + d).to(b.dtype) for d in models]
        expected[name] = plain_merge(b, models, SCALE, task_vectors=adapters_as == "difference")[0]
        assert not same_bits(expected[name], b)
    return expected


@pytest.mark.parametrize("adapters_as", ["difference", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_adapters_in_one_model(dtype: torch.dtype, adapters_as: Any) -> None:
    """Bit for bit: of a plain base, of the model itself, of its inner one and of a state dict; in any state of the adapters."""
    base, model = state(llama(dtype)), adapted(llama(dtype))
    expected = merged_plainly(base, differences(model, base, lambda name, r: 6 / r), adapters_as)
    inner = model.get_base_model()
    model.set_adapter("3")
    for versions in ([model], [inner]):
        for of in (llama(dtype), base, model, inner):
            check(nm.merge(of, versions, scale=SCALE, adapters_as=adapters_as), expected)
    model.disable_adapter_layers()
    check(nm.merge(model, [model], scale=SCALE, adapters_as=adapters_as), expected)
    merged = nm.merge(model, [model], scale=SCALE, adapters_as=adapters_as)
    assert merged._metadata.keys() == llama().state_dict()._metadata.keys()  # type: ignore[attr-defined]
    llama(dtype).load_state_dict(merged)


def test_in_place() -> None:
    """The base's layers are written, and no adapter."""
    base, model = state(llama()), adapted(llama())
    expected = merged_plainly(base, differences(model, base, lambda name, r: 6 / r))
    before = state(model)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    stats = nm.merge_(model, [model], scale=SCALE)
    check(plain_state(model), expected)
    assert len(stats.tensors) == 6 and 0 < stats.agreed < stats.elements
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == addresses[name]
        assert "lora_" not in name or same_bits(tensor, before[name])
    with torch.no_grad(), model.disable_adapter():
        assert model.eval()(TOKENS).logits.isfinite().all()
    unloaded = model.unload()
    check(unloaded.state_dict(), expected)
    assert unloaded.generate(TOKENS, max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_deltas() -> None:
    model = adapted(llama())
    expected = nm.merge(model, [model], scale=SCALE)
    before = state(model)
    delta = nm.consensus_delta(model, [model])
    assert delta.models == N
    with delta.live(model) as live:
        live.scale = SCALE
        check(plain_state(model), expected)
    check(model.state_dict(), before)
    delta.apply_(plain := llama(), SCALE)
    check(plain.state_dict(), expected)


def test_negation_of_one() -> None:
    model = adapted(llama(), 1)
    base = state(llama())
    [found] = differences(model, base, lambda name, r: 6 / r)
    nm.negate_(model, model, scale=SCALE)
    check(plain_state(model), merged_plainly(base, [found]))
    with pytest.raises(nm.InputError, match=r"^tau: 8 adapters, expected one$"):
        nm.negate_(llama(), adapted(llama()), scale=SCALE)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[str, int], float]]] = {
    "patterns": (
        llama,
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 1, "k_proj": 16},
         "use_rslora": True},
        lambda name, r: (1 if "down_proj" in name else 16 if "k_proj" in name else 6) / r**0.5,
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, lambda name, r: 6 / r),
    "GPT-2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        lambda name, r: 6 / r,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    make, fields, scale = KINDS[kind]
    torch.manual_seed(0)
    plain = make()
    base, model = state(plain), adapted(copy.deepcopy(plain), 3, **fields)
    expected = merged_plainly(base, differences(model, base, scale))
    check(nm.merge(model, [model], scale=SCALE), expected)
    nm.merge_(plain, [model], scale=SCALE)
    check(plain.state_dict(), expected)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


SAVED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear layers": (llama, {}),
    "saved modules": (llama, {"modules_to_save": ["lm_head", "norm"]}),
    "tokens": (llama, {"trainable_token_indices": [3, 1, 60]}),
    "biases of factors": (lambda: llama(bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "GPT-2": KINDS["GPT-2"][:2],
    "patterns": KINDS["patterns"][:2],
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_the_same_as_of_saved_adapters(kind: str, tmp_path: Path) -> None:
    """Live, by their paths, and in a merge of files."""
    make, fields = SAVED[kind]
    base = make()
    models = [adapted(copy.deepcopy(base), 1, **fields)]
    for k in (1, 2):
        models.append(copy.deepcopy(models[0]))
        with torch.no_grad():
            for name, parameter in models[k].named_parameters():
                if parameter.requires_grad:
                    own = torch.Generator().manual_seed(100 * k + len(name))
                    parameter += 0.02 * torch.randn(parameter.shape, generator=own).to(parameter.dtype)
    paths = [tmp_path / f"adapter-{k}" for k in range(3)]
    for model, path in zip(models, paths, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(path)
    paths = [next(path.rglob("adapter_config.json")).parent for path in paths]
    merged = nm.merge(base, models, scale=SCALE)
    check(nm.merge(base, paths, scale=SCALE), merged)
    check(nm.merge(models[1], [models[0], paths[1], models[2]], scale=SCALE), merged)
    full = finetuned(base, 5)
    with warnings.catch_warnings():
        # What only the full model changes.
        warnings.filterwarnings("ignore", "3 of 3 adapters have no", nm.MergeWarning)
        mixed = nm.merge(base, [models[0], full, *models[1:]], scale=SCALE)
        check(nm.merge(base, [paths[0], full.state_dict(), *paths[1:]], scale=SCALE), mixed)
    for name, tensor in base.state_dict().items():
        assert tensor.dtype == merged[name].dtype
    # A file may hold experts apart; what is loaded from it is the same.
    base.save_pretrained(tmp_path / "base")
    nm.merge_checkpoints(tmp_path / "base", paths, tmp_path / "out", scale=SCALE)
    check(type(base).from_pretrained(tmp_path / "out").state_dict(), merged)


@pytest.mark.parametrize("kind", SAVED)
def test_tensors_as_peft_saves_them(kind: str) -> None:
    """The same names and numbers, of several adapters and of one. PEFT loses layers that have a number for which one is named."""
    make, fields = SAVED[kind]
    plain = make()
    model = adapted(copy.deepcopy(plain), 1, **fields)
    [(name, _, tensors)] = adapters_of(model)
    theirs = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check(dict(sorted(tensors.items())), dict(sorted(theirs.items())))
    check(plain_state(model), state(plain))


def test_merged_at_the_moment() -> None:
    model, plain = adapted(llama(), 2), llama()
    before = nm.merge(model, [model], scale=SCALE)
    model.merge_adapter(["1"])
    for base, versions, where in ((model, [plain], "base"), (plain, [plain, model], r"finetuned\[1\]")):
        for function in (nm.merge, nm.merge_):
            with pytest.raises(
                nm.InputError, match=rf"^{where}: '1': merged into the base's weights at the moment"
            ):
                function(base, versions, scale=SCALE)
    model.unmerge_adapter()
    after = nm.merge(plain, [model], scale=SCALE)
    check(after, before)


def test_live_scale() -> None:
    model = adapted(llama(), 2)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
    layer.set_scale("1", 0.5)
    with pytest.raises(
        nm.InputError, match=r"^finetuned\[0\]: adapter '1': 'model.layers.1.self_attn.k_proj': scale 0.75"
    ):
        nm.merge(llama(), [model], scale=SCALE)
    make, fields = SAVED["experts"]
    model = adapted(make(), 1, **fields)
    model.get_submodule("base_model.model.model.layers.0.mlp.experts.base_layer").scaling["0"] = 0.5
    with pytest.raises(
        nm.InputError, match=r"adapter '0': 'model.layers.0.mlp.experts': scale 0.5 \(set_scale\), .* 1.5 "
    ):
        nm.merge(make(), [model], scale=SCALE)


class Parts(torch.nn.Module):
    def __init__(self, text: torch.nn.Module, other: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.text, self.other = text, other


def test_a_part_with_adapters() -> None:
    """A module one part of which is a model of PEFT: the names of that are its plain ones. With two such parts it is refused."""
    plain = nm.merge(llama(), [adapted(llama(), 2)], scale=SCALE)
    model = Parts(adapted(llama(), 2))
    check(nm.merge(model, [model], scale=SCALE), {f"text.{name}": t for name, t in plain.items()})
    nm.merge_(whole := Parts(llama()), [model], scale=SCALE)
    check(whole.text.state_dict(), plain)
    both = Parts(adapted(llama(), 1), adapted(llama(), 2))
    for base, models, where in ((both, [both], r"finetuned\[0\]"), (both, [Parts(llama(), llama())], "base")):
        with pytest.raises(
            nm.InputError, match=rf"^{where}: Parts with adapters in several parts \('0', '1'\)"
        ):
            nm.merge(base, models, scale=SCALE)


class Int8Params(torch.nn.Parameter):
    """As bitsandbytes has them: a state dict does not show the type."""


class Coded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = torch.nn.Linear(4, 4), Int8Params(torch.ones(4, 4).to(torch.int8), False)


def test_a_base_with_quantized_weights() -> None:
    """It is refused, though its adapters may be merged into another one."""
    model = adapted(Coded(), 1, target_modules=["linear"])
    for base in (Coded(), model):
        with pytest.raises(nm.InputError, match=r"^base\['table'\]: Int8Params: quantized weights"):
            nm.merge(base, [model], scale=SCALE)
    plain = {"linear.weight": torch.ones(4, 4), "linear.bias": torch.ones(4)}
    assert not same_bits(nm.merge(plain, [model], scale=SCALE)["linear.weight"], plain["linear.weight"])


def test_a_mixed_model() -> None:
    """Of LoRA alone it is as any other; another kind is refused by its name."""
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]), "0", mixed=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * ("lora_B" in name)
    base = state(llama())
    check(
        nm.merge(model, [model], scale=SCALE),
        merged_plainly(base, differences(model, base, lambda name, r: 6 / r)),
    )
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        nm.InputError, match=r"^finetuned\[0\]: adapter 'other': peft_type is 'LOHA', expected LORA"
    ):
        nm.merge(llama(), [model], scale=SCALE)


def test_biases_trained_in_place() -> None:
    """They are the base's own: only a base from before the training is one."""
    before = llama(bias=True)
    model = adapted(copy.deepcopy(before), 1, bias="all")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1
    with pytest.raises(
        nm.InputError,
        match=r"^finetuned\[0\]: adapter '0': 'model.layers.0.self_attn.q_proj.bias': trained in the memory of base",
    ):
        nm.merge(model, [model], scale=SCALE)
    merged = nm.merge(before, [model], scale=1.0)
    name = "model.layers.1.self_attn.v_proj.bias"
    b = before.state_dict()[name]
    assert same_bits(merged[name], plain_merge(b, [b + 0.1], 1.0)[0])


def test_tied_embeddings() -> None:
    model = adapted(llama(tied=True), 2, target_modules=["embed_tokens"])
    with pytest.warns(
        nm.MergeWarning,
        match="changes 'model.embed_tokens.weight', but not 'lm_head.weight', to which base ties it",
    ):
        merged = nm.merge(model, [model], scale=SCALE)
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA": (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "use_dora is set"),
    "LoHa": (LoHaConfig(r=2, target_modules=["q_proj"]), "peft_type is 'LOHA', expected LORA"),
    "IA3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type is 'IA3', expected LORA"),
    "PiSSA": (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "prompts": (
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PeftModelForCausalLM with adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    """As a version, and as the base, whose weights are not what they were with some of them."""
    config, message = REFUSED[kind]
    model = get_peft_model(llama(), copy.deepcopy(config))
    before = state(model)
    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=rf"^finetuned\[1\]: .*{message}"):
            function(llama(), [llama(), model], scale=SCALE)
        with pytest.raises(nm.InputError, match=rf"^base: .*{message}"):
            function(model, [llama()], scale=SCALE)
    check(model.state_dict(), before)


def test_a_wrong_base() -> None:
    model = adapted(llama(), 2)
    config = llama().config
    config.num_hidden_layers = 1
    with pytest.raises(
        nm.InputError, match=r"^finetuned\[0\]: adapter '0': 3 of 6 adapter modules have no place in base"
    ):
        nm.merge(LlamaForCausalLM(config), [model], scale=SCALE)
    config.num_hidden_layers, config.intermediate_size = 2, 64
    with pytest.raises(
        nm.InputError, match=r"adapter '0': .*down_proj.weight: shape \(32, 48\), expected \(32, 64\)"
    ):
        nm.merge(LlamaForCausalLM(config), [model], scale=SCALE)


def test_wrapped_again() -> None:
    """By DDP or a compiler, which put a name before all."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = adapted(llama(), 2)
    expected = nm.merge(model, [model], scale=SCALE)
    check(nm.merge(model, [Wrapper(model)], scale=SCALE), expected)
    with pytest.warns(nm.MergeWarning, match=r"by how (their )?names end"):
        merged = nm.merge(Wrapper(model), [model], scale=SCALE)
    check({name.removeprefix("module."): tensor for name, tensor in merged.items()}, expected)
    compiled: Any = torch.compile(model)
    with pytest.warns(nm.MergeWarning, match=r"by how (their )?names end"):
        merged = nm.merge(compiled, [compiled], scale=SCALE)
    check({name.removeprefix("_orig_mod."): tensor for name, tensor in merged.items()}, expected)


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "adapters.py"))
    assert "elements agree" in capsys.readouterr().out

"""What cannot be merged element by element: quantized weights and LoRA factors, told by names, types, shapes and configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .dtypes import INTEGER_DTYPES
from .errors import InputError, short_repr, some_names
from .schema import TensorSpec

_PACKED = INTEGER_DTYPES - {"BOOL"}

# Names of integers that are a part of quantized weights, and who writes them.
_PACKED_NAMES = (
    (re.compile(r"(^|[._])(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"(^|[._])(weight_packed|weight_zero_point|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"[._](absmax|quant_map|nested_absmax|nested_quant_map|weight_format)$|\.quant_state\."), "bitsandbytes"),
    (re.compile(r"[._:](_?qdata|int_data|_data|packed_weight|_packed_params)$|(^|\.)(tensor_impl|_weight_qdata)\b"), "torchao"),
    (re.compile(r"(^|\.)(W_q|Qidxs)$"), "HQQ or QuIP#"),
)  # fmt: skip

# Integers of two or more dimensions under such a name are weights, whoever writes them.
_WEIGHT = re.compile(r"(^|[._])(weight|kernel|w\d|[a-z]+_proj(_blocks|_scales)?)$")

# Names beside an integer tensor that hold its scales.
_SCALES = ("_scale", "_scales", "_scale_inv", ".scale", ".scales")
_SIBLING_SCALES = (
    "codebooks",
    "centroids",
    "SCB",
    "scale",
    "scales",
    "weight_scale",
    "weight_scales",
    "scale_weight",
)

# Counters that training moves; all else that is integer is equal in all versions, or no integer.
_COUNTERS = re.compile(
    r"(^|[._])(num_batches_tracked|num_updates|num_steps|n_averaged|steps?|steps_trained|global_step|iterations?|iter|epochs?|"
    r"counts?|counter|num_calls)$"
)

# Variances that BatchNorm and its kin keep: of torch, and of models that came from TensorFlow and Keras.
_VARIANCE = re.compile(r"(^|[._/])(running|moving)_(var|variance)$")

# Factors by the components of their names. What is after a factor's own word is an adapter's name.
_FACTOR = re.compile(
    r"(^|[._])(lora_[ABab]|lora_embedding_[AB]|lora_(?:up|down|left|right|mid)|lora_magnitude_vector|lora_E|"
    r"hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|oft_blocks|oft_[Rr]|boft_[RrsS]|vera_lambda_[bd]|vblora_\w+)($|\.)"
)
# One of these is in each name that is a factor's.
_WORDS = ("lora", "hada_", "lokr_", "oft_", "vera_")
# Words that mean a factor only beside each other, under something that is called LoRA.
_PARTNERS = {"down": "up", "A": "B", "a": "b", "left": "right"}
_UNDER_LORA = re.compile(r"^(.*lora\w*)[._](down|A|a|left)((?:\.weight)?)$", re.IGNORECASE)


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The quantization that a model's configuration names, as its tools call it; None if there is none."""
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            method = found.get("quant_method") if isinstance(found, Mapping) else None
            return f"{key} {short_repr(method)}" if method else key
    nested = (
        value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)
    )
    return next(filter(None, map(quantization_of, nested)), None)


def quantized_tensor(specs: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """The first tensor that is a part of quantized weights, and the reason; None if there is none."""
    for name, spec in specs.items():
        if spec.dtype in _PACKED and (reason := _quantized(name, spec, specs)):
            return name, reason
    return None


def _quantized(name: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> str | None:
    if not spec.shape:
        return None
    for pattern, tool in _PACKED_NAMES:
        if pattern.search(name):
            return f"{spec.dtype}: quantized weights as {tool} packs them"
    if len(spec.shape) > 1 and _WEIGHT.search(name):
        return f"{spec.dtype}: quantized weights"
    if len(spec.shape) < 2 or spec.dtype in ("I64", "U64"):  # these are indices
        return None
    parent = name.rpartition(".")[0]
    siblings = [f"{parent}.{s}" if parent else s for s in _SIBLING_SCALES]
    if any(n in specs for n in (*(name + end for end in _SCALES), *siblings)):
        return f"{spec.dtype}: quantized weights, with their scales beside them"
    return None


def is_counter(name: str, spec: TensorSpec) -> bool:
    """Whether an integer tensor may differ between a base and its versions: a flag or a counter."""
    return spec.dtype == "BOOL" or not spec.shape or bool(_COUNTERS.search(name))


def may_have_factors(names: Iterable[str]) -> bool:
    """Whether some of these names may be those of a low-rank adapter's factors: cheap, for 100,000 names."""
    text = "\n".join(map(str, names)).lower()
    return any(word in text for word in _WORDS)


def refuse_factors(specs: Mapping[str, TensorSpec], label: Callable[[str], str]) -> None:
    """Raise InputError for the first factor of a low-rank adapter. label names a tensor."""
    if (name := lora_factor(specs)) is not None:
        raise InputError(
            f"{label(name)}: {factor_advice(name) or 'a LoRA factor'}, expected whole weights, or an adapter as PEFT saves it, "
            "with adapter_config.json"
        )


# Factors of other libraries than PEFT, or of other methods than LoRA, and what can be done.
_ADVICE = (
    (re.compile(r"^(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\.(.*\.)?lora_[AB]\."),
     "a LoRA factor as diffusers save it: merge it into its model first (load_lora_weights, fuse_lora, save_pretrained)"),
    (re.compile(r"(^|[._])(hada_|lokr_)"), "a factor of LoHa or LoKr, as LyCORIS and PEFT have them: merge it into its model first"),
    (re.compile(r"(^|[._])(oft_|boft_|vera_|vblora_)"), "a factor of OFT, VeRA or VB-LoRA: merge it into its model first"),
    (re.compile(r"(^|\.)lora_magnitude_vector"), "the magnitudes of DoRA: merge it into its model first (merge_and_unload)"),
    (re.compile(r"(^|\.)lora_E($|\.)"), "a factor of AdaLoRA: merge it into its model first (merge_and_unload)"),
    (re.compile(r"(^|[._])lora_(unet|te\d?|transformer)_|[._]lora_(up|down|mid)(\.|$)"),
     "a LoRA factor as kohya's scripts name it: merge it into its model first (networks/merge_lora.py, or fuse_lora of diffusers)"),
    (re.compile(r"lora\w*[._](up|down)\.weight$"),
     "a LoRA factor as old diffusers name it: merge it into its model first (fuse_lora)"),
    (re.compile(r"(^|\.)lora_(embedding_)?[AB]\.\w+(\.weight)?$"),
     "a LoRA factor with the name of its adapter, as in the state dict of the whole model: save the adapter alone (save_pretrained)"),
    (re.compile(r"(^|[._])lora_([ab]|left|right)(\.|$)"), "a LoRA factor of another library than PEFT: merge it into its model first"),
)  # fmt: skip
_OF_PEFT = re.compile(r"(^|\.)(lora_[AB]\.(weight|bias)|lora_embedding_[AB])$")


def factor_advice(name: str) -> str | None:
    """What a factor is that is none of a LoRA adapter of PEFT, by its name, and what can be done; None of all other tensors."""
    found = next((advice for pattern, advice in _ADVICE if pattern.search(name)), None)
    return None if found != _ADVICE[0][1] and _OF_PEFT.search(name) else found


def refuse_packed(specs: Mapping[str, TensorSpec], label: Callable[[str], str]) -> None:
    """Raise InputError for the first tensor that is a part of quantized weights. label names a tensor."""
    if found := quantized_tensor(specs):
        name, reason = found
        raise InputError(f"{label(name)}: {reason}, expected floating-point weights")


def lora_factor(specs: Mapping[str, TensorSpec]) -> str | None:
    """The first tensor that is a factor of a low-rank adapter: B·A is what can be merged, not B and A. None if there is none."""
    if not may_have_factors(specs):
        return None
    for name in specs:
        if _FACTOR.search(name):
            return name
        if match := _UNDER_LORA.match(name):
            stem, word, end = match.groups()
            other = specs.get(f"{stem}{name[len(stem)]}{_PARTNERS[word]}{end}")
            if other and _share_rank(specs[name].shape, other.shape):
                return name
    return None


def _share_rank(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether the shapes are those of A (rank, in, …) and B (out, rank, …)."""
    return len(first) > 1 and len(second) > 1 and (first[0] == second[1] or first[1] == second[0])


def is_variance(name: str) -> bool:
    """Whether a tensor holds variances, of a BatchNorm or the like, whose square root is taken: it must not be below zero."""
    return name.endswith(("var", "variance")) and bool(_VARIANCE.search(name))


def variances_below_zero(names: Sequence[str]) -> str:
    """The line that tells of variances below zero."""
    return (
        f"{some_names(names)}: below zero somewhere after the merge, but the square root of a variance is taken: "
        "a network gives NaN there (exclude them, or estimate them anew)"
    )

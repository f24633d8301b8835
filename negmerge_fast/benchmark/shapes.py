"""Tensor shapes of models, written out from their architectures."""

from __future__ import annotations

from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def one_tensor(numel: int) -> Shapes:
    return {"weight": (numel,)}


def many_tensors(count: int, numel: int) -> Shapes:
    return {f"layers.{i}.weight": (numel,) for i in range(count)}


def vit_b_32() -> Shapes:
    """The paper's ViT-B/32: CLIP without the layers of its text transformer; 113,448,705 elements."""
    width, joint = 768, 512
    shapes: Shapes = {
        "positional_embedding": (77, joint),
        "text_projection": (joint, joint),
        "logit_scale": (),
        "token_embedding.weight": (49408, joint),
        "ln_final.weight": (joint,),
        "ln_final.bias": (joint,),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (50, width),
        "visual.proj": (width, joint),
        "visual.conv1.weight": (width, 3, 32, 32),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (width,), f"visual.{name}.bias": (width,)}
    for i in range(12):
        block = f"visual.transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
        }
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return shapes


def llama(layers: int, hidden: int, inner: int, keys: int, tied: bool, vocabulary: int = 128256) -> Shapes:
    """A Llama 3. keys: elements of one token's keys of all heads. tied: output and input share one embedding."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else {**shapes, "lm_head.weight": (vocabulary, hidden)}


LAYOUTS: dict[str, Callable[[], Shapes]] = {
    "2,000 tensors": lambda: many_tensors(2000, 1000),
    "2,000 large tensors": lambda: many_tensors(2000, 100_000),
    "ViT-B/32": vit_b_32,
    "Llama 1B": lambda: llama(16, 2048, 8192, 512, tied=True),  # Llama-3.2-1B, 1,235,814,400 elements
    "Llama 8B": lambda: llama(32, 4096, 14336, 1024, tied=False),  # Llama-3.1-8B, 8,030,261,248 elements
}

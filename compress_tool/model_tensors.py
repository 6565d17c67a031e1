"""Name and shape of every tensor of a model outside its routed experts, from config.json alone.

Sizes are those of a config that `model_config` has checked. D is the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_moesvd.format import Family, MoEShape

Shapes = dict[str, tuple[int, ...]]


def outer_tensors(family: Family, config: Mapping[str, Any], *, tied: bool) -> Shapes:
    """The tensors outside the decoder layers."""
    d, vocab = config["hidden_size"], config["vocab_size"]
    tensors: Shapes = {"model.embed_tokens.weight": (vocab, d)} | _norm(family, "model.norm", d)
    if "lm_head" in family.biases:
        tensors["lm_head.bias"] = (vocab,)
    return tensors if tied else tensors | {"lm_head.weight": (vocab, d)}


def attention_tensors(
    family: Family, config: Mapping[str, Any], layer: int, head_dim: int
) -> Shapes:
    """One decoder layer's norms and attention; `head_dim` is of the `grouped` kind only."""
    prefix, d = f"model.layers.{layer}", config["hidden_size"]
    tensors: Shapes = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= _norm(family, f"{prefix}.{norm}", d)
    if family.attention == "latent":
        sizes = _latent_attention(config, d)
    else:
        sizes = _grouped_attention(family, config, d, head_dim)
    return tensors | {f"{prefix}.self_attn.{name}": size for name, size in sizes.items()}


def mlp_tensors(prefix: str, width: int, hidden_size: int) -> Shapes:
    """A gated MLP that is not a routed expert."""
    return {
        f"{prefix}.gate_proj.weight": (width, hidden_size),
        f"{prefix}.up_proj.weight": (width, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, width),
    }


def block_tensors(
    family: Family, config: Mapping[str, Any], shape: MoEShape, layer: int, *, fused: bool
) -> Shapes:
    """Router and shared expert of an MoE layer, by their names in either layout."""
    experts, d = shape.num_experts, shape.hidden_size
    tensors: Shapes = {family.router_name.format(layer=layer): (experts, d)}
    if family.router_bias_name is not None:
        tensors[family.router_bias_name.format(layer=layer)] = (experts,)
    if family.shared is not None:
        prefix = family.block_prefix(layer)
        tensors |= mlp_tensors(f"{prefix}{family.shared.name}", family.shared.width(config), d)
        if family.shared.gate_name is not None:
            tensors[f"{prefix}{family.shared.gate_name}.weight"] = (1, d)
    if not fused:
        return tensors
    return {family.fused_name(layer, name): size for name, size in tensors.items()}


def _norm(family: Family, name: str, d: int) -> Shapes:
    kinds = ("weight", "bias") if "norm" in family.biases else ("weight",)
    return {f"{name}.{kind}": (d,) for kind in kinds}


def _grouped_attention(family: Family, config: Mapping[str, Any], d: int, head_dim: int) -> Shapes:
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    tensors: Shapes = {
        "q_proj.weight": (q_size, d),
        "k_proj.weight": (kv_size, d),
        "v_proj.weight": (kv_size, d),
        "o_proj.weight": (d, q_size),
    }
    if "qkv" in family.biases:
        tensors |= {"q_proj.bias": (q_size,), "k_proj.bias": (kv_size,), "v_proj.bias": (kv_size,)}
    if "o" in family.biases:
        tensors["o_proj.bias"] = (d,)
    if family.qk_norm == "head":
        tensors |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    if family.qk_norm == "full":
        tensors |= {"q_norm.weight": (q_size,), "k_norm.weight": (kv_size,)}
    return tensors


def _latent_attention(config: Mapping[str, Any], d: int) -> Shapes:
    heads, kv_rank, rope = (
        config[key] for key in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, v_size = config["qk_nope_head_dim"], config["v_head_dim"]
    tensors: Shapes = {
        "kv_a_proj_with_mqa.weight": (kv_rank + rope, d),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (nope + v_size), kv_rank),
        "o_proj.weight": (d, heads * v_size),
    }
    q_size, q_rank = heads * (nope + rope), config["q_lora_rank"]
    if q_rank is None:
        return tensors | {"q_proj.weight": (q_size, d)}
    return tensors | {
        "q_a_proj.weight": (q_rank, d),
        "q_a_layernorm.weight": (q_rank,),
        "q_b_proj.weight": (q_size, q_rank),
    }

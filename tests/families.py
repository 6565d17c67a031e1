"""Tiny random checkpoints of every family: transformers' own parameters under published names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import mixtral_config, mixtral_tensors, write_checkpoint
from vllm_moesvd.format import FAMILIES, PROJECTIONS, Family

BY_NAME = {family.name: family for family in FAMILIES}
NEW_FAMILIES = tuple(name for name in BY_NAME if name != "mixtral")

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 256,
    "dtype": "float32",
    "eos_token_id": 257,
    "hidden_act": "silu",
    "hidden_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 260,
}
_QWEN: dict[str, Any] = {
    "intermediate_size": 80,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
    "norm_topk_prob": False,
    "num_experts": 8,
}
_DEEPSEEK: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "intermediate_size": 80,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "routed_scaling_factor": 1.7,
    "topk_group": 1,
    "v_head_dim": 16,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": _QWEN | {"shared_expert_intermediate_size": 48},
    # Two heads of 64: the head size need not be 64 / 2.
    "qwen3_moe": _QWEN | {"head_dim": 64, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "phimoe": {
        "attention_bias": True,
        "intermediate_size": 32,
        "lm_head_bias": True,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_jitter_noise": 0.01,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "norm_topk_prob": False},
    "deepseek_v2": _DEEPSEEK | {"norm_topk_prob": False, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK
    | {
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 20,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
}


def family_config(name: str, **overrides: Any) -> dict[str, Any]:
    """A config.json of 3 layers, D=64, 8 or 12 experts of 32 or 64, top 3; one may be dense."""
    if name == "mixtral":
        return mixtral_config(**overrides)
    family = BY_NAME[name]
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    return _COMMON | names | _CONFIGS[name] | overrides


def family_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under published names, scaled so that activations stay O(1)."""
    if config["model_type"] == "mixtral":
        return mixtral_tensors(config, seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["dtype"])
    tensors: dict[str, torch.Tensor] = {}
    for name, size in sorted(_published_shapes(config).items()):
        values = torch.randn(size, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(size) == 1:
            values = 0.3 * values
        elif not name.startswith("model.embed_tokens"):
            gain = 2.0 if "down_proj" in name or ".gate.weight" in name else 1.0
            values = values * gain / size[-1] ** 0.5
        is_bias = name.endswith("e_score_correction_bias")
        tensors[name] = values.float() if is_bias else values.to(dtype)
    return tensors


def fused(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same checkpoint with all experts of a layer in two tensors."""
    family = _family(config)
    pattern, shape = family.layer_pattern(config), family.moe_shape(config)
    result = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        if not pattern.has_experts(layer):
            continue
        gate, up, down = (
            torch.stack(
                [result.pop(family.expert_tensor(layer, e, p)) for e in range(shape.num_experts)]
            )
            for p in PROJECTIONS
        )
        prefix = family.fused_prefix.format(layer=layer)
        block = family.block_prefix(layer)
        for name in [name for name in result if name.startswith(block)]:
            result[family.fused_name(layer, name)] = result.pop(name)
        result[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        result[f"{prefix}.down_proj"] = down
    return result


def tiny(path: Path, name: str, *, seed: int = 0, is_fused: bool = False, **overrides: Any) -> Path:
    """Write a complete random checkpoint of a family to `path` and return it."""
    config = family_config(name, **overrides)
    tensors = family_tensors(config, seed)
    return write_checkpoint(path, config, fused(config, tensors) if is_fused else tensors)


def _family(config: Mapping[str, Any]) -> Family:
    return next(f for f in FAMILIES if f.model_type == config["model_type"])


def _published_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters of transformers' model, its stacked experts taken apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = _family(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in range(config["num_hidden_layers"]):
        shapes = {family.published_name(layer, name): size for name, size in shapes.items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    shape = family.moe_shape(config)
    d, f = shape.hidden_size, shape.expert_width
    for layer in range(config["num_hidden_layers"]):
        prefix = family.experts_prefix.format(layer=layer)
        if shapes.pop(f"{prefix}.gate_up_proj", None) is None:
            continue
        del shapes[f"{prefix}.down_proj"]
        for expert in range(shape.num_experts):
            for projection in PROJECTIONS:
                size = (d, f) if projection == "down" else (f, d)
                shapes[family.expert_tensor(layer, expert, projection)] = size
    return shapes

"""The models of the serving bench, and what their sizes allow: bytes and operations per step.

A Mixtral-shaped model of random weights, and the same with factors of the sizes that
`compress_tool plan` chooses. Random factors compute another function; speed does not depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress_tool.checkpoint import open_checkpoint
from compress_tool.config import Recipe
from compress_tool.planning import first_plan
from compress_tool.sizing import chosen_layers
from vllm_moesvd.format import (
    CONFIG_KEY,
    FAMILIES,
    CheckpointSpec,
    FactoredSpec,
    LatentSpec,
    LayerSpec,
    MoEShape,
    NarrowSpec,
    layer_tensors,
    spec_to_json,
)

FAMILY: Final = next(family for family in FAMILIES if family.name == "mixtral")
BYTES: Final = 2
"""Of a bfloat16 number."""
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
}
"""Half of the width of Mixtral-8x7B's layers, same proportions: 3 GB in four layers. With two, more
than a third of a small model's step is what does not depend on its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one step must move and compute, weights only: bytes of them, and operations."""

    weight_bytes: float
    operations: float


def write_dense(path: Path) -> Path:
    """The dense model, unless it is there already."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _normal(size, generator) for name, size in _other_tensors().items()}
    for layer in range(CONFIG["num_hidden_layers"]):
        for expert in range(CONFIG["num_local_experts"]):
            d, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
            for projection, size in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                name = FAMILY.expert_tensor(layer, expert, projection)
                tensors[name] = _normal(size, generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return path


def planned_specs(dense: Path, method: str, ratio: float) -> dict[int, LayerSpec]:
    """What `compress_tool plan` says for the method and the share of all parameters removed.

    `auto` chooses narrow and latent layers by what it measures, which random weights have nothing
    of: here every second layer is narrow and the others are latent, each as its own plan says.
    """
    if method == "auto":
        parts = [planned_specs(dense, part, ratio) for part in ("narrow", "latent")]
        return {layer: parts[layer % 2][layer] for layer in parts[0]}
    checkpoint = open_checkpoint(dense, allow_factored=False)
    recipe = Recipe(method=method, ratio=ratio)
    plan = first_plan(checkpoint, recipe, chosen_layers(checkpoint, recipe))
    return dict(plan.specs)  # type: ignore[arg-type]


def write_factored(path: Path, dense: Path, specs: Mapping[int, LayerSpec]) -> Path:
    """A checkpoint with random factors; what is not experts is the dense model's."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    with safe_open(dense / "model.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in _other_tensors()}
    shape = FAMILY.moe_shape(CONFIG)
    for layer, spec in specs.items():
        for name, size in layer_tensors(spec, shape, FAMILY, layer).items():
            tensors[name] = _normal(size, generator)
    config = CONFIG | {
        "architectures": [FAMILY.factored_architecture],
        CONFIG_KEY: spec_to_json(CheckpointSpec(layers=specs)),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def step_work(specs: Mapping[int, LayerSpec | None], *, tokens: int, context: int) -> Work:
    """A step of `tokens` tokens that each look at `context` positions on average.

    The experts that a batch touches are taken as those of uniform routing.
    """
    shape = FAMILY.moe_shape(CONFIG)
    others = sum(
        torch.Size(size).numel()
        for name, size in _other_tensors().items()
        if name != "model.embed_tokens.weight"
    )
    heads = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    attention = 2 * heads * context * CONFIG["num_hidden_layers"]
    read, computed = float(others), float(others + attention)
    for layer in range(CONFIG["num_hidden_layers"]):
        layer_read, layer_computed = _layer_work(specs.get(layer), shape, tokens)
        read += layer_read
        computed += layer_computed
    return Work(weight_bytes=BYTES * read, operations=2 * tokens * computed)


def _layer_work(spec: LayerSpec | None, shape: MoEShape, tokens: int) -> tuple[float, float]:
    """Weights that a batch reads, and multiplications per token."""
    d, f, k = shape.hidden_size, shape.expert_width, shape.top_k
    missed = (1 - k / shape.num_experts) ** tokens
    touched = shape.num_experts * (1 - missed)
    if not isinstance(spec, FactoredSpec):
        width = f if spec is None else spec.width
        if not isinstance(spec, LatentSpec):
            return touched * 3 * d * width, k * 3 * d * width
        r, q = spec.rank_gate_up, spec.rank_down
        core, shared = (2 * r + q) * width, d * (r + q)
        return touched * core + shared, k * core + shared
    r, q, b = spec.rank_gate_up, spec.rank_down, spec.base_width
    u, v_in, v_down, base = 2 * f * r + d * q, 2 * r * d, q * f, 3 * b * d
    slots = touched * spec.num_slots / shape.num_experts
    if spec.num_groups == 1:
        return slots * u + v_in + v_down + base, k * (u + v_down) + v_in + base
    groups = touched * spec.num_groups / shape.num_experts
    return slots * u + groups * (v_in + v_down) + base, k * (u + v_in + v_down) + base


def form_of(spec: LayerSpec) -> str:
    """How a layer is called in the table, with its sizes."""
    if isinstance(spec, NarrowSpec):
        return f"narrow {spec.width}"
    name = f"{spec.form} {spec.rank_gate_up}/{spec.rank_down}"
    return name + (
        f" + base {spec.base_width}" if isinstance(spec, FactoredSpec) and spec.base_width else ""
    )


def _other_tensors() -> dict[str, tuple[int, ...]]:
    """Everything but routed experts."""
    c = CONFIG
    d, q = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (c["vocab_size"], d),
    }
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.self_attn.q_proj.weight": (q, d),
            f"{prefix}.self_attn.k_proj.weight": (kv, d),
            f"{prefix}.self_attn.v_proj.weight": (kv, d),
            f"{prefix}.self_attn.o_proj.weight": (d, q),
            f"{prefix}.input_layernorm.weight": (d,),
            f"{prefix}.post_attention_layernorm.weight": (d,),
            FAMILY.router_name.format(layer=layer): (c["num_local_experts"], d),
        }
    return sizes


def _normal(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Products of these keep the size of activations; vectors are the weights of norms."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) / size[-1] ** 0.5).bfloat16()

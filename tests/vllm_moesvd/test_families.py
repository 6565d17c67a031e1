"""Every served family inside vLLM's own model, block by block, against transformers' block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import BY_NAME, NEW_FAMILIES
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.hand_made import EXACT_LAYERS, ODD_LAYERS, HandMade, hand_made

CASES = {"exact": (EXACT_LAYERS, True), "odd": (ODD_LAYERS, False)}
SIZES: dict[str, dict[str, Any]] = {
    name: {
        BY_NAME[name].num_experts_keys[0]: 4,
        BY_NAME[name].expert_width_key: 96,
        "num_experts_per_tok": 2,
    }
    for name in NEW_FAMILIES
}
for _name in ("qwen2_moe", "qwen3_moe"):
    SIZES[_name]["mlp_only_layers"] = [0]


def transformers_blocks(made: HandMade, path: Path) -> list[torch.nn.Module]:
    """transformers' own MLP blocks of the dense twin, shared experts and routing included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        made.write_dense(path), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_every_layer_equals_transformers(name: str, kind: str, tmp_path: Path) -> None:
    layers, exact = CASES[kind]
    made = hand_made(layers, exact=exact, family=BY_NAME[name], **SIZES[name])
    config = harness.engine_config(made.write(tmp_path / kind))
    model = harness.load_model(config)
    blocks = transformers_blocks(made, tmp_path / "dense")
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer, block in enumerate(blocks):
        with torch.no_grad():
            expected = block(x_TD[None])[0] + made.bias.get(layer, torch.zeros(64))
        actual = harness.run_moe_block(model, config, layer, x_TD)
        assert are_close(actual, expected), (layer, distance(actual, expected))


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("qwen2_moe", "model.layers.{layer}.mlp.shared_expert_gate.weight"),
        ("deepseek_v2", "model.layers.{layer}.mlp.shared_experts.down_proj.weight"),
        ("deepseek_v3", "model.layers.{layer}.mlp.gate.e_score_correction_bias"),
    ],
)
def test_what_lies_beside_the_experts_matters(name: str, damaged: str, tmp_path: Path) -> None:
    """The null test: a shared expert that counts less, or another choice of experts, is seen."""
    made = hand_made(ODD_LAYERS, exact=False, family=BY_NAME[name], **SIZES[name])
    blocks = transformers_blocks(made, tmp_path / "dense")
    for layer in ODD_LAYERS:
        tensor = made.tensors[damaged.format(layer=layer)]
        tensor.copy_(tensor.flip(0) if tensor.dim() == 1 else 0.5 * tensor)
    config = harness.engine_config(made.write(tmp_path / "damaged"))
    model = harness.load_model(config)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in ODD_LAYERS:
        with torch.no_grad():
            expected = blocks[layer](x_TD[None])[0] + made.bias.get(layer, torch.zeros(64))
        assert not are_close(harness.run_moe_block(model, config, layer, x_TD), expected)


def test_a_routed_scale_is_applied_once(tmp_path: Path) -> None:
    """Twice the scale is twice the routed part, whatever the form of the layer."""
    family = BY_NAME["deepseek_v2"]
    outputs = []
    for scale in (1.0, 2.0):
        changes = SIZES[family.name] | {"routed_scaling_factor": scale}
        made = hand_made(EXACT_LAYERS, exact=True, family=family, **changes)
        config = harness.engine_config(made.write(tmp_path / f"{scale}"))
        outputs.append((harness.load_model(config), config, made))
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in EXACT_LAYERS:
        once, twice = (
            harness.run_moe_block(model, config, layer, x_TD) for model, config, _ in outputs
        )
        prefix = f"model.layers.{layer}.mlp.shared_experts"
        tensors = outputs[0][2].tensors
        gate, up, down = (
            tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        shared = (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
        assert torch.allclose(twice - shared, 2 * (once - shared), atol=1e-4)
        assert float((once - shared).abs().mean()) > 0.1

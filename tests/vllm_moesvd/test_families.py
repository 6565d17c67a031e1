"""Every served family inside vLLM's own model, block by block, against transformers' block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_tool.cli import main
from tests.families import BY_NAME, NEW_FAMILIES, tiny
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.engine_run import run_engines
from tests.vllm_moesvd.hand_made import EXACT_LAYERS, ODD_LAYERS, HandMade, hand_made
from tests.vllm_moesvd.oracle import Oracle, max_difference
from tests.vllm_moesvd.test_tensor_parallel import LAYERS, TP_SIZE, run_blocks

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
for _name in ("deepseek_v2", "deepseek_v3"):
    # The sum is one of the sizes that vLLM's latent attention takes.
    SIZES[_name] |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# As published for Phi-3.5-MoE, with 16 factors for heads of 32; engines here take 256 tokens.
PHI_PUBLISHED = {
    "input_jitter_noise": 0.01,
    "rope_parameters": None,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1 + 0.05 * i for i in range(16)],
        "long_factor": [1 + 0.4 * i for i in range(16)],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 256,
    },
    "rope_theta": 10000.0,
    "sliding_window": 131072,
}
# Of DeepSeek-V2 also the small model's routing, without groups.
VARIANTS = {name: (name, {}) for name in NEW_FAMILIES} | {
    "deepseek_v2-greedy": (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "phimoe-published": ("phimoe", PHI_PUBLISHED),
    "qwen2_moe-normalised": ("qwen2_moe", {"norm_topk_prob": True}),
    # transformers saves neither key of V3, and null for groups that V2 does not have.
    "deepseek_v2-saved": (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": None, "topk_group": None},
    ),
    "deepseek_v3-saved": ("deepseek_v3", {"scoring_func": None, "topk_method": None}),
    # vLLM renames this rope type in the config that it was given.
    "deepseek_v3-yarn": ("deepseek_v3", {"rope_parameters": YARN}),
}
LOGPROB_NOISE = {"grouped": 3e-6, "latent": 2.1e-5}
"""Twice the largest |Δ logprob| measured on these checkpoints (1.4e-6 and 1.05e-5), by attention:
the latent one multiplies its matrices in another order than transformers."""


def transformers_blocks(made: HandMade, path: Path) -> list[torch.nn.Module]:
    """transformers' own MLP blocks of the dense twin, shared experts and routing included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        made.write_dense(path), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_equals_transformers(variant: str, kind: str, tmp_path: Path) -> None:
    (name, changes), (layers, exact) = VARIANTS[variant], CASES[kind]
    made = hand_made(layers, exact=exact, family=BY_NAME[name], **SIZES[name] | changes)
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


def test_a_base_with_deltas_is_summed_with_the_shared_expert(tmp_path: Path) -> None:
    """What `run` writes for d2-moe, against transformers on what `export-dense` writes of it."""
    from transformers import AutoModelForCausalLM

    source, out, dense = (tmp_path / name for name in ("source", "out", "dense"))
    tiny(source, "qwen2_moe")
    words = ["--method", "d2-moe", "--ratio", "0.2", "--samples", "12", "--seq-len", "32"]
    assert main(["run", str(source), str(out), *words]) == 0
    assert main(["export-dense", str(out), str(dense)]) == 0
    config = harness.engine_config(out)
    model = harness.load_model(config)
    folded = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, experts_implementation="eager"
    )
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in range(3):
        with torch.no_grad():
            expected = folded.model.layers[layer].mlp(x_TD[None])[0]
        actual = harness.run_moe_block(model, config, layer, x_TD)
        assert are_close(actual, expected), (layer, distance(actual, expected))


@pytest.mark.slow
def test_real_engines_give_transformers_tokens(tmp_path: Path) -> None:
    variants = {name: (name, {}) for name in NEW_FAMILIES}
    for added in ("deepseek_v3-yarn", "phimoe-published"):
        variants[added] = VARIANTS[added]
    made = {
        variant: hand_made(ODD_LAYERS, exact=False, family=BY_NAME[name], **SIZES[name] | overrides)
        for variant, (name, overrides) in variants.items()
    }
    paths = [one.write(tmp_path / variant) for variant, one in made.items()]
    for (variant, one), found in zip(made.items(), run_engines(paths), strict=True):
        expected = Oracle(one, tmp_path / f"{variant}-dense").completions()
        noise = LOGPROB_NOISE[BY_NAME[variants[variant][0]].attention]
        assert max_difference(found, expected) <= noise, variant


@pytest.mark.slow
def test_three_processes_sum_the_shared_expert_once(tmp_path: Path) -> None:
    sizes = SIZES["qwen2_moe"] | {
        "mlp_only_layers": [],
        "moe_intermediate_size": 97,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 380,
        "hidden_size": 96,
    }
    made = hand_made(LAYERS, exact=False, family=BY_NAME["qwen2_moe"], **sizes)
    blocks = transformers_blocks(made, tmp_path / "dense")
    modes = ["sharded", "replicated", "joined_sharded", "joined_replicated"]
    work = run_blocks(made, tmp_path, TP_SIZE, modes)
    x_TD = load_file(work / "input.safetensors")["x_TD"]
    for rank in range(TP_SIZE):
        outputs = load_file(work / f"output-{rank}.safetensors")
        for layer in LAYERS:
            with torch.no_grad():
                expected = blocks[layer](x_TD[None])[0] + made.bias.get(layer, torch.zeros(96))
            for mode in modes:
                actual = outputs[f"{mode}.{layer}"]
                assert are_close(actual, expected), (layer, mode, distance(actual, expected))


def test_a_bias_and_a_routed_scale_in_half_precision_are_refused(tmp_path: Path) -> None:
    """In fp16 vLLM divides all but the routed output by the scale; a bias has no part in that."""
    made = hand_made(ODD_LAYERS, exact=False, family=BY_NAME["deepseek_v2"], **SIZES["deepseek_v2"])
    folder = made.write(tmp_path / "made")
    harness.build_model(harness.engine_config(folder, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"not supported in float16; use --dtype bfloat16"):
        harness.build_model(harness.engine_config(folder, dtype="float16"))

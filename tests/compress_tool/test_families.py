"""Every family through the audit, the streamed model and the statistics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, UnsupportedError
from compress_tool.factorize.problem import routed_output
from compress_tool.inspect import active_params
from compress_tool.packing import folded_expert
from compress_tool.probe import observed_layer
from compress_tool.promised import promised_checkpoint
from compress_tool.routing import rerouted
from compress_tool.streaming import StreamedModel
from tests.families import BY_NAME, NEW_FAMILIES, family_config, tiny


def transformers_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def random_ids(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BY_NAME)
def test_what_transformers_saves_is_what_the_audit_expects(name: str, tmp_path: Path):
    """The names and shapes of our table against the ones transformers itself writes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = family_config(name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    checkpoint = open_checkpoint(tmp_path / "saved", allow_factored=False)
    assert checkpoint.family.name == name
    assert checkpoint.total_params == sum(p.numel() for p in model.state_dict().values())
    routed = [p for n, p in model.named_parameters() if ".experts." in n]
    assert checkpoint.routed_params == sum(p.numel() for p in routed)
    assert len(checkpoint.moe_layers) == len(routed) // 2
    promised = promised_checkpoint(file)
    assert {n: i.shape for n, i in promised.tensors.items()} == {
        n: i.shape for n, i in checkpoint.tensors.items()
    }


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_logits_equal_transformers(name: str, is_fused: bool, tmp_path: Path):
    path = tiny(tmp_path / "model", name, is_fused=is_fused)
    ids_BS = random_ids(3, 17)
    with torch.no_grad():
        expected = transformers_model(tiny(tmp_path / "plain", name))(ids_BS).logits
    model = StreamedModel(open_checkpoint(path, allow_factored=False))
    hidden = model.embed(ids_BS)
    for layer in range(3):
        hidden = model.run_layer(layer, hidden, 2)
    assert torch.allclose(model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


def test_phi_as_published_equals_transformers(tmp_path: Path):
    """Longrope on both sides of its switch, under the keys that the published config has."""
    factors = {f"{kind}_factor": [1 + step * i for i in range(16)]
               for kind, step in (("short", 0.05), ("long", 0.4))}  # fmt: skip
    mscales = {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 64}
    published = {
        "rope_parameters": None,
        "rope_scaling": {"type": "longrope"} | factors | mscales,
        "rope_theta": 10000.0,
        "sliding_window": 131072,
        "input_jitter_noise": 0.01,
    }
    path = tiny(tmp_path / "model", "phimoe", **published)
    reference = transformers_model(path)
    model = StreamedModel(open_checkpoint(path, allow_factored=False))
    for length in (17, 100):
        ids_BS = random_ids(3, length)
        with torch.no_grad():
            expected = reference(ids_BS).logits
        hidden = model.embed(ids_BS)
        for layer in range(3):
            hidden = model.run_layer(layer, hidden, 2)
        assert torch.allclose(model.logits(hidden), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BY_NAME)
def test_statistics_are_what_the_experts_see(name: str, tmp_path: Path):
    """Inputs, choices, gates with every factor, and the output that follows from them."""
    path = tiny(tmp_path / "model", name)
    checkpoint = open_checkpoint(path, allow_factored=False)
    ids_BS = random_ids(4, 11)
    reference, streamed = transformers_model(path), StreamedModel(checkpoint)
    hidden = streamed.embed(ids_BS)
    seen: dict[int, tuple[Any, Any]] = {}
    for layer in checkpoint.moe_layers:
        experts = reference.get_submodule(checkpoint.family.fused_prefix.format(layer=layer))
        experts.register_forward_hook(
            lambda _, inputs, output, layer=layer: seen.update({layer: (inputs, output)})
        )
    with torch.no_grad():
        reference(ids_BS)
    for layer in range(checkpoint.num_layers):
        if layer not in checkpoint.moe_layers:
            streamed.run_layer(layer, hidden, 4)
            continue
        statistics = observed_layer(streamed, layer, hidden, 4, checkpoint.shape)
        (x_TD, index_TK, gate_TK), y_TD = seen[layer]
        assert torch.allclose(statistics.x_TD, x_TD, atol=1e-4)
        order, expected_order = statistics.index_TK.argsort(-1), index_TK.argsort(-1)
        assert torch.equal(statistics.index_TK.gather(1, order), index_TK.gather(1, expected_order))
        assert torch.allclose(
            statistics.gate_TK.gather(1, order), gate_TK.gather(1, expected_order), atol=1e-5
        )
        ours_TD = routed_output(
            statistics,
            lambda e, layer=layer: folded_expert(checkpoint, layer, e),
            torch.nn.functional.silu,
        )
        assert torch.allclose(ours_TD, y_TD, atol=2e-4)
        assert float(y_TD.abs().mean()) > 0.05


@pytest.mark.parametrize("name", BY_NAME)
def test_all_rows_of_the_router_route_as_before(name: str, tmp_path: Path):
    checkpoint = open_checkpoint(tiny(tmp_path / "model", name), allow_factored=False)
    layer = checkpoint.moe_layers[-1]
    model = StreamedModel(checkpoint)
    hidden = model.embed(random_ids(4, 11))
    for before in range(layer):
        model.run_layer(before, hidden, 4)
    statistics = observed_layer(model, layer, hidden, 4, checkpoint.shape)
    router = {n: checkpoint.read(f) for n, f in checkpoint.router_tensors(layer).items()}
    again = rerouted(checkpoint, layer, statistics, router)
    assert torch.equal(again.index_TK, statistics.index_TK)
    assert torch.allclose(again.gate_TK, statistics.gate_TK, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "named"),
    [
        ("qwen2_moe", {"qkv_bias": False}, UnsupportedError, "qkv_bias is False"),
        ("qwen2_moe", {"use_sliding_window": True}, UnsupportedError, "use_sliding_window"),
        ("qwen2_moe", {"head_dim": 16}, UnsupportedError, "head_dim is 16"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, UnsupportedError, "none of the 3 layers"),
        ("qwen2_moe", {"mlp_only_layers": 1}, InputError, "mlp_only_layers must be a list"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, InputError, "decoder_sparse_step"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, InputError, "shared_expert_inter"),
        ("qwen3_moe", {"num_local_experts": 4}, InputError, "are not the same number"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, UnsupportedError, "absent"),
        ("olmoe", {"clip_qkv": 8.0}, UnsupportedError, "clip_qkv is 8.0"),
        ("olmoe", {"norm_topk_prob": True}, UnsupportedError, "norm_topk_prob"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, UnsupportedError, "'group_limited_greedy'"),
        ("deepseek_v2", {"topk_method": "greedy"}, InputError, "uses all groups"),
        ("deepseek_v2", {"n_group": 5}, InputError, "12 experts are not 5 equal groups"),
        ("deepseek_v2", {"num_experts_per_tok": 7}, InputError, "less than top 7"),
        ("deepseek_v2", {"first_k_dense_replace": None}, InputError, "first_k_dense_replace"),
        ("deepseek_v2", {"kv_lora_rank": "x"}, InputError, "kv_lora_rank"),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError, "'sigmoid' or absent"),
        ("deepseek_v3", {"n_group": 12, "topk_group": 4}, InputError, "smaller than the 2"),
        ("deepseek_v3", {"moe_layer_freq": 2}, UnsupportedError, "moe_layer_freq is 2"),
        ("deepseek_v3", {"n_shared_experts": None}, InputError, "n_shared_experts"),
    ],
)
def test_what_has_not_been_tested_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], kind: type[Exception], named: str
):
    (tmp_path / "config.json").write_text(json.dumps(family_config(name) | changes))
    with pytest.raises(kind, match=re.escape(named)) as caught:
        promised_checkpoint(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_told_the_known_ones(tmp_path: Path):
    config = family_config("olmoe") | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError) as caught:
        promised_checkpoint(tmp_path / "config.json")
    assert all(family.architecture in str(caught.value) for family in BY_NAME.values())


def test_layers_follow_step_and_list(tmp_path: Path):
    """Of six layers every second has experts, and layer 3 is named as dense: 1 and 5 remain."""
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    path = tiny(tmp_path / "model", "qwen3_moe", **changes)
    checkpoint = open_checkpoint(path, allow_factored=False)
    assert checkpoint.moe_layers == (1, 5)
    model = transformers_model(path)
    found = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert found == [1, 5]


# Parameters of the published models, by their model cards: total, and per token.
PUBLISHED: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "mlp_only_layers": [],
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632,
            "vocab_size": 151936,
        },
        14.3e9,
        2.7e9,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "head_dim": 128,
            "hidden_size": 2048,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        },
        30.5e9,
        3.3e9,
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
        6.92e9,
        1.3e9,
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "topk_method": "greedy",
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        15.7e9,
        2.66e9,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "kv_lora_rank": 512,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "topk_group": 4,
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671e9,
        37.5e9,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_their_published_sizes(tmp_path: Path, model: str):
    name, changes, total, active = PUBLISHED[model]
    (tmp_path / "config.json").write_text(json.dumps(family_config(name, **changes)))
    checkpoint = promised_checkpoint(tmp_path / "config.json")
    assert checkpoint.total_params == pytest.approx(total, rel=0.005)
    assert active_params(checkpoint) == pytest.approx(active, rel=0.03)

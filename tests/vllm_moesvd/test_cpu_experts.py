"""Experts of latent and narrow layers on a CPU, packed or by vLLM, equal the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.hand_made import ODD_LAYERS, hand_made
from tests.vllm_moesvd.layer_math import layer_output, softmax_routing
from tests.vllm_moesvd.test_cpu_packed import TOKENS, routing
from vllm_moesvd import cpu_experts, cpu_pairs, cpu_products, reference

LATENT, NARROW = 1, 2
SIDES = {"packed": 0, "vLLM's kernel": 1 << 40}
"""The size from which experts are packed, by what then computes all of them."""


def random_experts(width: int, hidden: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    sizes = {"gate_EFD": (width, hidden), "up_EFD": (width, hidden), "down_EDF": (hidden, width)}
    return {
        name: torch.randn(6, *size, generator=generator) / size[-1] ** 0.5
        for name, size in sizes.items()
    }


def set_weights(layer: Any, weights: dict[str, torch.Tensor]) -> None:
    """As loading does: new parameters of the plain shapes."""
    both = torch.cat([weights["gate_EFD"], weights["up_EFD"]], dim=1)
    layer.w13_weight = torch.nn.Parameter(both, requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(weights["down_EDF"].clone(), requires_grad=False)


def skip_without_packing() -> None:
    layer = torch.nn.Module()
    layer.w = torch.nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    if cpu_products.pack(layer, [["w"]]) is None:
        pytest.skip("this CPU has no such product")


@pytest.mark.parametrize("portion", [1, cpu_pairs.PORTION_NUMBERS], ids=["each alone", "together"])
@pytest.mark.parametrize("width", [32, 45], ids=["whole vectors", "odd"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_operator(
    tokens: int, width: int, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the reference's dense experts; another process's pairs are left out."""
    skip_without_packing()
    monkeypatch.setattr(cpu_pairs, "PORTION_NUMBERS", portion)
    weights = random_experts(width)
    layer = torch.nn.Module()
    set_weights(layer, weights)
    packed = cpu_products.pack(layer, [["w13_weight"], ["w2_weight"]])
    assert packed is not None
    x_TD, index_TK, gate_TK = routing(tokens)
    arguments = list(packed.handlers), list(packed.rows)
    operator = torch.ops.moesvd.packed_experts
    target = reference.dense_experts(x_TD, index_TK, gate_TK, **weights)
    assert are_close(operator(x_TD, index_TK, gate_TK, *arguments), target)
    here_TK = index_TK < 3
    partial = operator(x_TD, torch.where(here_TK, index_TK, -1), gate_TK, *arguments)
    target = reference.dense_experts(x_TD, index_TK, gate_TK * here_TK, **weights)
    assert are_close(partial, target)
    assert not operator(x_TD, torch.full_like(index_TK, -1), gate_TK, *arguments).any()
    torch.library.opcheck(operator.default, (x_TD, index_TK, gate_TK, *arguments))


@pytest.fixture(params=SIDES)
def loaded(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, Any]:
    """A checkpoint, its model on one side of the threshold, and the engine's config."""
    skip_without_packing()
    monkeypatch.setattr(cpu_experts, "SMALL_EXPERT_BYTES", SIDES[request.param])
    made = hand_made(ODD_LAYERS, exact=False)
    config = harness.engine_config(made.write(tmp_path / "made"))
    model = harness.load_model(config)
    for layer in (LATENT, NARROW):
        is_packed = experts_of(model, layer).quant_method.packed is not None
        assert is_packed == (request.param == "packed")
    return made, model, config


def experts_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].block_sparse_moe.experts.routed_experts


def test_both_sides_of_the_threshold(loaded: tuple[Any, Any, Any]) -> None:
    made, model, config = loaded
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in (LATENT, NARROW):
        for tokens in (1, 40):
            x_tD = x_TD[:tokens]
            routed = softmax_routing(made, layer, x_tD)
            target = layer_output(made, ODD_LAYERS[layer], layer, x_tD, *routed)
            found = harness.run_moe_block(model, config, layer, x_tD)
            assert are_close(found, target), (layer, tokens, distance(found, target))


def test_other_weights_after_a_reload_and_experts_of_other_processes(
    loaded: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, config = loaded
    layer = experts_of(model, NARROW)
    method = layer.quant_method
    width = layer.moe_config.intermediate_size_per_partition
    weights = random_experts(width)
    set_weights(layer, weights)
    method.process_weights_after_loading(layer)
    x_TD, index_TK, gate_TK = routing(40)

    def apply() -> torch.Tensor:
        with harness.set_current_vllm_config(config), torch.no_grad():
            ids_TK = index_TK.to(torch.int32)
            found: torch.Tensor = method.apply(layer, x_TD, gate_TK, ids_TK, None, None)
        return found

    assert are_close(apply(), reference.dense_experts(x_TD, index_TK, gate_TK, **weights))
    # Numbers of experts on this process; a kernel that took -1 for a number would crash.
    expert_map = torch.tensor([-1, 1, -1, 3, 4, -1])
    monkeypatch.setattr(type(layer), "expert_map", property(lambda _: expert_map))
    here_TK = expert_map[index_TK] >= 0
    assert 0 < here_TK.sum() < here_TK.numel()
    target = reference.dense_experts(x_TD, index_TK, gate_TK * here_TK, **weights)
    assert are_close(apply(), target), distance(apply(), target)

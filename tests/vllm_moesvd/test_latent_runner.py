"""Router, V and shared experts of latent layers as one operator, inside vLLM's own blocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.families import BY_NAME
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.hand_made import ODD_LAYERS, HandMade, hand_made
from tests.vllm_moesvd.kernels.recorder import recording
from tests.vllm_moesvd.layer_math import layer_output, softmax_routing
from tests.vllm_moesvd.test_families import SIZES, transformers_blocks
from vllm_moesvd import kernels, latent_runner
from vllm_moesvd.kernels import tiles
from vllm_moesvd.kernels.plan import JOINED_HEIGHTS
from vllm_moesvd.latent_runner import IdleGate, LatentRunner, takes_shared

LATENT = 1
LAYERS = {LATENT: ODD_LAYERS[LATENT]}
MATRICES = {
    "mixtral": 2,
    "phimoe": 2,
    "olmoe": 2,
    "qwen3_moe": 2,
    "deepseek_v2": 3,
    "deepseek_v3": 3,
    "qwen2_moe": 4,
}
OWN_ROUTER = ("mixtral", "phimoe", "olmoe", "qwen2_moe")
"""Families whose block calls its router itself."""


def made_of(name: str) -> HandMade:
    return hand_made(LAYERS, exact=False, family=BY_NAME[name], **SIZES.get(name, {}))


def block_of(model: Any) -> Any:
    decoder = model.model.layers[LATENT]
    return decoder.block_sparse_moe if hasattr(decoder, "block_sparse_moe") else decoder.mlp


def load(made: HandMade, folder: Path, **arguments: Any) -> tuple[Any, Any]:
    config = harness.engine_config(made.write(folder), **arguments)
    with harness.plain_weights():
        return harness.load_model(config), config


@pytest.mark.parametrize("name", MATRICES)
def test_joined_products_give_the_same_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of(name)
    model, config = load(made, tmp_path / "made")
    assert harness.join_products(model) == 1
    met: list[int] = []
    operator = latent_runner.joined_linear

    def counted(x_TD: torch.Tensor, weights: list[torch.Tensor], wide: bool) -> Any:
        met.append(len(weights))
        return operator(x_TD, weights, wide)

    monkeypatch.setattr(latent_runner, "joined_linear", counted)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    actual = harness.run_moe_block(model, config, LATENT, x_TD)
    assert met == [MATRICES[name]]
    if name == "mixtral":
        routing = softmax_routing(made, LATENT, x_TD)
        expected = layer_output(made, LAYERS[LATENT], LATENT, x_TD, *routing)
    else:
        with torch.no_grad():
            expected = transformers_blocks(made, tmp_path / "dense")[LATENT](x_TD[None])[0]
        expected = expected + made.bias.get(LATENT, torch.zeros(64))
    assert are_close(actual, expected), distance(actual, expected)


@pytest.mark.parametrize("name", MATRICES)
def test_the_router_keeps_its_name_and_computes_once(name: str, tmp_path: Path) -> None:
    model, config = load(made_of(name), tmp_path / "made")
    block = block_of(model)
    assert isinstance(block.gate, IdleGate) == (name in OWN_ROUTER)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if f".{LATENT}." in n]
    assert sum("gate.weight" in n and "expert" not in n for n in names) == 1
    assert sum("shared_expert" in n and "gate_up" in n for n in names) == (MATRICES[name] > 2)
    calls: list[int] = []
    apply = block.gate.quant_method.apply
    block.gate.quant_method = SimpleNamespace(apply=lambda *given: calls.append(1) or apply(*given))
    harness.run_moe_block(model, config, LATENT, torch.randn(3, 64))
    assert calls == [1]


def prepared(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[LatentRunner, list[Any]]:
    """The runner after it was made ready on a machine that says it had a GPU."""
    runner = block_of(model).experts
    monkeypatch.setattr(kernels, "can_run", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(tiles, "device_arch", lambda index: "sm_90")
    runner.is_joined = None
    with recording() as launches:
        runner.prepare()
    return runner, launches


def test_loading_ends_with_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serving launches is compiled before; a reload of the weights compiles nothing."""
    model, config = load(made_of("qwen2_moe"), tmp_path / "made", dtype="bfloat16")
    runner, warm = prepared(model, monkeypatch)
    assert runner.is_joined is True
    assert [launch.arguments["BLOCK_M"] for launch in warm] == list(JOINED_HEIGHTS)
    for tokens in (1, 40):
        with recording() as met:
            x_TD = torch.zeros(tokens, 64, dtype=torch.bfloat16)
            harness.run_moe_block(model, config, LATENT, x_TD)
        assert {launch.identity for launch in met} < {launch.identity for launch in warm}
        assert len(met) == 1
    with recording() as again:
        runner.prepare()
    assert again == []


def test_the_joined_step_compiles_to_one_graph(tmp_path: Path) -> None:
    """As vLLM compiles a block: for any number of tokens, without a break."""
    model, _ = load(made_of("qwen2_moe"), tmp_path / "made")
    runner = block_of(model).experts
    torch._dynamo.reset()
    compiled = torch.compile(
        runner._project_jointly, fullgraph=True, backend="aot_eager", dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for tokens in (7, 64, 65):
            x_TD = torch.randn(tokens, 64)
            torch.testing.assert_close(compiled(x_TD), runner._project_jointly(x_TD))


@pytest.mark.parametrize("other", ["quantised", "of another type", "with a bias", "alone"])
def test_what_cannot_be_joined_is_left_to_the_modules(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(made_of("mixtral"), tmp_path / "made", dtype="bfloat16")
    gate = block_of(model).gate
    if other == "quantised":
        gate.quant_method = object()
    elif other == "of another type":
        gate.weight.data = gate.weight.data.float()
    elif other == "with a bias":
        gate.bias = torch.nn.Parameter(torch.zeros(4))
    else:
        object.__setattr__(block_of(model).experts, "router_gate", None)
    runner, launches = prepared(model, monkeypatch)
    assert runner.is_joined is False
    assert launches == []


def test_float32_and_cpus_are_left_to_the_modules(tmp_path: Path) -> None:
    model, _ = load(made_of("mixtral"), tmp_path / "made")
    assert block_of(model).experts.is_joined is False


def test_only_plain_shared_experts_are_taken_from_vllm(tmp_path: Path) -> None:
    model, _ = load(made_of("deepseek_v2"), tmp_path / "made")
    block = block_of(model)
    assert block.experts.shared_experts is None
    assert takes_shared(block.shared_experts)
    block.shared_experts.gate_up_proj.quant_method = object()
    assert not takes_shared(block.shared_experts)
    assert not takes_shared(torch.nn.Linear(2, 2))
    assert not takes_shared(None)

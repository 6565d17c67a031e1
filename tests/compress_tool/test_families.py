"""Every family through the audit, the streamed model and the statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.factorize.problem import routed_output
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
    saved = json.loads(file.read_text())
    # transformers forgets what it has no field for.
    saved |= {key: config[key] for key in ("scoring_func", "topk_method") if key in config}
    file.write_text(json.dumps(saved))
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

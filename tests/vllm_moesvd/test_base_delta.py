"""Form `base-delta`: a base that all experts share, plus factors; reference and operators agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm_moesvd.closeness import are_close
from tests.vllm_moesvd.hand_made import MIXTRAL, hand_made
from tests.vllm_moesvd.layer_math import softmax_routing
from vllm_moesvd import ops
from vllm_moesvd.base_ops import base_experts
from vllm_moesvd.format import (
    CheckpointSpec,
    FactoredSpec,
    FormatError,
    MoEShape,
    layer_tensors,
    parse_spec,
    spec_to_json,
)
from vllm_moesvd.reference import dense_experts, factored_experts

SHAPE = MoEShape(hidden_size=64, expert_width=96, num_experts=4, top_k=2)
OWN_V = FactoredSpec(
    rank_gate_up=7,
    rank_down=5,
    expert_slot=(2, 0, 3, 1),
    slot_group=(0, 1, 2, 3),
    base_width=37,
    form="base-delta",
)
SHARED_V = FactoredSpec(
    rank_gate_up=9,
    rank_down=11,
    expert_slot=(0, 1, 1, 2),
    slot_group=(0, 0, 0),
    base_width=96,
    form="base-delta",
)
SPECS = {"own-v": OWN_V, "shared-v": SHARED_V}


def factors(spec: FactoredSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.rpartition(".")[2]: torch.randn(size, generator=generator) / size[-1] ** 0.5
        for name, size in layer_tensors(spec, SHAPE, MIXTRAL, 0).items()
    }


def routing(tokens: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 64, generator=generator)
    top = torch.randn(tokens, 4, generator=generator).topk(2, dim=-1)
    return x_TD, top.indices, torch.softmax(top.values, dim=-1)


def reference(spec: FactoredSpec, f: dict[str, torch.Tensor], routed) -> torch.Tensor:
    return factored_experts(
        *routed,
        v_gate_GRD=f["v_gate"],
        v_up_GRD=f["v_up"],
        v_down_GQF=f["v_down"],
        u_gate_SFR=f["u_gate"],
        u_up_SFR=f["u_up"],
        u_down_SDQ=f["u_down"],
        expert_slot=spec.expert_slot,
        slot_group=spec.slot_group,
        base_gate_BD=f["base_gate"],
        base_up_BD=f["base_up"],
        base_down_DB=f["base_down"],
    )


@pytest.mark.parametrize("name", SPECS)
def test_the_reference_equals_dense_experts_of_the_summed_weights(name: str) -> None:
    spec, b = SPECS[name], SPECS[name].base_width
    f, routed = factors(spec), routing(23)
    dense = {p: [] for p in ("gate", "up", "down")}
    for slot in spec.expert_slot:
        group = spec.slot_group[slot]
        for p, weights in dense.items():
            weight = f[f"u_{p}"][slot] @ f[f"v_{p}"][group]
            if p == "down":
                weight[:, :b] += f["base_down"]
            else:
                weight[:b] += f[f"base_{p}"]
            weights.append(weight)
    expected = dense_experts(
        *routed,
        gate_EFD=torch.stack(dense["gate"]),
        up_EFD=torch.stack(dense["up"]),
        down_EDF=torch.stack(dense["down"]),
    )
    found = reference(spec, f, routed)
    assert are_close(found, expected)
    # Null test: without the base it is another function.
    bare = {**f, **{k: torch.zeros_like(v) for k, v in f.items() if k.startswith("base")}}
    assert not are_close(reference(spec, bare, routed), expected)


def test_the_spec_survives_json_and_wrong_widths_are_named() -> None:
    spec = CheckpointSpec(layers={0: OWN_V, 2: SHARED_V})
    assert parse_spec(spec_to_json(spec), SHAPE, 3) == spec
    for width in (0, 97, "3", None):
        value = spec_to_json(spec)
        value["layers"]["0"]["base_width"] = width
        with pytest.raises(FormatError, match="base_width"):
            parse_spec(value, SHAPE, 3)
    value = spec_to_json(spec)
    value["layers"]["0"]["form"] = "shared-v"
    with pytest.raises(FormatError, match="base_width"):
        parse_spec(value, SHAPE, 3)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "capturable"])
def test_the_operators_equal_the_reference(name: str, is_cpu: bool) -> None:
    spec = SPECS[name]
    f, (x_TD, index_TK, gate_TK) = factors(spec), routing(23)
    steps = ops.project_in, base_experts, ops.project_out
    if not is_cpu:
        steps = tuple(step._init_fn for step in steps)
    slot_TK, merged_TK = ops.merge_slots(torch.tensor(spec.expert_slot)[index_TK], gate_TK)
    z = steps[0](x_TD, slot_TK, f["v_gate"], f["v_up"], spec.slot_group)
    base_T2B = torch.stack([x_TD @ f["base_gate"].T, x_TD @ f["base_up"].T], dim=1)
    w, h_TB = steps[1](
        z, base_T2B, slot_TK, merged_TK, f["u_gate"], f["u_up"], f["v_down"], spec.slot_group
    )
    found = steps[2](w, slot_TK, merged_TK, f["u_down"]) + h_TB @ f["base_down"].T
    assert are_close(found, reference(spec, f, (x_TD, index_TK, gate_TK)))


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    f, (x_TD, index_TK, gate_TK) = factors(SHARED_V), routing(5)
    slot_TK, gate_TK = ops.merge_slots(torch.tensor(SHARED_V.expert_slot)[index_TK], gate_TK)
    z = ops.project_in(x_TD, slot_TK, f["v_gate"], f["v_up"], SHARED_V.slot_group)
    base_T2B = torch.stack([x_TD @ f["base_gate"].T, x_TD @ f["base_up"].T], dim=1)
    arguments = (f["u_gate"], f["u_up"], f["v_down"], list(SHARED_V.slot_group))
    torch.library.opcheck(base_experts, (z, base_T2B, slot_TK, gate_TK, *arguments))


def test_vllm_builds_loads_and_computes_it(tmp_path: Path) -> None:
    """Inside vLLM's own model, without an engine; the dense layers around it stay vLLM's."""
    pytest.importorskip("vllm")
    from tests.vllm_moesvd import harness

    layers = {1: OWN_V, 2: SHARED_V}
    made = hand_made(layers, exact=False)
    config = harness.engine_config(made.write(tmp_path / "made"))
    model = harness.load_model(config)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer, spec in layers.items():
        prefix = f"{MIXTRAL.experts_prefix.format(layer=layer)}.moesvd."
        f = {
            name.removeprefix(prefix): tensor
            for name, tensor in made.tensors.items()
            if name.startswith(prefix)
        }
        routed = (x_TD, *softmax_routing(made, layer, x_TD))
        expected = reference(spec, f, routed)
        assert are_close(harness.run_moe_block(model, config, layer, x_TD), expected)
        bare = {**f, "base_down": torch.zeros_like(f["base_down"])}
        assert not are_close(reference(spec, bare, routed), expected)

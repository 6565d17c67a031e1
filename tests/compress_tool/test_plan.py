"""The asked ratio is a promise: kept within the window, or refused with what is reachable."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_tool.errors import ResourceError
from compress_tool.plan import (
    RATIO_WINDOW,
    Budget,
    plan_ranks,
    size_rule,
    spec_params,
)
from vllm_moesvd.format import FAMILIES, FactoredSpec, LatentSpec, MoEShape, layer_tensors

FAMILY = FAMILIES[0]


def latent_rule(shape: MoEShape):
    def make(rank_gate_up: int, rank_down: int):
        return LatentSpec(rank_gate_up=rank_gate_up, rank_down=rank_down, width=shape.expert_width)

    return size_rule(make, shape, FAMILY, (shape.hidden_size, shape.hidden_size))


def svd_rule(shape: MoEShape):
    experts = tuple(range(shape.num_experts))

    def make(rank_gate_up: int, rank_down: int):
        return FactoredSpec(
            rank_gate_up=rank_gate_up,
            rank_down=rank_down,
            expert_slot=experts,
            slot_group=experts,
            form="svd",
        )

    smaller = min(shape.hidden_size, shape.expert_width)
    return size_rule(make, shape, FAMILY, (smaller, smaller))


def make_budget(shape: MoEShape, num_layers: int, other: int, ratio: float, of_experts=False):
    dense = 3 * shape.num_experts * shape.expert_width * shape.hidden_size
    return Budget(
        total_params=dense * num_layers + other,
        routed_params=dense * num_layers,
        dense_layer_params=dense,
        ratio=ratio,
        of_experts=of_experts,
    )


def test_the_rule_is_the_size_of_the_format():
    shape = MoEShape(hidden_size=48, expert_width=40, num_experts=5, top_k=2)
    for rule in (latent_rule(shape), svd_rule(shape)):
        for ranks in ((1, 1), (7, 30), (40, 3)):
            assert rule.params(ranks) == spec_params(rule.make_spec(*ranks), shape, FAMILY)


def test_spec_params_counts_every_tensor_by_hand():
    shape = MoEShape(hidden_size=10, expert_width=6, num_experts=3, top_k=1)
    spec = LatentSpec(rank_gate_up=4, rank_down=5, width=6, bias=True)
    by_hand = 4 * 10 + 10 * 5 + 10 + 3 * (6 * 4 + 6 * 4 + 5 * 6)
    assert spec_params(spec, shape, FAMILY) == by_hand
    assert len(layer_tensors(spec, shape, FAMILY, 0)) == 3 + 9


@settings(max_examples=150, deadline=None)
@given(
    hidden=st.sampled_from([64, 96, 128, 256, 1024]),
    width=st.sampled_from([64, 96, 384, 1408]),
    experts=st.sampled_from([4, 8, 64]),
    num_layers=st.integers(1, 40),
    other=st.integers(0, 2_000_000),
    ratio=st.floats(0.01, 0.95),
    of_experts=st.booleans(),
    rule=st.sampled_from([latent_rule, svd_rule]),
)
def test_the_ratio_is_kept_or_refused(
    hidden, width, experts, num_layers, other, ratio, of_experts, rule
):
    shape = MoEShape(hidden_size=hidden, expert_width=width, num_experts=experts, top_k=2)
    budget = make_budget(shape, num_layers, other, ratio, of_experts)
    rules = {layer: rule(shape) for layer in range(num_layers)}
    try:
        specs = plan_ranks(budget, rules)
    except ResourceError as error:
        reachable = [float(x) for x in re.findall(r"0\.\d{4}", str(error))]
        assert reachable, "the refusal names what is reachable"
        return
    removed = budget.dense_layer_params * num_layers - sum(
        spec_params(spec, shape, FAMILY) for spec in specs.values()
    )
    assert ratio - 1e-9 <= budget.achieved(removed) <= ratio + RATIO_WINDOW + 1e-9
    ranks = [spec.rank_gate_up for spec in specs.values()]
    step = max(1, max(rules[0].max_gate_up, rules[0].max_down) // 32)
    assert max(ranks) - min(ranks) <= step


def test_the_named_reachable_maximum_is_reachable():
    shape = MoEShape(hidden_size=128, expert_width=384, num_experts=8, top_k=2)
    rules = {layer: latent_rule(shape) for layer in range(8)}
    with pytest.raises(ResourceError, match="ask for at most") as caught:
        plan_ranks(make_budget(shape, 8, 1_000_000, 0.95), rules)
    named = float(re.findall(r"at most (0\.\d+)", str(caught.value))[0])
    plan_ranks(make_budget(shape, 8, 1_000_000, named), rules)


def test_ranks_of_a_large_model_are_multiples_of_a_tile():
    shape = MoEShape(hidden_size=4096, expert_width=14336, num_experts=8, top_k=2)
    specs = plan_ranks(
        make_budget(shape, 32, 1_604_000_000, 0.4), {i: latent_rule(shape) for i in range(32)}
    )
    assert all(spec.rank_gate_up % 128 == 0 for spec in specs.values())

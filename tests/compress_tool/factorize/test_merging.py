"""Merged U: least squares over a cluster, clusters of experts that act alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.alignment import aligned_orders
from compress_tool.factorize.merging import (
    average_linkage,
    merged_slots,
    provisional_slots,
    solve_merged,
)
from compress_tool.factorize.moe_svd import MoESVDOptions, solve_moe_svd
from compress_tool.factorize.problem import LayerProblem, relative_error
from tests.compress_tool.factorize.problems import make_problem
from tests.compress_tool.factorize.test_forms import dense_output, fold, output

FULL = (20, 20)
"""The paper's V comes from an SVD of one expert: rank 20 of 24 inputs is all it has."""


def merge(problem: LayerProblem, k: int, ranks=FULL, groups: int = 1):
    options = MoESVDOptions(combine="merge", k=k, groups=groups)
    slot_group = provisional_slots(problem.shape.num_experts, options)[1]
    slots = merged_slots(problem, *ranks, options)
    return solve_merged(problem, *ranks, slots, slot_group)


def with_twins(problem: LayerProblem, *, shuffle: bool = False, noise: float = 0.0) -> LayerProblem:
    """Experts 3, 4, 5 are copies of 0, 1, 2, if asked with their neurons in another order."""
    order = torch.arange(20)
    if shuffle:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(5)
    jitter = [1 + noise * torch.randn(20, 1, generator=g) for _ in range(3)]

    def experts(expert: int):
        gate, up, down = problem.experts(expert % 3)
        if expert < 3:
            return gate, up, down
        return (gate * jitter[expert - 3])[order], up[order], down[:, order]

    return dataclasses.replace(problem, experts=experts)


@pytest.mark.parametrize("shuffle", [False, True])
def test_merging_identical_experts_costs_nothing(shuffle: bool):
    problem = with_twins(make_problem(hidden=20, tokens=3000), shuffle=shuffle)
    y = dense_output(problem)
    factors = merge(problem, 3)
    assert factors.expert_slot == (0, 1, 2, 0, 1, 2)
    assert relative_error(y, output(problem, factors)) < 1e-10
    # Null test: one slot fewer joins experts that differ.
    assert relative_error(y, output(problem, merge(problem, 2))) > 1e-3


def test_experts_nearly_alike_are_found_at_a_low_rank():
    problem = with_twins(make_problem(hidden=20, tokens=3000), shuffle=True, noise=0.02)
    factors = merge(problem, 3, ranks=(8, 8))
    assert factors.expert_slot == (0, 1, 2, 0, 1, 2)
    y = dense_output(problem)
    found, apart = (
        relative_error(y, output(problem, merge(problem, k, ranks=(8, 8)))) for k in (3, 0)
    )
    # Null test: other clusters of the same size.
    other = solve_merged(problem, 8, 8, (0, 0, 1, 1, 2, 2), (0, 0, 0))
    assert apart < found < 1.2 * apart
    assert found < 0.7 * relative_error(y, output(problem, other))


def test_identical_experts_give_the_single_expert_result():
    problem = make_problem(identical=True)
    y = dense_output(problem)
    alone = merge(problem, 0, ranks=(9, 9))
    one = merge(problem, 1, ranks=(9, 9))
    assert one.expert_slot == (0,) * 6
    # All experts have one function: a fit of the expert on everybody's tokens, not twice of it.
    alone_error = relative_error(y, output(problem, alone))
    assert alone_error < relative_error(y, output(problem, one)) < 1.4 * alone_error
    full = fold(merge(make_problem(identical=True, hidden=20), 1), 0)
    for weight, dense in zip(full, make_problem(identical=True, hidden=20).experts(0), strict=True):
        torch.testing.assert_close(weight, dense, atol=1e-5, rtol=1e-4)


def test_the_centroid_has_zero_gradient():
    problem = make_problem()
    factors = merge(problem, 2, ranks=(7, 7))
    v = factors.v_gate_GRD[0].double()
    top = int(problem.statistics.counts_E.argmax())
    orders = aligned_orders(problem, [top, *(e for e in range(6) if e != top)])
    for slot in range(2):
        members = [e for e in range(6) if factors.expert_slot[e] == slot]
        gradient = torch.zeros(20, 7, dtype=torch.float64)
        scale = torch.zeros(20, 7, dtype=torch.float64)
        for expert in members:
            x = problem.input_rows(expert).double()
            weight = problem.experts(expert)[0].double()[orders[expert]]
            carried = x.T @ (x @ v.T)
            gradient += (weight - factors.u_gate_SFR[slot].double() @ v) @ carried
            scale += weight @ carried
        assert gradient.norm() / scale.norm() < 1e-5


def test_more_clusters_never_fit_worse_on_the_weights():
    problem = make_problem()
    y = dense_output(problem)
    errors = [relative_error(y, output(problem, merge(problem, k))) for k in (1, 2, 3, 5, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_merging_beats_the_printed_trimming_at_equal_size():
    problem = make_problem()
    y = dense_output(problem)
    merged = merge(problem, 2, ranks=(10, 10))
    for combine in ("eq8", "mean"):
        printed = solve_moe_svd(problem, 10, 10, MoESVDOptions(combine=combine))
        assert printed.spec.num_slots == merged.spec.num_slots
        lost = relative_error(y, output(problem, printed))
        assert relative_error(y, output(problem, merged)) < 0.7 * lost


def test_the_sizes_are_known_before_the_clusters():
    problem = make_problem()
    for k, groups in ((0, 1), (1, 1), (2, 2), (2, 3), (4, 2), (9, 1)):
        options = MoESVDOptions(combine="merge", k=k, groups=groups)
        expert_slot, slot_group = provisional_slots(6, options)
        found = merged_slots(problem, 5, 5, options)
        assert sorted(set(found)) == sorted(set(expert_slot)) == list(range(len(slot_group)))
        # Groups stay apart: an expert's slot is one of its own group.
        assert [slot_group[slot] for slot in found] == [slot_group[s] for s in expert_slot]
        spec = solve_merged(problem, 5, 5, found, slot_group).spec
        assert (spec.num_slots, spec.num_groups) == (len(slot_group), groups)


@pytest.mark.parametrize("tokens", [2, 7])
def test_unrouted_experts_and_few_tokens_stay_finite(tokens: int):
    for problem in (make_problem(tokens=tokens), make_problem(used=2)):
        factors = merge(problem, 2, ranks=(9, 9))
        for expert in range(6):
            for weight in fold(factors, expert):
                assert bool(torch.isfinite(weight).all())


def test_average_linkage_joins_the_closest():
    distance = torch.tensor([[0.0, 5, 1, 9], [5, 0, 7, 2], [1, 7, 0, 8], [9, 2, 8, 0]])
    assert average_linkage(distance, 4) == (0, 1, 2, 3)
    assert average_linkage(distance, 3) == (0, 1, 0, 2)
    assert average_linkage(distance, 2) == (0, 1, 0, 1)
    assert average_linkage(distance, 1) == (0, 0, 0, 0)
    # Means over pairs, not the nearest pair: 2 is closer to (0, 1) by its best pair alone.
    chain = torch.tensor([[0.0, 1, 9, 9], [1, 0, 3, 9], [9, 3, 0, 4], [9, 9, 4, 0]])
    assert average_linkage(chain, 2) == (0, 0, 1, 1)

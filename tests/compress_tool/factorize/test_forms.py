"""Layer solvers: full rank is the identity, order is irrelevant, the printed method is literal."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.latent import solve_latent
from compress_tool.factorize.moe_svd import MoESVDOptions, solve_moe_svd, trimmed_experts
from compress_tool.factorize.problem import relative_error, routed_output
from compress_tool.factorize.sensitivity import measure_layer
from compress_tool.factorize.shared_v import contiguous_groups, solve_shared_v
from compress_tool.factors import LatentFactors, LayerFactors, SharedFactors
from tests.compress_tool.factorize.problems import make_problem


def fold(factors: LayerFactors, expert: int):
    if isinstance(factors, LatentFactors):
        return (
            factors.gate_EFR[expert] @ factors.v_gate_up_RD,
            factors.up_EFR[expert] @ factors.v_gate_up_RD,
            factors.q_DR @ factors.down_ERF[expert],
        )
    assert isinstance(factors, SharedFactors)
    slot = factors.expert_slot[expert]
    group = factors.slot_group[slot]
    return (
        factors.u_gate_SFR[slot] @ factors.v_gate_GRD[group],
        factors.u_up_SFR[slot] @ factors.v_up_GRD[group],
        factors.u_down_SDR[slot] @ factors.v_down_GRF[group],
    )


def output(problem, factors: LayerFactors) -> torch.Tensor:
    y = routed_output(problem.statistics, lambda e: fold(factors, e), problem.activation)
    if isinstance(factors, LatentFactors) and factors.bias_D is not None:
        y = y + factors.bias_D
    return y


def dense_output(problem) -> torch.Tensor:
    return routed_output(problem.statistics, problem.experts, problem.activation)


def solve(problem, form: str, ranks: tuple[int, int]) -> LayerFactors:
    if form == "latent":
        return solve_latent(problem, dense_output(problem), *ranks).factors
    if form == "latent-centred":
        return solve_latent(problem, dense_output(problem), *ranks, centre=True).factors
    groups = {"shared-v": 1, "two-groups": 2, "svd": problem.shape.num_experts}[form]
    return solve_shared_v(problem, *ranks, num_groups=groups).factors


FORMS = ["latent", "latent-centred", "shared-v", "two-groups", "svd"]


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_is_the_identity(form):
    problem = make_problem()
    full_down = 24 if form.startswith("latent") else 20
    factors = solve(problem, form, (24, full_down))
    # Measured 4e-13 in fp32 factors; a swapped expert or zeros give O(1).
    assert relative_error(dense_output(problem), output(problem, factors)) < 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_zeros_swapped_experts_and_a_dropped_token_fail_the_identity_test(form):
    problem = make_problem()
    y = dense_output(problem)
    assert relative_error(y, torch.zeros_like(y)) == 1.0
    swapped = routed_output(
        problem.statistics, lambda e: problem.experts({0: 1, 1: 0}.get(e, e)), problem.activation
    )
    assert relative_error(y, swapped) > 1e-3
    dropped = y.clone()
    dropped[-1] = 0
    assert relative_error(y, dropped) > 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_error_falls_with_rank(form):
    problem = make_problem()
    y = dense_output(problem)
    errors = [
        relative_error(y, output(problem, solve(problem, form, (r, min(r, 20)))))
        for r in (4, 10, 16, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.0


def test_latent_down_reaches_its_predicted_tail():
    problem = make_problem()
    y = dense_output(problem)
    for centre in (False, True):
        solution = solve_latent(problem, y, 24, 9, centre=centre)
        measured = relative_error(y, output(problem, solution.factors))
        assert measured == pytest.approx(solution.predicted_down, rel=1e-5)


def test_centring_gains_at_most_one_rank():
    problem = make_problem()
    y = dense_output(problem)
    plain, centred, more = (
        solve_latent(problem, y, 24, rank, centre=centre).predicted_down
        for rank, centre in ((9, False), (9, True), (10, False))
    )
    assert more <= centred <= plain


def test_permuting_experts_permutes_the_solution():
    problem = make_problem()
    order = [3, 0, 5, 1, 4, 2]
    inverse = torch.tensor([order.index(e) for e in range(6)])
    statistics = dataclasses.replace(
        problem.statistics, index_TK=inverse[problem.statistics.index_TK]
    )
    permuted = dataclasses.replace(
        problem, statistics=statistics, experts=lambda e: problem.experts(order[e])
    )
    for form in ("latent", "shared-v", "svd"):
        a, b = (output(p, solve(p, form, (9, 9))) for p in (problem, permuted))
        assert relative_error(a, b) < 1e-9


def test_permuting_neurons_changes_nothing_in_the_latent_form():
    problem = make_problem()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))

    def shuffled(expert):
        gate, up, down = problem.experts(expert)
        return gate[order], up[order], down[:, order]

    permuted = dataclasses.replace(problem, experts=shuffled)
    a, b = (output(p, solve(p, "latent", (9, 9))) for p in (problem, permuted))
    assert relative_error(a, b) < 1e-9


def test_orthogonal_experts_stay_distinct_functions():
    problem = make_problem()
    factors = solve(problem, "shared-v", (12, 12))
    assert isinstance(factors, SharedFactors)
    assert len(set(factors.expert_slot)) == 6
    folded = [torch.cat([w.flatten() for w in fold(factors, e)]) for e in range(6)]
    for a in range(6):
        for b in range(a):
            assert (folded[a] - folded[b]).norm() > 0.1 * folded[a].norm()


@pytest.mark.parametrize("used", [2, 3])
@pytest.mark.parametrize("tokens", [2, 7, 200])
@pytest.mark.parametrize("form", FORMS)
def test_unrouted_experts_and_few_tokens_stay_finite(form, tokens, used):
    problem = make_problem(tokens=tokens, used=used)
    factors = solve(problem, form, (9, 9))
    for expert in range(6):
        for weight, dense in zip(fold(factors, expert), problem.experts(expert), strict=True):
            assert torch.isfinite(weight).all()
            assert weight.norm() < 10 * dense.norm()


def test_trimming_follows_frequency_and_fills_with_its_own():
    frequency = torch.tensor([0.5, 0.3, 0.2, 0.2])
    assert trimmed_experts(frequency, [0, 1, 2, 3], 2) == {0: [0], 1: [0, 1], 2: [0, 1], 3: [0, 1]}
    assert trimmed_experts(frequency, [0, 1], 0) == {0: [0], 1: [1]}
    assert trimmed_experts(frequency, [2, 3], 2) == {2: [2], 3: [3]}


def test_groups_are_contiguous_and_even():
    assert contiguous_groups(8, 2) == (0, 0, 0, 0, 1, 1, 1, 1)
    assert contiguous_groups(5, 2) == (0, 0, 0, 1, 1)


def test_printed_moe_svd_doubles_identical_experts_and_the_mean_does_not():
    """Defect 2: eq. 8 has no 1/k, so identical experts come out twice as large."""
    problem = make_problem(identical=True)
    # Every expert sees the same tokens; zero tokens make the frequencies 0 > 1 > 2 > … without
    # changing a Gram.
    x_TD = torch.cat([problem.statistics.x_TD[:400].repeat(6, 1), torch.zeros(15, 24)])
    extra = [expert for expert in range(6) for _ in range(5 - expert)]
    index_T = torch.cat([torch.arange(6).repeat_interleave(400), torch.tensor(extra)])
    statistics = dataclasses.replace(
        problem.statistics, x_TD=x_TD, index_TK=index_T[:, None], gate_TK=torch.ones(2415, 1)
    )
    problem = dataclasses.replace(problem, statistics=statistics)
    dense = problem.experts(5)[0]
    for combine, factor in (("eq8", 2.0), ("alg3", 4.0), ("mean", 1.0), ("frequency", 1.0)):
        factors = solve_moe_svd(problem, 20, 20, MoESVDOptions(combine=combine))
        torch.testing.assert_close(fold(factors, 5)[0], factor * dense, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(fold(factors, 0)[0], dense, atol=1e-4, rtol=1e-3)


def test_printed_moe_svd_collapses_to_two_functions():
    """Defect 3: with k = 2 all experts below the first are one function."""
    factors = solve_moe_svd(make_problem(), 8, 8, MoESVDOptions())
    assert factors.spec.num_slots == 2
    assert sorted(factors.expert_slot).count(0) in (1, 5)


def test_printed_moe_svd_without_trimming_and_own_whitening_is_exact_for_the_top_expert():
    problem = make_problem()
    factors = solve_moe_svd(problem, 20, 20, MoESVDOptions(k=0, whitening="expert"))
    top = int(problem.statistics.counts_E.argmax())
    for weight, dense in zip(fold(factors, top), problem.experts(top), strict=True):
        torch.testing.assert_close(weight, dense, atol=1e-5, rtol=1e-4)
    assert factors.spec.num_groups == 6


def test_the_printed_sharing_depends_on_signs_that_the_weights_do_not_fix():
    """Defect 4: flipping (u, v) pairs leaves U Σ Vᵀ alone and changes U_i Σ_i V_s."""
    problem = make_problem()
    u, sigma, v = torch.linalg.svd(problem.experts(1)[0], full_matrices=False)
    shared = torch.linalg.svd(problem.experts(0)[0], full_matrices=False)[2]
    sign = torch.where(torch.arange(len(sigma)) % 2 == 0, 1.0, -1.0)
    own, flipped = (u * sigma) @ v, (u * sign * sigma) @ (sign[:, None] * v)
    torch.testing.assert_close(own, flipped)
    assert ((u * sigma) @ shared - (u * sign * sigma) @ shared).norm() > 0.5 * own.norm()


def test_the_refit_beats_the_printed_method_everywhere():
    problem = make_problem()
    y = dense_output(problem)
    ours = relative_error(y, output(problem, solve(problem, "shared-v", (10, 10))))
    for combine in ("eq8", "alg3", "mean", "frequency"):
        printed = solve_moe_svd(problem, 10, 10, MoESVDOptions(combine=combine))
        assert ours < 0.5 * relative_error(y, output(problem, printed))


def test_sensitivity_counts_frequency_over_tokens():
    problem = make_problem()
    value = measure_layer(problem).sensitivity
    # Σ f_i = top-k, r_i = 20 of 20, and outliers of a heavy-tailed product lie around a tenth.
    assert 2 * 20 * 0.03 < value < 2 * 20 * 0.4

"""D2-MoE: base and deltas give the experts back at full rank, and each switch does what it says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from compress_tool.factorize.d2_moe import D2Options, base_weights, solve_d2_moe
from compress_tool.factorize.problem import relative_error, routed_output
from compress_tool.packing import folded_factors
from tests.compress_tool.factorize.problems import make_problem
from tests.compress_tool.factorize.test_forms import dense_output

BASES = ("regmean", "mean", "frequency")


def error(problem, ranks, *, base="regmean", width=20, share_v=False) -> float:
    options = D2Options(base=base, base_width=width, share_v=share_v)
    factors = solve_d2_moe(problem, *ranks, options).factors
    y = routed_output(
        problem.statistics,
        lambda e: folded_factors(factors, e, torch.float32),
        problem.activation,
    )
    return relative_error(dense_output(problem), y)


@pytest.mark.parametrize(
    ("base", "width", "share_v"), list(itertools.product(BASES, (20, 11), (False, True)))
)
def test_full_rank_is_the_identity(base, width, share_v):
    full = (24, 20) if share_v else (20, 20)
    problem = make_problem()
    assert error(problem, full, base=base, width=width, share_v=share_v) < 1e-11
    # Null test: less than full rank is far from it.
    assert error(problem, (6, 6), base=base, width=width, share_v=share_v) > 1e-4


@pytest.mark.parametrize("share_v", [False, True])
def test_error_falls_with_rank(share_v):
    problem = make_problem()
    errors = [error(problem, (rank, rank), share_v=share_v) for rank in (2, 6, 10, 14, 18)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("base", BASES)
def test_identical_experts_need_no_delta(base):
    problem = make_problem(identical=True)
    assert error(problem, (1, 1), base=base) < 1e-11


def test_each_base_is_the_mean_it_is_named_after():
    problem = make_problem()
    weights = [problem.experts(e)[0].double() for e in range(6)]
    counts = problem.statistics.counts_E.double()
    mean = base_weights(problem, "mean")[0].double()
    assert torch.allclose(mean, sum(weights) / 6, atol=1e-6)
    frequency = base_weights(problem, "frequency")[0].double()
    expected = sum(c * w for c, w in zip(counts / counts.sum(), weights, strict=True))
    assert torch.allclose(frequency, expected, atol=1e-6)
    # regmean: no other base has a smaller routed error, so its gradient is zero.
    regmean = base_weights(problem, "regmean")[0].double()
    gradient = torch.zeros_like(regmean)
    scale = torch.zeros_like(regmean)
    for expert, weight in enumerate(weights):
        x = problem.input_rows(expert).double()
        gradient += (regmean - weight) @ (x.T @ x)
        scale += weight @ (x.T @ x)
    assert gradient.norm() / scale.norm() < 1e-4


def test_a_base_found_beforehand_is_taken_as_it_is():
    problem = make_problem()
    with pytest.raises(ValueError, match=r"LayerProblem\.base"):
        base_weights(problem, "fisher")
    mean = base_weights(problem, "mean")
    given = dataclasses.replace(problem, base=lambda: mean)
    assert error(given, (20, 20), base="fisher") < 1e-11
    assert error(given, (4, 4), base="fisher") == error(problem, (4, 4), base="mean")
    # Null test: another base gives another result.
    zeros = dataclasses.replace(problem, base=lambda: tuple(map(torch.zeros_like, mean)))
    assert error(zeros, (4, 4), base="fisher") > 1.2 * error(given, (4, 4), base="fisher")


def test_a_pruned_base_loses_the_neurons_that_matter_least():
    problem = make_problem()
    best = error(problem, (4, 4), width=10)
    assert error(problem, (4, 4), width=20) < best < error(problem, (4, 4), width=1)
    options = D2Options(base="mean", base_width=7, share_v=False)
    factors = solve_d2_moe(problem, 4, 4, options).factors
    assert factors.spec.base_width == 7
    assert factors.base_down_DB.shape == (24, 7)


@pytest.mark.parametrize("base", BASES)
def test_unrouted_experts_and_few_tokens_stay_finite(base):
    for problem in (make_problem(used=3), make_problem(tokens=5)):
        for share_v in (False, True):
            options = D2Options(base=base, base_width=9, share_v=share_v)
            factors = solve_d2_moe(problem, 6, 6, options).factors
            for tensor in (factors.u_gate_SFR, factors.v_down_GRF, factors.base_up_BD):
                assert bool(torch.isfinite(tensor).all())

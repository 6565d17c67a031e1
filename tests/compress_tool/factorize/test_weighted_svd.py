"""The fast per-expert solver finds what the general one finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize import products
from compress_tool.factorize.problem import relative_error
from compress_tool.factorize.shared_v import solve_shared_v
from compress_tool.factorize.weighted_svd import solve_weighted_svd
from tests.compress_tool.factorize.problems import make_problem
from tests.compress_tool.factorize.test_forms import dense_output, output


@pytest.mark.parametrize("width", [20, 24, 37])
@pytest.mark.parametrize("precise", [True, False])
def test_it_equals_the_general_solver_with_a_group_per_expert(width, precise, monkeypatch):
    """Wide, square and tall weights; fp64 and chunked fp32 products."""
    monkeypatch.setattr(products, "PRECISE_SIZE", 512 if precise else 0)
    problem = make_problem(width=width)
    y = dense_output(problem)
    fast = solve_weighted_svd(problem, 9, 9, weigh_rows=False, follow=False)
    general = solve_shared_v(problem, 9, 9, num_groups=6, weigh_rows=False)
    ours = relative_error(y, output(problem, fast.factors))
    theirs = relative_error(y, output(problem, general.factors))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert fast.predicted_down == pytest.approx(general.predicted_down, rel=1e-4)
    assert fast.predicted_gate_up == pytest.approx(general.predicted_gate_up, rel=1e-4)


def test_full_rank_is_the_identity_and_error_falls_with_rank():
    problem = make_problem()
    y = dense_output(problem)
    errors = [
        relative_error(y, output(problem, solve_weighted_svd(problem, r, r).factors))
        for r in (4, 8, 12, 16, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-11
    assert errors[0] > 1e-3


def test_rounding_of_v_is_made_up_for():
    problem = dataclasses.replace(make_problem(), store_dtype=torch.bfloat16)
    factors = solve_weighted_svd(problem, 20, 20).factors
    assert torch.equal(factors.v_gate_GRD, factors.v_gate_GRD.bfloat16().float())
    # Rank 20 of 24 inputs: the rounded rows span almost, not exactly, the weight's. Measured 3e-7.
    assert relative_error(dense_output(problem), output(problem, factors)) < 1e-6


def test_unrouted_experts_and_few_tokens_stay_finite():
    for problem in (make_problem(used=3), make_problem(tokens=5), make_problem(width=37, used=2)):
        factors = solve_weighted_svd(problem, 6, 6).factors
        for tensor in (factors.u_gate_SFR, factors.v_down_GRF, factors.u_down_SDR):
            assert bool(torch.isfinite(tensor).all())

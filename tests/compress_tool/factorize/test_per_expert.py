"""The per-expert baselines: what the literature's formulas say, by another route."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.per_expert import solve_per_expert, truncate
from compress_tool.factorize.problem import relative_error
from tests.compress_tool.factorize.problems import make_problem
from tests.compress_tool.factorize.test_forms import dense_output, output


@pytest.mark.parametrize("rows", [9, 20])
def test_truncation_is_the_svd_of_the_whitened_matrix(rows):
    """Wide and tall matrices take different routes; both equal SVD(W S) truncated, times S⁻¹."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(rows, 12, generator=g, dtype=torch.float64)
    x = torch.randn(40, 12, generator=g, dtype=torch.float64)
    gram = x.T @ x
    s = torch.linalg.cholesky(gram)
    u, sigma, v = torch.linalg.svd(w @ s, full_matrices=False)
    expected = (u[:, :5] * sigma[:5]) @ v[:5] @ torch.linalg.inv(s)
    found = truncate(w, gram, 5)
    assert torch.allclose(found.u_mR @ found.v_Rn, expected, atol=1e-9)
    assert torch.allclose(found.spectrum[: len(sigma)].sqrt(), sigma, atol=1e-6)
    # Predicted tail = measured loss.
    lost = (w - found.u_mR @ found.v_Rn) @ s
    assert torch.allclose(lost.square().sum(), found.spectrum[5:].sum(), rtol=1e-9)


def test_alpha_zero_is_the_plain_svd():
    problem = make_problem()
    factors = solve_per_expert(problem, 7, 7, alpha=0.0).factors
    weight = problem.experts(2)[0].double()
    u, sigma, v = torch.linalg.svd(weight)
    expected = (u[:, :7] * sigma[:7]) @ v[:7]
    found = factors.u_gate_SFR[2].double() @ factors.v_gate_GRD[2].double()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_full_rank_is_the_identity_and_error_falls_with_rank(alpha):
    problem = make_problem()
    y = dense_output(problem)
    errors = [
        relative_error(y, output(problem, solve_per_expert(problem, r, r, alpha=alpha).factors))
        for r in (4, 8, 12, 16, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-11
    assert errors[0] > 1e-3


def test_svd_llm_has_the_least_error_in_the_metric_it_minimises():
    """On the routed inputs of an expert, no scaling beats the whitened truncation."""
    problem = make_problem()
    x = problem.input_rows(0, gated=False).double()
    weight = problem.experts(0)[0].double()

    def error(alpha):
        factors = solve_per_expert(problem, 8, 8, alpha=alpha).factors
        folded = factors.u_gate_SFR[0].double() @ factors.v_gate_GRD[0].double()
        return float((x @ (weight - folded).T).square().sum())

    assert error(None) < error(0.5)
    assert error(None) < error(0.0)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_unrouted_expert_and_few_tokens_stay_finite(alpha):
    for problem in (make_problem(used=3), make_problem(tokens=5)):
        factors = solve_per_expert(problem, 6, 6, alpha=alpha).factors
        assert all(
            bool(torch.isfinite(getattr(factors, field.name)).all())
            for field in dataclasses.fields(factors)
            if isinstance(getattr(factors, field.name), torch.Tensor)
        )


def test_identical_experts_give_one_function():
    problem = make_problem(identical=True, tokens=200)
    factors = solve_per_expert(problem, 8, 8, alpha=0.0).factors
    folded = [factors.u_up_SFR[e] @ factors.v_up_GRD[e] for e in range(6)]
    assert all(torch.allclose(folded[0], other, atol=1e-5) for other in folded[1:])

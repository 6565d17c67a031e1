"""The gradient refit: better or unchanged, reproducible, and for both forms."""

from __future__ import annotations

import dataclasses

import torch

from compress_tool.factorize.latent import solve_latent
from compress_tool.factorize.narrow import solve_narrow
from compress_tool.factorize.problem import routed_output
from compress_tool.factorize.refit import refit
from tests.compress_tool.factorize.problems import make_problem


def solved(form: str):
    problem = make_problem(tokens=3000)
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    if form == "narrow":
        return problem, y_TD, solve_narrow(problem, [10])[0].factors
    return problem, y_TD, solve_latent(problem, y_TD, 12, 12).factors


def test_a_refit_finds_back_what_noise_took_away():
    """The dense layer plus noise in its gates; judged on tokens the fit did not see."""
    problem, y_TD, _ = solved("narrow")
    exact = solve_narrow(problem, [problem.shape.expert_width])[0].factors
    generator = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(exact.gate_EFD.shape, generator=generator)
    start = dataclasses.replace(exact, gate_EFD=exact.gate_EFD + noise)
    result = refit(problem, start, y_TD, steps=150, seed=0)
    assert result.error_after < 0.5 * result.error_before
    assert result.factors.spec == start.spec


def test_a_refit_is_never_worse_than_what_it_was_given():
    """Random layers have nothing to gain: the given factors come back unless the fit helped."""
    for form in ("narrow", "latent"):
        problem, y_TD, factors = solved(form)
        result = refit(problem, factors, y_TD, steps=40, seed=0)
        kept = result.factors.gate_EFD if form == "narrow" else result.factors.gate_EFR
        given = factors.gate_EFD if form == "narrow" else factors.gate_EFR
        assert torch.equal(kept, given) == (result.error_after >= result.error_before)
        assert result.factors.spec == factors.spec


def test_a_refit_that_does_not_help_is_dropped():
    """Without steps nothing changes, so the given factors come back."""
    problem, y_TD, factors = solved("narrow")
    result = refit(problem, factors, y_TD, steps=0, seed=0)
    assert result.error_after == result.error_before
    assert torch.equal(result.factors.gate_EFD, factors.gate_EFD)


def test_the_same_seed_gives_the_same_bytes():
    problem, y_TD, factors = solved("latent")
    first, second = (refit(problem, factors, y_TD, steps=10, seed=7).factors for _ in range(2))
    for name in ("v_gate_up_RD", "gate_EFR", "up_EFR", "down_ERF", "q_DR"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_few_tokens_are_finite():
    problem = make_problem(tokens=5)
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    result = refit(problem, solve_narrow(problem, [4])[0].factors, y_TD, steps=5, seed=0)
    assert torch.isfinite(result.factors.down_EDF).all()

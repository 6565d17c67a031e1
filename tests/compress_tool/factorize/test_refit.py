"""The gradient refit: better or unchanged, reproducible, and for both forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.latent import solve_latent
from compress_tool.factorize.narrow import solve_narrow
from compress_tool.factorize.problem import routed_output
from compress_tool.factorize.refit import RefitFactors, refit
from compress_tool.side_by_side import steady_sums
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


@pytest.mark.parametrize("form", ["narrow", "latent"])
def test_threads_change_no_bit_of_a_refit_that_is_kept(form):
    """Tensors so large that torch cuts sums over them by threads, unless `steady_sums` stops it."""
    problem = make_problem(hidden=128, width=192, experts=8, tokens=600)
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    exact: RefitFactors = solve_narrow(problem, [120])[0].factors
    if form == "latent":
        exact = solve_latent(problem, y_TD, 96, 96).factors
    generator = torch.Generator().manual_seed(3)
    noisy = {
        name: getattr(exact, name)
        + 0.1 * torch.randn(getattr(exact, name).shape, generator=generator)
        for name in ("gate_EFD", "up_EFD", "gate_EFR", "up_EFR")
        if hasattr(exact, name)
    }
    start = dataclasses.replace(exact, **noisy)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with steady_sums(problem.shape):
                found.append(refit(problem, start, y_TD, steps=12, seed=0))
    finally:
        torch.set_num_threads(before)
    assert all(result.error_after < result.error_before for result in found)
    one, other = (dataclasses.asdict(result.factors) for result in found)
    for name, tensor in one.items():
        assert tensor is None or torch.equal(tensor, other[name]), name


def test_few_tokens_are_finite():
    problem = make_problem(tokens=5)
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    result = refit(problem, solve_narrow(problem, [4])[0].factors, y_TD, steps=5, seed=0)
    assert torch.isfinite(result.factors.down_EDF).all()

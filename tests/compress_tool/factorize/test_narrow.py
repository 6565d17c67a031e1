"""Neuron selection and least squares: what an exact elimination must satisfy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.narrow import removal_order, solve_narrow
from compress_tool.factorize.problem import LayerProblem, relative_error, routed_output
from tests.compress_tool.factorize.problems import make_problem


def output_error(problem: LayerProblem, factors) -> float:
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    narrowed_TD = routed_output(
        problem.statistics,
        lambda e: (factors.gate_EFD[e], factors.up_EFD[e], factors.down_EDF[e]),
        problem.activation,
    )
    return relative_error(y_TD, narrowed_TD)


def test_all_neurons_are_the_dense_layer():
    problem = make_problem()
    solution = solve_narrow(problem, [problem.shape.expert_width])[0]
    assert output_error(problem, solution.factors) < 1e-10
    assert solution.predicted_loss < 1e-10


def test_the_loss_falls_with_the_width():
    problem = make_problem()
    solutions = solve_narrow(problem, [2, 6, 10, 14, 18])
    losses = [solution.predicted_loss for solution in solutions]
    assert losses == sorted(losses, reverse=True)
    errors = [output_error(problem, solution.factors) for solution in solutions]
    assert errors == sorted(errors, reverse=True)


def test_the_down_projection_is_the_least_squares_one():
    """No change of W2' on the kept neurons lowers the error of the expert it belongs to."""
    problem = make_problem(experts=1, top_k=1)
    factors = solve_narrow(problem, [8])[0].factors
    best = output_error(problem, factors)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        nudge = 1e-2 * torch.randn(factors.down_EDF.shape, generator=generator)
        moved = dataclasses.replace(factors, down_EDF=factors.down_EDF + nudge)
        assert output_error(problem, moved) > best


def test_a_neuron_that_others_replace_goes_first():
    """Two equal neurons: one of them is free to remove, and the other takes its part over."""
    generator = torch.Generator().manual_seed(0)
    h_nF = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    h_nF[:, 4] = h_nF[:, 1]
    moment_FF = h_nF.T @ h_nF + 1e-9 * torch.eye(6, dtype=torch.float64)
    down_DF = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    assert removal_order(moment_FF, down_DF)[-1].item() in (1, 4)


def test_elimination_beats_removing_the_smallest_on_collinear_neurons():
    generator = torch.Generator().manual_seed(1)
    mix_FF = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    h_nF = torch.randn(500, 3, generator=generator, dtype=torch.float64) @ mix_FF
    h_nF += 0.01 * torch.randn(500, 12, generator=generator, dtype=torch.float64)
    moment_FF = h_nF.T @ h_nF
    down_DF = torch.randn(7, 12, generator=generator, dtype=torch.float64)

    def lost(keep_F: torch.Tensor) -> float:
        kept_nF = h_nF[:, keep_F]
        target_nD = h_nF @ down_DF.T
        fit_FD = torch.linalg.lstsq(kept_nF, target_nD).solution
        return (target_nD - kept_nF @ fit_FD).square().sum().item()

    energy_F = moment_FF.diagonal() * down_DF.square().sum(dim=0)
    assert lost(removal_order(moment_FF, down_DF)[:3]) < lost(energy_F.topk(3).indices)


def test_the_order_of_neurons_in_the_source_changes_nothing():
    problem = make_problem(seed=4)
    permutation = torch.randperm(20, generator=torch.Generator().manual_seed(5))

    def shuffled(expert: int):
        gate, up, down = problem.experts(expert)
        return gate[permutation], up[permutation], down[:, permutation]

    other = dataclasses.replace(problem, experts=shuffled)
    errors = [output_error(p, solve_narrow(p, [9])[0].factors) for p in (problem, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_an_expert_without_tokens_is_finite():
    factors = solve_narrow(make_problem(used=3), [7])[0].factors
    assert all(torch.isfinite(t).all() for t in (factors.gate_EFD, factors.down_EDF))

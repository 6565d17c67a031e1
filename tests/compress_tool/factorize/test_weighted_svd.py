"""The fast per-expert solver finds what the general one finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize import products, weighted_svd
from compress_tool.factorize.moments import completed
from compress_tool.factorize.problem import relative_error
from compress_tool.factorize.row_weights import row_weights
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


@pytest.mark.parametrize("width", [20, 37])
def test_down_is_fitted_to_the_compressed_neurons(width):
    """At full rank it is the ridge regression of the dense output on what gate and up give."""
    problem = make_problem(width=width, experts=1, top_k=1, tokens=900)
    factors = solve_weighted_svd(problem, 8, min(width, 24)).factors
    gate, up, _ = problem.experts(0)
    x = problem.input_rows(0, gated=False).double()
    folded_gate = factors.u_gate_SFR[0].double() @ factors.v_gate_GRD[0].double()
    folded_up = factors.u_up_SFR[0].double() @ factors.v_up_GRD[0].double()
    h = problem.activation(x @ gate.T.double()) * (x @ up.T.double())
    used = problem.activation(x @ folded_gate.T) * (x @ folded_up.T)
    gram = used.T @ used
    ridge = width / (900 + width) * gram.diagonal().mean() * torch.eye(width)
    expected = torch.linalg.solve(
        gram + ridge, (used.T @ h + ridge) @ problem.experts(0)[2].T.double()
    )
    found = factors.u_down_SDR[0].double() @ factors.v_down_GRF[0].double()
    assert (found - expected.T).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("followed_width", [0, 2048])
def test_row_weights_and_following_lower_the_error(followed_width, monkeypatch):
    monkeypatch.setattr(weighted_svd, "FOLLOWED_WIDTH", followed_width)
    problem = make_problem(tokens=4000)
    y = dense_output(problem)
    errors = [
        relative_error(
            y,
            output(
                problem, solve_weighted_svd(problem, 9, 9, weigh_rows=rows, follow=follow).factors
            ),
        )
        for rows, follow in ((False, False), (True, False), (True, True))
    ]
    assert errors == sorted(errors, reverse=True)


def test_row_weights_are_the_first_order_change_of_the_output():
    """A small error in one neuron's pre-activation, against the formula."""
    problem = make_problem(experts=1, top_k=1, tokens=300)
    gate, up, down = (weight.double() for weight in problem.experts(0))
    x = problem.statistics.x_TD.double()
    a, u = x @ gate.T, x @ up.T
    y = (problem.activation(a) * u) @ down.T
    found = row_weights(problem, 0)
    for index, (da, du) in enumerate(((1e-5, 0.0), (0.0, 1e-5))):
        moved = []
        for neuron in range(gate.shape[0]):
            step = torch.zeros(gate.shape[0], dtype=torch.float64)
            step[neuron] = 1
            changed = (problem.activation(a + da * step) * (u + du * step)) @ down.T
            moved.append((changed - y).square().sum())
        expected = torch.stack(moved) / torch.stack(moved).mean()
        assert torch.allclose(found[index], expected.clamp(min=1e-3), rtol=1e-2)


def test_fewer_tokens_than_inputs_in_fp32_products(monkeypatch):
    """Tall weights, a Gram of rank 6 out of 24 with one direction far above the others."""
    monkeypatch.setattr(products, "PRECISE_SIZE", 0)
    problem = make_problem(width=37, experts=1, top_k=1, tokens=6)
    problem.statistics.x_TD[0] *= 1e4
    factors = solve_weighted_svd(problem, 9, 9).factors
    y = dense_output(problem)
    assert relative_error(y, output(problem, factors)) < 0.1


def test_one_token_is_not_worse_than_none() -> None:
    """An expert with fewer tokens than the rank keeps its strongest directions beside them."""
    g = torch.Generator().manual_seed(0)
    width, size, rank = 24, 48, 12
    w_FD = torch.randn(width, size, generator=g) * torch.arange(1, width + 1)[:, None] ** -1.0
    token_nD = torch.randn(3, size, generator=g)
    images = token_nD @ w_FD.T
    moment_FF = (images.T @ images).double()
    _, vectors = torch.linalg.eigh(completed(moment_FF, w_FD, 3))
    kept_FR = vectors[:, -rank:]
    left_FD = w_FD.double() - kept_FR @ (kept_FR.T @ w_FD.double())
    floor = torch.linalg.svdvals(w_FD.double())[rank:].square().sum()
    assert left_FD.square().sum() < 1.5 * floor
    assert (left_FD @ token_nD.double().T).norm() < 1e-2 * images.norm()
    assert completed(moment_FF, w_FD, width) is moment_FF
    nothing = completed(torch.zeros(width, width).double(), w_FD, 1)
    torch.testing.assert_close(nothing, (w_FD @ w_FD.T).double(), rtol=1e-5, atol=1e-5)

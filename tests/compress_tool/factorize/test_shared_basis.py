"""The checks of mathematics §6 on the shared-basis solver: 2, 4, 5, 6, 7, 8 and 11."""

from __future__ import annotations

import pytest
import torch

from compress_tool.factorize.shared_basis import solve_shared_basis

D, M = 16, 12


def _matrices(count: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(M, D, generator=g) for _ in range(count)]


def _rows(count: int, seed: int = 1, tokens: int = 400) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, D + 1) ** -0.8
    return [torch.randn(tokens // (i + 1), D, generator=g) * scale.roll(i) for i in range(count)]


def _loss(ws, us, v, rows) -> float:
    """Σ ‖(W − UV) x‖² over the rows, in fp64."""
    return sum(
        (r.double() @ (w.double() - u.double() @ v.double()).T).square().sum().item()
        for w, u, r in zip(ws, us, rows, strict=True)
    )


def _solve(ws, rows, rank):
    return solve_shared_basis(
        range(len(ws)), lambda i: rows[i], lambda i: ws[i], rank, store_dtype=torch.float64
    )


def test_normal_equations_hold_for_the_gram_that_was_used():
    ws, rows = _matrices(1), _rows(1, tokens=4000)
    basis = _solve(ws, rows, 6)
    # One member: the shrunk Gram is a multiple of the damped own Gram.
    gram = rows[0].double().T @ rows[0].double()
    alpha = D / (len(rows[0]) + D)
    damping = 1e-6 * gram.diagonal().mean() * torch.eye(D)
    # The prior w C has the trace of the Gram: damped, then scaled back.
    gram = (1 - alpha) * gram + alpha * (gram + damping) / (1 + 1e-6)
    v, u = basis.v_RD.double(), basis.u_MR[0].double()
    residual = (ws[0].double() - u @ v) @ gram @ v.T
    assert residual.norm() / (ws[0].double() @ gram @ v.T).norm() < 1e-8


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_single_member_reaches_the_eckart_young_floor(rank):
    ws, rows = _matrices(1), _rows(1, tokens=4000)
    basis = _solve(ws, rows, rank)
    y = rows[0].double() @ ws[0].double().T
    floor = torch.linalg.svdvals(y)[rank:].square().sum().item()
    loss = _loss(ws, [basis.u_MR[0]], basis.v_RD, rows)
    assert loss == pytest.approx(floor, rel=1e-6)
    # The damping of 1e-6 of the mean eigenvalue is what is left between the two.
    assert basis.predicted_loss == pytest.approx(loss / y.square().sum().item(), rel=2e-5)


def test_proportional_grams_equal_the_svd_of_the_stack():
    ws = _matrices(4)
    base = _rows(1, tokens=3000)[0]
    rows = [base * scale for scale in (1.0, 0.5, 2.0, 0.1)]
    basis = _solve(ws, rows, 5)
    stack = torch.cat([r.double() @ w.double().T for w, r in zip(ws, rows, strict=True)], dim=1)
    floor = torch.linalg.svdvals(stack)[5:].square().sum().item()
    loss = _loss(ws, [basis.u_MR[i] for i in range(4)], basis.v_RD, rows)
    assert loss == pytest.approx(floor, rel=1e-6)


def test_monotone_in_rank_and_never_below_the_per_expert_bound():
    ws, rows = _matrices(4), _rows(4)
    bound = {
        rank: sum(
            torch.linalg.svdvals(r.double() @ w.double().T)[rank:].square().sum().item()
            for w, r in zip(ws, rows, strict=True)
        )
        for rank in range(1, D)
    }
    previous = float("inf")
    for rank in range(1, D):
        basis = _solve(ws, rows, rank)
        loss = _loss(ws, [basis.u_MR[i] for i in range(4)], basis.v_RD, rows)
        assert bound[rank] * (1 - 1e-9) <= loss <= previous * (1 + 1e-3)
        previous = loss


def test_full_rank_is_the_identity():
    ws, rows = _matrices(3), _rows(3)
    basis = _solve(ws, rows, D)
    for i, w in enumerate(ws):
        torch.testing.assert_close((basis.u_MR[i] @ basis.v_RD).float(), w, atol=2e-6, rtol=0)


def test_identical_matrices_give_the_single_matrix_result():
    w, r = _matrices(1)[0], _rows(1, tokens=3000)[0]
    one = _solve([w], [r], 4)
    many = _solve([w] * 5, [r] * 5, 4)
    product = one.u_MR[0] @ one.v_RD
    for i in range(5):
        torch.testing.assert_close(many.u_MR[i] @ many.v_RD, product, atol=2e-3, rtol=2e-3)


def test_refit_absorbs_any_mixing_of_v():
    """Rounding V to bfloat16 mixes and perturbs it; U is refitted against the stored values."""
    ws, rows = _matrices(2), _rows(2)
    exact = _solve(ws, rows, 6)
    rounded = solve_shared_basis(
        range(2), lambda i: rows[i], lambda i: ws[i], 6, store_dtype=torch.bfloat16
    )
    assert torch.equal(rounded.v_RD, rounded.v_RD.bfloat16().float())
    losses = [_loss(ws, [b.u_MR[i] for i in range(2)], b.v_RD, rows) for b in (exact, rounded)]
    assert losses[1] < losses[0] * 1.01


def test_signs_and_rotations_of_v_change_nothing_after_the_refit():
    ws, rows = _matrices(3), _rows(3)
    basis = _solve(ws, rows, 6)
    g = torch.Generator().manual_seed(4)
    for mixing in (
        torch.diag(torch.tensor([1.0, -1, 1, -1, -1, 1])),
        torch.linalg.qr(torch.randn(6, 6, generator=g)).Q,
    ):
        v = mixing.double() @ basis.v_RD
        for i, w in enumerate(ws):
            gram = rows[i].double().T @ rows[i].double()
            u = w.double() @ gram @ v.T @ torch.linalg.inv(v @ gram @ v.T)
            own = basis.v_RD
            expected = w.double() @ gram @ own.T @ torch.linalg.inv(own @ gram @ own.T) @ own
            torch.testing.assert_close(u @ v, expected, atol=1e-9, rtol=0)


def test_random_weights_reach_their_floor_and_structured_ones_are_below():
    g = torch.Generator().manual_seed(9)
    rows = _rows(1, tokens=4000) * 40
    random = [torch.randn(M, D, generator=g) for _ in range(40)]
    structured = [w @ torch.diag(torch.arange(1, D + 1) ** -1.0) for w in random]
    floor = _solve(random, rows, 5).random_floor
    assert _solve(random, rows, 5).predicted_loss == pytest.approx(floor, rel=0.15)
    assert _solve(structured, rows, 5).predicted_loss < 0.5 * floor


@pytest.mark.parametrize("kind", ["same token", "padding only"])
def test_degenerate_inputs_stay_finite(kind: str):
    ws = _matrices(2)
    row = torch.ones(50, D) if kind == "same token" else torch.zeros(50, D)
    basis = _solve(ws, [row, row], 4)
    for i in range(2):
        assert torch.isfinite(basis.u_MR[i]).all()
        assert (basis.u_MR[i] @ basis.v_RD).norm() <= 4 * ws[i].norm()


@pytest.mark.parametrize("tokens", [(400, 0), (400, 1), (3, 2), (0, 0)])
def test_few_or_no_rows_stay_finite(tokens):
    ws = _matrices(2)
    g = torch.Generator().manual_seed(5)
    rows = [torch.randn(n, D, generator=g) for n in tokens]
    basis = _solve(ws, rows, 4)
    for i in range(2):
        assert torch.isfinite(basis.u_MR[i]).all()
        assert (basis.u_MR[i] @ basis.v_RD).norm() <= 4 * ws[i].norm()

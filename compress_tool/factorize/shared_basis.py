"""One V for several weight matrices, and the exact least-squares U of each (mathematics §3.1).

Minimises Σ_i Tr[(W_i − U_i V) G_i (W_i − U_i V)ᵀ] where G_i is the Gram of the rows that matrix i
is applied to. U_i is the exact minimiser for the V that is stored. V is the global minimiser when
all G_i are multiples of one C, in particular for a single matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compress_tool.factorize.products import (
    CHUNK_ROWS,
    inner,
    moment,
    product,
    product_dtype,
    products,
)
from compress_tool.factorize.whitening import (
    damped,
    orthonormal_rows,
    solve_spd,
    square_roots,
    symmetric_eigen,
    tail_share,
)

Rows = Callable[[int], torch.Tensor]
Weight = Callable[[int], torch.Tensor]
RowWeightsOf = Callable[[int], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBasis:
    """V (`v_RD`, in the storage dtype's values), U per member (`u_MR`), and the spectra.

    `spectrum_D` are the eigenvalues of the pooled problem, largest first: the sum behind the rank
    is the predicted loss. `input_spectrum_D` are those of the pooled Gram C. Factors are fp32, or
    fp64 where that is the storage dtype.
    """

    v_RD: torch.Tensor
    u_MR: dict[int, torch.Tensor]
    spectrum_D: torch.Tensor
    input_spectrum_D: torch.Tensor

    @property
    def predicted_loss(self) -> float:
        """Tail share of the pooled spectrum behind the rank."""
        return tail_share(self.spectrum_D, self.v_RD.shape[0])

    @property
    def random_floor(self) -> float:
        """What weights drawn at random would lose at this rank: for them E[WᵀW] is a multiple of
        the identity, and the pooled problem has the spectrum of C itself."""
        return tail_share(self.input_spectrum_D, self.v_RD.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """Per-token pooled Gram C with its square roots and spectrum, fp64, and each member's weight:
    the trace of its Gram in units of C."""

    c_DD: torch.Tensor
    root_DD: torch.Tensor
    inverse_root_DD: torch.Tensor
    spectrum_D: torch.Tensor
    weight: dict[int, float]


def solve_shared_basis(
    members: Sequence[int],
    rows: Rows,
    weight: Weight,
    rank: int,
    *,
    store_dtype: torch.dtype = torch.float32,
    row_weights: RowWeightsOf | None = None,
    pooled: Pooled | None = None,
) -> SharedBasis:
    """Find V [rank, D] for `members`, then each member's U [m, rank].

    `rows(i)` are the inputs of matrix i, gate weights included, fp32 [n_i, D]; `weight(i)` is
    fp32 [m, D]. Members without rows take the pooled statistics. Grams are held one at a time.
    `row_weights(i)`, fp64 [m], say how much an error in a row of matrix i matters; they choose V,
    U is the least-squares one with any weights. `pooled` is `pool(members, rows)` if it is known.
    """
    if pooled is None:
        pooled = pool(members, rows)
    dtype = product_dtype(len(pooled.c_DD))
    energy_DD = torch.zeros_like(pooled.c_DD)
    for member in members:
        w_mD = weight(member).to(dtype)
        if row_weights is not None:
            w_mD = w_mD * row_weights(member).sqrt().to(dtype)[:, None]
        energy_DD += pooled.weight[member] * inner(w_mD, w_mD)
    spectrum_D, vectors_DD = symmetric_eigen(pooled.root_DD @ energy_DD @ pooled.root_DD)
    v_RD = orthonormal_rows(vectors_DD[:, :rank].T @ pooled.inverse_root_DD)
    stored_RD = v_RD.to(store_dtype)
    result_dtype = torch.float64 if store_dtype == torch.float64 else torch.float32
    prior = _prior(stored_RD.to(dtype), pooled)
    factors = {
        member: _refit(weight(member).to(dtype), rows(member), prior, pooled.weight[member]).to(
            result_dtype
        )
        for member in members
    }
    return SharedBasis(
        v_RD=stored_RD.to(result_dtype),
        u_MR=factors,
        spectrum_D=spectrum_D,
        input_spectrum_D=pooled.spectrum_D,
    )


def pool(members: Sequence[int], rows: Rows) -> Pooled:
    """The statistics that all members share; those of gate and of up are the same."""
    total_DD: torch.Tensor | None = None
    count: dict[int, int] = {}
    trace: dict[int, float] = {}
    for member in members:
        rows_nD = rows(member)
        gram_DD = moment(rows_nD)
        count[member] = rows_nD.shape[0]
        trace[member] = gram_DD.diagonal().sum().item()
        total_DD = gram_DD if total_DD is None else total_DD.add_(gram_DD)
    assert total_DD is not None, "a group has at least one member"
    c_DD = damped(total_DD / max(1, sum(count.values())))
    c_trace = c_DD.diagonal().sum().item()
    # A member that saw nothing weighs as much as one token.
    weight = {member: trace[member] / c_trace if trace[member] > 0 else 1.0 for member in members}
    root_DD, inverse_root_DD, spectrum_D = square_roots(c_DD)
    return Pooled(
        c_DD=c_DD,
        root_DD=root_DD,
        inverse_root_DD=inverse_root_DD,
        spectrum_D=spectrum_D,
        weight=weight,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prior:
    """What every refit against one V shares: V, C Vᵀ (as rows) and V C Vᵀ, the last in fp64."""

    v_RD: torch.Tensor
    cross_RD: torch.Tensor
    inner_RR: torch.Tensor


def _prior(v_RD: torch.Tensor, pooled: Pooled) -> _Prior:
    cross_RD = product(v_RD, pooled.c_DD.to(v_RD.dtype))
    return _Prior(v_RD=v_RD, cross_RD=cross_RD, inner_RR=product(cross_RD, v_RD).double())


def _refit(
    w_mD: torch.Tensor, rows_nD: torch.Tensor, prior: _Prior, member_weight: float
) -> torch.Tensor:
    """U = W G Vᵀ (V G Vᵀ)⁻¹ for G = (1−α) G_i + α w_i C, without forming G_i; fp64 [m, R].

    α = D/(n + D): an expert with fewer tokens than dimensions leans on the pooled Gram. w_i C has
    the trace of G_i: the prior changes the shape of a Gram, not its weight in the sum.
    """
    size, dtype = w_mD.shape[1], w_mD.dtype
    alpha = size / (rows_nD.shape[0] + size)
    inner_RR = alpha * member_weight * prior.inner_RR
    target_mR = alpha * member_weight * product(w_mD, prior.cross_RD).double()
    for chunk_cD in torch.split(rows_nD, CHUNK_ROWS):
        image_cm, latent_cR = products(chunk_cD.to(dtype), (w_mD, prior.v_RD))
        inner_RR += (1 - alpha) * inner(latent_cR, latent_cR)
        target_mR += (1 - alpha) * inner(image_cm, latent_cR)
    return solve_spd((inner_RR + inner_RR.T) / 2, target_mR.T).T

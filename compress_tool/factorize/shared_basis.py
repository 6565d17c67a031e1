"""One V for several weight matrices, and the exact least-squares U of each (mathematics §3.1).

Minimises Σ_i Tr[(W_i − U_i V) G_i (W_i − U_i V)ᵀ] where G_i is the Gram of the rows that matrix i
is applied to. U_i is the exact minimiser for the V that is stored. V is the global minimiser when
all G_i are multiples of one C, in particular for a single matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from compress_tool.factorize.moments import cholesky
from compress_tool.factorize.products import (
    CHUNK_ROWS,
    inner,
    moment,
    product,
    product_dtype,
)
from compress_tool.factorize.whitening import (
    damped,
    orthonormal_rows,
    solve_spd,
    symmetric_eigen,
    tail_share,
)
from compress_tool.side_by_side import side_by_side

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
    """Per-token pooled Gram C with its lower root and spectrum, fp64, and each member's weight:
    the trace of its Gram in units of C."""

    c_DD: torch.Tensor
    root_DD: torch.Tensor
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
    workers: int = 1,
) -> SharedBasis:
    """Find V [rank, D] for `members`, then each member's U [m, rank].

    `rows(i)` are the inputs of matrix i, gate weights included, fp32 [n_i, D]; `weight(i)` is
    fp32 [m, D]. Members without rows take the pooled statistics. `row_weights(i)`, fp64 [m], say
    how much an error in a row of matrix i matters; they choose V, U is the least-squares one with
    any weights. `pooled` is `pool(members, rows)` if it is known. Grams are held one at a time for
    each of `workers` members in work.
    """
    if pooled is None:
        pooled = pool(members, rows, workers)
    known = pooled
    dtype = product_dtype(len(known.c_DD))

    def weighted_gram(member: int) -> torch.Tensor:
        w_mD = weight(member).to(dtype)
        scale_m = torch.full((len(w_mD),), known.weight[member], device=w_mD.device)
        if row_weights is not None:
            scale_m = scale_m * row_weights(member)
        w_mD = w_mD * scale_m.sqrt().to(dtype)[:, None]
        return inner(w_mD, w_mD)

    energy_DD = torch.zeros_like(known.c_DD)
    for part_DD in side_by_side(weighted_gram, members, workers):
        energy_DD += part_DD
    root_DD = known.root_DD.to(dtype)
    back_DD = root_DD.T.contiguous()
    # Symmetric: the product with its transpose is that with itself.
    weighed_DD = product(product(back_DD, energy_DD.to(dtype)), back_DD)
    # Once per layer: in fp64, so that V does not depend on the last bits of the statistics.
    spectrum_D, vectors_DD = symmetric_eigen(weighed_DD.double())
    v_RD = torch.linalg.solve_triangular(
        known.root_DD, vectors_DD[:, :rank].T, upper=False, left=False
    )
    stored_RD = orthonormal_rows(v_RD.to(dtype)).to(store_dtype)
    result_dtype = torch.float64 if store_dtype == torch.float64 else torch.float32
    prior = _prior(stored_RD.to(dtype), known)

    def refitted(member: int) -> torch.Tensor:
        w_mD = weight(member).to(dtype)
        return _refit(w_mD, rows(member), prior, known.weight[member]).to(result_dtype)

    factors = dict(zip(members, side_by_side(refitted, members, workers), strict=True))
    return SharedBasis(
        v_RD=stored_RD.to(result_dtype),
        u_MR=factors,
        spectrum_D=spectrum_D,
        input_spectrum_D=pooled.spectrum_D,
    )


def pool(members: Sequence[int], rows: Rows, workers: int = 1) -> Pooled:
    """The statistics that all members share; those of gate and of up are the same."""

    def own(member: int) -> tuple[torch.Tensor, int]:
        rows_nD = rows(member)
        return moment(rows_nD), len(rows_nD)

    total_DD: torch.Tensor | None = None
    num_rows = 0
    traces: dict[int, float] = {}
    for member, (gram_DD, count) in zip(members, side_by_side(own, members, workers), strict=True):
        num_rows += count
        traces[member] = gram_DD.diagonal().sum().item()
        total_DD = gram_DD if total_DD is None else total_DD.add_(gram_DD)
    assert total_DD is not None, "a group has at least one member"
    return pooled_from(total_DD, num_rows, traces)


def pooled_from(total_DD: torch.Tensor, num_rows: int, traces: Mapping[int, float]) -> Pooled:
    """The same from the sum of all members' Grams [D, D], their rows and the trace of each."""
    c_DD = damped(total_DD / max(1, num_rows))
    root_DD = cholesky(c_DD)
    c_trace = c_DD.diagonal().sum().item()
    # A member that saw nothing weighs as much as one token.
    weight = {member: trace / c_trace if trace > 0 else 1.0 for member, trace in traces.items()}
    # Of the report's floor: fp32 shows all of it that has any weight.
    values_D = torch.linalg.eigvalsh(c_DD.to(product_dtype(len(c_DD))))
    return Pooled(c_DD=c_DD, root_DD=root_DD, spectrum_D=values_D.flip(0).double(), weight=weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prior:
    """What every refit against one V shares: V, C Vᵀ (as rows) and V C Vᵀ, the last two in fp64."""

    v_RD: torch.Tensor
    cross_RD: torch.Tensor
    inner_RR: torch.Tensor


def _prior(v_RD: torch.Tensor, pooled: Pooled) -> _Prior:
    cross_RD = product(v_RD, pooled.c_DD.to(v_RD.dtype))
    inner_RR = product(cross_RD, v_RD).double()
    return _Prior(v_RD=v_RD, cross_RD=cross_RD.double(), inner_RR=inner_RR)


def _refit(
    w_mD: torch.Tensor, rows_nD: torch.Tensor, prior: _Prior, member_weight: float
) -> torch.Tensor:
    """U = W G Vᵀ (V G Vᵀ)⁻¹ for G = (1−α) G_i + α w_i C, without forming G_i; [m, R].

    α = D/(n + D): an expert with fewer tokens than dimensions leans on the pooled Gram. w_i C has
    the trace of G_i: the prior changes the shape of a Gram, not its weight in the sum.
    """
    size, dtype = w_mD.shape[1], w_mD.dtype
    alpha = size / (rows_nD.shape[0] + size)
    inner_RR = alpha * member_weight * prior.inner_RR
    cross_RD = alpha * member_weight * prior.cross_RD
    for chunk_cD in torch.split(rows_nD, CHUNK_ROWS):
        chunk_cD = chunk_cD.to(dtype)
        latent_cR = product(chunk_cD, prior.v_RD)
        inner_RR += (1 - alpha) * inner(latent_cR, latent_cR)
        cross_RD += (1 - alpha) * inner(latent_cR, chunk_cD)
    if len(w_mD) < size:
        return _solved(inner_RR, product(cross_RD.to(dtype), w_mD)).T
    return product(w_mD, _solved(inner_RR, cross_RD.to(dtype)))


def _solved(inner_RR: torch.Tensor, right_RM: torch.Tensor) -> torch.Tensor:
    """inner⁻¹ right in the right side's dtype, the precision of the products behind both.

    What fp32 adds to the loss is some (1e-7)² times the condition of `inner`, as these products do.
    """
    factor_RR, info = torch.linalg.cholesky_ex(inner_RR.to(right_RM.dtype))
    if int(info) == 0:
        return torch.cholesky_solve(right_RM, factor_RR)
    return solve_spd(inner_RR, right_RM.double()).to(right_RM.dtype)

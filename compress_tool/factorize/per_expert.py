"""The baselines that factor every weight alone: ASVD, SVD-LLM and plain SVD.

Each expert's weight W gets the best rank-R approximation in the norm Tr[E G Eᵀ] of its own inputs:

* `svd-llm` (SVD-LLM v1): G = Σ x xᵀ over the expert's own tokens, by Cholesky whitening;
* `asvd` (ASVD): G = diag(mean |x|)^2α; α = 0 is the plain SVD of the weight.

As published: own tokens only, without gates, without shrinkage towards other experts and without
a refit against the rounded factor. An expert without tokens falls back to the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress_tool.errors import NumericsError
from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.shared_v import SharedSolution
from compress_tool.factorize.whitening import damped, gram, symmetric_eigen, tail_share
from compress_tool.factors import SharedFactors
from compress_tool.side_by_side import side_by_side
from vllm_moesvd.format import PROJECTIONS, Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncated:
    """U [m, R], V [R, n], fp64, and the squared singular values of the weighted matrix."""

    u_mR: torch.Tensor
    v_Rn: torch.Tensor
    spectrum: torch.Tensor


def truncate(w_mn: torch.Tensor, gram_nn: torch.Tensor, rank: int) -> Truncated:
    """The minimiser of Tr[(W − U V) G (W − U V)ᵀ] over rank-R products; fp64, G positive definite.

    It is the truncated SVD of W S for any S with S Sᵀ = G: the eigenvectors of the smaller of
    W G Wᵀ and Sᵀ Wᵀ W S give it without forming an SVD, and in the first case without S⁻¹.
    """
    if w_mn.shape[0] <= w_mn.shape[1]:
        spectrum, vectors_mm = symmetric_eigen(w_mn @ gram_nn @ w_mn.T)
        u_mR = vectors_mm[:, :rank]
        return Truncated(u_mR=u_mR, v_Rn=u_mR.T @ w_mn, spectrum=spectrum)
    s_nn, info = torch.linalg.cholesky_ex(gram_nn)
    if int(info) != 0:
        raise NumericsError(
            "the Gram of an expert's inputs is not positive definite; use more calibration text"
        )
    scaled_mn = w_mn @ s_nn
    spectrum, vectors_nn = symmetric_eigen(scaled_mn.T @ scaled_mn)
    e_nR = vectors_nn[:, :rank]
    v_Rn = torch.linalg.solve_triangular(s_nn, e_nR.T, upper=False, left=False)
    return Truncated(u_mR=scaled_mn @ e_nR, v_Rn=v_Rn, spectrum=spectrum)


def solve_per_expert(
    problem: LayerProblem, rank_gate_up: int, rank_down: int, *, alpha: float | None
) -> SharedSolution:
    """Factor one layer expert by expert: ASVD with this `alpha`, or SVD-LLM with None."""
    experts = tuple(range(problem.shape.num_experts))
    parts: dict[Projection, list[Truncated]] = {projection: [] for projection in PROJECTIONS}

    def solved(expert: int) -> list[Truncated]:
        input_gram = _input_gram(problem.input_rows(expert, gated=False), alpha)
        neuron_gram = _input_gram(problem.neuron_rows(expert, gated=False), alpha)
        grams = input_gram, input_gram, neuron_gram
        ranks = rank_gate_up, rank_gate_up, rank_down
        return [
            truncate(weight.double(), own_gram, rank)
            for weight, own_gram, rank in zip(problem.experts(expert), grams, ranks, strict=True)
        ]

    for found in side_by_side(solved, experts, problem.workers):
        for projection, part in zip(PROJECTIONS, found, strict=True):
            parts[projection].append(part)
    return stacked_solution(parts, rank_gate_up, rank_down)


def stacked_solution(
    parts: dict[Projection, list[Truncated]], rank_gate_up: int, rank_down: int
) -> SharedSolution:
    """Experts factored one by one, by projection, as a layer of form `svd`; factors in fp32."""
    experts = tuple(range(len(parts["gate"])))

    def stacked(projection: Projection, name: str) -> torch.Tensor:
        return torch.stack([getattr(part, name) for part in parts[projection]]).float()

    return SharedSolution(
        factors=SharedFactors(
            v_gate_GRD=stacked("gate", "v_Rn"),
            v_up_GRD=stacked("up", "v_Rn"),
            v_down_GRF=stacked("down", "v_Rn"),
            u_gate_SFR=stacked("gate", "u_mR"),
            u_up_SFR=stacked("up", "u_mR"),
            u_down_SDR=stacked("down", "u_mR"),
            expert_slot=experts,
            slot_group=experts,
            form="svd",
        ),
        spectrum_gate_up=parts["gate"][0].spectrum,
        spectrum_down=parts["down"][0].spectrum,
        predicted_gate_up=predicted_loss(parts["gate"] + parts["up"], rank_gate_up),
        predicted_down=predicted_loss(parts["down"], rank_down),
    )


def predicted_loss(parts: list[Truncated], rank: int) -> float:
    """Share of the weighted energy behind the rank, over all parts."""
    energies = [part.spectrum.clamp(min=0).sum().item() for part in parts]
    total = sum(energies)
    tails = [
        tail_share(part.spectrum, rank) * energy
        for part, energy in zip(parts, energies, strict=True)
    ]
    return sum(tails) / total if total > 0 else 0.0


def _input_gram(rows_nD: torch.Tensor, alpha: float | None) -> torch.Tensor:
    if alpha is None:
        return damped(gram(rows_nD))
    size = rows_nD.shape[1]
    mean_D = (
        rows_nD.double().abs().mean(dim=0)
        if len(rows_nD)
        else torch.ones(size, dtype=torch.float64, device=rows_nD.device)
    )
    return torch.diag(mean_D.clamp(min=1e-6) ** (2 * alpha))

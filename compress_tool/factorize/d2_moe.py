"""D2-MoE: one dense base for all experts of a layer, and a low-rank delta for each.

W_i ≈ base + U_i V_i. The base is a weighted mean of the experts; the delta is the
activation-weighted truncated SVD of W_i − base on the expert's own tokens, or, with `share_v`, a
V that all deltas of a projection share. Static base pruning drops the base's least important
neurons; the deltas are fitted to what is left, so they make up for it as far as their rank goes.

The experts' neurons are sorted so that those of a pruned base come first, the same order for all
experts; that changes no output. The dynamic pruning of the paper, which drops other neurons of
the base for every batch, saves no memory and is not implemented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from compress_tool.factorize.per_expert import Truncated, predicted_loss, truncate
from compress_tool.factorize.problem import ExpertWeights, LayerProblem
from compress_tool.factorize.shared_basis import SharedBasis, solve_shared_basis
from compress_tool.factorize.shared_v import SharedSolution
from compress_tool.factorize.whitening import DAMPING, damped, gram, solve_spd
from compress_tool.factors import SharedFactors
from vllm_moesvd.format import PROJECTIONS, Projection

BaseKind = Literal["regmean", "mean", "frequency", "fisher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class D2Options:
    """How the base is made, how many of its neurons are kept, and whether the deltas share V."""

    base: BaseKind
    base_width: int
    share_v: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    """One projection: V [G, R, n] and U [E, m, R], fp32, with the loss and a spectrum."""

    v_GRn: torch.Tensor
    u_EmR: torch.Tensor
    predicted: float
    spectrum: torch.Tensor


def solve_d2_moe(
    problem: LayerProblem, rank_gate_up: int, rank_down: int, options: D2Options
) -> SharedSolution:
    """Factor one layer. At most one expert's Grams are in memory at a time."""
    experts = tuple(range(problem.shape.num_experts))
    base = base_weights(problem, options.base)
    order_F = base_order(problem, base, options.base_width)
    kept_B = order_F[: options.base_width]
    gate, up, down = (weight.to(problem.store_dtype).float() for weight in base)
    stored = gate[kept_B], up[kept_B], down[:, kept_B]

    def delta(expert: int, projection: Projection) -> torch.Tensor:
        position = PROJECTIONS.index(projection)
        weight = problem.experts(expert)[position].float()
        is_down = projection == "down"
        sorted_ = weight[:, order_F] if is_down else weight[order_F]
        part = sorted_[:, : len(kept_B)] if is_down else sorted_[: len(kept_B)]
        part -= stored[position].to(part.device)
        return sorted_

    def rows(expert: int, projection: Projection, *, gated: bool) -> torch.Tensor:
        if projection == "down":
            return problem.neuron_rows(expert, gated=gated)[:, order_F]
        return problem.input_rows(expert, gated=gated)

    def fit(projection: Projection) -> _Fitted:
        rank = rank_down if projection == "down" else rank_gate_up

        def weight(expert: int) -> torch.Tensor:
            return delta(expert, projection)

        def inputs(expert: int, *, gated: bool) -> torch.Tensor:
            return rows(expert, projection, gated=gated)

        if options.share_v:
            return _shared(
                solve_shared_basis(
                    experts,
                    lambda expert: inputs(expert, gated=True),
                    weight,
                    rank,
                    store_dtype=problem.store_dtype,
                )
            )
        return _own(experts, weight, lambda expert: inputs(expert, gated=False), rank)

    fitted = {projection: fit(projection) for projection in PROJECTIONS}
    return SharedSolution(
        factors=SharedFactors(
            v_gate_GRD=fitted["gate"].v_GRn,
            v_up_GRD=fitted["up"].v_GRn,
            v_down_GRF=fitted["down"].v_GRn,
            u_gate_SFR=fitted["gate"].u_EmR,
            u_up_SFR=fitted["up"].u_EmR,
            u_down_SDR=fitted["down"].u_EmR,
            expert_slot=experts,
            slot_group=(0,) * len(experts) if options.share_v else experts,
            form="base-delta",
            base_gate_BD=stored[0],
            base_up_BD=stored[1],
            base_down_DB=stored[2],
        ),
        spectrum_gate_up=fitted["gate"].spectrum,
        spectrum_down=fitted["down"].spectrum,
        predicted_gate_up=(fitted["gate"].predicted + fitted["up"].predicted) / 2,
        predicted_down=fitted["down"].predicted,
    )


def base_weights(problem: LayerProblem, kind: BaseKind) -> ExpertWeights:
    """Gate, up [F, D] and down [D, F] of the base, fp32.

    `regmean` is (Σ W_i G_i)(Σ G_i)⁻¹, the base that alone has the least routed error; where there
    are no statistics it becomes the mean. `fisher` was found beforehand, by a backward pass through
    the model; raises ValueError if the problem does not bring it.
    """
    if kind == "fisher":
        if problem.base is None:
            raise ValueError(
                "base fisher is not a function of one layer: LayerProblem.base is None"
            )
        gate, up, down = (weight.to(problem.device) for weight in problem.base())
        return gate, up, down
    num_experts = problem.shape.num_experts
    if kind != "regmean":
        share_E = torch.full((num_experts,), 1.0 / num_experts, dtype=torch.float64)
        counts_E = problem.statistics.counts_E.double()
        if kind == "frequency" and counts_E.sum() > 0:
            share_E = counts_E / counts_E.sum()
        sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in problem.experts(0)]
        for expert in range(num_experts):
            for total, weight in zip(sums, problem.experts(expert), strict=True):
                total += share_E[expert].to(total.device) * weight.double()
        return sums[0].float(), sums[1].float(), sums[2].float()
    down = _regmean(problem, problem.neuron_rows, lambda expert: problem.experts(expert)[2])
    both = _regmean(
        problem, problem.input_rows, lambda expert: torch.cat(problem.experts(expert)[:2])
    )
    width = problem.shape.expert_width
    return both[:width], both[width:], down


def _regmean(
    problem: LayerProblem,
    rows: Callable[[int], torch.Tensor],
    weight: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    experts = range(problem.shape.num_experts)
    traces = [rows(expert).double().square().sum().item() for expert in experts]
    size = weight(0).shape[1]
    mean = sum(traces) / (size * len(traces))
    ridge = DAMPING * mean if mean > 0 else 1.0
    numerator = torch.zeros_like(weight(0), dtype=torch.float64)
    total = torch.zeros(size, size, dtype=torch.float64, device=numerator.device)
    for expert in experts:
        own = gram(rows(expert))
        own.diagonal().add_(ridge)
        numerator += weight(expert).double() @ own
        total += own
    return solve_spd(total, numerator.T).T.float()


def base_order(problem: LayerProblem, base: ExpertWeights, base_width: int) -> torch.Tensor:
    """All neurons, those that a base of `base_width` keeps first; ascending within both parts.

    A neuron's importance is Σ g² h_j² ‖down_j‖² over all routed tokens, h by the base alone.
    """
    gate_FD, up_FD, down_DF = base
    width = gate_FD.shape[0]
    if base_width == width:
        return torch.arange(width)
    energy_F = torch.zeros(width, dtype=torch.float64, device=gate_FD.device)
    for expert in range(problem.shape.num_experts):
        x_nD = problem.input_rows(expert, gated=False)
        _, gate_n = problem.statistics.tokens_of(expert)
        h_nF = problem.activation(x_nD @ gate_FD.T) * (x_nD @ up_FD.T)
        energy_F += (h_nF.double() * gate_n.double().to(h_nF.device)[:, None]).square().sum(dim=0)
    energy_F *= down_DF.double().square().sum(dim=0)
    kept = energy_F.argsort(descending=True, stable=True)[:base_width]
    is_kept = torch.zeros(width, dtype=torch.bool, device=kept.device)
    is_kept[kept] = True
    return torch.cat([is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]])


def _own(
    experts: tuple[int, ...],
    weight: Callable[[int], torch.Tensor],
    rows: Callable[[int], torch.Tensor],
    rank: int,
) -> _Fitted:
    parts: list[Truncated] = [
        truncate(weight(expert).double(), damped(gram(rows(expert))), rank) for expert in experts
    ]
    return _Fitted(
        v_GRn=torch.stack([part.v_Rn for part in parts]).float(),
        u_EmR=torch.stack([part.u_mR for part in parts]).float(),
        predicted=predicted_loss(parts, rank),
        spectrum=parts[0].spectrum,
    )


def _shared(basis: SharedBasis) -> _Fitted:
    return _Fitted(
        v_GRn=basis.v_RD[None],
        u_EmR=torch.stack([basis.u_MR[expert] for expert in sorted(basis.u_MR)]),
        predicted=basis.predicted_loss,
        spectrum=basis.spectrum_D,
    )

"""MoE-SVD exactly as the paper prints it: V of the most frequent expert, trimmed U, no refit.

References are to the equations 5-8, 11-12 and Algorithms 2-3 of MoE-SVD (ICML 2025); the defects
of the printed method, numbered in docs/log.md, are reproduced on purpose. Per expert i:
S_i = chol(X_iᵀ X_i + damping), W_i S_i = U_i Σ_i V_iᵀ truncated. All experts of a group use the V
of its most frequent expert. Expert i combines the U of the k most frequent experts that are more
frequent than itself, filled up once with its own.

The printed result depends on the signs of the singular vectors (defect 4). They are fixed here so
that the entry of largest magnitude of each right singular vector is positive, which makes the
output a function of the weights and the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from compress_tool.errors import NumericsError
from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.shared_v import contiguous_groups
from compress_tool.factorize.whitening import damped, gram
from compress_tool.factors import SharedFactors, shared_factors
from vllm_moesvd.format import PROJECTIONS, Projection

CHOLESKY_DAMPING: Final = 1e-4
"""Share of the mean eigenvalue added before the Cholesky factorisation.

Replaces Algorithm 5, whose printed shift by +min(λ) has the wrong sign (defect 6).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESVDOptions:
    """The choices the paper leaves open.

    `k` U matrices are combined per expert (0: every expert keeps its own U). `combine` picks the
    equation: `eq8` Σ U_j Σ_j, `alg3` (Σ U_j)(Σ Σ_j), or the mean or frequency-weighted mean of
    U_j Σ_j. `whitening` says whose S⁻¹ follows the shared V: the expert V was taken from (`top`,
    the storable reading of eq. 6) or each expert's own (`expert`, Algorithm 3 to the letter; V is
    then stored per expert).
    """

    k: int = 2
    groups: int = 1
    combine: str = "eq8"
    whitening: str = "top"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decomposed:
    """One expert and projection: U [m, R], σ [R], V in whitened space [R, n], V_s S⁻¹ [R, n].

    `shared_v_Rn` carries the V of the group's most frequent expert, mapped back to the input space
    with this expert's own S. S itself, n × n, is not kept.
    """

    u_mR: torch.Tensor
    sigma_R: torch.Tensor
    v_Rn: torch.Tensor
    shared_v_Rn: torch.Tensor


def trimmed_experts(frequency_E: torch.Tensor, members: list[int], k: int) -> dict[int, list[int]]:
    """Which experts' U each member combines (paper eq. 7 with the fill of Algorithm 3).

    Example: frequencies .5, .3, .2 and k = 2 give {0: [0], 1: [0, 1], 2: [0, 1]}; k = 0 gives
    every member its own.
    """
    if k == 0:
        return {member: [member] for member in members}
    ordered = sorted(members, key=lambda member: (-frequency_E[member].item(), member))
    combined: dict[int, list[int]] = {}
    for member in members:
        more = [other for other in ordered if frequency_E[other] > frequency_E[member]]
        combined[member] = more[:k] if len(more) >= k else [*more, member]
    return combined


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimmedSlots:
    """Which functions are left after trimming.

    `slot_experts[s]` are the experts whose U slot s combines, `top[g]` the most frequent expert of
    group g, whose V the group uses.
    """

    expert_slot: tuple[int, ...]
    slot_group: tuple[int, ...]
    slot_experts: tuple[tuple[int, ...], ...]
    expert_group: tuple[int, ...]
    top: tuple[int, ...]


def top_experts(frequency_E: torch.Tensor, expert_group: tuple[int, ...]) -> tuple[int, ...]:
    """The most frequent expert of each group; of equally frequent ones the first."""
    experts = range(len(expert_group))
    return tuple(
        min(
            (expert for expert in experts if expert_group[expert] == group),
            key=lambda expert: (-frequency_E[expert].item(), expert),
        )
        for group in range(max(expert_group) + 1)
    )


def trimmed_slots(frequency_E: torch.Tensor, options: MoESVDOptions) -> TrimmedSlots:
    """Experts of one group that combine the same U are one slot, unless each has a V of its own."""
    num_experts = frequency_E.shape[0]
    expert_group = contiguous_groups(num_experts, options.groups)
    combined: dict[int, list[int]] = {}
    for group in range(options.groups):
        members = [expert for expert in range(num_experts) if expert_group[expert] == group]
        combined |= trimmed_experts(frequency_E, members, options.k)
    own_v = options.whitening == "expert"
    key_slot: dict[tuple[int, ...], int] = {}
    expert_slot: list[int] = []
    slot_group: list[int] = []
    slot_experts: list[tuple[int, ...]] = []
    for expert in range(num_experts):
        key = (-1, expert) if own_v else tuple(combined[expert])
        if key not in key_slot:
            key_slot[key] = len(slot_experts)
            slot_experts.append(tuple(combined[expert]))
            slot_group.append(expert if own_v else expert_group[expert])
        expert_slot.append(key_slot[key])
    return TrimmedSlots(
        expert_slot=tuple(expert_slot),
        slot_group=tuple(slot_group),
        slot_experts=tuple(slot_experts),
        expert_group=expert_group,
        top=top_experts(frequency_E, expert_group),
    )


def solve_moe_svd(
    problem: LayerProblem, rank_gate_up: int, rank_down: int, options: MoESVDOptions
) -> SharedFactors:
    """Factor one layer by the printed formulas; experts with the same U list share a slot."""
    num_experts = problem.shape.num_experts
    frequency_E = problem.statistics.counts_E.double()
    slots = trimmed_slots(frequency_E, options)
    group_of, top = slots.expert_group, slots.top
    u: dict[Projection, torch.Tensor] = {}
    v: dict[Projection, torch.Tensor] = {}
    for projection in PROJECTIONS:
        rank = rank_down if projection == "down" else rank_gate_up
        tops = [decompose(problem, projection, expert, rank) for expert in top]
        parts = [
            tops[group_of[e]]
            if e == top[group_of[e]]
            else decompose(problem, projection, e, rank, tops[group_of[e]].v_Rn)
            for e in range(num_experts)
        ]
        u[projection] = torch.stack(
            [_combine(parts, experts, frequency_E, options) for experts in slots.slot_experts]
        ).float()
        v_experts = range(num_experts) if options.whitening == "expert" else top
        v[projection] = torch.stack([parts[e].shared_v_Rn for e in v_experts]).float()
    return shared_factors(u, v, slots.expert_slot, slots.slot_group)


def decompose(
    problem: LayerProblem,
    projection: Projection,
    expert: int,
    rank: int,
    shared_v_Rn: torch.Tensor | None = None,
) -> Decomposed:
    """Equations 11 and 12 for one expert, on the ungated activations routed to it."""
    rows = problem.neuron_rows if projection == "down" else problem.input_rows
    weight_mn = problem.experts(expert)[PROJECTIONS.index(projection)].double()
    gram_nn = damped(gram(rows(expert, gated=False)), CHOLESKY_DAMPING)
    # X has tokens as rows, so the Gram is XᵀX; the printed X Xᵀ would be tokens × tokens
    # (defect 7).
    s_nn, info = torch.linalg.cholesky_ex(gram_nn)
    if int(info) != 0:
        raise NumericsError(
            f"moe-svd: the activation Gram of expert {expert}, projection {projection}, is not "
            "positive definite; use more calibration text or another method"
        )
    u_mr, sigma_r, v_rn = torch.linalg.svd(weight_mn @ s_nn, full_matrices=False)
    sign_r = torch.where(v_rn.gather(1, v_rn.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    v_Rn = (v_rn * sign_r)[:rank]
    shared_Rn = v_Rn if shared_v_Rn is None else shared_v_Rn
    return Decomposed(
        u_mR=(u_mr * sign_r.T)[:, :rank],
        sigma_R=sigma_r[:rank],
        v_Rn=v_Rn,
        shared_v_Rn=torch.linalg.solve_triangular(s_nn, shared_Rn, upper=False, left=False),
    )


def _combine(
    parts: list[Decomposed],
    experts: tuple[int, ...],
    frequency_E: torch.Tensor,
    options: MoESVDOptions,
) -> torch.Tensor:
    if options.combine == "alg3":
        u_mR = torch.stack([parts[j].u_mR for j in experts]).sum(dim=0)
        sigma_R = torch.stack([parts[j].sigma_R for j in experts]).sum(dim=0)
        return u_mR * sigma_R
    scaled = torch.stack([parts[j].u_mR * parts[j].sigma_R for j in experts])
    if options.combine == "eq8":
        return scaled.sum(dim=0)
    if options.combine == "mean":
        return scaled.mean(dim=0)
    weight = frequency_E[list(experts)].to(scaled.device)
    weight = (
        weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(experts))
    )
    return (weight[:, None, None] * scaled).sum(dim=0)

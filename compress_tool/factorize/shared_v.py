"""The shared-V form: per projection one V for each group of experts, one U for each expert.

A group of one expert is the activation-weighted SVD of that expert: method `svd` is this solver
with every expert in a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.products import CHUNK_ROWS, moment
from compress_tool.factorize.row_weights import RowSensitivity, row_weights
from compress_tool.factorize.shared_basis import (
    Pooled,
    SharedBasis,
    pooled_from,
    solve_shared_basis,
)
from compress_tool.factors import SharedFactors
from compress_tool.side_by_side import side_by_side
from vllm_moesvd.format import PROJECTIONS, Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSolution:
    """Factors, and per projection the tail share of the pooled spectra behind the rank.

    The spectra are those of the first group, for the report. `random_floor_*` are the losses that
    random weights of this layer would have at these ranks.
    """

    factors: SharedFactors
    spectrum_gate_up: torch.Tensor
    spectrum_down: torch.Tensor
    predicted_gate_up: float
    predicted_down: float
    random_floor_gate_up: float | None = None
    random_floor_down: float | None = None


def contiguous_groups(num_experts: int, num_groups: int) -> tuple[int, ...]:
    """Group of each expert, in id order and as even as possible (paper, Appendix D.4)."""
    return tuple(expert * num_groups // num_experts for expert in range(num_experts))


def solve_shared_v(
    problem: LayerProblem,
    rank_gate_up: int,
    rank_down: int,
    *,
    num_groups: int = 1,
    weigh_rows: bool = True,
) -> SharedSolution:
    """Factor one layer with `num_groups` V matrices per projection.

    Without `weigh_rows` all rows of gate and up matter alike.
    """
    num_experts = problem.shape.num_experts
    sensitive: dict[int, RowSensitivity] = {}
    if weigh_rows:
        found = side_by_side(
            lambda expert: row_weights(problem, expert), range(num_experts), problem.workers
        )
        sensitive = dict(enumerate(found))
    slot_group = contiguous_groups(num_experts, num_groups)
    ranks: dict[Projection, int] = {
        "gate": rank_gate_up,
        "up": rank_gate_up,
        "down": rank_down,
    }
    solved: dict[Projection, list[SharedBasis]] = {projection: [] for projection in PROJECTIONS}
    for group in range(num_groups):
        members = _members(slot_group, group)
        inputs = pooled_inputs(problem, members)
        for projection in PROJECTIONS:
            pooled = None if projection == "down" else inputs
            basis = _solve_group(problem, projection, members, ranks[projection], pooled, sensitive)
            solved[projection].append(basis)

    def v(projection: Projection) -> torch.Tensor:
        return torch.stack([basis.v_RD for basis in solved[projection]])

    def u(projection: Projection) -> torch.Tensor:
        bases = solved[projection]
        return torch.stack(
            [bases[slot_group[expert]].u_MR[expert] for expert in range(num_experts)]
        )

    return SharedSolution(
        factors=SharedFactors(
            v_gate_GRD=v("gate"),
            v_up_GRD=v("up"),
            v_down_GRF=v("down"),
            u_gate_SFR=u("gate"),
            u_up_SFR=u("up"),
            u_down_SDR=u("down"),
            expert_slot=tuple(range(num_experts)),
            slot_group=slot_group,
            form="svd" if num_groups == num_experts else "shared-v",
        ),
        spectrum_gate_up=solved["gate"][0].spectrum_D,
        spectrum_down=solved["down"][0].spectrum_D,
        predicted_gate_up=_predicted(solved["gate"] + solved["up"]),
        predicted_down=_predicted(solved["down"]),
        random_floor_gate_up=_mean([b.random_floor for b in solved["gate"] + solved["up"]]),
        random_floor_down=_mean([basis.random_floor for basis in solved["down"]]),
    )


def pooled_inputs(problem: LayerProblem, members: Sequence[int]) -> Pooled:
    """`pool(members, problem.input_rows)` in one pass over the tokens.

    A token adds x xᵀ once, with the squares of all gates that send it to a member.
    """
    statistics = problem.statistics
    weight_TK = statistics.gate_TK.double().square()
    if len(members) < statistics.num_experts:
        is_member_E = torch.zeros(statistics.num_experts, dtype=torch.bool)
        is_member_E[list(members)] = True
        weight_TK = weight_TK * is_member_E[statistics.index_TK]
    scale_T = weight_TK.sum(dim=1).sqrt().float()
    total_DD: torch.Tensor | None = None
    for x_cD, scale_c in zip(
        torch.split(statistics.x_TD, CHUNK_ROWS), torch.split(scale_T, CHUNK_ROWS), strict=True
    ):
        rows_cD = x_cD.float().to(problem.device) * scale_c.to(problem.device)[:, None]
        part_DD = moment(rows_cD)
        total_DD = part_DD if total_DD is None else total_DD.add_(part_DD)
    assert total_DD is not None, "there are calibration tokens"
    trace_E = statistics.traces_E()
    traces = {member: float(trace_E[member]) for member in members}
    num_rows = int(statistics.counts_E[list(members)].sum())
    return pooled_from(total_DD, num_rows, traces)


def _members(slot_group: tuple[int, ...], group: int) -> list[int]:
    return [expert for expert, own in enumerate(slot_group) if own == group]


def _solve_group(
    problem: LayerProblem,
    projection: Projection,
    members: list[int],
    rank: int,
    pooled: Pooled | None,
    sensitive: dict[int, RowSensitivity],
) -> SharedBasis:
    position = PROJECTIONS.index(projection)
    weighs = projection != "down" and bool(sensitive)
    return solve_shared_basis(
        members,
        problem.neuron_rows if projection == "down" else problem.input_rows,
        lambda expert: problem.experts(expert)[position],
        rank,
        store_dtype=problem.store_dtype,
        row_weights=(lambda expert: sensitive[expert][position]) if weighs else None,
        pooled=pooled,
        workers=problem.workers,
    )


def _predicted(bases: list[SharedBasis]) -> float:
    energy = sum(basis.spectrum_D.clamp(min=0).sum().item() for basis in bases)
    tail = sum(basis.predicted_loss * basis.spectrum_D.clamp(min=0).sum().item() for basis in bases)
    return tail / energy if energy > 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

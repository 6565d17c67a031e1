"""U merging for MoE-SVD: experts of a group that act alike share one U, fitted to all of them.

The authors' reply to the reviews gives numbers for "U-matrix merging" and no formula; this is the
functional clustering of mathematics §4.5, and none of it is printed in the paper. V stays the
paper's: that of the group's most frequent expert, by its activation-weighted SVD. Then, for the
routed Grams G_i (gates squared inside):

    U_i    = W_i G_i Vᵀ (V G_i Vᵀ)⁻¹                                   least squares, one per expert
    d_ij   = Tr[(U_i − U_j) V (G_i + G_j) Vᵀ (U_i − U_j)ᵀ]             summed over projections
    U_slot = Σ W_i G_i Vᵀ (Σ V G_i Vᵀ)⁻¹                               over the experts of a cluster

Each projection's d is divided by its energy Σ Tr[U_i V G_i Vᵀ U_iᵀ], so that all three count
alike. Clusters grow from single experts by average linkage. The least-squares U does not depend on
the signs of singular vectors, so merging does not share defects 1, 2 and 4 of the printed sums.

U of gate and up and V of down live in neuron space, where the order of an expert's neurons is
arbitrary: the neurons of a group's experts are first put in one order, that of its most frequent
expert (`alignment`), which changes no output of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compress_tool.factorize.alignment import aligned_orders
from compress_tool.factorize.moe_svd import MoESVDOptions, decompose, top_experts
from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.shared_v import contiguous_groups
from compress_tool.factorize.whitening import DAMPING, GRAM_CHUNK, orthonormal_rows, solve_spd
from compress_tool.factors import SharedFactors, shared_factors
from vllm_moesvd.format import PROJECTIONS, Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class _Normal:
    """One expert's least-squares problem behind V, fp64: W G Vᵀ [m, R] and V G Vᵀ [R, R]."""

    cross_mR: torch.Tensor
    inner_RR: torch.Tensor

    def solution(self) -> torch.Tensor:
        return solve_spd(self.inner_RR, self.cross_mR.T).T


def merged_slots(
    problem: LayerProblem, rank_gate_up: int, rank_down: int, options: MoESVDOptions
) -> tuple[int, ...]:
    """The slot of each expert: `k` clusters in every group (`k` 0: none is merged).

    Slots are numbered by group, then by their first expert. `provisional_slots` has the same sizes.
    """
    num_experts = problem.shape.num_experts
    distance_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    layer = _Layer(problem, options.groups)
    for projection in PROJECTIONS:
        rank = rank_down if projection == "down" else rank_gate_up
        for group in range(options.groups):
            members = layer.members(group)
            fitted = [
                (normal.solution(), normal.inner_RR)
                for _, normal in layer.normals(projection, group, rank)
            ]
            distance_MM = _distances(fitted)
            distance_EE[torch.tensor(members)[:, None], torch.tensor(members)] += distance_MM
    expert_slot = [0] * num_experts
    first_slot = 0
    for group in range(options.groups):
        members = layer.members(group)
        number = len(members) if options.k == 0 else min(options.k, len(members))
        index = torch.tensor(members)
        clusters = average_linkage(distance_EE[index[:, None], index], number)
        for expert, cluster in zip(members, clusters, strict=True):
            expert_slot[expert] = first_slot + cluster
        first_slot += number
    return tuple(expert_slot)


def provisional_slots(num_experts: int, options: MoESVDOptions) -> tuple[tuple[int, ...], ...]:
    """Slots and groups before the clusters are known: as many, each of the wrong experts."""
    expert_group = contiguous_groups(num_experts, options.groups)
    expert_slot: list[int] = []
    slot_group: list[int] = []
    for group in range(options.groups):
        size = expert_group.count(group)
        number = size if options.k == 0 else min(options.k, size)
        expert_slot += [len(slot_group) + min(index, number - 1) for index in range(size)]
        slot_group += [group] * number
    return tuple(expert_slot), tuple(slot_group)


def solve_merged(
    problem: LayerProblem,
    rank_gate_up: int,
    rank_down: int,
    expert_slot: tuple[int, ...],
    slot_group: tuple[int, ...],
) -> SharedFactors:
    """Factor one layer with the experts of a slot sharing U; slots from `merged_slots`."""
    num_groups = max(slot_group) + 1
    layer = _Layer(problem, num_groups)
    u: dict[Projection, torch.Tensor] = {}
    v: dict[Projection, torch.Tensor] = {}
    for projection in PROJECTIONS:
        rank = rank_down if projection == "down" else rank_gate_up
        sums: dict[int, _Normal] = {}
        for group in range(num_groups):
            for expert, normal in layer.normals(projection, group, rank):
                slot = expert_slot[expert]
                sums[slot] = _added(sums[slot], normal) if slot in sums else normal
        u[projection] = torch.stack([sums[s].solution() for s in range(len(slot_group))]).float()
        v[projection] = torch.stack(
            [layer.shared_v(projection, group, rank) for group in range(num_groups)]
        ).float()
    return shared_factors(u, v, expert_slot, slot_group)


def average_linkage(distance_MM: torch.Tensor, number: int) -> tuple[int, ...]:
    """Cluster of each item when the closest two clusters are joined until `number` are left.

    The distance of two clusters is the mean over their pairs; of equally close pairs the first is
    joined. Clusters are numbered by their first item. Example: three items with d(0, 2) the
    smallest give, for two clusters, (0, 1, 0).
    """
    clusters = [[item] for item in range(distance_MM.shape[0])]
    distance = distance_MM.double().clone()
    distance.fill_diagonal_(float("inf"))
    while len(clusters) > number:
        first, second = divmod(int(distance.argmin()), len(clusters))
        first, second = min(first, second), max(first, second)
        sizes = len(clusters[first]), len(clusters[second])
        joined = (sizes[0] * distance[first] + sizes[1] * distance[second]) / sum(sizes)
        distance[first], distance[:, first] = joined, joined
        distance[first, first] = float("inf")
        kept = [index for index in range(len(clusters)) if index != second]
        distance = distance[kept][:, kept]
        clusters[first] = sorted(clusters[first] + clusters[second])
        del clusters[second]
    clusters.sort()
    owner = {item: index for index, members in enumerate(clusters) for item in members}
    return tuple(owner[item] for item in range(distance_MM.shape[0]))


class _Layer:
    """One layer as merging sees it: V of every group, and each expert with its neurons aligned."""

    def __init__(self, problem: LayerProblem, num_groups: int) -> None:
        self.problem = problem
        num_experts = problem.shape.num_experts
        self._expert_group = contiguous_groups(num_experts, num_groups)
        self._top = top_experts(problem.statistics.counts_E, self._expert_group)
        self._order: dict[int, torch.Tensor] = {}
        self._v: dict[tuple[Projection, int], torch.Tensor] = {}

    def members(self, group: int) -> list[int]:
        return [expert for expert, own in enumerate(self._expert_group) if own == group]

    def shared_v(self, projection: Projection, group: int, rank: int) -> torch.Tensor:
        """V [R, n] of the group's most frequent expert, in the values it will be stored in, fp64.

        Its rows are made orthonormal: least squares makes up for any mixing of them, and V x then
        keeps the scale of x.
        """
        key = projection, group
        if key not in self._v:
            top = decompose(self.problem, projection, self._top[group], rank)
            v_Rn = orthonormal_rows(top.shared_v_Rn)
            self._v[key] = v_Rn.to(self.problem.store_dtype).double()
        return self._v[key]

    def normals(
        self, projection: Projection, group: int, rank: int
    ) -> Iterator[tuple[int, _Normal]]:
        """Every expert of a group with its least-squares problem, one at a time.

        A ridge far below the mean Gram of the group keeps experts with few tokens solvable; one
        without tokens then takes what its cluster has.
        """
        v_Rn = self.shared_v(projection, group, rank)
        members = self.members(group)
        energies = [self._rows(projection, expert).square().sum().item() for expert in members]
        mean = sum(energies) / (len(members) * v_Rn.shape[1])
        ridge = DAMPING * mean if mean > 0 else 1.0
        for expert in members:
            weight_mn = self._weight(projection, expert)
            carried_nR = ridge * v_Rn.T
            for chunk_cn in torch.split(self._rows(projection, expert), GRAM_CHUNK):
                wide_cn = chunk_cn.double()
                carried_nR += wide_cn.T @ (wide_cn @ v_Rn.T)
            inner_RR = v_Rn @ carried_nR
            yield (
                expert,
                _Normal(cross_mR=weight_mn @ carried_nR, inner_RR=(inner_RR + inner_RR.T) / 2),
            )

    def _weight(self, projection: Projection, expert: int) -> torch.Tensor:
        """The expert's weight with its neurons in the order of the group's top expert, fp64."""
        weight_mn = self.problem.experts(expert)[PROJECTIONS.index(projection)].double()
        order_F = self._neuron_order(expert).to(weight_mn.device)
        return weight_mn[:, order_F] if projection == "down" else weight_mn[order_F]

    def _rows(self, projection: Projection, expert: int) -> torch.Tensor:
        if projection != "down":
            return self.problem.input_rows(expert)
        rows_nF = self.problem.neuron_rows(expert)
        return rows_nF[:, self._neuron_order(expert).to(rows_nF.device)]

    def _neuron_order(self, expert: int) -> torch.Tensor:
        if expert not in self._order:
            group = self._expert_group[expert]
            top = self._top[group]
            members = [top, *(member for member in self.members(group) if member != top)]
            self._order |= aligned_orders(self.problem, members)
        return self._order[expert]


def _added(one: _Normal, other: _Normal) -> _Normal:
    return _Normal(cross_mR=one.cross_mR + other.cross_mR, inner_RR=one.inner_RR + other.inner_RR)


def _distances(fitted: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """d_ij of one projection over its energy, without forming a difference of U: [M, M].

    `fitted` are U [m, R] and V G Vᵀ [R, R] of the experts.
    """
    squares = [u_mR.T @ u_mR for u_mR, _ in fitted]
    number = len(fitted)
    # Entry (i, j) of `seen`: Tr[(U_i − U_j) A_i (U_i − U_j)ᵀ], what j's U costs on i's tokens.
    seen_MM = torch.zeros(number, number, dtype=torch.float64)
    energy = 0.0
    for i, (u_mR, inner_RR) in enumerate(fitted):
        image_mR = u_mR @ inner_RR
        own = (squares[i] * inner_RR).sum()
        energy += own.item()
        for j, (other_mR, _) in enumerate(fitted):
            if i != j:
                other = (squares[j] * inner_RR).sum()
                seen_MM[i, j] = own + other - 2 * (image_mR * other_mR).sum()
    # Two equal U leave a rounding error of either sign.
    distance_MM = (seen_MM + seen_MM.T).clamp(min=0)
    return distance_MM / energy if energy > 0 else distance_MM

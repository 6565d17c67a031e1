"""The narrow form: every expert keeps the neurons that the others can least replace.

Neurons are removed one after the other. Removing neuron j and letting the others take over its
part by least squares costs ‖W2_j‖² / (H⁻¹)_jj, with H = E[g² h hᵀ] and W2 as updated so far
(the optimal-brain-surgeon step, exact here because the loss is quadratic in W2). What remains at
any width is the least-squares W2' = W2 H S (Sᵀ H S)⁻¹ of mathematics §3.3 on the kept neurons S,
and one removal order serves every width. On pocket-mixtral this loses 4 to 15 % less KL than
keeping the neurons of highest energy (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.whitening import damped, gram, solve_spd
from compress_tool.factors import NarrowFactors
from compress_tool.side_by_side import side_by_side

NEURON_DAMPING: Final = 1e-4
"""Share of the mean neuron energy added to H: neurons are far more collinear than inputs."""

REMOVAL_ROUNDS: Final = 512
"""Neurons leave in at most this many rounds, each a product of F x F matrices; a width up to it
is exact, one neuron at a time."""

ROWS_PER_NEURON: Final = 2
"""An expert with fewer tokens than this times F is shown others' tokens to make up the number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NarrowSolution:
    """Factors, and the share of the experts' output energy that least squares cannot keep."""

    factors: NarrowFactors
    predicted_loss: float


def solve_narrow(problem: LayerProblem, widths: Sequence[int]) -> list[NarrowSolution]:
    """Narrow the layer to each of `widths`; neurons keep their order within an expert."""
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in widths]
    energy = 0.0
    lost = [0.0 for _ in widths]

    def solved(expert: int) -> tuple[list[tuple[torch.Tensor, ...]], list[float], float]:
        gate_FD, up_FD, down_DF = problem.experts(expert)
        moment_FF = damped(_neuron_moment(problem, expert), NEURON_DAMPING)
        order_F = removal_order(moment_FF, down_DF.double())
        target_FD = moment_FF @ down_DF.double().T
        total = float((target_FD * down_DF.double().T).sum())
        factors: list[tuple[torch.Tensor, ...]] = []
        missed: list[float] = []
        for width in widths:
            keep = order_F[:width].sort().values
            inner = moment_FF[keep][:, keep]
            narrowed_FD = solve_spd(inner, target_FD[keep])
            missed.append(max(0.0, total - (narrowed_FD * target_FD[keep]).sum().item()))
            factors.append((gate_FD[keep], up_FD[keep], narrowed_FD.T.float()))
        return factors, missed, total

    for narrowed, missed, total in side_by_side(
        solved, range(problem.shape.num_experts), problem.workers
    ):
        energy += total
        for index in range(len(widths)):
            lost[index] += missed[index]
            parts[index].append(narrowed[index])
    solutions = []
    for index in range(len(widths)):
        gate, up, down = (torch.stack(tensors) for tensors in zip(*parts[index], strict=True))
        solutions.append(
            NarrowSolution(
                factors=NarrowFactors(gate_EFD=gate, up_EFD=up, down_EDF=down),
                predicted_loss=lost[index] / energy if energy > 0 else 0.0,
            )
        )
    return solutions


def removal_order(moment_FF: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """Neuron numbers, the one removed last first; `moment_FF` is positive definite, fp64."""
    width = moment_FF.shape[0]
    per_round = -(-width // REMOVAL_ROUNDS)
    inverse_FF = torch.linalg.inv(moment_FF)
    down_DF = down_DF.clone()
    alive_F = torch.ones(width, dtype=torch.bool, device=moment_FF.device)
    # One tensor for the result and products in place: small tensors that stay, made between large
    # ones that go, would leave the allocator with holes it cannot use (measured 700 MB at F = 512).
    order_F = torch.empty(width, dtype=torch.int64, device=moment_FF.device)
    left = width
    while left > 0:
        cost_F = down_DF.square().sum(dim=0) / inverse_FF.diagonal()
        cost_F = torch.where(alive_F, cost_F, torch.inf)
        # A stable sort: equal neurons leave in the order of their numbers on every machine.
        gone = cost_F.sort(stable=True).indices[: min(per_round, left)]
        alive_F[gone] = False
        order_F[left - len(gone) : left] = gone.flip(0)
        left -= len(gone)
        rows_nF = torch.linalg.solve(inverse_FF[gone][:, gone], inverse_FF[gone])
        down_DF.addmm_(down_DF[:, gone], rows_nF, alpha=-1)
        inverse_FF.addmm_(inverse_FF[:, gone], rows_nF, alpha=-1)
        # What rounding left of the removed rows must not leak into the next ones.
        inverse_FF[gone] = 0.0
        inverse_FF[:, gone] = 0.0
        inverse_FF[gone, gone] = 1.0
        down_DF[:, gone] = 0.0
    return order_F


def _neuron_moment(problem: LayerProblem, expert: int) -> torch.Tensor:
    """H = Σ g² h hᵀ, fp64 [F, F]; rarely routed experts also see evenly spaced other tokens."""
    rows_nF = problem.neuron_rows(expert)
    moment_FF = gram(rows_nF, problem.device)
    missing = ROWS_PER_NEURON * problem.shape.expert_width - rows_nF.shape[0]
    if missing <= 0:
        return moment_FF
    statistics = problem.statistics
    num_tokens = statistics.x_TD.shape[0]
    token_n = torch.arange(min(missing, num_tokens)) * num_tokens // min(missing, num_tokens)
    gate_FD, up_FD, _ = problem.experts(expert)
    x_nD = statistics.x_TD[token_n].float().to(problem.device)
    prior_nF = problem.activation(x_nD @ gate_FD.T) * (x_nD @ up_FD.T)
    return moment_FF + gram(prior_nF * statistics.gate_TK.float().mean().item(), problem.device)

"""Which neuron of one expert corresponds to which of another.

Permuting an expert's neurons (rows of gate and up, columns of down) changes none of its outputs,
so before experts share anything in neuron space their neurons are put in one order. The measure is
the one of the shared problem: neurons are close if their gate and up rows are, on the tokens of
all the experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.whitening import damped, gram


def aligned_orders(problem: LayerProblem, members: Sequence[int]) -> dict[int, torch.Tensor]:
    """For each expert of `members` its neurons, int64 [F], so that all are in one order.

    The first member's order stays. Every other expert follows the one before it that is most like
    it, so that experts nearly alike agree even where neither is like the first. Which one that is
    shows in something that no order changes: the sorted norms of the neurons.
    """
    gram_DD = gram(problem.input_rows(members[0]))
    for expert in members[1:]:
        gram_DD += gram(problem.input_rows(expert))
    gram_DD = damped(gram_DD)
    norms = {expert: _sorted_norms(problem, expert, gram_DD) for expert in members}
    orders = {members[0]: torch.arange(problem.shape.expert_width)}
    for expert in members[1:]:
        reference = min(
            orders, key=lambda other: float((norms[other] - norms[expert]).square().sum())
        )
        similarity_FF = torch.zeros((), dtype=torch.float64)
        for own_FD, other_FD in zip(
            problem.experts(reference)[:2], problem.experts(expert)[:2], strict=True
        ):
            ordered_FD = own_FD.double()[orders[reference].to(own_FD.device)]
            similarity_FF = similarity_FF + ordered_FD @ gram_DD @ other_FD.double().T
        orders[expert] = greedy_matching(similarity_FF)
    return orders


def greedy_matching(similarity_FF: torch.Tensor) -> torch.Tensor:
    """Column for every row, each used once: the most similar free pair first, int64 [F], CPU.

    All pairs that are each other's best among what is free are taken at once, which gives the
    pairs of the one-by-one order. Example: [[1, 2], [3, 4]] gives (0, 1): 4 is taken first.
    An exact assignment takes O(F³), hours for the 14,336 neurons of a large expert.
    """
    similarity = similarity_FF.clone()
    size = similarity.shape[0]
    order_F = torch.full((size,), -1, dtype=torch.long, device=similarity.device)
    rows = torch.arange(size, device=similarity.device)
    while bool((order_F < 0).any()):
        best_column_F = similarity.argmax(dim=1)
        best_row_F = similarity.argmax(dim=0)
        mutual = (best_row_F[best_column_F] == rows) & (order_F < 0)
        assert bool(mutual.any()), "the most similar free pair is each other's best"
        order_F[mutual] = best_column_F[mutual]
        similarity[mutual] = -float("inf")
        similarity[:, best_column_F[mutual]] = -float("inf")
    return order_F.cpu()


def _sorted_norms(problem: LayerProblem, expert: int, gram_DD: torch.Tensor) -> torch.Tensor:
    """The norms of the gate rows and of the up rows in the metric of `gram_DD`: [2, F]."""
    energies = [
        ((weight.double() @ gram_DD) * weight.double()).sum(dim=1)
        for weight in problem.experts(expert)[:2]
    ]
    return torch.stack([energy.clamp(min=0).sqrt().sort().values for energy in energies])

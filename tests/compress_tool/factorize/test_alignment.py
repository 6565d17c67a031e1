"""Neurons of one expert in the order of another's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compress_tool.factorize.alignment import aligned_orders, greedy_matching
from tests.compress_tool.factorize.problems import make_problem


def one_by_one(similarity: torch.Tensor) -> list[int]:
    """The definition: the most similar free pair, again and again."""
    free = similarity.clone()
    order = [-1] * len(free)
    for _ in range(len(free)):
        row, column = divmod(int(free.argmax()), len(free))
        order[row] = column
        free[row], free[:, column] = -float("inf"), -float("inf")
    return order


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_matching_takes_the_closest_free_pair(size: int):
    for seed in range(5):
        similarity = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        assert greedy_matching(similarity).tolist() == one_by_one(similarity)
    # All equal, and rows that want the same column: every neuron is still used once.
    assert sorted(greedy_matching(torch.zeros(size, size)).tolist()) == list(range(size))
    wanted = torch.zeros(size, size)
    wanted[:, 0] = torch.arange(size)
    assert sorted(greedy_matching(wanted).tolist()) == list(range(size))
    assert int(greedy_matching(wanted)[size - 1]) == 0


def test_a_shuffled_copy_is_put_back():
    problem = make_problem()
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(1))

    def experts(expert: int):
        if expert != 4:
            return problem.experts(expert)
        gate, up, down = problem.experts(2)
        return gate[shuffle], up[shuffle], down[:, shuffle]

    shuffled = dataclasses.replace(problem, experts=experts)
    order = aligned_orders(shuffled, [2, 4])[4]
    assert torch.equal(shuffle[order], torch.arange(20))
    # Between experts that are unlike it, each finds its twin all the same.
    orders = aligned_orders(shuffled, [0, 1, 2, 3, 4, 5])
    assert torch.equal(orders[0], torch.arange(20))
    assert torch.equal(shuffle[orders[4]], orders[2])
    for order_F in orders.values():
        assert sorted(order_F.tolist()) == list(range(20))
    # Null test: without the alignment the rows are elsewhere.
    assert not torch.equal(order, torch.arange(20))

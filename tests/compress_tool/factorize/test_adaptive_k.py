"""The adaptive k: what the formula says, in both limits and in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_tool.factorize.adaptive_k import adaptive_k, coverage_loss, planned_k
from compress_tool.factorize.moe_svd import MoESVDOptions, trimmed_slots

PAPER = MoESVDOptions()
COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=9)


def test_the_coverage_is_the_share_of_the_most_frequent():
    frequency = torch.tensor([2.0, 8.0, 4.0])
    sums = (1.0, 2.0, 3.0)
    losses = [coverage_loss(frequency, sums, replace(PAPER, k=k)) for k in (1, 2, 3)]
    assert losses == pytest.approx([1 - 16 / 30, 1 - 28 / 30, 0.0])


def test_a_u_is_kept_while_it_weighs_more_than_the_price_times_the_mean():
    frequency = torch.tensor([40.0, 30.0, 20.0, 10.0])
    sums = (1.0,) * 4
    for penalty, kept in ((0.39, 4), (0.41, 3), (0.79, 3), (0.81, 2), (1.19, 2), (1.21, 1)):
        assert adaptive_k(frequency, sums, PAPER, penalty) == kept, penalty
    # The singular values count as much as the frequency does.
    heavy = (1.0, 1.0, 1.0, 9.0)
    assert adaptive_k(frequency, heavy, PAPER, 0.41) == 4


@settings(deadline=None)
@given(counts=COUNTS, data=st.data(), groups=st.integers(1, 2))
def test_k_falls_as_a_u_gets_dearer(counts: list[int], data, groups: int):
    frequency = torch.tensor(counts, dtype=torch.float64)
    sums = tuple(data.draw(st.floats(0.5, 2.0)) for _ in counts)
    options = replace(PAPER, groups=groups)
    ks = [adaptive_k(frequency, sums, options, p) for p in (0.0, 0.3, 1.0, 3.0, 1e6)]
    stored = [len(trimmed_slots(frequency, replace(options, k=k)).slot_experts) for k in ks]
    assert stored == sorted(stored, reverse=True)
    # Free U are all kept; U that cost more than everything are kept once per group at most.
    assert ks[0] == -(-len(counts) // groups)
    fewest = len(trimmed_slots(frequency, replace(options, k=1)).slot_experts)
    assert stored[-1] == fewest


@settings(deadline=None)
@given(counts=COUNTS, k=st.integers(1, 9), groups=st.integers(1, 2))
def test_the_plan_s_slots_tell_k(counts: list[int], k: int, groups: int):
    frequency = torch.tensor(counts, dtype=torch.float64)
    options = replace(PAPER, groups=groups)
    slots = trimmed_slots(frequency, replace(options, k=k)).expert_slot
    found = planned_k(frequency, options, slots)
    assert trimmed_slots(frequency, replace(options, k=found)).expert_slot == slots
    if len(set(counts)) == len(counts):
        assert found == min(k, -(-len(counts) // groups))


def test_slots_of_no_k_are_refused():
    with pytest.raises(ValueError, match="no k gives"):
        planned_k(torch.tensor([3.0, 2.0, 1.0]), PAPER, (0, 0, 1))

"""A layer's slots in the order in which the kernels sort rows; needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotTable:
    """A layer's map from experts to slots and groups, with slots ranked by group (int32)."""

    rank_E: torch.Tensor
    slot_S: torch.Tensor
    group_S: torch.Tensor
    merges: bool
    num_groups: int


def rank_slots(
    expert_slot: Sequence[int], slot_group: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """`rank_E`, `slot_S` and `group_S` of a SlotTable; experts of slot -1 stay -1.

    Example: experts on slots (0, 1, 2, -1) of groups (1, 0, 1): slot 1 is first, so the ranks of
    the experts are (1, 0, 2, -1), and rank -> slot is (1, 0, 2), rank -> group (0, 1, 1).
    """
    slot_S = sorted(range(len(slot_group)), key=lambda slot: slot_group[slot])
    rank_of = {slot: rank for rank, slot in enumerate(slot_S)} | {-1: -1}
    return [rank_of[s] for s in expert_slot], slot_S, [slot_group[s] for s in slot_S]

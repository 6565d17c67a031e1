"""Expert parallelism: each process keeps whole experts, and computes the pairs that are its own.

A general layer keeps the slots of its experts and the V groups of those slots; a shared V is in
every process that needs it. Other pairs have slot -1. All processes see all tokens (or, with data
parallelism, vLLM brings them together), and vLLM's sum over processes adds the pairs up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_moesvd.format import FactoredSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRows:
    """The slots and V groups of the checkpoint that a process holds, ascending."""

    slots: tuple[int, ...]
    groups: tuple[int, ...]

    def of(self, factor: str) -> tuple[int, ...]:
        """Which matrices of the factor tensor `u_…` or `v_…` the process holds."""
        return self.slots if factor.startswith("u_") else self.groups


def local_experts(spec: FactoredSpec, expert_map: Sequence[int]) -> tuple[FactoredSpec, LocalRows]:
    """The layer as one process has it, slots and groups renumbered, and what they were before.

    `expert_map[e]` is below 0 where expert e is another process's; such experts get slot -1.
    Example: experts on slots (0, 1, 2, 1) of groups (1, 0, 1), of which the last two are here:
    slots (1, 2) become (0, 1), so the experts have (-1, -1, 1, 0) and the slots groups (0, 1).
    """
    local = [slot for slot, here in zip(spec.expert_slot, expert_map, strict=True) if here >= 0]
    slots = sorted(set(local))
    groups = sorted({spec.slot_group[slot] for slot in slots})
    renumbered = replace(
        spec,
        expert_slot=tuple(
            slots.index(slot) if here >= 0 else -1
            for slot, here in zip(spec.expert_slot, expert_map, strict=True)
        ),
        slot_group=tuple(groups.index(spec.slot_group[slot]) for slot in slots),
    )
    return renumbered, LocalRows(slots=tuple(slots), groups=tuple(groups))

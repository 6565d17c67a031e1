"""What each process of an expert-parallel group keeps of a general layer."""

from __future__ import annotations

import pytest
import torch

from vllm_moesvd.format import FactoredSpec
from vllm_moesvd.loading import factor_loader

pytest.importorskip("vllm")

from vllm_moesvd.expert_parallel import local_experts


def spec(expert_slot: tuple[int, ...], slot_group: tuple[int, ...]) -> FactoredSpec:
    return FactoredSpec(rank_gate_up=3, rank_down=2, expert_slot=expert_slot, slot_group=slot_group)


def test_the_example_of_the_docstring() -> None:
    local, rows = local_experts(spec((0, 1, 2, 1), (1, 0, 1)), (-1, -1, 0, 1))
    assert (local.expert_slot, local.slot_group) == ((-1, -1, 1, 0), (0, 1))
    assert (rows.of("u_gate"), rows.of("v_down")) == ((1, 2), (0, 1))
    assert not local.shares_slots


@pytest.mark.parametrize(
    "whole",
    [
        spec((5, 0, 4, 1, 3, 2), (0,) * 6),
        spec((5, 0, 4, 1, 3, 2), tuple(range(6))),
        spec((0, 2, 1, 2, 1, 1), (0, 1, 0)),
    ],
    ids=["one V", "svd", "merged"],
)
@pytest.mark.parametrize("processes", [2, 3, 4, 6])
def test_every_expert_is_computed_once_with_its_own_matrices(
    whole: FactoredSpec, processes: int
) -> None:
    """Linear placement, as vLLM's; the loader takes the rows that the local numbers stand for."""
    owner = [expert * processes // 6 for expert in range(6)]
    stored_S = torch.arange(whole.num_slots)
    stored_G = torch.arange(whole.num_groups)
    for process in range(processes):
        local, rows = local_experts(whole, [0 if who == process else -1 for who in owner])
        kept = {}
        for name, stored in (("u_up", stored_S), ("v_up", stored_G)):
            parameter = torch.nn.Parameter(torch.empty(len(rows.of(name))), requires_grad=False)
            factor_loader(shard_dim=None, tp_rank=0, rows=rows.of(name))(parameter, stored)
            kept[name] = parameter
        for expert, slot in enumerate(local.expert_slot):
            assert (slot >= 0) == (owner[expert] == process)
            if slot >= 0:
                assert kept["u_up"][slot] == whole.expert_slot[expert]
                group = whole.slot_group[whole.expert_slot[expert]]
                assert kept["v_up"][local.slot_group[slot]] == group
        assert local.num_slots == len(
            {whole.expert_slot[e] for e in range(6) if owner[e] == process}
        )

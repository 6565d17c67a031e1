"""The index tables against a plain sort, in Triton's interpreter; see `test_interpreter.py`."""

from __future__ import annotations

import pytest
import torch
import triton

from tests.vllm_moesvd.kernels.cases import poisoned
from tests.vllm_moesvd.kernels.layers import slot_table
from vllm_moesvd.kernels.routing import Routing, align, routing_shapes
from vllm_moesvd.kernels.slots import rank_slots

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1; see test_interpreter.py"
)


LAYOUTS = {
    "trimmed, with another process's expert": ((0, 4, 1, -1, 2, 2, 3, 1), (1, 0, 1, 0, 2)),
    "a group for each of 256 slots": (tuple(range(256)), tuple(range(255, -1, -1))),
    "as many groups as slots, but not one each": ((0, 1, 2, 3), (3, 0, 3, 0)),
    "128 groups of two slots: more than are compared at once": (
        tuple(range(256)), tuple(s % 128 for s in range(256)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64, 150])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8])
def test_routing_tables_are_a_sort(tokens: int, top_k: int) -> None:
    check_tables("trimmed, with another process's expert", tokens, top_k)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_routing_tables_of_many_groups_are_a_sort(layout: str, tokens: int) -> None:
    check_tables(layout, tokens, 3)


def check_tables(layout: str, tokens: int, top_k: int) -> None:
    expert_slot, slot_group = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(tokens)
    gate_TK, index_TK = torch.rand(tokens, len(expert_slot), generator=generator).topk(top_k)
    slots = slot_table(expert_slot, slot_group)
    shapes = routing_shapes(tokens, top_k, slots, 16, 32)
    tensors = dict(zip(shapes, poisoned(*shapes.values()), strict=True))
    routing = Routing(**tensors, slot_rows=16, group_rows=32)
    align(index_TK, gate_TK, slots, routing)

    rows: dict[int, list[int]] = {}
    gates: dict[int, float] = {}
    for t in range(tokens):
        first: dict[int, int] = {}
        for k in range(top_k):
            slot = expert_slot[int(index_TK[t, k])]
            pair = first.setdefault(slot, t * top_k + k)
            gates[pair] = gates.get(pair, 0.0) + float(gate_TK[t, k])
        for slot, pair in first.items():
            if slot >= 0:
                rows.setdefault(slot, []).append(pair)
    order = [pair for slot in slots.slot_S.tolist() for pair in rows.get(slot, [])]
    assert routing.pair_N[: len(order)].tolist() == order
    position = {pair: i for i, pair in enumerate(order)}
    assert routing.position_N.tolist() == [position.get(p, -1) for p in range(tokens * top_k)]
    for pair in order:
        assert routing.gate_N[pair].item() == pytest.approx(gates[pair], rel=1e-6)
    for table, number, height, label in (
        (routing.slots_3B, 0, 16, lambda slot: slot),
        (routing.groups_3B, 1, 32, lambda slot: slot_group[slot]),
    ):
        filled = table[:, : int(routing.num_blocks[number])].tolist()
        found = [
            (key, order[start + i])
            for key, start, count in zip(*filled, strict=True)
            for i in range(count)
        ]
        slot_of = {pair: slot for slot, pairs in rows.items() for pair in pairs}
        assert found == [(label(slot_of[pair]), pair) for pair in order]
        assert all(0 < count <= height for count in filled[2])


def test_ranking_slots_follows_the_example_of_the_docstring() -> None:
    assert rank_slots((0, 1, 2, -1), (1, 0, 1)) == ([1, 0, 2, -1], [1, 0, 2], [0, 1, 1])


def test_merging_follows_the_example_of_the_docstring() -> None:
    slots = slot_table((0, 1, 2, 3, 4, 4), (0,) * 5)
    shapes = routing_shapes(1, 3, slots, 16, 16)
    tensors = dict(zip(shapes, poisoned(*shapes.values()), strict=True))
    routing = Routing(**tensors, slot_rows=16, group_rows=16)
    align(torch.tensor([[4, 2, 5]]), torch.tensor([[0.5, 0.3, 0.2]]), slots, routing)
    assert routing.position_N.tolist() == [1, 0, -1]
    torch.testing.assert_close(routing.gate_N, torch.tensor([0.7, 0.3, 0.0]))

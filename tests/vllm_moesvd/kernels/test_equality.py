"""The kernels against the reference, in Triton's interpreter.

Runs only with TRITON_INTERPRET=1 in the environment of the whole process; `test_interpreter.py`
starts such a process. Scratch memory is filled with NaN and huge indices, so what a kernel reads
without having written it cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pytest
import torch
import triton

from tests.vllm_moesvd.closeness import distance
from tests.vllm_moesvd.kernels.layers import slot_table
from vllm_moesvd import reference
from vllm_moesvd.kernels.forward import Exchange, Factors, ShapeAndType, factored_experts
from vllm_moesvd.kernels.routing import Routing, align, routing_shapes
from vllm_moesvd.kernels.slots import rank_slots
from vllm_moesvd.kernels.tiles import Bucket, Tile, TileTable

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1; see test_interpreter.py"
)

RMS_LIMIT: Final = {torch.float32: 7.6e-7, torch.float16: 1.1e-3, torch.bfloat16: 3.4e-2}
WORST_ROW_LIMIT: Final = {torch.float32: 1.1e-6, torch.float16: 1.7e-3, torch.bfloat16: 4.2e-2}
"""Twice the largest errors of the cases below: 3.8e-7, 5.3e-4, 1.7e-2 of the whole and 5.3e-7,
8.1e-4, 2.1e-2 of the worst row. bfloat16 is that far off because the interpreter cuts fp32 down to
bfloat16 where a GPU rounds to the nearest."""

E8 = tuple(range(8))


@dataclass(frozen=True, kw_only=True)
class Case:
    reason: str
    tokens: int
    expert_slot: tuple[int, ...] = E8
    slot_group: tuple[int, ...] = (0,) * 8
    top_k: int = 2
    hidden: int = 40
    width: int = 72
    rank: int = 23
    rank_down: int = 19
    skew: bool = False


CASES = (
    Case(reason="one token, one tile of everything", tokens=1),
    Case(reason="fewer tokens than a tile", tokens=5),
    Case(reason="every size a multiple of its tile", tokens=32, hidden=32, width=64, rank=32,
         rank_down=16),
    Case(reason="tokens, ranks and widths that no tile divides", tokens=37, hidden=41, width=67),
    Case(reason="ranks far below a tile: most of it masked", tokens=9, rank=3, rank_down=2),
    Case(reason="several routing tiles: scan and scatter", tokens=150),
    Case(reason="more routing tiles than one step of the scan", tokens=140, top_k=8, hidden=16,
         width=16, rank=16, rank_down=16, expert_slot=E8),
    Case(reason="one expert gets every token, six get none", tokens=70, skew=True),
    Case(reason="one expert per token", tokens=21, top_k=1),
    Case(reason="top-k no power of two", tokens=21, top_k=3),
    Case(reason="every expert chosen", tokens=11, top_k=8),
    Case(reason="a single slot: every choice merges into one", tokens=11, top_k=3,
         expert_slot=(0,) * 8, slot_group=(0,)),
    Case(reason="trimmed slots: two or more experts on one", tokens=33, top_k=4,
         expert_slot=(0, 1, 1, 2, 2, 2, 0, 1), slot_group=(0, 0, 0)),
    Case(reason="trimmed slots in several routing tiles", tokens=90, top_k=4,
         expert_slot=(0, 1, 1, 2, 2, 2, 0, 1), slot_group=(0, 0, 0)),
    Case(reason="two groups, slots in an order that is not theirs", tokens=33,
         slot_group=(1, 0, 1, 1, 0, 0, 1, 0)),
    Case(reason="groups and trimmed slots together", tokens=75, top_k=3,
         expert_slot=(0, 3, 1, 2, 2, 3, 0, 1), slot_group=(1, 0, 2, 0)),
    Case(reason="form svd: a group for each slot", tokens=33, slot_group=E8),
    Case(reason="depth long enough to be split", tokens=2, hidden=300, width=600),
    Case(reason="256 experts, top 8", tokens=3, top_k=8, expert_slot=tuple(range(256)),
         slot_group=(0,) * 256, hidden=24, width=16),
    Case(reason="256 experts in 8 groups, several routing tiles", tokens=40, top_k=8,
         expert_slot=tuple(range(256)), slot_group=tuple(e // 32 for e in range(256)),
         hidden=16, width=16, rank=16, rank_down=16),
)  # fmt: skip
SMALL_TILES = TileTable(
    target_programs=8,
    buckets=tuple(
        Bucket(
            max_rows=max_rows,
            block_m=block_m,
            linear=Tile(block_n=16, block_k=16, num_warps=1, num_stages=1, group_m=group_m),
            gate_up=Tile(block_n=32, block_k=16, num_warps=1, num_stages=1, group_m=group_m),
        )
        for max_rows, block_m, group_m in ((4, 16, 1), (None, 32, 3))
    ),
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    x_TD: torch.Tensor
    index_TK: torch.Tensor
    gate_TK: torch.Tensor
    factors: Factors


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    s, g = len(case.slot_group), max(case.slot_group) + 1

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5 * 1.5).to(dtype)

    scores_TE = torch.rand(case.tokens, len(case.expert_slot), generator=generator)
    if case.skew:
        scores_TE[:, 1:3] += torch.tensor([5.0, 4.0])
    gate_TK, index_TK = scores_TE.topk(case.top_k)
    return Inputs(
        x_TD=torch.randn(case.tokens, case.hidden, generator=generator).to(dtype),
        index_TK=index_TK,
        gate_TK=gate_TK,
        factors=Factors(
            v_gate_GrD=normal(g, case.rank, case.hidden),
            v_up_GrD=normal(g, case.rank, case.hidden),
            u_gate_SFR=normal(s, case.width, case.rank),
            u_up_SFR=normal(s, case.width, case.rank),
            v_down_GQF=normal(g, case.rank_down, case.width),
            u_down_SDq=normal(s, case.hidden, case.rank_down),
        ),
    )


def poisoned(*wanted: ShapeAndType) -> list[torch.Tensor]:
    poison = {torch.int32: -(2**30)}
    return [torch.full(shape, poison.get(t, float("nan")), dtype=t) for shape, t in wanted]


def kernels(
    case: Case,
    given: Inputs,
    *,
    exchange_z: Exchange | None = None,
    exchange_w: Exchange | None = None,
) -> torch.Tensor:
    return factored_experts(
        given.x_TD,
        given.index_TK,
        given.gate_TK,
        given.factors,
        slot_table(case.expert_slot, case.slot_group),
        SMALL_TILES,
        poisoned,
        exchange_z=exchange_z,
        exchange_w=exchange_w,
    )


def expected(case: Case, given: Inputs) -> torch.Tensor:
    f = given.factors
    return reference.factored_experts(
        given.x_TD,
        given.index_TK,
        given.gate_TK,
        v_gate_GRD=f.v_gate_GrD,
        v_up_GRD=f.v_up_GrD,
        v_down_GQF=f.v_down_GQF,
        u_gate_SFR=f.u_gate_SFR,
        u_up_SFR=f.u_up_SFR,
        u_down_SDQ=f.u_down_SDq,
        expert_slot=case.expert_slot,
        slot_group=case.slot_group,
    )


def are_close(actual_TD: torch.Tensor, expected_TD: torch.Tensor, dtype: torch.dtype) -> bool:
    whole, worst = distance(actual_TD, expected_TD)
    return whole <= RMS_LIMIT[dtype] and worst <= WORST_ROW_LIMIT[dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_kernels_equal_the_reference(case: Case) -> None:
    given = inputs(case, torch.float32)
    assert are_close(kernels(case, given), expected(case, given), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [1, 3, 13, 15, 16, 17])
def test_half_precision_stays_within_its_noise(number: int, dtype: torch.dtype) -> None:
    case = CASES[number]
    given = inputs(case, dtype)
    actual = kernels(case, given)
    assert actual.dtype == dtype
    assert are_close(actual, expected(case, given), dtype)


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
def test_the_tolerance_rejects_what_is_wrong(dtype: torch.dtype) -> None:
    """Null tests: zeros, swapped experts, a lost token, a repeated slot counted once only."""
    case = CASES[13]
    given = inputs(case, dtype)
    good, target = kernels(case, given), expected(case, given)
    assert are_close(good, target, dtype)
    lost = good.clone()
    lost[-1] = 0
    swapped = [1, 0, *case.expert_slot[2:]]
    wrong = Case(reason="", tokens=case.tokens, top_k=4, expert_slot=tuple(swapped),
                 slot_group=case.slot_group)  # fmt: skip
    unsummed = good.clone()
    slot_TK = torch.tensor(case.expert_slot)[given.index_TK]
    repeats_T = (slot_TK[:, :, None] == slot_TK[:, None, :]).sum((1, 2)) > slot_TK.shape[1]
    assert repeats_T.any()
    unsummed[repeats_T] *= 0.7
    for bad in (torch.zeros_like(good), -good, lost, kernels(wrong, given), unsummed):
        assert not are_close(bad, target, dtype)


def test_experts_of_other_processes_add_nothing_and_cost_no_row() -> None:
    """Expert parallelism: slot -1. The choices that stay give exactly their share."""
    case = CASES[14]
    given = inputs(case, torch.float32)
    gate_TK = torch.where(given.index_TK < 4, given.gate_TK, 0)
    target = expected(case, Inputs(x_TD=given.x_TD, index_TK=given.index_TK, gate_TK=gate_TK,
                                   factors=given.factors))  # fmt: skip
    local = Case(reason="", tokens=case.tokens, expert_slot=(0, 1, 2, 3, -1, -1, -1, -1),
                 slot_group=case.slot_group)  # fmt: skip
    actual = kernels(local, given)
    is_empty_T = target.norm(dim=1) == 0
    assert is_empty_T.any()
    assert not actual[is_empty_T].any()
    assert are_close(actual[~is_empty_T], target[~is_empty_T], torch.float32)


def test_two_processes_with_both_exchanges_equal_one() -> None:
    """Tensor parallelism: ranks and widths halved, z gathered, w reduced and scattered."""
    case = Case(reason="", tokens=19, rank=24, rank_down=20, slot_group=(1, 0) * 4)
    given = inputs(case, torch.float32)
    whole = given.factors

    def process(rank: int) -> Inputs:
        def share(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            return tensor.chunk(2, dim)[rank].contiguous()

        return Inputs(
            x_TD=given.x_TD,
            index_TK=given.index_TK,
            gate_TK=given.gate_TK,
            factors=Factors(
                v_gate_GrD=share(whole.v_gate_GrD, 1),
                v_up_GrD=share(whole.v_up_GrD, 1),
                u_gate_SFR=share(whole.u_gate_SFR, 1),
                u_up_SFR=share(whole.u_up_SFR, 1),
                v_down_GQF=share(whole.v_down_GQF, 2),
                u_down_SDq=share(whole.u_down_SDq, 2),
            ),
        )

    # Each pass records what the processes would send; the next one answers it.
    sent_z: list[torch.Tensor] = []
    sent_w: list[torch.Tensor] = []
    for rank in range(2):
        kernels(case, process(rank), exchange_z=lambda z: _record(z, sent_z, z.shape[2] * 2))
    all_z = torch.cat(sent_z, dim=-1)
    for rank in range(2):
        kernels(
            case,
            process(rank),
            exchange_z=lambda z: all_z,
            exchange_w=lambda w: _record(w, sent_w, w.shape[1] // 2),
        )
    sum_w = sent_w[0] + sent_w[1]
    parts = [
        kernels(
            case,
            process(rank),
            exchange_z=lambda z: all_z,
            exchange_w=lambda w, rank=rank: sum_w.chunk(2, 1)[rank].contiguous(),  # type: ignore[misc]
        )
        for rank in range(2)
    ]
    assert are_close(parts[0] + parts[1], expected(case, given), torch.float32)


def _record(tensor: torch.Tensor, sent: list[torch.Tensor], last: int) -> torch.Tensor:
    sent.append(tensor.clone())
    return tensor.new_zeros(*tensor.shape[:-1], last)


def test_results_are_the_same_bits_every_time_and_do_not_depend_on_the_order_of_tokens() -> None:
    case = CASES[15]
    given = inputs(case, torch.float32)
    all_tokens = kernels(case, given)
    assert torch.equal(all_tokens, kernels(case, given))
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))
    shuffled = Inputs(x_TD=given.x_TD[order], index_TK=given.index_TK[order],
                      gate_TK=given.gate_TK[order], factors=given.factors)  # fmt: skip
    assert are_close(kernels(case, shuffled), all_tokens[order], torch.float32)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64, 150])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_routing_tables_are_a_sort(tokens: int, top_k: int) -> None:
    expert_slot, slot_group = (0, 4, 1, -1, 2, 2, 3, 1), (1, 0, 1, 0, 2)
    generator = torch.Generator().manual_seed(tokens)
    gate_TK, index_TK = torch.rand(tokens, 8, generator=generator).topk(top_k)
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

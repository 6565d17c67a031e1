"""The kernels against the reference, in Triton's interpreter.

Runs only with TRITON_INTERPRET=1 in the environment of the whole process; `test_interpreter.py`
starts such a process. Scratch memory is filled with NaN and huge indices, so what a kernel reads
without having written it cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
import torch
import triton
from torch.nn.functional import pad

from tests.vllm_moesvd.closeness import distance
from tests.vllm_moesvd.kernels.cases import (
    CASES,
    Case,
    Inputs,
    expected,
    inputs,
    launches,
    poisoned,
)
from tests.vllm_moesvd.kernels.layers import slot_table
from vllm_moesvd.kernels.forward import Base, Exchange, Factors, factored_experts
from vllm_moesvd.kernels.tiles import Bucket, Tile, TileTable

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1; see test_interpreter.py"
)

RMS_LIMIT: Final = {torch.float32: 7.6e-7, torch.float16: 1.1e-3, torch.bfloat16: 3.4e-2}
WORST_ROW_LIMIT: Final = {torch.float32: 1.1e-6, torch.float16: 1.7e-3, torch.bfloat16: 4.2e-2}
"""Twice the largest errors of the cases below: 3.8e-7, 5.3e-4, 1.7e-2 of the whole and 5.3e-7,
8.1e-4, 2.1e-2 of the worst row. bfloat16 is that far off because the interpreter cuts fp32 down to
bfloat16 where a GPU rounds to the nearest."""

BASE_NAMES: Final = ("gate_BD", "up_BD", "down_DB")


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


def by_reason(start: str) -> Case:
    return next(case for case in CASES if case.reason.startswith(start))


def are_close(actual_TD: torch.Tensor, expected_TD: torch.Tensor, dtype: torch.dtype) -> bool:
    whole, worst = distance(actual_TD, expected_TD)
    return whole <= RMS_LIMIT[dtype] and worst <= WORST_ROW_LIMIT[dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_kernels_equal_the_reference(case: Case) -> None:
    given = inputs(case, torch.float32)
    assert are_close(kernels(case, given), expected(case, given), torch.float32)


def test_the_cases_reach_what_they_are_for() -> None:
    """Splits and launches of its own, which sizes decide: a changed rule must not empty a case."""
    plans = {case.reason: launches(case, SMALL_TILES) for case in CASES}
    plain = plans["depth long enough to be split"]
    assert plain.z_parts > 1
    assert plain.w_parts > 1
    assert plans["base and depth long enough to be split"].z_parts > 1
    assert plans["base and groups, both split"].base_parts > 1
    alone = [reason for reason, plan in plans.items() if not plan.joins_base_down]
    assert [reason.partition(":")[0] for reason in alone] == ["many tokens, few per slot"]


HALF: Final = (
    "fewer tokens than a tile",
    "tokens, ranks and widths that no tile divides",
    "trimmed slots: two or more experts on one",
    "groups and trimmed slots together",
    "form svd: a group for each slot",
    "depth long enough to be split",
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.reason in HALF or c.base_width], ids=lambda case: case.reason
)
def test_half_precision_stays_within_its_noise(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    actual = kernels(case, given)
    assert actual.dtype == dtype
    assert are_close(actual, expected(case, given), dtype)


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
def test_the_tolerance_rejects_what_is_wrong(dtype: torch.dtype) -> None:
    """Null tests: zeros, swapped experts, a lost token, a repeated slot counted once only."""
    case = by_reason("trimmed slots in several routing tiles")
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


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
def test_the_tolerance_rejects_a_wrong_base(dtype: torch.dtype) -> None:
    """Null tests: no base, no base down, gate and up exchanged, a base of zeros."""
    case = by_reason("base and trimmed slots")
    given = inputs(case, dtype)
    base, target = given.factors.base, expected(case, given)
    assert base is not None
    assert are_close(kernels(case, given), target, dtype)

    def with_base(other: Base | None) -> torch.Tensor:
        return kernels(case, replace(given, factors=replace(given.factors, base=other)))

    zeros = Base(**{name: torch.zeros_like(getattr(base, name)) for name in BASE_NAMES})
    bare = with_base(None)
    assert torch.equal(with_base(zeros), bare)
    no_down = replace(base, down_DB=torch.zeros_like(base.down_DB))
    exchanged = replace(base, gate_BD=base.up_BD, up_BD=base.gate_BD)
    for bad in (bare, with_base(no_down), with_base(exchanged)):
        assert not are_close(bad, target, dtype)


@pytest.mark.parametrize("base_width", [0, 24])
def test_experts_of_other_processes_add_nothing_and_cost_no_row(base_width: int) -> None:
    """Expert parallelism: slot -1. The choices that stay give exactly their share."""
    case = replace(by_reason("two groups"), base_width=base_width)
    given = inputs(case, torch.float32)
    gate_TK = torch.where(given.index_TK < 4, given.gate_TK, 0)
    target = expected(case, replace(given, gate_TK=gate_TK))
    actual = kernels(replace(case, expert_slot=(0, 1, 2, 3, -1, -1, -1, -1)), given)
    is_empty_T = target.norm(dim=1) == 0
    assert is_empty_T.any()
    assert not actual[is_empty_T].any()
    assert are_close(actual[~is_empty_T], target[~is_empty_T], torch.float32)


@pytest.mark.parametrize(
    ("slot_group", "base_width"), [((1, 0) * 4, 0), ((0,) * 8, 316)], ids=["groups", "base"]
)
def test_two_processes_with_both_exchanges_equal_one(
    slot_group: tuple[int, ...], base_width: int
) -> None:
    """Tensor parallelism: ranks and widths halved, z gathered, w reduced and scattered.

    The base is cut where the neurons are: the second process has 16 of its 316, then zeros.
    """
    # The base's case has so few tokens and so many neurons that V down is split, too.
    sizes = {"tokens": 2, "width": 600} if base_width else {"tokens": 11}
    case = Case(reason="", rank=24, rank_down=20, slot_group=slot_group, base_width=base_width,
                **sizes)  # fmt: skip
    given = inputs(case, torch.float32)
    whole, base, half = given.factors, given.factors.base, case.width // 2

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
                base=None if base is None else Base(
                    gate_BD=pad(base.gate_BD, (0, 0, 0, case.width - base_width)).split(half)[rank],
                    up_BD=pad(base.up_BD, (0, 0, 0, case.width - base_width)).split(half)[rank],
                    down_DB=pad(base.down_DB, (0, case.width - base_width)).split(half, 1)[rank],
                ),
            ),
        )  # fmt: skip

    # Each pass records what the processes would send; the next one answers it.
    sent_z: list[torch.Tensor] = []
    sent_w: list[torch.Tensor] = []
    for rank in range(2):
        kernels(case, process(rank), exchange_z=lambda z: _record(z, sent_z).new_zeros(2, *z.shape),
                exchange_w=lambda w: w[0])  # fmt: skip
    all_z = torch.stack(sent_z)
    for rank in range(2):
        kernels(case, process(rank), exchange_z=lambda z: all_z,
                exchange_w=lambda w: _record(w, sent_w)[0])  # fmt: skip
    sum_w = sent_w[0] + sent_w[1]
    parts = [
        kernels(
            case,
            process(rank),
            exchange_z=lambda z: all_z,
            exchange_w=lambda w, rank=rank: sum_w[rank],  # type: ignore[misc]
        )
        for rank in range(2)
    ]
    assert are_close(parts[0] + parts[1], expected(case, given), torch.float32)
    with pytest.raises(ValueError, match="is an exchange between processes missing"):
        kernels(case, process(0))


def _record(tensor: torch.Tensor, sent: list[torch.Tensor]) -> torch.Tensor:
    sent.append(tensor.clone())
    return tensor


def test_results_are_the_same_bits_every_time_and_do_not_depend_on_the_order_of_tokens() -> None:
    case = by_reason("groups and trimmed")
    given = inputs(case, torch.float32)
    all_tokens = kernels(case, given)
    assert torch.equal(all_tokens, kernels(case, given))
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))
    shuffled = Inputs(x_TD=given.x_TD[order], index_TK=given.index_TK[order],
                      gate_TK=given.gate_TK[order], factors=given.factors)  # fmt: skip
    assert are_close(kernels(case, shuffled), all_tokens[order], torch.float32)

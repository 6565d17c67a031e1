"""The joined product against torch's, in Triton's interpreter.

Runs only with TRITON_INTERPRET=1 in the environment of the whole process; `test_interpreter.py`
starts such a process. Outputs are full of NaN before, so what is not written is seen.
"""

from __future__ import annotations

from typing import Final

import pytest
import torch
import triton

from tests.vllm_moesvd.closeness import distance
from tests.vllm_moesvd.kernels.cases import JOINED_CASES, JoinedCase, joined_inputs
from vllm_moesvd.kernels.joined import joined_linear
from vllm_moesvd.kernels.plan import JOINED_HEIGHTS, MAX_JOINED_TOKENS, plan_joined
from vllm_moesvd.kernels.tiles import tile_table

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1; see test_interpreter.py"
)

RMS_LIMIT: Final = {torch.float32: 5.1e-7, torch.float16: 5.6e-4, torch.bfloat16: 8.5e-3}
WORST_ROW_LIMIT: Final = {torch.float32: 1.1e-6, torch.float16: 8.8e-4, torch.bfloat16: 1.4e-2}
"""Twice the largest errors of the cases below: 2.5e-7, 2.8e-4, 4.2e-3 of the whole and 5.0e-7,
4.4e-4, 6.9e-3 of the worst row. The interpreter cuts fp32 down to bfloat16 where a GPU rounds."""
SM_90: Final = tile_table("sm_90", 2)


def kernel(case: JoinedCase, x_TD: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    outs = [
        torch.full((len(x_TD), len(w)), float("nan"), dtype=case.out_dtype(i, x_TD.dtype))
        for i, w in enumerate(weights)
    ]
    joined_linear(x_TD, weights, outs, SM_90)
    return outs


def expected(x_TD: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x_TD.double() @ w.double().T for w in weights]


def are_close(actual: list[torch.Tensor], target: list[torch.Tensor]) -> bool:
    distances = [(a.dtype, distance(a, t)) for a, t in zip(actual, target, strict=True)]
    return all(
        whole <= RMS_LIMIT[dtype] and worst <= WORST_ROW_LIMIT[dtype]
        for dtype, (whole, worst) in distances
    )


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
@pytest.mark.parametrize("case", JOINED_CASES, ids=lambda case: case.reason)
def test_the_kernel_equals_separate_products(case: JoinedCase, dtype: torch.dtype) -> None:
    x_TD, weights = joined_inputs(case, dtype)
    actual = kernel(case, x_TD, weights)
    assert [a.dtype for a in actual] == [case.out_dtype(i, dtype) for i in range(len(weights))]
    assert are_close(actual, expected(x_TD, weights)), [
        distance(a, t) for a, t in zip(actual, expected(x_TD, weights), strict=True)
    ]


def test_rows_of_a_wider_buffer_are_read_where_they_are() -> None:
    case = JOINED_CASES[1]
    x_TD, weights = joined_inputs(case, torch.float32)
    wide = torch.full((len(x_TD), x_TD.shape[1] + 5), float("nan"))
    wide[:, :-5] = x_TD
    assert are_close(kernel(case, wide[:, :-5], weights), expected(x_TD, weights))


def test_the_tolerance_rejects_what_is_wrong() -> None:
    """Null tests: zeros, two rows of the router swapped, router and V exchanged, a lost token."""
    case = next(case for case in JOINED_CASES if case.columns[0] == case.columns[1])
    for dtype in RMS_LIMIT:
        x_TD, weights = joined_inputs(case, dtype)
        good, target = kernel(case, x_TD, weights), expected(x_TD, weights)
        assert are_close(good, target)
        logits, z, *rest = good
        swapped, lost = logits.clone(), z.clone()
        swapped[:, [0, 1]] = logits[:, [1, 0]]
        lost[-1] = 0
        exchanged = z.to(logits.dtype), logits.to(z.dtype)
        for bad in (
            [torch.zeros_like(logits), z],
            [swapped, z],
            [*exchanged],
            [logits, lost],
        ):
            assert not are_close([*bad, *rest], target)


def test_the_cases_meet_every_height_and_a_cut_step() -> None:
    plans = [plan_joined(case.tokens, case.columns, SM_90) for case in JOINED_CASES]
    assert {block_m for block_m, _ in plans} == set(JOINED_HEIGHTS)
    cut = {
        case.hidden % tile.block_k != 0 for case, (_, tile) in zip(JOINED_CASES, plans, strict=True)
    }
    assert cut == {True, False}
    assert max(case.tokens for case in JOINED_CASES) == MAX_JOINED_TOKENS

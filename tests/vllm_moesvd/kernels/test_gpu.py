"""The kernels against the reference on a real GPU; skipped where there is none.

The same cases as in the interpreter, with the tile table that this GPU is served with, and what
the interpreter cannot show: that a captured CUDA graph computes whatever it is replayed with, and
that nothing but the inputs decides the bits.
"""

from __future__ import annotations

from typing import Final

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.latent_layers import LATENT_LAYERS, LatentLayer
from tests.vllm_moesvd.closeness import distance
from tests.vllm_moesvd.kernels.cases import (
    CASES,
    JOINED_CASES,
    Case,
    Inputs,
    JoinedCase,
    expected,
    inputs,
    joined_inputs,
    moved,
)
from tests.vllm_moesvd.kernels.layers import slot_table
from vllm_moesvd.joined import joined_linear
from vllm_moesvd.kernels.forward import Factors, ShapeAndType, factored_experts
from vllm_moesvd.kernels.tiles import device_arch, tile_table

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RMS_LIMIT: Final = {torch.float16: 1.1e-3, torch.bfloat16: 9.4e-3}
WORST_ROW_LIMIT: Final = {torch.float16: 2.2e-3, torch.bfloat16: 2.4e-2}
"""Twice the largest errors measured on an H100: 5.5e-4 and 4.7e-3 of the whole, 1.1e-3 and 1.2e-2
of the worst row. A GPU rounds to the nearest where the interpreter cuts."""


def on_gpu(given: Inputs) -> Inputs:
    return Inputs(
        x_TD=given.x_TD.cuda(),
        index_TK=given.index_TK.cuda(),
        gate_TK=given.gate_TK.cuda(),
        factors=moved(given.factors, "cuda"),
    )


def poisoned(*wanted: ShapeAndType) -> list[torch.Tensor]:
    poison = {torch.int32: -(2**30)}
    return [
        torch.full(shape, poison.get(kind, float("nan")), dtype=kind, device="cuda")
        for shape, kind in wanted
    ]


def kernels(case: Case, given: Inputs) -> torch.Tensor:
    return factored_experts(
        given.x_TD,
        given.index_TK,
        given.gate_TK,
        given.factors,
        slot_table(case.expert_slot, case.slot_group, "cuda"),
        tile_table(device_arch(0), given.x_TD.element_size()),
        poisoned,
    )


def is_close(actual_TD: torch.Tensor, expected_TD: torch.Tensor, dtype: torch.dtype) -> bool:
    whole, worst = distance(actual_TD.cpu(), expected_TD)
    return whole <= RMS_LIMIT[dtype] and worst <= WORST_ROW_LIMIT[dtype]


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_kernels_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    actual, target = kernels(case, on_gpu(given)), expected(case, given)
    assert is_close(actual, target, dtype)


@pytest.mark.parametrize("number", [1, 13, 15, 16])
def test_the_tolerance_rejects_what_is_wrong(number: int) -> None:
    """Null tests: zeros, a sign, a lost token."""
    case = CASES[number]
    given = inputs(case, torch.bfloat16)
    good, target = kernels(case, on_gpu(given)), expected(case, given)
    lost = good.clone()
    lost[-1] = 0
    for bad in (torch.zeros_like(good), -good, lost):
        assert not is_close(bad, target, torch.bfloat16)


@pytest.mark.parametrize("number", [0, 5, 13, 15, 17, 18])
def test_a_captured_graph_computes_what_it_is_replayed_with(number: int) -> None:
    """Captured once with one routing, replayed with others: bits as of a launch by launch run."""
    case = CASES[number]
    given = on_gpu(inputs(case, torch.bfloat16))
    kernels(case, given)
    slots = slot_table(case.expert_slot, case.slot_group, "cuda")
    table = tile_table(device_arch(0), 2)
    arguments = (given.factors, slots, table, poisoned)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = factored_experts(given.x_TD, given.index_TK, given.gate_TK, *arguments)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        scores_TE = torch.rand(
            case.tokens, len(case.expert_slot), generator=generator, device="cuda"
        )
        gate_TK, index_TK = scores_TE.topk(case.top_k)
        given.x_TD.normal_(generator=generator)
        given.index_TK.copy_(index_TK)
        given.gate_TK.copy_(gate_TK)
        graph.replay()
        again = kernels(case, given)
        assert torch.equal(out_TD, again)
        assert again.isfinite().all()
        assert again.any()


@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("groups", [1, 2, 8], ids="{} V groups".format)
def test_a_layer_of_mixtral_size(tokens: int, groups: int) -> None:
    """Mixtral-8x7B at 40 % removed in bf16, against the same sums in fp32 on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    experts, hidden, width, rank, rank_down, top_k = 8, 4096, 14336, 2304, 2048, 2

    def normal(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        return values / size[-1] ** 0.5 * 1.5

    factors = Factors(
        v_gate_GrD=normal(groups, rank, hidden),
        v_up_GrD=normal(groups, rank, hidden),
        u_gate_SFR=normal(experts, width, rank),
        u_up_SFR=normal(experts, width, rank),
        v_down_GQF=normal(groups, rank_down, width),
        u_down_SDq=normal(experts, hidden, rank_down),
    )
    group = [e * groups // experts for e in range(experts)]
    x_TD = torch.randn(tokens, hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
    scores_TE = torch.rand(tokens, experts, generator=generator, device="cuda")
    gate_TK, index_TK = scores_TE.topk(top_k)
    actual = factored_experts(
        x_TD, index_TK, gate_TK, factors, slot_table(range(experts), group, "cuda"),
        tile_table(device_arch(0), 2), poisoned,
    )  # fmt: skip
    target = torch.zeros(tokens, hidden, device="cuda")
    for e in range(experts):
        token, choice = (index_TK == e).nonzero(as_tuple=True)
        x = x_TD[token].float()
        gate = x @ factors.v_gate_GrD[group[e]].float().T @ factors.u_gate_SFR[e].float().T
        up = x @ factors.v_up_GrD[group[e]].float().T @ factors.u_up_SFR[e].float().T
        h = torch.nn.functional.silu(gate) * up
        y = h @ factors.v_down_GQF[group[e]].float().T @ factors.u_down_SDq[e].float().T
        target.index_add_(0, token, y * gate_TK[token, choice, None])
    assert is_close(actual, target.cpu(), torch.bfloat16)


@pytest.mark.parametrize("dtype", RMS_LIMIT, ids=str)
@pytest.mark.parametrize("case", JOINED_CASES, ids=lambda case: case.reason)
def test_joined_products_equal_separate_ones(case: JoinedCase, dtype: torch.dtype) -> None:
    x_TD, weights = joined_inputs(case, dtype)
    actual = joined_linear(x_TD.cuda(), [w.cuda() for w in weights], case.wide_logits)
    assert [out.dtype for out in actual] == [case.out_dtype(i, dtype) for i in range(len(weights))]
    for out, weight in zip(actual, weights, strict=True):
        assert is_close(out, x_TD.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 65])
@pytest.mark.parametrize("layer", LATENT_LAYERS, ids=lambda layer: layer.name)
def test_joined_products_of_real_layers(layer: LatentLayer, tokens: int) -> None:
    """With 65 tokens the operator leaves them to cuBLAS; in a graph it gives the same bits."""
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(count: int) -> torch.Tensor:
        numbers = torch.randn(count, layer.hidden, generator=generator, device="cuda")
        return (numbers * layer.hidden**-0.5).bfloat16()

    x_TD, weights = normal(tokens), [normal(count) for count in layer.columns(1)]
    for wide in (False, True):
        plain = joined_linear(x_TD, weights, wide)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = joined_linear(x_TD, weights, wide)
        graph.replay()
        for out, again, weight in zip(plain, captured, weights, strict=True):
            assert torch.equal(out, again)
            assert is_close(out, (x_TD.double() @ weight.double().T).cpu(), torch.bfloat16)

"""Sorting a batch's pairs loses none, doubles none, and sums by routing weight."""

from __future__ import annotations

import pytest
import torch

from vllm_moesvd import cpu_pairs
from vllm_moesvd.cpu_pairs import Runs, sorted_pairs


def routing(tokens: int, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of 7, each token's distinct; every fifth pair is not computed."""
    generator = torch.Generator().manual_seed(tokens)
    key_TK = torch.rand(tokens, 7, generator=generator).topk(top_k).indices
    key_TK.view(-1)[::5] = -1
    return key_TK, torch.rand(tokens, top_k, generator=generator)


def test_the_example_of_the_docstring() -> None:
    key_TK, gate_TK = torch.tensor([[2, 0], [2, -1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    (pairs,) = sorted_pairs(key_TK, gate_TK, 1)
    assert pairs.token_n is not None
    assert pairs.token_n.tolist() == [0, 0, 1]
    assert pairs.runs == Runs([0, 2], [1, 2])
    assert pairs.gate_n.tolist() == pytest.approx([0.2, 0.1, 0.3])
    assert pairs.runs.by([0, 0, 0]) == Runs([0], [3])
    assert pairs.runs.by([0, 1, 1]) == Runs([0, 1], [1, 2])


@pytest.mark.parametrize("most", [1, 4, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_portions_hold_every_computed_pair_once(
    tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_TK, gate_TK = routing(tokens)
    monkeypatch.setattr(cpu_pairs, "PORTION_NUMBERS", most * 5)
    found = []
    for pairs in sorted_pairs(key_TK, gate_TK, 5):
        assert len(pairs.gate_n) <= most or len(pairs.runs.keys) == 1
        runs = zip(pairs.runs.keys, pairs.runs.sizes, strict=True)
        keys = [key for key, size in runs for _ in range(size)]
        token_n = [0] * len(keys) if pairs.token_n is None else pairs.token_n.tolist()
        found += list(zip(keys, token_n, pairs.gate_n.tolist(), strict=True))
    expected = [
        (key, token, gate)
        for token, (keys, gates) in enumerate(zip(key_TK.tolist(), gate_TK.tolist(), strict=True))
        for key, gate in zip(keys, gates, strict=True)
        if key >= 0
    ]
    assert sorted(found) == sorted(expected)
    assert [key for key, _, _ in found] == sorted(key for key, _, _ in found)


def test_no_pair_at_all() -> None:
    assert not list(sorted_pairs(torch.full((3, 2), -1), torch.ones(3, 2), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 30])
def test_sums_by_routing_weight_leave_the_rows_alone(tokens: int, dtype: torch.dtype) -> None:
    key_TK, gate_TK = routing(tokens)
    x_TD = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    y_TD = torch.ones(tokens, 8)
    for pairs in sorted_pairs(key_TK, gate_TK, 1):
        rows_nD = pairs.rows_of(x_TD)
        before = rows_nD.clone()
        pairs.add_to(y_TD, rows_nD)
        assert torch.equal(rows_nD, before)
    weight_T1 = torch.where(key_TK >= 0, gate_TK, 0).sum(dim=1, keepdim=True)
    torch.testing.assert_close(y_TD, 1 + weight_T1 * x_TD.float())

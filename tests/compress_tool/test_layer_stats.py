"""Statistics of one layer: exact counts, Grams, and a file that is complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_tool import layer_stats
from compress_tool.errors import InputError, NumericsError
from compress_tool.layer_stats import LayerStatistics
from compress_tool.stats_writer import StatisticsWriter


def random_statistics(
    *, tokens: int = 300, size: int = 24, experts: int = 6, top_k: int = 2, seed: int = 0
) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    gate, index = scores.topk(top_k, dim=1)
    return LayerStatistics(
        x_TD=torch.randn(tokens, size, generator=generator),
        index_TK=index,
        gate_TK=gate / gate.sum(dim=1, keepdim=True),
        num_experts=experts,
    )


def naive_gram(statistics: LayerStatistics, expert: int, *, weighted: bool) -> torch.Tensor:
    size = statistics.x_TD.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64)
    for token in range(statistics.num_tokens):
        for slot in range(statistics.index_TK.shape[1]):
            if statistics.index_TK[token, slot] == expert:
                x = statistics.x_TD[token].double()
                g = statistics.gate_TK[token, slot].double() if weighted else 1.0
                gram += g**2 * torch.outer(x, x)
    return gram


@pytest.mark.parametrize("weighted", [True, False])
def test_gram_is_the_sum_of_outer_products(weighted):
    statistics = random_statistics()
    for expert in range(statistics.num_experts):
        expected = naive_gram(statistics, expert, weighted=weighted)
        gram = statistics.gram(expert, weighted=weighted)
        assert gram.dtype == torch.float64
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(gram, naive_gram(statistics, expert, weighted=not weighted))


def test_counts_sum_to_top_k_times_tokens():
    statistics = random_statistics(tokens=301, top_k=3)
    assert int(statistics.counts_E.sum()) == 3 * 301
    for expert in range(statistics.num_experts):
        token, gate = statistics.tokens_of(expert)
        assert len(token) == len(gate) == statistics.counts_E[expert]
        assert torch.equal(token, token.sort().values)


@pytest.mark.parametrize("weighted", [True, False])
def test_trace_of_gram_is_the_weighted_sum_of_squared_norms(weighted):
    statistics = random_statistics()
    traces = statistics.traces_E(weighted=weighted)
    for expert in range(statistics.num_experts):
        token, gate = statistics.tokens_of(expert)
        norms = statistics.x_TD[token].double().square().sum(dim=1)
        expected = (gate.double().square() * norms).sum() if weighted else norms.sum()
        gram = statistics.gram(expert, weighted=weighted)
        torch.testing.assert_close(gram.trace(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(traces[expert], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_pooled_gram_is_the_sum_of_the_experts_grams(weighted):
    statistics = random_statistics()
    total = sum(statistics.gram(e, weighted=weighted) for e in range(statistics.num_experts))
    torch.testing.assert_close(
        statistics.pooled_gram(weighted=weighted), total, rtol=1e-12, atol=1e-12
    )


def test_gram_does_not_depend_on_the_chunk_size(monkeypatch):
    statistics = random_statistics(tokens=500)
    whole = statistics.gram(0)
    monkeypatch.setattr(layer_stats, "CHUNK_TOKENS", 7)
    assert (statistics.gram(0) - whole).norm() / whole.norm() < 1e-9


def test_gram_of_a_wide_layer_is_multiplied_in_fp32_and_summed_in_fp64(monkeypatch):
    statistics = random_statistics(tokens=5000, size=48)
    exact = statistics.pooled_gram()
    monkeypatch.setattr(layer_stats, "MAX_FP64_PRODUCT_SIZE", 32)
    error = (statistics.pooled_gram() - exact).norm() / exact.norm()
    assert 0 < error < 1e-6


def test_an_expert_without_tokens_has_a_zero_gram():
    statistics = LayerStatistics(
        x_TD=torch.randn(5, 8),
        index_TK=torch.tensor([[0, 1]] * 5),
        gate_TK=torch.full((5, 2), 0.5),
        num_experts=3,
    )
    assert statistics.counts_E.tolist() == [5, 5, 0]
    assert torch.equal(statistics.gram(2), torch.zeros(8, 8, dtype=torch.float64))


def test_an_expert_with_one_token_has_a_gram_of_rank_one():
    statistics = LayerStatistics(
        x_TD=torch.randn(3, 8),
        index_TK=torch.tensor([[0], [0], [1]]),
        gate_TK=torch.tensor([[1.0], [1.0], [0.5]]),
        num_experts=2,
    )
    x = statistics.x_TD[2].double()
    torch.testing.assert_close(statistics.gram(1), 0.25 * torch.outer(x, x))
    assert torch.linalg.matrix_rank(statistics.gram(1)) == 1


def test_fewer_tokens_than_hidden_size_is_finite_and_rank_deficient():
    statistics = random_statistics(tokens=5, size=32, experts=2, top_k=1)
    gram = statistics.pooled_gram()
    assert gram.isfinite().all()
    assert torch.linalg.matrix_rank(gram) == 5


def test_trace_share_finds_the_attention_sink():
    statistics = random_statistics(tokens=1000)
    assert statistics.trace_share_top(0.001) < 0.05
    statistics.x_TD[17] *= 1000
    assert statistics.trace_share_top(0.001) > 0.99
    assert statistics.trace_share_top(1.0) == pytest.approx(1.0)


def test_save_and_load_give_the_same_tensors(tmp_path):
    statistics = random_statistics(tokens=301, size=23, top_k=3)
    path = tmp_path / "layer-00000.safetensors"
    statistics.save(path)
    loaded = LayerStatistics.load(path)
    assert loaded.num_experts == statistics.num_experts
    for name in ("x_TD", "index_TK", "gate_TK"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name)), name
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_writing_in_batches_gives_the_same_bytes(tmp_path):
    statistics = random_statistics(tokens=301, size=23)
    statistics.save(tmp_path / "whole")
    with StatisticsWriter(
        tmp_path / "batches", num_tokens=301, hidden_size=23, top_k=2, num_experts=6
    ) as writer:
        for start in range(0, 301, 100):
            rows = slice(start, start + 100)
            writer.add(statistics.x_TD[rows], statistics.index_TK[rows], statistics.gate_TK[rows])
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "batches").read_bytes()


def test_an_interrupted_write_leaves_nothing(tmp_path):
    statistics = random_statistics(tokens=10)
    with (
        pytest.raises(KeyboardInterrupt),
        StatisticsWriter(
            tmp_path / "layer", num_tokens=20, hidden_size=24, top_k=2, num_experts=6
        ) as writer,
    ):
        writer.add(statistics.x_TD, statistics.index_TK, statistics.gate_TK)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_write_with_missing_tokens_leaves_nothing(tmp_path):
    statistics = random_statistics(tokens=10)
    with (
        pytest.raises(AssertionError, match="10 of 20 tokens"),
        StatisticsWriter(
            tmp_path / "layer", num_tokens=20, hidden_size=24, top_k=2, num_experts=6
        ) as writer,
    ):
        writer.add(statistics.x_TD, statistics.index_TK, statistics.gate_TK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_token(tmp_path, value):
    statistics = random_statistics(tokens=10)
    statistics.x_TD[7, 3] = value
    with pytest.raises(NumericsError, match="calibration token 7"):
        statistics.save(tmp_path / "layer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TD": torch.zeros(4, 8, dtype=torch.float64)}, "x_TD is torch.float64"),
        ({"x_TD": torch.zeros(3, 8)}, "do not agree"),
        ({"gate_TK": torch.zeros(4, 1)}, "do not agree"),
        ({"index_TK": torch.tensor([[0, 3]] * 4)}, "outside 0 to 2"),
        ({"index_TK": torch.tensor([[0, -1]] * 4)}, "outside 0 to 2"),
        ({"index_TK": torch.tensor([[1, 1]] * 4)}, "twice"),
        ({"num_experts": 1}, "top-k is 2 with 1 experts"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, message):
    fields = {
        "x_TD": torch.zeros(4, 8),
        "index_TK": torch.tensor([[0, 1]] * 4),
        "gate_TK": torch.full((4, 2), 0.5),
        "num_experts": 3,
    }
    with pytest.raises(ValueError, match=message):
        LayerStatistics(**(fields | change))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_a_file_that_is_not_ours_is_an_input_error(tmp_path, content):
    path = tmp_path / "layer"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a layer statistics file"):
        LayerStatistics.load(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="not a layer statistics file"):
        LayerStatistics.load(tmp_path / "absent")

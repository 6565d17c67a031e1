"""The table of launches in docs/kernels.md is what a fresh count finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks import launches
from vllm_moesvd.joined import joined_linear

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.slow
def test_the_page_shows_what_is_counted() -> None:
    counted = launches.table()
    assert len(counted) == 2 + len(launches.MODES) * len(launches.LAYERS) * len(launches.BATCHES)
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(counted) in page


def test_the_counter_sees_launches_and_copies_and_no_views() -> None:
    x = torch.ones(4, 6)
    with launches.Dispatched() as dispatched:
        x.view(2, 12)[0].unsqueeze(0)
        torch.empty_like(x)
        x.t().contiguous()
        x @ x.t()
        x.add_(1)
    assert dispatched.count == {"copies": 1, "operators": 2}


def test_the_counter_sees_into_the_joined_operator() -> None:
    """Where it launches no kernel it is a product of torch for each matrix."""
    x, weights = torch.ones(4, 6), [torch.ones(3, 6), torch.ones(5, 6)]
    with launches.Dispatched() as dispatched:
        joined_linear(x, weights, False)
    assert dispatched.count == {"operators": 2}

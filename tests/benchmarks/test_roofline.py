"""The counts of `benchmarks/roofline.py` against the minimum and against the launcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.roofline import (
    ELEMENT,
    MODELS,
    TP_SIZES,
    Model,
    dense_terms,
    details,
    factored_terms,
    local_bytes,
    minimum_bytes,
    summary,
)
from tests.vllm_moesvd.kernels.layers import real_sizes
from tests.vllm_moesvd.kernels.recorder import launches_of
from vllm_moesvd.kernels.tiles import tile_table

SM_90 = tile_table("sm_90", ELEMENT)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("removed", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_one_token_moves_at_most_five_per_cent_more_than_the_minimum(
    model: Model, removed: float, tp_size: int
) -> None:
    terms = factored_terms(model, removed=removed, tokens=1, tp_size=tp_size, table=SM_90)
    least = minimum_bytes(model, removed=removed, tokens=1, tp_size=tp_size)
    assert least < local_bytes(terms) <= 1.05 * least


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_decoding_moves_fewer_bytes_than_dense(model: Model) -> None:
    for tokens in (1, 8, 64):
        ours = factored_terms(model, removed=0.4, tokens=tokens, tp_size=1, table=SM_90)
        assert local_bytes(ours) < local_bytes(dense_terms(model, tokens=tokens, tp_size=1))


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_kernels_and_launches_are_those_of_the_launcher(model: Model, tokens: int) -> None:
    """Number of launches and operations of the products, from a recording of the real launcher."""
    launches = launches_of(real_sizes(model), tokens, SM_90)
    terms = factored_terms(model, removed=0.4, tokens=tokens, tp_size=1, table=SM_90)
    assert sum(term.launches for term in terms) == len(launches)
    recorded = [metadata(launch) for launch in launches if launch.kernel.launch_metadata]
    assert len(recorded) == len(terms) - 1
    for term, found in zip(terms[1:], recorded, strict=True):
        assert found["flops16"] == pytest.approx(term.flops, rel=1e-9), term.name


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_bytes_that_profilers_show_are_the_counted_ones(model: Model) -> None:
    launches = launches_of(real_sizes(model), 1, SM_90)
    terms = factored_terms(model, removed=0.4, tokens=1, tp_size=1, table=SM_90)
    shown = sum(metadata(launch)["bytes"] for launch in launches if launch.kernel.launch_metadata)
    assert shown == pytest.approx(local_bytes(terms), rel=0.01)


def metadata(launch: Any) -> dict[str, Any]:
    class Compiled:
        name = launch.kernel.__name__

    found = launch.kernel.launch_metadata(launch.grid, Compiled, launch.arguments)
    assert isinstance(found, dict)
    assert not any(isinstance(value, torch.Tensor) for value in found.values())
    return found


def test_the_ranks_remove_the_share_they_are_asked_for() -> None:
    for model in MODELS:
        d, f, e = model.hidden_size, model.expert_width, model.num_experts
        rank, rank_down = model.ranks(0.4)
        factored = rank * (2 * d + 2 * e * f) + rank_down * (f + e * d)
        assert 0.55 < factored / (3 * e * d * f) <= 0.6


def test_tables_have_a_line_for_every_case() -> None:
    assert len(summary(0.4, SM_90)) == 2 + len(MODELS) * 2 * 5
    assert len(details(0.4, SM_90)) > len(summary(0.4, SM_90))

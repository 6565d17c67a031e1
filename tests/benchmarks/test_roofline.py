"""The counts of `benchmarks/roofline.py` against the minimum and against the launcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.moe_layers import FORMS, MODELS, SHARDINGS, Form, Model
from benchmarks.roofline import (
    ELEMENT,
    TP_SIZES,
    dense_terms,
    details,
    factored_terms,
    local_bytes,
    minimum_bytes,
    shardings,
    stored_bytes,
    summary,
)
from tests.vllm_moesvd.kernels.layers import real_sizes
from tests.vllm_moesvd.kernels.recorder import launches_of
from vllm_moesvd.kernels.tiles import tile_table

SM_90 = tile_table("sm_90", ELEMENT)


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("removed", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_one_token_moves_at_most_five_per_cent_more_than_the_minimum(
    model: Model, form: Form, removed: float, tp_size: int
) -> None:
    terms = factored_terms(
        model, removed=removed, tokens=1, tp_size=tp_size, table=SM_90, form=form
    )
    least = minimum_bytes(model, removed=removed, tokens=1, tp_size=tp_size, form=form)
    assert least < local_bytes(terms) <= 1.05 * least


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_decoding_moves_fewer_bytes_than_dense(model: Model) -> None:
    for tokens in (1, 8, 64):
        ours = factored_terms(model, removed=0.4, tokens=tokens, tp_size=1, table=SM_90)
        assert local_bytes(ours) < local_bytes(dense_terms(model, tokens=tokens, tp_size=1))


@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_kernels_and_launches_are_those_of_the_launcher(
    model: Model, form: Form, tokens: int
) -> None:
    """Number of launches and operations of the products, from a recording of the real launcher."""
    launches = launches_of(real_sizes(model, form), tokens, SM_90)
    terms = factored_terms(model, removed=0.4, tokens=tokens, tp_size=1, table=SM_90, form=form)
    assert sum(term.launches for term in terms) == len(launches)
    recorded = [metadata(launch) for launch in launches if launch.kernel.launch_metadata]
    for term in terms[1:]:
        found = sum(recorded.pop(0)["flops16"] for _ in range(term.launches))
        assert found == pytest.approx(term.flops, rel=1e-9), term.name
    assert recorded == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_bytes_that_profilers_show_are_the_counted_ones(model: Model, form: Form) -> None:
    launches = launches_of(real_sizes(model, form), 1, SM_90)
    terms = factored_terms(model, removed=0.4, tokens=1, tp_size=1, table=SM_90, form=form)
    shown = sum(metadata(launch)["bytes"] for launch in launches if launch.kernel.launch_metadata)
    assert shown == pytest.approx(local_bytes(terms), rel=0.01)


def metadata(launch: Any) -> dict[str, Any]:
    class Compiled:
        name = launch.kernel.__name__

    found = launch.kernel.launch_metadata(launch.grid, Compiled, launch.arguments)
    assert isinstance(found, dict)
    assert not any(isinstance(value, torch.Tensor) for value in found.values())
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_ranks_remove_the_share_they_are_asked_for(model: Model, form: Form) -> None:
    stored = stored_bytes(model, removed=0.4, tp_size=1, form=form, sharding="split")
    assert 0.55 < stored / ELEMENT / model.dense_numbers <= 0.6


@pytest.mark.parametrize("form", FORMS)
def test_split_shares_memory_evenly_and_the_other_shardings_exchange_less(form: Form) -> None:
    for model in MODELS:
        whole = stored_bytes(model, removed=0.4, tp_size=1, form=form, sharding="split")
        for sharding in SHARDINGS:
            part = stored_bytes(model, removed=0.4, tp_size=8, form=form, sharding=sharding)
            terms = factored_terms(
                model, removed=0.4, tokens=64, tp_size=8, table=SM_90, form=form, sharding=sharding
            )
            exchanges = [term.name for term in terms if term.is_exchange]
            if sharding == "split":
                assert part == pytest.approx(whole / 8, rel=0.02)
                assert exchanges == ["all-gather z", "reduce-scatter w", "all-reduce y"]
            else:
                assert part >= whole / 8
                assert exchanges == ["all-reduce y"]


def test_the_shared_matrices_of_whole_experts_are_in_every_process() -> None:
    """Worked by hand for Mixtral: one expert of eight, and all of V gate, V up and V down."""
    (mixtral, *_) = MODELS
    rank, rank_down = mixtral.ranks(0.4)
    expert = 2 * 14336 * rank + 4096 * rank_down
    shared = 2 * rank * 4096 + rank_down * 14336
    stored = stored_bytes(mixtral, removed=0.4, tp_size=8, form="shared-v", sharding="experts")
    assert stored == 2 * (expert + shared)


def test_tables_have_a_line_for_every_case() -> None:
    lines = summary(0.4, SM_90, "shared-v", "split")
    assert len(lines) == 2 + len(MODELS) * 2 * 5
    assert len(details(0.4, SM_90, "base-delta", "split")) > len(lines)
    assert len(shardings(0.4, SM_90)) == 2 + len(MODELS) * 9

"""The counts of `benchmarks/latent_layers.py` against the launcher, and its sizes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.latent_layers import (
    LATENT_LAYERS,
    LatentLayer,
    input_terms,
    latent_layers,
    layer_terms,
    table,
)
from benchmarks.roofline import BATCHES, TP_SIZES
from tests.benchmarks.test_roofline import metadata
from tests.vllm_moesvd.kernels.recorder import recording
from vllm_moesvd.kernels.joined import joined_linear
from vllm_moesvd.kernels.tiles import tile_table


@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("layer", LATENT_LAYERS, ids=lambda layer: layer.name)
def test_bytes_and_operations_are_those_of_the_launch(layer: LatentLayer, tokens: int) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    columns = layer.columns(1)
    with recording() as launches:
        joined_linear(
            empty(tokens, layer.hidden),
            [empty(count, layer.hidden) for count in columns],
            [empty(tokens, count) for count in columns],
            tile_table("sm_90", 2),
        )
    (launch,) = launches
    (term,) = input_terms(layer, tokens=tokens, tp_size=1)
    shown = metadata(launch)
    assert (shown["flops16"], shown["bytes"]) == (term.flops, term.num_bytes)


@pytest.mark.parametrize("layer", LATENT_LAYERS, ids=lambda layer: layer.name)
def test_joining_saves_launches_and_no_operation(layer: LatentLayer) -> None:
    for tokens in BATCHES:
        joined, apart = (
            layer_terms(layer, tokens=tokens, tp_size=8, joins=joins) for joins in (True, False)
        )
        assert sum(t.flops for t in joined) == sum(t.flops for t in apart)
        saved = sum(t.launches for t in apart) - sum(t.launches for t in joined)
        assert saved == (len(layer.columns(8)) - 1 if tokens <= 64 else 0)
        assert sum(t.num_bytes for t in joined) <= sum(t.num_bytes for t in apart)


@pytest.mark.parametrize("removed", [0.2, 0.4, 0.6])
def test_the_ranks_remove_the_share_they_are_asked_for(removed: float) -> None:
    for layer in latent_layers(removed):
        model = layer.model
        kept = 3 * model.num_experts * model.expert_width * layer.rank
        kept += 2 * model.hidden_size * layer.rank
        assert 0 <= 1 - kept / model.dense_numbers - removed < 0.06


def test_the_table_has_a_line_for_every_case() -> None:
    assert len(table(LATENT_LAYERS)) == 2 + len(LATENT_LAYERS) * len(TP_SIZES) * len(BATCHES)

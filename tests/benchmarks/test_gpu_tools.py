"""What of the GPU benchmarks can be checked without a GPU: layers, counts, the choice of tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_engine, gpu_layers, gpu_tiles, joined_router, tile_choice
from benchmarks.moe_layers import MODELS, Model
from vllm_moesvd.format import (
    FAMILIES,
    MoEShape,
    dense_layer_tensors,
    layer_tensors,
    parse_spec,
)
from vllm_moesvd.kernels.tiles import tile_table

MIXTRAL = next(family for family in FAMILIES if family.model_type == "mixtral")


@pytest.mark.parametrize("form", gpu_layers.FORMS[1:])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_layer_has_the_size_that_its_name_says(model: Model, form: str, tmp_path: Path) -> None:
    """The folder that the engines get is valid, and removes what is asked, at most 5 % more."""
    gpu_layers.write_config(tmp_path, model, form, num_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    shape = MoEShape(
        hidden_size=model.hidden_size,
        expert_width=model.expert_width,
        num_experts=model.num_experts,
        top_k=model.top_k,
    )
    assert config["architectures"] == [MIXTRAL.factored_architecture]
    spec = parse_spec(config["moesvd"], shape, 2)
    assert list(spec.layers) == [0, 1]
    kept = sum(_numbers(layer_tensors(spec.layers[0], shape, MIXTRAL, 0)))
    whole = sum(_numbers(dense_layer_tensors(shape, MIXTRAL, 0)))
    removed = int(form.rpartition("-")[2]) / 100
    assert removed <= 1 - kept / whole <= removed + 0.05


def _numbers(tensors: dict[str, tuple[int, ...]]) -> list[int]:
    return [int(torch.Size(size).numel()) for size in tensors.values()]


@pytest.mark.parametrize("form", gpu_layers.FORMS)
def test_every_weight_is_read_once_when_all_experts_are_used(form: str, tmp_path: Path) -> None:
    model = MODELS[0]
    tokens = 10**6
    num_bytes, flops = gpu_layers.bytes_and_flops(model, form, tokens)
    dense_bytes, dense_flops = gpu_layers.bytes_and_flops(model, "dense", tokens)
    assert dense_bytes == pytest.approx(2 * model.dense_numbers)
    assert dense_flops == 2 * tokens * model.top_k * model.dense_numbers / model.num_experts
    removed = 0 if form == "dense" else int(form.rpartition("-")[2]) / 100
    assert 1 - removed - 0.05 <= num_bytes / dense_bytes <= 1 - removed
    assert flops > 0


def test_an_unknown_form_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match="--forms dens-40: expected one of dense"):
        gpu_layers.layer_spec(MODELS[0], "dens-40")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    "tool", [gpu_layers, gpu_engine, gpu_tiles, joined_router], ids=lambda t: t.__name__
)
def test_without_a_gpu_they_say_so(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([]) == 2
    assert capsys.readouterr().err == f"{tool.__name__}: no GPU here; this benchmark needs one\n"


def _times(tokens: int, candidate: gpu_tiles.Candidate, micros: float) -> dict[str, Any]:
    steps = dict.fromkeys(("z", "gate_up", "w", "y"), micros)
    return {"model": "Mixtral-8x7B", "svd": False, "tokens": tokens, "target": 132,
            "candidate": candidate.name} | steps  # fmt: skip


def test_the_table_has_the_fastest_tile_of_every_size(tmp_path: Path, capsys: Any) -> None:
    """Two candidates, one better for few rows and one for many: two buckets, a limit between."""
    small = next(c for c in gpu_tiles.candidates() if c.block_m == 16)
    large = next(c for c in gpu_tiles.candidates() if c.block_m == 128)
    rows = [
        _times(tokens, candidate, 1.0 if (candidate is large) == (tokens > 99) else 2.0)
        for tokens in (1, 2, 4096, 8192)
        for candidate in (small, large)
    ]
    file = tmp_path / "times.json"
    file.write_text(json.dumps(rows))
    assert tile_choice.main([str(file), "--buckets", "4"]) == 0
    written = capsys.readouterr()
    assert written.err == "132 programs: 1.000 of the best, on average\n"
    table = json.loads(written.out)["16-bit"]
    assert table["target_programs"] == 132
    assert [bucket["block_m"] for bucket in table["buckets"]] == [16, 128]
    assert 4 <= table["buckets"][0]["max_rows"] < 1024
    assert table["buckets"][1]["max_rows"] is None


def test_a_tile_that_cannot_run_is_not_chosen() -> None:
    first, second = list(gpu_tiles.candidates())[:2]
    rows = [_times(1, first, 5.0), _times(64, first, 5.0), _times(1, second, 1.0)]
    cost, (bucket,) = tile_choice.choose(tile_choice.read_steps(rows, 132), 1)
    assert bucket["linear"]["block_k"] == first.linear.block_k
    assert cost > 1


def test_the_measured_table_is_one_that_its_tool_can_write() -> None:
    tiles = {(c.block_m, c.linear) for c in gpu_tiles.candidates()}
    neurons = {(c.block_m, c.gate_up) for c in gpu_tiles.candidates()}
    for bucket in tile_table("sm_90", 2).buckets:
        assert (bucket.block_m, bucket.linear) in tiles
        assert (bucket.block_m, bucket.gate_up) in neurons

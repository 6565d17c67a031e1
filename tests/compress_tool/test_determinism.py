"""Every method of the command line: threads and batches of the calibration change no result.

Compared is what the layers compute, on the same tokens. The two runs differ in both at once, and
each calibrates by itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.config import METHODS, REFIT_METHODS, Recipe
from compress_tool.factorize.problem import routed_output
from compress_tool.layer_stats import LayerStatistics
from compress_tool.packing import folded_expert
from compress_tool.pipeline import run
from compress_tool.solve import activation_of
from tests.checkpoints import tiny_mixtral
from vllm_moesvd.format import PROJECTIONS

RUNS = ((1, 8), (2, 1))
"""Threads, and sequences in a batch. Single sequences take other kernels than eight at once, whose
last bits differ."""

TOLERANCE = 1e-6
LAYERS = 2


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_mixtral(folder / "dense", num_hidden_layers=LAYERS, dtype=request.param)


def results(source: Path, out: Path, method: str) -> list[Checkpoint]:
    """The finished folders of both runs; factors in fp32, whose rounding hides nothing."""
    recipe = {"ratio": 0.25, "samples": 12, "seq_len": 32, "dtype": "float32"}
    if method == "drop":
        recipe |= {"ratio": 0.175, "dtype": "source"}
    if method in REFIT_METHODS:
        recipe["refit_steps"] = 12
    before = torch.get_num_threads()
    try:
        for threads, batch_size in RUNS:
            torch.set_num_threads(threads)
            run(
                source,
                out / str(threads),
                Recipe(method=method, batch_size=batch_size, **recipe),
                progress=quiet,
                statistics=source.parent / f"stats-{threads}",
            )
    finally:
        torch.set_num_threads(before)
    return [open_checkpoint(out / str(threads), allow_factored=True) for threads, _ in RUNS]


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_batches_change_no_layers_output(source: Path, tmp_path: Path, method: str):
    one, other = results(source, tmp_path, method)
    assert one.spec == other.spec
    if method == "drop":
        assert all(
            torch.equal(*(each.expert_weight(layer, expert, p) for each in (one, other)))
            for layer in range(LAYERS)
            for expert in range(one.shape.num_experts)
            for p in PROJECTIONS
        )
        return
    activation = activation_of(one)
    for layer in range(LAYERS):
        statistics = LayerStatistics.load(statistics_file(source.parent / "stats-1", layer))
        first_TD, second_TD = (
            routed_output(
                statistics, lambda e, c=each, n=layer: folded_expert(c, n, e), activation
            ).double()
            for each in (one, other)
        )
        assert first_TD.norm() > 0
        assert (first_TD - second_TD).norm() < TOLERANCE * first_TD.norm()

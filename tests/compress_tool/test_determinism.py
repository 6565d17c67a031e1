"""Every method of the command line: threads and the batch size change no bit of a result.

The two runs differ in both at once, and each calibrates by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.config import METHODS, REFIT_METHODS, Recipe
from compress_tool.pipeline import run
from tests.checkpoints import tiny_mixtral

RUNS = ((1, 8), (2, 1))
"""Threads, and sequences in work at once."""

METHOD_FLAGS = {method: {"method": method} for method in METHODS} | {
    "d2-moe, Fisher base": {"method": "d2-moe", "base": "fisher"}
}
LAYERS = 2


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_mixtral(folder / "dense", num_hidden_layers=LAYERS, dtype=request.param)


def results(source: Path, out: Path, flags: dict[str, Any]) -> list[Checkpoint]:
    """The finished folders of both runs; factors in fp32, whose rounding hides nothing."""
    recipe = {"ratio": 0.25, "samples": 12, "seq_len": 32, "dtype": "float32"} | flags
    if flags["method"] == "drop":
        recipe |= {"ratio": 0.175, "dtype": "source"}
    if flags["method"] in REFIT_METHODS:
        recipe["refit_steps"] = 12
    before = torch.get_num_threads()
    try:
        for threads, batch_size in RUNS:
            torch.set_num_threads(threads)
            run(
                source,
                out / str(threads),
                Recipe(batch_size=batch_size, **recipe),
                progress=quiet,
                statistics=source.parent / f"stats-{threads}",
            )
    finally:
        torch.set_num_threads(before)
    return [open_checkpoint(out / str(threads), allow_factored=True) for threads, _ in RUNS]


@pytest.mark.parametrize("flags", METHOD_FLAGS.values(), ids=METHOD_FLAGS)
def test_threads_and_batches_change_no_bit(source: Path, tmp_path: Path, flags: dict[str, Any]):
    one, other = results(source, tmp_path, flags)
    assert one.spec == other.spec
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    statistics = [source.parent / f"stats-{threads}" for threads, _ in RUNS]
    for layer in range(LAYERS):
        first, second = (statistics_file(folder, layer).read_bytes() for folder in statistics)
        assert first == second, f"layer {layer}"

"""`compress_tool plan`: what a run would do and need, from headers or a bare config.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import torch

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.config import Recipe
from compress_tool.planning import first_plan
from compress_tool.promised import promised_checkpoint
from compress_tool.sizing import (
    chosen_layers,
    forecast_flops,
    forecast_memory_bytes,
    num_calibration_tokens,
    planned_disk_bytes,
)

PROBE_SIZE: Final = 768
"""Side of the matrix product that measures this machine, a few hundredths of a second."""


def forecast(source: Path, recipe: Recipe) -> dict[str, Any]:
    """The plan's JSON: sizes and ranks, peak memory, disk and time on this machine.

    `source` is a checkpoint folder, or a config.json (then all tensors count as its dtype).
    """
    checkpoint = open_source(source)
    plan = first_plan(checkpoint, recipe, chosen_layers(checkpoint, recipe))
    num_tokens = num_calibration_tokens(recipe)
    # Small and tall products reach a fraction of the square one; measured on the bundled model.
    seconds = 3.0 * forecast_flops(checkpoint, recipe, num_tokens) / _flops_per_second()
    return plan.to_json() | {
        "family": checkpoint.family.name,
        "method": recipe.method,
        "asked_ratio": recipe.ratio,
        "ratio_of": recipe.ratio_of,
        "num_layers": checkpoint.num_layers,
        "calibration_tokens": num_tokens,
        "peak_memory_bytes": forecast_memory_bytes(checkpoint, recipe, num_tokens),
        "disk_bytes": planned_disk_bytes(checkpoint, plan, num_tokens),
        "seconds": round(seconds, 1),
    }


def open_source(source: Path) -> Checkpoint:
    """A dense checkpoint, or the checkpoint a config.json promises."""
    if source.is_file():
        return promised_checkpoint(source)
    return open_checkpoint(source, allow_factored=False)


def _flops_per_second() -> float:
    a = torch.ones(PROBE_SIZE, PROBE_SIZE)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2.0 * PROBE_SIZE**3 / best

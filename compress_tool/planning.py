"""Between calibration and the solver: which layers, at which ranks.

`first_plan` uses headers only and refuses what cannot be reached before anything is computed;
`final_plan` uses the statistics and is carried out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from compress_tool.auto_plan import auto_specs
from compress_tool.calibration import ProgressCallback
from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.durable import write_file
from compress_tool.factorize.sensitivity import layer_sensitivity
from compress_tool.folder import read_json_object
from compress_tool.layer_stats import LayerStatistics
from compress_tool.plan import RATIO_WINDOW
from compress_tool.probe import probe_layers
from compress_tool.sizing import (
    SizePlan,
    budget,
    max_ranks,
    method_rule,
    plan_sizes,
    size_plan,
)
from compress_tool.solve import activation_of, layer_problem

SENSITIVITY_FILE: Final = "sensitivity.json"
MAX_STATE_BYTES: Final = 2**20


def first_plan(checkpoint: Checkpoint, recipe: Recipe, layers: Sequence[int]) -> SizePlan:
    """The size plan before any statistics: refuses an unreachable ratio at once."""
    if recipe.method == "moe-svd" and recipe.layers is None and recipe.rank is None:
        return plan_sizes(checkpoint, recipe, _paper_layers(checkpoint, recipe, layers, None))
    return plan_sizes(checkpoint, recipe, layers)


def final_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    directory: Path,
    state: Path,
    progress: ProgressCallback,
    ids_NS: torch.Tensor,
    device: str,
) -> SizePlan:
    """The plan that is carried out.

    For moe-svd it needs routing and sensitivity, for auto the measured losses of single layers on
    the calibration windows `ids_NS`.
    """
    if recipe.method == "auto" and recipe.rank is None:
        probes = probe_layers(
            checkpoint, recipe, layers, ids_NS, directory, state, progress, device
        )
        asked, refitted = budget(checkpoint, recipe), recipe.num_refit_steps > 0
        specs = auto_specs(checkpoint, asked, probes, centre=recipe.centre, refitted=refitted)
        return size_plan(checkpoint, recipe, specs)
    if recipe.method != "moe-svd":
        return plan_sizes(checkpoint, recipe, layers)
    frequency = {
        layer: LayerStatistics.load(statistics_file(directory, layer)).counts_E for layer in layers
    }
    if recipe.layers is None and recipe.rank is None:
        sensitivity = _sensitivities(checkpoint, recipe, layers, directory, state, progress)
        layers = _paper_layers(checkpoint, recipe, layers, sensitivity)
    return plan_sizes(checkpoint, recipe, layers, frequency)


def _paper_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    sensitivity: Mapping[int, float] | None,
) -> tuple[int, ...]:
    """The least sensitive layers: as few as leave each a rank of `layer_rank_share` of full.

    The paper thresholds S_L "based on the compression ratio" and names neither threshold nor
    rank; its tables decompose few layers at a high rank. Where that count cannot meet the ratio,
    since even full rank removes more, it is the largest count that can.
    """
    ascending = sorted(layers, key=lambda layer: (sensitivity or {}).get(layer, 0.0))
    rule = method_rule(checkpoint, recipe)
    wanted = int(recipe.layer_rank_share * max(max_ranks(checkpoint, recipe)))
    asked = budget(checkpoint, recipe)
    removed = {
        rank: asked.dense_layer_params - rule.params((rank, rank))
        for rank in (1, wanted, rule.max_gate_up)
    }
    needed = asked.ratio * asked.base_params
    allowed = (asked.ratio + RATIO_WINDOW) * asked.base_params
    counts = range(1, len(ascending) + 1)
    able = [
        n for n in counts if n * removed[1] >= needed and n * removed[rule.max_gate_up] <= allowed
    ]
    high = [n for n in able if n * removed[wanted] >= needed]
    count = min(high) if high else max(able, default=len(ascending))
    return tuple(sorted(ascending[:count]))


def _sensitivities(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    directory: Path,
    state: Path,
    progress: ProgressCallback,
) -> dict[int, float]:
    """S_L of every layer, kept on disk as they are found."""
    file = state / SENSITIVITY_FILE
    known: dict[int, float] = {}
    if file.exists():
        values = read_json_object(state, SENSITIVITY_FILE, MAX_STATE_BYTES)
        known = {int(layer): value for layer, value in values.items()}
    activation = activation_of(checkpoint)
    for done, layer in enumerate(layers):
        progress("sensitivity", done, len(layers), f"layer {layer}")
        if layer not in known:
            statistics = LayerStatistics.load(statistics_file(directory, layer))
            known[layer] = layer_sensitivity(
                layer_problem(checkpoint, recipe, layer, statistics, activation, "cpu")
            )
            write_file(file, [json.dumps(known).encode()])
    progress("sensitivity", len(layers), len(layers), "")
    return known

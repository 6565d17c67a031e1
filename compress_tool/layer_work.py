"""From the plan to the shards: every layer kept, dropped from or factored, and on disk by itself.

A layer that is on disk is not done again, which is what makes a run resumable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_tool.calibration import ProgressCallback
from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.dropping import drop_layer
from compress_tool.factorize.problem import Activation
from compress_tool.layer_stats import LayerStatistics
from compress_tool.packing import pack_layer
from compress_tool.plain import DropSpec
from compress_tool.sizing import SizePlan, store_dtype
from compress_tool.solve import activation_of, layer_problem, solve_layer
from compress_tool.trajectory import Trajectory
from compress_tool.writer import OutputFolder
from vllm_moesvd.format import LayerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """What all layers of one run share.

    `statistics` is the folder of the calibration. With a trajectory each layer is solved behind the
    compressed prefix, without one on its own statistics.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plan: SizePlan
    statistics: Path
    folder: OutputFolder
    device: str
    trajectory: Trajectory | None


def write_layers(work: LayerWork, progress: ProgressCallback) -> dict[int, dict[str, Any]]:
    """Write every layer that is not on disk yet; returns the manifest entries of all."""
    num_layers = work.checkpoint.num_layers
    activation = activation_of(work.checkpoint)
    entries: dict[int, dict[str, Any]] = {}
    for layer in range(num_layers):
        progress("factor", layer, num_layers, f"layer {layer}")
        if not work.folder.has_layer(layer):
            spec = work.plan.specs.get(layer)
            if spec is None:
                _keep_layer(work, layer)
            elif isinstance(spec, DropSpec):
                _drop_experts(work, layer, spec, activation)
            else:
                _factor_layer(work, layer, spec, activation)
            if work.trajectory is not None:
                work.trajectory.forget(layer)
        entries[layer] = work.folder.layer_entry(layer)
    work.folder.carry_over(work.checkpoint)
    progress("factor", num_layers, num_layers, "")
    return entries


def _keep_layer(work: LayerWork, layer: int) -> None:
    if work.trajectory is not None:
        work.trajectory.run_dense(layer)
        work.trajectory.commit(layer, None)
    counts: list[int] = []
    if layer in work.checkpoint.moe_layers:
        counts = _load(work, layer).counts_E.tolist()
    entry = {"form": "dense", "counts": counts}
    work.folder.save_layer_shard(layer, work.checkpoint, None, entry)


def _drop_experts(work: LayerWork, layer: int, spec: DropSpec, activation: Activation) -> None:
    statistics = _load(work, layer)
    problem = layer_problem(
        work.checkpoint, work.recipe, layer, statistics, activation, work.device, work.statistics
    )
    work.folder.save_parts(layer, *drop_layer(work.checkpoint, layer, spec, problem))


def _factor_layer(work: LayerWork, layer: int, spec: LayerSpec, activation: Activation) -> None:
    checkpoint, recipe, trajectory = work.checkpoint, work.recipe, work.trajectory
    if trajectory is None:
        statistics, drift_TD = _load(work, layer), None
    else:
        task = trajectory.task(layer)
        statistics, drift_TD = task.statistics, task.drift_TD
    problem = layer_problem(
        checkpoint, recipe, layer, statistics, activation, work.device, work.statistics
    )
    solved = solve_layer(checkpoint, recipe, layer, spec, problem, drift_TD)
    if trajectory is not None:
        trajectory.commit(layer, solved.change_TD)
    assert solved.factors.spec == spec, "the plan's sizes are a promise"
    dtype = store_dtype(checkpoint, recipe, layer)
    tensors = pack_layer(solved.factors, checkpoint.family, checkpoint.shape, layer, dtype)
    work.folder.save_layer_shard(layer, checkpoint, tensors, solved.entry)


def _load(work: LayerWork, layer: int) -> LayerStatistics:
    return LayerStatistics.load(statistics_file(work.statistics, layer))

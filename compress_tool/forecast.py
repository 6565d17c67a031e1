"""`compress_tool plan`: what a run would do and need, from headers or a bare config.json."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from compress_tool.calibration_state import CalibrationFolder
from compress_tool.calibration_text import calibration_windows
from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.config import FISHER, Recipe
from compress_tool.errors import InputError
from compress_tool.factorize.refit import BATCH_TOKENS
from compress_tool.paper_plan import CLUSTERS_FILE, known_measures
from compress_tool.planning import final_plan, first_plan
from compress_tool.probe import known_probes
from compress_tool.promised import promised_checkpoint
from compress_tool.side_by_side import is_steady, num_workers
from compress_tool.sizing import (
    FISHER_SEQUENCES,
    PROBE_TOKENS,
    SIZES_PER_LAYER,
    SizePlan,
    chosen_layers,
    num_calibration_tokens,
    planned_disk_bytes,
)

BASE_MEMORY_BYTES: Final = 700 * 2**20
"""Resident size of Python with torch and transformers imported, before any work."""

PROBE_SIZE: Final = 768
"""Side of the matrix product that measures this machine, a few hundredths of a second."""


def forecast(source: Path, recipe: Recipe, statistics: Path | None = None) -> dict[str, Any]:
    """The plan's JSON: sizes and ranks, peak memory, disk and time on this machine.

    `source` is a checkpoint folder, or a config.json (then all tensors count as its dtype). With
    `statistics`, the `--stats` folder of an earlier run on the same text, the layers are those that
    `run` would choose.
    """
    checkpoint = open_source(source)
    if statistics is None:
        plan = first_plan(checkpoint, recipe, chosen_layers(checkpoint, recipe))
    else:
        if source.is_file():
            raise InputError(f"{source}: --stats needs the checkpoint folder, not a config.json")
        plan = _plan_from_statistics(checkpoint, recipe, statistics)
    num_tokens = num_calibration_tokens(recipe)
    # Small and tall products reach a fraction of the square one; measured on the bundled model.
    seconds = 3.0 * run_flops(checkpoint, recipe, num_tokens) / _flops_per_second()
    return plan.to_json() | {
        "family": checkpoint.family.name,
        "method": recipe.method,
        "asked_ratio": recipe.ratio,
        "ratio_of": recipe.ratio_of,
        "num_layers": checkpoint.num_layers,
        "calibration_tokens": num_tokens,
        "peak_memory_bytes": memory_bytes(checkpoint, recipe, num_tokens),
        "disk_bytes": planned_disk_bytes(checkpoint, recipe, plan, num_tokens),
        "seconds": round(seconds, 1),
    }


def _plan_from_statistics(checkpoint: Checkpoint, recipe: Recipe, statistics: Path) -> SizePlan:
    """What `run` would do with the calibration in `statistics`; refused if it is not finished."""
    layers = chosen_layers(checkpoint, recipe)
    first_plan(checkpoint, recipe, layers)
    ids_NS = calibration_windows(checkpoint, recipe).ids_NS
    folder = CalibrationFolder(
        checkpoint=checkpoint, ids_NS=ids_NS, path=statistics, dtype=torch.float32
    )
    measured: Mapping[int, object] = dict.fromkeys(layers)
    if recipe.method == "auto" and recipe.rank is None:
        measured = known_probes(statistics, recipe)
    elif recipe.method == "moe-svd":
        measured = known_measures(statistics)
        if recipe.combine == "merge" and not (statistics / CLUSTERS_FILE).exists():
            measured = {}
    is_measured = set(layers) <= set(measured)
    if folder.last_done() != checkpoint.num_layers - 1 or not is_measured:
        raise InputError(
            f"{statistics}: has no finished measurements for --method {recipe.method}; a `run` "
            "with --stats makes them once for all ratios, `plan` without it needs none"
        )
    return final_plan(checkpoint, recipe, layers, statistics, _silent, ids_NS, "cpu")


def _silent(stage: str, done: int, total: int, detail: str) -> None:
    """Progress of a stage that has nothing left to do."""


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


def memory_bytes(checkpoint: Checkpoint, recipe: Recipe, num_tokens: int) -> int:
    """Peak memory of a run: the larger of calibration and the solver, for one layer.

    Nothing in it depends on the number of layers.
    """
    shape = checkpoint.shape
    layer = checkpoint.moe_layers[0]
    layer_params = sum(checkpoint.tensors[n].num_params for n in checkpoint.layer_tensors(layer))
    source_bytes = sum(checkpoint.tensors[n].num_bytes for n in checkpoint.layer_tensors(layer))
    states = num_tokens * shape.hidden_size * 4
    at_once = min(recipe.batch_size, torch.get_num_threads())
    batch = at_once * recipe.seq_len * max(shape.expert_width, shape.hidden_size) * 4 * 4
    outer = max(
        (checkpoint.tensors[name].num_params for name in checkpoint.outer_tensors()), default=0
    )
    calibration = states + max(4 * layer_params, 4 * outer) + source_bytes + batch
    uses_neurons = recipe.method != "latent"
    side = max(shape.hidden_size, shape.expert_width if uses_neurons else 0)
    solver = 3 * states + 6 * 8 * side * side + 2 * 4 * layer_params + source_bytes
    # What each further expert in work holds: its tokens and neurons on them, weights, moments.
    rows = num_tokens * shape.top_k // shape.num_experts
    own = 4 * rows * (2 * shape.hidden_size + 6 * shape.expert_width) + 6 * 8 * side * side
    own += 2 * 4 * 3 * shape.hidden_size * shape.expert_width
    solver += (num_workers(shape) - 1) * own
    if recipe.num_refit_steps > 0:
        # Two trajectories, their difference, and a layer's inputs while their batches are joined;
        # parameters, gradients, two moments, both results.
        solver += 6 * states + 5 * 4 * layer_params
    if recipe.base == FISHER:
        # The backward pass: weights, gradients of one sequence, three sums and a square in fp64.
        base = 3 * shape.hidden_size * shape.expert_width
        solver = max(solver, 2 * 4 * layer_params + source_bytes + 4 * 8 * base + batch)
    return BASE_MEMORY_BYTES + max(calibration, solver)


def run_flops(checkpoint: Checkpoint, recipe: Recipe, num_tokens: int) -> float:
    """Floating-point operations of a run, for the time estimate of `plan`."""
    shape = checkpoint.shape
    d, f = shape.hidden_size, shape.expert_width
    routed = num_tokens * shape.top_k
    expert_pass = 2.0 * routed * 3 * d * f
    outside = 2.0 * num_tokens * (checkpoint.total_params - checkpoint.routed_params)
    per_layer = 3 * expert_pass
    per_layer += 2.0 * routed * d * d * 2 + 2.0 * shape.num_experts * f * d * d * 3 + 20.0 * d**3
    if recipe.method != "latent":
        per_layer += 2.0 * routed * f * f * 2 + 20.0 * f**3
    # Six per multiply-add of a token's experts: forward and backward. Small experts are refitted by
    # one thread; two were worth little there when the estimate was compared with runs.
    batch = min(BATCH_TOKENS, num_tokens)
    idle = max(1, torch.get_num_threads() // 2) if is_steady(shape) else 1
    per_layer += idle * recipe.num_refit_steps * 18.0 * batch * shape.top_k * d * f
    if recipe.num_refit_steps > 0:
        per_layer += 2 * expert_pass
    if recipe.base == FISHER:
        # Forward twice, backward as much again; squares of every expert's gradient per sequence.
        sequences = min(recipe.samples, FISHER_SEQUENCES)
        per_layer += 4 * expert_pass * sequences / recipe.samples
        per_layer += 8.0 * sequences * shape.num_experts * 3 * d * f
    if recipe.method == "auto" and recipe.rank is None:
        probed = min(PROBE_TOKENS, num_tokens) * SIZES_PER_LAYER / 2
        per_layer += 2.0 * probed * shape.top_k * 3 * d * f * len(checkpoint.moe_layers)
    return per_layer * len(checkpoint.moe_layers) + outside

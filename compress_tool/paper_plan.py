"""The plan of method moe-svd: which layers, at which k, at which ranks, which experts together.

S_L and the singular values are measured once per calibration and kept beside it; so are the
clusters of merged experts, for every rank that was asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from compress_tool.calibration import ProgressCallback
from compress_tool.calibration_state import statistics_file
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import AUTO_K, Recipe
from compress_tool.durable import write_file
from compress_tool.errors import ResourceError
from compress_tool.factorize.adaptive_k import adaptive_k
from compress_tool.factorize.merging import merged_slots
from compress_tool.factorize.sensitivity import LayerMeasures, measure_layer
from compress_tool.folder import read_json_object
from compress_tool.layer_stats import LayerStatistics
from compress_tool.plan import RATIO_WINDOW, SizeRule
from compress_tool.sizing import (
    PAPER_K,
    SizePlan,
    budget,
    max_ranks,
    method_rule,
    moe_svd_options,
    plan_sizes,
    size_plan,
)
from compress_tool.solve import activation_of, layer_problem
from vllm_moesvd.format import FactoredSpec

MEASURES_FILE: Final = "sensitivity.json"
CLUSTERS_FILE: Final = "clusters.json"
MAX_STATE_BYTES: Final = 16 * 2**20


def first_paper_plan(checkpoint: Checkpoint, recipe: Recipe, layers: Sequence[int]) -> SizePlan:
    """The sizes before any statistics; raises ResourceError only if no statistics could help.

    With `--k auto` that is the plan at the paper's k or, where that cannot be, the nearest one
    that can: every layer's own k is known after calibration.
    """
    largest = -(-checkpoint.shape.num_experts // recipe.groups)
    ks: list[int | None] = [None]
    if recipe.k == AUTO_K:
        ks = [*sorted(range(1, largest + 1), key=lambda k: (abs(k - PAPER_K), k))]
    refused: ResourceError | None = None
    for k in ks:
        rule = method_rule(checkpoint, recipe, k=k)
        rules = dict.fromkeys(layers, rule)
        try:
            return plan_sizes(
                checkpoint, recipe, _paper_layers(checkpoint, recipe, layers, rules), rules
            )
        except ResourceError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def final_paper_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    directory: Path,
    progress: ProgressCallback,
    device: str,
) -> SizePlan:
    """The plan that is carried out, by the statistics in `directory`."""
    frequency = {
        layer: LayerStatistics.load(statistics_file(directory, layer)).counts_E for layer in layers
    }
    chooses_layers = recipe.layers is None and recipe.rank is None
    measures: Mapping[int, LayerMeasures] = {}
    if chooses_layers or recipe.k == AUTO_K:
        measures = _measures(checkpoint, recipe, layers, directory, progress)
    k: dict[int, int] = {}
    if recipe.k == AUTO_K:
        options = moe_svd_options(recipe)
        k = {
            layer: adaptive_k(
                frequency[layer].double(), measures[layer].singular_sums, options, recipe.k_lambda
            )
            for layer in layers
        }
    rules = {
        layer: method_rule(checkpoint, recipe, frequency[layer], k.get(layer)) for layer in layers
    }
    ascending = sorted(layers, key=lambda layer: measures[layer].sensitivity if measures else 0.0)
    plan = plan_sizes(
        checkpoint, recipe, _paper_layers(checkpoint, recipe, ascending, rules), rules
    )
    if recipe.combine != "merge":
        return plan
    specs = _merged(checkpoint, recipe, plan, k, directory, progress, device)
    return size_plan(checkpoint, recipe, specs)


def _paper_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    ascending: Sequence[int],
    rules: Mapping[int, SizeRule],
) -> tuple[int, ...]:
    """The least sensitive layers: as few as leave each a rank of `layer_rank_share` of full.

    `ascending` are the layers by sensitivity. The paper thresholds S_L "based on the compression
    ratio" and names neither threshold nor rank; its tables decompose few layers at a high rank.
    Where that count cannot meet the ratio, since even full rank removes more, it is the largest
    count that can; where none can, the one that comes nearest from above, for the error to name.
    With `--layers` or `--rank` all of them are taken.
    """
    if recipe.layers is not None or recipe.rank is not None:
        return tuple(sorted(ascending))
    full = max(max_ranks(checkpoint, recipe))
    wanted = int(recipe.layer_rank_share * full)
    asked = budget(checkpoint, recipe)
    needed = asked.ratio * asked.base_params
    allowed = (asked.ratio + RATIO_WINDOW) * asked.base_params
    most = at_wanted = least = 0
    enough: list[int] = []
    able: list[int] = []
    high: list[int] = []
    for count, layer in enumerate(ascending, start=1):
        rule = rules[layer]
        most += asked.dense_layer_params - rule.params((1, 1))
        at_wanted += asked.dense_layer_params - rule.params((wanted, wanted))
        least += asked.dense_layer_params - rule.params((full, full))
        if most >= needed:
            enough.append(count)
            if least <= allowed:
                able.append(count)
                if at_wanted >= needed:
                    high.append(count)
    nearest = min(enough, default=len(ascending))
    count = min(high) if high else max(able, default=nearest)
    return tuple(sorted(ascending[:count]))


def known_measures(directory: Path) -> dict[int, LayerMeasures]:
    """The layers of the calibration in `directory` that have been measured."""
    return {
        int(layer): LayerMeasures(
            sensitivity=value["sensitivity"], singular_sums=tuple(value["singular_sums"])
        )
        for layer, value in _kept(directory, MEASURES_FILE).items()
        if isinstance(value, dict)
    }


def _measures(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    directory: Path,
    progress: ProgressCallback,
) -> dict[int, LayerMeasures]:
    """S_L and singular values of every layer, kept beside the statistics as they are found."""
    known = known_measures(directory)
    activation = activation_of(checkpoint)
    for done, layer in enumerate(layers):
        progress("sensitivity", done, len(layers), f"layer {layer}")
        if layer not in known:
            statistics = LayerStatistics.load(statistics_file(directory, layer))
            known[layer] = measure_layer(
                layer_problem(checkpoint, recipe, layer, statistics, activation, "cpu")
            )
            _keep(directory, MEASURES_FILE, {str(key): asdict(m) for key, m in known.items()})
    progress("sensitivity", len(layers), len(layers), "")
    return known


def _merged(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: SizePlan,
    k: Mapping[int, int],
    directory: Path,
    progress: ProgressCallback,
    device: str,
) -> dict[int, FactoredSpec]:
    """The plan's specs with the clusters of experts in the place of the provisional slots."""
    known = _kept(directory, CLUSTERS_FILE)
    activation = activation_of(checkpoint)
    specs: dict[int, FactoredSpec] = {}
    for done, (layer, spec) in enumerate(sorted(plan.specs.items())):
        progress("cluster", done, len(plan.specs), f"layer {layer}")
        assert isinstance(spec, FactoredSpec)
        options = moe_svd_options(recipe, k.get(layer))
        ranks = spec.rank_gate_up, spec.rank_down
        key = f"{layer}, ranks {ranks}, k {options.k}, groups {options.groups}, {recipe.dtype}"
        if key not in known:
            statistics = LayerStatistics.load(statistics_file(directory, layer))
            problem = layer_problem(checkpoint, recipe, layer, statistics, activation, device)
            known[key] = list(merged_slots(problem, *ranks, options))
            _keep(directory, CLUSTERS_FILE, known)
        specs[layer] = replace(spec, expert_slot=tuple(known[key]))
    progress("cluster", len(plan.specs), len(plan.specs), "")
    return specs


def _kept(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / name).exists():
        return {}
    return read_json_object(directory, name, MAX_STATE_BYTES)


def _keep(directory: Path, name: str, values: Mapping[str, Any]) -> None:
    write_file(directory / name, [json.dumps(dict(values)).encode()])

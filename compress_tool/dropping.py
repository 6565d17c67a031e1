"""Method `drop`: whole experts are removed by REAP's criterion; the rest is copied unchanged.

The score of an expert is the mean, over the tokens routed to it, of its gate times the norm of
its output. Every layer loses the same number of experts, with their rows of the router, so that
the result is an ordinary checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.errors import ResourceError, UsageError
from compress_tool.factorize.problem import LayerProblem, relative_error, routed_output
from compress_tool.layer_stats import LayerStatistics
from compress_tool.plain import DropSpec
from compress_tool.plan import RATIO_WINDOW
from compress_tool.shards import Part, copied_parts
from vllm_moesvd.format import PROJECTIONS

ROUNDING: Final = 1e-9
"""Between a ratio that was typed in decimal and the same ratio as a quotient of counts."""


def plan_drop(checkpoint: Checkpoint, recipe: Recipe, layers: Sequence[int]) -> dict[int, DropSpec]:
    """How many experts each layer keeps.

    Only a few ratios can be reached with whole experts. Raises ResourceError naming them when the
    asked one is not among them, unless the recipe says `nearest`: then the next larger one is
    taken. Raises UsageError if not all layers take part.
    """
    if tuple(layers) != checkpoint.moe_layers:
        raise UsageError(
            "--layers cannot be combined with --method drop: an ordinary checkpoint has one number "
            "of experts for all layers"
        )
    if recipe.rank is not None:
        raise UsageError("--rank means nothing to --method drop; give --ratio")
    assert recipe.ratio is not None
    shape = checkpoint.shape
    ratios = {
        kept: dropped_ratio(checkpoint, recipe, kept)
        for kept in range(shape.num_experts, shape.top_k - 1, -1)
    }
    enough = [kept for kept, ratio in ratios.items() if ratio >= recipe.ratio - ROUNDING]
    reachable = ", ".join(f"{ratio:.4f}" for ratio in list(ratios.values())[1:])
    if not enough:
        raise ResourceError(
            f"ratio {recipe.ratio:g} cannot be reached by dropping experts: {shape.top_k} of "
            f"{shape.num_experts} are used per token; reachable are {reachable}"
        )
    kept = max(enough)
    if not recipe.nearest and ratios[kept] > recipe.ratio + RATIO_WINDOW:
        raise ResourceError(
            f"ratio {recipe.ratio:g} cannot be met within {RATIO_WINDOW:g} by dropping whole "
            f"experts; reachable are {reachable}. Ask for one of them, or use --nearest to take "
            f"{ratios[kept]:.4f}"
        )
    return dict.fromkeys(layers, DropSpec(num_experts=kept))


def dropped_ratio(checkpoint: Checkpoint, recipe: Recipe, kept: int) -> float:
    """Share of parameters removed when every layer keeps `kept` experts; router rows included."""
    shape = checkpoint.shape
    dropped = (shape.num_experts - kept) * len(checkpoint.moe_layers)
    params = dropped * (3 * shape.expert_width + 1) * shape.hidden_size
    base = checkpoint.routed_params if recipe.ratio_of == "experts" else checkpoint.total_params
    return params / base


def expert_scores(problem: LayerProblem) -> torch.Tensor:
    """REAP's saliency per expert, fp64 [E]; 0 for an expert that no token reached."""
    scores_E = torch.zeros(problem.shape.num_experts, dtype=torch.float64)
    for expert in range(problem.shape.num_experts):
        h_nF = problem.neuron_rows(expert)
        if len(h_nF):
            down_DF = problem.experts(expert)[2]
            scores_E[expert] = (h_nF @ down_DF.T).double().norm(dim=1).mean()
    return scores_E


def drop_layer(
    checkpoint: Checkpoint, layer: int, spec: DropSpec, problem: LayerProblem
) -> tuple[list[Part], dict[str, Any]]:
    """All parts of the layer's shard, and its manifest entry."""
    scores_E = expert_scores(problem)
    best = scores_E.argsort(descending=True, stable=True)[: spec.num_experts]
    kept = sorted(int(expert) for expert in best)
    router_ED = checkpoint.read(checkpoint.router_tensor(layer))[kept].contiguous()
    statistics = rerouted(problem.statistics, router_ED, problem.shape.top_k)
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    left_TD = routed_output(statistics, lambda e: problem.experts(kept[e]), problem.activation)
    entry: dict[str, Any] = {
        "form": spec.form,
        "experts": kept,
        "scores": [float(f"{score:.6g}") for score in scores_E.tolist()],
        "predicted_loss": None,
        "measured_loss": relative_error(y_TD, left_TD),
        "weight_error": None,
        "counts": problem.statistics.counts_E.tolist(),
    }
    return _layer_parts(checkpoint, layer, kept, router_ED), entry


def rerouted(statistics: LayerStatistics, router_ED: torch.Tensor, top_k: int) -> LayerStatistics:
    """The same tokens sent through a router with other rows: softmax over the best `top_k`."""
    top = (statistics.x_TD.float() @ router_ED.float().T).topk(top_k, dim=-1)
    return dataclasses.replace(
        statistics,
        index_TK=top.indices,
        gate_TK=torch.softmax(top.values, dim=-1),
        num_experts=router_ED.shape[0],
    )


def _layer_parts(
    checkpoint: Checkpoint, layer: int, kept: list[int], router_ED: torch.Tensor
) -> list[Part]:
    """The layer with experts renumbered; every tensor but the router is copied byte for byte."""
    family = checkpoint.family
    renumbered = {
        family.expert_tensor(layer, expert, projection): family.expert_tensor(
            layer, position, projection
        )
        for position, expert in enumerate(kept)
        for projection in PROJECTIONS
    }
    router = checkpoint.router_tensor(layer)
    routed = checkpoint.expert_tensors(layer)
    rest = [n for n in checkpoint.layer_tensors(layer) if n not in {router, *routed}]
    experts = [
        Part(name=renumbered[part.name], data=part.data)
        for part in copied_parts(checkpoint, routed)
        if part.name in renumbered
    ]
    router_part = Part(name=family.router_name.format(layer=layer), data=router_ED)
    return [*copied_parts(checkpoint, rest), router_part, *experts]

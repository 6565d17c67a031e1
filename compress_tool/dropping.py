"""Method `drop`: whole experts are removed by REAP's criterion; the rest is copied unchanged.

The score of an expert is the mean, over the tokens routed to it, of its gate times the norm of
its output. Every layer loses the same number of experts, with their rows of the router, so that
the result is an ordinary checkpoint. Where routing is limited to groups of experts, every group
loses the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.errors import ResourceError, UsageError
from compress_tool.factorize.problem import LayerProblem, relative_error, routed_output
from compress_tool.plain import DropSpec
from compress_tool.plan import RATIO_WINDOW
from compress_tool.routing import rerouted
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
    groups = checkpoint.family.routing_groups(checkpoint.config)
    ratios = {
        kept: dropped_ratio(checkpoint, recipe, kept)
        for kept in range(shape.num_experts, shape.top_k - 1, -1)
        if groups is None or groups.problem(kept, shape.top_k) is None
    }
    if len(ratios) == 1:
        limit = "" if groups is None else f" in {groups.count} groups, of which {groups.used}"
        raise ResourceError(
            f"no expert can be dropped: {shape.top_k} of {shape.num_experts}{limit} are used per "
            "token; use another --method"
        )
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
    bias = 0 if checkpoint.family.router_bias_name is None else 1
    params = dropped * ((3 * shape.expert_width + 1) * shape.hidden_size + bias)
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
    groups = checkpoint.family.routing_groups(checkpoint.config)
    kept = kept_experts(scores_E, spec.num_experts, 1 if groups is None else groups.count)
    router = {
        published: checkpoint.read(name)[kept].contiguous()
        for published, name in checkpoint.router_tensors(layer).items()
    }
    statistics = rerouted(checkpoint, layer, problem.statistics, router)
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
    return _layer_parts(checkpoint, layer, kept, router), entry


def kept_experts(scores_E: torch.Tensor, num_kept: int, num_groups: int) -> list[int]:
    """The experts with the highest scores, as many of every group, ascending.

    Example: scores 1, 2, 3, 4 in two groups, two kept: 1 and 3.
    """
    per_group, size = num_kept // num_groups, len(scores_E) // num_groups
    kept = []
    for group in range(num_groups):
        scores = scores_E[group * size : (group + 1) * size]
        best = scores.argsort(descending=True, stable=True)[:per_group]
        kept += [group * size + int(expert) for expert in best]
    return sorted(kept)


def _layer_parts(
    checkpoint: Checkpoint, layer: int, kept: list[int], router: Mapping[str, torch.Tensor]
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
    routed = checkpoint.expert_tensors(layer)
    replaced = {*checkpoint.router_tensors(layer).values(), *routed}
    rest = [name for name in checkpoint.layer_tensors(layer) if name not in replaced]
    experts = [
        Part(name=renumbered[part.name], data=part.data)
        for part in copied_parts(checkpoint, routed)
        if part.name in renumbered
    ]
    routers = [Part(name=name, data=tensor) for name, tensor in router.items()]
    return [*copied_parts(checkpoint, rest), *routers, *experts]

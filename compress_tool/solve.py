"""One layer from statistics to factors: the solver the recipe asks for, and what it lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.config import AUTO_K, Recipe
from compress_tool.errors import NumericsError
from compress_tool.factorize.adaptive_k import planned_k
from compress_tool.factorize.d2_moe import solve_d2_moe
from compress_tool.factorize.latent import LatentSolution, solve_latent
from compress_tool.factorize.merging import solve_merged
from compress_tool.factorize.moe_svd import solve_moe_svd
from compress_tool.factorize.narrow import NarrowSolution, solve_narrow
from compress_tool.factorize.per_expert import solve_per_expert
from compress_tool.factorize.problem import (
    Activation,
    LayerProblem,
    relative_error,
    routed_output,
)
from compress_tool.factorize.refit import refit
from compress_tool.factorize.shared_v import SharedSolution, solve_shared_v
from compress_tool.factorize.weighted_svd import solve_weighted_svd
from compress_tool.factors import LatentFactors, LayerFactors, NarrowFactors, SharedFactors
from compress_tool.fisher import fisher_base
from compress_tool.layer_stats import LayerStatistics
from compress_tool.packing import folded_expert, folded_factors
from compress_tool.side_by_side import num_workers, steady_sums
from compress_tool.sizing import d2_options, moe_svd_options, store_dtype
from compress_tool.weight_error import keeps_order, layer_weight_error
from vllm_moesvd.format import FactoredSpec, LatentSpec, LayerSpec, NarrowSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedLayer:
    """Factors in fp32 and the layer's entry in the manifest and the report (JSON values).

    `predicted_loss` is the sum of two tail shares: of the routed gate/up energy and of the down
    (or output) energy behind the ranks, and of what narrowing loses. It is None for the printed
    method, which predicts nothing. `change_TD` is the rounded result's output on the problem's
    tokens minus the dense layer's.
    """

    factors: LayerFactors
    predicted_loss: float | None
    entry: dict[str, Any]
    change_TD: torch.Tensor


def activation_of(checkpoint: Checkpoint) -> Activation:
    """The experts' activation function, by transformers' own table."""
    from transformers.activations import ACT2FN

    name = checkpoint.config.get("hidden_act", "silu")
    activation: Activation = ACT2FN[name]
    return activation


def layer_problem(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layer: int,
    statistics: LayerStatistics,
    activation: Activation,
    device: str,
    directory: Path | None = None,
) -> LayerProblem:
    """The solver's view of one dense layer; one expert more than are worked on is kept in memory.

    `directory` is where the calibration is: d2-moe with the Fisher base reads it there.
    """

    @lru_cache(maxsize=num_workers(checkpoint.shape, device) + 1)
    def experts(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate_FD, up_FD, down_DF = folded_expert(checkpoint, layer, expert)
        return gate_FD.to(device), up_FD.to(device), down_DF.to(device)

    return LayerProblem(
        shape=checkpoint.shape,
        statistics=statistics,
        experts=experts,
        activation=activation,
        store_dtype=store_dtype(checkpoint, recipe, layer),
        device=device,
        base=None if directory is None else lambda: fisher_base(directory, layer),
    )


def solve_layer(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layer: int,
    spec: LayerSpec,
    problem: LayerProblem,
    drift_TD: torch.Tensor | None = None,
) -> SolvedLayer:
    """Factor one layer to `spec` and measure the rounded result on the problem's tokens.

    `drift_TD` is what the refit has to make up for beside the layer's own output (`trajectory`).
    Raises NumericsError if a factor or the layer's output is not finite.
    """
    with steady_sums(problem.shape, problem.device):
        return _solved(checkpoint, recipe, layer, spec, problem, drift_TD)


def _solved(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layer: int,
    spec: LayerSpec,
    problem: LayerProblem,
    drift_TD: torch.Tensor | None,
) -> SolvedLayer:
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation, problem.workers)
    _check_finite(layer, {"the dense output": y_TD})
    factors, entry = _closed_form(recipe, spec, problem, y_TD)
    predicted = entry["predicted_loss"]
    if recipe.num_refit_steps > 0 and isinstance(factors, LatentFactors | NarrowFactors):
        target_TD = y_TD if drift_TD is None else y_TD + drift_TD
        fitted = refit(
            problem, factors, target_TD, steps=recipe.num_refit_steps, seed=recipe.seed + layer
        )
        factors = fitted.factors
        entry["refit_error_before"] = fitted.error_before
        entry["refit_error_after"] = fitted.error_after
    dtype = problem.store_dtype
    approximation_TD = stored_output(problem, factors)
    _check_finite(layer, {f"the output of factors stored in {dtype}": approximation_TD})
    entry["measured_loss"] = relative_error(y_TD, approximation_TD)
    entry["counts"] = problem.statistics.counts_E.tolist()
    entry["weight_error"] = None
    if keeps_order(spec, problem.shape.expert_width):
        entry["weight_error"] = layer_weight_error(
            checkpoint, layer, lambda e: _on_cpu(folded_factors(factors, e, dtype))
        )
    return SolvedLayer(
        factors=factors, predicted_loss=predicted, entry=entry, change_TD=approximation_TD - y_TD
    )


def stored_output(problem: LayerProblem, factors: LayerFactors) -> torch.Tensor:
    """The routed output [T, D] of factors as they will be stored, bias included."""
    dtype = problem.store_dtype

    def stored(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return folded_factors(factors, expert, dtype)

    y_TD = routed_output(problem.statistics, stored, problem.activation, problem.workers)
    if isinstance(factors, LatentFactors) and factors.bias_D is not None:
        y_TD += factors.bias_D.to(dtype).float().cpu()
    return y_TD


def _closed_form(
    recipe: Recipe, spec: LayerSpec, problem: LayerProblem, y_TD: torch.Tensor
) -> tuple[LayerFactors, dict[str, Any]]:
    """The factors without a refit, and what the method knows about them."""
    if isinstance(spec, NarrowSpec):
        narrow = solve_narrow(problem, [spec.width])[0]
        entry: dict[str, Any] = {
            "form": spec.form,
            "width": spec.width,
            "predicted_loss": narrow.predicted_loss,
        }
        return narrow.factors, entry
    ranks = spec.rank_gate_up, spec.rank_down
    entry = {"form": spec.form, "rank_gate_up": ranks[0], "rank_down": ranks[1]}
    solution: LatentSolution | SharedSolution | None = None
    lost_neurons = 0.0
    factors: LayerFactors
    if isinstance(spec, LatentSpec):
        if spec.width < problem.shape.expert_width:
            narrowed = solve_narrow(problem, [spec.width])[0]
            problem, lost_neurons = _narrowed(problem, narrowed), narrowed.predicted_loss
        solution = solve_latent(problem, y_TD, *ranks, centre=spec.bias)
        factors = solution.factors
        entry["width"] = spec.width
    elif recipe.method == "moe-svd":
        factors, entry["k"] = _paper_factors(recipe, spec, problem)
    elif recipe.method == "d2-moe":
        solution = solve_d2_moe(problem, *ranks, d2_options(recipe, spec.base_width))
        factors = solution.factors
    elif recipe.method == "svd":
        solution = solve_weighted_svd(problem, *ranks)
        factors = solution.factors
    elif recipe.method in ("asvd", "svd-llm"):
        alpha = recipe.alpha if recipe.method == "asvd" else None
        solution = solve_per_expert(problem, *ranks, alpha=alpha)
        factors = solution.factors
    else:
        solution = solve_shared_v(problem, *ranks, num_groups=spec.num_groups)
        factors = solution.factors
    if not isinstance(spec, LatentSpec):
        entry["distinct_experts"] = spec.num_slots
    entry["predicted_loss"] = None
    if solution is not None:
        entry["predicted_loss"] = (
            solution.predicted_gate_up + solution.predicted_down + lost_neurons
        )
        entry["spectrum_gate_up"] = _rounded(solution.spectrum_gate_up)
        entry["spectrum_down"] = _rounded(solution.spectrum_down)
        entry["predicted_gate_up"] = solution.predicted_gate_up
        entry["predicted_down"] = solution.predicted_down
        entry["random_floor_gate_up"] = solution.random_floor_gate_up
        entry["random_floor_down"] = solution.random_floor_down
    return factors, entry


def _paper_factors(
    recipe: Recipe, spec: FactoredSpec, problem: LayerProblem
) -> tuple[SharedFactors, int]:
    """MoE-SVD as the plan has it, and its k (0: every expert has a U of its own)."""
    ranks = spec.rank_gate_up, spec.rank_down
    if recipe.combine == "merge":
        factors = solve_merged(problem, *ranks, spec.expert_slot, spec.slot_group)
        return factors, max(spec.slot_group.count(group) for group in spec.slot_group)
    options = moe_svd_options(recipe)
    if recipe.k == AUTO_K:
        frequency_E = problem.statistics.counts_E.double()
        options = replace(options, k=planned_k(frequency_E, options, spec.expert_slot))
    return solve_moe_svd(problem, *ranks, options), options.k


def _narrowed(problem: LayerProblem, solution: NarrowSolution) -> LayerProblem:
    """The same tokens, with the narrowed experts in the place of the dense ones."""
    factors = solution.factors

    def experts(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return factors.gate_EFD[expert], factors.up_EFD[expert], factors.down_EDF[expert]

    return replace(problem, experts=experts)


def _check_finite(layer: int, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"layer {layer}: {name} has NaN or infinite values; use --dtype float32, or other "
                "calibration text"
            )


def _on_cpu(
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up, down = weights
    return gate.cpu(), up.cpu(), down.cpu()


def _rounded(spectrum: torch.Tensor) -> list[float]:
    """A spectrum relative to its largest value, four digits each: the report's picture needs no
    more, and the last bits would differ between machines."""
    values = spectrum.clamp(min=0)
    largest = values.max().clamp(min=torch.finfo(values.dtype).tiny)
    return [float(f"{value:.4g}") for value in (values / largest).tolist()]

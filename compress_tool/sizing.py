"""Sizes of a compression before it runs: from headers and a recipe to specs, bytes and a forecast.

This is what `compress_tool plan` prints. No weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch

from compress_tool.calibration_state import calibration_bytes
from compress_tool.checkpoint import TORCH_DTYPES, Checkpoint
from compress_tool.config import FISHER, Recipe
from compress_tool.dropping import plan_drop
from compress_tool.errors import UsageError
from compress_tool.factorize.d2_moe import BaseKind, D2Options
from compress_tool.factorize.merging import provisional_slots
from compress_tool.factorize.moe_svd import MoESVDOptions, trimmed_slots
from compress_tool.factorize.shared_v import contiguous_groups
from compress_tool.plain import DropSpec, PlannedSpec
from compress_tool.plan import (
    Budget,
    MakeSpec,
    SizeRule,
    plan_ranks,
    plan_width,
    size_rule,
    spec_params,
)
from vllm_moesvd.format import FactoredSpec, LatentSpec, LayerSpec, NarrowSpec

PER_EXPERT_METHODS: Final = ("svd", "asvd", "svd-llm")
"""Methods that give every expert U and V of its own."""

PAPER_K: Final = 2
"""U matrices that MoE-SVD combines per expert, unless k is chosen layer by layer."""

PROBE_TOKENS: Final = 8192
"""Tokens on which auto measures the KL of a layer compressed alone."""

FISHER_SEQUENCES: Final = 32
"""Calibration sequences, at most, that `--base fisher` takes the gradient on.

Every sequence adds its own gradient, so 32 are 32 samples of it; the published code takes 1,024 of
2,048 tokens.
"""

SIZES_PER_LAYER: Final = 6
"""Sizes at which it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePlan:
    """Specs of the factored layers, and what they make of the model's size.

    `ratio` is the achieved share of what the recipe's `ratio_of` names; bytes are tensor bytes.
    """

    specs: Mapping[int, PlannedSpec]
    total_params_before: int
    total_params_after: int
    ratio: float
    bytes_before: int
    bytes_after: int

    def to_json(self, predicted_loss: Mapping[int, float | None] | None = None) -> dict[str, Any]:
        """The keys that `plan` and `run` print; a layer's loss is null until it is known."""
        predicted = predicted_loss or {}
        return {
            "total_params_before": self.total_params_before,
            "total_params_after": self.total_params_after,
            "ratio": self.ratio,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [
                layer_json(layer, spec) | {"predicted_loss": predicted.get(layer)}
                for layer, spec in sorted(self.specs.items())
            ],
        }


def layer_json(layer: int, spec: PlannedSpec) -> dict[str, Any]:
    """Index, form and ranks of one layer; `rank` is the larger of the two, the one it serves at."""
    if isinstance(spec, DropSpec):
        return {"index": layer, "form": spec.form, "rank": None, "num_experts": spec.num_experts}
    if isinstance(spec, NarrowSpec):
        return {"index": layer, "form": spec.form, "rank": None, "width": spec.width}
    entry = {
        "index": layer,
        "form": spec.form,
        "rank": max(spec.rank_gate_up, spec.rank_down),
        "rank_gate_up": spec.rank_gate_up,
        "rank_down": spec.rank_down,
    }
    return entry | ({"width": spec.width} if isinstance(spec, LatentSpec) else {})


def moe_svd_options(recipe: Recipe, k: int | None = None) -> MoESVDOptions:
    """The switches of the printed method, with the `k` of a layer where it is chosen by layer.

    Before that, the paper's own k stands in for `--k auto`.
    """
    if k is None:
        k = PAPER_K if isinstance(recipe.k, str) else recipe.k
    return MoESVDOptions(
        k=k, groups=recipe.groups, combine=recipe.combine, whitening=recipe.whitening
    )


def d2_options(recipe: Recipe, width: int) -> D2Options:
    """The switches of d2-moe for a base of `width` neurons."""
    kinds: dict[str, BaseKind] = {kind: kind for kind in get_args(BaseKind)}
    return D2Options(base=kinds[recipe.base], base_width=width, share_v=recipe.share_v)


def base_width(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Neurons of the d2-moe base that are kept; at least one."""
    width = checkpoint.shape.expert_width
    return max(1, width - round(recipe.base_prune * width))


def chosen_layers(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, ...]:
    """The layers that may be factored: all MoE layers, or those of `--layers`."""
    if recipe.layers is None:
        return checkpoint.moe_layers
    missing = [layer for layer in recipe.layers if layer not in checkpoint.moe_layers]
    if missing:
        raise UsageError(
            f"--layers names {missing[0]}, which is not an MoE layer of {checkpoint.path}; "
            f"MoE layers are {_ranges(checkpoint.moe_layers)}"
        )
    return recipe.layers


def max_ranks(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, int]:
    """Ranks (gate/up, down) at which the method is exact."""
    shape = checkpoint.shape
    smaller = min(shape.hidden_size, shape.expert_width)
    if _starts_narrow(recipe):
        return shape.expert_width, shape.expert_width
    if recipe.method in ("auto", "latent"):
        return shape.hidden_size, shape.hidden_size
    if recipe.method == "d2-moe" and recipe.share_v:
        return shape.hidden_size, shape.expert_width
    if recipe.method == "shared-v" and recipe.groups < shape.num_experts:
        return shape.hidden_size, shape.expert_width
    return smaller, smaller


def method_rule(
    checkpoint: Checkpoint,
    recipe: Recipe,
    frequency_E: torch.Tensor | None = None,
    k: int | None = None,
) -> SizeRule:
    """How the size of a layer follows from its ranks under the recipe's method.

    The trimmed slots of moe-svd depend on `k`, where it is chosen by layer, and on the routing
    frequencies of the layer where two experts are equally frequent; without them all are taken as
    different. Merged slots are provisional: right in number, to be replaced by the clusters.
    """
    shape = checkpoint.shape
    if recipe.groups > shape.num_experts:
        raise UsageError(f"--groups is {recipe.groups}, the model has {shape.num_experts} experts")
    experts = tuple(range(shape.num_experts))
    if _starts_narrow(recipe):

        def make_narrow(width: int, _: int) -> LayerSpec:
            return NarrowSpec(width=width)

        return size_rule(make_narrow, shape, checkpoint.family, max_ranks(checkpoint, recipe))
    if recipe.method in ("auto", "latent"):

        def make(rank_gate_up: int, rank_down: int) -> LayerSpec:
            return LatentSpec(
                rank_gate_up=rank_gate_up,
                rank_down=rank_down,
                width=shape.expert_width,
                bias=recipe.centre,
            )

        return size_rule(make, shape, checkpoint.family, max_ranks(checkpoint, recipe))
    if recipe.method == "moe-svd" and recipe.combine == "merge":
        make_factored = _factored(*provisional_slots(shape.num_experts, moe_svd_options(recipe, k)))
    elif recipe.method == "moe-svd":
        if frequency_E is None:
            frequency_E = torch.arange(shape.num_experts, 0, -1)
        slots = trimmed_slots(frequency_E.double(), moe_svd_options(recipe, k))
        make_factored = _factored(slots.expert_slot, slots.slot_group)
    elif recipe.method == "d2-moe":
        groups = (0,) * shape.num_experts if recipe.share_v else experts
        make_factored = _factored(experts, groups, base_width=base_width(checkpoint, recipe))
    elif recipe.method in PER_EXPERT_METHODS or recipe.groups == shape.num_experts:
        make_factored = _factored(experts, experts, is_svd=True)
    else:
        make_factored = _factored(experts, contiguous_groups(shape.num_experts, recipe.groups))
    return size_rule(make_factored, shape, checkpoint.family, max_ranks(checkpoint, recipe))


def plan_sizes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Sequence[int],
    own_rules: Mapping[int, SizeRule] | None = None,
) -> SizePlan:
    """Choose the ranks of `layers`; raises ResourceError if the asked ratio cannot be kept.

    `own_rules` are the layers' size rules where they are not all the same. For auto this is a
    forecast, one width for all layers: `final_plan` decides layer by layer.
    """
    if recipe.method == "drop":
        return size_plan(checkpoint, recipe, plan_drop(checkpoint, recipe, layers))
    shared = method_rule(checkpoint, recipe)
    rules = {layer: own_rules[layer] if own_rules else shared for layer in layers}
    if recipe.rank is not None:
        largest = max_ranks(checkpoint, recipe)
        if recipe.rank > max(largest):
            raise UsageError(
                f"--rank is {recipe.rank}, the largest possible for method {recipe.method} on "
                f"this model is {max(largest)}"
            )
        ranks = min(recipe.rank, largest[0]), min(recipe.rank, largest[1])
        return size_plan(
            checkpoint, recipe, {layer: rule.make_spec(*ranks) for layer, rule in rules.items()}
        )
    asked = budget(checkpoint, recipe)
    specs = None
    if _starts_narrow(recipe):
        specs = plan_width(asked, rules)
    return size_plan(checkpoint, recipe, plan_ranks(asked, rules) if specs is None else specs)


def budget(checkpoint: Checkpoint, recipe: Recipe) -> Budget:
    """What the ratio of the recipe refers to."""
    assert recipe.ratio is not None
    return Budget(
        total_params=checkpoint.total_params,
        routed_params=checkpoint.routed_params,
        dense_layer_params=checkpoint.routed_params // len(checkpoint.moe_layers),
        ratio=recipe.ratio,
        of_experts=recipe.ratio_of == "experts",
    )


def size_plan(checkpoint: Checkpoint, recipe: Recipe, specs: Mapping[int, PlannedSpec]) -> SizePlan:
    """Count parameters and bytes, exactly, for given specs."""
    params_before, bytes_before = checkpoint.total_params, checkpoint.total_bytes
    params_after, bytes_after = params_before, bytes_before
    for layer, spec in specs.items():
        infos = [checkpoint.tensors[name] for name in checkpoint.expert_tensors(layer)]
        if isinstance(spec, DropSpec):
            infos += [checkpoint.tensors[n] for n in checkpoint.router_tensors(layer).values()]
            # Each expert and its row of the router are one part in num_experts of these tensors.
            share = checkpoint.shape.num_experts - spec.num_experts, checkpoint.shape.num_experts
            params_after -= sum(info.num_params for info in infos) * share[0] // share[1]
            bytes_after -= sum(info.num_bytes for info in infos) * share[0] // share[1]
            continue
        added = spec_params(spec, checkpoint.shape, checkpoint.family)
        params_after += added - sum(info.num_params for info in infos)
        bytes_after += added * store_dtype(checkpoint, recipe, layer).itemsize
        bytes_after -= sum(info.num_bytes for info in infos)
    base = checkpoint.routed_params if recipe.ratio_of == "experts" else params_before
    return SizePlan(
        specs=dict(sorted(specs.items())),
        total_params_before=params_before,
        total_params_after=params_after,
        ratio=(params_before - params_after) / base,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
    )


def store_dtype(checkpoint: Checkpoint, recipe: Recipe, layer: int) -> torch.dtype:
    """The dtype a layer's factors are stored in: its experts' own, unless the recipe says."""
    if recipe.dtype != "source":
        dtype: torch.dtype = getattr(torch, recipe.dtype)
        return dtype
    stored: torch.dtype = TORCH_DTYPES[
        checkpoint.tensors[checkpoint.expert_tensors(layer)[0]].dtype
    ]
    return stored


def num_calibration_tokens(recipe: Recipe) -> int:
    """Tokens that calibration runs, if the text has enough of them."""
    return recipe.samples * recipe.seq_len


def planned_disk_bytes(
    checkpoint: Checkpoint, recipe: Recipe, plan: SizePlan, num_tokens: int
) -> int:
    """Disk that a run needs at its peak: the statistics and the output beside each other.

    Sequential calibration adds the hidden states of two models behind two layers.
    """
    trajectory = 4 * num_tokens * checkpoint.shape.hidden_size * 4
    statistics = calibration_bytes(checkpoint, num_tokens, torch.float32)
    backward = fisher_bytes(checkpoint, recipe.samples, recipe.seq_len)
    measured = backward if recipe.base == FISHER else 0
    return plan.bytes_after + statistics + trajectory + measured


def fisher_bytes(checkpoint: Checkpoint, num_sequences: int, seq_len: int) -> int:
    """Disk of `--base fisher` at its peak: the states of all layers, two gradients, the bases."""
    shape = checkpoint.shape
    states = min(num_sequences, FISHER_SEQUENCES) * seq_len * shape.hidden_size * 4
    base = 3 * shape.hidden_size * shape.expert_width * 4
    return (checkpoint.num_layers + 3) * states + len(checkpoint.moe_layers) * base


def _starts_narrow(recipe: Recipe) -> bool:
    """Whether the sizes known before any statistics are widths."""
    return recipe.method == "narrow" or (recipe.method == "auto" and recipe.rank is None)


def _factored(
    expert_slot: tuple[int, ...],
    slot_group: tuple[int, ...],
    *,
    is_svd: bool = False,
    base_width: int = 0,
) -> MakeSpec:
    form: Literal["shared-v", "svd", "base-delta"] = "svd" if is_svd else "shared-v"
    if base_width:
        form = "base-delta"

    def make(rank_gate_up: int, rank_down: int) -> LayerSpec:
        return FactoredSpec(
            rank_gate_up=rank_gate_up,
            rank_down=rank_down,
            expert_slot=expert_slot,
            slot_group=slot_group,
            base_width=base_width,
            form=form,
        )

    return make


def _ranges(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])

"""Outputs that need no plugin: the same architecture with fewer experts, or narrower ones.

When every MoE layer lost the same number of experts, or keeps the same number of neurons, the
result is an ordinary checkpoint with one number changed in config.json; it has no `moesvd` key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress_tool.checkpoint import Checkpoint
from compress_tool.writer import factored_config
from vllm_moesvd.format import CheckpointSpec, LayerSpec, NarrowSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DropSpec:
    """A layer that keeps `num_experts` whole experts. Not part of the format: it stays dense."""

    num_experts: int

    form: Literal["drop"] = "drop"


PlannedSpec = LayerSpec | DropSpec


def plain_changes(
    checkpoint: Checkpoint, specs: Mapping[int, PlannedSpec]
) -> dict[str, int] | None:
    """The config.json entries that describe all layers at once, or None if there is none."""
    kinds = set(specs.values())
    if set(specs) != set(checkpoint.moe_layers) or len(kinds) != 1:
        return None
    (spec,) = kinds
    if isinstance(spec, DropSpec):
        return checkpoint.family.with_num_experts(checkpoint.config, spec.num_experts)
    if isinstance(spec, NarrowSpec) and not checkpoint.family.width_is_shared:
        return {checkpoint.family.expert_width_key: spec.width}
    return None


def output_config(checkpoint: Checkpoint, specs: Mapping[int, PlannedSpec]) -> dict[str, Any]:
    """The config.json of the output: the source's own with one change, or the plugin's."""
    changes = plain_changes(checkpoint, specs)
    if changes is not None:
        return checkpoint.config | changes
    factored = {layer: spec for layer, spec in specs.items() if not isinstance(spec, DropSpec)}
    assert len(factored) == len(specs), "experts are dropped in all layers alike or in none"
    return factored_config(checkpoint, CheckpointSpec(layers=factored))

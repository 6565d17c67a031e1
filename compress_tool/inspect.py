"""What `compress_tool inspect` says about a checkpoint, from its headers alone."""

from __future__ import annotations

from typing import Any

from compress_tool.checkpoint import Checkpoint
from vllm_moesvd.format import FactoredSpec, LayerSpec, spec_to_json


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """JSON values: sizes of the model and the form of every factored layer."""
    factored = {} if checkpoint.spec is None else dict(checkpoint.spec.layers)
    entries = {} if checkpoint.spec is None else spec_to_json(checkpoint.spec)["layers"]
    return {
        "family": checkpoint.family.name,
        "architecture": checkpoint.config["architectures"][0],
        "num_layers": checkpoint.num_layers,
        "num_experts": checkpoint.shape.num_experts,
        "experts_per_token": checkpoint.shape.top_k,
        "hidden_size": checkpoint.shape.hidden_size,
        "expert_width": checkpoint.shape.expert_width,
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "total_params": checkpoint.total_params,
        "routed_params": checkpoint.routed_params,
        "active_params": active_params(checkpoint),
        "bytes": checkpoint.total_bytes,
        "factored_layers": sorted(factored),
        "layers": [{"index": layer} | entries[str(layer)] for layer in sorted(factored)],
    }


def active_params(checkpoint: Checkpoint) -> int:
    """Parameters that take part in one token: everything but the experts it is not routed to."""
    active = checkpoint.total_params - checkpoint.routed_params
    for layer in checkpoint.moe_layers:
        sizes = {
            name: checkpoint.tensors[name].num_params for name in checkpoint.expert_tensors(layer)
        }
        active += _active_in_layer(checkpoint, checkpoint.layer_spec(layer), sizes)
    return active


def _active_in_layer(checkpoint: Checkpoint, spec: LayerSpec | None, sizes: dict[str, int]) -> int:
    shape = checkpoint.shape
    if isinstance(spec, FactoredSpec):
        u = sum(size for name, size in sizes.items() if ".moesvd.u_" in name)
        v = sum(size for name, size in sizes.items() if ".moesvd.v_" in name)
        num_used_groups = min(shape.top_k, spec.num_groups)
        num_used_slots = min(shape.top_k, spec.num_slots)
        return u // spec.num_slots * num_used_slots + v // spec.num_groups * num_used_groups
    shared = sum(size for name, size in sizes.items() if ".moesvd." in name)
    return shared + (sum(sizes.values()) - shared) // shape.num_experts * shape.top_k

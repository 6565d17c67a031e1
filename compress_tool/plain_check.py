"""`verify --against` for outputs without a `moesvd` key: what the manifest says each layer lost.

An ordinary checkpoint does not say what it was made from; its manifest does. Dropped experts are
checked by comparing every kept one with the expert of the source that the manifest names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.manifest import MANIFEST_FILE
from vllm_moesvd.format import PROJECTIONS

PLAIN_FORMS: Final = ("drop", "narrow")


def plain_layers(
    manifest: Mapping[str, Any] | None, checkpoint: Checkpoint
) -> dict[int, Mapping[str, Any]]:
    """Manifest entries of the layers that lost experts or neurons, of a checkpoint without spec."""
    if manifest is None or checkpoint.spec is not None:
        return {}
    entries = {layer: manifest["layers"].get(str(layer)) for layer in checkpoint.moe_layers}
    return {
        layer: entry
        for layer, entry in entries.items()
        if isinstance(entry, dict) and entry.get("form") in PLAIN_FORMS
    }


def changed_keys(checkpoint: Checkpoint, layers: Mapping[int, Mapping[str, Any]]) -> set[str]:
    """The config.json keys in which such a checkpoint differs from its source."""
    family = checkpoint.family
    keys = {"drop": family.num_experts_keys, "narrow": (family.expert_width_key,)}
    return {key for entry in layers.values() for key in keys[str(entry["form"])]}


def changed_tensors(against: Checkpoint, layers: Mapping[int, Mapping[str, Any]]) -> set[str]:
    """The source's tensors that the output does not hold as they were."""
    names = {name for layer in layers for name in against.expert_tensors(layer)}
    dropped = [layer for layer, entry in layers.items() if entry["form"] == "drop"]
    return names | {name for layer in dropped for name in against.router_tensors(layer).values()}


def drop_problems(
    checkpoint: Checkpoint, against: Checkpoint, layer: int, entry: Mapping[str, Any]
) -> Iterator[str]:
    """Compare every kept expert, and its row of the router, with the source's."""
    kept = entry.get("experts")
    if not (
        isinstance(kept, list)
        and len(kept) == checkpoint.shape.num_experts
        and all(type(e) is int and 0 <= e < against.shape.num_experts for e in kept)
        and sorted(set(kept)) == kept
    ):
        yield (
            f"{checkpoint.path / MANIFEST_FILE}: layer {layer} does not name the "
            f"{checkpoint.shape.num_experts} experts that were kept"
        )
        return
    routers = checkpoint.router_tensors(layer)
    for published, name in against.router_tensors(layer).items():
        if not torch.equal(checkpoint.read(routers[published]), against.read(name)[kept]):
            yield f"{checkpoint.path}: layer {layer}: the router is not the source's rows {kept}"
    for position, expert in enumerate(kept):
        for projection in PROJECTIONS:
            ours = checkpoint.expert_weight(layer, position, projection)
            theirs = against.expert_weight(layer, expert, projection)
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                yield (
                    f"{checkpoint.path}: layer {layer}: {projection} of expert {position} is not "
                    f"a copy of the source's expert {expert}"
                )

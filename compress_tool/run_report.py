"""report.json: what a run did, layer by layer, and what its user should be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.corpus import TokenWindows
from compress_tool.plain import plain_changes
from compress_tool.sizing import SizePlan


def run_report(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: SizePlan,
    entries: Mapping[int, Mapping[str, Any]],
    windows: TokenWindows,
    files: Sequence[Path],
) -> dict[str, Any]:
    """report.json: the plan's keys, with losses and routing per layer. No paths, no times."""
    predicted = {layer: entry.get("predicted_loss") for layer, entry in entries.items()}
    report = plan.to_json(predicted)
    by_index = {entry["index"]: entry for entry in report["layers"]}
    report["layers"] = [
        by_index.get(layer, {"index": layer, "rank": None, "predicted_loss": None})
        | dict(entries[layer])
        for layer in range(checkpoint.num_layers)
    ]
    return report | {
        "source": checkpoint.path.resolve().name,
        "family": checkpoint.family.name,
        "method": recipe.method,
        "asked_ratio": recipe.ratio,
        "ratio_of": recipe.ratio_of,
        "plain": plain_changes(checkpoint, plan.specs) is not None,
        "num_experts": checkpoint.shape.num_experts,
        "top_k": checkpoint.shape.top_k,
        "routed_params_before": checkpoint.routed_params,
        "calibration": {
            "files": [file.name for file in files],
            "samples": windows.ids_NS.shape[0],
            "seq_len": windows.ids_NS.shape[1],
            "tokens": windows.ids_NS.numel(),
            "tokens_in_text": windows.num_tokens,
        },
    }


def routing_warnings(entries: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    lines = []
    for layer, entry in sorted(entries.items()):
        missed = [expert for expert, count in enumerate(entry.get("counts") or []) if count == 0]
        if missed and entry["form"] not in ("dense", "drop"):
            shown = ", ".join(map(str, missed[:8])) + (", …" if len(missed) > 8 else "")
            lines.append(
                f"layer {layer}: calibration never routed a token to expert {shown}; "
                f"{'they take' if len(missed) > 1 else 'it takes'} the pooled statistics of the "
                "other experts (more or other --calibration text reaches more experts)"
            )
    return tuple(lines)

"""report.json: what a run did, layer by layer, and what its user should be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_tool.auto_plan import expected_kl
from compress_tool.checkpoint import Checkpoint
from compress_tool.config import Recipe
from compress_tool.corpus import TokenWindows
from compress_tool.paper_plan import known_measures
from compress_tool.plain import DropSpec, plain_changes
from compress_tool.probe import known_probes, split_sequences
from compress_tool.sizing import SizePlan
from compress_tool.trajectory import Trajectory


def run_report(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: SizePlan,
    entries: Mapping[int, Mapping[str, Any]],
    windows: TokenWindows,
    files: Sequence[Path],
    directory: Path,
    trajectory: Trajectory | None,
) -> dict[str, Any]:
    """report.json: the plan's keys, with losses and routing per layer. No paths, no times.

    `directory` holds what was measured beside the statistics. With a `trajectory` the distance of
    the whole compressed model from the dense one is measured on the sequences of the probes.
    """
    predicted = {layer: entry.get("predicted_loss") for layer, entry in entries.items()}
    report = plan.to_json(predicted)
    by_index = {entry["index"]: entry for entry in report["layers"]}
    measured = _layer_measures(checkpoint, recipe, plan, directory)
    report["layers"] = [
        by_index.get(layer, {"index": layer, "rank": None, "predicted_loss": None})
        | dict(entries[layer])
        | measured.get(layer, {})
        for layer in range(checkpoint.num_layers)
    ]
    num_sequences, seq_len = windows.ids_NS.shape
    kl = None
    if trajectory is not None:
        kl = trajectory.final_kl(split_sequences(num_sequences, seq_len).probed)
    return report | {
        "source": checkpoint.path.resolve().name,
        "family": checkpoint.family.name,
        "method": recipe.method,
        "asked_ratio": recipe.ratio,
        "ratio_of": recipe.ratio_of,
        "plain": plain_changes(checkpoint, plan.specs) is not None,
        "num_experts": checkpoint.shape.num_experts,
        "top_k": checkpoint.shape.top_k,
        "hidden_size": checkpoint.shape.hidden_size,
        "expert_width": checkpoint.shape.expert_width,
        "routed_params_before": checkpoint.routed_params,
        "measured_kl": kl,
        "calibration": {
            "files": [file.name for file in files],
            "samples": num_sequences,
            "seq_len": seq_len,
            "tokens": windows.ids_NS.numel(),
            "tokens_in_text": windows.num_tokens,
        },
    }


def _layer_measures(
    checkpoint: Checkpoint, recipe: Recipe, plan: SizePlan, directory: Path
) -> dict[int, dict[str, Any]]:
    """What the plan was made from: `probes` and `predicted_kl` for auto, S_L for moe-svd."""
    if recipe.method == "auto" and recipe.rank is None:
        refitted = recipe.num_refit_steps > 0
        found: dict[int, dict[str, Any]] = {}
        for layer, probes in known_probes(directory, recipe).items():
            spec = plan.specs.get(layer)
            assert not isinstance(spec, DropSpec), "auto never drops experts"
            kl = expected_kl(spec, probes, checkpoint.shape, refitted=refitted)
            found[layer] = {"probes": dict(probes), "predicted_kl": kl}
        return found
    if recipe.method == "moe-svd":
        return {
            layer: {"sensitivity": measure.sensitivity}
            for layer, measure in known_measures(directory).items()
        }
    return {}


def routing_warnings(entries: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    lines = []
    for layer, entry in sorted(entries.items()):
        missed = [expert for expert, count in enumerate(entry.get("counts") or []) if count == 0]
        if missed and entry["form"] not in ("dense", "drop"):
            shown = ", ".join(map(str, missed[:8])) + (", …" if len(missed) > 8 else "")
            experts, their = ("experts", "their") if len(missed) > 1 else ("expert", "its")
            lines.append(
                f"layer {layer}: calibration never routed a token to {experts} {shown}; "
                f"{their} factors fit no activations of {their} own (more or other "
                "--calibration text reaches more experts)"
            )
    return tuple(lines)

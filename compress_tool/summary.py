"""Results as text for a person; the JSON of the same results is the contract for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from compress_tool.units import bytes_text, clock_text, params_text

NOT_METRICS = frozenset({"samples", "num_fewshot", "version", "against"})
"""What stands beside the metrics of a task."""

MAX_SHOWN_GROUPS = 8
"""Of layers with equal form and size; a longer list is in the report."""


def inspect_text(result: Mapping[str, Any]) -> str:
    factored = result["factored_layers"]
    rows = [
        ("family", result["family"]),
        ("layers", f"{result['num_layers']}, {len(factored)} factored"),
        ("experts", f"{result['num_experts']}, {result['experts_per_token']} per token"),
        ("hidden, expert width", f"{result['hidden_size']}, {result['expert_width']}"),
        ("parameters", params_text(result["total_params"])),
        ("  routed experts", params_text(result["routed_params"])),
        ("  active per token", params_text(result["active_params"])),
        ("weights", f"{bytes_text(result['bytes'])}, {', '.join(result['dtypes'])}"),
    ]
    return _aligned(rows)


def plan_text(result: Mapping[str, Any]) -> str:
    rows = [
        *_size_rows(result),
        ("layers", _layer_summary(result["layers"])),
        ("peak memory", bytes_text(result["peak_memory_bytes"])),
        ("disk while running", bytes_text(result["disk_bytes"])),
        ("time on this machine", f"about {clock_text(result['seconds'])}"),
    ]
    return _aligned(rows)


def run_text(result: Mapping[str, Any]) -> str:
    factored = [layer for layer in result["layers"] if layer["form"] != "dense"]
    rows = [
        *_size_rows(result),
        ("layers", _layer_summary(factored)),
        ("worst layer", _worst(factored)),
        ("time", clock_text(result["seconds"])),
        ("peak memory", bytes_text(result["peak_memory_bytes"])),
        ("output", f"{result['out']} (report.html, README.md)"),
        ("serve it", f"vllm serve {result['out']}"),
    ]
    already = "this run was already finished; nothing to do\n" if result["already_finished"] else ""
    return already + _aligned(rows)


def verify_text(result: Mapping[str, Any], path: Path) -> str:
    if result["ok"]:
        return f"{path}: {result['checked_tensors']} tensors, everything as promised\n"
    lines = [f"problem: {problem}" for problem in result["problems"]]
    return "\n".join([*lines, f"{path}: {len(lines)} problem(s)"]) + "\n"


def eval_text(result: Mapping[str, Any]) -> str:
    rows = []
    if result["perplexity"] is not None:
        rows.append(("perplexity", f"{result['perplexity']:.4f}"))
        rows.append(("tokens scored", f"{result['tokens']:,}"))
    if result["kl"] is not None:
        rows.append(("KL to the other model", f"{result['kl']:.5f} nats per token"))
        rows.append(("same best token", f"{result['agreement']:.2%}"))
    for name, values in result["tasks"].items():
        rows.extend(_task_rows(name, values))
    return _aligned(rows)


def _task_rows(name: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`arc_easy acc    0.8123 ± 0.0080 of 2,376 (the other model 0.8350)`."""
    rows = []
    for metric, value in values.items():
        if metric in NOT_METRICS or "_stderr" in metric:
            continue
        base, _, answer_filter = metric.partition(",")
        error = values.get(f"{base}_stderr{',' if answer_filter else ''}{answer_filter}")
        text = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
        if values.get("samples") is not None:
            text += f" of {values['samples']:,}"
        if "against" in values:
            text += f" (the other model {values['against'][metric]:.4f})"
        rows.append((f"{name} {metric}", text))
    return rows


def _size_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    before, after = result["total_params_before"], result["total_params_after"]
    share = "routed-experts parameters" if result.get("ratio_of") == "experts" else "parameters"
    return [
        ("parameters", f"{params_text(before)} → {params_text(after)}"),
        ("weights", f"{bytes_text(result['bytes_before'])} → {bytes_text(result['bytes_after'])}"),
        ("removed", f"{result['ratio']:.2%} of all {share}"),
    ]


def _layer_summary(layers: Sequence[Mapping[str, Any]]) -> str:
    """Equal neighbours together: `0–3 latent rank 72/71, 4–7 latent rank 71/71`."""
    texts = []
    # Numbers that follow one another are as far from their places in the list.
    numbered = ((layer["index"] - place, layer) for place, layer in enumerate(layers))
    for (description, _), group in groupby(numbered, key=lambda n: (_layer_form(n[1]), n[0])):
        indices = [layer["index"] for _, layer in group]
        span = str(indices[0]) if len(indices) == 1 else f"{indices[0]}–{indices[-1]}"
        texts.append(f"{span} {description}")
    shown = ", ".join(texts[:MAX_SHOWN_GROUPS])
    return shown + (", …" if len(texts) > MAX_SHOWN_GROUPS else "")


def _layer_form(layer: Mapping[str, Any]) -> str:
    text = str(layer["form"])
    if layer.get("rank_gate_up") is not None:
        text += f" rank {layer['rank_gate_up']}/{layer['rank_down']}"
    return text if layer.get("width") is None else f"{text} width {layer['width']}"


def _worst(layers: Sequence[Mapping[str, Any]]) -> str:
    worst = max(layers, key=lambda layer: layer.get("measured_loss") or 0.0)
    loss = worst.get("measured_loss") or 0.0
    return f"{worst['index']}, {loss:.4g} of its output energy lost on the calibration text"


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows) + 2
    return "".join(f"{label:<{width}}{value}\n" for label, value in rows)

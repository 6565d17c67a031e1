"""`compress_tool report`: one self-contained report.html about a finished checkpoint.

It reads report.json, which `run` leaves in the output folder, and the headers of the checkpoint.
Every key of report.json may be missing:

    method, ratio, total_params_before, total_params_after, bytes_before, bytes_after, num_experts
    hidden_size, expert_width, routed_params_before
    measured_kl   KL to the dense model of all compressed layers together, nats per token
    calibration   {files [names], samples, seq_len}
    layers        [{index, form, width, rank_gate_up, rank_down, predicted_loss, measured_loss,
                    weight_error {gate, up, down}, counts [E], distinct_experts, predicted_kl,
                    probes {size: KL}, sensitivity, spectrum_gate_up, spectrum_down,
                    random_floor_gate_up, random_floor_down}]

The spectra are eigenvalues, largest first; `predicted_loss` is the sum of their tails, or what
narrowing loses. Without matplotlib the page has its tables only.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from compress_tool.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, open_checkpoint
from compress_tool.durable import write_file
from compress_tool.errors import InputError
from compress_tool.folder import read_json_object
from compress_tool.report_page import page_html
from compress_tool.report_sections import sections_of
from vllm_moesvd.format import dense_layer_tensors

REPORT_DATA_FILE: Final = "report.json"
REPORT_FILE: Final = "report.html"
MAX_REPORT_BYTES: Final = 256 * 2**20
"""Spectra and counts of 100 layers with 7168 eigenvalues and 512 experts are some 40 MB."""


def write_report(folder: Path, compare: Sequence[Path] = ()) -> Path:
    """Write report.html into the checkpoint `folder` and return its path.

    `compare` are outputs of the same source, for the curve of loss against size. Raises InputError
    where there is no checkpoint, report.json is not what `run` writes, or a compared folder is of
    another source.
    """
    checkpoint = open_checkpoint(folder, allow_factored=True)
    report = _read(checkpoint)
    parts = size_by_part(checkpoint)
    if "bytes_before" in report:
        # The config of a plain output no longer says how large the experts once were.
        before, after = parts["routed experts"]
        missing = report["bytes_before"] - sum(size for size, _ in parts.values())
        parts["routed experts"] = (before + missing, after)
    report = _with_kept_shares(checkpoint, report)
    others = [_read(open_checkpoint(other, allow_factored=True)) for other in compare]
    runs = compared_runs([report, *others], [folder, *compare]) if others else []
    # Named after the source: equal runs into different folders give equal bytes.
    name = f"{report.get('source', checkpoint.family.name)}, compressed"
    page = report_html(report, name=name, parts=parts, runs=runs)
    file = checkpoint.path / REPORT_FILE
    write_file(file, [page.encode()])
    return file


def size_by_part(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Bytes before and after compression of each part; the sum of "after" is the checkpoint.

    "Before" follows from the config: dense experts in the number format of the stored ones.
    """
    parts = {part: [0, 0] for part in ("routed experts", "attention", "router and norms")}
    parts["embeddings"] = [0, 0]
    routed = {name for layer in checkpoint.moe_layers for name in checkpoint.expert_tensors(layer)}
    for name, info in checkpoint.tensors.items():
        if name in routed:
            parts["routed experts"][1] += info.num_bytes
            continue
        if name == LM_HEAD and checkpoint.tied_embeddings:
            continue
        if name in (EMBEDDING, LM_HEAD):
            part = "embeddings"
        else:
            part = _part_of(name)
            parts.setdefault(part, [0, 0])
        parts[part][0] += info.num_bytes
        parts[part][1] += info.num_bytes
    for layer in checkpoint.moe_layers:
        infos = [checkpoint.tensors[name] for name in checkpoint.expert_tensors(layer)]
        item_bytes = infos[0].num_bytes // infos[0].num_params
        shapes = dense_layer_tensors(checkpoint.shape, checkpoint.family, layer).values()
        parts["routed experts"][0] += item_bytes * sum(rows * width for rows, width in shapes)
    return {part: (before, after) for part, (before, after) in parts.items()}


def _part_of(name: str) -> str:
    """Which part of a decoder layer a tensor that is no routed expert's belongs to."""
    if ".self_attn." in name:
        return "attention"
    if "shared_expert" in name:
        return "shared experts"
    return "dense layers" if name.endswith("_proj.weight") else "router and norms"


def report_html(
    report: Mapping[str, Any],
    *,
    name: str,
    parts: Mapping[str, tuple[int, int]],
    runs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text: no script, no address of anything outside it."""
    layers = shown_layers(report)
    return page_html(html.escape(name), sections_of(report, layers, parts, runs))


def shown_layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers by index, with what the figures and tables derive from other keys.

    `shown_form` tells a latent layer that is narrow as well; `*_share` are sizes relative to the
    dense layer's; `distinct_experts` is filled in for the forms that keep all experts.
    """
    total = report.get("num_experts")
    hidden, width = report.get("hidden_size"), report.get("expert_width")
    # A latent layer's rank replaces the hidden size; other factors go up to the smaller side.
    smaller = min((x for x in (hidden, width) if isinstance(x, int)), default=None)
    layers = []
    for layer in sorted(report.get("layers") or (), key=lambda layer: int(layer["index"])):
        form = str(layer.get("form") or "dense")
        kept_experts = layer.get("num_experts") if form == "drop" else total
        if layer.get("counts") == []:
            kept_experts = None  # no routed layer, so it has no experts
        is_narrow = _less(layer.get("width"), width)
        rank = hidden if form == "latent" else smaller
        full = {"width": width, "rank_gate_up": rank, "rank_down": rank}
        extra: dict[str, Any] = {
            "shown_form": "latent, narrow" if form == "latent" and is_narrow else form,
            "num_experts": total,
            "distinct_experts": layer.get("distinct_experts", kept_experts),
        }
        for key, size in full.items():
            value = layer.get(key)
            if isinstance(value, int) and isinstance(size, int) and size > 0:
                extra[f"{key}_share"] = value / size
        layers.append({**layer, **extra})
    return layers


def compared_runs(
    reports: Sequence[Mapping[str, Any]], folders: Sequence[Path]
) -> list[dict[str, Any]]:
    """A row per run: method, folder name, ratio, bytes, share of bytes left, and losses.

    `mean_loss` is the mean over layers of the relative squared error of their outputs, dense
    layers counting 0. Raises InputError for a run of another source.
    """
    first = reports[0]
    runs = []
    for report, folder in zip(reports, folders, strict=True):
        keys = ("source", "bytes_before", "total_params_before")
        if any(report.get(key) is None or report.get(key) != first.get(key) for key in keys):
            raise InputError(
                f"{folder}: is of source {report.get('source')!r} with {report.get('bytes_before')}"
                f" bytes, {folders[0]} of {first.get('source')!r} with {first.get('bytes_before')};"
                " only outputs of one source can be compared"
            )
        losses = [layer.get("measured_loss") or 0.0 for layer in report.get("layers") or ()]
        runs.append(
            {
                "method": report.get("method", "unknown"),
                "folder": folder.resolve().name,
                "ratio": report.get("ratio"),
                "bytes": report["bytes_after"],
                "share": report["bytes_after"] / report["bytes_before"],
                "measured_kl": report.get("measured_kl"),
                "mean_loss": sum(losses) / max(1, len(losses)),
            }
        )
    return runs


def _with_kept_shares(checkpoint: Checkpoint, report: Mapping[str, Any]) -> dict[str, Any]:
    """`kept` per layer: parameters of its experts now, relative to the source's."""
    layers = [dict(layer) for layer in report.get("layers") or ()]
    before = report.get("routed_params_before")
    for layer in layers:
        index = layer["index"]
        if not isinstance(before, int) or index not in checkpoint.moe_layers:
            continue
        names = checkpoint.expert_tensors(index)
        after = sum(checkpoint.tensors[name].num_params for name in names)
        layer["kept"] = after * len(checkpoint.moe_layers) / before
    return {**report, "layers": layers}


def _less(value: Any, full: Any) -> bool:
    return isinstance(value, int) and isinstance(full, int) and value < full


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    """report.json of a checkpoint; empty where `run` has not written it."""
    file = checkpoint.path / REPORT_DATA_FILE
    if not file.exists():
        return {}
    report = read_json_object(checkpoint.path, REPORT_DATA_FILE, MAX_REPORT_BYTES)
    layers = report.get("layers", [])
    is_list = isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers)
    if not is_list or any(type(layer.get("index")) is not int for layer in layers):
        raise InputError(
            f"{file}: layers must be a list of objects with an integer index; "
            "run the compression again"
        )
    return report

"""`compress_tool report`: one self-contained report.html about a finished checkpoint.

It reads report.json, which `run` leaves in the output folder, and the headers of the checkpoint.
Every key of report.json may be missing:

    method, ratio, total_params_before, total_params_after, bytes_before, bytes_after
    calibration   {files [names], samples, seq_len}
    layers        [{index, form, rank_gate_up, rank_down, predicted_loss, measured_loss,
                    weight_error {gate, up, down}, counts [E], spectrum_gate_up, spectrum_down}]

The spectra are eigenvalues, largest first; `predicted_loss` is the sum of their tails.
Without matplotlib the page has its tables only.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from compress_tool.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, open_checkpoint
from compress_tool.durable import write_file
from compress_tool.errors import InputError
from compress_tool.folder import read_json_object
from compress_tool.units import bytes_text, params_text, percent_text
from vllm_moesvd.format import dense_layer_tensors

REPORT_DATA_FILE: Final = "report.json"
REPORT_FILE: Final = "report.html"
MAX_REPORT_BYTES: Final = 256 * 2**20
"""Spectra and counts of 100 layers with 7168 eigenvalues and 512 experts are some 40 MB."""

STYLE: Final = """
:root { color: #1f2933; background: #f5f7fa; font: 16px/1.55 system-ui, sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 .8rem; color: #52606d; } code { font-size: .92em; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
  padding: 1.2rem 1.4rem; margin-top: 1.2rem; overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.6rem; margin-top: 1rem; }
.facts div { color: #52606d; font-size: .9rem; }
.facts b { display: block; font-size: 1.45rem; color: #1f2933; font-weight: 600; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem; border-bottom: 1px solid #e4e7eb; }
th { color: #52606d; font-weight: 600; font-size: .88rem; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
"""


def write_report(folder: Path, compare: Sequence[Path] = ()) -> Path:
    """Write report.html into the checkpoint `folder` and return its path.

    Raises InputError where there is no checkpoint, or report.json is not what `run` writes.
    """
    checkpoint = open_checkpoint(folder, allow_factored=True)
    report: dict[str, Any] = {}
    if (checkpoint.path / REPORT_DATA_FILE).exists():
        report = read_json_object(checkpoint.path, REPORT_DATA_FILE, MAX_REPORT_BYTES)
        _check(report, checkpoint.path / REPORT_DATA_FILE)
    # Named after the source: equal runs into different folders give equal bytes.
    name = f"{report.get('source', checkpoint.family.name)}, compressed"
    parts = size_by_part(checkpoint)
    if "bytes_before" in report:
        # The config of a plain output no longer says how large the experts once were.
        before, after = parts["routed experts"]
        missing = report["bytes_before"] - sum(size for size, _ in parts.values())
        parts["routed experts"] = (before + missing, after)
    page = report_html(report, name=name, parts=parts)
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
            part = "attention" if ".self_attn." in name else "router and norms"
        parts[part][0] += info.num_bytes
        parts[part][1] += info.num_bytes
    for layer in checkpoint.moe_layers:
        infos = [checkpoint.tensors[name] for name in checkpoint.expert_tensors(layer)]
        item_bytes = infos[0].num_bytes // infos[0].num_params
        shapes = dense_layer_tensors(checkpoint.shape, checkpoint.family, layer).values()
        parts["routed experts"][0] += item_bytes * sum(rows * width for rows, width in shapes)
    return {part: (before, after) for part, (before, after) in parts.items()}


def report_html(
    report: Mapping[str, Any], *, name: str, parts: Mapping[str, tuple[int, int]]
) -> str:
    """The page as text: no script, no address of anything outside it."""
    layers = sorted(report.get("layers") or (), key=lambda layer: int(layer["index"]))
    figures = _figures(layers, parts) if find_spec("matplotlib") else []
    sections = [_facts(report, layers, parts), *figures, _size_table(parts)]
    if layers:
        sections.append(_layer_table(layers))
    if not figures:
        sections.append(
            "<p>No figures: matplotlib is not installed (extra <code>report</code>).</p>"
        )
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    title = html.escape(name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _figures(
    layers: Sequence[Mapping[str, Any]], parts: Mapping[str, tuple[int, int]]
) -> list[str]:
    from compress_tool import report_figures as draw

    routed = [layer for layer in layers if layer.get("counts")]
    with_spectra = [x for x in layers if x.get("spectrum_gate_up") or x.get("spectrum_down")]
    drawn: list[tuple[str, str, bool, Callable[[], bytes]]] = [
        (
            "Bytes by part",
            "Only the routed experts shrink.",
            True,
            lambda: draw.sizes_figure(parts),
        ),
        (
            "Layer by layer",
            "Ranks above. Below, the relative squared error of the layer's output on the "
            "calibration text (0 is exact), and the sum of the two tails that were cut off.",
            bool(layers),
            lambda: draw.layers_figure(layers),
        ),
        (
            "Spectra and cuts",
            "How much of a layer's energy a cut at each rank loses; a dot is the chosen rank. A "
            "curve that falls early is a layer that compresses well.",
            bool(with_spectra),
            lambda: draw.spectra_figure(with_spectra),
        ),
        (
            "Routing on the calibration text",
            "1 is an even load. A cross is an expert that was never routed to: its factors come "
            "from the activations of the other experts.",
            bool(routed),
            lambda: draw.routing_figure(routed),
        ),
    ]
    return [
        f"<h2>{title}</h2><p>{text}</p>"
        f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(make()).decode()}">'
        for title, text, is_there, make in drawn
        if is_there
    ]


def _facts(
    report: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    parts: Mapping[str, tuple[int, int]],
) -> str:
    before, after = (sum(pair[side] for pair in parts.values()) for side in (0, 1))
    facts = [(bytes_text(after), f"of weights, was {bytes_text(before)}")]
    if "total_params_before" in report and "total_params_after" in report:
        counts = [params_text(report[f"total_params_{side}"]) for side in ("after", "before")]
        facts.append((counts[0], f"parameters, was {counts[1]}"))
    if "ratio" in report:
        facts.append((f"{100 * report['ratio']:.1f} %", "of all parameters removed"))
    if layers:
        factored = sum(layer.get("form") not in (None, "dense") for layer in layers)
        facts.append((f"{factored} of {len(layers)}", "layers factored"))
    if "method" in report:
        facts.append((str(report["method"]), "method"))
    cells = "".join(
        f"<div><b>{html.escape(value)}</b>{html.escape(label)}</div>" for value, label in facts
    )
    command = "<p><code>vllm serve ./this-folder</code></p>"
    return f'<h2>At a glance</h2>{command}<div class="facts">{cells}</div>'


def _size_table(parts: Mapping[str, tuple[int, int]]) -> str:
    rows = [
        (part, bytes_text(before), bytes_text(after), _change(before, after))
        for part, (before, after) in parts.items()
        if before
    ]
    return "<h2>Size</h2>" + _table(("part", "before", "after", "change"), rows)


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    header = ("layer", "form", "rank gate/up", "rank down", "predicted", "measured")
    header_rest = ("weights: gate", "up", "down", "never routed")
    rows = []
    for layer in layers:
        errors = layer.get("weight_error") or {}
        counts = layer.get("counts") or ()
        rows.append(
            (
                str(layer["index"]),
                str(layer.get("form", "–")),
                *(_number(layer.get(key)) for key in ("rank_gate_up", "rank_down")),
                *(_number(layer.get(key)) for key in ("predicted_loss", "measured_loss")),
                *(_number(errors.get(key)) for key in ("gate", "up", "down")),
                str(sum(count == 0 for count in counts)) if counts else "–",
            )
        )
    return (
        "<h2>Layers</h2><p>Predicted: share of energy beyond both ranks, gate/up and down added. "
        "Measured: relative squared error of the layer's output on the calibration text. "
        "Weights: relative error of the weights themselves, without regard to which activations "
        "reach them; large values there are normal.</p>" + _table((*header, *header_rest), rows)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _change(before: int, after: int) -> str:
    return "unchanged" if before == after else percent_text(after / before - 1)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{float(value):.4g}"


def _check(report: Mapping[str, Any], file: Path) -> None:
    layers = report.get("layers", [])
    is_list = isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers)
    if not is_list or any(type(layer.get("index")) is not int for layer in layers):
        raise InputError(
            f"{file}: layers must be a list of objects with an integer index; "
            "run the compression again"
        )

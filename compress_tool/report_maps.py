"""Figures of report.html about routing, coverage and spectra, as PNG bytes.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from compress_tool.report_style import (
    BLUE,
    FAINT,
    GRID,
    INK,
    LABELLED_LAYERS,
    ORANGE,
    VERMILION,
    FloatArray,
    column,
    indices,
    layer_axis,
    legend_above,
    panel_title,
    panels,
    png,
    side_by_side,
    ticks,
)

Layers = Sequence[Mapping[str, Any]]

MAX_WRITTEN_CELLS: Final = 256
"""Of the heat map: with more, the numbers in its cells would touch."""

PERCENTILE_EXPERTS: Final = 20
"""With fewer experts the 5th percentile is the least used one."""

SMALLEST_SHARE: Final = 1e-4
"""Of the energy: less is nothing that a picture needs."""


def routing_figure(layers: Layers) -> bytes:
    """Heat map of how often each expert is routed to, with the never-routed ones marked."""
    from matplotlib.colors import ListedColormap

    load_EL, counts_EL = routing_load(layers)
    num_experts, num_layers = load_EL.shape
    figure, (axes,) = panels(min(9.0, max(2.6, 1.2 + 0.3 * num_experts)))
    # A few overloaded experts must not leave the rest of the map in one colour.
    top = max(2.0, float(np.quantile(load_EL, 0.995)))
    image = axes.imshow(load_EL, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    is_small = num_experts * num_layers <= MAX_WRITTEN_CELLS
    if is_small:
        for (expert, layer), load in np.ndenumerate(load_EL):
            if counts_EL[expert, layer] > 0:
                ink = "white" if load > 0.55 * top else INK
                axes.text(
                    layer, expert, f"{load:.2f}", ha="center", va="center", fontsize=8, color=ink
                )
    # Cells and crosses: either alone is hard to see among thousands of cells.
    is_never_EL = np.where(counts_EL == 0, 1.0, np.nan)
    axes.imshow(is_never_EL, aspect="auto", cmap=ListedColormap(["#f7d9c4"]))
    never = np.argwhere(counts_EL == 0)
    size = 9.0 if is_small else max(2.5, min(7.0, 500.0 / max(num_experts, 2 * num_layers)))
    (cross,) = axes.plot(never[:, 1], never[:, 0], "x", color=VERMILION, label="never routed")
    cross.set(markersize=size, markeredgewidth=max(1.0, size / 4))
    places = ticks(np.arange(num_layers))
    axes.set_xticks(places, [str(layers[place]["index"]) for place in places])
    axes.set_yticks(ticks(np.arange(num_experts)))
    axes.set_xlabel("layer")
    axes.set_ylabel("expert")
    axes.spines[:].set_visible(False)
    if len(never):
        legend_above(axes)
    is_cut = bool((load_EL > top).any())
    bar = figure.colorbar(image, ax=axes, pad=0.015, extend="max" if is_cut else "neither")
    bar.set_label("load, 1 is an even share")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return png(figure)


def routing_load(layers: Layers) -> tuple[FloatArray, FloatArray]:
    """Load (1 is even) and tokens, [E, L]; layers of fewer experts are filled with NaN."""
    most = max(len(layer["counts"]) for layer in layers)
    counts_EL = np.full((most, len(layers)), np.nan)
    load_EL = np.full((most, len(layers)), np.nan)
    for place, layer in enumerate(layers):
        counts_E = np.asarray(layer["counts"], dtype=np.float64)
        counts_EL[: len(counts_E), place] = counts_E
        load_EL[: len(counts_E), place] = counts_E * len(counts_E) / max(1.0, counts_E.sum())
    return np.nan_to_num(load_EL), counts_EL


def coverage_figure(layers: Layers, hidden_size: int | None) -> bytes:
    """Calibration tokens per expert, and how many different experts a layer has in the end."""
    is_known = [layer.get("distinct_experts") is not None for layer in layers]
    figure, axes = panels(4.4 if any(is_known) else 2.8, 2 if any(is_known) else 1)
    index_L = indices(layers)
    rows = np.array([coverage(layer.get("counts") or ()) for layer in layers])
    rows = np.where(rows > 0, rows, np.nan)
    most = max((len(layer.get("counts") or ()) for layer in layers), default=0)
    for place, marker, colour, label in (
        (2, "o", BLUE, "median expert"), (1, "s", ORANGE, "5 % have fewer"),
        (0, "v", VERMILION, "least used expert"),
    ):  # fmt: skip
        if place == 1 and most < PERCENTILE_EXPERTS:
            continue
        axes[0].plot(index_L, rows[:, place], f"{marker}-", color=colour, ms=4, lw=1, label=label)
    missed_L = np.array([0 in (layer.get("counts") or ()) for layer in layers])
    if np.isfinite(rows).any():
        axes[0].set_yscale("log")
        low = float(np.nanmin(rows)) / 2
        # An expert without a token has no place on a log axis: it stands on its lower edge.
        axes[0].plot(
            index_L[missed_L], np.full(missed_L.sum(), low), "x", color=VERMILION, ms=6, mew=1.6,
            label="an expert without tokens" if missed_L.any() else None,
        )  # fmt: skip
    if hidden_size is not None:
        label = f"hidden size, {hidden_size:,}"
        axes[0].axhline(hidden_size, color=FAINT, lw=1.2, ls="--", label=label)
    axes[0].set_ylabel("calibration tokens")
    axes[0].grid(axis="y", color=GRID, lw=0.6)
    legend_above(axes[0])
    if any(is_known):
        num_L, distinct_L = column(layers, "num_experts"), column(layers, "distinct_experts")
        axes[1].bar(index_L, np.nan_to_num(num_L), width=0.8, color=GRID, label="before")
        axes[1].bar(index_L, np.nan_to_num(distinct_L), width=0.5, color=BLUE, label="after")
        axes[1].set_ylabel("distinct experts")
        axes[1].set_ylim(bottom=0)
        legend_above(axes[1])
    layer_axis(axes[-1], index_L)
    return png(figure)


def coverage(counts: Sequence[float]) -> tuple[float, float, float]:
    """Least, 5th percentile and median of the tokens per expert; NaN without experts.

    The percentile is the nearest rank below: with fewer than 20 experts it is the least.
    """
    if not len(counts):
        return (float("nan"),) * 3
    ordered = sorted(counts)
    low = float(ordered[len(ordered) // PERCENTILE_EXPERTS])
    return float(ordered[0]), low, float(np.median(ordered))


def spectra_figure(layers: Layers) -> bytes:
    """What a cut at each rank would lose, one line per layer, with cuts and random floors."""
    import matplotlib
    from matplotlib.lines import Line2D

    figure, axes = side_by_side(3.9, (1, 1), share_y=True)
    colour_of = matplotlib.colormaps["viridis"]
    last = max(1, *(layer["index"] for layer in layers))
    has_floor = False
    for panel, kind, title in zip(
        axes, ("gate_up", "down"), ("gate and up: input side", "down: output side"), strict=True
    ):
        for layer in layers:
            lost = lost_energy(layer.get(f"spectrum_{kind}") or ())
            if not len(lost):
                continue
            colour = colour_of(0.92 * layer["index"] / last)
            panel.plot(np.arange(len(lost)), lost, color=colour, lw=1.2)
            rank, floor = layer.get(f"rank_{kind}"), layer.get(f"random_floor_{kind}")
            if not isinstance(rank, int) or rank >= len(lost):
                continue
            at = max(float(lost[rank]), SMALLEST_SHARE)
            if isinstance(floor, float) and floor > 0:
                has_floor = True
                if len(layers) <= LABELLED_LAYERS:
                    panel.plot([rank, rank], [at, floor], color=colour, lw=0.8, ls=":")
                panel.plot(rank, floor, "_", color=INK, ms=9, mew=1.4)
            panel.plot(rank, at, "o", color="white", ms=5, mec=INK, mew=1.0)
        panel.set_yscale("log")
        panel.set_ylim(bottom=SMALLEST_SHARE, top=1.3)
        panel_title(panel, title)
        panel.set_xlabel("rank kept")
        panel.grid(axis="y", color=GRID, lw=0.6)
    axes[0].set_ylabel("share of energy lost")
    cut = Line2D([], [], ls="", marker="o", color="white", mec=INK, ms=5, label="chosen cut")
    handles = [cut]
    if has_floor:
        floor = Line2D([], [], ls="", marker="_", color=INK, ms=9, mew=1.4)
        floor.set_label("random weights, same cut")
        handles.append(floor)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, last / 0.92), cmap="viridis"
    )
    bar = figure.colorbar(scale, ax=axes, pad=0.015, boundaries=np.linspace(0, last, 100))
    bar.set_ticks(ticks(np.arange(last + 1), most=8).tolist())
    bar.set_label("layer")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return png(figure)


def lost_energy(eigenvalues: Sequence[float]) -> FloatArray:
    """`lost[r]` = share of the sum that lies beyond the first r eigenvalues.

    Example: (3, 1) → (1, 0.25, 0).
    """
    values = np.maximum(np.asarray(eigenvalues, dtype=np.float64), 0.0)
    total = values.sum()
    if total <= 0:
        return np.zeros(0)
    kept = np.concatenate([[0.0], np.cumsum(values)])
    lost: FloatArray = np.maximum(total - kept, 0.0) / total
    return lost


def rank_for(eigenvalues: Sequence[float], share: float) -> int | None:
    """The smallest rank that keeps `share` of the energy. Example: (3, 1), 0.7 → 1."""
    lost = lost_energy(eigenvalues)
    return None if not len(lost) else int(np.argmax(lost <= 1 - share + 1e-12))

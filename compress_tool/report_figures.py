"""Figures of report.html about sizes and losses, as PNG bytes; `report_maps` has the others.

Every function takes entries of report.json (see `report`) sorted by layer and accepts layers
without the keys it draws. Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress_tool.report_style import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    LABELLED_LAYERS,
    ORANGE,
    PART_COLOURS,
    VERMILION,
    column,
    form_colour,
    indices,
    layer_axis,
    legend_above,
    panel_title,
    panels,
    png,
    side_by_side,
)
from compress_tool.units import bytes_text, percent_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Layers = Sequence[Mapping[str, Any]]


def sizes_figure(parts: Mapping[str, tuple[int, int]]) -> bytes:
    """Two stacked bars: bytes before and after, by part of the model."""
    figure, (axes,) = panels(2.3)
    totals = [sum(pair[side] for pair in parts.values()) for side in (0, 1)]
    left = [0, 0]
    for part, pair in parts.items():
        if not any(pair):
            continue
        colour = PART_COLOURS.get(part, FAINT)
        axes.barh([1, 0], pair, left=left, height=0.62, color=colour, label=part, ec="white")
        for side, row in ((0, 1), (1, 0)):
            if pair[side] > 0.08 * totals[0]:
                axes.text(
                    left[side] + pair[side] / 2,
                    row,
                    bytes_text(pair[side]),
                    ha="center",
                    va="center",
                    color="white" if part == "routed experts" else INK,
                )
            left[side] += pair[side]
    for side, row in ((0, 1), (1, 0)):
        share = "" if side == 0 else f"  ({percent_text(totals[1] / totals[0] - 1)})"
        axes.text(totals[side], row, f"  {bytes_text(totals[side])}{share}", va="center", color=INK)
    axes.set_yticks([1, 0], ["before", "after"])
    axes.set_xticks([])
    axes.set_xlim(0, 1.22 * max(totals))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.02), ncols=6, frameon=False)
    return png(figure)


def choices_figure(layers: Layers) -> bytes:
    """The form of every layer with the share of its experts that is left, and its ranks."""
    from matplotlib.patches import Patch

    shares = ("width_share", "rank_gate_up_share", "rank_down_share")
    has_ranks = any(np.isfinite(column(layers, key)).any() for key in shares[1:])
    # Without ranks the neurons are all there is, and the bars have shown them.
    drawn = [k for k in shares if has_ranks and np.isfinite(column(layers, k)).any()]
    figure, axes = panels(4.6 if drawn else 2.6, 2 if drawn else 1)
    index_L = indices(layers)
    forms = [str(layer.get("shown_form", "dense")) for layer in layers]
    kept_L = np.nan_to_num(column(layers, "kept"), nan=1.0)
    axes[0].bar(index_L, kept_L, width=0.8, color=[form_colour(form) for form in forms])
    if len(layers) <= LABELLED_LAYERS:
        for x, kept in zip(index_L, kept_L, strict=True):
            axes[0].text(x, kept, f"{kept:.0%}", ha="center", va="bottom", fontsize=8, color=INK)
    axes[0].set_ylim(0, 1.12)
    axes[0].set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes[0].set_ylabel("experts' weights left")
    axes[0].grid(axis="y", color=GRID, lw=0.6)
    handles = [Patch(color=form_colour(form), label=form) for form in dict.fromkeys(forms)]
    legend_above(axes[0], handles=handles)
    labels = ("neurons of an expert", "rank of gate and up", "rank of down")
    colours = (BLUE, ORANGE, VERMILION)
    # Side by side: the two ranks of a layer are often equal.
    for place, (key, marker) in enumerate(zip(shares, ("s", "^", "v"), strict=True)):
        if key in drawn:
            axes[1].plot(
                index_L + 0.2 * (place - 1),
                column(layers, key),
                marker,
                color=colours[place],
                label=labels[place],
                ms=6,
                mec="white",
            )
    if drawn:
        axes[1].set_ylim(0, 1.08)
        axes[1].set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes[1].set_ylabel("share of full size")
        axes[1].grid(axis="y", color=GRID, lw=0.6)
        legend_above(axes[1])
    layer_axis(axes[-1], index_L)
    return png(figure)


def sensitivity_figure(layers: Layers) -> bytes:
    """What compressing one layer alone costs the model, one line per probed size, log scale."""
    import matplotlib

    figure, (axes,) = panels(3.4)
    index_L = indices(layers)
    names = list(dict.fromkeys(name for layer in layers for name in layer.get("probes") or {}))
    kinds = list(dict.fromkeys(name.rpartition("-")[0] for name in names))
    for kind, marker, style in zip(kinds, "osD^v", ("-", "--", ":", "-.", "-"), strict=False):
        sizes = sorted(int(n.rpartition("-")[2]) for n in names if n.rpartition("-")[0] == kind)
        for place, size in enumerate(sizes):
            shade = matplotlib.colormaps["viridis"](0.85 * place / max(1, len(sizes) - 1))
            probes = [(layer.get("probes") or {}).get(f"{kind}-{size}") for layer in layers]
            loss_L = np.array([np.nan if value is None else value for value in probes])
            word = "rank" if kind == "latent" else "width"
            axes.plot(
                index_L, loss_L, marker + style, color=shade, ms=4, lw=1.2,
                label=f"{kind}, {word} {size}",
            )  # fmt: skip
    score_L = column(layers, "sensitivity")
    if np.isfinite(score_L).any():
        axes.plot(index_L, score_L, "o-", color=INK, ms=4, lw=1.2, label="S_L of MoE-SVD")
    if names:
        axes.set_yscale("log")
    axes.set_ylabel("KL, nats per token" if names else "sensitivity S_L")
    axes.grid(axis="y", color=GRID, lw=0.6)
    layer_axis(axes, index_L)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)


def losses_figure(layers: Layers) -> bytes:
    """Predicted and measured loss of every layer's output, along the layers and as a scatter."""
    index_L = indices(layers)
    is_dense = [layer.get("form", "dense") == "dense" for layer in layers]
    loss = {
        key: np.where(is_dense, np.nan, column(layers, key))
        for key in ("predicted_loss", "measured_loss")
    }
    x_L, y_L = loss["predicted_loss"], loss["measured_loss"]
    is_known = np.isfinite(x_L) & np.isfinite(y_L) & (x_L > 0) & (y_L > 0)
    widths = (1.75, 1.0) if is_known.any() else (1.0,)
    figure, (along, *rest) = side_by_side(3.4, widths, share_y=False)
    was_refitted = any(layer.get("refit_error_after") is not None for layer in layers)
    for key, marker, colour, label in (
        ("predicted_loss", "o", ORANGE, f"predicted{' before the refit' * was_refitted}"),
        ("measured_loss", "D", BLUE, "measured"),
    ):
        if np.isfinite(loss[key]).any():
            along.plot(index_L, loss[key], f"{marker}-", ms=5, lw=1, color=colour, label=label)
    along.margins(y=0.1)
    along.set_ylim(bottom=0)
    along.set_ylabel("relative squared error")
    along.grid(axis="y", color=GRID, lw=0.6)
    legend_above(along)
    layer_axis(along, index_L)
    for scatter in rest:
        _scatter(scatter, x_L[is_known], y_L[is_known], index_L[is_known])
    return png(figure)


def _scatter(axes: Axes, x_n: np.ndarray, y_n: np.ndarray, index_n: np.ndarray) -> None:
    axes.set_xlabel("predicted")
    axes.set_ylabel("measured")
    low = 0.7 * min(x_n.min(), y_n.min())
    high = 1.4 * max(x_n.max(), y_n.max())
    axes.plot([low, high], [low, high], color=FAINT, lw=1, ls="--")
    axes.plot(x_n, y_n, "o", color=BLUE, ms=5, mec="white", mew=0.6)
    if len(index_n) <= LABELLED_LAYERS:
        # Neighbours on the diagonal get their numbers on opposite sides.
        for place, number in enumerate(np.argsort(x_n * y_n)):
            axes.annotate(
                str(index_n[number]),
                (x_n[number], y_n[number]),
                xytext=(6, -3) if place % 2 else (-6, -3),
                ha="left" if place % 2 else "right",
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    _few_log_ticks(axes, low, high)


def _few_log_ticks(axes: Axes, low: float, high: float) -> None:
    """Three labels: those of a log axis over less than a decade run into each other."""
    from matplotlib.ticker import NullFormatter, NullLocator

    values = [float(f"{value:.1g}") for value in np.geomspace(1.25 * low, 0.8 * high, 3)]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_ticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])


def joint_figure(layers: Layers, measured: float | None) -> bytes:
    """The KL that the plan expected, layer by layer on top of each other, beside the measured."""
    import matplotlib

    figure, (axes,) = panels(2.1)
    kl_L = np.nan_to_num(column(layers, "predicted_kl"))
    left, last = 0.0, max(1, int(indices(layers).max()))
    for index, kl in zip(indices(layers), kl_L, strict=True):
        colour = matplotlib.colormaps["viridis"](0.92 * index / last)
        axes.barh(1, kl, left=left, height=0.6, color=colour, ec="white", lw=0.5)
        if kl > 0.05 * max(kl_L.sum(), measured or 0.0):
            ink = "white" if index < 0.6 * last else INK
            axes.text(left + kl / 2, 1, str(index), ha="center", va="center", fontsize=8, color=ink)
        left += kl
    axes.text(left, 1, f"  {left:.4g}", va="center", color=INK)
    rows, names = [1], ["expected, by layer"]
    if measured is not None:
        axes.barh(0, measured, height=0.6, color=GREEN)
        axes.text(measured, 0, f"  {measured:.4g}", va="center", color=INK)
        rows, names = [1, 0], [*names, "measured, all layers"]
    axes.set_yticks(rows, names)
    axes.set_xlim(0, 1.15 * max(left, measured or 0.0, 1e-12))
    axes.set_xlabel("KL to the dense model, nats per token")
    axes.tick_params(axis="y", length=0)
    return png(figure)


def pareto_figure(runs: Sequence[Mapping[str, Any]], measure: str, title: str) -> bytes:
    """Loss against bytes left, a line per method; `runs` are rows with method, bytes and loss."""
    figure, (axes,) = panels(3.6)
    markers = "oDs^vPX*<>"
    colours = (BLUE, ORANGE, GREEN, VERMILION, "#cc79a7", "#56b4e9", INK, FAINT)
    methods = list(dict.fromkeys(str(run["method"]) for run in runs))
    for place, method in enumerate(methods):
        own = sorted((r for r in runs if r["method"] == method), key=lambda r: float(r["share"]))
        x_n = np.array([100 * float(run["share"]) for run in own])
        y_n = np.array([float(run[measure]) for run in own])
        axes.plot(
            x_n, y_n, f"{markers[place % len(markers)]}-", color=colours[place % len(colours)],
            ms=7, lw=1.3, mec="white", label=method,
        )  # fmt: skip
    losses = [float(run[measure]) for run in runs]
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("size left, % of the source's bytes")
    axes.set_ylabel(title)
    axes.grid(color=GRID, lw=0.6)
    panel_title(axes, "down and left is better")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(figure)

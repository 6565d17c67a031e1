"""The figures of report.html, as PNG bytes. matplotlib is imported when the first one is drawn.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compress_tool.units import bytes_text, percent_text

FloatArray = np.ndarray[tuple[Any, ...], np.dtype[np.float64]]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#1f2933"
FAINT: Final = "#9aa5b1"
PART_COLOURS: Final = {
    "routed experts": "#2a6f97",
    "attention": "#e09f3e",
    "embeddings": "#9aa5b1",
    "router and norms": "#9e2a2b",
}
FORM_COLOURS: Final = {
    "latent": "#2a6f97",
    "shared-v": "#468b6b",
    "svd": "#e09f3e",
    "narrow": "#8d6a9f",
    "drop": "#b5534c",
    "dense": "#c3cbd3",
}
DPI: Final = 160


def sizes_figure(parts: Mapping[str, tuple[int, int]]) -> bytes:
    """Two stacked bars: bytes before and after, by part of the model."""
    figure, axes = _figure(9.0, 2.3)
    totals = [sum(pair[side] for pair in parts.values()) for side in (0, 1)]
    left = [0, 0]
    for part, pair in parts.items():
        colour = PART_COLOURS.get(part, FAINT)
        axes.barh([1, 0], pair, left=left, height=0.62, color=colour, label=part)
        for side, row in ((0, 1), (1, 0)):
            if pair[side] > 0.08 * totals[0]:
                axes.text(
                    left[side] + pair[side] / 2,
                    row,
                    bytes_text(pair[side]),
                    ha="center",
                    va="center",
                    color="white",
                )
            left[side] += pair[side]
    for side, row in ((0, 1), (1, 0)):
        share = "" if side == 0 else f"  ({percent_text(totals[1] / totals[0] - 1)})"
        axes.text(totals[side], row, f"  {bytes_text(totals[side])}{share}", va="center", color=INK)
    axes.set_yticks([1, 0], ["before", "after"])
    axes.set_xticks([])
    axes.set_xlim(0, 1.22 * max(totals))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.02), ncols=4, frameon=False)
    return _png(figure)


def layers_figure(layers: Sequence[Mapping[str, Any]]) -> bytes:
    """Ranks of every layer above its predicted and measured loss."""
    from matplotlib.patches import Patch

    figure, (ranks, losses) = _stacked_figure(9.0, 4.8)
    index_L = np.array([layer["index"] for layer in layers])
    forms = [str(layer.get("form", "dense")) for layer in layers]
    handles: list[Patch] = []
    for offset, key, alpha, label in (
        (-0.2, "rank_gate_up", 1.0, "gate/up"),
        (0.2, "rank_down", 0.55, "down"),
    ):
        rank_L = _column(layers, key)
        ranks.bar(
            index_L + offset,
            np.nan_to_num(rank_L),
            width=0.38,
            color=[_form_colour(form) for form in forms],
            alpha=alpha,
        )
        if len(layers) <= 16:
            for x, rank in zip(index_L + offset, rank_L, strict=True):
                if np.isfinite(rank):
                    ranks.text(x, rank, f"{rank:.0f}", ha="center", va="bottom", fontsize=8)
        handles.append(Patch(color=INK, alpha=alpha, label=label))
    handles += [Patch(color=_form_colour(form), label=form) for form in dict.fromkeys(forms)]
    for x, form in zip(index_L, forms, strict=True):
        if form == "dense" and len(layers) <= 16:
            ranks.text(x, 0, "dense", ha="center", va="bottom", fontsize=8, color=FAINT)
    ranks.set_ylabel("rank")
    ranks.margins(y=0.12)
    ranks.legend(
        handles=handles, frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1.0, 1.0)
    )
    for key, marker, colour, label in (
        ("predicted_loss", "o", "#e09f3e", "energy beyond both ranks"),
        ("measured_loss", "D", "#9e2a2b", "measured on the layer's output"),
    ):
        loss_L = np.where([form == "dense" for form in forms], np.nan, _column(layers, key))
        if np.isfinite(loss_L).any():
            losses.plot(index_L, loss_L, marker, ms=6, color=colour, label=label, ls="-", lw=1)
    losses.set_ylabel("relative squared error")
    losses.set_ylim(bottom=0)
    losses.set_xlabel("layer")
    losses.set_xticks(_ticks(index_L))
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def routing_figure(layers: Sequence[Mapping[str, Any]]) -> bytes:
    """Heat map of how often each expert is routed to, with the never-routed ones marked."""
    counts_EL = np.array([layer["counts"] for layer in layers], dtype=np.float64).T
    num_experts, num_layers = counts_EL.shape
    load_EL = counts_EL * num_experts / np.maximum(counts_EL.sum(axis=0), 1)
    height = min(7.0, max(2.6, 1.2 + 0.3 * num_experts))
    figure, axes = _figure(9.0, height)
    image = axes.imshow(load_EL, aspect="auto", cmap="YlGnBu", vmin=0, vmax=max(2.0, load_EL.max()))
    if num_experts * num_layers <= 256:
        for (expert, layer), load in np.ndenumerate(load_EL):
            if counts_EL[expert, layer] > 0:
                dark = load > 0.6 * image.get_clim()[1]
                text_colour = "white" if dark else INK
                axes.text(
                    layer, expert, f"{load:.2f}", ha="center", va="center", fontsize=8,
                    color=text_colour,
                )  # fmt: skip
    never = np.argwhere(counts_EL == 0)
    size = 9.0 if num_experts * num_layers <= 256 else 3.0
    (cross,) = axes.plot(never[:, 1], never[:, 0], "x", color="#9e2a2b", label="never routed")
    cross.set(markersize=size, markeredgewidth=size / 4)
    axes.set_xticks(
        _ticks(np.arange(num_layers)),
        [str(layers[i]["index"]) for i in _ticks(np.arange(num_layers))],
    )
    axes.set_yticks(_ticks(np.arange(num_experts)))
    axes.set_xlabel("layer")
    axes.set_ylabel("expert")
    if len(never):
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    bar = figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label("share of an even load")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _png(figure)


def spectra_figure(layers: Sequence[Mapping[str, Any]]) -> bytes:
    """What a cut at each rank would lose, one line per layer, with the chosen cuts."""
    import matplotlib

    figure, panels = _side_by_side_figure(9.0, 3.6)
    colour_of = matplotlib.colormaps["viridis"]
    last = max(layer["index"] for layer in layers) or 1
    for axes, kind, title in zip(
        panels, ("gate_up", "down"), ("gate and up: input side", "down: output side"), strict=True
    ):
        for layer in layers:
            lost = lost_energy(layer.get(f"spectrum_{kind}") or ())
            if not len(lost):
                continue
            colour = colour_of(0.92 * layer["index"] / last)
            axes.plot(np.arange(len(lost)), lost, color=colour, lw=1.2)
            rank = layer.get(f"rank_{kind}")
            if isinstance(rank, int) and rank < len(lost) and lost[rank] > 0:
                axes.plot(rank, lost[rank], "o", color=colour, ms=5, mec="white", mew=0.6)
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-4, top=1.3)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("rank kept")
        axes.grid(axis="y", color="#e4e7eb", lw=0.6)
    panels[0].set_ylabel("share of energy lost")
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, last / 0.92), cmap="viridis"
    )
    bar = figure.colorbar(scale, ax=panels, pad=0.015, boundaries=np.linspace(0, last, 100))
    bar.set_ticks(_ticks(np.arange(last + 1), most=8).tolist())
    bar.set_label("layer")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _png(figure)


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


def _column(layers: Sequence[Mapping[str, Any]], key: str) -> FloatArray:
    values = (layer.get(key) for layer in layers)
    return np.array([np.nan if v is None else float(v) for v in values])


def _form_colour(form: str) -> str:
    return FORM_COLOURS.get(form, FAINT)


def _ticks(values: np.ndarray, most: int = 16) -> np.ndarray:
    return values[:: max(1, -(-len(values) // most))]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _empty_figure(width, height)
    return figure, _clean(figure.add_subplot())


def _stacked_figure(width: float, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = _empty_figure(width, height)
    upper = _clean(figure.add_subplot(2, 1, 1))
    return figure, (upper, _clean(figure.add_subplot(2, 1, 2, sharex=upper)))


def _side_by_side_figure(width: float, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = _empty_figure(width, height)
    left = _clean(figure.add_subplot(1, 2, 1))
    return figure, (left, _clean(figure.add_subplot(1, 2, 2, sharey=left)))


def _empty_figure(width: float, height: float) -> Figure:
    # A Figure of its own, not pyplot: no window system and no state between reports.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _clean(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib inside, equal numbers give equal bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()

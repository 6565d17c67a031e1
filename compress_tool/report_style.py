"""How the figures of report.html look: one palette, one frame, PNG bytes.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), told apart with every common
colour vision deficiency; heat maps and curves by layer use matplotlib's viridis and cividis. No
number is told by colour alone: the tables have them all. matplotlib is imported on first use.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = np.ndarray[tuple[Any, ...], np.dtype[np.float64]]

INK: Final = "#1f2933"
FAINT: Final = "#9aa5b1"
GRID: Final = "#e4e7eb"
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#c3cbd3"

PART_COLOURS: Final = {
    "routed experts": BLUE,
    "shared experts": SKY,
    "dense layers": GREEN,
    "attention": ORANGE,
    "embeddings": FAINT,
    "router and norms": VERMILION,
}
FORM_COLOURS: Final = {
    "narrow": BLUE,
    "latent": ORANGE,
    "latent, narrow": VERMILION,
    "shared-v": GREEN,
    "svd": PURPLE,
    "base-delta": SKY,
    "drop": INK,
    "dense": GREY,
}
WIDTH: Final = 9.0
"""Inches of every figure: as wide as a printed page, so that its text keeps its size."""
DPI: Final = 160

LABELLED_LAYERS: Final = 16
"""Up to here every layer's bar carries its number."""


def form_colour(form: str) -> str:
    return FORM_COLOURS.get(form, FAINT)


def column(layers: Sequence[Mapping[str, Any]], key: str) -> FloatArray:
    """One number per layer, NaN where a layer has none."""
    values = [layer.get(key) for layer in layers]
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])


def indices(layers: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([layer["index"] for layer in layers])


def ticks(values: np.ndarray, most: int = 16) -> np.ndarray:
    """At most `most` of the values, evenly spaced, so that labels never touch."""
    return values[:: max(1, -(-len(values) // most))]


def panels(height: float, rows: int = 1, *, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` panels, one below the other."""
    figure = _figure(height)
    axes: list[Axes] = []
    for row in range(rows):
        shared = axes[0] if axes and share_x else None
        axes.append(_clean(figure.add_subplot(rows, 1, row + 1, sharex=shared)))
    return figure, axes


def side_by_side(height: float, widths: Sequence[float], *, share_y: bool) -> tuple[Figure, Any]:
    """A figure of panels beside each other, of these relative widths."""
    figure = _figure(height)
    grid = figure.add_gridspec(1, len(widths), width_ratios=list(widths))
    axes: list[Axes] = []
    for place in range(len(widths)):
        shared = axes[0] if axes and share_y else None
        axes.append(_clean(figure.add_subplot(grid[0, place], sharey=shared)))
    return figure, axes


def layer_axis(axes: Axes, index_L: np.ndarray) -> None:
    axes.set_xlabel("layer")
    axes.set_xticks(ticks(index_L))
    axes.set_xlim(index_L.min() - 0.7, index_L.max() + 0.7)


def legend_above(axes: Axes, **options: Any) -> None:
    """Outside of the data, on the right above the panel."""
    if options.get("handles") or axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=9,
            borderaxespad=0.2,
            **{"ncols": 8, **options},
        )


def panel_title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=INK, loc="left")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib inside, equal numbers give equal bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figure(height: float) -> Figure:
    # A Figure of its own, not pyplot: no window system and no state between reports.
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _clean(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.set_axisbelow(True)
    return axes

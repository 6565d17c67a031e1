"""The bench's numbers as docs/quality.md and the Pareto plot beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#2a6f97", "#8d6a9f", "#468b6b", "#e09f3e", "#b5534c", "#5c677d", "#13a89e", "#c06c9e")
OURS = ("auto", "narrow", "latent", "svd", "shared-v")
PLOT_CEILING = 2.0
"""Ratios above it are useless models, and would flatten everything else."""


def write_page(
    cells: Mapping[str, Any], methods: Sequence[str], ratios: Sequence[float], page: Path
) -> None:
    """Write `page` and a PNG of the same name."""
    about = cells["about"]
    heldout, wikitext = about["texts"]
    dense = cells["dense"]
    _plot(cells, methods, ratios, heldout, page.with_suffix(".png"))

    def table(title: str, show: Any) -> str:
        head = "| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |\n"
        rule = "|---|" + "---|" * len(ratios) + "\n"
        rows = ""
        for name in methods:
            row = [_shown(cells.get(f"{name} @ {ratio:g}"), ratio, show) for ratio in ratios]
            rows += f"| {name} | " + " | ".join(row) + " |\n"
        return f"## {title}\n{head}{rule}{rows}\n"

    def relative(text: str) -> Any:
        return lambda cell: f"{cell[text]['perplexity'] / dense[text]['perplexity']:.4f}"

    choice_title = (
        f"Four-choice continuation, {about['questions']} questions (dense {dense['accuracy']:.3f})"
    )
    page.write_text(
        f"""# Quality at equal size

Written by `make bench-quality`; the code is `benchmarks/quality.py`. Model: {about["model"]}. One
calibration for all methods: {
            about["calibration"]
        }. Seeds are fixed. The ratio is the share of *all*
parameters removed, met within 0.5 %. Dense perplexity: {dense[heldout]["perplexity"]:.2f} on
{heldout}, {dense[wikitext]["perplexity"]:.2f} on {wikitext} (WikiText-2 test,
`benchmarks/data/README.md`), on {about["windows"][0]} and {about["windows"][1]} windows of
{about["seq_len"]} tokens; 1.000 in the first two tables is the dense model.

The model is small: hidden size 128 is its scarce dimension, so removing neurons looks better here,
and compressing the hidden state worse, than on a model of billions of parameters. The calibration
text shares works and style with {heldout}; nothing was calibrated on {wikitext}.

![perplexity ratio over share removed](quality.png)

{table(f"Perplexity ratio to dense, {heldout}", relative(heldout))}
{table("Perplexity ratio to dense, WikiText-2 test", relative(wikitext))}
{table(f"KL to dense, nats per token, {heldout}", lambda cell: f"{cell[heldout]['kl']:.4f}")}
{
            table(
                choice_title,
                lambda cell: f"{cell['accuracy']:.3f}",
            )
        }
One standard error of an accuracy is about 0.03, so only large differences in this table mean
anything. The questions are made from {heldout}; `benchmarks/tasks` has them for
lm-evaluation-harness.

{table("Seconds of `compress_tool run`", lambda cell: f"{cell['seconds']:.0f}")}
{table("Peak memory, MiB", lambda cell: f"{cell['peak_memory_bytes'] / 2**20:.0f}")}
Measured on {about["machine"]}, {about["jobs"]} runs at once with one thread each. The seconds
include start-up, hashing, verification and the report; what one calibration yields for all ratios
(statistics, the probes of `auto`, Fisher sums) is counted in the cell that needed it first.

## Notes
- `drop` can remove whole experts only: where the nearest share differs by more than half a percent,
  the cell names it. Compare it in the plot.
- `plain SVD` is `--method asvd --alpha 0`. `svd-llm` and `asvd` are the published formulas without
  a refit; `svd` is the same form, weights tokens by their gates and fits U to the rounded V.
- `d2-moe` has its base unpruned and deltas of their own; the base is regmean where none is named.
- `moe-svd` is the printed method with its defects; see the log.
"""
    )


def _shown(cell: Mapping[str, Any] | None, ratio: float, show: Any) -> str:
    if cell is None:
        return "–"
    if "refused" in cell:
        return "unreachable"
    text: str = show(cell)
    return text if abs(cell["ratio"] - ratio) <= 0.0055 else f"{text} (at {cell['ratio']:.1%})"


def _plot(
    cells: Mapping[str, Any],
    methods: Sequence[str],
    ratios: Sequence[float],
    text: str,
    file: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    dense = cells["dense"][text]["perplexity"]
    for index, name in enumerate(methods):
        points = {}
        for ratio in ratios:
            cell = cells.get(f"{name} @ {ratio:g}")
            if cell is not None and "ratio" in cell:
                points[100 * cell["ratio"]] = cell[text]["perplexity"] / dense
        shown = {x: y for x, y in sorted(points.items()) if y <= PLOT_CEILING}
        if not shown:
            continue
        axes.plot(
            list(shown),
            list(shown.values()),
            marker="o",
            markersize=4,
            linewidth=2.6 if name == "auto" else 1.4,
            linestyle="-" if name in OURS else "--",
            color=COLOURS[index % len(COLOURS)],
            label=name,
        )
    axes.set_xlabel("parameters removed, %")
    axes.set_ylabel("perplexity ratio to dense (held-out text)")
    axes.set_yscale("log")
    ticks = [1, 1.05, 1.1, 1.2, 1.3, 1.5, 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150, metadata={"Software": None})

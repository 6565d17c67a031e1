"""What stands in report.html, from top to bottom: words, a picture where there is one, numbers.

A section that has nothing to show is left out. Without matplotlib there are no pictures.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

from compress_tool import report_tables as tables
from compress_tool.report_page import folded, heading, picture
from compress_tool.units import bytes_text, params_text

MAX_OPEN_ROWS: Final = 24
"""Of a table; a longer one would push the next picture out of sight."""

Layers = Sequence[Mapping[str, Any]]
Parts = Mapping[str, tuple[int, int]]
Runs = Sequence[Mapping[str, Any]]


def sections_of(report: Mapping[str, Any], layers: Layers, parts: Parts, runs: Runs) -> list[str]:
    """The sections as HTML; `layers` are those of `report.shown_layers`."""
    has_pictures = find_spec("matplotlib") is not None
    sections = [_facts(report, layers, parts), _sizes(parts, has_pictures)]
    if runs:
        sections.append(_runs(runs, has_pictures))
    if layers:
        sections.append(_choices(layers, has_pictures))
    if any(layer.get("probes") or layer.get("sensitivity") is not None for layer in layers):
        sections.append(_sensitivity(layers, has_pictures))
    if layers:
        sections.append(_losses(report, layers, has_pictures))
    if any(layer.get("spectrum_gate_up") or layer.get("spectrum_down") for layer in layers):
        sections.append(_spectra(layers, has_pictures))
    if any(layer.get("counts") for layer in layers):
        sections.append(_routing(layers, has_pictures))
        sections.append(_coverage(report, layers, has_pictures))
    if not has_pictures:
        sections.append(
            "<p>No figures: matplotlib is not installed (extra <code>report</code>).</p>"
        )
    return sections


def _facts(report: Mapping[str, Any], layers: Layers, parts: Parts) -> str:
    before, after = (sum(pair[side] for pair in parts.values()) for side in (0, 1))
    facts = [(bytes_text(after), f"of weights, was {bytes_text(before)}")]
    if "total_params_before" in report and "total_params_after" in report:
        counts = [params_text(report[f"total_params_{side}"]) for side in ("after", "before")]
        facts.append((counts[0], f"parameters, was {counts[1]}"))
    if "ratio" in report:
        of_what = "routed experts'" if report.get("ratio_of") == "experts" else "all"
        facts.append((f"{100 * report['ratio']:.1f} %", f"of {of_what} parameters removed"))
    if layers:
        changed = sum(layer.get("form") not in (None, "dense") for layer in layers)
        facts.append((f"{changed} of {len(layers)}", "layers compressed"))
    if report.get("measured_kl") is not None:
        facts.append((f"{report['measured_kl']:.4g}", "nats per token from the dense model"))
    if "method" in report:
        facts.append((str(report["method"]), "method"))
    cells = "".join(
        f"<div><b>{html.escape(value)}</b>{html.escape(label)}</div>" for value, label in facts
    )
    return heading("At a glance", _command(report)) + f'<div class="facts">{cells}</div>'


def _command(report: Mapping[str, Any]) -> str:
    text = "<code>vllm serve ./this-folder</code>"
    calibration = report.get("calibration")
    if isinstance(calibration, Mapping) and calibration.get("files"):
        files = ", ".join(html.escape(str(name)) for name in calibration["files"])
        text += f" · fitted to {files}"
        if isinstance(calibration.get("samples"), int):
            text += f", {calibration['samples']:,} sequences of {calibration.get('seq_len'):,}"
            text += " tokens"
    return text


def _sizes(parts: Parts, has_pictures: bool) -> str:
    before, after = (sum(pair[side] for pair in parts.values()) for side in (0, 1))
    image = ""
    if has_pictures:
        from compress_tool.report_figures import sizes_figure

        alt = f"Bytes by part of the model: {bytes_text(before)} before, {bytes_text(after)} after"
        image = picture(sizes_figure(parts), alt)
    return (
        heading("Size", "Only the routed experts shrink; everything else is copied.")
        + image
        + tables.size_table(parts)
    )


def _choices(layers: Layers, has_pictures: bool) -> str:
    forms = [str(layer["shown_form"]) for layer in layers]
    image = ""
    if has_pictures:
        from compress_tool.report_figures import choices_figure

        found = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
        image = picture(
            choices_figure(layers),
            f"Form and size of every layer: {found}. The numbers are in the table below",
        )
    text = (
        "The form of each layer, the share of its experts' weights that is left, and the neurons "
        "and ranks behind it, relative to the dense layer."
    )
    return heading("Layer by layer", text) + image + _table_of(layers, tables.choice_table(layers))


def _sensitivity(layers: Layers, has_pictures: bool) -> str:
    image = ""
    if has_pictures:
        from compress_tool.report_figures import sensitivity_figure

        image = picture(
            sensitivity_figure(layers),
            "Sensitivity of every layer, one line per probed size; numbers in the table",
        )
    text = (
        "What the model loses when this layer alone is compressed to the size of a line and all "
        "others stay dense. Where a line is high, bytes are well spent."
    )
    if not any(layer.get("probes") for layer in layers):
        text = "S_L of the MoE-SVD paper: the least sensitive layers are factored."
    return (
        heading("Sensitivity", text)
        + image
        + folded("Sensitivity in numbers", tables.probe_table(layers))
    )


def _losses(report: Mapping[str, Any], layers: Layers, has_pictures: bool) -> str:
    image, measured = "", report.get("measured_kl")
    expected = [layer.get("predicted_kl") for layer in layers]
    is_expected = any(isinstance(value, int | float) for value in expected)
    total = sum(value or 0.0 for value in expected)
    if has_pictures:
        from compress_tool.report_figures import joint_figure, losses_figure

        image = picture(
            losses_figure(layers),
            "Predicted and measured loss of every layer, along the layers and against each other",
        )
        if is_expected:
            seen = "" if measured is None else f", measured {measured:.4g}"
            image += picture(joint_figure(layers, measured), f"Expected KL {total:.4g}{seen}")
    text = (
        "Measured: squared error of the layer's output relative to the dense output on the "
        "calibration text; 0 is exact."
    )
    if any(layer.get("predicted_loss") is not None for layer in layers):
        text += (
            " Predicted: what the closed form knew before it was stored and refitted: the energy "
            "beyond both ranks, or that of the neurons given up."
        )
    if is_expected:
        text += f" The plan expected {total:.4g} nats per token for all layers together"
        text += (
            "."
            if measured is None
            else (f"; {measured:.4g} were measured on calibration text, which the refit has seen.")
        )
    rest = ""
    if any(layer.get("weight_error") for layer in layers):
        rest = (
            "<p>Weights: relative error of the weights themselves, without regard to which "
            "activations reach them; large values there are normal.</p>"
        )
    return (
        heading("Predicted and measured", text)
        + image
        + _table_of(layers, tables.loss_table(layers) + rest)
    )


def _spectra(layers: Layers, has_pictures: bool) -> str:
    image = ""
    if has_pictures:
        from compress_tool.report_maps import spectra_figure

        image = picture(
            spectra_figure(layers),
            "Share of energy lost over the rank kept, one line per layer, with the chosen cuts and "
            "what random weights would lose there",
        )
    text = (
        "How much of a layer's energy a cut at each rank loses. The dot is the chosen cut; the "
        "dash above it is what weights drawn at random would lose at the same rank. Far below the "
        "dash there is structure to use; near it there is none."
    )
    return (
        heading("Spectra and cuts", text)
        + image
        + folded("Spectra in numbers", tables.spectrum_table(layers))
    )


def _routing(layers: Layers, has_pictures: bool) -> str:
    routed = [layer for layer in layers if layer.get("counts")]
    never = sum(sum(count == 0 for count in layer["counts"]) for layer in routed)
    image = ""
    if has_pictures:
        from compress_tool.report_maps import routing_figure

        image = picture(
            routing_figure(routed),
            f"Heat map of the load of every expert in {len(routed)} layers; {never} experts were "
            "never routed to",
        )
    text = (
        "How often calibration routed to each expert; 1 is an even load. A cross is an expert that "
        "was never routed to: its factors fit no activations of its own. "
        f"Here: {never if never else 'none'}."
    )
    return (
        heading("Routing", text)
        + image
        + folded("Tokens of every expert", tables.counts_table(layers))
    )


def _coverage(report: Mapping[str, Any], layers: Layers, has_pictures: bool) -> str:
    routed = [layer for layer in layers if layer.get("counts")]
    image = ""
    if has_pictures:
        from compress_tool.report_maps import coverage_figure

        image = picture(
            coverage_figure(routed, report.get("hidden_size")),
            "Calibration tokens of the least used, the 5 % and the median expert, and the number "
            "of distinct experts, by layer",
        )
    text = (
        "Tokens that each layer's experts were fitted to. Fewer tokens than the hidden size cannot "
        "show an expert's inputs in all directions: give more calibration text where a line is "
        "below it. Distinct experts: those that still compute different functions."
    )
    return (
        heading("Calibration coverage", text)
        + image
        + _table_of(layers, tables.coverage_table(layers))
    )


def _table_of(layers: Layers, content: str) -> str:
    """A table with a row per layer: open where it is short, else behind a line."""
    return content if len(layers) <= MAX_OPEN_ROWS else folded("In numbers, by layer", content)


def _runs(runs: Runs, has_pictures: bool) -> str:
    has_kl = all(run.get("measured_kl") is not None for run in runs)
    measure, title = "mean_loss", "mean loss of a layer's output"
    if has_kl:
        measure, title = "measured_kl", "KL to the dense model, nats per token"
    image = ""
    if has_pictures:
        from compress_tool.report_figures import pareto_figure

        image = picture(
            pareto_figure(runs, measure, title), f"{title} against size for {len(runs)} runs"
        )
    text = "Other compressions of the same source, and this one: what each size costs."
    if not has_kl:
        text += (
            " Not all of them have a measured KL, so the picture shows the mean over layers of the "
            "relative squared error of their outputs."
        )
    return heading("Size against loss", text) + image + tables.runs_table(runs)

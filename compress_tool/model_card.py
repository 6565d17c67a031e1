"""The README.md of a finished checkpoint: what it is, how to serve it, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import yaml

from compress_tool.units import bytes_text, params_text, percent_text

CARRIED_KEYS: Final = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter of the source's card that is as true of the compressed model."""
LAYER_COLUMNS: Final = {
    "width": "neurons",
    "rank_gate_up": "rank gate/up",
    "rank_down": "rank down",
    "distinct_experts": "distinct experts",
    "num_experts": "experts",
    "predicted_loss": "predicted loss",
    "measured_loss": "measured loss",
    "predicted_kl": "expected KL",
}
"""Keys of a layer in report.json; a column that no layer fills is left out, but for the losses."""

VLLM_VERSIONS: Final = "0.32"


def model_card(
    report: Mapping[str, Any], *, source_name: str, source_readme: str | None = None
) -> str:
    """Markdown with YAML front matter.

    `report` is the content of report.json (see `report.py`); missing keys leave their sentence
    out. `source_name` is the name of the dense model without its path. `source_readme` is the
    text of its README.md, whose licence is carried over.
    """
    name = (
        f"{source_name}, compressed" if report.get("ratio") is None else _title(report, source_name)
    )
    sections = [
        _front_matter(source_name, source_readme),
        f"# {name}\n",
        _what_it_is(report, source_name),
        _how_to_serve(is_plain=bool(report.get("plain"))),
        _sizes(report),
        _distance(report),
        _calibration(report),
        _how_to_make_again(source_name),
        _layers(report.get("layers") or ()),
        _limits(report),
    ]
    return "\n".join(section for section in sections if section)


def front_matter_of(readme: str) -> dict[str, Any]:
    """The YAML block that opens a model card; empty if there is none or it is not a mapping."""
    opening, *rest = readme.lstrip("\ufeff").splitlines() or [""]
    if opening.strip() != "---" or "---" not in (line.strip() for line in rest):
        return {}
    end = [line.strip() for line in rest].index("---")
    try:
        value = yaml.safe_load("\n".join(rest[:end]))
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _front_matter(source_name: str, source_readme: str | None) -> str:
    values: dict[str, Any] = {
        "base_model": source_name,
        "base_model_relation": "quantized",
        "library_name": "vllm",
        "tags": ["moe", "compressed", "low-rank", "vllm-moesvd"],
    }
    carried = front_matter_of(source_readme or "")
    values |= {key: carried[key] for key in CARRIED_KEYS if key in carried}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{text}---\n"


def _title(report: Mapping[str, Any], source_name: str) -> str:
    return f"{source_name}, {100 * float(report['ratio']):.0f} % smaller"


def _what_it_is(report: Mapping[str, Any], source_name: str) -> str:
    if report.get("method") == "drop":
        change, kept = "with whole experts removed from every layer", "Attention, embeddings"
    else:
        change = "with the weights of its experts replaced by smaller ones"
        kept = "Attention, router, embeddings"
    text = f"This is `{source_name}` {change}, made by vllm-moesvd {version('vllm-moesvd')}"
    if report.get("method"):
        text += f" with the method `{report['method']}`"
    return f"{text}. {kept} and the tokenizer are the source's, unchanged.\n"


def _how_to_serve(*, is_plain: bool) -> str:
    if is_plain:
        return (
            "## Serve it\n\nAn ordinary checkpoint of its architecture with fewer or narrower "
            "experts: vLLM, transformers and other engines load it without a plugin.\n\n"
            "    vllm serve ./this-folder\n"
        )
    return (
        "## Serve it\n\n"
        f"With vLLM {VLLM_VERSIONS} and the vllm-moesvd plugin in the same environment:\n\n"
        "    vllm serve ./this-folder\n\n"
        "Other engines do not read this format. `compress_tool export-dense` folds the factors "
        "back into an ordinary checkpoint of the original size.\n"
    )


def _sizes(report: Mapping[str, Any]) -> str:
    rows = [
        (
            label,
            text(report[f"{key}_before"]),
            text(report[f"{key}_after"]),
            percent_text(report[f"{key}_after"] / report[f"{key}_before"] - 1),
        )
        for label, key, text in (
            ("parameters", "total_params", params_text),
            ("weights", "bytes", bytes_text),
        )
        if f"{key}_before" in report and f"{key}_after" in report
    ]
    if not rows:
        return ""
    return "## Size\n\n" + _table(("", "source", "this model", "change"), rows)


def _distance(report: Mapping[str, Any]) -> str:
    kl = report.get("measured_kl")
    if not isinstance(kl, int | float):
        return ""
    expected = [
        layer["predicted_kl"]
        for layer in report.get("layers") or ()
        if isinstance(layer.get("predicted_kl"), int | float)
    ]
    text = (
        f"KL(source || this model) is {kl:.4g} nats per token on calibration text, which the fit "
    )
    text += "has seen"
    if expected:
        text += f"; the plan expected {sum(expected):.4g}"
    return (
        f"## Distance to the source\n\n{text}. On text of your own: `compress_tool eval "
        "./this-folder --text FILE --against SOURCE`.\n"
    )


def _how_to_make_again(source_name: str) -> str:
    return (
        "## Make it again\n\n"
        f"    compress_tool run {source_name} OUT --recipe recipe.yaml\n\n"
        "`manifest.json` has the SHA-256 of every file here and of the source; `report.html` shows "
        "how every layer was chosen.\n"
    )


def _calibration(report: Mapping[str, Any]) -> str:
    calibration = report.get("calibration")
    if not isinstance(calibration, Mapping):
        return ""
    files = ", ".join(f"`{name}`" for name in calibration.get("files") or ())
    counts = [
        f"{calibration[key]:,} {word}"
        for key, word in (("samples", "sequences"), ("seq_len", "tokens each"))
        if isinstance(calibration.get(key), int)
    ]
    return (
        "## Calibration\n\nThe weights were fitted to the activations of this text: "
        f"{files or 'not recorded'}{' (' + ' of '.join(counts) + ')' if counts else ''}. On other "
        "languages or subjects the loss may be larger.\n"
    )


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    columns = {
        key: name
        for key, name in LAYER_COLUMNS.items()
        if key in ("predicted_loss", "measured_loss")
        or any(layer.get(key) is not None for layer in layers)
    }
    rows = [
        (
            str(layer.get("index", "")),
            str(layer.get("form", "")),
            *(_number(layer.get(key)) for key in columns),
        )
        for layer in layers
    ]
    header = ("layer", "form", *columns.values())
    return (
        "## Layers\n\n"
        + _table(header, rows)
        + "\nMeasured: relative squared error of the layer's output on the calibration text, 0 is "
        "exact. Predicted: before storing and refit, the share of energy beyond both ranks (gate "
        "and up, and down, added) or of the neurons given up. Expected KL: what the plan counted "
        "for the layer.\n"
    )


def _limits(report: Mapping[str, Any]) -> str:
    lines = [
        "The loss per layer is measured on the calibration text, not on a task. Measure your own "
        "task before you rely on this model (`compress_tool eval`, or `lm_eval` against the "
        "server).",
        "Everything that holds for the source (biases, licence, limits) holds for this model.",
    ]
    unrouted = [
        (layer.get("index"), sum(1 for count in layer.get("counts") or () if count == 0))
        for layer in report.get("layers") or ()
    ]
    if missed := [f"{count} in layer {index}" for index, count in unrouted if count]:
        lines.append(
            "Experts that the calibration text never reached, so that their weights were fitted "
            f"to no activations of their own: {', '.join(missed)}."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"

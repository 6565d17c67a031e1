"""The model card: valid front matter, the source's licence, and only what is known."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from compress_tool.model_card import front_matter_of, model_card

REPORT: dict[str, Any] = {
    "method": "latent",
    "ratio": 0.4012,
    "total_params_before": 10_368_128,
    "total_params_after": 6_200_000,
    "bytes_before": 20_736_256,
    "bytes_after": 12_400_000,
    "calibration": {"files": ["calibration.txt"], "samples": 128, "seq_len": 256},
    "layers": [
        {"index": 0, "form": "latent", "rank_gate_up": 72, "rank_down": 80, "counts": [5, 0, 3]},
        {"index": 1, "form": "dense", "measured_loss": 0.0, "predicted_loss": None},
    ],
}


def test_front_matter_opens_the_card_and_names_the_base_model() -> None:
    values = front_matter_of(model_card(REPORT, source_name="pocket-mixtral"))
    assert values["base_model"] == "pocket-mixtral"
    assert values["library_name"] == "vllm"
    assert "license" not in values


def test_licence_and_language_of_the_source_are_carried_over_and_nothing_else() -> None:
    readme = "---\nlicense: apache-2.0\nlanguage: [en, fr]\ntags: [chat]\nwidget: x\n---\n# M\n"
    values = front_matter_of(model_card(REPORT, source_name="m", source_readme=readme))
    assert values["license"] == "apache-2.0"
    assert values["language"] == ["en", "fr"]
    assert "chat" not in values["tags"]
    assert "widget" not in values


def test_a_hostile_source_name_stays_a_string() -> None:
    name = "a: b\n- c # d"
    assert front_matter_of(model_card({}, source_name=name))["base_model"] == name


def test_the_numbers_are_there() -> None:
    card = model_card(REPORT, source_name="pocket-mixtral")
    for text in ("40 % smaller", "| parameters | 10.4 M | 6.2 M | −40.2 % |", "20.7 MB", "12.4 MB"):
        assert text in card
    assert "| 0 | latent | 72 | 80 | – | – |" in card
    assert "128 sequences of 256 tokens each" in card
    assert "never reached" in card and "1 in layer 0" in card


def test_sizes_of_every_form_and_the_distance_are_there() -> None:
    layers = [
        {"index": 0, "form": "narrow", "width": 96, "predicted_kl": 0.25},
        {"index": 1, "form": "svd", "rank_gate_up": 7, "rank_down": 5, "distinct_experts": 3},
    ]
    card = model_card(REPORT | {"layers": layers, "measured_kl": 0.2}, source_name="m")
    assert "| 0 | narrow | 96 | – | – | – | – | – | 0.25 |" in card
    assert "| 1 | svd | – | 7 | 5 | 3 | – | – | – |" in card
    assert "0.2 nats per token" in card and "the plan expected 0.25" in card
    assert "Distance" not in model_card(REPORT, source_name="m")


def test_a_checkpoint_of_fewer_experts_needs_no_plugin() -> None:
    layers = [{"index": index, "form": "drop", "counts": [5, 0, 3]} for index in range(2)]
    card = model_card(REPORT | {"method": "drop", "plain": True, "layers": layers}, source_name="m")
    assert "whole experts removed" in card
    assert "without a plugin" in card
    assert "Attention, router" not in card
    assert "export-dense" not in card


def test_an_empty_report_still_gives_a_card() -> None:
    card = model_card({}, source_name="m")
    assert "## Serve it" in card
    assert "None" not in card


@pytest.mark.parametrize(
    "readme",
    ["", "---", "---\n: : :\n---\n", "---\n- a\n---\n", "# no front matter\n---\nx: 1\n---\n"],
)
def test_a_readme_without_front_matter_gives_nothing(readme: str) -> None:
    assert front_matter_of(readme) == {}


def test_front_matter_is_never_more_than_data() -> None:
    with_tag = "---\nlicense: !!python/object/apply:os.system ['true']\n---\n"
    assert front_matter_of(with_tag) == {}
    assert yaml.safe_load(yaml.safe_dump(front_matter_of("---\na: 1\n---\n"))) == {"a": 1}

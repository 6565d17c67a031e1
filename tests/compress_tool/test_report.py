"""The report: self-contained, complete with missing keys, sizes equal to the checkpoint's."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress_tool import report as report_module
from compress_tool import report_sections
from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError
from compress_tool.report import (
    compared_runs,
    report_html,
    shown_layers,
    size_by_part,
    write_report,
)
from compress_tool.report_maps import coverage, lost_energy, rank_for
from tests.checkpoints import tiny_mixtral

PARTS = {"routed experts": (1000, 400), "attention": (100, 100)}
PNG = re.compile(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"')
WHOLE = {"num_experts": 4, "hidden_size": 8, "expert_width": 12, "method": "latent", "ratio": 0.4}


def layer(index: int, **values: Any) -> dict[str, Any]:
    entry = {
        "index": index,
        "form": "latent",
        "rank_gate_up": 3,
        "rank_down": 2,
        "width": 9,
        "kept": 0.37,
        "predicted_loss": 0.1,
        "measured_loss": 0.11,
        "predicted_kl": 0.002,
        "probes": {"narrow-6": 0.003, "latent-4": 0.004},
        "weight_error": {"gate": 0.5, "up": 0.5, "down": 0.25},
        "refit_error_before": 0.2,
        "refit_error_after": 0.15,
        "counts": [10, 0, 5, 1],
        "spectrum_gate_up": [8.0, 4.0, 2.0, 1.0],
        "spectrum_down": [4.0, 2.0, 1.0, 0.0],
        "random_floor_gate_up": 0.6,
        "random_floor_down": 0.75,
    }
    return entry | values


def render(layers: Sequence[dict[str, Any]], name: str = "model", **values: Any) -> str:
    return report_html({**WHOLE, "layers": list(layers), **values}, name=name, parts=PARTS)


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", page)


def test_every_section_and_nothing_from_outside() -> None:
    page = render([layer(0), layer(1)], measured_kl=0.0035)
    assert titles(page) == [
        "At a glance", "Size", "Layer by layer", "Sensitivity", "Predicted and measured",
        "Spectra and cuts", "Routing", "Calibration coverage",
    ]  # fmt: skip
    # One picture each but the first; predicted and measured has one for the joint KL as well.
    assert len(PNG.findall(page)) == 8
    rest = PNG.sub("", page)
    for outside in ("http:", "https:", "//", "<script", "<link", "url(", "src=", "@import"):
        assert outside not in rest


def test_every_picture_says_in_words_what_it_shows() -> None:
    page = render([layer(0), layer(1)], measured_kl=0.0035)
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(alts) == len(PNG.findall(page))
    assert all(len(alt.split()) >= 4 for alt in alts)
    assert "Expected KL 0.004, measured 0.0035" in alts
    assert any("2 experts were never routed to" in alt for alt in alts)


def test_every_key_of_a_layer_may_be_missing() -> None:
    for missing in layer(0):
        if missing == "index":
            continue
        partial = {key: value for key, value in layer(0).items() if key != missing}
        for layers in ([partial, layer(1)], [partial]):
            assert "None" not in render(layers)
    assert "None" not in render([{"index": 0}])
    assert "None" not in report_html({"layers": [layer(0)]}, name="model", parts=PARTS)
    assert len(PNG.findall(report_html({}, name="model", parts=PARTS))) == 1


def test_the_numbers_of_the_pictures_are_in_the_tables() -> None:
    page = render([layer(0), layer(1, predicted_kl=0.0015)], measured_kl=0.0035)
    assert "expected 0.0035 nats per token" in page
    row = "".join(f"<td>{value}</td>" for value in ("9", "3", "2", "37.0 %", "4"))
    assert f"<td class=text>latent, narrow</td>{row}" in page
    # narrow-6 and latent-4, then the spectrum: 8 of 15 at rank 1, and 1/15 lost at rank 3.
    assert "<td>0.003</td><td>0.004</td>" in page
    spectrum = ("1", "3", "4", "4", "3", "0.06667", "0.6")
    assert "".join(f"<td>{value}</td>" for value in spectrum) in page
    # Least, 5 %, median, most, load of the most, and who has none.
    found = ("0", "0", "3", "10", "2.50", "1")
    assert "".join(f"<td>{value}</td>" for value in found) in page


def test_a_dense_layer_and_an_unrouted_expert_are_shown() -> None:
    dense = {"index": 0, "form": "dense", "counts": [1, 1, 1, 1]}
    page = render([dense, layer(1)])
    assert "1 of 2" in page
    assert "<td class=text>dense</td>" in page


def test_distinct_experts_are_those_left_in_every_form() -> None:
    page = render(
        [
            layer(0),
            layer(1, form="shared-v", distinct_experts=3),
            layer(2, form="drop", num_experts=2),
        ]
    )
    for form, count in (("latent, narrow", 4), ("shared-v", 3), ("drop", 2)):
        row = re.search(f"<td class=text>{form}</td>(.*?)</tr>", page)
        assert row is not None and row.group(1).endswith(f"<td>{count}</td>")


def test_full_rank_is_the_hidden_size_or_the_smaller_side() -> None:
    whole = {"hidden_size": 16, "expert_width": 8}
    made = [layer(0, rank_down=8), layer(1, form="svd", rank_down=8)]
    latent, svd = shown_layers({**whole, "layers": made})
    assert (latent["rank_down_share"], svd["rank_down_share"]) == (0.5, 1.0)
    assert (latent["shown_form"], svd["shown_form"]) == ("latent", "svd")


def test_names_are_escaped() -> None:
    page = render(
        [layer(0, form="<b>x</b>")],
        name="<script>alert(1)</script>",
        calibration={"files": ["<i>f</i>"], "samples": 3, "seq_len": 4},
    )
    assert "<script" not in page
    assert "<b>x</b>" not in page
    assert "<i>f</i>" not in page


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import, real_find = builtins.__import__, importlib.util.find_spec
    with_pictures = render([layer(0), layer(1)], measured_kl=0.0035)

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    monkeypatch.setattr(
        report_sections, "find_spec", lambda n: None if n == "matplotlib" else real_find(n)
    )
    page = render([layer(0), layer(1)], measured_kl=0.0035)
    assert "<img" not in page
    assert page.count("<table>") == with_pictures.count("<table>") == 7
    assert "matplotlib is not installed" in page


def test_importing_the_report_does_not_import_matplotlib() -> None:
    """Checked in a process of its own: here the figures may have been drawn already."""
    import subprocess

    code = "import sys, compress_tool.report_figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_add_up_to_the_checkpoint(tmp_path: Path) -> None:
    for tied in (True, False):
        checkpoint = open_checkpoint(
            tiny_mixtral(tmp_path / str(tied), tie_word_embeddings=tied), allow_factored=False
        )
        parts = size_by_part(checkpoint)
        assert sum(after for _, after in parts.values()) == checkpoint.total_bytes
        assert all(before == after for before, after in parts.values())


def test_write_report_puts_one_file_into_the_folder(tmp_path: Path) -> None:
    folder = tiny_mixtral(tmp_path / "m")
    before = sorted(entry.name for entry in folder.iterdir())
    assert write_report(folder).name == "report.html"
    (folder / "report.json").write_text(json.dumps({"layers": [layer(0)]}))
    write_report(folder)
    after = sorted(entry.name for entry in folder.iterdir())
    assert after == sorted([*before, "report.html", "report.json"])


@pytest.mark.parametrize("layers", [{}, [1], [{"form": "latent"}], [{"index": "0"}]])
def test_a_broken_report_json_is_one_clear_line(tmp_path: Path, layers: Any) -> None:
    folder = tiny_mixtral(tmp_path / "m")
    (folder / "report.json").write_text(json.dumps({"layers": layers}))
    with pytest.raises(InputError, match=r"report\.json: layers must be a list"):
        write_report(folder)


def run_of(method: str, bytes_after: int, **values: Any) -> dict[str, Any]:
    layers = [layer(0, measured_loss=0.2), {"index": 1, "form": "dense"}]
    return {
        "source": "m", "method": method, "bytes_before": 1000, "bytes_after": bytes_after,
        "total_params_before": 500, "layers": layers, **values,
    }  # fmt: skip


def test_compared_runs_are_rows_and_a_curve() -> None:
    reports = [run_of("auto", 600, measured_kl=0.1), run_of("latent", 800, measured_kl=0.05)]
    runs = compared_runs(reports, [Path("a"), Path("b")])
    assert [run["share"] for run in runs] == [0.6, 0.8]
    assert [run["mean_loss"] for run in runs] == [0.1, 0.1]
    page = report_html(reports[0], name="m", parts=PARTS, runs=runs)
    assert "KL to the dense model, nats per token against size for 2 runs" in page
    assert "<td class=text>latent</td><td class=text>b</td>" in page
    # One run without the measured KL: the picture falls back to what all of them have.
    del reports[1]["measured_kl"]
    runs = compared_runs(reports, [Path("a"), Path("b")])
    assert "mean loss of a layer" in report_html(reports[0], name="m", parts=PARTS, runs=runs)


def test_runs_of_two_sources_are_not_compared() -> None:
    with pytest.raises(InputError, match=r"^b: is of source 'other'"):
        compared_runs(
            [run_of("auto", 600), run_of("auto", 1, source="other")], [Path("a"), Path("b")]
        )


def test_equal_numbers_give_equal_bytes() -> None:
    assert render([layer(0)]) == render([layer(0)])


def test_lost_energy_is_the_tail_share() -> None:
    assert lost_energy([3.0, 1.0]).tolist() == [1.0, 0.25, 0.0]
    assert lost_energy([0.0, 0.0]).size == 0
    assert (rank_for([3.0, 1.0], 0.7), rank_for([3.0, 1.0], 0.8), rank_for([], 0.8)) == (1, 2, None)
    values = np.random.default_rng(0).random(50)
    lost = lost_energy(sorted(values, reverse=True))
    assert (np.diff(lost) <= 0).all()
    assert lost[20] == pytest.approx(sorted(values)[:30] @ np.ones(30) / values.sum())


def test_coverage_is_least_fifth_percentile_and_median() -> None:
    assert coverage([5, 1, 9]) == (1.0, 1.0, 5.0)
    # 5 of these 100 experts have fewer tokens than 5.
    assert coverage(range(100)) == (0.0, 5.0, 49.5)


def test_a_large_model_is_drawn_in_seconds() -> None:
    """60 layers of 128 experts with 1000 eigenvalues each."""
    spectrum = (1.0 / np.arange(1, 1001)).tolist()
    layers = [
        layer(i, counts=list(range(128)), spectrum_gate_up=spectrum, spectrum_down=spectrum)
        for i in range(60)
    ]
    page = render(layers, num_experts=128)
    assert len(PNG.findall(page)) == 8
    # Long tables stand behind a line that opens them.
    assert page.count("<details>") == 6


def test_parts_of_other_families_have_their_names() -> None:
    found = {
        name: report_module._part_of(f"model.layers.3.{name}.weight")
        for name in (
            "self_attn.q_proj", "mlp.shared_experts.up_proj", "mlp.shared_expert_gate",
            "mlp.gate_proj", "mlp.gate", "post_attention_layernorm",
        )
    }  # fmt: skip
    assert list(found.values()) == [
        "attention", "shared experts", "shared experts", "dense layers", "router and norms",
        "router and norms",
    ]  # fmt: skip

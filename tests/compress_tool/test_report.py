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
from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError
from compress_tool.report import report_html, size_by_part, write_report
from compress_tool.report_figures import lost_energy
from tests.checkpoints import tiny_mixtral

PARTS = {"routed experts": (1000, 400), "attention": (100, 100)}
PNG = re.compile(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"')


def layer(index: int, **values: Any) -> dict[str, Any]:
    entry = {
        "index": index,
        "form": "latent",
        "rank_gate_up": 3,
        "rank_down": 2,
        "predicted_loss": 0.1,
        "measured_loss": 0.11,
        "weight_error": {"gate": 0.5, "up": 0.5, "down": 0.25},
        "counts": [10, 0, 5, 1],
        "spectrum_gate_up": [8.0, 4.0, 2.0, 1.0],
        "spectrum_down": [4.0, 2.0, 1.0, 0.0],
    }
    return entry | values


def render(layers: Sequence[dict[str, Any]], name: str = "model", **values: Any) -> str:
    return report_html({"layers": list(layers), **values}, name=name, parts=PARTS)


def test_four_figures_and_nothing_from_outside() -> None:
    page = render([layer(0), layer(1)], method="latent", ratio=0.4)
    assert len(PNG.findall(page)) == 4
    rest = PNG.sub("", page)
    for outside in ("http:", "https:", "//", "<script", "<link", "url(", "src=", "@import"):
        assert outside not in rest


def test_every_key_of_a_layer_may_be_missing() -> None:
    for missing in layer(0):
        if missing == "index":
            continue
        partial = {key: value for key, value in layer(0).items() if key != missing}
        assert "None" not in render([partial, layer(1)])
    assert "None" not in render([{"index": 0}])
    assert len(PNG.findall(report_html({}, name="model", parts=PARTS))) == 1


def test_a_dense_layer_and_an_unrouted_expert_are_shown() -> None:
    dense = {"index": 0, "form": "dense", "counts": [1, 1, 1, 1]}
    page = render([dense, layer(1)])
    assert "1 of 2" in page
    assert "<td>dense</td>" in page


def test_names_are_escaped() -> None:
    page = render([layer(0, form="<b>x</b>")], name="<script>alert(1)</script>")
    assert "<script" not in page
    assert "<b>x</b>" not in page


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import, real_find = builtins.__import__, importlib.util.find_spec

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    monkeypatch.setattr(
        report_module, "find_spec", lambda n: None if n == "matplotlib" else real_find(n)
    )
    page = render([layer(0)])
    assert "<img" not in page
    assert page.count("<table>") == 2
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


def test_equal_numbers_give_equal_bytes() -> None:
    assert render([layer(0)]) == render([layer(0)])


def test_lost_energy_is_the_tail_share() -> None:
    assert lost_energy([3.0, 1.0]).tolist() == [1.0, 0.25, 0.0]
    assert lost_energy([0.0, 0.0]).size == 0
    values = np.random.default_rng(0).random(50)
    lost = lost_energy(sorted(values, reverse=True))
    assert (np.diff(lost) <= 0).all()
    assert lost[20] == pytest.approx(sorted(values)[:30] @ np.ones(30) / values.sum())


def test_a_large_model_is_drawn_in_seconds() -> None:
    """60 layers of 128 experts with 1000 eigenvalues each."""
    spectrum = (1.0 / np.arange(1, 1001)).tolist()
    layers = [
        layer(i, counts=list(range(128)), spectrum_gate_up=spectrum, spectrum_down=spectrum)
        for i in range(60)
    ]
    assert len(PNG.findall(render(layers))) == 4

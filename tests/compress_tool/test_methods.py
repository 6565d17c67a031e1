"""Every method through the command line: run, verify against the source, export, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_tool.cli import main
from tests.checkpoints import tiny_mixtral

SMALL = ["--samples", "12", "--seq-len", "32"]
FACTORING = {
    "svd": [],
    "asvd": [],
    "plain-svd": ["--method", "asvd", "--alpha", "0"],
    "svd-llm": [],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("source") / "dense", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    file = source.parent / "text.txt"
    file.write_text("It was the best of times, it was the worst of times. " * 6)
    return file


def run_json(capsys, *words: str | Path) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FACTORING)
def test_a_method_from_source_to_evaluation(capsys, source: Path, text: Path, tmp_path, name):
    flags = FACTORING[name] or ["--method", name]
    stats = source.parent / "stats"
    out, dense = tmp_path / "out", tmp_path / "dense"
    ran = run_json(capsys, "run", source, out, "--ratio", "0.3", *SMALL, *flags, "--stats", stats)
    assert 0.3 <= ran["ratio"] <= 0.305
    assert run_json(capsys, "verify", out, "--against", source)["ok"]
    planned = run_json(capsys, "plan", source, "--ratio", "0.3", *SMALL, *flags)
    assert planned["bytes_after"] == ran["bytes_after"]
    run_json(capsys, "export-dense", out, dense, "--dtype", "float32")
    scored = run_json(capsys, "eval", out, "--text", text, "--seq-len", "32", "--against", dense)
    # The same function, once folded on the fly and once on disk.
    assert scored["kl"] < 1e-9

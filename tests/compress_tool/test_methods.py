"""Every method through the command line: run, verify against the source, export, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.plain_check import drop_problems
from compress_tool.streaming import StreamedModel
from tests.checkpoints import mixtral_tensors, tiny_mixtral, write_checkpoint
from tests.compress_tool.test_checkpoint import fused_tensors

SMALL = ["--samples", "12", "--seq-len", "32"]
FACTORING = {
    "svd": [],
    "asvd": [],
    "plain-svd": ["--method", "asvd", "--alpha", "0"],
    "svd-llm": [],
    "d2-moe": [],
    "d2-moe-pruned": ["--method", "d2-moe", "--base", "frequency", "--base-prune", "0.5"],
    "d2-moe-shared": ["--method", "d2-moe", "--base", "mean", "--share-v"],
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


def ratio_keeping(source: Path, kept: int) -> float:
    checkpoint = open_checkpoint(source, allow_factored=False)
    shape = checkpoint.shape
    per_expert = (3 * shape.expert_width + 1) * shape.hidden_size * checkpoint.num_layers
    return (shape.num_experts - kept) * per_expert / checkpoint.total_params


@pytest.fixture(scope="module")
def dropped(source: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dropped") / "out"
    words = ["run", source, out, "--method", "drop", "--ratio", ratio_keeping(source, 3), *SMALL]
    assert main([str(word) for word in words]) == 0
    return out


def test_drop_writes_an_ordinary_checkpoint(capsys, source: Path, text: Path, dropped: Path):
    config = json.loads((dropped / "config.json").read_text())
    dense = json.loads((source / "config.json").read_text())
    assert config == dense | {"num_local_experts": 3}
    assert run_json(capsys, "verify", dropped, "--against", source)["ok"]
    report = json.loads((dropped / "report.json").read_text())
    checkpoint = open_checkpoint(dropped, allow_factored=False)
    assert checkpoint.total_bytes == report["bytes_after"]
    assert "without a plugin" in (dropped / "README.md").read_text()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dropped, dtype=torch.float32)
    ids = torch.arange(40, 72)[None]
    streamed = StreamedModel(checkpoint)
    hidden = streamed.embed(ids)
    for layer in range(3):
        streamed.run_layer(layer, hidden, 1)
    assert torch.allclose(model(ids).logits, streamed.logits(hidden), atol=1e-4)


def test_drop_removes_the_experts_that_matter_least(source: Path, dropped: Path):
    for entry in json.loads((dropped / "report.json").read_text())["layers"]:
        removed = set(range(4)) - set(entry["experts"])
        (gone,) = removed
        assert entry["scores"][gone] == min(entry["scores"])
        assert 0 < entry["measured_loss"] < 1


def test_verify_notices_an_expert_that_is_not_the_one_named(source: Path, dropped: Path):
    output = open_checkpoint(dropped, allow_factored=False)
    against = open_checkpoint(source, allow_factored=False)
    manifest = json.loads((dropped / "manifest.json").read_text())
    entry = manifest["layers"]["1"]
    assert list(drop_problems(output, against, 1, entry)) == []
    others = sorted({0, 1, 2, 3} - {entry["experts"][0]})
    for wrong in (others, [0, 1], [0, 1, 1], [0, 1, "2"], None):
        assert list(drop_problems(output, against, 1, {"experts": wrong}))


def test_drop_says_which_ratios_it_can_reach(capsys, source: Path, tmp_path: Path):
    words = ["run", str(source), str(tmp_path / "o"), "--method", "drop", *SMALL]
    assert main([*words, "--ratio", "0.1"]) == 4
    error = capsys.readouterr().err
    assert f"{ratio_keeping(source, 3):.4f}" in error and "--nearest" in error
    assert main([*words, "--ratio", "0.9", "--nearest"]) == 4
    assert f"{ratio_keeping(source, 2):.4f}" in capsys.readouterr().err
    assert main([*words, "--ratio", "0.1", "--layers", "1"]) == 2
    assert not (tmp_path / "o").exists()
    ran = run_json(capsys, *words, "--ratio", "0.1", "--nearest")
    assert ran["ratio"] == pytest.approx(ratio_keeping(source, 3))


def test_drop_gives_the_same_from_the_fused_layout(source: Path, dropped: Path, tmp_path: Path):
    config = json.loads((source / "config.json").read_text())
    fused = write_checkpoint(tmp_path / "fused", config, fused_tensors(mixtral_tensors(config), 3))
    out = tmp_path / "out"
    words = ["run", fused, out, "--method", "drop", "--ratio", ratio_keeping(source, 3), *SMALL]
    assert main([str(word) for word in words]) == 0
    for file in dropped.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()

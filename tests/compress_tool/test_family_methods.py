"""Methods × families through the command line: plan, run, verify, export, evaluate, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.dropping import kept_experts
from tests.families import BY_NAME, NEW_FAMILIES, tiny

SMALL = ["--samples", "12", "--seq-len", "32"]
ALL_METHODS = {
    "latent": ["--centre"],
    "shared-v": ["--groups", "2"],
    "svd": [],
    "asvd": [],
    "svd-llm": [],
    "d2-moe": [],
    "moe-svd": [],
    "narrow": ["--refit-steps", "5"],
    "auto": ["--refit-steps", "5"],
    "drop": ["--nearest"],
}
CASES = [("qwen2_moe", method) for method in ALL_METHODS] + [
    (name, method)
    for name in NEW_FAMILIES
    if name != "qwen2_moe"
    for method in ("shared-v", "auto", "drop")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    text = "It was the best of times, it was the worst of times. "
    (folder / "text.txt").write_text(text * 6)
    for name in NEW_FAMILIES:
        tiny(folder / name, name)
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_method_from_source_to_report(
    capsys, monkeypatch, root: Path, tmp_path: Path, name: str, method: str
):
    if method != "auto":
        # Drawing the figures takes longer than everything else here; one method does it.
        monkeypatch.setattr("compress_tool.pipeline.write_report", lambda out: None)
    source, out = root / name, tmp_path / "out"
    flags = ["--method", method, "--ratio", "0.2", *ALL_METHODS[method], *SMALL]
    planned = run_json(capsys, "plan", source / "config.json", *flags)
    ran = run_json(capsys, "run", source, out, *flags, "--stats", root / f"stats-{name}")
    assert ran["ratio"] >= 0.2
    if method != "drop":
        assert ran["ratio"] <= 0.205
    if method != "auto":
        # The bias of a router is fp32 also where config.json says another dtype.
        assert planned["bytes_after"] == ran["bytes_after"]
    assert run_json(capsys, "verify", out, "--against", source)["ok"]
    described = run_json(capsys, "inspect", out)
    assert described["family"] == name
    assert (out / "report.html").exists() == (method == "auto")
    _carried_over(source, out)
    against: list[str | Path] = []
    if described["factored_layers"] and method != "latent":
        run_json(capsys, "export-dense", out, tmp_path / "dense", "--dtype", "float32")
        against = ["--against", tmp_path / "dense"]
    text = root / "text.txt"
    scored = run_json(capsys, "eval", out, "--text", text, "--seq-len", "32", *against)
    if against:
        assert scored["kl"] < 1e-9


def _carried_over(source: Path, out: Path) -> None:
    """All but routed experts, and a router that lost rows, is the source's byte for byte."""
    before = open_checkpoint(source, allow_factored=False)
    after = open_checkpoint(out, allow_factored=True)
    routed = {n for layer in before.moe_layers for n in before.expert_tensors(layer)}
    if after.shape.num_experts < before.shape.num_experts:
        routed |= {n for layer in before.moe_layers for n in before.router_tensors(layer).values()}
    rest = set(before.tensors) - routed
    assert any("shared_expert" in name for name in rest) == (before.family.shared is not None)
    for name in rest:
        theirs, ours = before.read(name), after.read(name)
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_dropped_checkpoint_is_an_ordinary_one(capsys, root: Path, tmp_path: Path, name: str):
    from transformers import AutoModelForCausalLM

    # Qwen3-MoE's number of experts has two names; a config.json may hold both.
    both = {"num_local_experts": 8} if name == "qwen3_moe" else {}
    source, out = tiny(tmp_path / "source", name, **both), tmp_path / "out"
    flags = ["--method", "drop", "--ratio", "0.1", "--nearest", *SMALL]
    assert run_json(capsys, "run", source, out, *flags)["ratio"] >= 0.1
    assert run_json(capsys, "verify", out, "--against", source)["ok"]
    dropped = open_checkpoint(out, allow_factored=False)
    family = dropped.family
    dense = json.loads((source / "config.json").read_text())
    key = family.num_experts_key(dense)
    changed = dict.fromkeys((key, *both), dropped.shape.num_experts)
    assert dropped.config == dense | changed
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(40, 72)[None]
    text = tmp_path / "text.txt"
    tokens = model(ids, labels=ids)
    assert torch.isfinite(tokens.loss)
    text.write_text("abc " * 40)
    assert run_json(capsys, "eval", out, "--text", text, "--seq-len", "32")["perplexity"] > 1
    groups = family.routing_groups(dropped.config)
    if groups is not None:
        old = json.loads((out / "report.json").read_text())["layers"][-1]["experts"]
        size = dense[key] // groups.count
        per_group = [sum(e // size == group for e in old) for group in range(groups.count)]
        assert per_group == [dropped.shape.num_experts // groups.count] * groups.count


def test_kept_experts_are_the_best_of_each_group():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0])
    assert kept_experts(scores[:4], 2, 1) == [2, 3]
    assert kept_experts(scores[:4], 2, 2) == [1, 3]
    assert kept_experts(scores, 4, 1) == [0, 1, 2, 3]


def test_groups_that_cannot_lose_an_expert_are_refused(capsys, tmp_path: Path):
    """Two groups of two score by their best two: none can be taken away."""
    source = tiny(tmp_path / "source", "deepseek_v3", n_routed_experts=4, num_experts_per_tok=2)
    words = ["run", str(source), str(tmp_path / "o"), "--method", "drop", "--ratio", "0.05"]
    assert main([*words, *SMALL]) == 4
    error = capsys.readouterr().err.strip()
    assert "no expert can be dropped" in error and "2 groups" in error and "\n" not in error
    assert not (tmp_path / "o").exists()

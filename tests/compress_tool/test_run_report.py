"""report.json: what the plan expected of every layer, and what the whole model measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_tool.auto_plan import auto_specs, expected_kl
from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.config import Recipe
from compress_tool.corpus import default_calibration_text, token_windows
from compress_tool.probe import known_probes, split_sequences
from compress_tool.sizing import budget
from compress_tool.streaming import StreamedModel
from tests.checkpoints import tiny_mixtral
from vllm_moesvd.format import LatentSpec, NarrowSpec

SMALL = ("--samples", "12", "--seq-len", "32", "--ratio", "0.4")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("source") / "m", num_hidden_layers=3)


@pytest.fixture(scope="module")
def done(source: Path) -> tuple[Path, dict]:
    out = source.parent / "auto"
    words = ["run", source, out, *SMALL, "--refit-steps", "3", "--stats", source.parent / "stats"]
    assert main([*map(str, words)]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_the_measured_kl_is_that_of_the_finished_folder(source, done):
    """It was summed from what the solvers changed; here both models run from end to end."""
    out, report = done
    windows = token_windows(source, [default_calibration_text()], seq_len=32, samples=12, seed=0)
    rows = list(split_sequences(12, 32).probed)
    assert 0 < len(rows) < 12
    models, states = [], []
    for folder in (source, out):
        checkpoint = open_checkpoint(folder, allow_factored=True)
        models.append(StreamedModel(checkpoint))
        states.append(models[-1].embed_all(windows.ids_NS[rows], 4))
        for layer in range(checkpoint.num_layers):
            models[-1].run_layer(layer, states[-1], 4)
    log_p, log_q = (
        model.logits(hidden_NSD).double().log_softmax(-1)
        for model, hidden_NSD in zip(models, states, strict=True)
    )
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert expected > 1e-3
    assert report["measured_kl"] == pytest.approx(expected, rel=1e-3)


def test_the_expected_kl_is_the_allocators(source, done):
    out, report = done
    recipe = Recipe(ratio=0.4, samples=12, seq_len=32, refit_steps=3)
    checkpoint = open_checkpoint(source, allow_factored=False)
    probes = known_probes(source.parent / "stats", recipe)
    specs = auto_specs(checkpoint, budget(checkpoint, recipe), probes, centre=False, refitted=True)
    written = open_checkpoint(out, allow_factored=True).spec
    assert written is not None and dict(written.layers) == specs
    for layer in report["layers"]:
        index = layer["index"]
        assert layer["probes"] == probes[index]
        wanted = expected_kl(specs.get(index), probes[index], checkpoint.shape, refitted=True)
        assert layer["predicted_kl"] == wanted


def test_expected_kl_by_hand():
    """Half of a narrow layer's KL and 0.85 of a latent one's are left by a refit; they add up."""
    from vllm_moesvd.format import MoEShape

    shape = MoEShape(num_experts=4, top_k=2, hidden_size=64, expert_width=96)
    probes = {"narrow-72": 0.1, "narrow-48": 0.2, "narrow-24": 0.4, "narrow-12": 0.8}
    probes |= {"latent-48": 0.3, "latent-32": 0.5}
    narrow = NarrowSpec(width=48)
    both = LatentSpec(rank_gate_up=32, rank_down=32, width=48)
    assert expected_kl(None, probes, shape, refitted=True) == 0
    assert expected_kl(narrow, probes, shape, refitted=False) == pytest.approx(0.2)
    assert expected_kl(narrow, probes, shape, refitted=True) == pytest.approx(0.1)
    assert expected_kl(both, probes, shape, refitted=True) == pytest.approx(0.1 + 0.425)


def test_sizes_of_the_source_are_recorded(done):
    _, report = done
    assert (report["hidden_size"], report["expert_width"], report["num_experts"]) == (64, 96, 4)


def test_other_methods_expect_no_kl(source, done, tmp_path):
    """Even where the statistics they use were probed for auto: equal runs give equal bytes."""
    stats = source.parent / "stats"
    words = ["run", source, tmp_path / "o", *SMALL, "--method", "latent", "--stats", stats]
    assert main([*map(str, words)]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["measured_kl"] is None
    assert not any("probes" in layer or "predicted_kl" in layer for layer in report["layers"])


def test_moe_svd_records_the_sensitivity_it_chose_by(source, done, tmp_path):
    words = ["run", source, tmp_path / "o", *SMALL, "--method", "moe-svd"]
    assert main([*map(str, words)]) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    found = {layer["index"]: layer["sensitivity"] for layer in report["layers"]}
    factored = [layer["index"] for layer in report["layers"] if layer["form"] != "dense"]
    dense = set(found) - set(factored)
    assert factored and all(found[a] <= found[b] for a in factored for b in dense)

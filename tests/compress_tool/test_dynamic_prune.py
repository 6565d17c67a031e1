"""Base neurons left out per batch: by hand, by batch, and where it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.dynamic_prune import with_dynamic_prune
from compress_tool.streaming import StreamedModel
from tests.checkpoints import tiny_mixtral
from tests.compress_tool.test_methods import run_json

SHARE = 0.4
WIDTH = 48
"""Neurons of the base: half of 96."""

PREFIX = "model.layers.0.block_sparse_moe.experts.moesvd."


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("source") / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def compressed(source: Path) -> Path:
    out = source.parent / "out"
    words = ["run", source, out, "--method", "d2-moe", "--base-prune", "0.5", "--ratio", "0.3"]
    words += ["--samples", "12", "--seq-len", "32"]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))


def layer_output(path: Path, ids: torch.Tensor, *, share: float | None, batch_size: int = 3):
    checkpoint = open_checkpoint(path, allow_factored=True)
    if share is not None:
        checkpoint = with_dynamic_prune(checkpoint, share)
    model = StreamedModel(checkpoint)
    return model.run_layer(0, model.embed(ids), batch_size)


def base_file(path: Path) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / index["weight_map"][PREFIX + "base_gate"]


def energies(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Σ g² h² ‖down‖² over the routed rows, h by the base alone, from what the experts saw."""
    model = StreamedModel(open_checkpoint(path, allow_factored=True))
    seen = []
    model.run_layer(0, model.embed(ids), len(ids), lambda *arguments: seen.append(arguments))
    (x, _, gate), base = seen[0], load_file(base_file(path))
    rows = x.repeat_interleave(gate.shape[1], dim=0)
    h = silu(rows @ base[PREFIX + "base_gate"].T) * (rows @ base[PREFIX + "base_up"].T)
    weighted = (h * gate.flatten()[:, None]).square().sum(dim=0)
    return weighted * base[PREFIX + "base_down"].square().sum(dim=0)


def without(path: Path, out: Path, neurons: torch.Tensor) -> Path:
    """A copy whose base has zeros for the neurons: what the evaluation has to equal."""
    shutil.copytree(path, out)
    file = base_file(out)
    tensors = load_file(file)
    tensors[PREFIX + "base_gate"][neurons] = 0
    tensors[PREFIX + "base_up"][neurons] = 0
    tensors[PREFIX + "base_down"][:, neurons] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def test_a_batch_does_without_its_least_important_neurons(compressed, ids, tmp_path):
    least = energies(compressed, ids).argsort()[: round(SHARE * WIDTH)]
    assert len(least) == 19
    pruned = layer_output(compressed, ids, share=SHARE)
    by_hand = layer_output(without(compressed, tmp_path / "least", least), ids, share=None)
    torch.testing.assert_close(pruned, by_hand, atol=1e-5, rtol=1e-5)
    # Null tests: nothing left out, and as many others left out.
    whole = layer_output(compressed, ids, share=None)
    most = energies(compressed, ids).argsort(descending=True)[: len(least)]
    other = layer_output(without(compressed, tmp_path / "most", most), ids, share=None)
    changed = float((pruned - whole).norm())
    assert changed > 1e-3 * float(whole.norm())
    assert float((other - whole).norm()) > 2 * changed


def test_the_result_depends_on_the_batch_and_a_whole_base_does_not(compressed, ids):
    alone = layer_output(compressed, ids, share=SHARE, batch_size=1)
    assert not torch.allclose(alone, layer_output(compressed, ids, share=SHARE), atol=1e-4)
    whole = layer_output(compressed, ids, share=None)
    torch.testing.assert_close(whole, layer_output(compressed, ids, share=None, batch_size=1))
    # A share that rounds to no neuron is the whole base.
    assert torch.equal(layer_output(compressed, ids, share=0.01), whole)


def test_eval_scores_it_and_says_so(capsys, source: Path, compressed: Path):
    text = source.parent / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 6)
    words = ["eval", compressed, "--text", text, "--seq-len", "32", "--against", source]
    plain = run_json(capsys, *words)
    pruned = run_json(capsys, *words, "--dynamic-prune", "0.6")
    assert (plain["dynamic_prune"], pruned["dynamic_prune"]) == (None, 0.6)
    assert pruned["kl"] > plain["kl"]


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan"])
def test_a_senseless_share_is_refused(capsys, compressed: Path, share: str):
    assert main(["eval", str(compressed), "--text", "x", "--dynamic-prune", share]) == 2
    error = capsys.readouterr().err
    assert "--dynamic-prune is" in error
    assert error.count("\n") == 1


def test_a_checkpoint_without_a_base_is_refused(capsys, source: Path):
    assert main(["eval", str(source), "--text", "x", "--dynamic-prune", "0.5"]) == 2
    assert "has none" in capsys.readouterr().err

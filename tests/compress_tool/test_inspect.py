"""inspect: numbers that can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

from compress_tool.checkpoint import open_checkpoint
from compress_tool.inspect import describe
from tests.checkpoints import tiny_mixtral
from tests.compress_tool.test_checkpoint import narrow_checkpoint
from tests.compress_tool.test_export_dense import SPECS, factored

EXPERT = 3 * 64 * 96
ATTENTION = 64 * 64 + 64 * 64 + 2 * 32 * 64 + 2 * 64
ROUTER = 4 * 64


def test_a_dense_checkpoint(tmp_path: Path):
    said = describe(open_checkpoint(tiny_mixtral(tmp_path / "m"), allow_factored=True))
    outer = 2 * 260 * 64 + 64
    assert said["family"] == "mixtral"
    assert (said["num_layers"], said["num_experts"]) == (2, 4)
    assert said["routed_params"] == 2 * 4 * EXPERT
    assert said["total_params"] == outer + 2 * (4 * EXPERT + ATTENTION + ROUTER)
    assert said["active_params"] == outer + 2 * (2 * EXPERT + ATTENTION + ROUTER)
    assert said["bytes"] == 4 * said["total_params"]
    assert said["factored_layers"] == [] and said["layers"] == []
    assert json.loads(json.dumps(said)) == said


def test_a_narrow_layer(tmp_path: Path):
    said = describe(open_checkpoint(narrow_checkpoint(tmp_path / "m"), allow_factored=True))
    assert said["factored_layers"] == [1]
    assert said["layers"] == [{"index": 1, "form": "narrow", "width": 8}]
    assert said["routed_params"] == 4 * EXPERT + 4 * 3 * 64 * 8


def test_active_parameters_of_each_form(tmp_path: Path):
    """Two of four experts: two cores beside V and Q; two U of three beside both V groups."""
    said = describe(factored(tmp_path, SPECS))
    outer = 2 * 260 * 64 + 64
    latent = 32 * 64 + 64 * 24 + 2 * (2 * 50 * 32 + 24 * 50)
    shared = 2 * (2 * 96 * 16 + 64 * 8) + 2 * (2 * 16 * 64 + 8 * 96)
    narrow = 2 * 3 * 64 * 40
    assert said["active_params"] == (
        outer + 4 * (ATTENTION + ROUTER) + latent + shared + narrow + 2 * EXPERT
    )

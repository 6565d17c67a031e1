"""What moe-svd and d2-moe write, inside vLLM's own model, against the folded experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.cli import main
from compress_tool.packing import folded_expert
from tests.checkpoints import tiny_mixtral
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.closeness import are_close, distance

SWITCHES = {
    "k-auto": ["--method", "moe-svd", "--k", "auto", "--k-lambda", "0.7"],
    "merge": ["--method", "moe-svd", "--combine", "merge", "--k", "2", "--groups", "2"],
    "fisher": ["--method", "d2-moe", "--base", "fisher", "--base-prune", "0.3"],
}
NUM_EXPERTS = 6


def folded_layer(
    checkpoint: Checkpoint, layer: int, x_TD: torch.Tensor, *, swap: tuple[int, int] | None = None
) -> torch.Tensor:
    """Softmax routing, two best, renormalised; experts multiplied out."""
    router_ED = checkpoint.read(f"model.layers.{layer}.block_sparse_moe.gate.weight")
    gate_TK, index_TK = (x_TD @ router_ED.T).softmax(-1).topk(2)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(NUM_EXPERTS):
        stored = dict([swap, swap[::-1]]).get(expert, expert) if swap else expert
        gate, up, down = folded_expert(checkpoint, layer, stored)
        token, slot = torch.nonzero(index_TK == expert, as_tuple=True)
        h = silu(x_TD[token] @ gate.T) * (x_TD[token] @ up.T)
        y_TD.index_add_(0, token, (h @ down.T) * gate_TK[token, slot, None])
    return y_TD


@pytest.mark.parametrize("name", SWITCHES)
def test_vllm_computes_the_stored_experts(name: str, tmp_path: Path) -> None:
    source = tiny_mixtral(tmp_path / "dense", num_local_experts=NUM_EXPERTS)
    out = tmp_path / "out"
    words = ["run", source, out, "--rank", "20", *SWITCHES[name], "--samples", "12"]
    assert main([str(word) for word in [*words, "--seq-len", "32"]]) == 0
    checkpoint = open_checkpoint(out, allow_factored=True)
    config = harness.engine_config(out)
    model = harness.load_model(config)
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    for layer in range(2):
        actual = harness.run_moe_block(model, config, layer, x_TD)
        expected = folded_layer(checkpoint, layer, x_TD)
        assert are_close(actual, expected), distance(actual, expected)
        # Null test: two experts of different slots exchanged.
        slots = checkpoint.layer_spec(layer).expert_slot
        other = next(e for e in range(NUM_EXPERTS) if slots[e] != slots[0])
        wrong = folded_layer(checkpoint, layer, x_TD, swap=(0, other))
        assert not are_close(actual, wrong)

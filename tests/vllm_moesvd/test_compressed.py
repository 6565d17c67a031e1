"""Attention quantised by compressed-tensors beside factored experts, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.vllm_moesvd import harness
from tests.vllm_moesvd.engine_run import run_engines
from tests.vllm_moesvd.hand_made import EXACT_LAYERS, hand_made
from tests.vllm_moesvd.oracle import max_difference

EXACT_LIMIT = 2e-6
"""As in test_engine.py: only the order of summation differs."""
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*block_sparse_moe.*"],
}


def quantised(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], scheme: dict[str, Any] = SCHEME
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The checkpoint with attention in int8, one scale per row."""
    stored = dict(tensors)
    for name in [name for name in stored if ".self_attn." in name]:
        scale = stored[name].abs().amax(dim=1, keepdim=True) / 127
        stored[name] = (stored[name] / scale).round().to(torch.int8)
        stored[f"{name}_scale"] = scale
    return config | {"quantization_config": scheme}, stored


@pytest.mark.slow
def test_an_engine_gives_the_dense_tokens(tmp_path: Path) -> None:
    """Against vLLM's dense Mixtral with the same quantised attention, and not as without."""
    made = hand_made(EXACT_LAYERS, exact=True)
    folders = [
        write_checkpoint(tmp_path / "dense", *quantised(made.dense_config, made.dense_tensors)),
        write_checkpoint(tmp_path / "factored", *quantised(made.config, made.tensors)),
        made.write(tmp_path / "plain"),
    ]
    dense, factored, plain = run_engines(folders)
    assert max_difference(factored, dense) <= EXACT_LIMIT
    assert [one.logprobs for one in plain] != [one.logprobs for one in factored]


def changed(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    scheme = copy.deepcopy(SCHEME)
    inner = scheme
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return scheme


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (changed(("ignore",), ["lm_head"]), r"quantises .*gate; routed experts"),
        (changed(("ignore",), ["re:.*block_sparse_moe.*"]), "quantises lm_head"),
        (
            changed(("format",), "float-quantized")
            | {"config_groups": changed((*GROUP, "weights", "type"), "float")["config_groups"]},
            "no product on a CPU",
        ),
        (changed(("format",), "pack-quantized"), "must be int-quantized or float-quantized"),
        (changed((*GROUP, "weights", "num_bits"), 4), "symmetric weights of 8 bits"),
        (changed((*GROUP, "weights", "strategy"), "group"), "has strategy 'group'"),
        (changed((*GROUP, "targets"), ["re:.*q_proj"]), "one with targets Linear"),
        (changed((*GROUP, "input_activations", "dynamic"), False), "static input_activations"),
    ],
)
def test_other_schemes_are_refused(scheme: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = hand_made(EXACT_LAYERS, exact=True)
    folder = write_checkpoint(tmp_path / "made", *quantised(made.config, made.tensors, scheme))
    with pytest.raises(ValueError, match=message):
        harness.engine_config(folder)


def test_a_missing_scale_and_a_quantised_expert_are_named(tmp_path: Path) -> None:
    made = hand_made(EXACT_LAYERS, exact=True)
    config, tensors = quantised(made.config, made.tensors)
    scale = "model.layers.3.self_attn.k_proj.weight_scale"
    without = {name: tensor for name, tensor in tensors.items() if name != scale}
    folder = write_checkpoint(tmp_path / "without", config, without)
    with pytest.raises(ValueError, match=rf"tensor {scale}: not found"):
        harness.engine_config(folder)
    expert = "model.layers.2.block_sparse_moe.experts.0.w1.weight"
    tensors[expert] = tensors[expert].to(torch.int8)
    folder = write_checkpoint(tmp_path / "expert", config, tensors)
    with pytest.raises(ValueError, match=rf"tensor {expert}: found torch.int8, expected bfloat16"):
        harness.load_model(harness.engine_config(folder))

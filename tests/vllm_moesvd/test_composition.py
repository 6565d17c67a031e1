"""vLLM's other features with a model that has every form of layer: the same tokens as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm_moesvd.composition_run import CHUNK, LORA_RANK
from tests.vllm_moesvd.engine_run import ENGINE_ENVIRONMENT, ROOT, Completion, run_engines
from tests.vllm_moesvd.hand_made import ALL_FORMS, hand_made
from tests.vllm_moesvd.oracle import max_difference

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")

NOISE_LIMIT = 4.8e-6
"""Of log probabilities in float32: as in test_engine.py, twice vLLM's own distance to transformers.
Measured here: up to 1.9e-6; a pipeline and reloaded weights 0."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an adapter for its attention, both together, and adapters that do not fit."""
    root = tmp_path_factory.mktemp("composition")
    made = hand_made(ALL_FORMS, exact=False)
    made.write(root / "plain")
    attention = [f"model.layers.{i}.self_attn.{p}" for i in range(6) for p in ATTENTION]
    adapter = {
        name: low_rank(made.tensors[f"{name}.weight"].shape, i) for i, name in enumerate(attention)
    }
    write_adapter(root / "adapter", adapter)
    expert = "model.layers.2.block_sparse_moe.experts.0.w1"
    write_adapter(root / "wrong", {**adapter, expert: low_rank(torch.Size((37, 64)), 99)})
    fused = "model.layers.2.mlp.experts"
    write_adapter(root / "fused", {**adapter, fused: low_rank(torch.Size((64, 37)), 98)})
    for name, (a, b) in adapter.items():
        made.tensors[f"{name}.weight"] += b @ a
    made.write(root / "merged")
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run("tests.vllm_moesvd.composition_run", folder)


def test_chunked_prefill(results: dict[str, Any]) -> None:
    assert distance(results, "chunked", "plain") <= NOISE_LIMIT


def test_prefix_caching(results: dict[str, Any]) -> None:
    """The prompts were seen before, so most of each came from the cache."""
    assert distance(results, "cached", "plain") <= NOISE_LIMIT
    assert min(results["num_cached"]) > CHUNK


def test_ngram_speculation(results: dict[str, Any]) -> None:
    assert distance(results, "speculated", "plain") <= NOISE_LIMIT
    assert results["num_accepted"] > 0


def test_an_adapter_for_attention(results: dict[str, Any]) -> None:
    """The same as the checkpoint with the adapter added to its weights, and not as without."""
    assert distance(results, "adapter", "merged") <= NOISE_LIMIT
    with pytest.raises(AssertionError):
        distance(results, "merged", "plain")


@pytest.mark.parametrize(("name", "module"), [("wrong", "w1"), ("fused", "experts")])
def test_an_adapter_for_experts_is_refused(name: str, module: str, results: dict[str, Any]) -> None:
    assert f"{module}_of_a_factored_model" in results[name]
    assert "\n" not in results[name]


def test_reloaded_weights(results: dict[str, Any]) -> None:
    """Another checkpoint of the same sizes, and then the first again, into a running engine."""
    assert distance(results, "reloaded_merged", "merged") <= NOISE_LIMIT
    assert distance(results, "reloaded_plain", "plain") <= NOISE_LIMIT


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Completion]:
    (completions,) = run_engines([folder / "plain"])
    return completions


def test_expert_parallelism(folder: Path, alone: list[Completion]) -> None:
    """Two processes with two experts each, where vLLM's dense Mixtral crashes on a CPU."""
    options = {"enable_expert_parallel": True}
    (split,) = run_engines([folder / "plain"], tp_size=2, options=options)
    assert max_difference(split, alone) <= NOISE_LIMIT


def test_replicated_factors(folder: Path, alone: list[Completion]) -> None:
    options = {"additional_config": {"moesvd": {"replicate": True}}}
    (split,) = run_engines([folder / "plain"], tp_size=2, options=options)
    assert max_difference(split, alone) <= NOISE_LIMIT


def test_pipeline_parallelism(folder: Path, alone: list[Completion]) -> None:
    """Three layers per process. Traced, because an eager engine fails with any model."""
    options = {"compilation_config": {"mode": 2, "backend": "eager"}}
    (split,) = run_engines([folder / "plain"], pp_size=2, eager=False, options=options)
    assert max_difference(split, alone) <= NOISE_LIMIT


def run(module: str, *arguments: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENGINE_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def distance(results: dict[str, Any], actual: str, expected: str) -> float:
    pair = [[Completion(**one) for one in results[name]] for name in (actual, expected)]
    return max_difference(*pair)


def low_rank(shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] whose product is about as large as a weight of that shape."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(LORA_RANK, shape[1], generator=generator) / shape[1] ** 0.5
    return a, torch.randn(shape[0], LORA_RANK, generator=generator) / LORA_RANK**0.5


def write_adapter(path: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """As PEFT writes it, with a scale of one."""
    path.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": tensor
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    modules = sorted({name.rpartition(".")[2] for name in pairs})
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": modules,
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))

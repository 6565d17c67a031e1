"""Blocks split over processes: over three, where nothing divides, and over four and eight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.engine_run import ENGINE_ENVIRONMENT, ROOT
from tests.vllm_moesvd.hand_made import ALL_FORMS, ODD_LAYERS, HandMade, hand_made
from tests.vllm_moesvd.layer_math import layer_output, softmax_routing
from vllm_moesvd.format import FactoredSpec, LatentSpec

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")

TP_SIZE = 3
MODES = ["sharded", "replicated", "joined_sharded", "joined_replicated"]
# Layer 0 is dense in the other tests; dense layers of a width that does not divide are vLLM's own
# affair, so here it is a second latent layer, with a rank that is no multiple of three either.
LAYERS = ODD_LAYERS | {0: LatentSpec(rank_gate_up=64, rank_down=50, width=97)}


@pytest.fixture(scope="module")
def made():
    """F = 97; heads and vocabulary, which vLLM pads to 384, are what it can split itself."""
    return hand_made(
        LAYERS,
        exact=False,
        intermediate_size=97,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=380,
    )


@pytest.fixture(scope="module")
def work(made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_blocks(made, tmp_path_factory.mktemp("tp"), TP_SIZE, MODES)


def run_blocks(made: HandMade, folder: Path, tp_size: int, modes: list[str]) -> Path:
    """The folder in which the processes left what they computed in each mode."""
    made.write(folder / "checkpoint")
    size = made.dense_config["hidden_size"]
    x_TD = torch.randn(40, size, generator=torch.Generator().manual_seed(3))
    save_file({"x_TD": x_TD}, folder / "input.safetensors")
    environment = os.environ | ENGINE_ENVIRONMENT
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join("0" for _ in range(tp_size))
    command = [sys.executable, "-m", "tests.vllm_moesvd.tp_run"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tp_size), str(folder), *modes],
            cwd=ROOT,
            # Different names: the processes exchange by gloo, as in an engine with manual binding.
            env=environment | {"VLLM_DIST_IDENT": f"{folder.name}-{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(tp_size)
    ]
    try:
        logs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)[-6000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", range(TP_SIZE))
def test_every_process_has_the_whole_output(rank: int, mode: str, made, work: Path) -> None:
    """Reduced exactly once, bias added exactly once, in every process."""
    x_TD = load_file(work / "input.safetensors")["x_TD"]
    outputs = load_file(work / f"output-{rank}.safetensors")
    for layer, spec in LAYERS.items():
        routing = softmax_routing(made, layer, x_TD)
        expected = layer_output(made, spec, layer, x_TD, *routing)
        actual = outputs[f"{mode}.{layer}"]
        assert are_close(actual, expected), (layer, distance(actual, expected))


def test_every_factored_tensor_falls_with_the_number_of_processes(made, work: Path) -> None:
    """A third of each tensor, up to the padding of one row or column in three."""
    elements = json.loads((work / "elements-0.json").read_text())
    for layer, spec in LAYERS.items():
        if not isinstance(spec, FactoredSpec):
            continue
        for name in ("v_gate", "v_up", "v_down", "u_gate", "u_up", "u_down"):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            tensor = made.tensors[f"{prefix}.moesvd.{name}"]
            local = elements[f"sharded.{prefix}.routed_experts.{name}"]
            padded = torch.Size(size + 2 for size in tensor.shape[1:]).numel() * tensor.shape[0]
            assert local * TP_SIZE <= padded
            whole = elements[f"replicated.{prefix}.routed_experts.{name}"]
            is_replicated = name in ("v_gate", "v_up", "u_down")
            assert (whole == tensor.numel()) == is_replicated
    # Ranks of latent layers are padded to 96, a multiple of the CPU kernel's 32 and of 3.
    for name in ("routed_input_transform.weight", "routed_output_transform.project.weight"):
        name = f"model.layers.1.block_sparse_moe.experts.{name}"
        assert elements[f"sharded.{name}"] * TP_SIZE == 96 * 64
        assert elements[f"replicated.{name}"] == 96 * 64


@pytest.mark.parametrize(
    ("tp_size", "modes"),
    [(4, ["sharded", "replicated", "experts", "joined_experts"]), (8, ["sharded"])],
    ids=["four", "eight"],
)
def test_more_processes_and_every_form(tp_size: int, modes: list[str], tmp_path: Path) -> None:
    """Widths, ranks and the base are odd; with `experts` each of four processes has one expert."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 97}
    made = hand_made(ALL_FORMS, exact=False, **sizes)
    work = run_blocks(made, tmp_path / "work", tp_size, modes)
    x_TD = load_file(work / "input.safetensors")["x_TD"]
    for rank in (0, tp_size // 2, tp_size - 1):
        outputs = load_file(work / f"output-{rank}.safetensors")
        for layer, spec in ALL_FORMS.items():
            expected = layer_output(made, spec, layer, x_TD, *softmax_routing(made, layer, x_TD))
            for mode in modes:
                actual = outputs[f"{mode}.{layer}"]
                assert are_close(actual, expected), (layer, mode, distance(actual, expected))

"""Every program that real models launch, compiled for four GPUs: no spills, tensor cores, memory.

Shapes decide which programs there are, so the launcher is recorded at the sizes of the models and
each different program is compiled once. Counting instructions proves that the code is what it
should be, not that it is fast.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.moe_layers import FORMS
from tests.vllm_moesvd.kernels.compiler import SHARED_LIMIT, Launch, compile_launch
from tests.vllm_moesvd.kernels.layers import REAL_MODELS, real_sizes
from tests.vllm_moesvd.kernels.recorder import launches_of
from vllm_moesvd.kernels.tiles import tile_table

BATCHES = (1, 64, 4096)
"""Decoding one token, decoding many, prefill: together they reach every bucket of the tables."""
MULTIPLICATIONS = ("linear_kernel", "gate_up_kernel")
TALL_TILE_INSTRUCTION = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}


def programs(arch: str) -> list[Launch]:
    """One launch for each different program of the four models in every form; DeepSeek-V3 with 8
    groups too, a base whose slots have V groups of their own, and two models on 8 processes."""
    layers = [real_sizes(model, form) for model in REAL_MODELS.values() for form in FORMS]
    layers.append(real_sizes(REAL_MODELS["DeepSeek-V3"], num_groups=8))
    layers.append(real_sizes(REAL_MODELS["Qwen3-30B-A3B"], "base-delta", num_groups=128))
    layers.append(real_sizes(REAL_MODELS["Mixtral-8x7B"], tp_size=8))
    layers.append(real_sizes(REAL_MODELS["Qwen3-30B-A3B"], "base-delta", tp_size=8))
    table = tile_table(arch, 2)
    launches = [launch for s in layers for t in BATCHES for launch in launches_of(s, t, table)]
    return list({launch.identity: launch for launch in launches}.values())


def check(launch: Launch, arch: str, folder: Path) -> list[str]:
    """What is wrong with the compiled program; an empty list if nothing is."""
    program = compile_launch(launch, arch, folder)
    problems = []
    if program.spilled_bytes:
        problems.append(f"{program.spilled_bytes} bytes spilled")
    if program.shared_bytes > SHARED_LIMIT[arch]:
        problems.append(f"{program.shared_bytes} bytes of shared memory")
    if launch.kernel.__name__ in MULTIPLICATIONS:
        wanted = TALL_TILE_INSTRUCTION[arch]
        if launch.arguments["BLOCK_M"] < 64 and arch.startswith("sm"):
            # Blackwell and Hopper multiply 64 rows or more; below that all have Ampere's HMMA.
            wanted = "HMMA"
        if not program.matrix_instructions[wanted]:
            problems.append(f"no {wanted}, found {dict(program.matrix_instructions)}")
        if not program.wide_loads:
            problems.append("no loads of 16 bytes")
    name = launch.kernel.__name__
    constants = {key: value for key, value in launch.arguments.items() if key.isupper()}
    return [f"{name} {constants}: {problem}" for problem in problems]


@pytest.mark.slow
@pytest.mark.parametrize("arch", TALL_TILE_INSTRUCTION)
def test_programs_of_real_models_compile_as_they_should(arch: str, tmp_path: Path) -> None:
    assert [p for launch in programs(arch) for p in check(launch, arch, tmp_path)] == []


@pytest.mark.slow
def test_ranks_that_no_tile_divides_cost_nothing(tmp_path: Path) -> None:
    """The layer pads ranks to multiples of 16; a last tile that is mostly mask is as good."""
    sizes = replace(real_sizes(REAL_MODELS["Mixtral-8x7B"]), rank=2128, rank_down=7376)
    launches = {
        launch.identity: launch
        for tokens in (1, 4096)
        for launch in launches_of(sizes, tokens, tile_table("sm_90", 2))
        if launch.kernel.__name__ in MULTIPLICATIONS
    }
    assert [p for launch in launches.values() for p in check(launch, "sm_90", tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", TALL_TILE_INSTRUCTION)
def test_float16_and_the_fallback_table_are_sound(arch: str, tmp_path: Path) -> None:
    """The tallest bucket in float16, and the table that unknown GPUs get, on each GPU."""
    sizes = real_sizes(REAL_MODELS["Qwen3-30B-A3B"])
    tables = [(tile_table(arch, 2), torch.float16), (tile_table("fallback", 2), torch.bfloat16)]
    for table, dtype in tables:
        launches = launches_of(sizes, 4096, table, dtype)
        tall = {
            launch.identity: launch
            for launch in launches
            if launch.kernel.__name__ in MULTIPLICATIONS
        }
        assert [p for launch in tall.values() for p in check(launch, arch, tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_spill_reader_sees_spills(arch: str, tmp_path: Path) -> None:
    """The null test: a tile far too large for the registers of its warps must be found."""
    sizes = real_sizes(REAL_MODELS["Mixtral-8x7B"])
    launch = next(
        launch
        for launch in launches_of(sizes, 4096, tile_table(arch, 2))
        if launch.kernel.__name__ == "linear_kernel"
    )
    greedy = launch.arguments | {"BLOCK_M": 256, "BLOCK_N": 256, "num_warps": 4, "num_stages": 2}
    assert any("spilled" in p for p in check(replace(launch, arguments=greedy), arch, tmp_path))

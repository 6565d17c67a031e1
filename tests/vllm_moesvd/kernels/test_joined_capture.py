"""The joined operator can be captured and compiled, and its kernel is sound on four GPUs.

As in `test_capture.py` and `test_ahead_of_time.py`: fake CUDA tensors, recorded launches, and the
programs of real models compiled for GPUs that are not here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.latent_layers import LATENT_LAYERS, LatentLayer
from tests.vllm_moesvd.kernels.compiler import SHARED_LIMIT, TARGETS, Launch, compile_launch
from tests.vllm_moesvd.kernels.recorder import recording
from tests.vllm_moesvd.test_ops import DataDependence
from vllm_moesvd.joined import joined_linear
from vllm_moesvd.kernels import tiles
from vllm_moesvd.kernels.plan import JOINED_HEIGHTS, MAX_JOINED_TOKENS, plan_joined
from vllm_moesvd.kernels.tiles import tile_table

DEEPSEEK = next(layer for layer in LATENT_LAYERS if layer.name == "DeepSeek-V3")
# As with a config.json whose moe_router_dtype is float32.
LAYERS = (*LATENT_LAYERS, replace(DEEPSEEK, wide_logits=True))


def name(layer: LatentLayer) -> str:
    return layer.name + (", fp32 logits" if layer.wide_logits else "")


def launches_of(
    layer: LatentLayer,
    tokens: int,
    arch: str,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.bfloat16,
    tp_size: int = 1,
) -> list[Launch]:
    """What the operator starts, or nothing; on fake CUDA tensors, under the dispatch lint."""
    monkeypatch.setattr(tiles, "device_arch", lambda index: arch)
    with FakeTensorMode(), recording() as launches, DataDependence() as lint:
        x_TD = torch.empty(tokens, layer.hidden, dtype=dtype, device="cuda")
        columns = layer.columns(tp_size)
        weights = [x_TD.new_empty(count, layer.hidden) for count in columns]
        # The implementation itself: called as an operator it would only be asked for shapes.
        outs = joined_linear._init_fn(x_TD, weights, layer.wide_logits)
    assert lint.found == []
    assert [tuple(out.shape) for out in outs] == [(tokens, count) for count in columns]
    wanted = torch.float32 if layer.wide_logits else dtype
    assert [out.dtype for out in outs] == [wanted] + [dtype] * (len(outs) - 1)
    assert {out.device.type for out in outs} == {"cuda"}
    return launches


@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_few_tokens_are_one_launch_and_many_are_cublas(
    layer: LatentLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens in (1, 3, 16, 33, MAX_JOINED_TOKENS):
        (launch,) = launches_of(layer, tokens, "sm_90", monkeypatch)
        assert launch.kernel.__name__ == "joined_kernel"
        block_n = launch.arguments["BLOCK_N"]
        assert launch.grid == (sum(-(-c // block_n) for c in layer.columns(1)),)
        tensors = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert launches_of(layer, MAX_JOINED_TOKENS + 1, "sm_90", monkeypatch) == []


@pytest.mark.parametrize("layer", LAYERS, ids=name)
@pytest.mark.parametrize("tp_size", [1, 8])
def test_the_heights_of_the_warm_up_are_all_programs(
    layer: LatentLayer, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identities(tokens: int) -> set[str]:
        launches = launches_of(layer, tokens, "sm_90", monkeypatch, tp_size=tp_size)
        return {launch.identity for launch in launches}

    warm = set().union(*(identities(tokens) for tokens in JOINED_HEIGHTS))
    assert len(warm) == len(JOINED_HEIGHTS)
    for tokens in range(1, MAX_JOINED_TOKENS + 1):
        assert identities(tokens) <= warm, tokens


def test_a_gpu_is_filled_where_there_are_columns_to_fill_it() -> None:
    """At least one tile for each of 132 multiprocessors, or tiles as narrow as they may be."""
    for layer in LAYERS:
        for tokens in (1, 64):
            block_m, tile = plan_joined(tokens, layer.columns(1), tile_table("sm_90", 2))
            programs = sum(-(-c // tile.block_n) for c in layer.columns(1))
            assert programs >= 132 or tile.block_n == max(16, block_m // 2)


def test_a_plan_for_too_many_tokens_is_refused() -> None:
    for tokens in (0, MAX_JOINED_TOKENS + 1):
        with pytest.raises(ValueError, match=f"product of {tokens} tokens; expected 1 to 64"):
            plan_joined(tokens, (8, 16), tile_table("sm_90", 2))


@pytest.mark.parametrize("tokens", [1, 65])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_opcheck(tokens: int, wide: bool, dtype: torch.dtype) -> None:
    """Schema, fake implementation and dynamic shapes; and on a CPU it is torch's own products."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, 24, generator=generator).to(dtype)
    weights = [torch.randn(n, 24, generator=generator).to(dtype) for n in (8, 16, 1)]
    torch.library.opcheck(torch.ops.moesvd.joined_linear.default, (x_TD, weights, wide))
    outs = joined_linear(x_TD, weights, wide)
    separate = [torch.nn.functional.linear(x_TD, w) for w in weights]
    assert all(torch.equal(a, b) for a, b in zip(outs, separate, strict=True))
    assert outs[0].dtype == (torch.float32 if wide else dtype)


def test_it_compiles_to_one_graph_for_any_number_of_tokens() -> None:
    weights = [torch.randn(n, 24) for n in (8, 16)]

    def both(x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE, z_TR = joined_linear(x_TD, weights, False)
        return logits_TE.sum(dim=1) + z_TR.sum(dim=1)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 64, 65, 300):
            x_TD = torch.randn(tokens, 24)
            torch.testing.assert_close(compiled(x_TD), both(x_TD))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_programs_of_real_models_compile_as_they_should(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No spills, tensor cores, loads of 16 bytes, shared memory within limits."""
    launches = [
        launch
        for layer in LAYERS
        for tp_size in (1, 8)
        for tokens in JOINED_HEIGHTS
        for launch in launches_of(layer, tokens, arch, monkeypatch, tp_size=tp_size)
    ]
    launches += launches_of(LAYERS[0], 1, arch, monkeypatch, torch.float16)
    launches += launches_of(LAYERS[0], 64, "fallback", monkeypatch)
    problems = []
    for launch in {launch.identity: launch for launch in launches}.values():
        program = compile_launch(launch, arch, tmp_path)
        height = launch.arguments["BLOCK_M"]
        tall = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"} if height == 64 else {}
        wanted = "v_mfma" if arch.startswith("gfx") else tall.get(arch, "HMMA")
        is_sound = (
            program.spilled_bytes == 0
            and program.shared_bytes <= SHARED_LIMIT[arch]
            and program.matrix_instructions[wanted]
            and program.wide_loads
        )
        if not is_sound:
            problems.append((height, launch.arguments["BLOCK_N"], program))
    assert problems == []

"""The launcher can be captured in a CUDA graph, as far as that shows without a GPU.

It runs on fake CUDA tensors: nothing may read a value, change device, or allocate more than its
output, and everything it launches must follow from shapes.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.vllm_moesvd.kernels.layers import REAL_MODELS, Sizes, call_without_data, real_sizes
from tests.vllm_moesvd.kernels.recorder import launches_of, recording
from tests.vllm_moesvd.test_ops import DataDependence
from vllm_moesvd.kernels import forward
from vllm_moesvd.kernels.forward import ShapeAndType, warm_up_batches
from vllm_moesvd.kernels.tiles import Bucket, Tile, TileTable, tile_table

SM_90 = tile_table("sm_90", 2)
UNTUNED = TileTable(
    target_programs=132,
    buckets=tuple(
        Bucket(max_rows=rows, block_m=block_m, linear=tile, gate_up=tile)
        for rows, block_m, tile in (
            (16, 16, Tile(block_n=64, block_k=128, num_warps=4, num_stages=4, group_m=1)),
            (None, 128, Tile(block_n=128, block_k=64, num_warps=8, num_stages=4, group_m=8)),
        )
    ),
)
"""So that tests of what is launched do not change when a table is tuned."""
TRIMMED = Sizes(hidden=64, width=96, rank=24, rank_down=16, num_experts=8, top_k=2,
                expert_slot=(0, 1, 2, 2, 1, 0, 0, 1), slot_group=(0, 1, 0))  # fmt: skip
LAYERS = {
    "Mixtral": real_sizes(REAL_MODELS["Mixtral-8x7B"]),
    "DeepSeek, 8 groups": real_sizes(REAL_MODELS["DeepSeek-V3"], num_groups=8),
    "Qwen3, 8 processes": real_sizes(REAL_MODELS["Qwen3-30B-A3B"], tp_size=8),
    "trimmed": TRIMMED,
    "Mixtral with a base": real_sizes(REAL_MODELS["Mixtral-8x7B"], "base-delta"),
    "Qwen3 with a base, 8 processes": real_sizes(
        REAL_MODELS["Qwen3-30B-A3B"], "base-delta", tp_size=8
    ),
    "DeepSeek with a base and groups": real_sizes(
        REAL_MODELS["DeepSeek-V3"], "base-delta", num_groups=8
    ),
    "Phi, svd": real_sizes(REAL_MODELS["Phi-3.5-MoE"], "svd"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [1, 17, 512])
def test_the_launcher_reads_no_value_and_stays_on_its_device(layer: str, tokens: int) -> None:
    with FakeTensorMode(), recording() as launches, DataDependence() as lint:
        y_TD = call_without_data(LAYERS[layer], tokens, SM_90, torch.bfloat16, "cuda")
    assert lint.found == []
    assert y_TD.shape == (tokens, LAYERS[layer].hidden)
    assert y_TD.device.type == "cuda"
    for launch in launches:
        assert all(type(size) is int and size > 0 for size in launch.grid)
        assert max(launch.grid[1:], default=1) < 2**16
        tensors = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_the_lint_sees_a_copy_to_the_host_and_a_value_read() -> None:
    with FakeTensorMode():
        index = torch.zeros(4, dtype=torch.int32, device="cuda")
        with DataDependence() as lint:
            index.cpu()
            with pytest.raises(DataDependentOutputException):
                index.sum().item()
    assert len(lint.found) == 2


@pytest.mark.parametrize("layer", LAYERS)
def test_only_the_output_is_allocated(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch is the caller's; the collectives' results belong to vLLM."""
    sizes = LAYERS[layer]
    if sizes.tp_size > 1:
        pytest.skip("the stand-ins for the collectives allocate")
    allocated: list[object] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "empty" in str(function) or "zeros" in str(function):
                allocated.append(function)
            return function(*args, **(kwargs or {}))

    original = forward.factored_experts

    def counted(*args, **kwargs):
        with Count():
            return original(*args, **kwargs)

    monkeypatch.setattr("tests.vllm_moesvd.kernels.layers.factored_experts", counted)
    launches_of(sizes, 9, SM_90)
    scratch_views = 5 + 8
    assert len(allocated) == 1 + scratch_views


@pytest.mark.parametrize(
    ("layer", "tokens", "expected"),
    [
        ("Mixtral", 1, "align_tile linear sum gate_up linear sum linear sum"),
        ("Mixtral", 4096, "count scan scatter linear gate_up linear linear sum"),
        # A base costs one launch more: the sum of its neurons. V is no longer split beside it.
        ("Mixtral with a base", 1, "align_tile linear gate_up linear sum sum linear sum"),
        ("Mixtral with a base", 4096, "count scan scatter linear gate_up linear sum linear sum"),
        # With groups its first product is a launch too, and with many tokens and few of them
        # per slot its second.
        (
            "DeepSeek with a base and groups",
            512,
            "count scan scatter linear linear gate_up linear sum linear linear sum",
        ),
    ],
)
def test_launches_of_a_layer(layer: str, tokens: int, expected: str) -> None:
    launches = launches_of(LAYERS[layer], tokens, UNTUNED)
    names = [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]
    assert names == expected.split()


def scratch_bytes(sizes: Sizes, tokens: int) -> int:
    wanted: list[ShapeAndType] = []
    with recording(), pytest.MonkeyPatch.context() as patch:
        inner = forward.factored_experts

        def spied(*args, **kwargs):
            *rest, get_scratch = args

            def note(*shapes: ShapeAndType) -> list[torch.Tensor]:
                wanted.extend(shapes)
                return list(get_scratch(*shapes))

            return inner(*rest, note, **kwargs)

        patch.setattr("tests.vllm_moesvd.kernels.layers.factored_experts", spied)
        call_without_data(sizes, tokens, SM_90, torch.bfloat16, "meta")
    return sum(-(-prod(shape) * dtype.itemsize // 256) * 256 for shape, dtype in wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_smaller_batch_needs_more_scratch_than_the_largest(layer: str) -> None:
    """vLLM locks the workspace after its profiling run, which has the largest batch."""
    largest = scratch_bytes(LAYERS[layer], 2048)
    for tokens in (*range(1, 130), 255, 256, 257, 511, 512, 1000, 1024, 2047):
        assert scratch_bytes(LAYERS[layer], tokens) <= largest


@pytest.mark.parametrize("layer", LAYERS)
def test_the_warm_up_compiles_every_program(layer: str) -> None:
    """Numbers of tokens are no compile-time constants, but they choose tiles and splits."""
    sizes = LAYERS[layer]
    warm = {
        launch.identity
        for tokens in warm_up_batches(2048)
        for launch in launches_of(sizes, tokens, SM_90)
    }
    assert len(warm) < 40
    for tokens in (*range(1, 300), *range(300, 2048, 61)):
        for launch in launches_of(sizes, tokens, SM_90):
            assert launch.identity in warm, (tokens, launch.identity)

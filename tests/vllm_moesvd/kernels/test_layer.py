"""vLLM's layer hands the kernels what they expect: recorded launches on tensors without data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_moesvd.kernels.recorder import recording
from vllm_moesvd.format import FactoredSpec
from vllm_moesvd.kernels import tiles
from vllm_moesvd.kernels.forward import ShapeAndType

pytestmark = pytest.mark.slow  # Importing vLLM takes longer than everything else here.

HIDDEN, WIDTH, MAX_TOKENS = 64, 96, 40


def scratch(*wanted: ShapeAndType) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in wanted]


def built_layer(
    monkeypatch: pytest.MonkeyPatch, spec: FactoredSpec, tp_size: int, dp_size: int = 1
) -> Any:
    """The method and its layer on the meta device, where a GPU is said to be."""
    from vllm_moesvd import layer as module
    from vllm_moesvd.base_delta import BaseDeltaMoEMethod

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS))
    manager = SimpleNamespace(get_simultaneous=scratch)
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(module, "current_workspace_manager", lambda: manager)
    monkeypatch.setattr(module.kernels, "can_run", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(tiles, "device_arch", lambda index: "sm_90")
    monkeypatch.setattr(
        module,
        "tensor_model_parallel_all_gather",
        lambda z, dim: z.new_empty(tp_size * len(z), *z.shape[1:]),
    )
    monkeypatch.setattr(
        module,
        "tensor_model_parallel_reduce_scatter",
        lambda w, dim: w.new_empty(len(w) // tp_size, *w.shape[1:]),
    )
    moe: Any = SimpleNamespace(tp_size=tp_size, dp_size=dp_size, tp_rank=0, experts_per_token=2)
    is_base = spec.base_width > 0
    method = (BaseDeltaMoEMethod if is_base else module.FactoredMoEMethod)(moe, spec, False)
    layer = torch.nn.Module()
    layer.local_rows = None
    with torch.device("meta"):
        method.create_weights(layer, 4, HIDDEN, WIDTH // tp_size, torch.bfloat16)
    return method, layer


@pytest.mark.parametrize("tp_size", [1, 2])
def test_apply_launches_the_kernels(monkeypatch: pytest.MonkeyPatch, tp_size: int) -> None:
    spec = FactoredSpec(
        rank_gate_up=24, rank_down=18, expert_slot=(0, 1, 1, 2), slot_group=(1, 0, 1)
    )
    method, layer = built_layer(monkeypatch, spec, tp_size)
    x_TD = torch.empty(5, HIDDEN, dtype=torch.bfloat16, device="meta")
    weights_TK = torch.empty(5, 2, device="meta")
    ids_TK = torch.empty(5, 2, dtype=torch.int32, device="meta")
    with recording() as launches:
        y_TD = method.apply(layer, x_TD, weights_TK, ids_TK, None, None)
    assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, x_TD.dtype)
    names = [launch.kernel.__name__ for launch in launches]
    assert (names[0], names[-1]) == ("align_tile_kernel", "sum_kernel")
    assert names.count("gate_up_kernel") == 1
    align, gate_up = launches[0], launches[names.index("gate_up_kernel")]
    assert align.arguments["MERGE"]
    assert align.arguments["rank_ptr"] is layer.rank_E
    assert gate_up.arguments["rank"] == 24
    assert gate_up.arguments["u_up_ptr"] is layer.u_up


@pytest.mark.parametrize("tp_size", [1, 2])
def test_apply_launches_the_kernels_with_the_base(
    monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    from vllm_moesvd import base_delta

    monkeypatch.setattr(base_delta, "rank_multiple", lambda: 16)
    spec = FactoredSpec(
        rank_gate_up=24, rank_down=18, expert_slot=(0, 1, 1, 2), slot_group=(0, 0, 0),
        base_width=37, form="base-delta",
    )  # fmt: skip
    method, layer = built_layer(monkeypatch, spec, tp_size)
    width = 48 if tp_size == 1 else WIDTH // 2
    assert layer.base_down.shape == (HIDDEN, width)
    x_TD = torch.empty(5, HIDDEN, dtype=torch.bfloat16, device="meta")
    weights_TK = torch.empty(5, 2, device="meta")
    with recording() as launches:
        method.apply(layer, x_TD, weights_TK, weights_TK.int(), None, None)
    v, *_, u_down = (x.arguments for x in launches if x.kernel.__name__ == "linear_kernel")
    assert v["more_w_ptr"] is layer.base_gate
    assert v["more_second_ptr"] is layer.base_up
    assert v["more_cols"] == width
    assert u_down["more_w_ptr"] is layer.base_down
    with recording() as warm_up:
        method.process_weights_after_loading(layer)
    assert {launch.identity for launch in launches} <= {launch.identity for launch in warm_up}


@pytest.mark.parametrize("dp_size", [1, 3])
def test_loading_ends_with_the_warm_up(monkeypatch: pytest.MonkeyPatch, dp_size: int) -> None:
    """With data parallelism the experts meet the tokens of every replica."""
    spec = FactoredSpec(
        rank_gate_up=24, rank_down=18, expert_slot=(0, 1, 2, 3), slot_group=(0, 0, 0, 0)
    )
    method, layer = built_layer(monkeypatch, spec, 1, dp_size)
    with recording() as launches:
        method.process_weights_after_loading(layer)
    tokens = [
        launch.arguments["num_rows"]
        for launch in launches
        if launch.kernel.__name__ == "linear_kernel" and launch.arguments["HALVES"] == 2
    ]
    assert tokens[0] == MAX_TOKENS * dp_size
    assert tokens[-1] == 1
    assert tokens == sorted(tokens, reverse=True)


def test_ranks_are_padded_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 19 numbers would be loaded one number at a time."""
    from vllm_moesvd import layer as module

    monkeypatch.setattr(module, "rank_multiple", lambda: 16)
    spec = FactoredSpec(
        rank_gate_up=19, rank_down=33, expert_slot=(0, 1, 2, 3), slot_group=(0, 0, 0, 0)
    )
    _, layer = built_layer(monkeypatch, spec, 2)
    assert layer.v_gate.shape == (1, 16, HIDDEN)
    assert layer.u_gate.shape == (4, WIDTH // 2, 32)
    assert layer.v_down.shape == (1, 64, WIDTH // 2)
    assert layer.u_down.shape == (4, HIDDEN, 32)

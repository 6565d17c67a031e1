"""The operators against the reference, in both implementations, and what vLLM needs of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vllm_moesvd.closeness import are_close
from vllm_moesvd import ops, reference

D, F, R, Q, E, K = 24, 40, 11, 7, 5, 3

LAYOUTS = {
    "one V, own U": ((0, 1, 2, 3, 4), (0, 0, 0, 0, 0)),
    "one V, trimmed U": ((0, 1, 1, 2, 2), (0, 0, 0)),
    "two groups": ((4, 3, 2, 1, 0), (0, 1, 0, 1, 1)),
    "two groups, trimmed": ((0, 2, 1, 2, 0), (1, 0, 1)),
    "a V for each": ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    "a single function": ((0, 0, 0, 0, 0), (0,)),
}
Steps = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
CPU: Steps = (ops.project_in, ops.experts, ops.project_out)
CAPTURABLE: Steps = tuple(op._init_fn for op in CPU)  # type: ignore[attr-defined,assignment]


def factors(
    expert_slot: tuple[int, ...], slot_group: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    s, g = len(slot_group), max(slot_group) + 1

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5 * 1.5).to(dtype)

    return {
        "v_gate_GRD": normal(g, R, D),
        "v_up_GRD": normal(g, R, D),
        "v_down_GQF": normal(g, Q, F),
        "u_gate_SFR": normal(s, F, R),
        "u_up_SFR": normal(s, F, R),
        "u_down_SDQ": normal(s, D, Q),
    }


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    gate_TK, index_TK = torch.rand(tokens, E, generator=generator).topk(K)
    return torch.randn(tokens, D, generator=generator), index_TK, gate_TK


def run(
    steps: Steps,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    f: dict[str, torch.Tensor],
    expert_slot: tuple[int, ...],
    slot_group: tuple[int, ...],
) -> torch.Tensor:
    project_in, experts, project_out = steps
    slot_TK, gate_TK = ops.merge_slots(torch.tensor(expert_slot)[index_TK], gate_TK)
    z = project_in(x_TD, slot_TK, f["v_gate_GRD"], f["v_up_GRD"], slot_group)
    w = experts(z, slot_TK, f["u_gate_SFR"], f["u_up_SFR"], f["v_down_GQF"], slot_group)
    y: torch.Tensor = project_out(w, slot_TK, gate_TK, f["u_down_SDQ"])
    return y


@pytest.mark.parametrize("steps", [CPU, CAPTURABLE], ids=["cpu", "capturable"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_both_implementations_equal_the_reference(steps: Steps, layout: str, tokens: int) -> None:
    expert_slot, slot_group = LAYOUTS[layout]
    f, (x_TD, index_TK, gate_TK) = factors(expert_slot, slot_group), routing(tokens)
    expected = reference.factored_experts(
        x_TD, index_TK, gate_TK, **f, expert_slot=expert_slot, slot_group=slot_group
    )
    actual = run(steps, x_TD, index_TK, gate_TK, f, expert_slot, slot_group)
    assert are_close(actual, expected)


@pytest.mark.parametrize("layout", ["one V, trimmed U", "a V for each"])
def test_bfloat16_stays_within_its_noise(layout: str) -> None:
    expert_slot, slot_group = LAYOUTS[layout]
    f = factors(expert_slot, slot_group, torch.bfloat16)
    x_TD, index_TK, gate_TK = routing(33)
    x_TD = x_TD.bfloat16()
    expected = reference.factored_experts(
        x_TD, index_TK, gate_TK, **f, expert_slot=expert_slot, slot_group=slot_group
    )
    actual = run(CPU, x_TD, index_TK, gate_TK, f, expert_slot, slot_group)
    assert actual.dtype == torch.bfloat16
    assert are_close(actual, expected, torch.bfloat16)


def test_merging_slots_follows_the_example_of_the_docstring() -> None:
    slot_TK, gate_TK = torch.tensor([[4, 2, 4]]), torch.tensor([[0.5, 0.3, 0.2]])
    merged_slot, merged_gate = ops.merge_slots(slot_TK, gate_TK)
    assert merged_slot.tolist() == [[4, 2, -1]]
    torch.testing.assert_close(merged_gate, torch.tensor([[0.7, 0.3, 0.0]]))


def test_merging_keeps_tokens_without_repetition_bit_for_bit() -> None:
    slot_TK, gate_TK = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.rand(2, 3)
    merged_slot, merged_gate = ops.merge_slots(slot_TK, gate_TK)
    assert torch.equal(merged_slot, slot_TK)
    assert torch.equal(merged_gate, gate_TK)


def test_pairs_with_slot_minus_one_add_nothing() -> None:
    expert_slot, slot_group = LAYOUTS["two groups"]
    f, (x_TD, index_TK, gate_TK) = factors(expert_slot, slot_group), routing(9)
    slot_TK = torch.tensor(expert_slot)[index_TK]
    slot_TK[:, 1] = -1
    for project_in, experts, project_out in (CPU, CAPTURABLE):
        z = project_in(x_TD, slot_TK, f["v_gate_GRD"], f["v_up_GRD"], slot_group)
        w = experts(z, slot_TK, f["u_gate_SFR"], f["u_up_SFR"], f["v_down_GQF"], slot_group)
        assert not w.view(9, K, Q)[:, 1].any()
        actual = project_out(w, slot_TK, gate_TK, f["u_down_SDQ"])
        kept = [0, 2]
        expected = reference.factored_experts(
            x_TD,
            index_TK[:, kept],
            gate_TK[:, kept],
            **f,
            expert_slot=expert_slot,
            slot_group=slot_group,
        )
        assert are_close(actual, expected)


def op_arguments(
    layout: str, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Any, ...]]:
    """Positional arguments of each operator, as the layer calls them."""
    expert_slot, slot_group = LAYOUTS[layout]
    f = {name: t.to(device) for name, t in factors(expert_slot, slot_group, dtype).items()}
    x_TD, index_TK, gate_TK = (t.to(device) for t in routing(tokens))
    slot_TK = torch.empty_like(index_TK)
    if device == "cpu":
        slot_TK, gate_TK = ops.merge_slots(torch.tensor(expert_slot)[index_TK], gate_TK)
    columns = 1 if max(slot_group) == 0 else K
    z = torch.ones(tokens, columns, 2, R, device=device, dtype=dtype)
    w = torch.ones(tokens * K, Q, device=device, dtype=dtype)
    return {
        "project_in": (x_TD.to(dtype), slot_TK, f["v_gate_GRD"], f["v_up_GRD"], slot_group),
        "experts": (
            z,
            slot_TK,
            f["u_gate_SFR"],
            f["u_up_SFR"],
            f["v_down_GQF"],
            slot_group,
        ),
        "project_out": (w, slot_TK, gate_TK, f["u_down_SDQ"]),
    }


@pytest.mark.parametrize("layout", ["one V, trimmed U", "two groups", "a V for each"])
@pytest.mark.parametrize("name", ["project_in", "experts", "project_out"])
def test_operators_pass_opcheck(name: str, layout: str) -> None:
    """Schema, fake implementation (shapes, strides, dtype) and dynamic shapes are consistent."""
    operator = getattr(torch.ops.moesvd, name).default
    torch.library.opcheck(operator, op_arguments(layout, 6)[name])


@pytest.mark.parametrize("layout", ["one V, trimmed U", "a V for each"])
def test_the_layer_compiles_to_one_graph_for_any_number_of_tokens(layout: str) -> None:
    expert_slot, slot_group = LAYOUTS[layout]
    f = factors(expert_slot, slot_group)

    def layer(x: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return run(CPU, x, index, gate, f, expert_slot, slot_group)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 7, 11):
            given = routing(tokens)
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 0)
            assert torch.equal(compiled(*given), layer(*given))


class DataDependence(TorchDispatchMode):
    """Collects what a CUDA graph cannot capture: values read by the host, other devices."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "bincount", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(word in str(function) for word in self.FORBIDDEN):
            self.found.append(str(function))
        result = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.found.append(f"{function} on {sorted(devices)}")
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [0, 1, 2], ids=["project_in", "experts", "project_out"])
def test_the_capturable_implementation_depends_on_shapes_alone(step: int, layout: str) -> None:
    name = ("project_in", "experts", "project_out")[step]
    with FakeTensorMode(), torch.device("meta"):
        arguments = op_arguments(layout, 6, device="meta", dtype=torch.bfloat16)[name]
        with DataDependence() as lint:
            CAPTURABLE[step](*arguments)
    assert lint.found == []


def test_the_capture_lint_finds_what_the_cpu_implementation_does() -> None:
    """The null test of the lint: the fast CPU code reads values on the host."""
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        ops._experts_cpu(*op_arguments("two groups", 6, device="meta")["experts"])


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("rows", [1, ops.UPCAST_ROWS, 40])
def test_products_on_cpus_with_and_without_bfloat16(
    capability: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    generator = torch.Generator().manual_seed(1)
    x_NK, weight_MK = (torch.randn(n, 33, generator=generator).bfloat16() for n in (rows, 20))
    found = ops.linear(x_NK, weight_MK)
    assert found.dtype == torch.bfloat16
    assert are_close(found.float(), x_NK.float() @ weight_MK.float().T, torch.bfloat16)
    assert are_close(
        ops.linear(x_NK.float(), weight_MK.float()), x_NK.float() @ weight_MK.float().T
    )

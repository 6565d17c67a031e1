"""General layers over packed weights equal the reference, whatever their slots and groups."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from tests.vllm_moesvd.closeness import are_close, distance
from tests.vllm_moesvd.hand_made import MIXTRAL
from vllm_moesvd import cpu_packed, cpu_pairs, ops, reference
from vllm_moesvd.cpu_packed import BASE, FACTORS, PackedLayer, pack_layer
from vllm_moesvd.format import FactoredSpec, MoEShape, layer_tensors

SHAPE = MoEShape(hidden_size=64, expert_width=96, num_experts=6, top_k=3)
ODD = {"rank_gate_up": 19, "rank_down": 27}
SPECS = {
    "one group": FactoredSpec(**ODD, expert_slot=(5, 0, 4, 1, 3, 2), slot_group=(0,) * 6),
    "two groups, merged": FactoredSpec(**ODD, expert_slot=(0, 2, 1, 2, 1, 1), slot_group=(0, 1, 0)),
    "svd": FactoredSpec(
        **ODD, expert_slot=(5, 0, 4, 1, 3, 2), slot_group=tuple(range(6)), form="svd"
    ),
    "base": FactoredSpec(
        **ODD,
        expert_slot=(0, 1, 2, 2, 1, 1),
        slot_group=(0, 1, 1),
        base_width=37,
        form="base-delta",
    ),
}
TOKENS = {1: "one token", 2: "few", 40: "more tokens than experts"}


def factors(spec: FactoredSpec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name.rpartition(".")[2]: (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(
            dtype
        )
        for name, size in layer_tensors(spec, SHAPE, MIXTRAL, 0).items()
    }


def pack(
    spec: FactoredSpec, weights: dict[str, torch.Tensor]
) -> tuple[torch.nn.Module, PackedLayer]:
    layer = torch.nn.Module()
    for name, weight in weights.items():
        setattr(layer, name, torch.nn.Parameter(weight.clone(), requires_grad=False))
    packed = pack_layer(layer, spec.slot_group)
    if packed is None:
        pytest.skip("this CPU has no such product")
    return layer, packed


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    top = torch.randn(tokens, SHAPE.num_experts, generator=generator).topk(SHAPE.top_k, dim=-1)
    x_TD = torch.randn(tokens, SHAPE.hidden_size, generator=generator)
    return x_TD, top.indices, torch.softmax(top.values, dim=-1)


def slots(
    spec: FactoredSpec, index_TK: torch.Tensor, gate_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.merge_slots(torch.tensor(spec.expert_slot)[index_TK], gate_TK)


def expected(
    spec: FactoredSpec, f: dict[str, torch.Tensor], routed: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    return reference.factored_experts(
        *routed,
        v_gate_GRD=f["v_gate"],
        v_up_GRD=f["v_up"],
        v_down_GQF=f["v_down"],
        u_gate_SFR=f["u_gate"],
        u_up_SFR=f["u_up"],
        u_down_SDQ=f["u_down"],
        expert_slot=spec.expert_slot,
        slot_group=spec.slot_group,
        base_gate_BD=f.get("base_gate"),
        base_up_BD=f.get("base_up"),
        base_down_DB=f.get("base_down"),
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SPECS)
def test_it_equals_the_reference(name: str, tokens: int) -> None:
    spec, routed = SPECS[name], routing(tokens)
    f = factors(spec)
    _, packed = pack(spec, f)
    found = packed(routed[0], *slots(spec, *routed[1:]))
    target = expected(spec, f, routed)
    assert are_close(found, target), distance(found, target)
    # The null test: the slots of two experts exchanged.
    other = torch.where(routed[1] == 0, 1, torch.where(routed[1] == 1, 0, routed[1]))
    if (routed[1] != other).any():
        wrong = packed(routed[0], *slots(spec, other, routed[2]))
        assert not are_close(wrong, target)


@pytest.mark.parametrize("name", SPECS)
def test_portions_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is computed a few slots at a time; here every slot alone."""
    spec, routed = SPECS[name], routing(40)
    f = factors(spec)
    _, packed = pack(spec, f)
    monkeypatch.setattr(cpu_pairs, "PORTION_NUMBERS", 1)
    found = packed(routed[0], *slots(spec, *routed[1:]))
    assert are_close(found, expected(spec, f, routed))


def test_slots_are_packed_in_the_order_of_their_groups() -> None:
    spec = SPECS["two groups, merged"]
    assert spec.slot_group == (0, 1, 0)
    _, packed = pack(spec, factors(spec))
    assert packed.slot_group == (0, 0, 1)
    assert packed.place_S is not None
    assert packed.place_S.tolist() == [0, 2, 1, -1]
    assert pack(SPECS["svd"], factors(SPECS["svd"]))[1].place_S is None


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16(name: str) -> None:
    spec, (x_TD, index_TK, gate_TK) = SPECS[name], routing(40)
    f = factors(spec, torch.bfloat16)
    _, packed = pack(spec, f)
    routed = x_TD.bfloat16(), index_TK, gate_TK
    found = packed(routed[0], *slots(spec, *routed[1:]))
    assert found.dtype == torch.bfloat16
    assert are_close(found.float(), expected(spec, f, routed), torch.bfloat16)


def test_pairs_of_other_processes_are_left_out() -> None:
    spec, (x_TD, index_TK, gate_TK) = SPECS["svd"], routing(40)
    f = factors(spec)
    _, packed = pack(spec, f)
    slot_TK = torch.tensor(spec.expert_slot)[index_TK]
    here_TK = slot_TK < 3
    found = packed(x_TD, torch.where(here_TK, slot_TK, -1), gate_TK)
    target = expected(spec, f, (x_TD, index_TK, gate_TK * here_TK))
    assert are_close(found, target)
    assert not packed(x_TD, torch.full_like(slot_TK, -1), gate_TK).any()


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    spec, (x_TD, index_TK, gate_TK) = SPECS["base"], routing(5)
    _, packed = pack(spec, factors(spec))
    given = (
        x_TD,
        *slots(spec, index_TK, gate_TK),
        list(packed.packed.handlers),
        packed.packed.rows,
    )
    torch.library.opcheck(torch.ops.moesvd.packed_layer.default, (*given, list(spec.slot_group)))


def test_plain_weights_are_freed_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed where they were packed; all there where one of them cannot be."""
    from vllm import _custom_ops

    spec = SPECS["base"]
    layer, _ = pack(spec, factors(spec))
    assert all(getattr(layer, name).numel() == 0 for name in FACTORS + BASE)
    calls = []

    def create(weight: torch.Tensor, cache: int) -> object:
        calls.append(weight)
        if len(calls) == 5:
            raise RuntimeError("could not create a primitive descriptor")
        return real(weight, cache)

    real = _custom_ops.create_onednn_mm
    monkeypatch.setattr(_custom_ops, "create_onednn_mm", create)
    whole = torch.nn.Module()
    for name, weight in factors(spec).items():
        setattr(whole, name, torch.nn.Parameter(weight, requires_grad=False))
    assert cpu_packed.pack_layer(whole, spec.slot_group) is None
    assert all(getattr(whole, name).numel() for name in FACTORS + BASE)

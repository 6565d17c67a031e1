"""Factors of a layer ↔ tensors of the checkpoint, in both directions.

`pack_layer` names and rounds what a solver returned; `folded_expert` multiplies the factors of a
checkpoint back to one expert's dense weights, for evaluation, verification and export.
"""

from __future__ import annotations

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.factors import LatentFactors, LayerFactors, NarrowFactors
from vllm_moesvd.format import (
    FactoredSpec,
    Family,
    LatentSpec,
    MoEShape,
    NarrowSpec,
    layer_tensors,
)


def pack_layer(
    factors: LayerFactors, family: Family, shape: MoEShape, layer: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Name the factors as the format asks and round them to `dtype`, contiguous, on the CPU.

    The result has exactly the names and shapes of `format.layer_tensors`.
    """
    prefix = family.experts_prefix.format(layer=layer)
    if isinstance(factors, LatentFactors):
        parts = {"moesvd.v_gate_up": factors.v_gate_up_RD, "moesvd.q_down": factors.q_DR}
        if factors.bias_D is not None:
            parts["moesvd.bias_down"] = factors.bias_D
        cores = (factors.gate_EFR, factors.up_EFR, factors.down_ERF)
        parts |= _core_tensors(family, *cores)
    elif isinstance(factors, NarrowFactors):
        parts = _core_tensors(family, factors.gate_EFD, factors.up_EFD, factors.down_EDF)
    else:
        parts = {
            "moesvd.v_gate": factors.v_gate_GRD,
            "moesvd.v_up": factors.v_up_GRD,
            "moesvd.v_down": factors.v_down_GRF,
            "moesvd.u_gate": factors.u_gate_SFR,
            "moesvd.u_up": factors.u_up_SFR,
            "moesvd.u_down": factors.u_down_SDR,
        }
        if factors.base_gate_BD is not None:
            assert factors.base_up_BD is not None and factors.base_down_DB is not None
            parts["moesvd.base_gate"] = factors.base_gate_BD
            parts["moesvd.base_up"] = factors.base_up_BD
            parts["moesvd.base_down"] = factors.base_down_DB
    packed = {
        f"{prefix}.{name}": tensor.to(device="cpu", dtype=dtype).contiguous().clone()
        for name, tensor in parts.items()
    }
    promised = layer_tensors(factors.spec, shape, family, layer)
    assert {n: tuple(t.shape) for n, t in packed.items()} == promised
    return packed


def folded_expert(
    checkpoint: Checkpoint, layer: int, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dense fp32 weights (gate_FD, up_FD, down_DF) that one expert of any layer stands for.

    A layer with fewer neurons gives its own width, not the width of the config.
    """
    spec = None if checkpoint.spec is None else checkpoint.spec.layers.get(layer)
    if spec is None:
        gate, up, down = (
            checkpoint.expert_weight(layer, expert, projection).float()
            for projection in ("gate", "up", "down")
        )
        return gate, up, down
    family = checkpoint.family
    prefix = family.experts_prefix.format(layer=layer)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(f"{prefix}.{name}").float()

    if isinstance(spec, FactoredSpec):
        slot = spec.expert_slot[expert]
        group = spec.slot_group[slot]

        def product(projection: str) -> torch.Tensor:
            u = checkpoint.read_rows(f"{prefix}.moesvd.u_{projection}", slot).float()
            return u @ checkpoint.read_rows(f"{prefix}.moesvd.v_{projection}", group).float()

        weights = product("gate"), product("up"), product("down")
        if spec.base_width:
            base = read("moesvd.base_gate"), read("moesvd.base_up"), read("moesvd.base_down")
            add_base(weights, base)
        return weights
    gate = read(f"{expert}.{family.gate_name}.weight")
    up = read(f"{expert}.{family.up_name}.weight")
    down = read(f"{expert}.{family.down_name}.weight")
    if isinstance(spec, NarrowSpec):
        return gate, up, down
    v_RD = read("moesvd.v_gate_up")
    return gate @ v_RD, up @ v_RD, read("moesvd.q_down") @ down


def folded_factors(
    factors: LayerFactors, expert: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `folded_expert` will give for these factors once they are stored in `dtype`."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype).float()

    if isinstance(factors, NarrowFactors):
        gate, up, down = factors.gate_EFD, factors.up_EFD, factors.down_EDF
        return stored(gate[expert]), stored(up[expert]), stored(down[expert])
    if isinstance(factors, LatentFactors):
        v_RD, q_DR = stored(factors.v_gate_up_RD), stored(factors.q_DR)
        gate_FD = stored(factors.gate_EFR[expert]) @ v_RD
        up_FD = stored(factors.up_EFR[expert]) @ v_RD
        return gate_FD, up_FD, q_DR @ stored(factors.down_ERF[expert])
    slot = factors.expert_slot[expert]
    group = factors.slot_group[slot]
    weights = (
        stored(factors.u_gate_SFR[slot]) @ stored(factors.v_gate_GRD[group]),
        stored(factors.u_up_SFR[slot]) @ stored(factors.v_up_GRD[group]),
        stored(factors.u_down_SDR[slot]) @ stored(factors.v_down_GRF[group]),
    )
    if factors.base_gate_BD is not None:
        assert factors.base_up_BD is not None and factors.base_down_DB is not None
        base = factors.base_gate_BD, factors.base_up_BD, factors.base_down_DB
        add_base(weights, (stored(base[0]), stored(base[1]), stored(base[2])))
    return weights


def add_base(
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Add gate, up [B, D] and down [D, B] of the base to an expert's first B neurons, in place."""
    gate_FD, up_FD, down_DF = weights
    width = base[0].shape[0]
    gate_FD[:width] += base[0]
    up_FD[:width] += base[1]
    down_DF[:, :width] += base[2]


def layer_bias(checkpoint: Checkpoint, layer: int) -> torch.Tensor | None:
    """The fp32 vector [D] added once per token to the routed output, or None."""
    spec = None if checkpoint.spec is None else checkpoint.spec.layers.get(layer)
    if not (isinstance(spec, LatentSpec) and spec.bias):
        return None
    prefix = checkpoint.family.experts_prefix.format(layer=layer)
    return checkpoint.read(f"{prefix}.moesvd.bias_down").float()


def _core_tensors(
    family: Family, gate_EFD: torch.Tensor, up_EFD: torch.Tensor, down_EDF: torch.Tensor
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for expert in range(gate_EFD.shape[0]):
        tensors[f"{expert}.{family.gate_name}.weight"] = gate_EFD[expert]
        tensors[f"{expert}.{family.up_name}.weight"] = up_EFD[expert]
        tensors[f"{expert}.{family.down_name}.weight"] = down_EDF[expert]
    return tensors

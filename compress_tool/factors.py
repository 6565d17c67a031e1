"""What a solver returns for one layer: one frozen dataclass per form, in fp32.

Shapes as in `vllm_moesvd.format`: E experts, D hidden, F expert width, R ranks, G V groups,
S slots. `spec` is the format's description of the same layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_moesvd.format import FactoredSpec, LatentSpec, NarrowSpec, Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFactors:
    """y = Q Σ_e g_e core_e(V x) + b.

    `down_ERF` maps the neurons of an expert to the R numbers that Q (`q_DR`) maps to D.
    """

    v_gate_up_RD: torch.Tensor
    gate_EFR: torch.Tensor
    up_EFR: torch.Tensor
    down_ERF: torch.Tensor
    q_DR: torch.Tensor
    bias_D: torch.Tensor | None = None

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(
            rank_gate_up=self.v_gate_up_RD.shape[0],
            rank_down=self.q_DR.shape[1],
            width=self.gate_EFR.shape[1],
            bias=self.bias_D is not None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFactors:
    """W_e = U[slot(e)] V[group(slot(e))] for gate, up and down.

    Form `base-delta` adds a base to the first B neurons of every expert; the others have none.
    """

    v_gate_GRD: torch.Tensor
    v_up_GRD: torch.Tensor
    v_down_GRF: torch.Tensor
    u_gate_SFR: torch.Tensor
    u_up_SFR: torch.Tensor
    u_down_SDR: torch.Tensor
    expert_slot: tuple[int, ...]
    slot_group: tuple[int, ...]
    form: Literal["shared-v", "svd", "base-delta"]
    base_gate_BD: torch.Tensor | None = None
    base_up_BD: torch.Tensor | None = None
    base_down_DB: torch.Tensor | None = None

    @property
    def spec(self) -> FactoredSpec:
        return FactoredSpec(
            rank_gate_up=self.v_gate_GRD.shape[1],
            rank_down=self.v_down_GRF.shape[1],
            expert_slot=self.expert_slot,
            slot_group=self.slot_group,
            base_width=0 if self.base_gate_BD is None else self.base_gate_BD.shape[0],
            form=self.form,
        )


def shared_factors(
    u: Mapping[Projection, torch.Tensor],
    v: Mapping[Projection, torch.Tensor],
    expert_slot: tuple[int, ...],
    slot_group: tuple[int, ...],
) -> SharedFactors:
    """A layer of form `shared-v` from U [S, m, R] and V [G, R, n] of each projection."""
    return SharedFactors(
        v_gate_GRD=v["gate"],
        v_up_GRD=v["up"],
        v_down_GRF=v["down"],
        u_gate_SFR=u["gate"],
        u_up_SFR=u["up"],
        u_down_SDR=u["down"],
        expert_slot=expert_slot,
        slot_group=slot_group,
        form="shared-v",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NarrowFactors:
    """Dense experts with fewer neurons."""

    gate_EFD: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor

    @property
    def spec(self) -> NarrowSpec:
        return NarrowSpec(width=self.gate_EFD.shape[1])


LayerFactors = LatentFactors | SharedFactors | NarrowFactors

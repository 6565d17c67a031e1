"""Layers for the kernel tests: shapes of real models without weights, and random small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.moe_layers import MODELS, Form, Model
from vllm_moesvd.kernels.forward import Base, Factors, ShapeAndType, factored_experts
from vllm_moesvd.kernels.slots import SlotTable, rank_slots
from vllm_moesvd.kernels.tiles import TileTable

REAL_MODELS = {model.name: model for model in MODELS}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one process's layer; r and q are its shares of R and Q."""

    hidden: int
    width: int
    rank: int
    rank_down: int
    num_experts: int
    top_k: int
    expert_slot: tuple[int, ...]
    slot_group: tuple[int, ...]
    tp_size: int = 1
    base_width: int = 0
    """Neurons of the base in this process; 0 is no base."""


def real_sizes(
    model: Model, form: Form = "shared-v", *, tp_size: int = 1, num_groups: int = 1
) -> Sizes:
    """A real model at 40 % removed, every expert its own slot; a base as wide as the experts.

    Form `svd` has a group for every expert, the others `num_groups`.
    """
    multiple = 16 * tp_size  # As the layer pads its ranks on a GPU.
    rank, rank_down = (-(-r // multiple) * multiple for r in model.ranks(0.4, form))
    if form == "svd":
        num_groups = model.num_experts
    return Sizes(
        hidden=model.hidden_size,
        width=model.expert_width,
        rank=rank,
        rank_down=rank_down,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_slot=tuple(range(model.num_experts)),
        slot_group=tuple(e * num_groups // model.num_experts for e in range(model.num_experts)),
        tp_size=tp_size,
        base_width=model.expert_width // tp_size if form == "base-delta" else 0,
    )


def slot_table(
    expert_slot: Sequence[int], slot_group: Sequence[int], device: str = "cpu"
) -> SlotTable:
    ranks = rank_slots(expert_slot, slot_group)
    rank_E, slot_S, group_S = (torch.tensor(r, dtype=torch.int32, device=device) for r in ranks)
    return SlotTable(
        rank_E=rank_E,
        slot_S=slot_S,
        group_S=group_S,
        merges=len(slot_group) < len(expert_slot),
        num_groups=max(slot_group) + 1,
    )


def call_without_data(
    sizes: Sizes, tokens: int, table: TileTable, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """The launcher with tensors that have shapes only, exchanges included under TP."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def scratch(*wanted: ShapeAndType) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=kind, device=device) for shape, kind in wanted]

    s, g, tp = len(sizes.slot_group), max(sizes.slot_group) + 1, sizes.tp_size
    b = sizes.base_width
    d, f, r, q = sizes.hidden, sizes.width // tp, sizes.rank, sizes.rank_down
    factors = Factors(
        v_gate_GrD=empty(g, r // tp, d),
        v_up_GrD=empty(g, r // tp, d),
        u_gate_SFR=empty(s, f, r),
        u_up_SFR=empty(s, f, r),
        v_down_GQF=empty(g, q, f),
        u_down_SDq=empty(s, d, q // tp),
        base=Base(gate_BD=empty(b, d), up_BD=empty(b, d), down_DB=empty(d, b)) if b else None,
    )
    ranks = {
        "rank_E": torch.empty(sizes.num_experts, dtype=torch.int32, device=device),
        "slot_S": torch.empty(s, dtype=torch.int32, device=device),
        "group_S": torch.empty(s, dtype=torch.int32, device=device),
    }
    slots = SlotTable(**ranks, merges=s < sizes.num_experts, num_groups=g)
    return factored_experts(
        empty(tokens, d),
        torch.empty(tokens, sizes.top_k, dtype=torch.int32, device=device),
        torch.empty(tokens, sizes.top_k, dtype=torch.float32, device=device),
        factors,
        slots,
        table,
        scratch,
        exchange_z=(lambda z: z.new_empty(tp, *z.shape)) if tp > 1 else None,
        exchange_w=(lambda w: w.new_empty(w.shape[1:])) if tp > 1 else None,
    )

"""The three steps of a factored layer as opaque operators: `project_in`, `experts`, `project_out`.

Three, because tensor parallelism exchanges numbers between them (see `layer.py`). Opaque, because
on a CPU vLLM lets Dynamo trace through the layer, and which slots are in use is data.

`slot_TK` is the slot of each (token, choice) pair and -1 for a pair that is not computed. A slot
occurs at most once per token (`merge_slots` sees to it). `slot_group[s]` is the V group of slot s.
`z_TC2R` holds the projected token: for one group (`G = 1`) once per token, `C = 1`; otherwise once
per pair, `C = K`. The dimension 2 is gate, up.

Each operator has two implementations: for the CPU, which sorts the pairs by slot and touches the
used weights only; and for every other device one whose work depends on shapes alone, so it can be
captured in a CUDA graph. The latter computes every token with every slot; it is correct, not fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn import functional
from torch.nn.functional import silu

UPCAST_ROWS: Final = 8
"""From so many rows on, converting a matrix to float32 costs less than it saves (see `linear`)."""


def merge_slots(slot_TK: torch.Tensor, gate_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each slot of a token be computed once, with the sum of its routing weights.

    Example: slots (4, 2, 4) with weights (.5, .3, .2) become (4, 2, -1) with (.7, .3, 0).
    """
    same_TKK = slot_TK[:, :, None] == slot_TK[:, None, :]
    first_TK = ~same_TKK.tril(diagonal=-1).any(dim=-1)
    summed_TK = (same_TKK * gate_TK[:, None, :]).sum(dim=-1)
    return torch.where(first_TK, slot_TK, -1), torch.where(first_TK, summed_TK, 0)


@torch.library.custom_op("moesvd::project_in", mutates_args=())
def project_in(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    v_gate_GRD: torch.Tensor,
    v_up_GRD: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    """`z_TC2R`: the tokens times V gate and V up; pairs that are not computed give zeros."""
    if v_gate_GRD.shape[0] == 1:
        return _both(x_TD, v_gate_GRD[0], v_up_GRD[0])[:, None]
    z_TK2R = x_TD.new_zeros(*slot_TK.shape, 2, v_gate_GRD.shape[1])
    for group in range(v_gate_GRD.shape[0]):
        is_member_TK = torch.zeros_like(slot_TK, dtype=torch.bool)
        for slot, slots_group in enumerate(slot_group):
            if slots_group == group:
                is_member_TK = is_member_TK | (slot_TK == slot)
        z_T2R = _both(x_TD, v_gate_GRD[group], v_up_GRD[group])
        z_TK2R = torch.where(is_member_TK[:, :, None, None], z_T2R[:, None], z_TK2R)
    return z_TK2R


@project_in.register_kernel("cpu")
def _project_in_cpu(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    v_gate_GRD: torch.Tensor,
    v_up_GRD: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    if v_gate_GRD.shape[0] == 1:
        return _both(x_TD, v_gate_GRD[0], v_up_GRD[0])[:, None]
    top_k = slot_TK.shape[1]
    z_N2R = x_TD.new_zeros(slot_TK.numel(), 2, v_gate_GRD.shape[1])
    # The last entry is the group of slot -1.
    group_N = torch.tensor([*slot_group, -1])[slot_TK.flatten()]
    for group, rows in rows_by_key(group_N, v_gate_GRD.shape[0]):
        z_N2R[rows] = _both(x_TD[rows // top_k], v_gate_GRD[group], v_up_GRD[group])
    return z_N2R.view(*slot_TK.shape, 2, v_gate_GRD.shape[1])


@project_in.register_fake
def _project_in_fake(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    v_gate_GRD: torch.Tensor,
    v_up_GRD: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    columns = 1 if v_gate_GRD.shape[0] == 1 else slot_TK.shape[1]
    return x_TD.new_empty(x_TD.shape[0], columns, 2, v_gate_GRD.shape[1])


@torch.library.custom_op("moesvd::experts", mutates_args=())
def experts(
    z_TC2R: torch.Tensor,
    slot_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    """`w_NQ`, one row per pair (N = T*K): V down times the neurons; zeros if not computed."""
    w_TKQ = z_TC2R.new_zeros(*slot_TK.shape, v_down_GQF.shape[1])
    for slot, group in enumerate(slot_group):
        w_TCQ = _slot(z_TC2R, u_gate_SFR[slot], u_up_SFR[slot], v_down_GQF[group])
        w_TKQ = torch.where((slot_TK == slot)[:, :, None], w_TCQ, w_TKQ)
    return w_TKQ.flatten(0, 1)


@experts.register_kernel("cpu")
def _experts_cpu(
    z_TC2R: torch.Tensor,
    slot_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    top_k = slot_TK.shape[1]
    pairs_per_row = top_k // z_TC2R.shape[1]
    z_M2R = z_TC2R.flatten(0, 1)
    w_NQ = z_TC2R.new_zeros(slot_TK.numel(), v_down_GQF.shape[1])
    for slot, rows in rows_by_key(slot_TK.flatten(), len(slot_group)):
        z_n2R = z_M2R[rows // pairs_per_row]
        group = slot_group[slot]
        w_NQ[rows] = _slot(z_n2R, u_gate_SFR[slot], u_up_SFR[slot], v_down_GQF[group])
    return w_NQ


@experts.register_fake
def _experts_fake(
    z_TC2R: torch.Tensor,
    slot_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> torch.Tensor:
    return z_TC2R.new_empty(slot_TK.shape[0] * slot_TK.shape[1], v_down_GQF.shape[1])


@torch.library.custom_op("moesvd::project_out", mutates_args=())
def project_out(
    w_NQ: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor, u_down_SDQ: torch.Tensor
) -> torch.Tensor:
    """`y_TD`: U down times each pair's numbers, summed over the pairs in fp32 by routing weight."""
    tokens, top_k = slot_TK.shape
    w_TKQ = w_NQ.view(tokens, top_k, w_NQ.shape[1])
    y_TD = w_NQ.new_zeros(tokens, u_down_SDQ.shape[1], dtype=torch.float32)
    for slot in range(u_down_SDQ.shape[0]):
        gate_T1 = torch.where(slot_TK == slot, gate_TK, 0).sum(dim=1, keepdim=True)
        w_TQ = torch.where((slot_TK == slot)[:, :, None], w_TKQ, 0).sum(dim=1)
        y_TD += gate_T1.float() * linear(w_TQ, u_down_SDQ[slot]).float()
    return y_TD.to(w_NQ.dtype)


@project_out.register_kernel("cpu")
def _project_out_cpu(
    w_NQ: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor, u_down_SDQ: torch.Tensor
) -> torch.Tensor:
    tokens, top_k = slot_TK.shape
    gate_N1 = gate_TK.reshape(-1, 1).float()
    y_TD = w_NQ.new_zeros(tokens, u_down_SDQ.shape[1], dtype=torch.float32)
    for slot, rows in rows_by_key(slot_TK.flatten(), u_down_SDQ.shape[0]):
        y_nD = linear(w_NQ[rows], u_down_SDQ[slot]).float()
        y_TD.index_add_(0, rows // top_k, gate_N1[rows] * y_nD)
    return y_TD.to(w_NQ.dtype)


@project_out.register_fake
def _project_out_fake(
    w_NQ: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor, u_down_SDQ: torch.Tensor
) -> torch.Tensor:
    return w_NQ.new_empty(slot_TK.shape[0], u_down_SDQ.shape[1])


def _both(x_ND: torch.Tensor, gate_RD: torch.Tensor, up_RD: torch.Tensor) -> torch.Tensor:
    return torch.stack([linear(x_ND, gate_RD), linear(x_ND, up_RD)], dim=1)


def _slot(
    z_2R: torch.Tensor, gate_FR: torch.Tensor, up_FR: torch.Tensor, down_QF: torch.Tensor
) -> torch.Tensor:
    """One slot applied to `z` [..., 2, R]; returns [..., Q]."""
    gate_F, up_F = linear(z_2R[..., 0, :], gate_FR), linear(z_2R[..., 1, :], up_FR)
    return linear(silu(gate_F) * up_F, down_QF)


def linear(x_NK: torch.Tensor, weight_MK: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, in float32 on a CPU that has no fast product of 16-bit numbers.

    With AVX2 alone, 64 rows times [3584, 768] in bfloat16 take 15.1 ms, converted 5.1; one row
    0.27 and 0.62.
    """
    rows = x_NK.numel() // x_NK.shape[-1]
    is_slow = x_NK.device.type == "cpu" and x_NK.element_size() == 2 and rows >= UPCAST_ROWS
    if is_slow and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return functional.linear(x_NK.float(), weight_MK.float()).to(x_NK.dtype)
    return functional.linear(x_NK, weight_MK)


def rows_by_key(key_N: torch.Tensor, num_keys: int) -> list[tuple[int, torch.Tensor]]:
    """For every key from 0 to `num_keys - 1` that occurs: the key and its rows, ascending.

    Example: keys (1, -1, 0, 1) give [(0, rows 2), (1, rows 0 and 3)].
    """
    sizes = torch.bincount(key_N + 1, minlength=num_keys + 1).tolist()
    rows_by_key = torch.split(key_N.argsort(stable=True), sizes)[1:]
    return [(key, rows) for key, rows in enumerate(rows_by_key) if len(rows)]

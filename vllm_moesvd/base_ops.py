"""The experts of a `base-delta` layer as one opaque operator; the other steps are those of `ops`.

What the base contributes to gate and up depends on the token alone, so it is computed once per
token (`base_T2B`, the dimension 2 is gate, up). Its part of down is linear, so it is computed
once per token too, from the gate-weighted sum `h_TB` of the neurons that the base has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import silu

from vllm_moesvd.ops import linear, rows_by_key


@torch.library.custom_op("moesvd::base_experts", mutates_args=())
def base_experts(
    z_TC2R: torch.Tensor,
    base_T2B: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`w_NQ`, as of `ops.experts`, and `h_TB`, the routing-weighted sum of the base's neurons.

    Sums are fp32. The work depends on shapes alone, so it can be captured in a CUDA graph.
    """
    base_width = base_T2B.shape[2]
    w_TKQ = z_TC2R.new_zeros(*slot_TK.shape, v_down_GQF.shape[1])
    h_TB = z_TC2R.new_zeros(slot_TK.shape[0], base_width, dtype=torch.float32)
    for slot, group in enumerate(slot_group):
        h_TCF = _neurons(z_TC2R, base_T2B[:, None], u_gate_SFR[slot], u_up_SFR[slot])
        is_slot_TK1 = (slot_TK == slot)[:, :, None]
        w_TKQ = torch.where(is_slot_TK1, linear(h_TCF, v_down_GQF[group]), w_TKQ)
        gate_TK1 = torch.where(is_slot_TK1, gate_TK[:, :, None].float(), 0)
        h_TB += (gate_TK1 * h_TCF[:, :, :base_width].float()).sum(dim=1)
    return w_TKQ.flatten(0, 1), h_TB.to(z_TC2R.dtype)


@base_experts.register_kernel("cpu")
def _base_experts_cpu(
    z_TC2R: torch.Tensor,
    base_T2B: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    top_k, base_width = slot_TK.shape[1], base_T2B.shape[2]
    pairs_per_row = top_k // z_TC2R.shape[1]
    z_M2R = z_TC2R.flatten(0, 1)
    gate_N1 = gate_TK.reshape(-1, 1).float()
    w_NQ = z_TC2R.new_zeros(slot_TK.numel(), v_down_GQF.shape[1])
    h_TB = z_TC2R.new_zeros(slot_TK.shape[0], base_width, dtype=torch.float32)
    for slot, rows in rows_by_key(slot_TK.flatten(), len(slot_group)):
        token = rows // top_k
        z_n2R = z_M2R[rows // pairs_per_row]
        h_nF = _neurons(z_n2R, base_T2B[token], u_gate_SFR[slot], u_up_SFR[slot])
        w_NQ[rows] = linear(h_nF, v_down_GQF[slot_group[slot]])
        h_TB.index_add_(0, token, gate_N1[rows] * h_nF[:, :base_width].float())
    return w_NQ, h_TB.to(z_TC2R.dtype)


@base_experts.register_fake
def _base_experts_fake(
    z_TC2R: torch.Tensor,
    base_T2B: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    v_down_GQF: torch.Tensor,
    slot_group: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    w_NQ = z_TC2R.new_empty(slot_TK.shape[0] * slot_TK.shape[1], v_down_GQF.shape[1])
    return w_NQ, z_TC2R.new_empty(slot_TK.shape[0], base_T2B.shape[2])


def _neurons(
    z_2R: torch.Tensor, base_2B: torch.Tensor, gate_FR: torch.Tensor, up_FR: torch.Tensor
) -> torch.Tensor:
    """One slot's neurons [..., F] from `z` [..., 2, R] and the base's part [..., 2, B]."""
    gate_F, up_F = linear(z_2R[..., 0, :], gate_FR), linear(z_2R[..., 1, :], up_FR)
    gate_F[..., : base_2B.shape[-1]] += base_2B[..., 0, :]
    up_F[..., : base_2B.shape[-1]] += base_2B[..., 1, :]
    return silu(gate_F) * up_F

"""What every form of a routed-experts layer computes: plain loops in fp32, never optimised.

This is the specification. Kernels, the serving path and the tests are all measured against it.
`x_TD` are the tokens, `index_TK` their experts, `gate_TK` the routing weights as the router hands
them out; every function returns the layer's output [T, D] in fp32. A weight is stored as
[out, in], so a projection of one token is `weight @ x`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import silu


def dense_experts(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    *,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Dense experts, and narrow ones: those are dense experts with a smaller `F`."""
    y_TD = torch.zeros(x_TD.shape[0], down_EDF.shape[1])
    for t in range(index_TK.shape[0]):
        x_D = x_TD[t].float()
        for k in range(index_TK.shape[1]):
            expert = int(index_TK[t, k])
            h_F = silu(gate_EFD[expert].float() @ x_D) * (up_EFD[expert].float() @ x_D)
            y_TD[t] += gate_TK[t, k].float() * (down_EDF[expert].float() @ h_F)
    return y_TD


def latent_experts(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    *,
    v_gate_up_RD: torch.Tensor,
    gate_EFR: torch.Tensor,
    up_EFR: torch.Tensor,
    down_EQF: torch.Tensor,
    q_down_DQ: torch.Tensor,
    bias_down_D: torch.Tensor | None,
) -> torch.Tensor:
    """Experts between one shared V and one shared Q; the bias is added once per token.

    The cores read `R = rank_gate_up` numbers and write `Q = rank_down`.
    """
    z_TR = x_TD.float() @ v_gate_up_RD.float().T
    s_TQ = dense_experts(
        z_TR, index_TK, gate_TK, gate_EFD=gate_EFR, up_EFD=up_EFR, down_EDF=down_EQF
    )
    y_TD = s_TQ @ q_down_DQ.float().T
    return y_TD if bias_down_D is None else y_TD + bias_down_D.float()


def factored_experts(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    *,
    v_gate_GRD: torch.Tensor,
    v_up_GRD: torch.Tensor,
    v_down_GQF: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    u_down_SDQ: torch.Tensor,
    expert_slot: Sequence[int],
    slot_group: Sequence[int],
    base_gate_BD: torch.Tensor | None = None,
    base_up_BD: torch.Tensor | None = None,
    base_down_DB: torch.Tensor | None = None,
) -> torch.Tensor:
    """Forms `shared-v` and `svd`: `W_e = U[slot(e)] @ V[group(slot(e))]` for each projection.

    With a base (form `base-delta`) the base is added to the first B neurons of every expert.
    """
    y_TD = torch.zeros(x_TD.shape[0], u_down_SDQ.shape[1])
    for t in range(index_TK.shape[0]):
        x_D = x_TD[t].float()
        for k in range(index_TK.shape[1]):
            slot = expert_slot[int(index_TK[t, k])]
            group = slot_group[slot]
            gate_F = u_gate_SFR[slot].float() @ (v_gate_GRD[group].float() @ x_D)
            up_F = u_up_SFR[slot].float() @ (v_up_GRD[group].float() @ x_D)
            if base_gate_BD is not None and base_up_BD is not None:
                gate_F[: len(base_gate_BD)] += base_gate_BD.float() @ x_D
                up_F[: len(base_up_BD)] += base_up_BD.float() @ x_D
            h_F = silu(gate_F) * up_F
            y_D = u_down_SDQ[slot].float() @ (v_down_GQF[group].float() @ h_F)
            if base_down_DB is not None:
                y_D += base_down_DB.float() @ h_F[: base_down_DB.shape[1]]
            y_TD[t] += gate_TK[t, k].float() * y_D
    return y_TD

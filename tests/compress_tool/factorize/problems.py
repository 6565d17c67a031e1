"""Small synthetic layers with unequal experts and anisotropic, routed inputs."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from compress_tool.factorize.problem import LayerProblem
from compress_tool.layer_stats import LayerStatistics
from vllm_moesvd.format import MoEShape


def make_problem(
    *,
    hidden: int = 24,
    width: int = 20,
    experts: int = 6,
    top_k: int = 2,
    tokens: int = 1500,
    seed: int = 0,
    identical: bool = False,
    used: int | None = None,
) -> LayerProblem:
    """Experts share a base plus their own part; only the first `used` experts are routed to."""
    g = torch.Generator().manual_seed(seed)
    shape = MoEShape(hidden_size=hidden, expert_width=width, num_experts=experts, top_k=top_k)
    scale_D = torch.arange(1, hidden + 1) ** -0.6
    x_TD = torch.randn(tokens, hidden, generator=g) * scale_D
    mix_DD = torch.linalg.qr(torch.randn(hidden, hidden, generator=g)).Q
    x_TD = (x_TD @ mix_DD) * 3 + 0.3
    logits_TE = x_TD @ torch.randn(hidden, experts, generator=g)
    if used is not None:
        logits_TE[:, used:] = -1e9
    top = logits_TE.topk(top_k, dim=-1)
    gate_TK = torch.softmax(top.values, dim=-1)

    def weights(rows: int, columns: int) -> torch.Tensor:
        base = torch.randn(rows, columns, generator=g)
        own = torch.randn(experts, rows, columns, generator=g)
        mixed = base.expand(experts, -1, -1) if identical else 0.6 * base + 0.8 * own
        return mixed / columns**0.5

    gate_EFD, up_EFD, down_EDF = (
        weights(width, hidden),
        weights(width, hidden),
        weights(hidden, width),
    )
    return LayerProblem(
        shape=shape,
        statistics=LayerStatistics(
            x_TD=x_TD, index_TK=top.indices, gate_TK=gate_TK, num_experts=experts
        ),
        experts=lambda expert: (gate_EFD[expert], up_EFD[expert], down_EDF[expert]),
        activation=silu,
    )

"""Experts of latent and narrow layers on a CPU, over weights that oneDNN has packed.

vLLM's own CPU kernel reads weights at 28 GB/s where experts are 1024 wide and at 20 GB/s where a
latent layer has made them 608 wide (one token, one core of a Zen 5), and it computes with half of
what oneDNN does: 190 against 450 Gflop/s. Where oneDNN cannot pack, vLLM's kernel is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm_moesvd.cpu_packed import (
    Packed,
    pack,
    product,
    register_cpu_operator,
    silu_and_mul,
)
from vllm_moesvd.ops import rows_by_key


class CpuExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's container of routed experts, with another method of computing them."""

    def _get_quant_method(
        self, prefix: str, quant_config: object, moe_config: Any
    ) -> FusedMoEMethodBase:
        return CpuExpertsMethod(moe_config)


class CpuExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Computes each expert's pairs with two packed matrices: gate over up, and down.

    Under expert parallelism pairs of other processes are left out; vLLM's kernel, which is not
    told about them and would read out of bounds, gets them as pairs of weight zero.
    """

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        self.packed: Packed | None = None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Pack the weights; after a reload, pack them again."""
        self.packed = pack(layer, ("w13_weight", "w2_weight"))
        if self.packed is None:
            # vLLM packs for its kernel only where it builds one.
            self.moe_kernel = None
            super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Output [T, D] of the experts of this process; a partial sum for the runner."""
        local_TK = topk_ids
        if layer.expert_map is not None:
            local_TK = layer.expert_map[topk_ids.long()]
        if self.packed is not None:
            packed = list(self.packed.handlers), self.packed.rows
            output_TD = torch.ops.moesvd.packed_experts(x, local_TK, topk_weights, *packed)
        else:
            output_TD = super().apply(
                layer,
                x,
                torch.where(local_TK >= 0, topk_weights, 0),
                local_TK.clamp(min=0).to(topk_ids.dtype),
                shared_experts,
                shared_experts_input,
            )
        result_TD: torch.Tensor = output_TD
        return result_TD


def packed_experts(
    x_TD: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    handlers: Sequence[torch.Tensor],
    rows: Sequence[int],
) -> torch.Tensor:
    """`y_TD`: SwiGLU experts, summed by routing weight in fp32; expert -1 is not computed.

    `handlers` are those of gate over up [2F, D] and of down [D, F], one number per expert.
    """
    gate_up_E, down_E = handlers
    two_f, d = rows
    tokens, top_k = expert_TK.shape
    y_TD = x_TD.new_zeros(tokens, d, dtype=torch.float32)
    if tokens == 1:
        # Sorting and indexing one token's pairs takes a tenth of the time of its products.
        for expert, gate in zip(expert_TK[0].tolist(), gate_TK[0].tolist(), strict=True):
            if expert >= 0:
                h_1F = silu_and_mul(product(x_TD, gate_up_E[expert], two_f))
                y_TD.add_(product(h_1F, down_E[expert], d), alpha=gate)
        return y_TD.to(x_TD.dtype)
    gate_N1 = gate_TK.reshape(-1, 1).float()
    for expert, pairs in rows_by_key(expert_TK.flatten(), len(gate_up_E)):
        token_n = pairs // top_k
        h_nF = silu_and_mul(product(x_TD[token_n], gate_up_E[expert], two_f))
        y_nD = product(h_nF, down_E[expert], d).float()
        y_TD.index_add_(0, token_n, y_nD.mul_(gate_N1[pairs]))
    return y_TD.to(x_TD.dtype)


register_cpu_operator(packed_experts)

"""Experts of latent and narrow layers on a CPU, over weights that oneDNN has packed.

vLLM's own CPU kernel reads weights at 28 GB/s where experts are 1024 wide and at 20 GB/s where a
latent layer has made them 608 wide (one token, one core of a Zen 5), and it computes with half of
what oneDNN does: 190 against 450 Gflop/s. Where oneDNN cannot pack, and where experts are so small
that Python takes longer than their products, vLLM's kernel is used: it is one call per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm_moesvd.cpu_pairs import sorted_pairs
from vllm_moesvd.cpu_products import Packed, pack, register_cpu_operator, silu_times

SMALL_EXPERT_BYTES: Final = 1 << 20
"""Experts below this go to vLLM's kernel. Its time over that of packed experts, batches of 1 / 8 /
32, one core of a Zen 5, weights from memory: 8 experts (top 2) of 0.29 MB .58 / .84 / 1.06, of 1.08
MB 1.02 / 1.19 / 1.35, of 2.16 MB 1.10 / 1.15 / 1.37, of 8.65 MB .92 / 1.23 / 1.39; 64 experts (top
8) .72 / .68 / .78, 1.09 / 1.15 / 1.23, .97 / 1.07 / 1.12, .97 / 1.15 / 1.19. More is safe: vLLM's
kernel is what the dense model has."""


class CpuExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's container of routed experts, with another method of computing them."""

    def _get_quant_method(
        self, prefix: str, quant_config: object, moe_config: Any
    ) -> FusedMoEMethodBase:
        return CpuExpertsMethod(moe_config)


class CpuExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Computes each expert's pairs with two packed matrices: gate over up, and down.

    Experts below SMALL_EXPERT_BYTES are computed by vLLM's kernel instead.

    Under expert parallelism pairs of other processes are left out; vLLM's kernel, which is not
    told about them and would read out of bounds, gets them as pairs of weight zero.
    """

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        self.packed: Packed | None = None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Pack the weights; after a reload, pack them again."""
        expert_bytes = layer.w13_weight[0].nbytes + layer.w2_weight[0].nbytes
        if expert_bytes >= SMALL_EXPERT_BYTES:
            self.packed = pack(layer, [["w13_weight"], ["w2_weight"]])
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
    f = two_f // 2
    y_TD = x_TD.new_zeros(len(x_TD), d, dtype=torch.float32)
    for pairs in sorted_pairs(expert_TK, gate_TK, two_f):
        x_nD, n = pairs.rows_of(x_TD), len(pairs.gate_n)
        h_n2F, y_nD = x_TD.new_empty(n, two_f), x_TD.new_empty(n, d)
        pairs.runs.multiply(h_n2F, x_nD, gate_up_E)
        h_nF = silu_times(h_n2F[:, :f], h_n2F[:, f:])
        pairs.runs.multiply(y_nD, h_nF, down_E)
        pairs.add_to(y_TD, y_nD)
    return y_TD.to(x_TD.dtype)


register_cpu_operator(packed_experts)

"""Layers of the form `base-delta` inside vLLM's fused-MoE layer.

The factors are held, split and exchanged as in `layer.py`. The base is split over its neurons in
the same places as F: process t of `tp` holds the base's part of its own F / tp neurons, zeros
where the base has none (a pruned base). Its down part is a partial sum for the runner's
all-reduce, like everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
)
from vllm.utils.math_utils import round_up

from vllm_moesvd.base_ops import base_experts
from vllm_moesvd.cpu_packed import BASE
from vllm_moesvd.layer import FactoredMoEMethod, FactoredRoutedExperts, rank_multiple
from vllm_moesvd.loading import factor_loader


class BaseDeltaRoutedExperts(FactoredRoutedExperts):
    """vLLM's container of routed experts, holding base and factors of one layer."""

    def _get_quant_method(
        self, prefix: str, quant_config: object, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        return BaseDeltaMoEMethod(moe_config, self.spec, self.replicate)


class BaseDeltaMoEMethod(FactoredMoEMethod):
    """Holds and applies a `base-delta` layer."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The factors, and this process's slice of the base."""
        super().create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        )
        is_split = self.moe.tp_size > 1
        width = intermediate_size_per_partition
        if not is_split:
            # Padded like a rank, because rows of base down are as long.
            width = min(width, round_up(self.spec.base_width, rank_multiple()))
        for name in BASE:
            is_down = name == "base_down"
            shape = (hidden_size, width) if is_down else (width, hidden_size)
            parameter = torch.nn.Parameter(
                torch.empty(shape, dtype=params_dtype), requires_grad=False
            )
            parameter.weight_loader = factor_loader(  # type: ignore[attr-defined]
                shard_dim=int(is_down) if is_split else None,
                tp_rank=self.moe.tp_rank,
            )
            layer.register_parameter(name, parameter)

    def _base(self, layer: RoutedExperts) -> Any:
        from vllm_moesvd.kernels.forward import Base

        return Base(gate_BD=layer.base_gate, up_BD=layer.base_up, down_DB=layer.base_down)

    def _apply_operators(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        slot_TK, gate_TK = self._slots(layer, topk_ids, topk_weights)
        z_TC2R = self._project_in(layer, x, slot_TK)
        base_T2B = torch.stack([linear(x, layer.base_gate), linear(x, layer.base_up)], dim=1)
        factors = layer.u_gate, layer.u_up, layer.v_down
        w_NQ, h_TB = base_experts(
            z_TC2R, base_T2B, slot_TK, gate_TK, *factors, self.spec.slot_group
        )
        y_TD = self._project_out(layer, w_NQ, slot_TK, gate_TK)
        return y_TD + linear(h_TB, layer.base_down)

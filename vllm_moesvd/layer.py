"""Layers of the forms `shared-v` and `svd` inside vLLM's fused-MoE layer.

Tensor parallelism over `tp` processes, each tensor split once and none replicated:

    x [T, D]  --V gate, V up: rank rows-->  z / tp  --all-gather-->  z [T, C, 2, R]
    z         --U gate, U up: F rows-->     h / tp  --V down: F columns-->  partial w [T*K, Q]
    partial w --reduce-scatter-->           w / tp  --U down: Q columns-->  partial y [T, D]

The last sum is the all-reduce that vLLM's runner does for every fused-MoE layer. Sizes that do not
divide are padded with zeros, which change no number. With `replicate`, V gate, V up and U down are
whole in every process: the two inner exchanges disappear for `tp` times their memory and work.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_reduce_scatter,
)
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    RoutedExperts,
)
from vllm.utils.math_utils import round_up

from vllm_moesvd import ops
from vllm_moesvd.format import FactoredSpec
from vllm_moesvd.loading import load_padded_slice

FACTORS: Final = ("v_gate", "v_up", "v_down", "u_gate", "u_up", "u_down")


class FactoredRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's container of routed experts, holding the factors of one layer."""

    def __init__(self, *args: Any, spec: FactoredSpec, replicate: bool, **kwargs: Any) -> None:
        # nn.Module.__init__ comes later, and it does not need to know about these two.
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "replicate", replicate)
        super().__init__(*args, **kwargs)

    def _get_quant_method(
        self, prefix: str, quant_config: object, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        return FactoredMoEMethod(moe_config, self.spec, self.replicate)


class FactoredMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Holds and applies the factors of a `shared-v` or `svd` layer."""

    def __init__(self, moe: FusedMoEConfig, spec: FactoredSpec, replicate: bool) -> None:
        super().__init__(moe)
        self.spec = spec
        self.is_sharded = moe.tp_size > 1 and not replicate

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this process's slice of every factor under its checkpoint name."""
        spec, f = self.spec, intermediate_size_per_partition
        rank_shards = self.moe.tp_size if self.is_sharded else 1
        r = round_up(spec.rank_gate_up, rank_shards)
        q = round_up(spec.rank_down, rank_shards)
        v_shape = (spec.num_groups, r // rank_shards, hidden_size)
        u_shape = (spec.num_slots, f, r)
        rank_dim = None if rank_shards == 1 else 1
        layout: dict[str, tuple[tuple[int, ...], int | None]] = {
            "v_gate": (v_shape, rank_dim),
            "v_up": (v_shape, rank_dim),
            "u_gate": (u_shape, 1),
            "u_up": (u_shape, 1),
            "v_down": ((spec.num_groups, q, f), 2),
            "u_down": (
                (spec.num_slots, hidden_size, q // rank_shards),
                None if rank_shards == 1 else 2,
            ),
        }
        for name in FACTORS:
            shape, shard_dim = layout[name]
            parameter = torch.nn.Parameter(
                torch.empty(shape, dtype=params_dtype), requires_grad=False
            )
            parameter.weight_loader = partial(  # type: ignore[attr-defined]
                load_padded_slice, shard_dim=shard_dim, tp_rank=self.moe.tp_rank
            )
            layer.register_parameter(name, parameter)
        slot_E = torch.tensor(spec.expert_slot, dtype=torch.int64)
        layer.register_buffer("expert_slot", slot_E, persistent=False)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: object,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Output [T, D] of the routed experts; a partial sum for the runner's all-reduce."""
        spec = self.spec
        slot_TK, gate_TK = layer.expert_slot[topk_ids], topk_weights
        if spec.num_slots < len(spec.expert_slot):
            slot_TK, gate_TK = ops.merge_slots(slot_TK, gate_TK)
        z_TC2R = ops.project_in(x, slot_TK, layer.v_gate, layer.v_up, spec.slot_group)
        if self.is_sharded:
            z_TC2R = tensor_model_parallel_all_gather(z_TC2R, dim=-1)
        w_NQ = ops.experts(z_TC2R, slot_TK, layer.u_gate, layer.u_up, layer.v_down, spec.slot_group)
        if self.is_sharded:
            # vLLM 0.32 permutes more than two dimensions wrongly here, so w is a matrix.
            w_NQ = tensor_model_parallel_reduce_scatter(w_NQ, dim=-1)
        y_TD: torch.Tensor = ops.project_out(w_NQ, slot_TK, gate_TK, layer.u_down)
        return y_TD

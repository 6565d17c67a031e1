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

from typing import Any, Final

import torch
from vllm.config import get_current_vllm_config
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
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_moesvd import kernels, ops
from vllm_moesvd.cpu_packed import FACTORS, PackedLayer, pack_layer
from vllm_moesvd.expert_parallel import LocalRows, local_experts
from vllm_moesvd.format import FactoredSpec
from vllm_moesvd.kernels.slots import SlotTable, rank_slots
from vllm_moesvd.loading import factor_loader

SLOT_RANKS: Final = ("rank_E", "slot_S", "group_S")
"""Buffers with the fields of these names of `kernels.slots.SlotTable`."""


class FactoredRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's container of routed experts, holding the factors of one layer."""

    def __init__(self, *args: Any, spec: FactoredSpec, replicate: bool, **kwargs: Any) -> None:
        # nn.Module.__init__ comes later, and it does not need to know about these two.
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "replicate", replicate)
        object.__setattr__(self, "local_rows", None)
        super().__init__(*args, **kwargs)

    def update_expert_map_info(self) -> None:
        """Under expert parallelism `spec` becomes that of the experts of this process."""
        super().update_expert_map_info()
        if self._expert_map is not None:
            spec, rows = local_experts(self.spec, self._expert_map.tolist())
            object.__setattr__(self, "spec", spec)
            object.__setattr__(self, "local_rows", rows)

    def _get_quant_method(
        self, prefix: str, quant_config: object, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        return FactoredMoEMethod(moe_config, self.spec, self.replicate)


class FactoredMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Holds and applies the factors of a `shared-v` or `svd` layer."""

    def __init__(self, moe: FusedMoEConfig, spec: FactoredSpec, replicate: bool) -> None:
        super().__init__(moe)
        self.spec = spec
        self.is_warm = False
        self.packed: PackedLayer | None = None
        self.is_sharded = moe.tp_size > 1 and not replicate
        # With data parallelism vLLM brings the tokens of all replicas to the experts.
        scheduler = get_current_vllm_config().scheduler_config
        self.max_tokens = scheduler.max_num_batched_tokens * moe.dp_size

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
        multiple = rank_shards * rank_multiple()
        r = round_up(spec.rank_gate_up, multiple)
        q = round_up(spec.rank_down, multiple)
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
            rows: LocalRows | None = layer.local_rows
            parameter.weight_loader = factor_loader(  # type: ignore[attr-defined]
                shard_dim=shard_dim,
                tp_rank=self.moe.tp_rank,
                rows=None if rows is None else rows.of(name),
            )
            layer.register_parameter(name, parameter)
        slot_E = torch.tensor(spec.expert_slot, dtype=torch.int64)
        layer.register_buffer("expert_slot", slot_E, persistent=False)
        ranks = rank_slots(spec.expert_slot, spec.slot_group)
        for name, values in zip(SLOT_RANKS, ranks, strict=True):
            tensor = torch.tensor(values, dtype=torch.int32)
            layer.register_buffer(name, tensor, persistent=False)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Compile every kernel that serving can need: compiling while serving stalls requests.

        Once: when weights are reloaded the layer's tables are not filled at this point.
        """
        if layer.v_gate.device.type == "cpu" and not self.is_sharded:
            self.packed = pack_layer(layer, self.spec.slot_group)
        if self.is_warm or not kernels.can_run(layer.v_gate):
            return
        self.is_warm = True
        from vllm_moesvd.kernels.forward import warm_up_batches

        for tokens in reversed(warm_up_batches(self.max_tokens)):
            x_TD = layer.v_gate.new_zeros(tokens, layer.v_gate.shape[2])
            weights_TK = x_TD.new_zeros(tokens, self.moe.experts_per_token, dtype=torch.float32)
            self._apply_kernels(layer, x_TD, weights_TK, weights_TK.to(torch.int32))

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
        if kernels.can_run(x):
            return self._apply_kernels(layer, x, topk_weights, topk_ids)
        if self.packed is not None:
            return self.packed(x, *self._slots(layer, topk_ids, topk_weights))
        return self._apply_operators(layer, x, topk_weights, topk_ids)

    def _apply_operators(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        slot_TK, gate_TK = self._slots(layer, topk_ids, topk_weights)
        z_TC2R = self._project_in(layer, x, slot_TK)
        factors = layer.u_gate, layer.u_up, layer.v_down
        w_NQ = ops.experts(z_TC2R, slot_TK, *factors, self.spec.slot_group)
        return self._project_out(layer, w_NQ, slot_TK, gate_TK)

    def _slots(
        self, layer: RoutedExperts, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot and gate of every routed row; one that a token meets twice is computed once."""
        slot_TK, gate_TK = layer.expert_slot[ids_TK], weights_TK
        if self.spec.shares_slots:
            slot_TK, gate_TK = ops.merge_slots(slot_TK, gate_TK)
        return slot_TK, gate_TK

    def _project_in(
        self, layer: RoutedExperts, x_TD: torch.Tensor, slot_TK: torch.Tensor
    ) -> torch.Tensor:
        """V gate and V up of every token, all ranks of it."""
        factors = layer.v_gate, layer.v_up
        z_TC2R: torch.Tensor = ops.project_in(x_TD, slot_TK, *factors, self.spec.slot_group)
        return _gather_ranks(z_TC2R) if self.is_sharded else z_TC2R

    def _project_out(
        self,
        layer: RoutedExperts,
        w_NQ: torch.Tensor,
        slot_TK: torch.Tensor,
        gate_TK: torch.Tensor,
    ) -> torch.Tensor:
        """U down of every routed row, summed by gate; this process's share of the ranks."""
        w_NQ = _scatter_ranks(w_NQ) if self.is_sharded else w_NQ
        y_TD: torch.Tensor = ops.project_out(w_NQ, slot_TK, gate_TK, layer.u_down)
        return y_TD

    def _base(self, layer: RoutedExperts) -> Any:
        """The base (`kernels.forward.Base`) of a form that has one."""
        return None

    def _apply_kernels(
        self,
        layer: RoutedExperts,
        x_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
    ) -> torch.Tensor:
        # These modules import Triton, which only a machine with a GPU must have.
        from vllm_moesvd.kernels.forward import Factors, factored_experts
        from vllm_moesvd.kernels.tiles import device_arch, tile_table

        return factored_experts(
            x_TD,
            ids_TK,
            weights_TK,
            Factors(
                v_gate_GrD=layer.v_gate,
                v_up_GrD=layer.v_up,
                u_gate_SFR=layer.u_gate,
                u_up_SFR=layer.u_up,
                v_down_GQF=layer.v_down,
                u_down_SDq=layer.u_down,
                base=self._base(layer),
            ),
            SlotTable(
                **{name: getattr(layer, name) for name in SLOT_RANKS},
                merges=self.spec.shares_slots,
                num_groups=self.spec.num_groups,
            ),
            tile_table(device_arch(x_TD.device.index), x_TD.element_size()),
            current_workspace_manager().get_simultaneous,
            exchange_z=_gather_shards if self.is_sharded else None,
            exchange_w=_scatter_shards if self.is_sharded else None,
        )


def rank_multiple() -> int:
    """What a process's share of a rank is padded to: Triton loads 16 bytes at once from rows whose
    length is a multiple of 16 numbers, and single numbers from others."""
    return 16 if current_platform.is_cuda_alike() else 1


def _gather_ranks(z: torch.Tensor) -> torch.Tensor:
    gathered: torch.Tensor = tensor_model_parallel_all_gather(z, dim=-1)
    return gathered


def _scatter_ranks(w_NQ: torch.Tensor) -> torch.Tensor:
    # vLLM 0.32 permutes more than two dimensions wrongly here, so w is a matrix.
    scattered: torch.Tensor = tensor_model_parallel_reduce_scatter(w_NQ, dim=-1)
    return scattered


def _gather_shards(z_M2r: torch.Tensor) -> torch.Tensor:
    """`z` of all processes [C, M, 2, r]; over another dimension vLLM would copy what arrives."""
    gathered: torch.Tensor = tensor_model_parallel_all_gather(z_M2r, dim=0)
    return gathered.view(-1, *z_M2r.shape)


def _scatter_shards(w_CNq: torch.Tensor) -> torch.Tensor:
    """This process's shard [N, q] of the sum of w; any other dimension costs two copies of w."""
    scattered: torch.Tensor = tensor_model_parallel_reduce_scatter(w_CNq.flatten(0, 1), dim=0)
    return scattered

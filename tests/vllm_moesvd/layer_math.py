"""Layers of hand-made checkpoints computed by `vllm_moesvd.reference`."""

from __future__ import annotations

import torch

from tests.vllm_moesvd.hand_made import MIXTRAL, HandMade
from vllm_moesvd import reference
from vllm_moesvd.format import FactoredSpec, LatentSpec, LayerSpec


def routing(tokens: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, 64], two different experts of four for each, and weights that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 64, generator=generator)
    logits_TE = torch.randn(tokens, 4, generator=generator)
    gate_TK, index_TK = logits_TE.softmax(-1).topk(2)
    return x_TD, index_TK, gate_TK / gate_TK.sum(-1, keepdim=True)


def dense_layer(
    tensors: dict[str, torch.Tensor],
    layer: int,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
) -> torch.Tensor:
    """Experts stored under their dense names, of any width."""
    gate, up, down = _cores(tensors, layer)
    return reference.dense_experts(x_TD, index_TK, gate_TK, gate_EFD=gate, up_EFD=up, down_EDF=down)


def layer_output(
    made: HandMade,
    spec: LayerSpec | None,
    layer: int,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    gate_TK: torch.Tensor,
) -> torch.Tensor:
    """Any layer of the factored checkpoint, from its stored tensors."""
    prefix = f"{MIXTRAL.experts_prefix.format(layer=layer)}.moesvd."
    factors = {
        name.removeprefix(prefix): tensor
        for name, tensor in made.tensors.items()
        if name.startswith(prefix)
    }
    if isinstance(spec, FactoredSpec):
        return reference.factored_experts(
            x_TD,
            index_TK,
            gate_TK,
            v_gate_GRD=factors["v_gate"],
            v_up_GRD=factors["v_up"],
            v_down_GQF=factors["v_down"],
            u_gate_SFR=factors["u_gate"],
            u_up_SFR=factors["u_up"],
            u_down_SDQ=factors["u_down"],
            expert_slot=spec.expert_slot,
            slot_group=spec.slot_group,
            base_gate_BD=factors.get("base_gate"),
            base_up_BD=factors.get("base_up"),
            base_down_DB=factors.get("base_down"),
        )
    if not isinstance(spec, LatentSpec):
        return dense_layer(made.tensors, layer, x_TD, index_TK, gate_TK)
    gate, up, down = _cores(made.tensors, layer)
    return reference.latent_experts(
        x_TD,
        index_TK,
        gate_TK,
        v_gate_up_RD=factors["v_gate_up"],
        gate_EFR=gate,
        up_EFR=up,
        down_EQF=down,
        q_down_DQ=factors["q_down"],
        bias_down_D=factors.get("bias_down"),
    )


def softmax_routing(
    made: HandMade, layer: int, x_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtral's routing as its paper has it: softmax, two best, renormalised."""
    weight_ED = made.tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
    gate_TK, index_TK = (x_TD @ weight_ED.T).softmax(-1).topk(2)
    return index_TK, gate_TK / gate_TK.sum(-1, keepdim=True)


def _cores(
    tensors: dict[str, torch.Tensor], layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prefix = MIXTRAL.experts_prefix.format(layer=layer)
    gate, up, down = (
        torch.stack([tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(4)])
        for name in ("w1", "w3", "w2")
    )
    return gate, up, down

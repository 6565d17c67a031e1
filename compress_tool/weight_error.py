"""How far the experts of a layer moved: the number that `run` records and `verify` recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from compress_tool.checkpoint import Checkpoint
from vllm_moesvd.format import PROJECTIONS, FactoredSpec, LayerSpec, Projection

FoldedExpert = Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Dense fp32 weights (gate_FD, up_FD, down_DF) of one expert index."""


def keeps_order(spec: LayerSpec, width: int) -> bool:
    """Whether neuron j of a folded expert stands for neuron j of the source's `width`.

    A pruned base sorts the neurons of its layer, so its weights cannot be compared one by one.
    """
    return not isinstance(spec, FactoredSpec) or spec.base_width in (0, width)


def layer_weight_error(
    source: Checkpoint, layer: int, folded_expert: FoldedExpert
) -> dict[Projection, float] | None:
    """`||W - folded|| / ||W||` per projection, Frobenius over all experts of a dense layer.

    None if the folded experts have fewer neurons: then weights do not correspond. Sums in fp64;
    one expert in memory at a time.
    """
    lost = dict.fromkeys(PROJECTIONS, 0.0)
    total = dict.fromkeys(PROJECTIONS, 0.0)
    for expert in range(source.shape.num_experts):
        for projection, folded in zip(PROJECTIONS, folded_expert(expert), strict=True):
            weight = source.expert_weight(layer, expert, projection).double()
            if weight.shape != folded.shape:
                return None
            lost[projection] += float((weight - folded.double()).square().sum())
            total[projection] += float(weight.square().sum())
    # An all-zero weight that stayed zero has lost nothing.
    return {p: math.sqrt(lost[p] / total[p]) if total[p] else lost[p] for p in PROJECTIONS}

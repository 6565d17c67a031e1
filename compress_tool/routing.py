"""Where tokens go when a layer has fewer experts, by transformers' own router module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from compress_tool.checkpoint import Checkpoint
from compress_tool.layer_stats import LayerStatistics
from compress_tool.meta_model import meta_model

TOKEN_CHUNK = 4096
"""Tokens routed at once: bounds the [chunk, E] scores, and is large enough for GEMM."""


def rerouted(
    checkpoint: Checkpoint,
    layer: int,
    statistics: LayerStatistics,
    router: Mapping[str, torch.Tensor],
) -> LayerStatistics:
    """The same tokens sent through a router with other rows.

    `router` has the layer's router tensors by published name, each with one row per expert that
    is left. Gates are what the experts are multiplied with, scaling factors included.
    """
    family = checkpoint.family
    weight_ED = router[family.router_name.format(layer=layer)]
    changed = family.with_num_experts(checkpoint.config, weight_ED.shape[0])
    smaller = dataclasses.replace(checkpoint, config=checkpoint.config | changed)
    model = meta_model(smaller, torch.float32, torch.device("cpu"))
    router_name = family.fused_name(layer, family.router_name.format(layer=layer))
    module = model.get_submodule(router_name.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(weight_ED.float(), requires_grad=False)
    if family.router_bias_name is not None:
        bias_E = router[family.router_bias_name.format(layer=layer)]
        setattr(module, family.router_bias_name.rpartition(".")[2], bias_E.float())
    indices, gates = [], []
    with torch.no_grad():
        for start in range(0, statistics.num_tokens, TOKEN_CHUNK):
            x_cD = statistics.x_TD[start : start + TOKEN_CHUNK].float()
            _, gate_cK, index_cK = module(x_cD)
            indices.append(index_cK)
            gates.append(gate_cK.float())
    return dataclasses.replace(
        statistics,
        index_TK=torch.cat(indices),
        gate_TK=torch.cat(gates),
        num_experts=weight_ED.shape[0],
    )

"""Layer sensitivity S_L of MoE-SVD (paper eq. 4, 9, 10 and Algorithm 1)."""

from __future__ import annotations

from typing import Final

import torch

from compress_tool.factorize.problem import LayerProblem

PRINCIPAL_SHARE: Final = 1e-2
"""A singular value counts towards the principal rank above this share of the largest."""

OUTLIER_FACTOR: Final = 2.0
"""τ of eq. 10: activations above τ times the mean magnitude are outliers."""


def layer_sensitivity(problem: LayerProblem) -> float:
    """S_L = Σ_i f_i r_i a_i.

    f_i is the share of *tokens* routed to expert i, r_i the principal rank, averaged over the
    three weights, a_i the outlier share of the intermediate activations h. The paper does not say
    which weight and which activations; these are the defaults of mathematics §1.1.
    """
    num_tokens = problem.statistics.x_TD.shape[0]
    total = 0.0
    for expert in range(problem.shape.num_experts):
        frequency = problem.statistics.counts_E[expert].item() / max(1, num_tokens)
        if frequency == 0.0:
            continue
        ranks = [_principal_rank(weight) for weight in problem.experts(expert)]
        magnitude_nF = problem.neuron_rows(expert, gated=False).abs()
        outliers = (magnitude_nF > OUTLIER_FACTOR * magnitude_nF.mean()).double().mean().item()
        total += frequency * (sum(ranks) / len(ranks)) * outliers
    return total


def _principal_rank(weight_mn: torch.Tensor) -> int:
    sigma = torch.linalg.svdvals(weight_mn.double())
    return int((sigma > PRINCIPAL_SHARE * sigma.max()).sum())

"""What MoE-SVD measures of a layer: its sensitivity S_L (eq. 4, 9, 10 and Algorithm 1), and what
the choice of k needs (the authors' reply to the reviews)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from compress_tool.factorize.problem import LayerProblem

PRINCIPAL_SHARE: Final = 1e-2
"""A singular value counts towards the principal rank above this share of the largest."""

OUTLIER_FACTOR: Final = 2.0
"""τ of eq. 10: activations above τ times the mean magnitude are outliers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMeasures:
    """S_L, and per expert the sum of singular values s_i; 0 for an expert that no token reached."""

    sensitivity: float
    singular_sums: tuple[float, ...]


def measure_layer(problem: LayerProblem) -> LayerMeasures:
    """S_L = Σ_i f_i r_i a_i, and the s_i.

    f_i is the share of *tokens* routed to expert i, r_i the principal rank, averaged over the
    three weights, a_i the outlier share of the intermediate activations h, s_i the sum of singular
    values, averaged likewise. The paper says neither which weight nor which activations; these are
    the defaults of mathematics §1.1.
    """
    num_tokens = problem.statistics.x_TD.shape[0]
    sensitivity = 0.0
    sums: list[float] = []
    for expert in range(problem.shape.num_experts):
        frequency = problem.statistics.counts_E[expert].item() / max(1, num_tokens)
        if frequency == 0.0:
            sums.append(0.0)
            continue
        spectra = [torch.linalg.svdvals(weight.double()) for weight in problem.experts(expert)]
        ranks = [_principal_rank(spectrum) for spectrum in spectra]
        magnitude_nF = problem.neuron_rows(expert, gated=False).abs()
        outliers = (magnitude_nF > OUTLIER_FACTOR * magnitude_nF.mean()).double().mean().item()
        sensitivity += frequency * (sum(ranks) / len(ranks)) * outliers
        sums.append(sum(spectrum.sum().item() for spectrum in spectra) / len(spectra))
    return LayerMeasures(sensitivity=sensitivity, singular_sums=tuple(sums))


def _principal_rank(sigma: torch.Tensor) -> int:
    return int((sigma > PRINCIPAL_SHARE * sigma.max()).sum())

"""How much an error in one neuron's gate or up projection changes the expert's output."""

from __future__ import annotations

from typing import Final

import torch

from compress_tool.factorize.problem import TOKEN_CHUNK, Activation, LayerProblem
from compress_tool.factorize.products import products

SMALLEST_WEIGHT: Final = 1e-3
"""Of the mean: a neuron that never fired on the calibration text keeps a little of its shape."""

SAMPLED_TOKENS: Final = 1024
"""Of an expert: its weights are averages over tokens, and decide no more than an order of rows."""


RowSensitivity = tuple[torch.Tensor, torch.Tensor]
"""Weights of the rows of gate and of up, fp64 [F] each."""


class RowWeights:
    """Owns the sums over tokens behind the weights of the rows of gate and up (mathematics §3.1).

    To first order a wrong gate pre-activation a_j moves the output by u_j act'(a_j) W2_j, a wrong
    u_j by act(a_j) W2_j; the weights are the squares of both, summed over tokens with g².
    """

    def __init__(self, down_DF: torch.Tensor) -> None:
        """No tokens yet."""
        self._norm_F = down_DF.double().square().sum(dim=0)
        self._gate_F = torch.zeros_like(self._norm_F)
        self._up_F = torch.zeros_like(self._norm_F)

    def add(
        self,
        a_nF: torch.Tensor,
        u_nF: torch.Tensor,
        gate_n1: torch.Tensor,
        activation: Activation,
    ) -> None:
        """Add tokens: gate and up pre-activations [n, F] and routing weights g [n, 1]."""
        with torch.enable_grad():
            leaf_nF = a_nF.detach().requires_grad_(True)
            value_nF = activation(leaf_nF)
            (slope_nF,) = torch.autograd.grad(value_nF.sum(), leaf_nF)
        # In place: at this size fresh memory costs more than the arithmetic.
        self._gate_F += slope_nF.mul_(u_nF).mul_(gate_n1).square_().sum(dim=0).double()
        self._up_F += torch.mul(value_nF.detach(), gate_n1).square_().sum(dim=0).double()

    def result(self) -> RowSensitivity:
        """Weights for gate and for up, fp64 [F], with mean 1; all 1 without tokens."""
        return _normalised(self._gate_F * self._norm_F), _normalised(self._up_F * self._norm_F)


def row_weights(problem: LayerProblem, expert: int) -> RowSensitivity:
    """The weights of one expert over the tokens routed to it, of many over an even sample."""
    gate_FD, up_FD, down_DF = problem.experts(expert)
    sums = RowWeights(down_DF)
    token_n, gate_n = problem.statistics.tokens_of(expert)
    apart = max(1, len(token_n) // SAMPLED_TOKENS)
    token_n, gate_n = token_n[::apart], gate_n[::apart]
    for token_c, gate_c in zip(
        torch.split(token_n, TOKEN_CHUNK), torch.split(gate_n, TOKEN_CHUNK), strict=True
    ):
        x_cD = problem.statistics.x_TD[token_c].float().to(problem.device)
        a_cF, u_cF = products(x_cD, (gate_FD, up_FD))
        sums.add(a_cF, u_cF, gate_c.float().to(problem.device)[:, None], problem.activation)
    return sums.result()


def _normalised(weight_F: torch.Tensor) -> torch.Tensor:
    mean = weight_F.mean()
    if mean <= 0:
        return torch.ones_like(weight_F)
    return (weight_F / mean).clamp(min=SMALLEST_WEIGHT)

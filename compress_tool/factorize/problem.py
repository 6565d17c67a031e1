"""What every solver is given: one layer's weights, the tokens routed to it, and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import split

from compress_tool.factorize.products import product, products
from compress_tool.layer_stats import LayerStatistics
from compress_tool.side_by_side import num_workers, side_by_side
from vllm_moesvd.format import MoEShape

ExpertWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Dense fp32 weights of one expert: gate [F, D], up [F, D], down [D, F]."""

Activation = Callable[[torch.Tensor], torch.Tensor]

TOKEN_CHUNK = 4096
"""Tokens multiplied at once: bounds the [chunk, F] intermediate, and is large enough for GEMM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProblem:
    """One MoE layer to be factored.

    `experts(e)` reads expert e's weights when asked, so that only one expert is in memory.
    `store_dtype` is the dtype the factors will be rounded to: solvers refit against the rounded
    shared factor, so that the rounding of V costs nothing. Weights arrive on the device that
    computes; statistics stay where they are and move there row by row. `base` reads a base for the
    experts that was found beforehand, on the CPU, where the method has one.
    """

    shape: MoEShape
    statistics: LayerStatistics
    experts: Callable[[int], ExpertWeights]
    activation: Activation
    store_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    base: Callable[[], ExpertWeights] | None = None

    def input_rows(self, expert: int, *, gated: bool = True) -> torch.Tensor:
        """Tokens routed to an expert, times their gate if `gated`; fp32 [n, D]."""
        token_n, gate_n = self.statistics.tokens_of(expert)
        x_nD = self.statistics.x_TD[token_n].float().to(self.device)
        return x_nD * gate_n.float().to(self.device)[:, None] if gated else x_nD

    def neuron_rows(self, expert: int, *, gated: bool = True) -> torch.Tensor:
        """Intermediate activations of an expert on its tokens, gated alike; fp32 [n, F]."""
        gate_FD, up_FD, _ = self.experts(expert)
        token_n, gate_n = self.statistics.tokens_of(expert)
        x_nD = self.statistics.x_TD[token_n].float().to(self.device)
        gate_nF, up_nF = products(x_nD, (gate_FD, up_FD))
        h_nF = self.activation(gate_nF).mul_(up_nF)
        return h_nF.mul_(gate_n.float().to(self.device)[:, None]) if gated else h_nF

    @property
    def workers(self) -> int:
        """How many experts a solver works on side by side."""
        return num_workers(self.shape, self.device)


def routed_output(
    statistics: LayerStatistics,
    experts: Callable[[int], ExpertWeights],
    activation: Activation,
    workers: int = 1,
) -> torch.Tensor:
    """y = Σ_e g_e W2_e h_e over the routed experts of every token; fp32 [T, D], on the CPU.

    `workers` experts at once; they are summed in their order whatever the number.
    """
    y_TD = torch.zeros(statistics.x_TD.shape, dtype=torch.float32)

    def chunks(expert: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        token_n, gate_n = statistics.tokens_of(expert)
        if token_n.numel() == 0:
            return []
        gate_FD, up_FD, down_DF = experts(expert)
        found = []
        for token_c, gate_c in zip(
            split(token_n, TOKEN_CHUNK), split(gate_n, TOKEN_CHUNK), strict=True
        ):
            x_cD = statistics.x_TD[token_c].float().to(gate_FD.device)
            gate_cF, up_cF = products(x_cD, (gate_FD, up_FD))
            y_cD = product(activation(gate_cF).mul_(up_cF), down_DF).cpu()
            found.append((token_c, y_cD.mul_(gate_c.float()[:, None])))
        return found

    for found in side_by_side(chunks, range(statistics.num_experts), workers):
        for token_c, y_cD in found:
            y_TD.index_add_(0, token_c, y_cD)
    return y_TD


def energy(y_TD: torch.Tensor) -> float:
    """‖y‖² in fp64, a chunk of tokens at a time."""
    return sum(rows.double().square().sum().item() for rows in split(y_TD, TOKEN_CHUNK))


def relative_error(y_TD: torch.Tensor, approximation_TD: torch.Tensor) -> float:
    """‖y − ŷ‖² / ‖y‖², in fp64 sums; 0 for a layer whose output is all zero and stays so."""
    error = sum(
        (rows.double() - other.double()).square().sum().item()
        for rows, other in zip(
            split(y_TD, TOKEN_CHUNK), split(approximation_TD, TOKEN_CHUNK), strict=True
        )
    )
    total = energy(y_TD)
    if total == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / total

"""Method `svd`: per expert and projection, the best rank-R product for the expert's gated tokens.

Minimises ‖(W − U V) Xᵀ‖² for the gated tokens X of one expert, and refits U to the V that is
stored. No SVD is computed and nothing larger than the smaller side of W is decomposed:

* W wide or square: the eigenvectors of (X Wᵀ)ᵀ(X Wᵀ) are U; V = Uᵀ W needs no inverse.
* W tall: XᵀX = S Sᵀ is shared by gate and up; the eigenvectors of Sᵀ(WᵀW)S, times S⁻¹, are V.

Products over tokens run in fp64 up to PRECISE_SIZE, above it in fp32 chunks summed in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from compress_tool.errors import NumericsError
from compress_tool.factorize.per_expert import Truncated, stacked_solution
from compress_tool.factorize.problem import LayerProblem
from compress_tool.factorize.shared_v import SharedSolution
from compress_tool.factorize.whitening import DAMPING, solve_spd, symmetric_eigen
from vllm_moesvd.format import PROJECTIONS, Projection

PRECISE_SIZE: Final = 512
"""Up to this width fp64 products cost nothing that matters."""

CHUNK_ROWS: Final = 4096
"""Tokens multiplied at once; fp32 sums stay this short before they enter an fp64 sum."""


class _Inputs:
    """The gated inputs of one expert's projections, and their whitening once it is asked for."""

    def __init__(self, rows_tn: torch.Tensor) -> None:
        self.size = rows_tn.shape[1]
        self.dtype = torch.float64 if self.size <= PRECISE_SIZE else torch.float32
        self.rows_tn = rows_tn
        energy = rows_tn.double().square().sum().item()
        # As `whitening.damped`: keeps few tokens invertible; without any, all inputs are equal.
        self.ridge = DAMPING * energy / self.size if energy > 0 else 1.0
        self._root_nn: torch.Tensor | None = None

    def chunks(self) -> Iterator[torch.Tensor]:
        for chunk in torch.split(self.rows_tn, CHUNK_ROWS):
            yield chunk.to(self.dtype)

    def images(self, w_mn: torch.Tensor) -> torch.Tensor:
        """X Wᵀ, one row per token; W itself as its image if there is no token."""
        if len(self.rows_tn) == 0:
            return w_mn.to(self.dtype).T
        wide = w_mn.to(self.dtype)
        return torch.cat([chunk @ wide.T for chunk in self.chunks()])

    def root(self) -> torch.Tensor:
        """S, lower triangular, fp64, with S Sᵀ = XᵀX + ridge I."""
        if self._root_nn is None:
            gram_nn = torch.zeros(
                self.size, self.size, dtype=torch.float64, device=self.rows_tn.device
            )
            for chunk in self.chunks():
                gram_nn += (chunk.T @ chunk).double()
            gram_nn.diagonal().add_(self.ridge)
            root_nn, info = torch.linalg.cholesky_ex(gram_nn)
            if int(info) != 0:
                raise NumericsError(
                    "the Gram of an expert's inputs is not positive definite; use more "
                    "calibration text"
                )
            self._root_nn = root_nn
        return self._root_nn


def solve_weighted_svd(problem: LayerProblem, rank_gate_up: int, rank_down: int) -> SharedSolution:
    """Factor one layer, expert by expert."""
    parts: dict[Projection, list[Truncated]] = {projection: [] for projection in PROJECTIONS}
    for expert in range(problem.shape.num_experts):
        gate, up, down = problem.experts(expert)
        inputs = _Inputs(problem.input_rows(expert))
        parts["gate"].append(_factor(gate, inputs, rank_gate_up, problem.store_dtype))
        parts["up"].append(_factor(up, inputs, rank_gate_up, problem.store_dtype))
        neurons = _Inputs(problem.neuron_rows(expert))
        parts["down"].append(_factor(down, neurons, rank_down, problem.store_dtype))

    return stacked_solution(parts, rank_gate_up, rank_down)


def _factor(w_mn: torch.Tensor, inputs: _Inputs, rank: int, store_dtype: torch.dtype) -> Truncated:
    """U and V in fp32, V in the values of `store_dtype`."""
    image_tm: torch.Tensor | None = None
    if w_mn.shape[0] <= w_mn.shape[1]:
        image_tm = inputs.images(w_mn)
        spectrum, vectors_mm = symmetric_eigen(_inner(image_tm, image_tm))
        v_Rn = vectors_mm[:, :rank].T.to(inputs.dtype) @ w_mn.to(inputs.dtype)
    else:
        root_nn = inputs.root()
        wide = w_mn.to(inputs.dtype)
        scaled_nn = root_nn.T @ (wide.T @ wide).double() @ root_nn
        spectrum, vectors_nn = symmetric_eigen(scaled_nn)
        v_Rn = torch.linalg.solve_triangular(
            root_nn, vectors_nn[:, :rank].T, upper=False, left=False
        )
        # Orthonormal rows: V x keeps the scale of x, and half precision its range.
        v_Rn = torch.linalg.qr(v_Rn.T).Q.T
    v_Rn = v_Rn.to(store_dtype).float()
    if image_tm is None:
        image_tm = inputs.images(w_mn)
    image_tR = inputs.images(v_Rn)
    ridge = inputs.ridge if len(inputs.rows_tn) else 0.0
    stored, wide = v_Rn.to(inputs.dtype), w_mn.to(inputs.dtype)
    inner_RR = _inner(image_tR, image_tR) + ridge * (stored @ stored.T).double()
    cross_Rm = _inner(image_tR, image_tm) + ridge * (stored @ wide.T).double()
    u_mR = solve_spd(inner_RR, cross_Rm).T
    return Truncated(u_mR=u_mR.float(), v_Rn=v_Rn, spectrum=spectrum)


def _inner(left_ta: torch.Tensor, right_tb: torch.Tensor) -> torch.Tensor:
    """leftᵀ right in fp64, summed over chunks of rows."""
    total_ab = torch.zeros(
        left_ta.shape[1], right_tb.shape[1], dtype=torch.float64, device=left_ta.device
    )
    for left, right in zip(
        torch.split(left_ta, CHUNK_ROWS), torch.split(right_tb, CHUNK_ROWS), strict=True
    ):
        total_ab += (left.T @ right).double()
    return total_ab

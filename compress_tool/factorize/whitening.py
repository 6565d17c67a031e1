"""Dense linear algebra of the solvers: Grams, damping, square roots, top eigenvectors. All fp64."""

from __future__ import annotations

import torch

from compress_tool.errors import NumericsError

GRAM_CHUNK = 4096
"""Rows multiplied at once while a Gram is accumulated."""

DAMPING = 1e-6
"""Share of the mean eigenvalue added to every Gram.

It has to keep a rank-deficient Gram invertible in fp64, no more: experts with few tokens are
regularised by shrinkage towards the pooled Gram, not by this.
"""


def gram(rows_nD: torch.Tensor, device: str | None = None) -> torch.Tensor:
    """Σ_n row rowᵀ in fp64 [D, D], on `device` if given; independent of the chunking."""
    size = rows_nD.shape[1]
    target = rows_nD.device if device is None else torch.device(device)
    total_DD = torch.zeros(size, size, dtype=torch.float64, device=target)
    for chunk_cD in torch.split(rows_nD, GRAM_CHUNK):
        wide_cD = chunk_cD.to(target).double()
        total_DD += wide_cD.T @ wide_cD
    return total_DD


def damped(gram_DD: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Add `damping` times the mean eigenvalue to the diagonal; the identity for a zero Gram."""
    size = gram_DD.shape[0]
    mean = gram_DD.diagonal().sum() / size
    eye_DD = torch.eye(size, dtype=gram_DD.dtype, device=gram_DD.device)
    if mean <= 0:
        return eye_DD
    return gram_DD + damping * mean * eye_DD


def symmetric_eigen(matrix_DD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first, and eigenvectors as columns; raises NumericsError on NaN/Inf.

    Symmetric up to rounding is enough: the lower triangle counts.
    """
    # A sum shows what its terms are, unless it overflows by itself: then each term is looked at.
    if not bool(torch.isfinite(matrix_DD.sum())) and not bool(torch.isfinite(matrix_DD).all()):
        raise NumericsError(
            "a statistics matrix has NaN or infinite entries: the calibration activations "
            "overflow; calibrate in float32 or on other text"
        )
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return values_D.flip(0), vectors_DD.flip(1)


def orthonormal_rows(v_RD: torch.Tensor) -> torch.Tensor:
    """Rows that span the same space and are orthonormal: z = V x then keeps the scale of x."""
    q_DR: torch.Tensor = torch.linalg.qr(v_RD.T).Q
    return q_DR.T.contiguous()


def solve_spd(gram_RR: torch.Tensor, right_RM: torch.Tensor) -> torch.Tensor:
    """Solve gram @ x = right for a positive definite matrix; least squares if it is singular."""
    factor_RR, info = torch.linalg.cholesky_ex(gram_RR)
    if int(info) == 0:
        return torch.cholesky_solve(right_RM, factor_RR)
    values_R, vectors_RR = symmetric_eigen(gram_RR)
    keep_R = values_R > values_R[0] * gram_RR.shape[0] * torch.finfo(torch.float64).eps
    inverse_R = torch.where(keep_R, 1.0 / values_R, torch.zeros_like(values_R))
    return vectors_RR @ (inverse_R[:, None] * (vectors_RR.T @ right_RM))


def tail_share(spectrum_D: torch.Tensor, rank: int) -> float:
    """Share of a spectrum's sum that lies behind the first `rank` values."""
    spectrum_D = spectrum_D.clamp(min=0)
    total = spectrum_D.sum().item()
    return spectrum_D[rank:].sum().item() / total if total > 0 else 0.0

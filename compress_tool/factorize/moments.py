"""Second moments of few tokens: what keeps them definite, and orders what no token showed."""

from __future__ import annotations

from typing import Final

import torch

from compress_tool.errors import NumericsError
from compress_tool.factorize.products import product

FURTHER_DAMPING: Final = (1e-5, 1e-4, 1e-3)

UNSEEN_SHARE: Final = 1e-4
"""Weight of W Wᵀ beside a moment of fewer tokens than rows: above the rounding of fp32 products,
and no matter for the directions that tokens do show."""


def completed(moment_mm: torch.Tensor, w_mn: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Plus a little W Wᵀ where there are fewer tokens than rows: it orders, by their weight, the
    directions that no token shows, which are rounding noise otherwise."""
    if num_tokens >= len(w_mn):
        return moment_mm
    plain_mm = product(w_mn, w_mn).double()
    seen, whole = moment_mm.trace().item(), plain_mm.trace().item()
    share = UNSEEN_SHARE * seen / whole if seen > 0 and whole > 0 else 1.0
    return moment_mm + share * plain_mm


def ridged(gram_nn: torch.Tensor, share: float) -> torch.Tensor:
    """Plus `share` of the mean eigenvalue, in place; the identity where all is zero."""
    mean = gram_nn.diagonal().mean().item()
    gram_nn.diagonal().add_(share * mean if mean > 0 else 1.0)
    return gram_nn


def cholesky(gram_nn: torch.Tensor) -> torch.Tensor:
    """Lower root; of few tokens fp32 rounding may be more than the damping, which then grows.

    Raises NumericsError if that does not help.
    """
    mean = gram_nn.diagonal().mean()
    for share in (0.0, *FURTHER_DAMPING):
        gram_nn.diagonal().add_(share * mean)
        root_nn, info = torch.linalg.cholesky_ex(gram_nn)
        if int(info) == 0:
            return torch.as_tensor(root_nn)
    raise NumericsError(
        "the Gram of an expert's inputs is not positive definite; use more calibration text"
    )

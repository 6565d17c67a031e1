"""How near two computations of the same layer must be: twice the noise measured on them.

Both the whole (root mean square) and the worst token count, relative to the expected values, so a
single dropped token fails as surely as a scaled output.
"""

from __future__ import annotations

from typing import Final

import torch

RMS_LIMIT: Final = {torch.float32: 7e-7, torch.bfloat16: 2.2e-2}
WORST_ROW_LIMIT: Final = {torch.float32: 1.8e-6, torch.bfloat16: 4e-2}


def distance(actual_TD: torch.Tensor, expected_TD: torch.Tensor) -> tuple[float, float]:
    """Relative error of the whole and of the worst row; rows of zeros must be zeros."""
    error_T = (actual_TD.double() - expected_TD.double()).norm(dim=1)
    size_T = expected_TD.double().norm(dim=1)
    whole = float(error_T.norm() / size_T.norm())
    return whole, float((error_T / size_T.clamp_min(1e-30)).max())


def are_close(
    actual_TD: torch.Tensor, expected_TD: torch.Tensor, dtype: torch.dtype = torch.float32
) -> bool:
    whole, worst = distance(actual_TD, expected_TD)
    return whole <= RMS_LIMIT[dtype] and worst <= WORST_ROW_LIMIT[dtype]

"""Triton kernels of the general forms, and one of latent layers; `docs/kernels.md` is their guide.

This module imports no Triton. vLLM replaces Triton by a placeholder on machines without a GPU, so
the kernels import it directly, and only where `can_run` says that they will be used.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def can_run(x_TD: torch.Tensor) -> bool:
    """Whether the kernels serve this input: a GPU, half precision, and Triton installed."""
    half = x_TD.dtype in (torch.bfloat16, torch.float16)
    return x_TD.is_cuda and half and find_spec("triton") is not None

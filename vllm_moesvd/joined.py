"""Products of the same tokens with several matrices, as one opaque operator.

Opaque, because how they are computed depends on the number of tokens: one launch for few
(`kernels.joined`), a product of torch for each matrix otherwise. A compiler must not fix that
choice when it traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from vllm_moesvd import kernels
from vllm_moesvd.kernels.plan import MAX_JOINED_TOKENS


@torch.library.custom_op("moesvd::joined_linear", mutates_args=())
def joined_linear(
    x_TD: torch.Tensor, weights: Sequence[torch.Tensor], first_in_fp32: bool
) -> list[torch.Tensor]:
    """`x @ w.T` [T, N] for each `w` [N, D] of one to four; the first one in fp32 if asked for.

    Sums are fp32 everywhere. Weights are contiguous and of x's type.
    """
    is_few = 0 < x_TD.shape[0] <= MAX_JOINED_TOKENS and x_TD.stride(1) == 1
    if is_few and kernels.can_run(x_TD):
        # These modules import Triton, which only a machine with a GPU must have.
        from vllm_moesvd.kernels import joined
        from vllm_moesvd.kernels.tiles import device_arch, tile_table

        outs = _outputs(x_TD, weights, first_in_fp32)
        table = tile_table(device_arch(x_TD.device.index), x_TD.element_size())
        joined.joined_linear(x_TD, weights, outs, table)
        return outs
    first, *rest = weights
    others = [functional.linear(x_TD, w) for w in rest]
    if not first_in_fp32 or x_TD.dtype == torch.float32:
        return [functional.linear(x_TD, first), *others]
    if x_TD.is_cuda:
        # As vLLM's router does it: cuBLAS writes its fp32 sums.
        return [torch.mm(x_TD, first.t(), out_dtype=torch.float32), *others]
    return [functional.linear(x_TD, first).float(), *others]


@joined_linear.register_fake
def _joined_linear_fake(
    x_TD: torch.Tensor, weights: Sequence[torch.Tensor], first_in_fp32: bool
) -> list[torch.Tensor]:
    return _outputs(x_TD, weights, first_in_fp32)


def _outputs(
    x_TD: torch.Tensor, weights: Sequence[torch.Tensor], first_in_fp32: bool
) -> list[torch.Tensor]:
    # Not `len`: while tracing it would fix the number of tokens.
    tokens, first_dtype = x_TD.shape[0], torch.float32 if first_in_fp32 else x_TD.dtype
    return [
        x_TD.new_empty(tokens, w.shape[0], dtype=x_TD.dtype if i else first_dtype)
        for i, w in enumerate(weights)
    ]

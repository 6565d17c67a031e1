"""The products of few tokens with several matrices, in one launch: `out_i = x @ w_i.T`.

| matrix of a latent layer                | columns | out                                   |
|-----------------------------------------|---------|---------------------------------------|
| router                                  | E       | logits (T, E), in fp32 where asked for |
| V                                       | R       | z (T, R)                              |
| gate and up of the shared experts       | 2 F     | (T, 2 F)                              |
| the gate of the shared expert           | 1       | (T, 1)                                |

Each program takes one tile of columns of one of the matrices, for all tokens, and writes to the
output of that matrix: nothing is stacked before and nothing copied after. The depth is not split,
so no sum follows; narrow tiles make up for it (`plan.plan_joined`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.plan import plan_joined
from vllm_moesvd.kernels.tiles import TileTable

MAX_MATRICES: Final = 4


def _joined_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    rows, depth, x = args["num_tokens"], args["depth"], args["x_ptr"]
    columns = [args[f"cols_{i}"] for i in range(MAX_MATRICES)]
    outs = [args[f"out_{i}_ptr"] for i in range(MAX_MATRICES)]
    written = sum(rows * c * out.element_size() for c, out in zip(columns, outs, strict=True) if c)
    num_bytes = x.element_size() * depth * (rows + sum(columns)) + written
    name = f"{metadata.name} [M = {rows}, N = {sum(columns)}, K = {depth}]"
    return launching.work(name, 2 * rows * sum(columns) * depth, num_bytes)


@triton.jit(launch_metadata=_joined_work, do_not_specialize=["num_tokens"])
def joined_kernel(
    x_ptr,  # (num_tokens, depth)
    w_0_ptr,  # (cols_0, depth)
    w_1_ptr,  # (cols_1, depth) if MATRICES > 1, and so on
    w_2_ptr,
    w_3_ptr,
    out_0_ptr,  # (num_tokens, cols_0), of a type of its own
    out_1_ptr,  # (num_tokens, cols_1) if MATRICES > 1, and so on; all of one type
    out_2_ptr,
    out_3_ptr,
    num_tokens,
    depth,
    stride_x,
    cols_0,
    cols_1,
    cols_2,
    cols_3,
    MATRICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # depth is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
):
    """Grid: (tiles of columns of all matrices,), those of the first matrix first."""
    tile = tl.program_id(0)
    end = tl.cdiv(cols_0, BLOCK_N)
    is_first = tile < end
    first = 0
    w_ptr = w_0_ptr
    num_cols = cols_0
    if MATRICES > 1:
        out_ptr = out_1_ptr
        first = tl.where(is_first, first, end)
        w_ptr = tl.where(is_first, w_ptr, w_1_ptr)
        num_cols = tl.where(is_first, num_cols, cols_1)
    if MATRICES > 2:
        end += tl.cdiv(cols_1, BLOCK_N)
        first = tl.where(tile < end, first, end)
        w_ptr = tl.where(tile < end, w_ptr, w_2_ptr)
        out_ptr = tl.where(tile < end, out_ptr, out_2_ptr)
        num_cols = tl.where(tile < end, num_cols, cols_2)
    if MATRICES > 3:
        end += tl.cdiv(cols_2, BLOCK_N)
        first = tl.where(tile < end, first, end)
        w_ptr = tl.where(tile < end, w_ptr, w_3_ptr)
        out_ptr = tl.where(tile < end, out_ptr, out_3_ptr)
        num_cols = tl.where(tile < end, num_cols, cols_3)
    m = tl.arange(0, BLOCK_M)
    n = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_row = m < num_tokens
    is_col = n < num_cols
    x_tile = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w_ptr + n.to(tl.int64)[None, :] * depth + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        is_x, is_w = is_row[:, None], is_col[None, :]
        if not WHOLE_STEPS:
            inside = start + k < depth
            is_x, is_w = is_x & inside[None, :], is_w & inside[:, None]
        x = tl.load(x_tile + start, mask=is_x, other=0.0)
        w = tl.load(w_tile + start, mask=is_w, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    at = m.to(tl.int64)[:, None] * num_cols + n[None, :]
    mask = is_row[:, None] & is_col[None, :]
    # Two stores, because the first output may be of another type than the others.
    if is_first:
        tl.store(out_0_ptr + at, acc.to(out_0_ptr.dtype.element_ty), mask=mask)
    if MATRICES > 1:  # noqa: SIM102, a constant around a value
        if not is_first:
            tl.store(out_ptr + at, acc.to(out_1_ptr.dtype.element_ty), mask=mask)


def joined_linear(
    x_TD: torch.Tensor,
    weights: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    table: TileTable,
) -> None:
    """Launch `joined_kernel`: `outs[i] [T, N_i]` from `weights[i] [N_i, D]`, one to four of them.

    At most `plan.MAX_JOINED_TOKENS` tokens; x and the weights are of one 16-bit type (in the
    interpreter also fp32), and so are the outputs, but the first, whose type is free. All are
    contiguous; of x it is enough that its rows are.
    """
    columns = tuple(len(weight) for weight in weights)
    block_m, tile = plan_joined(len(x_TD), columns, table)
    absent = [None] * (MAX_MATRICES - len(weights))
    launching.launch(
        joined_kernel,
        (sum(-(-c // tile.block_n) for c in columns),),
        x_ptr=x_TD,
        **{f"w_{i}_ptr": w for i, w in enumerate([*weights, *absent])},
        **{f"out_{i}_ptr": out for i, out in enumerate([*outs, *absent])},
        num_tokens=len(x_TD),
        depth=x_TD.shape[1],
        stride_x=x_TD.stride(0),
        **{f"cols_{i}": c for i, c in enumerate([*columns, *([0] * len(absent))])},
        MATRICES=len(weights),
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        WHOLE_STEPS=x_TD.shape[1] % tile.block_k == 0,
        UPCAST=launching.is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

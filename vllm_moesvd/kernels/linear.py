"""Rows times the transposed matrix of their key: `out[p] = a[row(p)] @ w[key(p)].T`.

| use             | rows `p`             | `row(p)`     | key   | out                        |
|-----------------|----------------------|--------------|-------|----------------------------|
| V gate, V up    | tokens (one group)   | `p`          | 0     | z (T, 2, R)                |
| V gate, V up    | positions            | token of `p` | group | z (N, 2, R)                |
| V down          | positions            | `p`          | group | w (N, Q)                   |
| U down          | positions            | `p`          | slot  | y (N, D), times the weight |

One kernel for all four: cuBLAS would serve the first when many tokens come, but there it is a few
per cent of the layer's work, and when few come one launch reads both matrices.

Split: where rows and columns make too few programs to fill the GPU, the depth is cut in parts that
write fp32 partial results, and `sum_rows` adds those in order. No atomics: results are the same
bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.tiles import Tile


def _linear_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    a, w, columns, depth = args["a_ptr"], args["w_ptr"], args["num_cols"], args["depth"]
    rows, columns = args["num_rows"], columns * args["HALVES"]
    keys = min(rows, w.shape[0])
    num_bytes = a.element_size() * (keys * columns * depth + rows * (columns + depth))
    name = f"{metadata.name} [M = {rows}, N = {columns}, K = {depth}]"
    return launching.work(name, 2 * rows * columns * depth, num_bytes)


@triton.jit
def _tile_of(pid, num_row_blocks, num_col_blocks, GROUP_M: tl.constexpr):
    """Row and column block of a program: GROUP_M row blocks go through the columns together."""
    width = GROUP_M * num_col_blocks
    first = pid // width * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    return first + pid % width % height, pid % width // height


@triton.jit(
    launch_metadata=_linear_work,
    do_not_specialize=["num_rows", "num_row_blocks", "top_k", "stride_part"],
)
def linear_kernel(
    a_ptr,  # (*, depth) activations
    w_ptr,  # (keys, num_cols, depth)
    w_second_ptr,  # the same shape; the second half of the columns if HALVES is 2
    out_ptr,  # (parts, rows, HALVES * num_cols); one part unless split
    gate_ptr,  # (N,) fp32 by pair, read if GATED
    pair_ptr,  # (N,) int32, read if GATED or TOKENS
    blocks_ptr,  # (3, B) int32, read if TABLE
    num_blocks_ptr,  # (1,) int32, read if TABLE
    num_rows,
    num_row_blocks,
    top_k,
    num_cols,
    depth,
    depth_per_part,  # a multiple of BLOCK_K
    stride_a,
    stride_key,
    stride_w,
    stride_out,
    stride_part,
    HALVES: tl.constexpr,
    TABLE: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (row blocks * column blocks, parts). Row blocks beyond the filled ones end at once."""
    cols_per_half = tl.cdiv(num_cols, BLOCK_N)
    block, col_block = _tile_of(tl.program_id(0), num_row_blocks, HALVES * cols_per_half, GROUP_M)
    m = tl.arange(0, BLOCK_M)
    if TABLE:
        if block >= tl.load(num_blocks_ptr):
            return
        key = tl.load(blocks_ptr + block).to(tl.int64)
        position = tl.load(blocks_ptr + num_row_blocks + block) + m
        is_row = m < tl.load(blocks_ptr + 2 * num_row_blocks + block)
    else:
        key = tl.full([], 0, tl.int64)
        position = block * BLOCK_M + m
        is_row = position < num_rows
    row = position
    if TOKENS:
        row = tl.load(pair_ptr + position, mask=is_row, other=0) // top_k
    half = col_block // cols_per_half
    n = col_block % cols_per_half * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    begin = part * depth_per_part
    end = tl.minimum(begin + depth_per_part, depth)
    if HALVES == 2:
        w_ptr = tl.where(half == 0, w_ptr, w_second_ptr)
    a_tile = a_ptr + row.to(tl.int64)[:, None] * stride_a + k[None, :]
    w_tile = w_ptr + key * stride_key + n.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        inside = start + k < end
        a = tl.load(a_tile + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_tile + start, mask=(n < num_cols)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    if GATED:
        pair = tl.load(pair_ptr + position, mask=is_row, other=0)
        acc *= tl.load(gate_ptr + pair, mask=is_row, other=0.0)[:, None]
    out = out_ptr + part.to(tl.int64) * stride_part + half * num_cols
    out = out + position.to(tl.int64)[:, None] * stride_out + n[None, :]
    mask = is_row[:, None] & (n < num_cols)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _sum_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    terms, rows, columns = args["num_terms"], args["num_rows"], args["num_cols"]
    num_bytes = (
        rows * columns * (terms * args["in_ptr"].element_size() + args["out_ptr"].element_size())
    )
    name = f"{metadata.name} [{terms} x {rows} x {columns}]"
    return launching.work(name, terms * rows * columns, num_bytes)


@triton.jit(launch_metadata=_sum_work, do_not_specialize=["num_rows", "num_terms", "stride_term"])
def sum_kernel(
    in_ptr,  # GATHER: (N, C) rows by sorted position; otherwise (num_terms, rows, C)
    position_ptr,  # (rows * num_terms,) int32, -1 for a term that does not exist; if GATHER
    out_ptr,  # (rows, C)
    num_rows,
    num_cols,
    num_terms,
    stride_term,
    stride_in,
    stride_out,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, ceil(C / BLOCK)). Terms are added in ascending order, in fp32."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for term in range(num_terms):
        if GATHER:
            position = tl.load(position_ptr + row.to(tl.int64) * num_terms + term)
            source = in_ptr + position.to(tl.int64) * stride_in
            mask = c < tl.where(position >= 0, num_cols, 0)
        else:
            term_64 = tl.zeros([], tl.int64) + term
            source = in_ptr + term_64 * stride_term + row.to(tl.int64) * stride_in
            mask = c < num_cols
        acc += tl.load(source + c, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64) * stride_out + c
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=c < num_cols)


def grouped_linear(
    a: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    *,
    tile: Tile,
    block_m: int,
    num_rows: int,
    num_row_blocks: int,
    parts: int,
    blocks_3B: torch.Tensor | None,
    num_blocks: torch.Tensor | None,
    pair_N: torch.Tensor | None,
    gate_N: torch.Tensor | None,
    top_k: int,
    from_tokens: bool,
) -> None:
    """Launch `linear_kernel` on one or two matrices per key; `out` [parts, rows, columns].

    Without `blocks_3B` the rows are those of `a` and there is one key. `gate_N` multiplies each
    row. `from_tokens` reads the row of the position's token instead of the position's own.
    """
    _, num_cols, depth = w[0].shape
    steps = -(-depth // tile.block_k)
    launching.launch(
        linear_kernel,
        (num_row_blocks * len(w) * -(-num_cols // tile.block_n), parts),
        a_ptr=a,
        w_ptr=w[0],
        w_second_ptr=w[-1],
        out_ptr=out,
        gate_ptr=gate_N,
        pair_ptr=pair_N,
        blocks_ptr=blocks_3B,
        num_blocks_ptr=num_blocks,
        num_rows=num_rows,
        num_row_blocks=num_row_blocks,
        num_cols=num_cols,
        depth=depth,
        depth_per_part=-(-steps // parts) * tile.block_k,
        stride_a=a.stride(0),
        stride_key=w[0].stride(0),
        stride_w=w[0].stride(1),
        stride_out=out.stride(1),
        stride_part=out.stride(0),
        HALVES=len(w),
        TABLE=blocks_3B is not None,
        TOKENS=from_tokens,
        GATED=gate_N is not None,
        top_k=top_k,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        UPCAST=launching.is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def sum_rows(
    terms: torch.Tensor, out_MC: torch.Tensor, *, num_terms: int, position_N: torch.Tensor | None
) -> None:
    """`out[m] = sum over terms`: of `terms` [num_terms, M, C], or of its rows `position_N`."""
    num_rows, num_cols = out_MC.shape
    block = min(1024, triton.next_power_of_2(num_cols))
    launching.launch(
        sum_kernel,
        (num_rows, -(-num_cols // block)),
        in_ptr=terms,
        position_ptr=position_N,
        out_ptr=out_MC,
        num_rows=num_rows,
        num_cols=num_cols,
        num_terms=num_terms,
        stride_term=terms.stride(0),
        stride_in=terms.stride(-2),
        stride_out=out_MC.stride(0),
        GATHER=position_N is not None,
        BLOCK=block,
        num_warps=4,
    )

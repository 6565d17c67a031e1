"""Rows times the transposed matrix of their key: `out[p] = a[row(p)] @ w[key(p)].T`.

| use                | rows `p`             | `row(p)`     | key   | out                        |
|--------------------|----------------------|--------------|-------|----------------------------|
| V gate, V up       | tokens (one group)   | `p`          | 0     | z (T, 2, R)                |
| V gate, V up       | positions            | token of `p` | group | z (N, 2, R)                |
| base gate, base up | tokens               | `p`          | 0     | b (T, 2, B)                |
| V down             | positions            | `p`          | group | w (N, Q), or (C, N, q)     |
| U down             | positions            | `p`          | slot  | y (N, D), times the weight |
| base down          | tokens               | `p`          | 0     | rows N to N + T of y       |

One kernel for all: cuBLAS would serve the first when many tokens come, but there it is a few per
cent of the layer's work, and when few come one launch reads both matrices. The base's products
join those of V and U: as more columns for the same rows, or as more rows for the same columns.

Split: where rows and columns make too few programs to fill the GPU, the depth is cut in parts that
write fp32 partial results, and `sum_rows` adds those in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.tiles import Tile


@dataclass(frozen=True, kw_only=True, slots=True)
class MoreColumns:
    """Matrices [C, depth] that the same rows are multiplied with, into `out` [parts, rows, 2 C]."""

    w: tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MoreRows:
    """Rows `a` [M, depth'] for one matrix [columns, depth']; they follow the others in `out`."""

    a: torch.Tensor
    w: torch.Tensor


def _linear_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    a, w, columns, depth = args["a_ptr"], args["w_ptr"], args["num_cols"], args["depth"]
    rows, halves = args["num_rows"], args["HALVES"]
    more_rows, more_depth = args["more_rows"], args["more_depth"]
    keys, all_columns = min(rows, w.shape[0]), halves * (columns + args["more_cols"])
    numbers = keys * halves * columns * depth + halves * args["more_cols"] * depth
    numbers += rows * (all_columns + depth)
    numbers += columns * more_depth + more_rows * (columns + more_depth)
    flops = 2 * rows * all_columns * depth + 2 * more_rows * columns * more_depth
    name = f"{metadata.name} [M = {rows}, N = {all_columns}, K = {depth}]"
    return launching.work(name, flops, a.element_size() * numbers)


@triton.jit
def _tile_of(pid, num_row_blocks, num_col_blocks, GROUP_M: tl.constexpr):
    """Row and column block of a program: GROUP_M row blocks go through the columns together."""
    width = GROUP_M * num_col_blocks
    first = pid // width * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    return first + pid % width % height, pid % width // height


@triton.jit(
    launch_metadata=_linear_work,
    do_not_specialize=["num_rows", "num_row_blocks", "top_k", "more_rows"],
)
def linear_kernel(
    a_ptr,  # (*, depth) activations
    w_ptr,  # (keys, num_cols, depth)
    w_second_ptr,  # the same shape; the second half of the columns if HALVES is 2
    out_ptr,  # (parts, rows, HALVES * num_cols), or with SHARDED (parts, shards, rows, q)
    gate_ptr,  # (N,) fp32 by pair, read if GATED
    pair_ptr,  # (N,) int32, read if GATED or TOKENS
    blocks_ptr,  # (3, B) int32, read if TABLE
    num_blocks_ptr,  # (1,) int32, read if TABLE
    more_a_ptr,  # (more_rows, more_depth) if MORE_ROWS
    more_w_ptr,  # (more_cols, depth) if MORE_COLS, (num_cols, more_depth) if MORE_ROWS
    more_second_ptr,  # (more_cols, depth) if MORE_COLS
    more_out_ptr,  # (parts, rows, 2 * more_cols) if MORE_COLS; parts as far apart as in out
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
    more_rows,
    more_cols,
    more_depth,
    stride_more_a,
    stride_more_w,
    stride_more_out,
    shard_cols,  # q
    stride_shard,
    HALVES: tl.constexpr,
    TABLE: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    MORE_COLS: tl.constexpr,
    MORE_ROWS: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (row blocks * column blocks, parts). Row blocks beyond the filled ones end at once.

    The blocks of MORE_ROWS come first, because they are all filled and often the deepest.
    """
    cols_per_half = tl.cdiv(num_cols, BLOCK_N)
    num_col_blocks = HALVES * cols_per_half
    first_row_block = 0
    if MORE_COLS:
        num_col_blocks += HALVES * tl.cdiv(more_cols, BLOCK_N)
    if MORE_ROWS:
        first_row_block = tl.cdiv(more_rows, BLOCK_M)
    all_row_blocks = first_row_block + num_row_blocks
    block, col_block = _tile_of(tl.program_id(0), all_row_blocks, num_col_blocks, GROUP_M)
    m = tl.arange(0, BLOCK_M)
    if TABLE:
        index = tl.maximum(block - first_row_block, 0)
        is_of_table = block >= first_row_block
        if is_of_table & (index >= tl.load(num_blocks_ptr)):
            return
        key = tl.load(blocks_ptr + index, mask=is_of_table, other=0).to(tl.int64)
        first = tl.load(blocks_ptr + num_row_blocks + index, mask=is_of_table, other=0)
        height = tl.load(blocks_ptr + 2 * num_row_blocks + index, mask=is_of_table, other=0)
        gated_height = height
        if MORE_ROWS:
            first = tl.where(is_of_table, first, block * BLOCK_M)
            height = tl.where(is_of_table, height, more_rows - first)
    else:
        key = tl.full([], 0, tl.int64)
        first = block * BLOCK_M
        height = num_rows - first
        gated_height = height
    position = first + m
    is_row = m < height
    row = position
    if TOKENS:
        row = tl.load(pair_ptr + position, mask=is_row, other=0) // top_k
    if MORE_COLS:  # noqa: SIM102, a constant around a value
        if col_block >= HALVES * cols_per_half:
            # From here on the program knows these matrices alone; `num_cols` is theirs.
            col_block -= HALVES * cols_per_half
            cols_per_half = tl.cdiv(more_cols, BLOCK_N)
            num_cols = more_cols
            w_ptr = more_w_ptr
            w_second_ptr = more_second_ptr
            out_ptr = more_out_ptr
            stride_w = stride_more_w
            stride_out = stride_more_out
    half = col_block // cols_per_half
    n = col_block % cols_per_half * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    begin = part * depth_per_part
    end = tl.minimum(begin + depth_per_part, depth)
    if HALVES == 2:
        w_ptr = tl.where(half == 0, w_ptr, w_second_ptr)
    if MORE_ROWS:
        is_more = block < first_row_block
        a_ptr = tl.where(is_more, more_a_ptr, a_ptr)
        w_ptr = tl.where(is_more, more_w_ptr, w_ptr)
        stride_a = tl.where(is_more, stride_more_a, stride_a)
        stride_w = tl.where(is_more, stride_more_w, stride_w)
        end = tl.where(is_more, more_depth, end)
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
    out_row = position.to(tl.int64)
    if GATED:
        has_gate = m < gated_height
        pair = tl.load(pair_ptr + position, mask=has_gate, other=0)
        acc *= tl.load(gate_ptr + pair, mask=has_gate, other=1.0)[:, None]
    if MORE_ROWS:
        out_row += tl.where(block < first_row_block, num_rows, 0)
    out = out_ptr + part.to(tl.int64) * stride_part + half * num_cols
    column = n
    if SHARDED:
        column = (n // shard_cols).to(tl.int64) * stride_shard + n % shard_cols
    out = out + out_row[:, None] * stride_out + column[None, :]
    mask = is_row[:, None] & (n < num_cols)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_linear(
    a: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    *,
    tile: Tile,
    block_m: int,
    num_rows: int,
    num_row_blocks: int,
    parts: int = 1,
    blocks_3B: torch.Tensor | None = None,
    num_blocks: torch.Tensor | None = None,
    pair_N: torch.Tensor | None = None,
    gate_N: torch.Tensor | None = None,
    top_k: int,
    from_tokens: bool = False,
    more: MoreColumns | MoreRows | None = None,
) -> None:
    """Launch `linear_kernel` on one or two matrices per key.

    `out` is [parts, rows, columns], or [parts, shards, rows, q] where columns are shards of q: as
    a reduce-scatter between processes takes them, without a copy.

    Without `blocks_3B` the rows are those of `a` and there is one key. `gate_N` multiplies each
    row. `from_tokens` reads the row of the position's token instead of the position's own.
    `MoreRows` needs `blocks_3B` and one part; `MoreColumns` as many matrices as `w`, and none of
    a key's. Their `out` are rows `num_rows` and more of `out`, and an `out` of their own.
    """
    _, num_cols, depth = w[0].shape
    steps = -(-depth // tile.block_k)
    columns = more if isinstance(more, MoreColumns) else None
    rows = more if isinstance(more, MoreRows) else None
    more_cols = columns.w[0].shape[0] if columns else 0
    more_rows, more_depth = rows.a.shape if rows else (0, 0)
    col_blocks = -(-num_cols // tile.block_n) + -(-more_cols // tile.block_n)
    row_blocks = num_row_blocks + -(-more_rows // block_m)
    shard_cols, stride_shard = (out.shape[3], out.stride(1)) if out.dim() == 4 else (0, 0)
    more_w = columns.w if columns else ((rows.w,) if rows else None)
    launching.launch(
        linear_kernel,
        (row_blocks * len(w) * col_blocks, parts),
        a_ptr=a,
        w_ptr=w[0],
        w_second_ptr=w[-1],
        out_ptr=out,
        gate_ptr=gate_N,
        pair_ptr=pair_N,
        blocks_ptr=blocks_3B,
        num_blocks_ptr=num_blocks,
        more_a_ptr=rows.a if rows else None,
        more_w_ptr=more_w[0] if more_w else None,
        more_second_ptr=columns.w[1] if columns else None,
        more_out_ptr=columns.out if columns else None,
        num_rows=num_rows,
        num_row_blocks=num_row_blocks,
        num_cols=num_cols,
        depth=depth,
        depth_per_part=-(-steps // parts) * tile.block_k,
        stride_a=a.stride(0),
        stride_key=w[0].stride(0),
        stride_w=w[0].stride(1),
        stride_out=out.stride(-2),
        stride_part=out.stride(0),
        more_rows=more_rows,
        more_cols=more_cols,
        more_depth=more_depth,
        stride_more_a=rows.a.stride(0) if rows else 0,
        stride_more_w=more_w[0].stride(0) if more_w else 0,
        stride_more_out=columns.out.stride(1) if columns else 0,
        shard_cols=shard_cols,
        stride_shard=stride_shard,
        HALVES=len(w),
        TABLE=blocks_3B is not None,
        TOKENS=from_tokens,
        GATED=gate_N is not None,
        MORE_COLS=columns is not None,
        MORE_ROWS=rows is not None,
        SHARDED=shard_cols > 0,
        top_k=top_k,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        UPCAST=launching.is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

"""The neurons of each row's slot: `h[p] = silu(z_gate @ U_gate.T) * (z_up @ U_up.T)`.

Both products of a tile live in registers until the activation is applied, so gate and up
themselves never reach memory. `z` has one row per token if all slots share one V group, otherwise
one per sorted position; `h` has one row per sorted position. What a base contributes to gate and
up is the same for all slots, so it is added here from one row per token.

In tensor parallelism `z` comes as an all-gather leaves it, one process's ranks after the other's,
and is read from there: putting rows together would be a launch, and a pass over z.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.linear import _tile_of
from vllm_moesvd.kernels.routing import Routing
from vllm_moesvd.kernels.tiles import Tile


def _gate_up_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    z, u, rows = args["z_ptr"], args["u_gate_ptr"], args["num_rows"]
    width, rank = args["width"], args["rank"]
    num_bytes = z.element_size() * (
        2 * min(rows, u.shape[0]) * width * rank + 2 * z.shape[1] * rank + rows * width
    )
    if args["BASE"]:
        num_bytes += args["base_ptr"].nbytes
    name = f"{metadata.name} [M = {rows}, N = 2 x {width}, K = {rank}]"
    return launching.work(name, 4 * rows * width * rank, num_bytes)


@triton.jit(
    launch_metadata=_gate_up_work,
    do_not_specialize=["num_rows", "num_row_blocks", "top_k"],
)
def gate_up_kernel(
    z_ptr,  # (C, T or N, 2, r): shards, gate and up; R = C * r
    u_gate_ptr,  # (S, F, R)
    u_up_ptr,  # (S, F, R)
    h_ptr,  # (N, F)
    base_ptr,  # (T, 2, B): gate, up, read if BASE
    pair_ptr,  # (N,) int32, read if TOKENS or BASE
    blocks_ptr,  # (3, B) int32
    num_blocks_ptr,  # (1,) int32
    num_rows,
    num_row_blocks,
    top_k,
    width,
    rank,
    stride_z,
    stride_half,
    stride_slot,
    stride_u,
    stride_h,
    base_width,
    shard_rank,  # r
    stride_shard,
    TOKENS: tl.constexpr,
    BASE: tl.constexpr,
    SHARDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: (row blocks * column blocks,). Row blocks beyond the filled ones end at once."""
    block, col_block = _tile_of(tl.program_id(0), num_row_blocks, tl.cdiv(width, BLOCK_N), GROUP_M)
    if block >= tl.load(num_blocks_ptr):
        return
    slot = tl.load(blocks_ptr + block).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    position = tl.load(blocks_ptr + num_row_blocks + block) + m
    is_row = m < tl.load(blocks_ptr + 2 * num_row_blocks + block)
    row = position
    token = position
    if TOKENS or BASE:
        token = tl.load(pair_ptr + position, mask=is_row, other=0) // top_k
    if TOKENS:
        row = token
    n = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    z_rows = z_ptr + row.to(tl.int64)[:, None] * stride_z
    u_tile = slot * stride_slot + n.to(tl.int64)[None, :] * stride_u + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, rank, BLOCK_K):
        column = start + k
        inside = column < rank
        z_tile = z_rows + column[None, :]
        if SHARDED:
            shard = (column // shard_rank).to(tl.int64)
            z_tile = z_rows + (shard * stride_shard + column % shard_rank)[None, :]
        z_mask = is_row[:, None] & inside[None, :]
        u_mask = (n < width)[None, :] & inside[:, None]
        z_gate = tl.load(z_tile, mask=z_mask, other=0.0)
        u_gate = tl.load(u_gate_ptr + u_tile + start, mask=u_mask, other=0.0)
        z_up = tl.load(z_tile + stride_half, mask=z_mask, other=0.0)
        u_up = tl.load(u_up_ptr + u_tile + start, mask=u_mask, other=0.0)
        if UPCAST:
            z_gate, u_gate = z_gate.to(tl.float32), u_gate.to(tl.float32)
            z_up, u_up = z_up.to(tl.float32), u_up.to(tl.float32)
        gate = tl.dot(z_gate, u_gate, gate, input_precision="ieee")
        up = tl.dot(z_up, u_up, up, input_precision="ieee")
    if BASE:
        base = base_ptr + token.to(tl.int64)[:, None] * (2 * base_width) + n[None, :]
        base_mask = is_row[:, None] & (n < tl.minimum(base_width, width))[None, :]
        gate += tl.load(base, mask=base_mask, other=0.0).to(tl.float32)
        up += tl.load(base + base_width, mask=base_mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    out = h_ptr + position.to(tl.int64)[:, None] * stride_h + n[None, :]
    mask = is_row[:, None] & (n < width)[None, :]
    tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask)


def gate_up(
    z_CM2r: torch.Tensor,
    u_gate_SFR: torch.Tensor,
    u_up_SFR: torch.Tensor,
    h_NF: torch.Tensor,
    routing: Routing,
    *,
    tile: Tile,
    top_k: int,
    from_tokens: bool,
    base_T2B: torch.Tensor | None = None,
) -> None:
    """Launch `gate_up_kernel`; rows of `h_NF` beyond the computed pairs are not written.

    `z_CM2r` are C shards of the ranks; `base_T2B` is contiguous and is added to the first B
    neurons of every slot.
    """
    _, width, rank = u_gate_SFR.shape
    shards, _, _, shard_rank = z_CM2r.shape
    if shards * shard_rank != rank:
        raise ValueError(
            f"moesvd: z of {shards} x {shard_rank} ranks for factors U of {rank}; "
            "is an exchange between processes missing?"
        )
    num_row_blocks = routing.slots_3B.shape[1]
    launching.launch(
        gate_up_kernel,
        (num_row_blocks * -(-width // tile.block_n),),
        z_ptr=z_CM2r,
        u_gate_ptr=u_gate_SFR,
        u_up_ptr=u_up_SFR,
        h_ptr=h_NF,
        base_ptr=base_T2B,
        pair_ptr=routing.pair_N,
        blocks_ptr=routing.slots_3B,
        num_blocks_ptr=routing.num_blocks,
        num_rows=h_NF.shape[0],
        num_row_blocks=num_row_blocks,
        width=width,
        rank=rank,
        stride_z=z_CM2r.stride(1),
        stride_half=z_CM2r.stride(2),
        stride_slot=u_gate_SFR.stride(0),
        stride_u=u_gate_SFR.stride(1),
        stride_h=h_NF.stride(0),
        base_width=0 if base_T2B is None else base_T2B.shape[2],
        shard_rank=shard_rank,
        stride_shard=z_CM2r.stride(0),
        TOKENS=from_tokens,
        BASE=base_T2B is not None,
        SHARDED=shards > 1,
        top_k=top_k,
        BLOCK_M=routing.slot_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        UPCAST=launching.is_interpreted(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

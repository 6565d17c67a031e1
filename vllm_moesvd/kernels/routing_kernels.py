"""The kernels of `routing.py`, whose table says what each tensor is."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

BLOCK_ARGUMENTS: Final = ("stride_slots", "stride_groups", "slot_rows", "group_rows")
"""They change with the number of tokens: specialised, kernels would be compiled while serving."""


@triton.jit
def _keys(
    ids_ptr,
    weights_ptr,
    rank_ptr,
    tile,
    num_tokens,
    num_experts,
    stride_ids,
    stride_weights,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Ranks and routing weights [TOKENS * K_PAD] of a tile's pairs, slots merged; and the pairs.

    Example: ranks (4, 2, 4) with weights (.5, .3, .2) give (4, 2, -1) with (.7, .3, 0).
    """
    t = tile * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PAD)
    exists = (t[:, None] < num_tokens) & (k[None, :] < TOP_K)
    row = t[:, None].to(tl.int64)
    expert = tl.load(ids_ptr + row * stride_ids + k[None, :], mask=exists, other=-1).to(tl.int32)
    known = (expert >= 0) & (expert < num_experts)
    rank = tl.load(rank_ptr + expert, mask=known, other=-1)
    weight = tl.load(weights_ptr + row * stride_weights + k[None, :], mask=exists, other=0.0)
    gate = weight.to(tl.float32)
    if MERGE:
        same = (rank[:, :, None] == rank[:, None, :]) & (rank[:, :, None] >= 0)
        earlier = k[None, None, :] < k[None, :, None]
        is_repeat = tl.sum((same & earlier).to(tl.int32), axis=2) > 0
        gate = tl.sum(tl.where(same, gate[:, None, :], 0.0), axis=2)
        gate = tl.where(is_repeat, 0.0, gate)
        rank = tl.where(is_repeat, -1, rank)
    size: tl.constexpr = TOKENS * K_PAD
    pair = t[:, None] * TOP_K + k[None, :]
    return (
        tl.reshape(rank, [size]),
        tl.reshape(gate, [size]),
        tl.reshape(pair, [size]),
        tl.reshape(exists.to(tl.int32), [size]) > 0,
    )


@triton.jit
def _earlier_equal(key_ptr, rank, pair, begin, end, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """How many pairs from `begin` to `end`, before each pair, have its rank.

    Compared with CHUNK pairs at a time, read back from memory: all at once spills registers.
    """
    earlier = tl.zeros([SIZE], dtype=tl.int32)
    for start in range(begin, end, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_rank = tl.load(key_ptr + other, mask=other < end, other=-2)
        equal = (rank[:, None] == other_rank[None, :]) & (other[None, :] < pair[:, None])
        earlier += tl.sum(equal.to(tl.int32), axis=1)
    return earlier


@triton.jit
def _emit(table_ptr, done, label, count, first, stride, height):
    """Write the blocks of some keys after the `done` first ones; returns how many there are now.

    `count` rows from position `first` for every key, at most `height` in a block.
    """
    blocks = (count + height - 1) // height
    index = done + tl.cumsum(blocks, 0) - blocks
    for j in range(tl.max(blocks, 0)):
        used = j < blocks
        tl.store(table_ptr + index + j, label, mask=used)
        tl.store(table_ptr + stride + index + j, first + j * height, mask=used)
        rows = tl.minimum(count - j * height, height)
        tl.store(table_ptr + 2 * stride + index + j, rows, mask=used)
    return done + tl.sum(blocks, 0)


@triton.jit
def _emit_both(
    slots_ptr,
    groups_ptr,
    num_ptr,
    slot_ptr,
    group_ptr,
    count,
    first,
    num_slots,
    num_groups,
    stride_slots,
    stride_groups,
    slot_rows,
    group_rows,
    S_PAD: tl.constexpr,
    G_STEP: tl.constexpr,
    BY_SLOT: tl.constexpr,
):
    """Blocks of rows of one slot, and of one group: G_STEP groups at a time, or slot by slot.

    BY_SLOT is for layers with a group for each slot: blocks of one slot are blocks of one group.
    """
    s = tl.arange(0, S_PAD)
    slot = tl.load(slot_ptr + s, mask=s < num_slots, other=0)
    tl.store(num_ptr, _emit(slots_ptr, 0, slot, count, first, stride_slots, slot_rows))
    group = tl.load(group_ptr + s, mask=s < num_slots, other=-1)
    if BY_SLOT:
        tl.store(num_ptr + 1, _emit(groups_ptr, 0, group, count, first, stride_groups, group_rows))
    else:
        done = tl.zeros([], tl.int32)
        begin = tl.zeros([], tl.int32)
        for start in range(0, num_groups, G_STEP):
            g = start + tl.arange(0, G_STEP)
            is_member = group[None, :] == g[:, None]
            group_count = tl.sum(tl.where(is_member, count[None, :], 0), axis=1)
            group_first = begin + tl.cumsum(group_count, 0) - group_count
            done = _emit(groups_ptr, done, g, group_count, group_first, stride_groups, group_rows)
            begin += tl.sum(group_count, 0)
        tl.store(num_ptr + 1, done)


@triton.jit(do_not_specialize=["num_tokens", *BLOCK_ARGUMENTS])
def align_tile_kernel(
    ids_ptr,  # (T, K) experts, -1 or out of range for none
    weights_ptr,  # (T, K) routing weights
    rank_ptr,  # (E,) int32
    slot_ptr,  # (S,) int32
    group_ptr,  # (S,) int32
    pair_ptr,  # (N,) int32
    position_ptr,  # (N,) int32
    gate_ptr,  # (N,) fp32
    slots_ptr,  # (3, B) int32
    groups_ptr,  # (3, B) int32
    num_ptr,  # (2,) int32
    key_ptr,  # (N,) int32, written: rank of each pair
    count_ptr,  # (1, S) int32, written: first position of each rank
    num_tokens,
    num_experts,
    num_slots,
    num_groups,
    stride_ids,
    stride_weights,
    stride_slots,
    stride_groups,
    slot_rows,
    group_rows,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    S_PAD: tl.constexpr,
    G_STEP: tl.constexpr,
    BY_SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Grid: (1,). The whole of the routing where one tile holds every pair, as when decoding."""
    size: tl.constexpr = TOKENS * K_PAD
    rank, gate, pair, exists = _keys(
        ids_ptr, weights_ptr, rank_ptr, 0, num_tokens, num_experts, stride_ids, stride_weights,
        TOP_K, K_PAD, TOKENS, MERGE,
    )  # fmt: skip
    count = tl.histogram(tl.maximum(rank, 0), S_PAD, mask=rank >= 0)
    first = tl.cumsum(count, 0) - count
    s = tl.arange(0, S_PAD)
    # Through memory: a table in registers would need a comparison of every pair with every slot.
    tl.store(count_ptr + s, first, mask=s < num_slots)
    tl.store(key_ptr + pair, rank, mask=exists)
    tl.debug_barrier()
    start = tl.load(count_ptr + rank, mask=rank >= 0, other=0)
    end = num_tokens * TOP_K
    position = start + _earlier_equal(key_ptr, rank, pair, 0, end, size, CHUNK)
    tl.store(pair_ptr + position, pair, mask=rank >= 0)
    tl.store(position_ptr + pair, tl.where(rank >= 0, position, -1), mask=exists)
    tl.store(gate_ptr + pair, gate, mask=exists)
    _emit_both(
        slots_ptr, groups_ptr, num_ptr, slot_ptr, group_ptr, count, first, num_slots, num_groups,
        stride_slots, stride_groups, slot_rows, group_rows, S_PAD, G_STEP, BY_SLOT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    ids_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    rank_ptr,  # (E,) int32
    key_ptr,  # (N,) int32, written: rank of each pair, -1 if not computed
    position_ptr,  # (N,) int32, written: its index among the tile's pairs of that rank
    gate_ptr,  # (N,) fp32, written
    count_ptr,  # (C, S) int32, written: pairs by tile and rank
    num_tokens,
    num_experts,
    num_slots,
    stride_ids,
    stride_weights,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Grid: (tiles,). Each program owns TOKENS tokens."""
    tile = tl.program_id(0)
    size: tl.constexpr = TOKENS * K_PAD
    rank, gate, pair, exists = _keys(
        ids_ptr, weights_ptr, rank_ptr, tile, num_tokens, num_experts, stride_ids, stride_weights,
        TOP_K, K_PAD, TOKENS, MERGE,
    )  # fmt: skip
    tl.store(key_ptr + pair, rank, mask=exists)
    tl.store(gate_ptr + pair, gate, mask=exists)
    tl.debug_barrier()
    begin = tile * TOKENS * TOP_K
    end = tl.minimum(begin + TOKENS * TOP_K, num_tokens * TOP_K)
    earlier = _earlier_equal(key_ptr, rank, pair, begin, end, size, CHUNK)
    tl.store(position_ptr + pair, earlier, mask=exists)
    s = tl.arange(0, S_PAD)
    count = tl.histogram(tl.maximum(rank, 0), S_PAD, mask=rank >= 0)
    tl.store(count_ptr + tile.to(tl.int64) * num_slots + s, count, mask=s < num_slots)


@triton.jit(do_not_specialize=["num_tiles", *BLOCK_ARGUMENTS])
def scan_kernel(
    count_ptr,  # (C, S) int32, replaced by the position of each tile's first pair of each rank
    slot_ptr,  # (S,) int32
    group_ptr,  # (S,) int32
    slots_ptr,  # (3, B) int32, written
    groups_ptr,  # (3, B) int32, written
    num_ptr,  # (2,) int32, written
    num_tiles,
    num_slots,
    num_groups,
    stride_slots,
    stride_groups,
    slot_rows,
    group_rows,
    CHUNK: tl.constexpr,
    S_PAD: tl.constexpr,
    G_STEP: tl.constexpr,
    BY_SLOT: tl.constexpr,
):
    """Grid: (1,). Totals first, then an exclusive sum over tiles in place."""
    c = tl.arange(0, CHUNK)
    s = tl.arange(0, S_PAD)
    count = tl.zeros([S_PAD], dtype=tl.int32)
    for tile in range(0, num_tiles, CHUNK):
        mask = (tile + c[:, None] < num_tiles) & (s[None, :] < num_slots)
        offset = (tile + c[:, None]).to(tl.int64) * num_slots + s[None, :]
        part = tl.load(count_ptr + offset, mask=mask, other=0)
        count += tl.sum(part, axis=0)
    first = tl.cumsum(count, 0) - count
    running = first
    for tile in range(0, num_tiles, CHUNK):
        mask = (tile + c[:, None] < num_tiles) & (s[None, :] < num_slots)
        offset = (tile + c[:, None]).to(tl.int64) * num_slots + s[None, :]
        part = tl.load(count_ptr + offset, mask=mask, other=0)
        before = tl.cumsum(part, 0) - part + running[None, :]
        tl.store(count_ptr + offset, before, mask=mask)
        running += tl.sum(part, axis=0)
    _emit_both(
        slots_ptr, groups_ptr, num_ptr, slot_ptr, group_ptr, count, first, num_slots, num_groups,
        stride_slots, stride_groups, slot_rows, group_rows, S_PAD, G_STEP, BY_SLOT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def scatter_kernel(
    key_ptr,  # (N,) int32
    count_ptr,  # (C, S) int32, first positions
    position_ptr,  # (N,) int32, in: index within the tile; out: sorted position or -1
    pair_ptr,  # (N,) int32, written
    num_pairs,
    num_slots,
    TILE_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (ceil(N / BLOCK),). Each program owns BLOCK consecutive pairs."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pair < num_pairs
    key = tl.load(key_ptr + pair, mask=exists, other=-1)
    within = tl.load(position_ptr + pair, mask=exists, other=0)
    tile = (pair // TOP_K // TILE_TOKENS).to(tl.int64)
    start = tl.load(count_ptr + tile * num_slots + key, mask=key >= 0, other=0)
    position = start + within
    tl.store(pair_ptr + position, pair, mask=key >= 0)
    tl.store(position_ptr + pair, tl.where(key >= 0, position, -1), mask=exists)

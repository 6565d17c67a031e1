"""What one call launches, decided from shapes alone before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vllm_moesvd.kernels.tiles import PROGRAMS_PER_UNIT, Bucket, Tile, TileTable

JOINED_HEIGHTS: Final = (16, 32, 64)
"""Rows of the blocks of a joined product; each is another program."""
MAX_JOINED_TOKENS: Final = JOINED_HEIGHTS[-1]
"""With more tokens every program would read more of x than of its matrix, and cuBLAS is better."""
_STEP_NUMBERS: Final = 4096
"""Weights in one step of a joined product: three steps on their way are 24 KB for every program,
which is what a multiprocessor of an H100 must have asked for to get its share of the bandwidth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """Sizes of one process's layer and batch; in tensor parallelism `r`, `q` are shares."""

    num_tokens: int
    top_k: int
    hidden: int
    width: int
    r: int
    q: int
    num_slots: int
    num_groups: int
    base_width: int

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Tiles, blocks and splits of every product of a batch."""

    by_slot: Bucket
    by_group: Bucket
    by_input: Bucket
    by_token: Bucket
    z_rows: int
    z_blocks: int
    token_blocks: int
    group_blocks: int
    z_parts: int
    base_parts: int
    w_parts: int
    joins_base_down: bool
    """Whether base down shares a launch with U down; otherwise it has tiles of its own."""


def max_blocks(num_rows: int, num_keys: int, block_rows: int) -> int:
    """Blocks that `num_rows` rows of `num_keys` keys can need at most, from shapes alone."""
    return (num_rows + min(num_keys, num_rows) * (block_rows - 1)) // block_rows


def plan_launches(sizes: LayerSizes, table: TileTable) -> Plan:
    """The plan of a batch of at least one token; `base_parts` is 1 unless there are groups."""
    one_group = sizes.num_groups == 1
    z_rows = sizes.num_tokens if one_group else sizes.num_pairs
    by_slot = table.bucket(sizes.num_pairs, sizes.num_slots)
    by_group = table.bucket(sizes.num_pairs, sizes.num_groups)
    by_token = table.bucket(sizes.num_tokens, 1)
    # With groups one block table serves both V steps, so they share the height of its blocks.
    by_input = by_token if one_group else by_group
    group_blocks = max_blocks(sizes.num_pairs, sizes.num_groups, by_group.block_m)
    token_blocks = -(-sizes.num_tokens // by_token.block_m)
    z_blocks = token_blocks if one_group else group_blocks
    base_columns = -(-sizes.base_width // by_token.linear.block_n)
    z_columns = -(-sizes.r // by_input.linear.block_n) + (base_columns if one_group else 0)
    w_columns = -(-sizes.q // by_group.linear.block_n)
    base_parts = 1
    if base_columns and not one_group:
        base_parts = table.split(
            token_blocks * 2 * base_columns,
            sizes.hidden,
            by_token.linear.block_k,
            sizes.num_tokens,
        )
    down_programs = token_blocks * -(-sizes.hidden // by_token.linear.block_n)
    return Plan(
        by_slot=by_slot,
        by_group=by_group,
        by_input=by_input,
        by_token=by_token,
        z_rows=z_rows,
        z_blocks=z_blocks,
        token_blocks=token_blocks,
        group_blocks=group_blocks,
        z_parts=table.split(
            z_blocks * 2 * z_columns, sizes.hidden, by_input.linear.block_k, z_rows
        ),
        base_parts=base_parts,
        w_parts=table.split(
            group_blocks * w_columns, sizes.width, by_group.linear.block_k, sizes.num_pairs
        ),
        # Tiles made for few rows per slot read base down too often when tokens are many; where
        # they are few, a launch of its own would leave most multiprocessors idle.
        joins_base_down=by_token.block_m == by_slot.block_m
        or down_programs < table.target_programs,
    )


def plan_joined(num_tokens: int, columns: Sequence[int], table: TileTable) -> tuple[int, Tile]:
    """Rows of a block and the tile of a joined product with matrices of so many `columns`.

    Tiles of columns are as narrow as two programs for each multiprocessor need them, at least 16
    wide and half as wide as the block is high: every program reads all of x. At most 32 or as wide
    as it is high, where a program reads no more of x than of its matrix.
    """
    if not 0 < num_tokens <= MAX_JOINED_TOKENS:
        raise ValueError(
            f"moesvd: a joined product of {num_tokens} tokens; expected 1 to {MAX_JOINED_TOKENS}"
        )
    block_m = next(rows for rows in JOINED_HEIGHTS if num_tokens <= rows)
    block_n = max(16, block_m // 2)
    wanted = 2 * (table.target_programs // PROGRAMS_PER_UNIT)
    while block_n < max(32, block_m) and sum(-(-c // (2 * block_n)) for c in columns) >= wanted:
        block_n *= 2
    tile = Tile(
        block_n=block_n,
        block_k=_STEP_NUMBERS // block_n,
        # Four warps spill a few bytes on Hopper and Blackwell with more rows.
        num_warps=4 if block_m == 16 else 8,
        num_stages=table.bucket(1, 1).linear.num_stages,
        group_m=1,
    )
    return block_m, tile

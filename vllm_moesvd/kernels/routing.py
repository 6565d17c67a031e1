"""Which rows go to which slot: a counting sort on the GPU, without a word to the host.

| tensor       | shape  | meaning                                                            |
|--------------|--------|--------------------------------------------------------------------|
| `pair_N`     | (N,)   | sorted position -> pair `t * K + k`; N = T * K                     |
| `position_N` | (N,)   | pair -> sorted position, -1 for a pair that is not computed        |
| `gate_N`     | (N,)   | pair -> routing weight, summed over the token's pairs of that slot |
| `slots_3B`   | (3, B) | blocks of rows of one slot: slot, first position, number of rows   |
| `groups_3B`  | (3, B) | the same for rows of one V group                                   |
| `num_blocks` | (2,)   | how many of the two kinds are filled; B is an upper bound          |

Positions ascend by group, within it by slot, within it by pair, so one order serves both tables
and every launch adds in the same order. The sorted order has no padding: only the tables know
about blocks. Slots of other processes are -1 in `rank_E` and cost nothing from here on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton

from vllm_moesvd.kernels import launching
from vllm_moesvd.kernels.plan import max_blocks
from vllm_moesvd.kernels.routing_kernels import (
    align_tile_kernel,
    count_kernel,
    scan_kernel,
    scatter_kernel,
)
from vllm_moesvd.kernels.slots import SlotTable

TILE_PAIRS: Final = 128
"""Pairs per program, all compared with all. It holds 16 tokens of top-8 routing in one launch."""
CHUNK_PAIRS: Final = 16
"""Pairs that those of a tile are compared with at a time; 128 at once spill on every GPU."""
SCAN_TILES: Final = 32
"""Tiles per step of the scan; 32 × 512 counters fit in the registers of 8 warps."""
MEMBERS: Final = 4096
"""Slots times groups compared at a time; 256 of each at once spill on every GPU."""
SCATTER_PAIRS: Final = 512
"""Pairs per program of a kernel that only moves numbers; any size near it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The index tensors of one batch; all int32 except `gate_N` in fp32."""

    pair_N: torch.Tensor
    position_N: torch.Tensor
    gate_N: torch.Tensor
    slots_3B: torch.Tensor
    groups_3B: torch.Tensor
    num_blocks: torch.Tensor
    key_N: torch.Tensor
    count_CS: torch.Tensor
    slot_rows: int
    group_rows: int


def tokens_per_tile(top_k: int) -> int:
    """A power of two, so that a tile holds at most TILE_PAIRS pairs, padding included."""
    return max(1, TILE_PAIRS // int(triton.next_power_of_2(top_k)))


def routing_shapes(
    num_tokens: int, top_k: int, slots: SlotTable, slot_rows: int, group_rows: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of `Routing`, from shapes alone."""
    n, num_slots = num_tokens * top_k, len(slots.slot_S)
    tiles = -(-num_tokens // tokens_per_tile(top_k))
    return {
        "pair_N": ((n,), torch.int32),
        "position_N": ((n,), torch.int32),
        "gate_N": ((n,), torch.float32),
        "slots_3B": ((3, max_blocks(n, num_slots, slot_rows)), torch.int32),
        "groups_3B": ((3, max_blocks(n, slots.num_groups, group_rows)), torch.int32),
        "num_blocks": ((2,), torch.int32),
        "key_N": ((n,), torch.int32),
        "count_CS": ((tiles, num_slots), torch.int32),
    }


def align(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, slots: SlotTable, routing: Routing
) -> None:
    """Fill `routing` for the experts `ids_TK` (any integer dtype) and their routing weights.

    One launch if every pair fits one tile, as when decoding, three otherwise.
    """
    num_tokens, top_k = ids_TK.shape
    if ids_TK.stride(1) != 1 or weights_TK.stride(1) != 1:
        raise ValueError(
            f"moesvd: routing with strides {ids_TK.stride()} and {weights_TK.stride()}; "
            "expected contiguous rows"
        )
    tile_tokens = tokens_per_tile(top_k)
    num_tiles = -(-num_tokens // tile_tokens)
    num_slots = len(slots.slot_S)
    s_pad = triton.next_power_of_2(num_slots)
    pairs = {
        "ids_ptr": ids_TK,
        "weights_ptr": weights_TK,
        "rank_ptr": slots.rank_E,
        "position_ptr": routing.position_N,
        "gate_ptr": routing.gate_N,
        "key_ptr": routing.key_N,
        "count_ptr": routing.count_CS,
        "num_tokens": num_tokens,
        "num_experts": len(slots.rank_E),
        "num_slots": num_slots,
        "stride_ids": ids_TK.stride(0),
        "stride_weights": weights_TK.stride(0),
        "TOP_K": top_k,
        "K_PAD": triton.next_power_of_2(top_k),
        "TOKENS": tile_tokens,
        "S_PAD": s_pad,
        "CHUNK": CHUNK_PAIRS,
        "MERGE": slots.merges,
    }
    blocks = {
        "slot_ptr": slots.slot_S,
        "group_ptr": slots.group_S,
        "slots_ptr": routing.slots_3B,
        "groups_ptr": routing.groups_3B,
        "num_ptr": routing.num_blocks,
        "num_slots": num_slots,
        "num_groups": slots.num_groups,
        "stride_slots": routing.slots_3B.stride(0),
        "stride_groups": routing.groups_3B.stride(0),
        "S_PAD": s_pad,
        "G_STEP": min(triton.next_power_of_2(slots.num_groups), max(1, MEMBERS // s_pad)),
        "BY_SLOT": slots.num_groups >= num_slots,
        "slot_rows": routing.slot_rows,
        "group_rows": routing.group_rows,
    }
    if num_tiles == 1:
        launching.launch(
            align_tile_kernel,
            (1,),
            **pairs | blocks,
            pair_ptr=routing.pair_N,
            num_warps=4,
        )
        return
    launching.launch(count_kernel, (num_tiles,), **pairs, num_warps=4)
    launching.launch(
        scan_kernel,
        (1,),
        **blocks,
        count_ptr=routing.count_CS,
        num_tiles=num_tiles,
        CHUNK=SCAN_TILES,
        num_warps=8,
    )
    num_pairs = num_tokens * top_k
    launching.launch(
        scatter_kernel,
        (-(-num_pairs // SCATTER_PAIRS),),
        key_ptr=routing.key_N,
        count_ptr=routing.count_CS,
        position_ptr=routing.position_N,
        pair_ptr=routing.pair_N,
        num_pairs=num_pairs,
        num_slots=num_slots,
        TILE_TOKENS=tile_tokens,
        TOP_K=top_k,
        BLOCK=SCATTER_PAIRS,
        num_warps=4,
    )

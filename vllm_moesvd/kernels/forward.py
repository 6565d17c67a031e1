"""A whole `shared-v` or `svd` layer in launches, with room for two exchanges between processes.

    align        experts, weights          -> Routing               1 launch (3 for many tokens)
    linear       x, V gate, V up           -> z (T or N, 2, R)      1 (+ 1 sum if split)
      exchange_z: all-gather over R
    gate_up      z, U gate, U up           -> h (N, F)              1
    linear       h, V down                 -> w (N, Q)              1 (+ 1 sum if split)
      exchange_w: reduce-scatter over Q
    linear       w, U down, weights        -> y of pairs (N, D)     1
    sum_rows     y of pairs, in pair order -> y (T, D)              1

Everything that is launched, and how large, follows from shapes; so does the order of every sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod

import torch

from vllm_moesvd.kernels.gate_up import gate_up
from vllm_moesvd.kernels.linear import grouped_linear, sum_rows
from vllm_moesvd.kernels.routing import Routing, align, max_blocks, routing_shapes
from vllm_moesvd.kernels.slots import SlotTable
from vllm_moesvd.kernels.tiles import TileTable

Exchange = Callable[[torch.Tensor], torch.Tensor]
ShapeAndType = tuple[tuple[int, ...], torch.dtype]
GetScratch = Callable[..., list[torch.Tensor]]
"""vLLM's `WorkspaceManager.get_simultaneous`: views for any number of (shape, dtype) pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """One process's factors of a layer; in tensor parallelism r and q are shares of R and Q."""

    v_gate_GrD: torch.Tensor
    v_up_GrD: torch.Tensor
    u_gate_SFR: torch.Tensor
    u_up_SFR: torch.Tensor
    v_down_GQF: torch.Tensor
    u_down_SDq: torch.Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor.stride(-1) != 1 or tensor.dim() != 3:
                raise ValueError(
                    f"moesvd: {field.name} has shape {list(tensor.shape)} and strides "
                    f"{tensor.stride()}; expected three dimensions with contiguous rows"
                )


def warm_up_batches(max_tokens: int) -> list[int]:
    """Numbers of tokens that together launch every program which up to `max_tokens` launch.

    Four per power of two: a test compares the programs with those of the numbers between.
    """
    quarters = (2**i * q // 4 for i in range(max_tokens.bit_length()) for q in (4, 5, 6, 7))
    return sorted({min(tokens, max_tokens) for tokens in quarters} | {max_tokens})


def factored_experts(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    factors: Factors,
    slots: SlotTable,
    table: TileTable,
    get_scratch: GetScratch,
    *,
    exchange_z: Exchange | None = None,
    exchange_w: Exchange | None = None,
) -> torch.Tensor:
    """New output `y_TD` of the routed experts, in x's dtype; a partial sum under TP.

    All scratch comes from one call of `get_scratch`, its size a function of shapes.
    """
    num_tokens, top_k = ids_TK.shape
    num_pairs = num_tokens * top_k
    y_TD = torch.empty_like(x_TD)
    if num_tokens == 0:
        return y_TD
    one_group = slots.num_groups == 1
    z_rows = num_tokens if one_group else num_pairs
    by_slot = table.bucket(num_pairs, len(slots.slot_S))
    by_group = table.bucket(num_pairs, slots.num_groups)
    by_input = table.bucket(z_rows, slots.num_groups)
    if not one_group:
        # One block table serves both V steps, so they share the height of its blocks.
        by_input = by_group
    _, r, depth = factors.v_gate_GrD.shape
    _, width, _ = factors.u_gate_SFR.shape
    _, q, _ = factors.v_down_GQF.shape
    group_blocks = max_blocks(num_pairs, slots.num_groups, by_group.block_m)
    z_blocks = -(-z_rows // by_input.block_m) if one_group else group_blocks
    z_columns, w_columns = (
        -(-columns // bucket.linear.block_n) for columns, bucket in ((r, by_input), (q, by_group))
    )
    z_parts = table.split(z_blocks * 2 * z_columns, depth, by_input.linear.block_k)
    w_parts = table.split(group_blocks * w_columns, width, by_group.linear.block_k)
    index_shapes = routing_shapes(num_tokens, top_k, slots, by_slot.block_m, by_group.block_m)
    partial_numbers = max(
        z_parts * z_rows * 2 * r if z_parts > 1 else 0,
        w_parts * num_pairs * q if w_parts > 1 else 0,
    )
    hidden = x_TD.shape[1]
    z, w, wide, partial, *index = get_scratch(
        ((z_rows, 2, r), x_TD.dtype),
        ((num_pairs, q), x_TD.dtype),
        ((num_pairs * max(width, hidden),), x_TD.dtype),
        ((max(partial_numbers, 1),), torch.float32),
        *index_shapes.values(),
    )
    # The neurons are read for the last time before the pairs' outputs are written.
    h_NF, y_ND = _view(wide, num_pairs, width), _view(wide, num_pairs, hidden)
    routing = Routing(
        **dict(zip(index_shapes, index, strict=True)),
        slot_rows=by_slot.block_m,
        group_rows=by_group.block_m,
    )
    align(ids_TK, weights_TK, slots, routing)
    z_out = z.view(1, z_rows, 2 * r)
    grouped_linear(
        x_TD,
        (factors.v_gate_GrD, factors.v_up_GrD),
        z_out if z_parts == 1 else _view(partial, z_parts, z_rows, 2 * r),
        tile=by_input.linear,
        block_m=by_input.block_m,
        num_rows=z_rows,
        num_row_blocks=z_blocks,
        parts=z_parts,
        blocks_3B=None if one_group else routing.groups_3B,
        num_blocks=None if one_group else routing.num_blocks.narrow(0, 1, 1),
        pair_N=None if one_group else routing.pair_N,
        gate_N=None,
        top_k=top_k,
        from_tokens=not one_group,
    )
    if z_parts > 1:
        terms = _view(partial, z_parts, z_rows, 2 * r)
        sum_rows(terms, z_out.squeeze(0), num_terms=z_parts, position_N=None)
    if exchange_z is not None:
        z = exchange_z(z)
    gate_up(
        z,
        factors.u_gate_SFR,
        factors.u_up_SFR,
        h_NF,
        routing,
        tile=by_slot.gate_up,
        top_k=top_k,
        from_tokens=one_group,
    )
    grouped_linear(
        h_NF,
        (factors.v_down_GQF,),
        w.unsqueeze(0) if w_parts == 1 else _view(partial, w_parts, num_pairs, q),
        tile=by_group.linear,
        block_m=by_group.block_m,
        num_rows=num_pairs,
        num_row_blocks=group_blocks,
        parts=w_parts,
        blocks_3B=routing.groups_3B,
        num_blocks=routing.num_blocks.narrow(0, 1, 1),
        pair_N=None,
        gate_N=None,
        top_k=top_k,
        from_tokens=False,
    )
    if w_parts > 1:
        terms = _view(partial, w_parts, num_pairs, q)
        sum_rows(terms, w, num_terms=w_parts, position_N=None)
    if exchange_w is not None:
        w = exchange_w(w)
    grouped_linear(
        w,
        (factors.u_down_SDq,),
        y_ND.unsqueeze(0),
        tile=by_slot.linear,
        block_m=by_slot.block_m,
        num_rows=num_pairs,
        num_row_blocks=routing.slots_3B.shape[1],
        parts=1,
        blocks_3B=routing.slots_3B,
        num_blocks=routing.num_blocks,
        pair_N=routing.pair_N,
        gate_N=routing.gate_N,
        top_k=top_k,
        from_tokens=False,
    )
    sum_rows(y_ND, y_TD, num_terms=top_k, position_N=routing.position_N)
    return y_TD


def _view(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first numbers of a flat buffer in another shape."""
    return buffer.narrow(0, 0, prod(shape)).view(shape)

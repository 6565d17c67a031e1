"""A whole factored layer in launches, with room for two exchanges between processes.

    align        experts, weights            -> Routing               1 launch (3 for many tokens)
    linear       x, V gate, V up, base       -> z, base (T, 2, B)     1 (+ 1 sum if split)
      exchange_z: all-gather over R
    gate_up      z, U gate, U up, base       -> h (N, F)              1
    linear       h, V down                   -> w (N, Q)              1 (+ 1 sum if split)
      exchange_w: reduce-scatter over Q
    sum_rows     h, weights                  -> g (T, B)              1, base-delta alone
    linear       w, U down, weights; g, base -> y of pairs (N, D), of the base (T, D)   1
    sum_rows     those, in pair order        -> y (T, D)              1

z is (T, 2, R) if all slots share one V group, otherwise (N, 2, R), and then the base's product
with x is a launch of its own. Everything that is launched, and how large, follows from shapes
(`plan.py`); so does the order of every sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from vllm_moesvd.kernels.gate_up import gate_up
from vllm_moesvd.kernels.linear import MoreColumns, MoreRows, grouped_linear
from vllm_moesvd.kernels.plan import LayerSizes, Plan, plan_launches
from vllm_moesvd.kernels.routing import Routing, align, routing_shapes
from vllm_moesvd.kernels.slots import SlotTable
from vllm_moesvd.kernels.sums import sum_rows
from vllm_moesvd.kernels.tiles import TileTable

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Between C processes: `z` [M, 2, r] to [C, M, 2, r], or partial `w` [C, N, q] to summed [N, q].
The first dimension is the processes', so neither needs its numbers in another order."""
ShapeAndType = tuple[tuple[int, ...], torch.dtype]
GetScratch = Callable[..., list[torch.Tensor]]
"""vLLM's `WorkspaceManager.get_simultaneous`: views for any number of (shape, dtype) pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """One process's base of a `base-delta` layer, added to the first B <= F neurons of a slot."""

    gate_BD: torch.Tensor
    up_BD: torch.Tensor
    down_DB: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("gate_BD", "up_BD", "down_DB"):
            _require_rows(f"base {name}", getattr(self, name), 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """One process's factors of a layer; in tensor parallelism r and q are shares of R and Q."""

    v_gate_GrD: torch.Tensor
    v_up_GrD: torch.Tensor
    u_gate_SFR: torch.Tensor
    u_up_SFR: torch.Tensor
    v_down_GQF: torch.Tensor
    u_down_SDq: torch.Tensor
    base: Base | None = None

    def __post_init__(self) -> None:
        for name in ("v_gate_GrD", "v_up_GrD", "u_gate_SFR", "u_up_SFR", "v_down_GQF"):
            _require_rows(name, getattr(self, name), 3)
        _require_rows("u_down_SDq", self.u_down_SDq, 3)
        width = self.u_gate_SFR.shape[1]
        if self.base is not None and self.base.gate_BD.shape[0] > width:
            raise ValueError(
                f"moesvd: a base of {self.base.gate_BD.shape[0]} neurons for experts of {width}; "
                "expected at most as many"
            )


def warm_up_batches(max_tokens: int) -> list[int]:
    """Numbers of tokens that together launch every program which up to `max_tokens` launch.

    Four per power of two: a test compares the programs with those of the numbers between.
    """
    quarters = (2**i * q // 4 for i in range(max_tokens.bit_length()) for q in (4, 5, 6, 7))
    return sorted({min(tokens, max_tokens) for tokens in quarters} | {max_tokens})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scratch:
    """Memory between the launches; `wide` holds the neurons, then the outputs of the pairs."""

    z_M2r: torch.Tensor
    base_T2B: torch.Tensor | None
    projected: torch.Tensor
    w_CNq: torch.Tensor
    g_TB: torch.Tensor | None
    h_NF: torch.Tensor
    y_MD: torch.Tensor
    partial: torch.Tensor
    routing: Routing


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
    y_TD = torch.empty_like(x_TD)
    if len(x_TD) == 0:
        return y_TD
    sizes = LayerSizes(
        num_tokens=len(x_TD),
        top_k=ids_TK.shape[1],
        hidden=x_TD.shape[1],
        width=factors.u_gate_SFR.shape[1],
        r=factors.v_gate_GrD.shape[1],
        q=factors.v_down_GQF.shape[1],
        num_slots=len(slots.slot_S),
        num_groups=slots.num_groups,
        base_width=0 if factors.base is None else factors.base.gate_BD.shape[0],
    )
    plan = plan_launches(sizes, table)
    shards = sizes.q // factors.u_down_SDq.shape[2]
    scratch = _scratch(sizes, plan, shards, slots, x_TD.dtype, get_scratch)
    align(ids_TK, weights_TK, slots, scratch.routing)
    _project_in(x_TD, factors, sizes, plan, scratch)
    z = scratch.z_M2r.unsqueeze(0) if exchange_z is None else exchange_z(scratch.z_M2r)
    gate_up(
        z,
        factors.u_gate_SFR,
        factors.u_up_SFR,
        scratch.h_NF,
        scratch.routing,
        tile=plan.by_slot.gate_up,
        top_k=sizes.top_k,
        from_tokens=sizes.num_groups == 1,
        base_T2B=scratch.base_T2B,
    )
    _project_down(factors, sizes, plan, scratch)
    w = scratch.w_CNq.squeeze(0) if exchange_w is None else exchange_w(scratch.w_CNq)
    _project_out(w, y_TD, factors, sizes, plan, scratch)
    return y_TD


def _scratch(
    sizes: LayerSizes,
    plan: Plan,
    shards: int,
    slots: SlotTable,
    dtype: torch.dtype,
    get_scratch: GetScratch,
) -> _Scratch:
    t, n, b = sizes.num_tokens, sizes.num_pairs, sizes.base_width
    index_shapes = routing_shapes(
        t, sizes.top_k, slots, plan.by_slot.block_m, plan.by_group.block_m
    )
    z_numbers, base_numbers = plan.z_rows * 2 * sizes.r, t * 2 * b
    joined = z_numbers + (base_numbers if sizes.num_groups == 1 else 0)
    partial_numbers = max(
        plan.z_parts * joined if plan.z_parts > 1 else 0,
        plan.base_parts * base_numbers if plan.base_parts > 1 else 0,
        plan.w_parts * n * sizes.q if plan.w_parts > 1 else 0,
    )
    output_rows = n + (t if b else 0)
    projected, w, g, wide, partial, *index = get_scratch(
        ((z_numbers + base_numbers,), dtype),
        ((shards, n, sizes.q // shards), dtype),
        ((t, max(b, 1)), dtype),
        ((max(n * sizes.width, output_rows * sizes.hidden),), dtype),
        ((max(partial_numbers, 1),), torch.float32),
        *index_shapes.values(),
    )
    return _Scratch(
        z_M2r=_view(projected, plan.z_rows, 2, sizes.r),
        base_T2B=projected.narrow(0, z_numbers, base_numbers).view(t, 2, b) if b else None,
        projected=projected,
        w_CNq=w,
        g_TB=g if b else None,
        # The neurons are read for the last time before the pairs' outputs are written.
        h_NF=_view(wide, n, sizes.width),
        y_MD=_view(wide, output_rows, sizes.hidden),
        partial=partial,
        routing=Routing(
            **dict(zip(index_shapes, index, strict=True)),
            slot_rows=plan.by_slot.block_m,
            group_rows=plan.by_group.block_m,
        ),
    )


def _project_in(
    x_TD: torch.Tensor, factors: Factors, sizes: LayerSizes, plan: Plan, scratch: _Scratch
) -> None:
    """V gate and V up of every row of z, base gate and base up of every token."""
    t, b, r, routing = sizes.num_tokens, sizes.base_width, sizes.r, scratch.routing
    v = factors.v_gate_GrD, factors.v_up_GrD
    base = (factors.base.gate_BD, factors.base.up_BD) if factors.base is not None else None
    one_group, parts = sizes.num_groups == 1, plan.z_parts
    z_columns, base_columns = 2 * r, 2 * b if one_group else 0
    columns = z_columns + base_columns
    # z and the base's part lie one after the other, in memory and in every part of a split.
    target = scratch.projected if parts == 1 else scratch.partial
    target = _view(target, parts, plan.z_rows * columns)
    z_out = target.narrow(1, 0, plan.z_rows * z_columns)
    base_out = target.narrow(1, plan.z_rows * z_columns, plan.z_rows * base_columns)
    more = None
    if base is not None and one_group:
        more = MoreColumns(w=base, out=base_out.unflatten(1, (t, 2 * b)))
    grouped_linear(
        x_TD,
        v,
        z_out.unflatten(1, (plan.z_rows, 2 * r)),
        tile=plan.by_input.linear,
        block_m=plan.by_input.block_m,
        num_rows=plan.z_rows,
        num_row_blocks=plan.z_blocks,
        parts=parts,
        blocks_3B=None if one_group else routing.groups_3B,
        num_blocks=None if one_group else routing.num_blocks.narrow(0, 1, 1),
        pair_N=None if one_group else routing.pair_N,
        top_k=sizes.top_k,
        from_tokens=not one_group,
        more=more,
    )
    if parts > 1:
        terms = target.view(parts, plan.z_rows, columns)
        sum_rows(terms, _view(scratch.projected, plan.z_rows, columns), num_terms=parts)
    if base is None or one_group:
        return
    assert scratch.base_T2B is not None
    out, parts = scratch.base_T2B.view(1, t, 2 * b), plan.base_parts
    terms = _view(scratch.partial, parts, t, 2 * b) if parts > 1 else out
    grouped_linear(
        x_TD,
        (base[0].unsqueeze(0), base[1].unsqueeze(0)),
        terms,
        tile=plan.by_token.linear,
        block_m=plan.by_token.block_m,
        num_rows=t,
        num_row_blocks=plan.token_blocks,
        parts=parts,
        top_k=sizes.top_k,
    )
    if parts > 1:
        sum_rows(terms, out.squeeze(0), num_terms=parts)


def _project_down(factors: Factors, sizes: LayerSizes, plan: Plan, scratch: _Scratch) -> None:
    """V down of every pair, and the gate-weighted sum of the base's neurons of every token."""
    routing, parts = scratch.routing, plan.w_parts
    w_CNq = scratch.w_CNq
    # Partial results lie as the sum will, so the sum does not need to know how.
    terms = _view(scratch.partial, parts, *w_CNq.shape) if parts > 1 else w_CNq.unsqueeze(0)
    grouped_linear(
        scratch.h_NF,
        (factors.v_down_GQF,),
        terms if len(w_CNq) > 1 else terms.squeeze(1),
        tile=plan.by_group.linear,
        block_m=plan.by_group.block_m,
        num_rows=sizes.num_pairs,
        num_row_blocks=plan.group_blocks,
        parts=parts,
        blocks_3B=routing.groups_3B,
        num_blocks=routing.num_blocks.narrow(0, 1, 1),
        top_k=sizes.top_k,
    )
    if parts > 1:
        rows = sizes.num_pairs
        sum_rows(terms.view(parts, rows, -1), w_CNq.view(rows, -1), num_terms=parts)
    if scratch.g_TB is not None:
        sum_rows(
            scratch.h_NF,
            scratch.g_TB,
            num_terms=sizes.top_k,
            position_N=routing.position_N,
            gate_N=routing.gate_N,
        )


def _project_out(
    w_Nq: torch.Tensor,
    y_TD: torch.Tensor,
    factors: Factors,
    sizes: LayerSizes,
    plan: Plan,
    scratch: _Scratch,
) -> None:
    """U down of every pair, base down of every token, and their sum."""
    routing, n = scratch.routing, sizes.num_pairs
    more = None
    if factors.base is not None:
        assert scratch.g_TB is not None
        more = MoreRows(a=scratch.g_TB, w=factors.base.down_DB)
    grouped_linear(
        w_Nq,
        (factors.u_down_SDq,),
        scratch.y_MD.unsqueeze(0),
        tile=plan.by_slot.linear,
        block_m=plan.by_slot.block_m,
        num_rows=n,
        num_row_blocks=routing.slots_3B.shape[1],
        blocks_3B=routing.slots_3B,
        num_blocks=routing.num_blocks,
        pair_N=routing.pair_N,
        gate_N=routing.gate_N,
        top_k=sizes.top_k,
        more=more if plan.joins_base_down else None,
    )
    if more is not None and not plan.joins_base_down:
        grouped_linear(
            more.a,
            (more.w.unsqueeze(0),),
            scratch.y_MD.narrow(0, n, sizes.num_tokens).unsqueeze(0),
            tile=plan.by_token.linear,
            block_m=plan.by_token.block_m,
            num_rows=sizes.num_tokens,
            num_row_blocks=plan.token_blocks,
            top_k=sizes.top_k,
        )
    sum_rows(
        scratch.y_MD,
        y_TD,
        num_terms=sizes.top_k,
        position_N=routing.position_N,
        own_row=None if more is None else n,
    )


def _require_rows(name: str, tensor: torch.Tensor, dimensions: int) -> None:
    if tensor.stride(-1) != 1 or tensor.dim() != dimensions:
        raise ValueError(
            f"moesvd: {name} has shape {list(tensor.shape)} and strides {tensor.stride()}; "
            f"expected {dimensions} dimensions with contiguous rows"
        )


def _view(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first numbers of a flat buffer in another shape."""
    return buffer.narrow(0, 0, prod(shape)).view(shape)

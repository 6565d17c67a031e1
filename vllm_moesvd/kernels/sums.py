"""Sums of rows in a fixed order: partial results, a token's choices, its gate-weighted neurons.

| use                | terms of row `m`                                     | out        |
|--------------------|------------------------------------------------------|------------|
| parts of a product | `terms[i, m]`, fp32                                  | z, base, w |
| choices            | rows `position[m, k]`, and row `own + m` if there is | y (T, D)   |
| base's neurons     | rows `position[m, k]`, times the routing weight      | g (T, B)   |

No atomics: results are the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_moesvd.kernels import launching


def _sum_work(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    terms, rows, columns = args["num_terms"], args["num_rows"], args["num_cols"]
    read = terms + args["OWN"]
    num_bytes = (
        rows * columns * (read * args["in_ptr"].element_size() + args["out_ptr"].element_size())
    )
    name = f"{metadata.name} [{terms} x {rows} x {columns}]"
    return launching.work(name, read * rows * columns, num_bytes)


@triton.jit(
    launch_metadata=_sum_work,
    do_not_specialize=["num_rows", "num_terms", "own_row"],
)
def sum_kernel(
    in_ptr,  # GATHER: rows by sorted position (and own rows); otherwise (num_terms, rows, C)
    position_ptr,  # (rows * num_terms,) int32, -1 for a term that does not exist; if GATHER
    gate_ptr,  # (rows * num_terms,) fp32; if GATED
    out_ptr,  # (rows, C)
    num_rows,
    num_cols,
    num_terms,
    own_row,
    stride_term,
    stride_in,
    stride_out,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, ceil(C / BLOCK)). Terms are added in ascending order, own last, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for term in range(num_terms):
        if GATHER:
            position = tl.load(position_ptr + row * num_terms + term)
            source = in_ptr + position.to(tl.int64) * stride_in
            mask = c < tl.where(position >= 0, num_cols, 0)
        else:
            term_64 = tl.zeros([], tl.int64) + term
            source = in_ptr + term_64 * stride_term + row * stride_in
            mask = c < num_cols
        value = tl.load(source + c, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            value *= tl.load(gate_ptr + row * num_terms + term)
        acc += value
    if OWN:
        source = in_ptr + (own_row + row) * stride_in
        acc += tl.load(source + c, mask=c < num_cols, other=0.0).to(tl.float32)
    out = out_ptr + row * stride_out + c
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=c < num_cols)


def sum_rows(
    terms: torch.Tensor,
    out_MC: torch.Tensor,
    *,
    num_terms: int,
    position_N: torch.Tensor | None = None,
    gate_N: torch.Tensor | None = None,
    own_row: int | None = None,
) -> None:
    """`out[m] = sum over terms`: of `terms` [num_terms, M, C], or of its rows `position_N`.

    `gate_N` multiplies each of those rows; `own_row + m` is one more row to add, not multiplied.
    Rows of `terms` may be longer than those of `out`: the first numbers of each are summed.
    """
    num_rows, num_cols = out_MC.shape
    block = min(1024, triton.next_power_of_2(num_cols))
    launching.launch(
        sum_kernel,
        (num_rows, -(-num_cols // block)),
        in_ptr=terms,
        position_ptr=position_N,
        gate_ptr=gate_N,
        out_ptr=out_MC,
        num_rows=num_rows,
        num_cols=num_cols,
        num_terms=num_terms,
        own_row=own_row or 0,
        stride_term=terms.stride(0),
        stride_in=terms.stride(-2),
        stride_out=out_MC.stride(0),
        GATHER=position_N is not None,
        GATED=gate_N is not None,
        OWN=own_row is not None,
        BLOCK=block,
        num_warps=4,
    )

"""A whole general layer on a CPU as one opaque operator over weights that oneDNN has packed.

One token reads a packed matrix two to three times as fast as a plain one (30 instead of 11 to 14
GB/s on one core of a Zen 5), and decoding is nothing but that. The packed matrices belong to
vLLM's handlers, which are numbers to the operator: `u_gate_S` is one number per slot, `v_gate_G`
one per group. Layers that exchange numbers between their steps use `ops` instead.

Of each group, V gate and V up are applied to its tokens at once (with one group: to every token
once, whatever experts it has), V down to the neurons of all its pairs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import silu

from vllm_moesvd.ops import rows_by_key

FACTORS: Final = ("v_gate", "v_up", "v_down", "u_gate", "u_up", "u_down")
BASE: Final = ("base_gate", "base_up", "base_down")


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The factors of a layer as handlers, by name, [groups] or [slots] (int64), and their owners.

    `rows` are the numbers of rows of each factor's matrices, in the order of FACTORS and BASE.
    """

    handlers: tuple[torch.Tensor, ...]
    rows: tuple[int, ...]
    slot_group: tuple[int, ...]
    owners: tuple[Any, ...]

    def __call__(
        self, x_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor
    ) -> torch.Tensor:
        """Output [T, D] of the layer."""
        output_TD: torch.Tensor = packed_layer(
            x_TD, slot_TK, gate_TK, list(self.handlers), self.rows, self.slot_group
        )
        return output_TD


def pack_layer(layer: torch.nn.Module, slot_group: tuple[int, ...]) -> PackedLayer | None:
    """Pack the factors of a layer and free the plain ones; None where oneDNN cannot.

    A CPU without bfloat16 instructions has no such product; its layers stay as they are.
    """
    from vllm import _custom_ops

    names = [name for name in FACTORS + BASE if hasattr(layer, name)]
    if not getattr(_custom_ops, "_supports_onednn", False):
        return None
    owners, handlers, rows = [], [], []
    for name in names:
        factor = getattr(layer, name)
        matrices = factor if factor.dim() == 3 else factor[None]
        try:
            made = [_custom_ops.create_onednn_mm(matrix.t(), 32) for matrix in matrices]
        except RuntimeError:
            return None
        owners += made
        handlers.append(torch.stack([one.handler_tensor for one in made]))
        rows.append(matrices.shape[1])
    for name in names:
        # A reload finds the right shape in what vLLM recorded before the first load.
        empty = torch.nn.Parameter(getattr(layer, name).new_empty(0), requires_grad=False)
        setattr(layer, name, empty)
    return PackedLayer(tuple(handlers), tuple(rows), slot_group, tuple(owners))


@torch.library.custom_op("moesvd::packed_layer", mutates_args=())
def packed_layer(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    handlers: Sequence[torch.Tensor],
    rows: Sequence[int],
    slot_group: Sequence[int],
) -> torch.Tensor:
    """`y_TD` of a layer with or without a base; slots as in `ops`, sums over pairs in fp32."""
    v_gate, v_up, v_down, u_gate, u_up, u_down, *base = handlers
    r, _, q, f, _, d, *base_rows = rows
    tokens, top_k = slot_TK.shape
    y_TD = x_TD.new_zeros(tokens, d, dtype=torch.float32)
    gate_N1 = gate_TK.reshape(-1, 1).float()
    if base:
        base_gate_TB = _product(x_TD, base[0][0], base_rows[0])
        base_up_TB = _product(x_TD, base[1][0], base_rows[0])
        h_TB = x_TD.new_zeros(tokens, base_rows[0], dtype=torch.float32)
    for group, slots in _pairs(slot_TK, slot_group):
        pairs_N = slots[0][1] if len(slots) == 1 else torch.cat([pairs for _, pairs in slots])
        token_N = pairs_N // top_k
        once = len(v_gate) == 1
        # One token is in the right place already, however often it is meant.
        x_nD = x_TD if once or tokens == 1 else x_TD[token_N]
        zg_nR, zu_nR = _product(x_nD, v_gate[group], r), _product(x_nD, v_up[group], r)
        h_NF = x_TD.new_empty(len(pairs_N), f)
        start = 0
        for slot, pairs in slots:
            part = slice(start, start + len(pairs))
            if tokens == 1:
                zg, zu = zg_nR, zu_nR
            elif once:
                zg, zu = zg_nR[token_N[part]], zu_nR[token_N[part]]
            else:
                zg, zu = zg_nR[part], zu_nR[part]
            gate_nF, up_nF = _product(zg, u_gate[slot], f), _product(zu, u_up[slot], f)
            if base:
                gate_nF[:, : base_rows[0]] += base_gate_TB[token_N[part]]
                up_nF[:, : base_rows[0]] += base_up_TB[token_N[part]]
            torch.mul(silu(gate_nF, inplace=True), up_nF, out=h_NF[part])
            start = part.stop
        weight_N1 = gate_N1[pairs_N]
        if base:
            h_TB.index_add_(0, token_N, weight_N1 * h_NF[:, : base_rows[0]].float())
        w_NQ = _product(h_NF, v_down[group], q)
        start = 0
        for slot, pairs in slots:
            part = slice(start, start + len(pairs))
            y_nD = _product(w_NQ[part], u_down[slot], d).float()
            y_TD.index_add_(0, token_N[part], y_nD.mul_(weight_N1[part]))
            start = part.stop
    if base:
        y_TD += _product(h_TB.to(x_TD.dtype), base[2][0], d)
    return y_TD.to(x_TD.dtype)


@packed_layer.register_fake
def _packed_layer_fake(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    handlers: Sequence[torch.Tensor],
    rows: Sequence[int],
    slot_group: Sequence[int],
) -> torch.Tensor:
    return torch.empty_like(x_TD)


def _product(x_NK: torch.Tensor, handler: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`x @ w.T` with the matrix [num_rows, K] of a handler."""
    out_NM = x_NK.new_empty(x_NK.shape[0], num_rows)
    torch.ops._C.onednn_mm(out_NM, x_NK, None, handler)
    return out_NM


def _pairs(
    slot_TK: torch.Tensor, slot_group: Sequence[int]
) -> list[tuple[int, list[tuple[int, torch.Tensor]]]]:
    """For every group in use its slots in use, and the pairs of each slot, all ascending.

    Example: slots ((2, 0), (2, -1)) of groups (0, 1, 0) give group 0 with slot 0 (pair 1) and
    slot 2 (pairs 0 and 2).
    """
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for slot, pairs in rows_by_key(slot_TK.flatten(), len(slot_group)):
        groups.setdefault(slot_group[slot], []).append((slot, pairs))
    return sorted(groups.items())

"""A whole general layer on a CPU as one opaque operator over weights that oneDNN has packed.

To the operator a packed weight is a tensor of numbers, `u_gate_S` one per slot, `v_down_G` one per
group (`cpu_products`). Layers that exchange numbers between their steps use `ops` instead.

With one group, V gate and V up are applied to every token once, whatever experts it has; with
several, once to all pairs of a group. V down is applied to the neurons of all pairs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from vllm_moesvd.cpu_pairs import sorted_pairs
from vllm_moesvd.cpu_products import Packed, pack, product, register_cpu_operator, silu_times

FACTORS: Final = ("v_gate", "v_up", "v_down", "u_gate", "u_up", "u_down")
BASE: Final = ("base_gate", "base_up", "base_down")
_PACKED: Final = (("v_gate", "v_up"), ("v_down",), ("u_gate",), ("u_up",), ("u_down",))
_PACKED_BASE: Final = (("base_gate", "base_up"), ("base_down",))


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The factors of a general layer, in the order of _PACKED and _PACKED_BASE.

    Slots stand in the order of their groups: `place_S` says where each has gone, with -1 at the
    end for slot -1; None if they have stayed. `slot_group` is that of the places.
    """

    packed: Packed
    place_S: torch.Tensor | None
    slot_group: tuple[int, ...]

    def __call__(
        self, x_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor
    ) -> torch.Tensor:
        """Output [T, D] of the layer."""
        place_TK = slot_TK if self.place_S is None else self.place_S[slot_TK]
        handlers, rows = list(self.packed.handlers), self.packed.rows
        output_TD: torch.Tensor = torch.ops.moesvd.packed_layer(
            x_TD, place_TK, gate_TK, handlers, rows, self.slot_group
        )
        return output_TD


def pack_layer(layer: torch.nn.Module, slot_group: tuple[int, ...]) -> PackedLayer | None:
    """Pack the factors of a layer as `pack` does, with the base if there is one."""
    has_base = hasattr(layer, BASE[0])
    packed = pack(layer, _PACKED + _PACKED_BASE if has_base else _PACKED)
    if packed is None:
        return None
    order = sorted(range(len(slot_group)), key=slot_group.__getitem__)
    if order == list(range(len(slot_group))):
        return PackedLayer(packed, None, slot_group)
    v, v_down, *u, u_down = packed.handlers[:5]
    handlers = v, v_down, *(u_S[order] for u_S in (*u, u_down)), *packed.handlers[5:]
    place_S = torch.full((len(order) + 1,), -1)
    place_S[torch.tensor(order)] = torch.arange(len(order))
    return PackedLayer(
        Packed(handlers, packed.rows, packed.owners),
        place_S,
        tuple(slot_group[slot] for slot in order),
    )


def packed_layer(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    handlers: Sequence[torch.Tensor],
    rows: Sequence[int],
    slot_group: Sequence[int],
) -> torch.Tensor:
    """`y_TD` of a layer with or without a base; slots as in `ops`, sums over pairs in fp32.

    `slot_group` ascends.
    """
    v_G, v_down_G, u_gate_S, u_up_S, u_down_S, *base = handlers
    two_r, q, f, _, d, *base_rows = rows
    r, b = two_r // 2, base_rows[0] // 2 if base else 0
    y_TD = x_TD.new_zeros(len(x_TD), d, dtype=torch.float32)
    if len(v_G) == 1:
        z_T2R = product(x_TD, v_G[0], two_r)
    if base:
        base_T2B = product(x_TD, base[0][0], 2 * b)
        h_TB = x_TD.new_zeros(len(x_TD), b, dtype=torch.float32)
    for pairs in sorted_pairs(slot_TK, gate_TK, 2 * f):
        n, groups = len(pairs.gate_n), pairs.runs.by(slot_group)
        if len(v_G) == 1:
            z_n2R = pairs.rows_of(z_T2R)
        else:
            x_nD, z_n2R = pairs.rows_of(x_TD), x_TD.new_empty(n, two_r)
            groups.multiply(z_n2R, x_nD, v_G)
        gate_nF, up_nF = x_TD.new_empty(n, f), x_TD.new_empty(n, f)
        pairs.runs.multiply(gate_nF, z_n2R[:, :r], u_gate_S)
        pairs.runs.multiply(up_nF, z_n2R[:, r:], u_up_S)
        if base:
            base_n2B = pairs.rows_of(base_T2B)
            gate_nF[:, :b] += base_n2B[:, :b]
            up_nF[:, :b] += base_n2B[:, b:]
        h_nF = silu_times(gate_nF, up_nF)
        if base:
            pairs.add_to(h_TB, h_nF[:, :b])
        w_nQ, y_nD = x_TD.new_empty(n, q), x_TD.new_empty(n, d)
        groups.multiply(w_nQ, h_nF, v_down_G)
        pairs.runs.multiply(y_nD, w_nQ, u_down_S)
        pairs.add_to(y_TD, y_nD)
    if base:
        y_TD += product(h_TB.to(x_TD.dtype), base[1][0], d)
    return y_TD.to(x_TD.dtype)


register_cpu_operator(packed_layer)

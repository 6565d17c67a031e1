"""A whole general layer on a CPU as one opaque operator over weights that oneDNN has packed.

One token reads a packed matrix two to three times as fast as a plain one (30 instead of 11 to 14
GB/s on one core of a Zen 5), and decoding is nothing but that. The packed matrices belong to
vLLM's handlers, which are numbers to the operator: `u_gate_S` is one number per slot, `v_gate_G`
one per group. Layers that exchange numbers between their steps use `ops` instead.

Of each group, V gate and V up are applied to its tokens at once (with one group: to every token
once, whatever experts it has), V down to the neurons of all its pairs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import silu

from vllm_moesvd.ops import rows_by_key

FACTORS: Final = ("v_gate", "v_up", "v_down", "u_gate", "u_up", "u_down")
BASE: Final = ("base_gate", "base_up", "base_down")
_LIBRARY: Final = torch.library.Library("moesvd", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights as handlers: one tensor (int64) per weight with a number per matrix, and the owners.

    `rows` are the numbers of rows of each weight's matrices.
    """

    handlers: tuple[torch.Tensor, ...]
    rows: tuple[int, ...]
    owners: tuple[Any, ...]


def pack(layer: torch.nn.Module, names: Sequence[str]) -> Packed | None:
    """Pack the weights of a layer and free the plain ones; None, with nothing freed, if it cannot.

    A CPU without bfloat16 instructions has no such product; its layers stay as they are.
    """
    from vllm import _custom_ops

    if not getattr(_custom_ops, "_supports_onednn", False):
        return None
    owners, handlers, rows = [], [], []
    for name in names:
        weight = getattr(layer, name)
        matrices = weight if weight.dim() == 3 else weight[None]
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
    return Packed(tuple(handlers), tuple(rows), tuple(owners))


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The factors of a general layer, in the order of FACTORS and BASE."""

    packed: Packed
    slot_group: tuple[int, ...]

    def __call__(
        self, x_TD: torch.Tensor, slot_TK: torch.Tensor, gate_TK: torch.Tensor
    ) -> torch.Tensor:
        """Output [T, D] of the layer."""
        handlers, rows = list(self.packed.handlers), self.packed.rows
        output_TD: torch.Tensor = torch.ops.moesvd.packed_layer(
            x_TD, slot_TK, gate_TK, handlers, rows, self.slot_group
        )
        return output_TD


def pack_layer(layer: torch.nn.Module, slot_group: tuple[int, ...]) -> PackedLayer | None:
    """Pack the factors of a layer as `pack` does, with the base if there is one."""
    packed = pack(layer, [name for name in FACTORS + BASE if hasattr(layer, name)])
    return None if packed is None else PackedLayer(packed, slot_group)


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
    if tokens == 1:
        return _one_token(x_TD, slot_TK, gate_TK, handlers, rows, slot_group)
    gate_N1 = gate_TK.reshape(-1, 1).float()
    if base:
        base_gate_TB = product(x_TD, base[0][0], base_rows[0])
        base_up_TB = product(x_TD, base[1][0], base_rows[0])
        h_TB = x_TD.new_zeros(tokens, base_rows[0], dtype=torch.float32)
    for group, slots in _pairs(slot_TK, slot_group):
        pairs_N = slots[0][1] if len(slots) == 1 else torch.cat([pairs for _, pairs in slots])
        token_N = pairs_N // top_k
        once = len(v_gate) == 1
        x_nD = x_TD if once else x_TD[token_N]
        zg_nR, zu_nR = product(x_nD, v_gate[group], r), product(x_nD, v_up[group], r)
        h_NF = x_TD.new_empty(len(pairs_N), f)
        start = 0
        for slot, pairs in slots:
            part = slice(start, start + len(pairs))
            if once:
                zg, zu = zg_nR[token_N[part]], zu_nR[token_N[part]]
            else:
                zg, zu = zg_nR[part], zu_nR[part]
            gate_nF, up_nF = product(zg, u_gate[slot], f), product(zu, u_up[slot], f)
            if base:
                gate_nF[:, : base_rows[0]] += base_gate_TB[token_N[part]]
                up_nF[:, : base_rows[0]] += base_up_TB[token_N[part]]
            torch.mul(silu(gate_nF, inplace=True), up_nF, out=h_NF[part])
            start = part.stop
        weight_N1 = gate_N1[pairs_N]
        if base:
            h_TB.index_add_(0, token_N, weight_N1 * h_NF[:, : base_rows[0]].float())
        w_NQ = product(h_NF, v_down[group], q)
        start = 0
        for slot, pairs in slots:
            part = slice(start, start + len(pairs))
            y_nD = product(w_NQ[part], u_down[slot], d).float()
            y_TD.index_add_(0, token_N[part], y_nD.mul_(weight_N1[part]))
            start = part.stop
    if base:
        y_TD += product(h_TB.to(x_TD.dtype), base[2][0], d)
    return y_TD.to(x_TD.dtype)


def _one_token(
    x_1D: torch.Tensor,
    slot_1K: torch.Tensor,
    gate_1K: torch.Tensor,
    handlers: Sequence[torch.Tensor],
    rows: Sequence[int],
    slot_group: Sequence[int],
) -> torch.Tensor:
    """`packed_layer` of one token, for which sorting would take a tenth of the time."""
    v_gate, v_up, v_down, u_gate, u_up, u_down, *base = handlers
    r, _, q, f, _, d, *base_rows = rows
    y_1D = x_1D.new_zeros(1, d, dtype=torch.float32)
    z: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    if base:
        bases = product(x_1D, base[0][0], base_rows[0]), product(x_1D, base[1][0], base_rows[0])
        h_1B = x_1D.new_zeros(1, base_rows[0], dtype=torch.float32)
    for slot, gate in zip(slot_1K[0].tolist(), gate_1K[0].tolist(), strict=True):
        if slot < 0:
            continue
        group = slot_group[slot]
        if group not in z:
            z[group] = product(x_1D, v_gate[group], r), product(x_1D, v_up[group], r)
        gate_1F, up_1F = product(z[group][0], u_gate[slot], f), product(z[group][1], u_up[slot], f)
        if base:
            gate_1F[:, : base_rows[0]] += bases[0]
            up_1F[:, : base_rows[0]] += bases[1]
        h_1F = silu(gate_1F, inplace=True).mul_(up_1F)
        if base:
            h_1B.add_(h_1F[:, : base_rows[0]], alpha=gate)
        w_1Q = product(h_1F, v_down[group], q)
        y_1D.add_(product(w_1Q, u_down[slot], d), alpha=gate)
    if base:
        y_1D += product(h_1B.to(x_1D.dtype), base[2][0], d)
    return y_1D.to(x_1D.dtype)


def register_cpu_operator(function: Callable[..., torch.Tensor]) -> None:
    """Make `torch.ops.moesvd.<name>` of a function, opaque to the compiler, for the CPU.

    To the compiler its output is a new tensor like its first argument.

    Not by `torch.library.custom_op`: its Python wrappers take 30 microseconds of every call.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"moesvd::{name}", _like_the_first, lib=_LIBRARY)


def _like_the_first(x_TD: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x_TD)


register_cpu_operator(packed_layer)


def silu_and_mul(h_N2F: torch.Tensor) -> torch.Tensor:
    """silu of the first half of every row times the second half, [N, F]."""
    f = h_N2F.shape[1] // 2
    if f % 32:
        # vLLM's operator takes whole vectors only.
        return silu(h_N2F[:, :f]).mul_(h_N2F[:, f:])
    h_NF = h_N2F.new_empty(h_N2F.shape[0], f)
    torch.ops._C.silu_and_mul(h_NF, h_N2F)
    return h_NF


def product(x_NK: torch.Tensor, handler: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`x @ w.T` [N, num_rows] with the matrix [num_rows, K] of a handler."""
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

"""Products with weights that oneDNN has packed, for layers on a CPU.

One token reads a packed matrix two to three times as fast as a plain one (30 instead of 11 to 14
GB/s on one core of a Zen 5), and decoding is nothing but that. The packed matrices belong to
vLLM's handlers, which are numbers to an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import silu

_LIBRARY: Final = torch.library.Library("moesvd", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights as handlers: one tensor (int64) per weight with a number per matrix, and the owners.

    `rows` are the numbers of rows of each weight's matrices.
    """

    handlers: tuple[torch.Tensor, ...]
    rows: tuple[int, ...]
    owners: tuple[Any, ...]


def pack(layer: torch.nn.Module, weights: Sequence[Sequence[str]]) -> Packed | None:
    """Pack weights of a layer and free the plain ones; None, with nothing freed, if it cannot.

    Each weight is named by the parameters, [M, K] or one such matrix per expert, that it stacks:
    `("v_gate", "v_up")` is read as one matrix of twice the rows. A CPU without bfloat16
    instructions has no such product; its layers stay as they are.
    """
    from vllm import _custom_ops

    if not getattr(_custom_ops, "_supports_onednn", False):
        return None
    owners, handlers, rows = [], [], []
    for names in weights:
        parts = [weight if weight.dim() == 3 else weight[None] for weight in _named(layer, names)]
        try:
            made = [
                _custom_ops.create_onednn_mm(torch.cat(matrices).t(), 32)
                for matrices in zip(*parts, strict=True)
            ]
        except RuntimeError:
            return None
        owners += made
        handlers.append(torch.stack([one.handler_tensor for one in made]))
        rows.append(sum(part.shape[1] for part in parts))
    for name in (name for names in weights for name in names):
        # A reload finds the right shape in what vLLM recorded before the first load.
        empty = torch.nn.Parameter(getattr(layer, name).new_empty(0), requires_grad=False)
        setattr(layer, name, empty)
    return Packed(tuple(handlers), tuple(rows), tuple(owners))


def product(x_NK: torch.Tensor, handler: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`x @ w.T` [N, num_rows] with the matrix [num_rows, K] of a handler."""
    out_NM = x_NK.new_empty(x_NK.shape[0], num_rows)
    torch.ops._C.onednn_mm(out_NM, x_NK, None, handler)
    return out_NM


def silu_times(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, [N, F].

    vLLM's operator takes two to three times as long from 2 rows of 7168 on (29 and 12 us).
    """
    return silu(gate_NF).mul_(up_NF)


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


def _named(layer: torch.nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    return [getattr(layer, name) for name in names]


def _like_the_first(x_TD: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x_TD)

"""The routed experts' forward pass that calibration and evaluation use, for every MoE family.

transformers gives its MoE families one experts interface: the module has `gate_up_proj`
[E, 2F, D], `down_proj` [E, D, F] and `_apply_gate`, and the function is chosen by
`config._experts_implementation`. Ours shows the routed input to an observer before computing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Final

import torch
from torch.nn.functional import linear

from compress_tool.errors import UnsupportedError

IMPLEMENTATION: Final = "moesvd"

Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with `x_TD`, `index_TK` and `gate_TK` of one batch; must not change them."""


def register_experts() -> str:
    """Make `forward` known to transformers, once; returns its name for the model's config."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    return IMPLEMENTATION


def check_experts(module: Any, name: str) -> None:
    """Raise UnsupportedError when an experts module computes something `forward` does not."""
    if not module.has_gate or module.has_bias or module.is_transposed or not module.is_concatenated:
        raise UnsupportedError(
            f"{name}: experts with biases, without a gate, transposed or interleaved are not "
            "supported; expected gate_up_proj [E, 2F, D] and down_proj [E, D, F]"
        )


def forward(
    module: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor
) -> torch.Tensor:
    """`y = bias + sum over k of g_k * W2 (act(W1 x) * (W3 x))`, summed in fp32, experts in order.

    `module.moesvd_observer` (an Observer or None) sees the arguments; `module.moesvd_bias_D` is
    added once per token, or is None. `module.moesvd_dynamic` (a DynamicBase or None) leaves neurons
    of a shared base out of this batch. The experts may have any width, the same for all.
    """
    if module.moesvd_observer is not None:
        module.moesvd_observer(x_TD, index_TK, gate_TK)
    left_out = None
    if module.moesvd_dynamic is not None:
        left_out = module.moesvd_dynamic.left_out(module, x_TD, gate_TK)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    # Pairs of a token and a choice by expert, and by token within one.
    pair_N = index_TK.flatten().argsort(stable=True)
    token_N, gate_N1 = pair_N // index_TK.shape[1], gate_TK.flatten()[pair_N, None].float()
    counts = torch.bincount(index_TK.flatten(), minlength=module.num_experts).tolist()
    ends = list(accumulate(counts))
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count == 0:
            continue
        token = token_N[end - count : end]
        x = x_TD[token]
        a = linear(x, module.gate_up_proj[expert])
        if left_out is not None:
            a = left_out.take_from_neurons(a, x)
        h = module._apply_gate(a)
        y = linear(h, module.down_proj[expert])
        if left_out is not None:
            y = left_out.take_from_output(y, h)
        y = y.float()
        # A token meets an expert at most once, so no two additions race for one row.
        y_TD.index_add_(0, token, y * gate_N1[end - count : end])
    if module.moesvd_bias_D is not None:
        y_TD += module.moesvd_bias_D
    return y_TD.to(x_TD.dtype)

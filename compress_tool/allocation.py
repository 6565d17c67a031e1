"""Which layer gives up how much: one candidate per layer, least total loss, exact budget. Pure.

A multiple-choice knapsack, solved by dynamic programming over parameter counts rounded up to a
unit so small that the rounding of all layers together cannot leave the promised window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Final

import numpy as np

from compress_tool.errors import ResourceError
from compress_tool.plan import RATIO_WINDOW, Budget
from vllm_moesvd.format import LayerSpec

UNITS_PER_LAYER: Final = 8
"""The window holds this many units per layer: rounding takes at most an eighth of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to store a layer: its spec (None: dense), its parameters and the expected loss."""

    spec: LayerSpec | None
    params: int
    loss: float


def allocate(budget: Budget, candidates: Mapping[int, Sequence[Candidate]]) -> dict[int, Candidate]:
    """Choose one candidate per layer; the share removed lies in [R, R + RATIO_WINDOW].

    Raises ResourceError naming what is reachable when no choice does.
    """
    layers = sorted(candidates)
    dense = budget.dense_layer_params * len(layers)
    most = dense - ceil(budget.ratio * budget.base_params - 1e-6)
    least = dense - floor((budget.ratio + RATIO_WINDOW) * budget.base_params + 1e-6)
    unit = max(1, (most - least) // (UNITS_PER_LAYER * max(1, len(layers))))
    smallest = sum(min(c.params for c in candidates[layer]) for layer in layers)
    if smallest > most:
        reachable = floor(budget.achieved(dense - smallest) * 1e4) / 1e4
        raise ResourceError(
            f"ratio {budget.ratio:g} cannot be reached: the smallest forms of all {len(layers)} "
            f"layers remove {reachable:.4f}; ask for at most {reachable:.4f}"
        )
    size = max(0, most) // unit
    loss_B = np.full(size + 1, np.inf)
    loss_B[0] = 0.0
    choices: list[np.ndarray] = []
    for layer in layers:
        next_B = np.full(size + 1, np.inf)
        choice_B = np.zeros(size + 1, dtype=np.int32)
        for index, candidate in enumerate(candidates[layer]):
            units = -(-candidate.params // unit)
            if units > size:
                continue
            total_B = loss_B[: size + 1 - units] + candidate.loss
            better_B = total_B < next_B[units:]
            next_B[units:][better_B] = total_B[better_B]
            choice_B[units:][better_B] = index
        choices.append(choice_B)
        loss_B = next_B
    # Rounding up hides less than a unit per layer: from here on the true total is large enough.
    lowest = max(0, -(-least // unit) + len(layers))
    window_B = loss_B[lowest:]
    if not np.isfinite(window_B).any():
        raise ResourceError(
            f"ratio {budget.ratio:g} cannot be met within {RATIO_WINDOW:g} by any choice of widths "
            "and ranks; ask for a slightly different ratio"
        )
    position = lowest + int(np.argmin(window_B))
    chosen: dict[int, Candidate] = {}
    for layer, choice_B in zip(reversed(layers), reversed(choices), strict=True):
        chosen[layer] = candidates[layer][int(choice_B[position])]
        position -= -(-chosen[layer].params // unit)
    total = sum(candidate.params for candidate in chosen.values())
    assert least <= total <= most, "the asked ratio is a promise"
    return dict(sorted(chosen.items()))

"""The knapsack: exact budget, and no better choice than the one it makes."""

from __future__ import annotations

import itertools
import random

import pytest

from compress_tool.allocation import Candidate, allocate
from compress_tool.errors import ResourceError
from compress_tool.plan import RATIO_WINDOW, Budget
from vllm_moesvd.format import NarrowSpec

DENSE = 100_000


def budget(ratio: float, num_layers: int) -> Budget:
    return Budget(
        total_params=num_layers * DENSE,
        routed_params=num_layers * DENSE,
        dense_layer_params=DENSE,
        ratio=ratio,
        of_experts=False,
    )


def random_candidates(num_layers: int, seed: int, sizes: int = 400) -> dict[int, list[Candidate]]:
    draw = random.Random(seed)
    layers = {}
    for layer in range(num_layers):
        weight = 10 ** draw.uniform(-2, 0)
        layers[layer] = [Candidate(spec=None, params=DENSE, loss=0.0)] + [
            Candidate(
                spec=NarrowSpec(width=width),
                params=width * DENSE // sizes + draw.randint(0, 4),
                loss=weight * (1 - width / sizes) ** 2,
            )
            for width in range(1, sizes)
        ]
    return layers


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.6, 0.9])
def test_the_ratio_is_kept(ratio: float):
    for seed in range(5):
        chosen = allocate(budget(ratio, 12), random_candidates(12, seed))
        removed = 12 * DENSE - sum(item.params for item in chosen.values())
        assert ratio <= removed / (12 * DENSE) <= ratio + RATIO_WINDOW


def test_no_choice_in_the_window_is_better():
    """Against all combinations, but for what rounding to units may hide."""
    for seed in range(4):
        candidates = random_candidates(2, seed)
        chosen = allocate(budget(0.4, 2), candidates)
        most, unit = int(2 * DENSE * 0.6), 2 * DENSE * RATIO_WINDOW / 8 / 2
        best = min(
            sum(item.loss for item in combination)
            for combination in itertools.product(*candidates.values())
            if sum(item.params for item in combination) <= most - 2 * unit
        )
        assert sum(item.loss for item in chosen.values()) <= best + 1e-12


def test_a_sensitive_layer_keeps_more():
    candidates = random_candidates(2, 0)
    heavy = [Candidate(spec=c.spec, params=c.params, loss=1000 * c.loss) for c in candidates[0]]
    chosen = allocate(budget(0.4, 2), {0: heavy, 1: candidates[0]})
    assert chosen[0].params > chosen[1].params


def test_unreachable_says_what_is_reachable():
    with pytest.raises(ResourceError, match=r"at most 0\.9[89]"):
        allocate(budget(0.9995, 4), random_candidates(4, 0))

"""The size plan: which layer takes which form at which rank under an exact budget. Pure.

The asked ratio is a promise: the share of parameters removed lies in [R, R + 0.005], or the plan
fails and names what is reachable. Ranks are nearly the same in all planned layers; they differ by
a step where that is needed to land in the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Final

from compress_tool.errors import ResourceError
from vllm_moesvd.format import Family, LayerSpec, MoEShape, layer_tensors

RATIO_WINDOW: Final = 0.005
"""How far above the asked ratio the achieved one may lie."""

RANK_STEPS: Final = (128, 64, 32, 16, 8, 4, 2, 1)
"""Ranks are multiples of the largest step that still lands in the window: GPU tiles like them."""

STEPS_PER_RANK: Final = 32
"""A step is at most this fraction of the full rank, so that layers stay nearly equal."""

MakeSpec = Callable[[int, int], LayerSpec]
"""Format spec of a layer from (rank_gate_up, rank_down)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRule:
    """Parameters of one factored layer as a function of its ranks, and the largest ranks.

    `params(r, q) = gate_up * r + down * q + fixed`.
    """

    make_spec: MakeSpec
    gate_up: int
    down: int
    fixed: int
    max_gate_up: int
    max_down: int

    def params(self, ranks: tuple[int, int]) -> int:
        return self.gate_up * ranks[0] + self.down * ranks[1] + self.fixed


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What the model has and what was asked.

    `total_params` and `routed_params` count the source; `dense_layer_params` one dense MoE layer's
    routed experts. `base_params` is what the ratio refers to.
    """

    total_params: int
    routed_params: int
    dense_layer_params: int
    ratio: float
    of_experts: bool

    @property
    def base_params(self) -> int:
        return self.routed_params if self.of_experts else self.total_params

    def achieved(self, removed: int) -> float:
        return removed / self.base_params


def spec_params(spec: LayerSpec, shape: MoEShape, family: Family) -> int:
    """Number of routed-experts parameters of a factored layer."""
    total = 0
    for size in layer_tensors(spec, shape, family, 0).values():
        count = 1
        for length in size:
            count *= length
        total += count
    return total


def size_rule(
    make_spec: MakeSpec, shape: MoEShape, family: Family, max_ranks: tuple[int, int]
) -> SizeRule:
    """Measure the (linear) size of a form by evaluating it at three rank pairs."""
    base, one, two = (
        spec_params(make_spec(*ranks), shape, family) for ranks in ((1, 1), (2, 1), (1, 2))
    )
    return SizeRule(
        make_spec=make_spec,
        gate_up=one - base,
        down=two - base,
        fixed=base - (one - base) - (two - base),
        max_gate_up=max_ranks[0],
        max_down=max_ranks[1],
    )


def plan_ranks(
    budget: Budget, rules: Mapping[int, SizeRule], order: Sequence[int] | None = None
) -> dict[int, LayerSpec]:
    """Choose nearly equal ranks for the layers of `rules` so that the budget is met.

    `order` says which layers are raised first when not all can be (default: outermost first, the
    layers every measurement finds most sensitive). Raises ResourceError naming the largest
    reachable ratio, or the nearest reachable ones.
    """
    order = list(order) if order is not None else _outermost_first(sorted(rules))
    dense = budget.dense_layer_params * len(rules)
    # Keep the small tolerance of the float product out of an exact integer count.
    most = dense - ceil(budget.ratio * budget.base_params - 1e-6)
    least = dense - floor((budget.ratio + RATIO_WINDOW) * budget.base_params + 1e-6)
    smallest = sum(rule.params((1, 1)) for rule in rules.values())
    if smallest > most:
        reachable = floor(budget.achieved(dense - smallest) * 1e4) / 1e4
        raise ResourceError(
            f"ratio {budget.ratio:g} cannot be reached: rank 1 in all {len(rules)} planned layers "
            f"removes {reachable:.4f} of the "
            f"{'routed-experts' if budget.of_experts else 'model'} parameters; "
            f"ask for at most {reachable:.4f}"
        )
    best: dict[int, tuple[int, int]] | None = None
    highest = max(max(rule.max_gate_up, rule.max_down) for rule in rules.values())
    for step in RANK_STEPS:
        if step > max(1, highest // STEPS_PER_RANK):
            continue
        ranks = _fill(rules, order, most, step)
        if ranks is None:
            continue
        if best is None or _total(rules, ranks) > _total(rules, best):
            best = ranks
        if _total(rules, ranks) >= least:
            return {layer: rules[layer].make_spec(*ranks[layer]) for layer in sorted(rules)}
    assert best is not None, "rank 1 everywhere fits, so step 1 gives a plan"
    below = budget.achieved(dense - _total(rules, best))
    sizes = [size for rule in rules.values() for size in (rule.gate_up, rule.down) if size > 0]
    raise ResourceError(
        f"ratio {budget.ratio:g} cannot be met within {RATIO_WINDOW:g}: the smallest change of a "
        f"rank moves {min(sizes)} parameters of "
        f"{budget.base_params}, and the nearest reachable ratio above is {below:.4f}; ask for that"
    )


def plan_width(budget: Budget, rules: Mapping[int, SizeRule]) -> dict[int, LayerSpec] | None:
    """One width for all layers, or None if no width lands in the window.

    Widths are multiples of the largest step that lands there. One width for all keeps a narrow
    checkpoint an ordinary one.
    """
    dense = budget.dense_layer_params * len(rules)
    most = dense - ceil(budget.ratio * budget.base_params - 1e-6)
    least = dense - floor((budget.ratio + RATIO_WINDOW) * budget.base_params + 1e-6)
    per_neuron = sum(rule.gate_up for rule in rules.values())
    for step in RANK_STEPS:
        width = most // (per_neuron * step) * step
        if width > 0 and width * per_neuron >= least:
            return {layer: rule.make_spec(width, width) for layer, rule in sorted(rules.items())}
    return None


def _fill(
    rules: Mapping[int, SizeRule], order: Sequence[int], most: int, step: int
) -> dict[int, tuple[int, int]] | None:
    """The largest ranks on a grid of `step`, raised together, then layer by layer."""
    highest = max(max(rule.max_gate_up, rule.max_down) for rule in rules.values())

    def uniform(multiple: int) -> dict[int, tuple[int, int]]:
        return {layer: _clip(rule, multiple * step) for layer, rule in rules.items()}

    low, high = 0, ceil(highest / step)
    if _total(rules, uniform(1)) > most:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if _total(rules, uniform(middle)) <= most:
            low = middle
        else:
            high = middle - 1
    ranks = uniform(low)
    left = most - _total(rules, ranks)
    for layer in order:
        raised = _clip(rules[layer], (low + 1) * step)
        cost = rules[layer].params(raised) - rules[layer].params(ranks[layer])
        if 0 < cost <= left:
            ranks[layer] = raised
            left -= cost
    # What is left is less than a step of both ranks: one rank of some layers may still fit.
    for layer in order:
        rule, (gate_up, down) = rules[layer], ranks[layer]
        for candidate in ((gate_up + step, down), (gate_up, down + step)):
            cost = rule.params(candidate) - rule.params(ranks[layer])
            within = candidate[0] <= rule.max_gate_up and candidate[1] <= rule.max_down
            if within and cost <= left and max(candidate) <= (low + 1) * step:
                ranks[layer] = candidate
                left -= cost
                break
    return ranks


def _clip(rule: SizeRule, rank: int) -> tuple[int, int]:
    return min(rank, rule.max_gate_up), min(rank, rule.max_down)


def _total(rules: Mapping[int, SizeRule], ranks: Mapping[int, tuple[int, int]]) -> int:
    return sum(rules[layer].params(pair) for layer, pair in ranks.items())


def _outermost_first(layers: Sequence[int]) -> list[int]:
    """0, L-1, 1, L-2, …"""
    ordered: list[int] = []
    low, high = 0, len(layers) - 1
    while low <= high:
        ordered.append(layers[low])
        if low != high:
            ordered.append(layers[high])
        low, high = low + 1, high - 1
    return ordered

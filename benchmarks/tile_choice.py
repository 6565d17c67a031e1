"""Makes a tile table of the times that `benchmarks.gpu_tiles` measured.

    python -m benchmarks.tile_choice times.json [--buckets 5] > vllm_moesvd/kernels/tiles/sm_90.json

A bucket serves launches by their rows per matrix. Its height of row blocks, its linear tile and
its gate-and-up tile are those with the smallest mean of time over best time, over all measured
steps that fall into it, each weighted by its share of its layer's best time. The limits between
buckets, and the number of programs that counts as a full GPU, are chosen for the same mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.moe_layers import MODELS

LINEAR_STEPS: Final = ("z", "w", "y")
MISSING: Final = 1e6
"""What a tile counts for a step that it was not measured for or cannot run: never chosen."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one batch of one layer, with its time for every (height, tile)."""

    layer: tuple[str, bool, int]
    """Model, whether `svd`, number of tokens."""
    rows: int
    is_gate_up: bool
    micros: dict[tuple[int, str], float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return min(self.micros.values())

    def ratio(self, height: int, tile: str) -> float:
        taken = self.micros.get((height, tile))
        return MISSING if taken is None else taken / self.best


def rows_per_key(row: Mapping[str, Any], step: str) -> int:
    """As `vllm_moesvd.kernels.plan` counts them."""
    model = next(model for model in MODELS if model.name == row["model"])
    pairs = int(row["tokens"]) * model.top_k
    groups = model.num_experts if row["svd"] else 1
    if step == "z" and groups == 1:
        return int(row["tokens"])
    keys = model.num_experts if step in ("gate_up", "y") else groups
    return math.ceil(pairs / keys)


def read_steps(rows: Sequence[Mapping[str, Any]], target: int) -> list[Step]:
    """The steps at one number of programs; those that it cannot change are in every one."""
    steps: dict[tuple[str, bool, int, str], Step] = {}
    for row in rows:
        height, linear, neurons = row["candidate"].split("|")
        for name in (*LINEAR_STEPS, "gate_up"):
            is_split = name in ("z", "w") and row["tokens"] <= 64
            if name not in row or (is_split and row["target"] != target):
                continue
            layer = row["model"], row["svd"], row["tokens"]
            is_gate_up = name == "gate_up"
            step = steps.setdefault(
                (*layer, name),
                Step(layer=layer, rows=rows_per_key(row, name), is_gate_up=is_gate_up),
            )
            step.micros[int(height), neurons if is_gate_up else linear] = row[name]
    return list(steps.values())


def shares(steps: Sequence[Step]) -> dict[int, float]:
    """Each step's part of its layer's best time, by the step's `id`."""
    totals: dict[tuple[str, bool, int], float] = defaultdict(float)
    for step in steps:
        totals[step.layer] += step.best
    return {id(step): step.best / totals[step.layer] for step in steps}


def best_bucket(steps: Sequence[Step], share: Mapping[int, float]) -> tuple[float, int, str, str]:
    """Cost, height, linear tile and gate-and-up tile that serve these steps best together."""
    by_height: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for step in steps:
        for height, tile in step.micros:
            by_height[height][step.is_gate_up].add(tile)
    found = []
    for height, tiles in by_height.items():
        cost, chosen = 0.0, ["", ""]
        for is_gate_up in (False, True):
            own = [step for step in steps if step.is_gate_up == is_gate_up]
            if not own:
                continue
            costs = {
                tile: sum(share[id(step)] * step.ratio(height, tile) for step in own)
                for tile in tiles[is_gate_up]
            }
            if not costs:
                cost += MISSING * sum(share[id(step)] for step in own)
                continue
            chosen[is_gate_up] = min(sorted(costs), key=costs.__getitem__)
            cost += costs[chosen[is_gate_up]]
        if all(chosen):
            found.append((cost, height, *chosen))
    return min(found, default=(math.inf, 0, "", ""))  # type: ignore[return-value]


def choose(steps: Sequence[Step], num_buckets: int) -> tuple[float, list[dict[str, Any]]]:
    """Mean ratio to the best, and the buckets as a tile table lists them."""
    limits = sorted({step.rows for step in steps})
    share = shares(steps)
    costs: dict[tuple[int, int], tuple[float, int, str, str]] = {}
    for i in range(len(limits)):
        for j in range(i, len(limits)):
            inside = [step for step in steps if limits[i] <= step.rows <= limits[j]]
            costs[i, j] = best_bucket(inside, share)
    best: dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]] = {(0, 0): (0.0, ())}
    for n in range(1, num_buckets + 1):
        for j in range(1, len(limits) + 1):
            options = [
                (best[n - 1, i][0] + costs[i, j - 1][0], (*best[n - 1, i][1], (i, j - 1)))
                for i in range(j)
                if (n - 1, i) in best
            ]
            if options:
                best[n, j] = min(options)
    whole = [best[n, len(limits)] for n in range(1, num_buckets + 1) if (n, len(limits)) in best]
    least = min(cost for cost, _ in whole)
    cost, parts = next(entry for entry in whole if entry[0] <= least * (1 + 1e-9))
    buckets = []
    for i, j in parts:
        _, height, linear, neurons = costs[i, j]
        is_last = j == len(limits) - 1
        buckets.append(
            {
                "max_rows": None if is_last else _between(limits[j], limits[j + 1]),
                "block_m": height,
                "linear": _tile(linear),
                "gate_up": _tile(neurons),
            }
        )
    return cost / sum(share.values()), buckets


def _between(low: int, high: int) -> int:
    """Halfway on a logarithmic scale, so that neither neighbour is far from what was measured."""
    return int(math.sqrt(low * high))


def _tile(text: str) -> dict[str, int]:
    names = ("block_n", "block_k", "num_warps", "num_stages", "group_m")
    return dict(zip(names, map(int, text.split("-")), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("times", type=Path)
    parser.add_argument("--buckets", type=int, default=5)
    given = parser.parse_args(arguments)
    rows = json.loads(given.times.read_text(encoding="utf-8"))
    targets = sorted({row["target"] for row in rows})
    tried = [(*choose(read_steps(rows, target), given.buckets), target) for target in targets]
    for cost, _, target in tried:
        sys.stderr.write(f"{target} programs: {cost:.3f} of the best, on average\n")
    _, buckets, target = min(tried, key=lambda entry: entry[0])
    table = {"16-bit": {"target_programs": target, "buckets": buckets}}
    sys.stdout.write(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

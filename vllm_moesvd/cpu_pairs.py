"""The (token, choice) pairs of a batch, sorted by the expert or slot that computes them.

On a CPU an expert's products of a few tokens take as long as ten small operators. So everything
but products is done once for many experts: one gather of tokens, one activation, one sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

PORTION_NUMBERS: Final = 1 << 21
"""Numbers of intermediate results at once, 4 MiB in bfloat16: what the second product reads should
still be in the caches. More is safe and slower; fewer repeat the small operators more often."""


@dataclass(frozen=True, slots=True)
class Runs:
    """How many consecutive rows each matrix multiplies: `keys` of matrices ascend."""

    keys: list[int]
    sizes: list[int]

    def by(self, group_of: Sequence[int]) -> Runs:
        """The runs of groups, where `group_of` of the keys ascends."""
        sizes: dict[int, int] = {}
        for key, size in zip(self.keys, self.sizes, strict=True):
            sizes[group_of[key]] = sizes.get(group_of[key], 0) + size
        return Runs(list(sizes), list(sizes.values()))

    def multiply(self, out_nM: torch.Tensor, x_nK: torch.Tensor, handlers: torch.Tensor) -> None:
        """Write each run's rows times its packed matrix (`cpu_products`) to the same rows.

        `out_nM` must be contiguous; rows of `x_nK` may lie apart.
        """
        write_product = torch.ops._C.onednn_mm.default
        outs, xs = out_nM.split_with_sizes(self.sizes), x_nK.split_with_sizes(self.sizes)
        for key, out, x in zip(self.keys, outs, xs, strict=True):
            write_product(out, x, None, handlers[key])


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of consecutive keys: `runs` says which rows belong to which key.

    `token_n` is the token of each pair, None where there is one token; `gate_n` its routing weight.
    """

    token_n: torch.Tensor | None
    gate_n: torch.Tensor
    runs: Runs

    def rows_of(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The token's row of every pair [n, D]; one token's is repeated without a copy."""
        if self.token_n is None:
            return x_TD.expand(len(self.gate_n), -1)
        return x_TD.index_select(0, self.token_n)

    def add_to(self, y_TD: torch.Tensor, y_nD: torch.Tensor) -> None:
        """Add each pair's row times its routing weight to its token, in fp32 as `y_TD` is."""
        if self.token_n is None:
            y_TD.addmm_(self.gate_n[None], y_nD.float())
        else:
            y_TD.index_add_(0, self.token_n, y_nD * self.gate_n[:, None])


def sorted_pairs(
    key_TK: torch.Tensor, gate_TK: torch.Tensor, numbers_per_pair: int
) -> Iterator[Pairs]:
    """All pairs but those of key -1, by ascending key and token, in portions.

    A portion has whole keys, and one key or at most PORTION_NUMBERS / `numbers_per_pair` pairs.

    Example: keys ((2, 0), (2, -1)) give tokens (0, 0, 1), runs of key 0 (1 row) and 2 (2 rows).
    """
    tokens, top_k = key_TK.shape
    key_N, order_N = key_TK.flatten().sort(stable=True)
    counts = Counter(key_N.tolist())
    skipped = counts.pop(-1, 0)
    order_n = order_N[skipped:] if skipped else order_N
    token_n = None if tokens == 1 else order_n // top_k
    gate_n = gate_TK.flatten().index_select(0, order_n).float()
    portions = _portions(counts, PORTION_NUMBERS // numbers_per_pair)
    start = 0
    for runs in portions:
        if len(portions) > 1:
            part = slice(start, start + sum(runs.sizes))
            start = part.stop
            yield Pairs(None if token_n is None else token_n[part], gate_n[part], runs)
        else:
            yield Pairs(token_n, gate_n, runs)


def _portions(counts: Mapping[int, int], most: int) -> list[Runs]:
    """Keys and their numbers of pairs, cut where the next key would make more than `most`."""
    portions: list[Runs] = []
    for key, count in counts.items():
        if not portions or sum(portions[-1].sizes) + count > most:
            portions.append(Runs([], []))
        portions[-1].keys.append(key)
        portions[-1].sizes.append(count)
    return portions

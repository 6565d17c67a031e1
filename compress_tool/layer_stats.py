"""What one layer's experts saw during calibration: the layer input X and the routing.

Every statistic a solver wants is a function of these three tensors, so they are what is stored;
a Gram matrix is formed one expert at a time, on demand. Keeping a Gram per expert instead would
take 52 GB for one layer of a 256-expert model. Legend: T tokens, K top-k, E experts, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from compress_tool.errors import InputError
from compress_tool.stats_writer import StatisticsWriter, check_batch

CHUNK_TOKENS: Final = 2048
"""Tokens multiplied at once: 64 MB of fp64 at D = 4096. The result does not depend on it."""

MAX_FP64_PRODUCT_SIZE: Final = 1024
"""Up to this D the chunk products are fp64 too; above it fp32, twice as fast, summed in fp64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """The input of one routed-experts block over all calibration tokens, and where each token went.

    `x_TD` fp32 (may be memory-mapped), `index_TK` int64 expert numbers, `gate_TK` fp32 weights.
    Raises ValueError when shapes, dtypes or expert numbers do not fit together.
    """

    x_TD: torch.Tensor
    index_TK: torch.Tensor
    gate_TK: torch.Tensor
    num_experts: int

    def __post_init__(self) -> None:
        check_batch(self.x_TD, self.index_TK, self.gate_TK, self.num_experts)

    @property
    def num_tokens(self) -> int:
        return self.x_TD.shape[0]

    @property
    def counts_E(self) -> torch.Tensor:
        """How many tokens went to each expert, int64; the sum is T * K exactly."""
        return torch.bincount(self.index_TK.flatten(), minlength=self.num_experts)

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of `x_TD` routed to `expert` (int64, ascending) and their gates (fp32)."""
        token, slot = torch.nonzero(self.index_TK == expert, as_tuple=True)
        return token, self.gate_TK[token, slot]

    def gram(self, expert: int, *, weighted: bool = True) -> torch.Tensor:
        """`sum of g^2 x x^T` (fp64 [D, D]) over the tokens of `expert`; g = 1 if not weighted."""
        token, gate = self.tokens_of(expert)
        return self._gram(token, gate.double() if weighted else torch.ones_like(gate).double())

    def pooled_gram(self, *, weighted: bool = True) -> torch.Tensor:
        """The sum of all experts' Grams (fp64 [D, D]), in one pass over the tokens."""
        token = torch.arange(self.num_tokens)
        scale = (self.gate_TK if weighted else torch.ones_like(self.gate_TK)).double()
        return self._gram(token, scale.square().sum(dim=1).sqrt())

    def traces_E(self, *, weighted: bool = True) -> torch.Tensor:
        """`sum of g^2 |x|^2` per expert (fp64): the traces of the Grams, without forming them."""
        scale = self.gate_TK if weighted else torch.ones_like(self.gate_TK)
        energy_TK = scale.double().square() * self._squared_norms()[:, None]
        traces = torch.zeros(self.num_experts, dtype=torch.float64)
        return traces.index_add_(0, self.index_TK.flatten(), energy_TK.flatten())

    def trace_share_top(self, fraction: float) -> float:
        """Share of the pooled trace that the heaviest `fraction` of tokens (at least one) holds.

        Attention sinks are a few tokens with huge norms; near 1.0 they alone decide every Gram.
        """
        energy = self._squared_norms() * self.gate_TK.double().square().sum(dim=1)
        top = max(1, math.ceil(fraction * self.num_tokens))
        total = float(energy.sum())
        return float(energy.topk(top).values.sum()) / total if total > 0 else 0.0

    def save(self, path: Path) -> None:
        """Write a safetensors file: complete under its name, or not there."""
        with StatisticsWriter(
            path,
            num_tokens=self.num_tokens,
            hidden_size=self.x_TD.shape[1],
            top_k=self.index_TK.shape[1],
            num_experts=self.num_experts,
        ) as writer:
            for rows in _chunks(self.num_tokens):
                writer.add(self.x_TD[rows], self.index_TK[rows], self.gate_TK[rows])

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Open a file that `save` wrote; `x_TD` is mapped, its pages are read when used."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                return cls(
                    x_TD=file.get_tensor("x_TD"),
                    index_TK=file.get_tensor("index_TK"),
                    gate_TK=file.get_tensor("gate_TK"),
                    num_experts=int(metadata.get("num_experts", "0")),
                )
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                f"{path}: not a layer statistics file ({error}); delete it and calibrate again"
            ) from error

    def _gram(self, token: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        size = self.x_TD.shape[1]
        dtype = torch.float64 if size <= MAX_FP64_PRODUCT_SIZE else torch.float32
        gram_DD = torch.zeros(size, size, dtype=torch.float64)
        for rows in _chunks(len(token)):
            x = self.x_TD[token[rows]].to(dtype) * scale[rows, None].to(dtype)
            gram_DD += x.T @ x
        return gram_DD

    def _squared_norms(self) -> torch.Tensor:
        parts = [self.x_TD[rows].double().square().sum(1) for rows in _chunks(self.num_tokens)]
        return torch.cat(parts)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, length, CHUNK_TOKENS))

"""Bytes and operations of a factored layer, kernel by kernel, beside the minimum and dense.

    python -m benchmarks.roofline [--removed 0.4] [--details]

Counted, not measured: nothing here has run on a GPU. Every time is a lower bound on an H100 SXM
(the larger of bytes over bandwidth and operations over peak), without launch latency; `launches`
is what that latency multiplies. A matrix is counted once for each launch that reads it: row blocks
of one slot run next to each other, so its later reads come from the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vllm_moesvd.kernels.tiles import TileTable, tile_table

ELEMENT: Final = 2
"""Bytes of a bfloat16 number."""
BYTES_PER_SECOND: Final = 3.35e12
FLOPS_PER_SECOND: Final = 989e12
"""H100 SXM data sheet: HBM3, and bfloat16 without sparsity."""
LINK_BYTES_PER_SECOND: Final = 450e9
"""NVLink 4, one direction."""
BATCHES: Final = (1, 8, 64, 512, 4096)
TP_SIZES: Final = (1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The routed experts of one layer, from the model's config.json."""

    name: str
    hidden_size: int
    expert_width: int
    num_experts: int
    top_k: int

    def ranks(self, removed: float) -> tuple[int, int]:
        """Ranks of form `shared-v` with one group: the same share of `D` and of `F`.

        `removed` is the share of the routed experts' parameters; ranks are multiples of 64.
        """
        d, f, e = self.hidden_size, self.expert_width, self.num_experts
        share = (1 - removed) * 3 * e * d * f / (2 * d * d + f * f + 3 * e * d * f)
        return int(share * d) // 64 * 64, int(share * f) // 64 * 64

    def used_experts(self, tokens: int) -> float:
        """How many experts a batch uses if routing is uniform; exact for one token."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


MODELS: Final = (
    Model(name="Mixtral-8x7B", hidden_size=4096, expert_width=14336, num_experts=8, top_k=2),
    Model(name="Phi-3.5-MoE", hidden_size=4096, expert_width=6400, num_experts=16, top_k=2),
    Model(name="DeepSeek-V3", hidden_size=7168, expert_width=2048, num_experts=256, top_k=8),
    Model(name="Qwen3-30B-A3B", hidden_size=2048, expert_width=768, num_experts=128, top_k=8),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One kernel or exchange of a layer in one process."""

    name: str
    num_bytes: float
    flops: float = 0.0
    launches: int = 1
    is_exchange: bool = False

    @property
    def seconds(self) -> float:
        """Lower bound on an H100."""
        if self.is_exchange:
            return self.num_bytes / LINK_BYTES_PER_SECOND
        return max(self.num_bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


def factored_terms(
    model: Model, *, removed: float, tokens: int, tp_size: int, table: TileTable
) -> list[Term]:
    """The kernels of `vllm_moesvd.kernels.forward` for form `shared-v`, one group, own slots."""
    d, f, t = model.hidden_size, -(-model.expert_width // tp_size), tokens
    big_r, big_q = model.ranks(removed)
    r, q = -(-big_r // tp_size), -(-big_q // tp_size)
    n, used = t * model.top_k, model.used_experts(t)
    terms = [
        Term(name="align", num_bytes=4.0 * (2 * n + 4 * n), launches=_align_launches(model, t))
    ]
    terms += _split_linear("V gate, V up", rows=t, columns=r, halves=2, depth=d, table=table)
    if tp_size > 1:
        sent = ELEMENT * t * 2 * r * (tp_size - 1)
        terms.append(Term(name="all-gather z", num_bytes=sent, is_exchange=True))
    terms.append(
        Term(
            name="U gate, U up, silu",
            num_bytes=ELEMENT * (used * 2 * f * big_r + t * 2 * big_r + n * f),
            flops=4 * n * f * big_r,
        )
    )
    terms += _split_linear("V down", rows=n, columns=big_q, halves=1, depth=f, table=table)
    if tp_size > 1:
        sent = ELEMENT * n * q * (tp_size - 1)
        terms.append(Term(name="reduce-scatter w", num_bytes=sent, is_exchange=True))
    terms.append(
        Term(
            name="U down, weights",
            num_bytes=ELEMENT * (used * d * q + n * q + n * d),
            flops=2 * n * d * q,
        )
    )
    terms.append(Term(name="sum over choices", num_bytes=ELEMENT * (n * d + t * d), flops=n * d))
    return terms + _all_reduce(model, tokens, tp_size)


def dense_terms(model: Model, *, tokens: int, tp_size: int) -> list[Term]:
    """vLLM's fused MoE with Triton kernels: sort, two products, activation, sum."""
    d, f, t = model.hidden_size, -(-model.expert_width // tp_size), tokens
    n, used = t * model.top_k, model.used_experts(t)
    return [
        Term(name="align", num_bytes=4.0 * (2 * n + n), launches=2),
        Term(
            name="gate, up",
            num_bytes=ELEMENT * (used * 2 * f * d + t * d + n * 2 * f),
            flops=4 * n * f * d,
        ),
        Term(name="silu", num_bytes=ELEMENT * n * 3 * f, flops=n * 4 * f),
        Term(
            name="down",
            num_bytes=ELEMENT * (used * d * f + n * f + n * d),
            flops=2 * n * d * f,
        ),
        Term(name="sum over choices", num_bytes=ELEMENT * (n * d + t * d), flops=n * d),
        *_all_reduce(model, tokens, tp_size),
    ]


def minimum_bytes(model: Model, *, removed: float, tokens: int, tp_size: int) -> float:
    """Every factor that is used read once, x read once, y written once; nothing in between."""
    d, f = model.hidden_size, -(-model.expert_width // tp_size)
    big_r, big_q = model.ranks(removed)
    r, q = -(-big_r // tp_size), -(-big_q // tp_size)
    shared = 2 * r * d + big_q * f
    per_slot = 2 * f * big_r + d * q
    return ELEMENT * (shared + model.used_experts(tokens) * per_slot + 2 * tokens * d)


def local_bytes(terms: Sequence[Term]) -> float:
    """Bytes to and from this process's own memory."""
    return sum(term.num_bytes for term in terms if not term.is_exchange)


def _split_linear(
    name: str, *, rows: int, columns: int, halves: int, depth: int, table: TileTable
) -> list[Term]:
    """A product with the same matrices for all rows, split over the depth as the launcher does."""
    bucket = table.bucket(rows, 1)
    programs = -(-rows // bucket.block_m) * halves * -(-columns // bucket.linear.block_n)
    parts = table.split(programs, depth, bucket.linear.block_k)
    numbers = rows * halves * columns
    read = ELEMENT * (halves * columns * depth + rows * depth)
    flops = 2 * numbers * depth
    if parts == 1:
        return [Term(name=name, num_bytes=read + ELEMENT * numbers, flops=flops)]
    return [
        Term(name=f"{name} ({parts} parts)", num_bytes=read + 4 * parts * numbers, flops=flops),
        Term(
            name=f"sum of {parts} parts",
            num_bytes=(4 * parts + ELEMENT) * numbers,
            flops=parts * numbers,
        ),
    ]


def _all_reduce(model: Model, tokens: int, tp_size: int) -> list[Term]:
    if tp_size == 1:
        return []
    sent = 2 * ELEMENT * tokens * model.hidden_size * (tp_size - 1) / tp_size
    return [Term(name="all-reduce y", num_bytes=sent, is_exchange=True)]


def _align_launches(model: Model, tokens: int) -> int:
    padded = 1 << (model.top_k - 1).bit_length()
    return 1 if tokens * padded <= 128 else 3


def summary(removed: float, table: TileTable) -> list[str]:
    """One line of a Markdown table for each model, TP size and number of tokens."""
    lines = [
        "| model | TP | T | MB | min MB | over min | dense MB | GFLOP | dense GFLOP "
        "| µs ≥ | dense µs ≥ | speed-up ≤ | launches | dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for tp_size in TP_SIZES:
            for tokens in BATCHES:
                ours = factored_terms(
                    model, removed=removed, tokens=tokens, tp_size=tp_size, table=table
                )
                dense = dense_terms(model, tokens=tokens, tp_size=tp_size)
                least = minimum_bytes(model, removed=removed, tokens=tokens, tp_size=tp_size)
                seconds, dense_seconds = (sum(t.seconds for t in ts) for ts in (ours, dense))
                cells = (
                    model.name,
                    tp_size,
                    tokens,
                    f"{local_bytes(ours) / 1e6:.1f}",
                    f"{least / 1e6:.1f}",
                    f"{local_bytes(ours) / least:.3f}",
                    f"{local_bytes(dense) / 1e6:.1f}",
                    f"{sum(t.flops for t in ours) / 1e9:.2f}",
                    f"{sum(t.flops for t in dense) / 1e9:.2f}",
                    f"{seconds * 1e6:.1f}",
                    f"{dense_seconds * 1e6:.1f}",
                    f"{dense_seconds / seconds:.2f}",
                    sum(t.launches for t in ours),
                    sum(t.launches for t in dense),
                )
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def details(removed: float, table: TileTable) -> list[str]:
    """One line for each term of each layer."""
    lines = ["| model | TP | T | term | MB | GFLOP | µs ≥ |", "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for tp_size in TP_SIZES:
            for tokens in BATCHES:
                for term in factored_terms(
                    model, removed=removed, tokens=tokens, tp_size=tp_size, table=table
                ):
                    lines.append(
                        f"| {model.name} | {tp_size} | {tokens} | {term.name} "
                        f"| {term.num_bytes / 1e6:.2f} | {term.flops / 1e9:.2f} "
                        f"| {term.seconds * 1e6:.2f} |"
                    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--removed", type=float, default=0.4, help="share of the experts removed")
    parser.add_argument("--details", action="store_true", help="every kernel on a line of its own")
    arguments = parser.parse_args()
    table = tile_table("sm_90", ELEMENT)
    lines = (details if arguments.details else summary)(arguments.removed, table)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

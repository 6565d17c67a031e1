"""Bytes and operations of a factored layer, kernel by kernel, beside the minimum and dense.

    python -m benchmarks.roofline [--removed 0.4] [--form shared-v] [--sharding split] [--details]

Counted, not measured: `docs/gpu.md` has what was. Latent layers are counted in `latent_layers.py`.
Every time is a lower bound on an H100 SXM (the larger of bytes over bandwidth and operations over
peak), without launch latency; `launches` is what that latency multiplies. A matrix is counted once
for each launch that reads it: row blocks of one slot run next to each other, so its later reads
come from the L2 cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from benchmarks.moe_layers import (
    FORMS,
    MODELS,
    SHARDINGS,
    Form,
    Model,
    Sharding,
    layer,
    weight_numbers,
)
from vllm_moesvd.kernels.plan import plan_launches
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
    model: Model,
    *,
    removed: float,
    tokens: int,
    tp_size: int,
    table: TileTable,
    form: Form = "shared-v",
    sharding: Sharding = "split",
) -> list[Term]:
    """The kernels of `vllm_moesvd.kernels.forward`; every expert has its own slot."""
    part = layer(model, form, removed=removed, tokens=tokens, tp_size=tp_size, sharding=sharding)
    sizes, big_r, big_q, tp = part.sizes, part.big_r, part.big_q, part.inner_tp
    plan = plan_launches(sizes, table)
    d, f, r, b, t = sizes.hidden, sizes.width, sizes.r, sizes.base_width, tokens
    q, n, used, groups = -(-big_q // tp), part.pairs, part.used, part.used_groups
    z_rows = t if sizes.num_groups == 1 else n
    joined = b if sizes.num_groups == 1 else 0
    index_bytes = 4.0 * 6 * sizes.num_pairs
    terms = [Term(name="align", num_bytes=index_bytes, launches=_align_launches(model, t))]
    terms += _split_linear(
        "V gate, V up" + (", base" if joined else ""),
        rows=z_rows,
        columns=2 * (r + joined),
        depth=d,
        weights=(groups * 2 * r + 2 * joined) * d,
        parts=plan.z_parts,
    )
    if b and not joined:
        terms += _split_linear(
            "base gate, base up", rows=t, columns=2 * b, depth=d, weights=2 * b * d,
            parts=plan.base_parts,
        )  # fmt: skip
    if tp > 1:
        sent = ELEMENT * z_rows * 2 * r * (tp - 1)
        terms.append(Term(name="all-gather z", num_bytes=sent, is_exchange=True))
    terms.append(
        Term(
            name="U gate, U up, silu",
            num_bytes=ELEMENT * (used * 2 * f * big_r + z_rows * 2 * big_r + t * 2 * b + n * f),
            flops=4 * n * f * big_r,
        )
    )
    terms += _split_linear(
        "V down", rows=n, columns=big_q, depth=f, weights=groups * big_q * f, parts=plan.w_parts
    )
    if b:
        terms.append(Term(name="neurons of the base", num_bytes=ELEMENT * (n + t) * b, flops=n * b))
    if tp > 1:
        sent = ELEMENT * n * q * (tp - 1)
        terms.append(Term(name="reduce-scatter w", num_bytes=sent, is_exchange=True))
    terms.append(
        Term(
            name="U down, weights" + (", base" if b else ""),
            num_bytes=ELEMENT * (used * d * q + n * q + n * d + b * d + (t * (b + d) if b else 0)),
            flops=2 * n * d * q + 2 * t * d * b,
            launches=2 if b and not plan.joins_base_down else 1,
        )
    )
    rows = n + (t if b else 0)
    terms.append(
        Term(name="sum over choices", num_bytes=ELEMENT * (rows * d + t * d), flops=rows * d)
    )
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


def minimum_bytes(
    model: Model,
    *,
    removed: float,
    tokens: int,
    tp_size: int,
    form: Form = "shared-v",
    sharding: Sharding = "split",
) -> float:
    """Every factor that is used read once, x read once, y written once; nothing in between."""
    part = layer(model, form, removed=removed, tokens=tokens, tp_size=tp_size, sharding=sharding)
    numbers = weight_numbers(part, used=part.used, used_groups=part.used_groups)
    return ELEMENT * (numbers + 2 * tokens * model.hidden_size)


def stored_bytes(
    model: Model, *, removed: float, tp_size: int, form: Form, sharding: Sharding
) -> float:
    """The factors of one layer in one process."""
    part = layer(model, form, removed=removed, tokens=1, tp_size=tp_size, sharding=sharding)
    slots, groups = part.sizes.num_slots, part.sizes.num_groups
    return ELEMENT * weight_numbers(part, used=slots, used_groups=groups)


def seconds(terms: Sequence[Term]) -> float:
    """Lower bound of a layer's time: its terms one after the other."""
    return sum(term.seconds for term in terms)


def local_bytes(terms: Sequence[Term]) -> float:
    """Bytes to and from this process's own memory."""
    return sum(term.num_bytes for term in terms if not term.is_exchange)


def _split_linear(
    name: str, *, rows: float, columns: int, depth: int, weights: float, parts: int
) -> list[Term]:
    """A product of `rows` with `columns`, its depth split as the launcher does."""
    numbers = rows * columns
    read = ELEMENT * (weights + rows * depth)
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


def summary(removed: float, table: TileTable, form: Form, sharding: Sharding) -> list[str]:
    """One line of a Markdown table for each model, TP size and number of tokens."""
    lines = [
        "| model | TP | T | MB | min MB | over min | dense MB | GFLOP | dense GFLOP "
        "| µs ≥ | dense µs ≥ | speed-up ≤ | launches | dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, tp_size, tokens in product(MODELS, TP_SIZES, BATCHES):
        ours = factored_terms(
            model, removed=removed, tokens=tokens, tp_size=tp_size, table=table, form=form,
            sharding=sharding,
        )  # fmt: skip
        dense = dense_terms(model, tokens=tokens, tp_size=tp_size)
        least = minimum_bytes(
            model, removed=removed, tokens=tokens, tp_size=tp_size, form=form, sharding=sharding
        )
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
            f"{seconds(ours) * 1e6:.1f}",
            f"{seconds(dense) * 1e6:.1f}",
            f"{seconds(dense) / seconds(ours):.2f}",
            sum(t.launches for t in ours),
            sum(t.launches for t in dense),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def shardings(removed: float, table: TileTable, tp_size: int = 8) -> list[str]:
    """The three ways to share a layer: memory of a process, and time over dense."""
    lines = [
        f"| model | form | sharding over {tp_size} | MB stored, over dense "
        "| time over dense, T = 1 | 64 | 512 | 4096 | exchanges |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, form, sharding in product(MODELS, FORMS, SHARDINGS):
        stored = stored_bytes(model, removed=removed, tp_size=tp_size, form=form, sharding=sharding)
        dense_stored = ELEMENT * model.dense_numbers / tp_size
        ratios, exchanges = [], 0
        for tokens in (1, 64, 512, 4096):
            ours = factored_terms(
                model, removed=removed, tokens=tokens, tp_size=tp_size, table=table, form=form,
                sharding=sharding,
            )  # fmt: skip
            dense = dense_terms(model, tokens=tokens, tp_size=tp_size)
            ratios.append(f"{seconds(ours) / seconds(dense):.2f}")
            exchanges = sum(term.is_exchange for term in ours)
        share = f"{stored / dense_stored:.2f}"
        lines.append(
            f"| {' | '.join([model.name, form, sharding, share, *ratios])} | {exchanges} |"
        )
    return lines


def details(removed: float, table: TileTable, form: Form, sharding: Sharding) -> list[str]:
    """One line for each term of each layer."""
    lines = ["| model | TP | T | term | MB | GFLOP | µs ≥ |", "|---|---|---|---|---|---|---|"]
    for model, tp_size, tokens in product(MODELS, TP_SIZES, BATCHES):
        for term in factored_terms(
            model, removed=removed, tokens=tokens, tp_size=tp_size, table=table, form=form,
            sharding=sharding,
        ):  # fmt: skip
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
    parser.add_argument("--form", choices=FORMS, default="shared-v")
    parser.add_argument("--sharding", choices=SHARDINGS, default="split")
    parser.add_argument("--details", action="store_true", help="every kernel on a line of its own")
    parser.add_argument("--shardings", action="store_true", help="the three shardings over 8")
    arguments = parser.parse_args()
    table = tile_table("sm_90", ELEMENT)
    if arguments.shardings:
        lines = shardings(arguments.removed, table)
    else:
        write = details if arguments.details else summary
        lines = write(arguments.removed, table, arguments.form, arguments.sharding)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

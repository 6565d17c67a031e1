"""The matrices of a `latent` layer that multiply x, at the sizes of real models.

    python -m benchmarks.latent_layers [--removed 0.4]

Counts their launches and bytes, joined and separate, with the time that an H100 needs at least.
Counted, not measured, as in `benchmarks/roofline.py`: no launch latency is in the times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm
from typing import Final

from benchmarks.moe_layers import MODELS, Model
from benchmarks.roofline import BATCHES, ELEMENT, TP_SIZES, Term, dense_terms, seconds
from vllm_moesvd.kernels.plan import MAX_JOINED_TOKENS

KERNEL_MULTIPLE: Final = 32
"""Ranks of latent layers are padded to multiples of it in every process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentLayer:
    """What multiplies x in one layer: router, V and, of some models, shared experts."""

    model: Model
    rank: int
    shared_width: int = 0
    has_shared_gate: bool = False
    wide_logits: bool = False

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def hidden(self) -> int:
        return self.model.hidden_size

    def columns(self, tp_size: int) -> tuple[int, ...]:
        """Rows of the matrices in one process; the router and the gate are whole everywhere."""
        shared = (2 * self.shared_width // tp_size,) if self.shared_width else ()
        gate = (1,) if self.has_shared_gate else ()
        return self.model.num_experts, self.padded_rank(tp_size) // tp_size, *shared, *gate

    def padded_rank(self, tp_size: int) -> int:
        multiple = lcm(KERNEL_MULTIPLE, tp_size)
        return -(-self.rank // multiple) * multiple


def latent_rank(model: Model, removed: float) -> int:
    """The rank, a multiple of 64, that removes this share of the routed experts' parameters."""
    d, f, e = model.hidden_size, model.expert_width, model.num_experts
    return int((1 - removed) * 3 * e * d * f / (3 * e * f + 2 * d)) // 64 * 64


QWEN_A2_7B: Final = Model(
    name="Qwen1.5-MoE-A2.7B", hidden_size=2048, expert_width=1408, num_experts=60, top_k=4
)

SHARED_WIDTHS: Final = {"DeepSeek-V3": 2048, "Qwen1.5-MoE-A2.7B": 5632}


def latent_layers(removed: float) -> tuple[LatentLayer, ...]:
    """The four models and one of Qwen2-MoE, whose shared expert has a gate."""
    return tuple(
        LatentLayer(
            model=model,
            rank=latent_rank(model, removed),
            shared_width=SHARED_WIDTHS.get(model.name, 0),
            has_shared_gate=model is QWEN_A2_7B,
        )
        for model in (*MODELS, QWEN_A2_7B)
    )


LATENT_LAYERS: Final = latent_layers(0.4)


def input_terms(layer: LatentLayer, *, tokens: int, tp_size: int, joins: bool = True) -> list[Term]:
    """The products of x; one launch if tokens are few, else a product of cuBLAS for each matrix."""
    columns = layer.columns(tp_size)
    names = ["router", "V", *(["shared gate, up"] if layer.shared_width else [])]
    names += ["shared expert's gate"] if layer.has_shared_gate else []
    sizes = [4 if layer.wide_logits and name == "router" else ELEMENT for name in names]
    written = [tokens * c * size for c, size in zip(columns, sizes, strict=True)]
    d = layer.hidden
    if joins and tokens <= MAX_JOINED_TOKENS:
        return [
            Term(
                name=", ".join(names),
                num_bytes=ELEMENT * d * (sum(columns) + tokens) + sum(written),
                flops=2 * tokens * sum(columns) * d,
            )
        ]
    return [
        Term(name=name, num_bytes=ELEMENT * d * (c + tokens) + out, flops=2 * tokens * c * d)
        for name, c, out in zip(names, columns, written, strict=True)
    ]


def layer_terms(layer: LatentLayer, *, tokens: int, tp_size: int, joins: bool = True) -> list[Term]:
    """Products of x, exchange of z, vLLM's fused experts of hidden size R, Q; no shared experts
    beyond their first product, no choice of experts."""
    rank, d, t = layer.padded_rank(tp_size), layer.hidden, tokens
    terms = input_terms(layer, tokens=tokens, tp_size=tp_size, joins=joins)
    core = Model(
        name=layer.name,
        hidden_size=rank,
        expert_width=layer.model.expert_width,
        num_experts=layer.model.num_experts,
        top_k=layer.model.top_k,
    )
    part = rank // tp_size
    if tp_size > 1:
        sent: float = ELEMENT * t * part * (tp_size - 1)
        terms.append(Term(name="all-gather z", num_bytes=sent, is_exchange=True))
    experts = dense_terms(core, tokens=t, tp_size=tp_size)
    terms += [term for term in experts if not term.is_exchange]
    if tp_size > 1:
        terms.append(Term(name="reduce-scatter", num_bytes=sent, is_exchange=True))
    terms.append(
        Term(
            name="Q",
            num_bytes=ELEMENT * (d * part + t * (d + part)),
            flops=2 * t * d * part,
        )
    )
    if tp_size > 1:
        sent = 2 * ELEMENT * t * d * (tp_size - 1) / tp_size
        terms.append(Term(name="all-reduce y", num_bytes=sent, is_exchange=True))
    return terms


def table(layers: Sequence[LatentLayer]) -> list[str]:
    """One line of a Markdown table for each model, TP size and number of tokens."""
    lines = [
        "| model | TP | T | products of x: launches, separate | joined | MB | µs ≥ "
        "| layer: launches, separate | joined | µs ≥ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layer, tp_size, tokens in product(layers, TP_SIZES, BATCHES):
        inputs, apart = (
            input_terms(layer, tokens=tokens, tp_size=tp_size, joins=joins)
            for joins in (True, False)
        )
        whole, whole_apart = (
            layer_terms(layer, tokens=tokens, tp_size=tp_size, joins=joins)
            for joins in (True, False)
        )
        cells = (
            layer.name,
            tp_size,
            tokens,
            _launches(apart),
            _launches(inputs),
            f"{sum(term.num_bytes for term in inputs) / 1e6:.1f}",
            f"{seconds(inputs) * 1e6:.1f}",
            _launches(whole_apart),
            _launches(whole),
            f"{seconds(whole) * 1e6:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _launches(terms: Sequence[Term]) -> int:
    return sum(term.launches for term in terms if not term.is_exchange)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--removed", type=float, default=0.4, help="share of the experts removed")
    arguments = parser.parse_args()
    sys.stdout.write("\n".join(table(latent_layers(arguments.removed))) + "\n")


if __name__ == "__main__":
    main()

"""Is what multiplies x in a latent layer faster joined? Separate products against one launch.

    python -m benchmarks.joined_router [--tokens 1 8 16 32 64]

Times both ways for the layers of `benchmarks/latent_layers.py` on a GPU, in a CUDA graph as vLLM
runs them: products of cuBLAS for the router, V and shared experts, and the kernel of
`vllm_moesvd.kernels.joined`. A graph holds calls with several copies of the matrices, so that no
call finds its own in the cache. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch.nn.functional import linear

from benchmarks.gpu_layers import graph_micros, no_gpu, say
from benchmarks.latent_layers import LATENT_LAYERS, LatentLayer, input_terms
from benchmarks.roofline import seconds
from vllm_moesvd.joined import joined_linear
from vllm_moesvd.kernels.plan import MAX_JOINED_TOKENS

BATCHES: Final = (1, 8, 16, 32, 64)
CACHE_BYTES: Final = 200e6
"""More than the L2 cache of any GPU: so many bytes of matrices are read before one is met again."""

Product = Callable[[torch.Tensor, list[torch.Tensor]], object]


def separate(x_TD: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [linear(x_TD, weight) for weight in weights]


def joined(x_TD: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    outs: list[torch.Tensor] = joined_linear(x_TD, weights, False)
    return outs


def micros(product: Product, x_TD: torch.Tensor, copies: list[list[torch.Tensor]]) -> float:
    """Median time of one call in a graph with a call for each of `copies`."""
    return graph_micros([partial(product, x_TD, weights) for weights in copies])


def rows(layer: LatentLayer, tp_size: int, batches: Sequence[int]) -> Iterator[str]:
    """One line of a Markdown table for each number of tokens."""
    columns = layer.columns(tp_size)
    one_copy = 2 * layer.hidden * sum(columns)
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(count: int) -> torch.Tensor:
        numbers = torch.randn(count, layer.hidden, generator=generator, device="cuda")
        return (numbers * layer.hidden**-0.5).bfloat16()

    copies = [[normal(c) for c in columns] for _ in range(max(4, int(CACHE_BYTES // one_copy)))]
    for tokens in batches:
        x_TD = normal(tokens)
        worst = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(joined(x_TD, copies[0]), separate(x_TD, copies[0]), strict=True)
        )
        if not worst < 0.01:
            raise RuntimeError(f"{layer.name}: joined and separate products differ by {worst:.3f}")
        apart, one = micros(separate, x_TD, copies), micros(joined, x_TD, copies)
        least = seconds(input_terms(layer, tokens=tokens, tp_size=tp_size)) * 1e6
        yield (
            f"| {layer.name} | {tp_size} | {tokens} | {len(columns)} | {apart:.1f} | {one:.1f} "
            f"| {apart / one:.2f} | {least:.1f} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(BATCHES))
    given = parser.parse_args(arguments)
    if not 0 < min(given.tokens) <= max(given.tokens) <= MAX_JOINED_TOKENS:
        parser.error(f"--tokens {given.tokens}: expected 1 to {MAX_JOINED_TOKENS}")
    if not torch.cuda.is_available():
        return no_gpu("joined_router")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    say("| model | TP | T | matrices | separate µs | joined µs | times faster | µs ≥ on an H100 |")
    say("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for layer in LATENT_LAYERS:
            for tp_size in (1, 8):
                for line in rows(layer, tp_size, given.tokens):
                    say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

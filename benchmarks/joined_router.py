"""Whether the router joins V: two products against one with stacked weights, on this machine.

    python -m benchmarks.joined_router

What comes after them (the choice of experts, vLLM's experts) takes rows without gaps, so the one
product is followed by two copies unless there is a single token. On a GPU both ways are captured in
a CUDA graph, as vLLM runs them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch.nn.functional import linear

SIZES: Final = {
    "Mixtral-8x7B": (4096, 8, 2048),
    "Qwen3-30B-A3B": (2048, 128, 1088),
}
"""Hidden size, experts, rank of a latent layer at 40 % removed."""
BATCHES: Final = (1, 8, 64, 512)
REPEATS: Final = 15


def seconds(call: Callable[[], object], device: str) -> float:
    """Median time of one call."""
    calls = 20
    if device == "cpu":
        run: Callable[[], object] = lambda: [call() for _ in range(calls)]  # noqa: E731
    else:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        run = graph.replay
    times = []
    for _ in range(REPEATS):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def rows(device: str) -> Iterator[str]:
    """One line of a Markdown table for each model and number of tokens."""
    yield "| model | T | two products µs | one and copies µs |"
    yield "|---|---|---|---|"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for model, (hidden, experts, rank) in SIZES.items():
        weight = torch.randn(experts + rank, hidden, device=device).to(dtype)
        router, v = weight[:experts].clone(), weight[experts:].clone()
        for tokens in BATCHES:
            x = torch.randn(tokens, hidden, device=device).to(dtype)

            def two(x: torch.Tensor = x, a: torch.Tensor = router, b: torch.Tensor = v) -> None:
                linear(x, a)
                linear(x, b)

            def one(x: torch.Tensor = x, w: torch.Tensor = weight, e: int = experts) -> None:
                both = linear(x, w)
                both[:, :e].contiguous()
                both[:, e:].contiguous()

            times = (seconds(two, device), seconds(one, device))
            yield f"| {model} | {tokens} | {times[0] * 1e6:.1f} | {times[1] * 1e6:.1f} |"


def main() -> None:
    with torch.inference_mode():
        for line in rows("cuda" if torch.cuda.is_available() else "cpu"):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()

"""Seconds, loss and memory of factoring one layer, beside one `torch.linalg.svd` per weight.

All ways get the same routed tokens, and the time to read them counts. The naive way is what the
published per-expert methods do, in fp32: Gram, Cholesky, SVD of W S, S⁻¹; the plain SVD of W,
without any activations, is shown too. `svd` is compared at the naive way's rank; `shared-v` and
`latent` have the rank that fills the same bytes. The loss is that of the layer's output, on the
tokens that were fitted and on as many others. Each way runs in a process of its own for its peak
memory, one after the other on each shape.

Every way may use `--threads` threads: the naive one gives them to BLAS, ours to as many experts
side by side. Wall-clock and CPU seconds are both shown with the ratio of each: the first counts
for a user, the second does not depend on what else the machine is doing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import silu

from compress_tool.factorize.latent import solve_latent
from compress_tool.factorize.problem import (
    ExpertWeights,
    LayerProblem,
    relative_error,
    routed_output,
)
from compress_tool.factorize.shared_v import solve_shared_v
from compress_tool.factorize.weighted_svd import solve_weighted_svd
from compress_tool.factors import LatentFactors, SharedFactors
from compress_tool.layer_stats import LayerStatistics
from compress_tool.packing import folded_factors
from compress_tool.side_by_side import steady_sums
from vllm_moesvd.format import PROJECTIONS, MoEShape

SHAPES: Final = {
    "64 experts of 768 x 2048": (2048, 768, 64, 8, 16384),
    "8 experts of 3584 x 1024": (1024, 3584, 8, 2, 8192),
}
"""Hidden size, width, experts, experts per token, tokens."""

KEPT_SHARE: Final = 0.6
"""Of the experts' parameters: 40 % are removed."""

NAIVE: Final = "whitened SVD"
WAYS: Final = (NAIVE, "svd (ours)", "plain SVD", "shared-v (ours)", "latent (ours)")


def main() -> None:
    """Run every way on every shape, or (in a child process) one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "WAY"))
    parser.add_argument("--experts", type=int, help="fewer experts, for a quick look")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        shape, way = options.one
        sys.stdout.write(json.dumps(_measure(shape, way, options.experts)) + "\n")
        return
    results: dict[str, dict[str, Any]] = {}
    for shape in SHAPES:
        results[shape] = {}
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.solver", "--one", shape, way]
            words += ["--threads", str(options.threads)]
            if options.experts:
                words += ["--experts", str(options.experts)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout)
            results[shape][way] = result
            naive = results[shape][NAIVE]
            sys.stdout.write(
                f"{shape:26} {way:16} rank {result['rank']:4} "
                f"{result['seconds']:8.2f} s {naive['seconds'] / result['seconds']:5.1f}x  "
                f"CPU {result['cpu_seconds']:8.2f} s "
                f"{naive['cpu_seconds'] / result['cpu_seconds']:5.1f}x  "
                f"loss {result['loss']:.4f} fitted, {result['unseen']:.4f} unseen  "
                f"peak {result['peak_mib']} MiB\n"
            )
            sys.stdout.flush()
    if options.out:
        about = {"cores": os.cpu_count(), "threads": options.threads}
        options.out.write_text(json.dumps(about | results, indent=1) + "\n")


def _measure(shape_name: str, way: str, num_experts: int | None) -> dict[str, Any]:
    hidden, width, experts, top_k, tokens = SHAPES[shape_name]
    if num_experts:
        # As many tokens for each expert as in the whole layer.
        tokens = tokens * top_k // experts * num_experts
        top_k, experts = 1, num_experts
    problem, unseen = _problems(hidden, width, experts, top_k, tokens)
    kept = KEPT_SHARE * 3 * experts * width * hidden
    rank = int(kept / (3 * experts * (hidden + width)))
    if way == "shared-v (ours)":
        rank = min(hidden, width, int(kept / ((2 * experts + 1) * width + (experts + 2) * hidden)))
    if way == "latent (ours)":
        rank = int(kept / (3 * experts * width + 2 * hidden))
    solvers: dict[str, Callable[[], SharedFactors | LatentFactors]] = {
        "plain SVD": lambda: _naive(problem, rank, whiten=False),
        NAIVE: lambda: _naive(problem, rank, whiten=True),
        "svd (ours)": lambda: solve_weighted_svd(problem, rank, rank).factors,
        "shared-v (ours)": lambda: solve_shared_v(problem, rank, rank).factors,
        "latent (ours)": lambda: _latent(problem, rank),
    }
    # Libraries set themselves up on first use.
    torch.linalg.svd(torch.eye(300))
    torch.linalg.eigh(torch.eye(300))
    start, cpu_start = time.perf_counter(), time.process_time()
    # As `run` calls them: BLAS has one thread, experts have the others.
    with steady_sums(problem.shape) if way.endswith("(ours)") else nullcontext():
        factors = solvers[way]()
    cpu_seconds = time.process_time() - cpu_start
    seconds = time.perf_counter() - start
    peak = _peak_mib()
    return {
        "rank": rank,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": _loss(problem, factors),
        "unseen": _loss(unseen, factors),
        "peak_mib": peak,
    }


def _loss(problem: LayerProblem, factors: SharedFactors | LatentFactors) -> float:
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation, problem.workers)
    folded_TD = routed_output(
        problem.statistics, lambda e: folded_factors(factors, e, torch.float32), silu
    )
    return relative_error(y_TD, folded_TD)


def _latent(problem: LayerProblem, rank: int) -> LatentFactors:
    """The dense output is part of the work."""
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation, problem.workers)
    return solve_latent(problem, y_TD, rank, rank).factors


def _naive(problem: LayerProblem, rank: int, *, whiten: bool) -> SharedFactors:
    """One `torch.linalg.svd` per expert and projection, in fp32, as the public code does it."""
    u: dict[str, list[torch.Tensor]] = {projection: [] for projection in PROJECTIONS}
    v: dict[str, list[torch.Tensor]] = {projection: [] for projection in PROJECTIONS}
    for expert in range(problem.shape.num_experts):
        for projection, weight in zip(PROJECTIONS, problem.experts(expert), strict=True):
            scaled, root = weight, None
            if whiten:
                rows = problem.neuron_rows if projection == "down" else problem.input_rows
                x_nD = rows(expert)
                gram = x_nD.T @ x_nD
                gram.diagonal().add_(1e-4 * gram.diagonal().mean())
                root = torch.linalg.cholesky(gram)
                scaled = weight @ root
            left, sigma, right = torch.linalg.svd(scaled, full_matrices=False)
            right = right[:rank]
            if root is not None:
                right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
            u[projection].append(left[:, :rank] * sigma[:rank])
            v[projection].append(right)
    experts = tuple(range(problem.shape.num_experts))
    return SharedFactors(
        v_gate_GRD=torch.stack(v["gate"]),
        v_up_GRD=torch.stack(v["up"]),
        v_down_GRF=torch.stack(v["down"]),
        u_gate_SFR=torch.stack(u["gate"]),
        u_up_SFR=torch.stack(u["up"]),
        u_down_SDR=torch.stack(u["down"]),
        expert_slot=experts,
        slot_group=experts,
        form="svd",
    )


def _problems(
    hidden: int, width: int, experts: int, top_k: int, tokens: int
) -> tuple[LayerProblem, LayerProblem]:
    """Experts that share a part, and inputs whose spectrum falls like that of real layers.

    The second problem has the same layer and other tokens.
    """
    g = torch.Generator().manual_seed(0)
    mix_DD = torch.randn(hidden, hidden, generator=g) / hidden**0.5
    falling_DD = torch.arange(1, hidden + 1)[:, None] ** -0.5 * mix_DD
    base = [torch.randn(width, hidden, generator=g) / hidden**0.5 for _ in range(2)]
    base.append(torch.randn(hidden, width, generator=g) / width**0.5)

    def weights(expert: int) -> ExpertWeights:
        own = torch.Generator().manual_seed(expert + 1)
        gate, up, down = (
            0.6 * shared + 0.8 * torch.randn(shared.shape, generator=own) / shared.shape[1] ** 0.5
            for shared in base
        )
        return gate, up, down

    stored = [weights(expert) for expert in range(experts)]

    def problem() -> LayerProblem:
        top = torch.randn(tokens, experts, generator=g).topk(top_k, dim=-1)
        return LayerProblem(
            shape=MoEShape(
                hidden_size=hidden, expert_width=width, num_experts=experts, top_k=top_k
            ),
            statistics=LayerStatistics(
                x_TD=torch.randn(tokens, hidden, generator=g) @ falling_DD,
                index_TK=top.indices,
                gate_TK=torch.softmax(top.values, dim=-1),
                num_experts=experts,
            ),
            experts=lambda expert: stored[expert],
            activation=silu,
        )

    return problem(), problem()


def _peak_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()

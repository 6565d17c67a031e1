"""CPU seconds, loss and memory of factoring one layer, beside one `torch.linalg.svd` per weight.

Both sides get the same rank, the same routed tokens and the same time to read them. The naive way
is what the published per-expert methods do: Gram, Cholesky, SVD of W S, and S⁻¹; the plain SVD of
W, without any activations, is shown too. Each runs in a process of its own for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import silu

from compress_tool.factorize.problem import LayerProblem, relative_error, routed_output
from compress_tool.factorize.shared_v import solve_shared_v
from compress_tool.factorize.weighted_svd import solve_weighted_svd
from compress_tool.factors import SharedFactors
from compress_tool.layer_stats import LayerStatistics
from compress_tool.packing import folded_factors
from vllm_moesvd.format import PROJECTIONS, MoEShape

SHAPES: Final = {
    "64 experts of 768 x 2048": (2048, 768, 64, 8, 16384, 0.5),
    "8 experts of 3584 x 1024": (1024, 3584, 8, 2, 8192, 0.5),
}
"""Hidden size, width, experts, experts per token, tokens, share of the smaller side as rank."""
WAYS: Final = ("plain SVD", "whitened SVD", "svd (ours)", "shared-v (ours)")


def main() -> None:
    """Run every way on every shape, or (in a child process) one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "WAY"))
    parser.add_argument("--experts", type=int, help="fewer experts, for a quick look")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(_measure(*options.one, options.experts)) + "\n")
        return
    results: dict[str, dict[str, Any]] = {}
    for shape in SHAPES:
        results[shape] = {}
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.solver", "--one", shape, way]
            if options.experts:
                words += ["--experts", str(options.experts)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout)
            results[shape][way] = result
            naive = results[shape]["whitened SVD" if "whitened SVD" in results[shape] else way]
            sys.stdout.write(
                f"{shape:26} {way:16} {result['seconds']:8.2f} s  "
                f"{naive['seconds'] / result['seconds']:5.1f}x  loss {result['loss']:.5f}  "
                f"peak {result['peak_mib']} MiB\n"
            )
            sys.stdout.flush()
    if options.out:
        about = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
        options.out.write_text(json.dumps(about | results, indent=1) + "\n")


def _measure(shape_name: str, way: str, num_experts: int | None) -> dict[str, Any]:
    hidden, width, experts, top_k, tokens, share = SHAPES[shape_name]
    if num_experts:
        # As many tokens for each expert as in the whole layer.
        tokens = tokens * top_k // experts * num_experts
        top_k, experts = 1, num_experts
    problem = _problem(hidden, width, experts, top_k, tokens)
    rank = int(share * min(hidden, width))
    solvers: dict[str, Callable[[], SharedFactors]] = {
        "plain SVD": lambda: _naive(problem, rank, whiten=False),
        "whitened SVD": lambda: _naive(problem, rank, whiten=True),
        "svd (ours)": lambda: solve_weighted_svd(problem, rank, rank).factors,
        "shared-v (ours)": lambda: solve_shared_v(problem, rank, rank).factors,
    }
    # CPU seconds: on a machine that does other work too, wall-clock time would measure that.
    start = time.process_time()
    factors = solvers[way]()
    seconds = time.process_time() - start
    peak = _peak_mib()
    y_TD = routed_output(problem.statistics, problem.experts, problem.activation)
    folded = routed_output(
        problem.statistics, lambda e: folded_factors(factors, e, torch.float32), silu
    )
    return {"seconds": seconds, "loss": relative_error(y_TD, folded), "peak_mib": peak}


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


def _problem(hidden: int, width: int, experts: int, top_k: int, tokens: int) -> LayerProblem:
    """Experts that share a part, and inputs whose spectrum falls like that of real layers."""
    g = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, hidden, generator=g) * torch.arange(1, hidden + 1) ** -0.5
    x_TD = x_TD @ torch.randn(hidden, hidden, generator=g) / hidden**0.5
    top = torch.randn(tokens, experts, generator=g).topk(top_k, dim=-1)
    base = [torch.randn(width, hidden, generator=g) / hidden**0.5 for _ in range(2)]
    base.append(torch.randn(hidden, width, generator=g) / width**0.5)

    def weights(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = torch.Generator().manual_seed(expert + 1)
        gate, up, down = (
            0.6 * shared + 0.8 * torch.randn(shared.shape, generator=own) / shared.shape[1] ** 0.5
            for shared in base
        )
        return gate, up, down

    stored = [weights(expert) for expert in range(experts)]
    return LayerProblem(
        shape=MoEShape(hidden_size=hidden, expert_width=width, num_experts=experts, top_k=top_k),
        statistics=LayerStatistics(
            x_TD=x_TD,
            index_TK=top.indices,
            gate_TK=torch.softmax(top.values, dim=-1),
            num_experts=experts,
        ),
        experts=lambda expert: stored[expert],
        activation=silu,
    )


def _peak_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    main()

"""Times of every step of a factored layer for many tile sizes, to fill the tables in `tiles/`.

    python -m benchmarks.gpu_tiles --out times.json [--jobs 12]

Serving never tunes: this is run once per GPU architecture, and what it finds is checked in. Every
candidate (a height of row blocks, a tile for the linear steps and one for gate and up) serves a
whole layer of a real model's size at many numbers of tokens; the steps are timed apart, each in a
CUDA graph of several calls with other experts and other matrices, so that nothing is found in the
cache. `benchmarks.tile_choice` makes a table of the times. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_layers import no_gpu, say
from benchmarks.moe_layers import MODELS, Model
from vllm_moesvd.kernels import forward
from vllm_moesvd.kernels.forward import Factors
from vllm_moesvd.kernels.gate_up import gate_up
from vllm_moesvd.kernels.plan import LayerSizes, plan_launches
from vllm_moesvd.kernels.routing import align
from vllm_moesvd.kernels.slots import SlotTable, rank_slots
from vllm_moesvd.kernels.tiles import Bucket, Tile, TileTable

TOKENS: Final = {
    "Mixtral-8x7B": (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    "DeepSeek-V3": (1, 8, 64, 256, 1024, 4096),
    "Qwen3-30B-A3B": (1, 8, 32, 64, 128, 256, 512, 1024, 4096),
}
LINEAR: Final = {
    16: ((32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 8, 4),
         (64, 256, 4, 3), (64, 256, 8, 3), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 4),
         (64, 64, 4, 5), (128, 128, 4, 4)),
    32: ((64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 8, 4), (128, 128, 4, 4),
         (64, 64, 4, 5)),
    64: ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3),
         (128, 128, 4, 3), (256, 64, 8, 3), (128, 64, 4, 5)),
    128: ((128, 64, 8, 4), (128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3),
          (256, 64, 8, 4), (64, 64, 4, 4)),
    256: ((128, 64, 8, 3), (128, 64, 8, 4)),
}  # fmt: skip
"""Columns, depth, warps, stages by height."""
GATE_UP: Final = {
    16: ((32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3),
         (64, 128, 8, 3), (64, 128, 4, 4), (32, 64, 4, 5), (32, 128, 4, 5), (128, 64, 4, 3),
         (128, 64, 8, 4), (64, 256, 8, 2)),
    32: ((64, 64, 4, 4), (64, 128, 4, 3), (32, 128, 4, 4), (64, 128, 8, 3), (128, 64, 8, 4),
         (64, 128, 4, 4)),
    64: ((64, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 8, 4), (128, 64, 8, 3),
         (128, 64, 8, 4), (32, 128, 4, 4), (64, 128, 8, 3)),
    128: ((128, 64, 8, 3), (64, 64, 8, 4), (64, 64, 4, 4), (128, 64, 8, 4), (128, 32, 8, 4),
          (64, 128, 8, 3), (64, 64, 8, 3)),
    256: ((64, 64, 8, 3), (64, 64, 8, 4)),
}  # fmt: skip
GROUP_M: Final = {16: (1, 16), 32: (8,), 64: (8,), 128: (8,), 256: (4,)}
TARGETS: Final = (132, 264, 528)
CALLS: Final = 8
CACHE_BYTES: Final = 200e6
"""Several times the largest L2: matrices smaller than this are kept in several copies."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    block_m: int
    linear: Tile
    gate_up: Tile

    @property
    def name(self) -> str:
        tiles = (
            "-".join(map(str, (t.block_n, t.block_k, t.num_warps, t.num_stages, t.group_m)))
            for t in (self.linear, self.gate_up)
        )
        return f"{self.block_m}|{'|'.join(tiles)}"

    def table(self, target_programs: int) -> TileTable:
        bucket = Bucket(
            max_rows=None, block_m=self.block_m, linear=self.linear, gate_up=self.gate_up
        )
        return TileTable(buckets=(bucket,), target_programs=target_programs)


def candidates() -> Iterator[Candidate]:
    for block_m, linears in LINEAR.items():
        for group_m in GROUP_M[block_m]:
            for linear, neurons in zip(linears, GATE_UP[block_m], strict=True):
                yield Candidate(
                    block_m=block_m, linear=_tile(linear, group_m), gate_up=_tile(neurons, group_m)
                )


def _tile(numbers: tuple[int, int, int, int], group_m: int) -> Tile:
    n, k, warps, stages = numbers
    return Tile(block_n=n, block_k=k, num_warps=warps, num_stages=stages, group_m=group_m)


class Layer:
    """Random factors of one layer, V in several copies."""

    def __init__(self, model: Model, svd: bool) -> None:
        d, f, e = model.hidden_size, model.expert_width, model.num_experts
        rank, rank_down = model.ranks(0.4)
        if svd:
            rank = rank_down = int(0.6 * d * f / (d + f)) // 16 * 16
        groups = e if svd else 1
        self.model, self.experts = model, e
        u = [self._random(e, f, rank), self._random(e, f, rank), self._random(e, d, rank_down)]
        copies = 1 if svd else max(1, int(CACHE_BYTES / (4 * rank * d)))
        down_copies = 1 if svd else max(1, int(CACHE_BYTES / (2 * rank_down * f)))
        v_down = [self._random(groups, rank_down, f) for _ in range(min(down_copies, CALLS))]
        v = [
            (self._random(groups, rank, d), self._random(groups, rank, d))
            for _ in range(min(copies, CALLS))
        ]
        self.factors = [
            Factors(
                v_gate_GrD=v[i % len(v)][0],
                v_up_GrD=v[i % len(v)][1],
                u_gate_SFR=u[0],
                u_up_SFR=u[1],
                v_down_GQF=v_down[i % len(v_down)],
                u_down_SDq=u[2],
            )
            for i in range(CALLS)
        ]
        ranks = rank_slots(range(e), range(e) if svd else [0] * e)
        rank_E, slot_S, group_S = (torch.tensor(r, dtype=torch.int32, device="cuda") for r in ranks)
        self.slots = SlotTable(
            rank_E=rank_E, slot_S=slot_S, group_S=group_S, merges=False, num_groups=groups
        )

    @staticmethod
    def _random(*shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        return tensor.normal_(std=shape[-1] ** -0.5)

    @staticmethod
    def _scratch(*wanted: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=kind, device="cuda") for shape, kind in wanted]

    def steps(self, tokens: int, table: TileTable) -> dict[str, Callable[[int], None]]:
        """The four products of call number `i`, each launched alone."""
        generator = torch.Generator("cuda").manual_seed(tokens)
        f = self.factors[0]
        hidden = f.v_gate_GrD.shape[2]
        sizes = LayerSizes(
            num_tokens=tokens,
            top_k=self.model.top_k,
            hidden=hidden,
            width=f.u_gate_SFR.shape[1],
            r=f.v_gate_GrD.shape[1],
            q=f.v_down_GQF.shape[1],
            num_slots=self.experts,
            num_groups=self.slots.num_groups,
            base_width=0,
        )
        plan = plan_launches(sizes, table)
        calls = []
        for _ in range(CALLS):
            x_TD = torch.randn(tokens, hidden, generator=generator, device="cuda")
            scores = torch.rand(tokens, self.experts, generator=generator, device="cuda")
            weights_TK, ids_TK = scores.topk(self.model.top_k)
            s = forward._scratch(sizes, plan, 1, self.slots, torch.bfloat16, self._scratch)
            align(ids_TK, weights_TK, self.slots, s.routing)
            s.h_NF.normal_()
            s.w_CNq.normal_()
            s.z_M2r.normal_()
            calls.append((x_TD.to(torch.bfloat16), s, torch.empty_like(x_TD, dtype=torch.bfloat16)))

        def neurons(i: int) -> None:
            _, s, _ = calls[i]
            gate_up(
                s.z_M2r.unsqueeze(0),
                self.factors[i].u_gate_SFR,
                self.factors[i].u_up_SFR,
                s.h_NF,
                s.routing,
                tile=plan.by_slot.gate_up,
                top_k=sizes.top_k,
                from_tokens=sizes.num_groups == 1,
                base_T2B=None,
            )

        return {
            "z": lambda i: forward._project_in(
                calls[i][0], self.factors[i], sizes, plan, calls[i][1]
            ),
            "gate_up": neurons,
            "w": lambda i: forward._project_down(self.factors[i], sizes, plan, calls[i][1]),
            "y": lambda i: forward._project_out(
                calls[i][1].w_CNq.squeeze(0), calls[i][2], self.factors[i], sizes, plan, calls[i][1]
            ),
        }


def time_step(step: Callable[[int], None]) -> float:
    """Median microseconds of one call."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            step(i)
    times: list[float] = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[1:])


def worth_trying(candidate: Candidate, rows: float, tokens: int) -> bool:
    """Leaves out heights that no step of this batch could want."""
    most, least = tokens * 2, rows
    return candidate.block_m <= max(16, 4 * most) and candidate.block_m >= min(128, least / 8)


def compile_some(part: int, parts: int) -> None:
    """Compile every `parts`-th candidate through the disk cache, on a layer without weight."""
    small = Model(name="small", hidden_size=1024, expert_width=1024, num_experts=8, top_k=2)
    for svd in (False, True):
        layer = Layer(small, svd)
        for i, candidate in enumerate(candidates()):
            if i % parts != part:
                continue
            for target in (1, 528):
                for step in layer.steps(64, candidate.table(target)).values():
                    try:
                        step(0)
                    except Exception as problem:
                        say(f"{candidate.name}: {type(problem).__name__}")
                        break
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.compile is not None:
        compile_some(given.compile, given.jobs)
        return 0
    if not torch.cuda.is_available():
        return no_gpu("gpu_tiles")
    command = [sys.executable, "-m", "benchmarks.gpu_tiles", "--jobs", str(given.jobs)]
    workers = [subprocess.Popen([*command, "--compile", str(part)]) for part in range(given.jobs)]
    for worker in workers:
        worker.wait()
    say("compiled")
    rows: list[dict[str, Any]] = []
    by_name = {model.name: model for model in MODELS}
    for name, batches in TOKENS.items():
        for svd in (False, True) if name == "Qwen3-30B-A3B" else (False,):
            layer = Layer(by_name[name], svd)
            for tokens in batches:
                best: dict[str, float] = {}
                per_key = tokens * layer.model.top_k / layer.experts
                for candidate in candidates():
                    if not worth_trying(candidate, per_key, tokens):
                        continue
                    for target in TARGETS if tokens <= 64 else TARGETS[:1]:
                        row = {"model": name, "svd": svd, "tokens": tokens, "target": target,
                               "candidate": candidate.name}  # fmt: skip
                        try:
                            steps = layer.steps(tokens, candidate.table(target))
                            if target != TARGETS[0]:
                                steps = {key: steps[key] for key in ("z", "w")}
                            times = {key: time_step(step) for key, step in steps.items()}
                        except Exception as problem:
                            row["problem"] = f"{type(problem).__name__}: {problem}"[:200]
                            rows.append(row)
                            continue
                        rows.append(row | times)
                        for key, value in times.items():
                            best[key] = min(value, best.get(key, value))
                shown = ", ".join(f"{key} {value:.1f}" for key, value in best.items())
                say(f"{name}{' svd' if svd else ''} T={tokens}: {shown}")
                if given.out:
                    given.out.write_text(json.dumps(rows), encoding="utf-8")
            del layer
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Generates greedily from checkpoints with real engines: `python -m tests.vllm_moesvd.engine_run`.

A program of its own, because an engine wants a fresh process: the tests import this module for
its functions, and run it for its engines. Prints one JSON object: path → list of completions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

ROOT: Final = Path(__file__).parents[2]
PROMPTS: Final = (
    "The experts of a layer",
    "shared",
    "Once upon a time there was a matrix of low rank,",
    "0123456789",
)
NUM_TOKENS: Final = 24
ENGINE_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Greedy tokens, the log probability of each, and its lead over the second-best token."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def run_engines(
    paths: list[Path],
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    eager: bool = True,
    options: dict[str, Any] | None = None,
    joined: bool = False,
) -> list[list[Completion]]:
    """Completions of `PROMPTS` by each checkpoint, one engine after the other.

    `joined`, for one process: latent layers multiply x by the operator, as on a GPU.
    """
    command = [sys.executable, "-m", "tests.vllm_moesvd.engine_run", *map(str, paths)]
    options = {"pipeline_parallel_size": pp_size} | (options or {})
    command += ["--tp-size", str(tp_size), "--options", json.dumps(options)]
    command += ["--eager"] if eager else []
    command += ["--joined"] if joined else []
    environment = os.environ | ENGINE_ENVIRONMENT
    if tp_size * pp_size > 1:
        # vLLM's automatic binding wants a NUMA node per process.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp_size * pp_size)))
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return [[Completion(**one) for one in completions] for completions in result]


def generate(path: str, *, tp_size: int, eager: bool, options: dict[str, Any]) -> list[Any]:
    """Completions of one checkpoint as JSON values; the engine is gone when it returns."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(
        model=path,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=len(PROMPTS),
        enforce_eager=eager,
        tensor_parallel_size=tp_size,
        disable_log_stats=True,
        seed=0,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    requests = engine.generate(list(PROMPTS), sampling, use_tqdm=False)
    completions = [completion(request.outputs[0]) for request in requests]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return completions


@contextmanager
def joining() -> Iterator[None]:
    """Engines of this process join the products of their latent layers, and have some."""
    from tests.vllm_moesvd.harness import plain_weights
    from vllm_moesvd.latent_runner import LatentRunner

    joined: list[LatentRunner] = []

    def join(runner: LatentRunner) -> None:
        runner.is_joined = True
        joined.append(runner)

    with plain_weights(), patch.object(LatentRunner, "prepare", join):
        yield
    assert joined


def completion(output: Any) -> dict[str, Any]:
    """One output of vLLM, generated with `logprobs=2`, as the fields of a Completion."""
    ranked = [sorted(p.logprob for p in step.values()) for step in output.logprobs]
    steps = zip(output.logprobs, output.token_ids, strict=True)
    return {
        "tokens": list(output.token_ids),
        "logprobs": [step[token].logprob for step, token in steps],
        "margins": [values[-1] - values[-2] for values in ranked],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--joined", action="store_true")
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    with joining() if given.joined else nullcontext():
        results = [
            generate(path, tp_size=given.tp_size, eager=given.eager, options=given.options)
            for path in given.paths
        ]
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()

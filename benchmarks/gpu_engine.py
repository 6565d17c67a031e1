"""Throughput of whole vLLM engines on a GPU, dense and factored, with CUDA graphs.

    python -m benchmarks.gpu_engine [--model Mixtral-8x7B] [--layers 16]
                                    [--forms dense latent-40 ...] [--batches 1 8 32 128]
                                    [--out FILE.json]

Each form is one process with an engine as `vllm serve` configures it (compiled, CUDA graphs),
filled with random numbers (`--load-format dummy`). Tokens are sampled from nearly equal
probabilities, so every sequence meets other experts. Decode is the difference between a long and a
short run of the same prompts; prefill is a step of 8 prompts of 1,024 tokens. Medians of
repetitions. `--layers` is for models whose dense form does not fit the GPU: both forms then have
that many decoder layers. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_layers import FORMS, no_gpu, say, write_config
from benchmarks.moe_layers import MODELS

PROMPT: Final = 128
DECODED: Final = 128
PREFILL: Final = (8, 1024)
REPEATS: Final = 3


def measure(folder: Path, batches: Sequence[int]) -> dict[str, Any]:
    """Start one engine and time it; tokens per second by batch, and gigabytes of weights."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        seed=0,
    )
    start_seconds = time.perf_counter() - started
    rng = random.Random(0)

    def seconds(batch: int, prompt: int, decoded: int) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(32000) for _ in range(prompt)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=1.0, max_tokens=decoded, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert all(len(o.outputs[0].token_ids) == decoded for o in outputs)
        return taken

    decode = {}
    for batch in batches:
        seconds(batch, PROMPT, 8)
        times = [
            seconds(batch, PROMPT, 1 + DECODED) - seconds(batch, PROMPT, 1) for _ in range(REPEATS)
        ]
        decode[batch] = batch * DECODED / statistics.median(times)
    seconds(*PREFILL, 1)
    prefill_seconds = statistics.median(seconds(*PREFILL, 1) for _ in range(2 * REPEATS))
    worker = llm.llm_engine.model_executor.driver_worker
    model = getattr(worker, "worker", worker).model_runner.model
    return {
        "decode_tokens_per_second": decode,
        "prefill_tokens_per_second": PREFILL[0] * PREFILL[1] / prefill_seconds,
        "weight_gigabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
        "start_seconds": start_seconds,
        "gpu": torch.cuda.get_device_name(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    by_name = {model.name: model for model in MODELS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(by_name), default="Mixtral-8x7B")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        result = measure(given.measure, given.batches)
        (given.measure / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        return no_gpu("gpu_engine")
    results = {}
    heads = " | ".join(f"decode {batch}" for batch in given.batches)
    say(f"| form | weights GB | {heads} | prefill |")
    say("|---" * (len(given.batches) + 3) + "|")
    for form in given.forms:
        folder = Path(tempfile.mkdtemp())
        write_config(folder, by_name[given.model], form, given.layers)
        options = ["--measure", str(folder), "--batches", *map(str, given.batches)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_engine", *options],
            check=True,
            # One process, so that its own model can be counted.
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        results[form] = result
        first = results[given.forms[0]]
        cells = [
            f"{value:.0f} ({value / first['decode_tokens_per_second'][batch]:.2f}x)"
            for batch, value in result["decode_tokens_per_second"].items()
        ]
        prefill = result["prefill_tokens_per_second"]
        ratio = prefill / first["prefill_tokens_per_second"]
        cells.append(f"{prefill:.0f} ({ratio:.2f}x)")
        say(f"| {form} | {result['weight_gigabytes']:.1f} | {' | '.join(cells)} |")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

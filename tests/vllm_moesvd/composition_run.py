"""Engines with vLLM's other features on: `python -m tests.vllm_moesvd.composition_run FOLDER`.

Each engine serves several checks, because starting one takes longer than they do. Prints one JSON
object: what each check generated, and the numbers that show that the feature was at work.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any, Final

from tests.vllm_moesvd.engine_run import completion

PREFIX: Final = "The experts of a layer share one matrix of low rank, and each has its own. " * 2
PROMPTS: Final = tuple(PREFIX + end for end in ("Once", "shared", "0123456789", "rank rank rank"))
NUM_TOKENS: Final = 12
CHUNK: Final = 48
"""Tokens per step: less than a prompt has, so that it is prefilled in chunks."""
LORA_RANK: Final = 8


def main() -> None:
    """FOLDER holds `plain`, `merged` (the adapter added to attention), `adapter`, `wrong`."""
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for name in ("plain", "merged"):
        with_engine(folder / name, {}, lambda e, n=name: results.update({n: generate(e)}))
    features = {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": CHUNK,
        "enable_lora": True,
        "max_lora_rank": LORA_RANK,
    }
    with_engine(folder / "plain", features, lambda e: results.update(check_features(e, folder)))
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options = {"speculative_config": ngram, "disable_log_stats": False}
    with_engine(folder / "plain", options, lambda e: results.update(check_speculation(e)))
    sys.stdout.write("\n" + json.dumps(results) + "\n")


def check_features(engine: Any, folder: Path) -> dict[str, Any]:
    """Chunked prefill; the same prompts from the cache; adapters; other weights and back."""
    from vllm.lora.request import LoRARequest

    results: dict[str, Any] = {"chunked": generate(engine), "cached": generate(engine)}
    results["num_cached"] = cached_tokens(engine)
    adapter = LoRARequest("adapter", 1, str(folder / "adapter"))
    results["adapter"] = generate(engine, lora_request=adapter)
    for name in ("wrong", "fused"):
        try:
            engine.llm_engine.add_lora(LoRARequest(name, 2, str(folder / name)))
            results[name] = "accepted"
        except ValueError as error:
            results[name] = str(error)
    for name in ("merged", "plain"):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / name)})
        engine.reset_prefix_cache()
        results[f"reloaded_{name}"] = generate(engine)
    return results


def check_speculation(engine: Any) -> dict[str, Any]:
    """Speculative decoding from the prompt's own n-grams; some guesses must be right."""
    outputs = generate(engine)
    accepted = [
        metric.value
        for metric in engine.get_metrics()
        if metric.name == "vllm:spec_decode_num_accepted_tokens"
    ]
    return {"speculated": outputs, "num_accepted": sum(accepted)}


def generate(engine: Any, **arguments: Any) -> list[dict[str, Any]]:
    """Greedy completions of `PROMPTS`."""
    requests = engine.generate(list(PROMPTS), sampling(), use_tqdm=False, **arguments)
    return [completion(request.outputs[0]) for request in requests]


def cached_tokens(engine: Any) -> list[int]:
    requests = engine.generate(list(PROMPTS), sampling(), use_tqdm=False)
    return [request.num_cached_tokens for request in requests]


def sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)


def with_engine(path: Path, options: dict[str, Any], use: Any) -> None:
    """Start an engine, use it, and leave nothing of it behind."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": len(PROMPTS),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    engine = LLM(model=str(path), **(defaults | options))
    use(engine)
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()

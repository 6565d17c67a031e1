"""One vLLM engine of the serving bench, in a process of its own, told what to do line by line.

`python -m benchmarks.serving_engine FOLDER` reads JSON objects from stdin, `{"batch": 8, "steps":
6}` to decode or `{"prompt": 1024}` to prefill, and answers each with a line of seconds per step.

Seconds are the process's own: engine, scheduler and one compute thread are all in it, and on a
machine that does other work too, wall-clock time would measure that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any, Final

ANSWER: Final = "RESULT "
"""How an answer begins: vLLM writes to stdout too."""
DECODE_PROMPT: Final = 32
"""Tokens before the ones that are timed: short, so that attention is next to nothing."""
MAX_TOKENS: Final = 1024
MAX_BATCH: Final = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    engine = _start(given.folder, given.compiled)
    vocabulary = engine.model_config.get_vocab_size()
    # Another prompt every time, the same ones in every process.
    draw = random.Random(0)
    _answer([])
    for line in sys.stdin:
        order = json.loads(line)
        if "prompt" in order:
            seconds = _prefill(engine, draw, vocabulary, order["prompt"])
        else:
            seconds = _decode(engine, draw, vocabulary, order["batch"], order["steps"])
        _answer(seconds)


def _start(folder: str, compiled: bool) -> Any:
    from vllm import LLM

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        max_model_len=MAX_TOKENS + 64,
        max_num_batched_tokens=max(MAX_TOKENS, MAX_BATCH * DECODE_PROMPT) + 64,
        max_num_seqs=MAX_BATCH,
        kv_cache_memory_bytes=200_000_000,
        enable_prefix_caching=False,
        enforce_eager=not compiled,
        disable_log_stats=True,
        seed=0,
    )
    return llm.llm_engine


def _prefill(engine: Any, draw: random.Random, vocabulary: int, tokens: int) -> list[float]:
    """Seconds of the one step that reads a prompt of `tokens` tokens."""
    _add(engine, draw, vocabulary, batch=1, tokens=tokens, generate=1)
    start = time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
    return [time.process_time() - start]


def _decode(
    engine: Any, draw: random.Random, vocabulary: int, batch: int, steps: int
) -> list[float]:
    """Seconds of each of `steps` steps in which all of `batch` requests get one token."""
    names = _add(engine, draw, vocabulary, batch=batch, tokens=DECODE_PROMPT, generate=steps + 8)
    generated = dict.fromkeys(names, 0)
    while min(generated.values()) < 1:
        _step(engine, generated)
        if len(generated) > batch:
            raise RuntimeError(f"outputs of other requests: {sorted(generated)}, asked {names}")
    seconds = []
    for _ in range(steps):
        before = sum(generated.values())
        start = time.process_time()
        _step(engine, generated)
        seconds.append(time.process_time() - start)
        if sum(generated.values()) != before + batch:
            raise RuntimeError(f"a step of {batch} requests gave other than {batch} tokens")
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def _add(
    engine: Any, draw: random.Random, vocabulary: int, *, batch: int, tokens: int, generate: int
) -> list[str]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=generate, ignore_eos=True, detokenize=False)
    names = []
    for _ in range(batch):
        name = str(draw.getrandbits(64))
        prompt = {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(tokens)]}
        engine.add_request(name, prompt, sampling)
        names.append(name)
    return names


def _step(engine: Any, generated: dict[str, int]) -> None:
    for output in engine.step():
        generated[output.request_id] = len(output.outputs[0].token_ids)


def _answer(seconds: list[float]) -> None:
    sys.stdout.write(f"{ANSWER}{json.dumps(seconds)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

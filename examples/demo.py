"""Compress the bundled trained model, serve both versions with vLLM, and print what changed.

`make demo` runs this. It uses the same commands a user types; nothing is imported from the
project. Servers are stopped on Ctrl-C, SIGTERM and every error. A finished output that still
verifies is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from serving import ServerError, free_port, running_server, turn_signals_into_exceptions

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("examples/pocket-mixtral")
OUTPUT = Path("demo-output/pocket-mixtral-moesvd-40")
HELD_OUT = Path("examples/texts/heldout.txt")
RATIO = 0.40
BIN = Path(sys.executable).parent

SHOWN_PROMPT = "The President of the United States"
SHOWN_TOKENS = 64
TIMED_PROMPTS = (
    "It was the best of times,",
    "The Congress of the United States shall",
    "In the morning the captain came on deck and",
    "The function returns a list of",
    "My dear friend, I have received your letter",
    "The war had been going on for two years when",
    "On the other side of the river there was",
    "To install the package, run",
)
TIMED_TOKENS = 96
TIMED_RUNS = 5
"""Each takes less than a second; on two shared cores single ones differed by up to a half."""

console = Console(highlight=False)


class CommandFailed(RuntimeError):
    """A command of the demo ended with an exit code other than 0; it has said why on stderr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One model's row of the table."""

    params: int
    num_bytes: int
    perplexity: float
    tokens_per_s: float


def main() -> int:
    turn_signals_into_exceptions()
    start = time.monotonic()
    OUTPUT.parent.mkdir(exist_ok=True)
    try:
        compress()
        dense, compressed = measure("dense", SOURCE), measure("compressed", OUTPUT)
    except (CommandFailed, ServerError) as error:
        console.print(f"demo: {error}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted; the servers are stopped")
        return 130
    print_table(dense, compressed)
    console.print(f"demo: done in {time.monotonic() - start:.0f} s; the result is in {OUTPUT}")
    return 0


def compress() -> None:
    """Make OUTPUT, or keep it if it is finished and every byte is as its manifest says."""
    if OUTPUT.exists():
        if tool("verify", OUTPUT, "--against", SOURCE, allow_failure=True) is not None:
            step(f"{OUTPUT} is there and verifies: using it again")
            return
        step(f"{OUTPUT} does not verify: making it again")
        shutil.rmtree(OUTPUT)
    tool("run", SOURCE, OUTPUT, "--ratio", f"{RATIO:.2f}", "--resume")
    tool("verify", OUTPUT, "--against", SOURCE)


def measure(name: str, model: Path) -> Measured:
    """Size, perplexity and speed of one model; the server runs only inside this call."""
    size = tool("inspect", model)
    assert size is not None
    return Measured(
        params=size["total_params"],
        num_bytes=size["bytes"],
        perplexity=perplexity(name, model),
        tokens_per_s=serve(name, model),
    )


def perplexity(name: str, model: Path) -> float:
    """Perplexity over HELD_OUT, kept for later runs under a hash of all that it follows from."""
    kept = Path(f"demo-output/perplexity-{name}.json")
    files = [*model.iterdir(), HELD_OUT, *Path("compress_tool").rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(filter(Path.is_file, files)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    if kept.exists():
        values = json.loads(kept.read_text())
        if values["of"] == digest.hexdigest():
            step(f"perplexity of {model}: nothing changed since it was measured")
            return float(values["perplexity"])
    result = tool("eval", model, "--text", HELD_OUT)
    assert result is not None
    kept.write_text(json.dumps({"perplexity": result["perplexity"], "of": digest.hexdigest()}))
    return float(result["perplexity"])


def tool(
    command: str, *arguments: Path | str, allow_failure: bool = False
) -> dict[str, Any] | None:
    """Run `compress_tool COMMAND … --json`, progress on the terminal; returns its JSON."""
    words = [command, *map(str, arguments)]
    step(f"compress_tool {' '.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "compress_tool", *words, "--json"],
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    if allow_failure:
        return None
    raise CommandFailed(f"compress_tool {words[0]} ended with exit code {done.returncode}")


def serve(name: str, model: Path) -> float:
    """Serve `model`, show one streamed completion, return generated tokens per second."""
    port = free_port()
    options, environment = engine_settings()
    command = ["serve", str(model), "--served-model-name", name, *options]
    step(f"vllm {' '.join(command)}")
    printed = time.monotonic()

    def waiting(elapsed: float) -> None:
        nonlocal printed
        if time.monotonic() - printed >= 10:
            printed = time.monotonic()
            console.print(f"  starting, {elapsed:.0f} s", style="dim")

    with running_server(
        [str(BIN / "vllm"), *command, "--host", "127.0.0.1", "--port", str(port)],
        port=port,
        log=Path(f"demo-output/serve-{name}.log"),
        environment=environment,
        waiting=waiting,
    ) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
        stream_one(client, name)
        return tokens_per_second(client, name)


def engine_settings() -> tuple[Sequence[str], Mapping[str, str]]:
    """Options and environment of `vllm serve`, the same for both models."""
    options = ["--max-model-len", "512", "--max-num-seqs", str(len(TIMED_PROMPTS))]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if is_cpu():
        # Compiling takes longer than everything this demo generates; 1 GiB of KV cache is plenty.
        return [*options, "--enforce-eager"], environment | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return [*options, "--gpu-memory-utilization", "0.3"], environment


def is_cpu() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def stream_one(client: OpenAI, name: str) -> None:
    """Print a completion as it arrives; sampled, because a small model repeats itself greedily."""
    step(f"one streamed completion from the {name} model")
    console.print(f"  {SHOWN_PROMPT}", style="bold", end="")
    chunks = client.completions.create(
        model=name,
        prompt=SHOWN_PROMPT,
        max_tokens=SHOWN_TOKENS,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    for chunk in chunks:
        if chunk.choices:
            text = chunk.choices[0].text.replace("\n", "\n  ")
            console.print(text, end="", markup=False, soft_wrap=True)
    console.print()


def tokens_per_second(client: OpenAI, name: str) -> float:
    """Generated tokens per second over all TIMED_PROMPTS at once, the best of TIMED_RUNS; the
    warm-up is not counted."""
    best = 0.0
    for max_tokens in (8, *[TIMED_TOKENS] * TIMED_RUNS):
        start = time.monotonic()
        answer = client.completions.create(
            model=name,
            prompt=list(TIMED_PROMPTS),
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        elapsed = time.monotonic() - start
        assert answer.usage is not None
        if max_tokens == TIMED_TOKENS:
            best = max(best, answer.usage.completion_tokens / elapsed)
    return best


def print_table(dense: Measured, compressed: Measured) -> None:
    table = Table(title=f"{SOURCE.name}, compressed with --ratio {RATIO:.2f}")
    for column in ("", "dense", "compressed", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for label, before, after, digits in (
        ("parameters", dense.params, compressed.params, 0),
        ("bytes of weights", dense.num_bytes, compressed.num_bytes, 0),
        (f"perplexity on {HELD_OUT.name}", dense.perplexity, compressed.perplexity, 2),
        ("generated tokens/s", dense.tokens_per_s, compressed.tokens_per_s, 0),
    ):
        table.add_row(
            label, f"{before:,.{digits}f}", f"{after:,.{digits}f}", f"{after / before - 1:+.1%}"
        )
    console.print()
    console.print(table)
    where = "on the CPU, in eager mode" if is_cpu() else "on the GPU"
    console.print(
        f"tokens/s: {len(TIMED_PROMPTS)} prompts at once, {TIMED_TOKENS} tokens each, best of "
        f"{TIMED_RUNS} runs {where}, same engine settings. This model is tiny (hidden size 128): "
        "its time goes into overhead, so the number says nothing about the speed of a large model. "
        "At so small a width, removing neurons costs less quality, and shrinking hidden states "
        "more, than on a model of ordinary size.",
        style="dim",
    )


def step(text: str) -> None:
    console.print(f"▸ {text}", style="cyan", markup=False, soft_wrap=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())

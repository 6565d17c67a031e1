"""`vllm serve` on a factored checkpoint, asked by the official OpenAI client and by lm_eval."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_moesvd.engine_run import ENGINE_ENVIRONMENT, PROMPTS, ROOT
from tests.vllm_moesvd.hand_made import ODD_LAYERS, hand_made
from tests.vllm_moesvd.oracle import Oracle, encode

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

VLLM = Path(sys.executable).parent / "vllm"
STARTUP_SECONDS = 300
NUM_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    url: str
    path: Path
    oracle: Oracle


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file."""
    root = tmp_path_factory.mktemp("serve")
    made = hand_made(ODD_LAYERS, exact=False)
    path = made.write(root / "odd")
    oracle = Oracle(made, root / "dense")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "server.log"
    command = [*serve_command(path), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(url=f"http://127.0.0.1:{port}/v1", path=path, oracle=oracle)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions_are_the_right_tokens(prompt: str, client: Any, server: Server) -> None:
    answer = client.completions.create(
        model=str(server.path),
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    expected = server.oracle.complete(prompt, NUM_TOKENS)
    assert answer.choices[0].token_ids == expected.tokens


def test_a_streamed_completion_is_the_same_text(client: Any, server: Server) -> None:
    request: dict[str, Any] = {
        "model": str(server.path),
        "prompt": PROMPTS[0],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**request).choices[0].text
    chunks = list(client.completions.create(stream=True, **request))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole


def test_requests_at_the_same_time_do_not_mix(client: Any, server: Server) -> None:
    answer = client.completions.create(
        model=str(server.path),
        prompt=list(PROMPTS),
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    by_index = sorted(answer.choices, key=lambda choice: choice.index)
    expected = [server.oracle.complete(prompt, NUM_TOKENS).tokens for prompt in PROMPTS]
    assert [choice.token_ids for choice in by_index] == expected


def test_lm_eval_scores_a_local_task(server: Server, tmp_path: Path) -> None:
    """Half of the answers are set to what the model prefers, half are not: accuracy 0.5."""
    questions = ["2 + 2 =", "The sky is", "A matrix of rank", "Experts are"]
    choices = [" one", " two"]
    documents = []
    for number, question in enumerate(questions):
        preferred = max(range(2), key=lambda c: continuation_logprob(server, question, choices[c]))
        gold = preferred if number % 2 else 1 - preferred
        documents.append({"question": question, "choices": choices, "gold": gold})
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "task.yaml").write_text(
        "task: local_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "target_delimiter: ''\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\n"
        "metric_list: [{metric: acc}]\n"
    )
    arguments = {
        "model": server.path,
        "base_url": f"{server.url}/completions",
        "tokenizer": server.path,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": 256,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", "local_choice", "--include_path", str(tmp_path)),
        *("--output_path", str(tmp_path / "results")),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment() | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["local_choice"]
    assert results["acc,none"] == 0.5


def test_a_broken_checkpoint_stops_the_server_with_one_line(tmp_path: Path) -> None:
    made = hand_made(ODD_LAYERS, exact=False)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    del made.tensors[name]
    path = made.write(tmp_path / "broken")
    done = subprocess.run(
        serve_command(path),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=STARTUP_SECONDS,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-5:]
    assert any(f"moesvd: tensor {name}: not found, expected shape" in line for line in last)


def serve_command(path: Path) -> list[str]:
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    return [str(VLLM), "serve", str(path), *options, "--max-num-seqs", "4"]


def environment() -> dict[str, str]:
    without = {"VLLM_ENABLE_V1_MULTIPROCESSING"}
    return os.environ | {k: v for k, v in ENGINE_ENVIRONMENT.items() if k not in without}


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not healthy after {STARTUP_SECONDS} s: {log.read_text()[-6000:]}")


def continuation_logprob(server: Server, question: str, choice: str) -> float:
    tokens = encode(question + choice)
    logprobs = server.oracle.logprobs(tokens)
    start = len(encode(question))
    return sum(float(logprobs[i - 1, tokens[i]]) for i in range(start, len(tokens)))

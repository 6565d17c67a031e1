"""How fast vLLM serves factored checkpoints on a CPU, beside what their sizes allow: real engines.

A dense engine and a compressed one are alive together and take turns, a fraction of a second each,
so that what else the machine does hits both; seconds are CPU seconds; the ratio of each turn's
medians is taken, and the median over turns is the number. `make bench-serving` runs it and writes
docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.serving_engine import ANSWER, DECODE_PROMPT
from benchmarks.serving_models import (
    Work,
    form_of,
    planned_specs,
    step_work,
    write_dense,
    write_factored,
)
from benchmarks.serving_page import GENERAL, Row, write_page
from vllm_moesvd.format import LayerSpec

ROOT: Final = Path(__file__).parent.parent
METHODS: Final = ("auto", "latent", "narrow", *GENERAL)
CELLS: Final = (
    *((ratio, method) for ratio in (0.20, 0.40, 0.60) for method in ("auto", "latent")),
    *((ratio, method) for ratio in (0.40, 0.60) for method in GENERAL),
)
"""Share removed and method, where the command line does not say otherwise."""
ORDERS: Final[dict[str, dict[str, int]]] = {
    "decode 1": {"batch": 1, "steps": 12},
    "decode 8": {"batch": 8, "steps": 4},
    "decode 32": {"batch": 32, "steps": 3},
    "prefill 1024": {"prompt": 1024},
}
"""What is measured in every turn: tokens per step, or the length of the prompt."""
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Engine:
    """A worker process of `serving_engine`."""

    process: subprocess.Popen[str]

    def tell(self, order: Mapping[str, int]) -> float:
        """Median seconds of the steps of one order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return statistics.median(self.answer())

    def answer(self) -> list[float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                seconds: list[float] = json.loads(line.removeprefix(ANSWER))
                return seconds
        raise RuntimeError(f"an engine ended with exit code {self.process.wait()}; see above")


def main() -> None:
    """Measure every method at every ratio and write the page."""
    options = _options()
    dense_folder = write_dense(options.work / "dense")
    rows: list[Row] = []
    with _engine(dense_folder, options) as dense:
        for ratio, method in _cells(options):
            specs = planned_specs(dense_folder, method, ratio)
            folder = options.work / "factored"
            shutil.rmtree(folder, ignore_errors=True)
            write_factored(folder, dense_folder, specs)
            with _engine(folder, options) as factored:
                ratios = _alternate(dense, factored, options.turns)
            rows.append(_row(method, ratio, specs, ratios))
            sys.stderr.write(f"{rows[-1]}\n")
            write_page(options.page, rows, mode="compiled" if options.compiled else "eager")


def _cells(options: argparse.Namespace) -> list[tuple[float, str]]:
    if not (options.ratios or options.methods):
        return list(CELLS)
    ratios, methods = options.ratios or (0.20, 0.40, 0.60), options.methods or METHODS
    return [(ratio, method) for ratio in ratios for method in methods]


def _alternate(dense: Engine, factored: Engine, turns: int) -> dict[str, list[float]]:
    """Per order and turn: seconds of a dense step over seconds of a factored one."""
    ratios: dict[str, list[float]] = {name: [] for name in ORDERS}
    for order in ORDERS.values():
        # The first step of its kind allocates.
        dense.tell(order)
        factored.tell(order)
    for turn in range(turns):
        for name, order in ORDERS.items():
            # Whoever comes second has a warmer or a hotter machine: take turns in that too.
            if turn % 2:
                seconds = factored.tell(order)
                ratios[name].append(dense.tell(order) / seconds)
            else:
                seconds = dense.tell(order)
                ratios[name].append(seconds / factored.tell(order))
    return ratios


def _row(
    method: str,
    ratio: float,
    specs: Mapping[int, LayerSpec],
    ratios: Mapping[str, list[float]],
) -> Row:
    allowed = {}
    for name, order in ORDERS.items():
        tokens = order.get("batch", order.get("prompt", 0))
        context = DECODE_PROMPT if "batch" in order else tokens // 2
        dense, ours = (step_work(layers, tokens=tokens, context=context) for layers in ({}, specs))
        allowed[name] = _allowed(dense, ours, is_decode="batch" in order)
    return Row(
        method=method,
        ratio=ratio,
        form=form_of(specs[0]) if method != "auto" else "narrow and latent in turn",
        measured={name: statistics.median(values) for name, values in ratios.items()},
        allowed=allowed,
    )


def _allowed(dense: Work, ours: Work, *, is_decode: bool) -> float:
    """Speed over dense if decoding were reading weights, and a prefill operations on them."""
    if is_decode:
        return dense.weight_bytes / ours.weight_bytes
    return dense.operations / ours.operations


@contextmanager
def _engine(folder: Path, options: argparse.Namespace) -> Iterator[Engine]:
    command = [sys.executable, "-m", "benchmarks.serving_engine", str(folder)]
    command += ["--compiled"] if options.compiled else []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
    )
    try:
        engine = Engine(process)
        engine.answer()
        yield engine
    finally:
        process.kill()
        process.wait()


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmark-output" / "serving")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "serving.md")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--ratios", nargs="+", type=float)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="with vLLM's torch.compile")
    parser.add_argument("--verbose", action="store_true", help="show what the engines log")
    return parser.parse_args()


if __name__ == "__main__":
    main()

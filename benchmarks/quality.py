"""What is left of a model after compression: every method, at equal bytes, from one calibration.

Each cell of the table is a run of `compress_tool run` in a process of its own, its output verified
by the tool and scored against the dense model. Finished cells are kept in the work folder, so an
interrupted bench goes on where it stopped. `make bench-quality` runs it with its defaults.

Cells are computed `--jobs` at a time with one thread each: two single threads do more work on two
cores than one after the other on both. Only the first, which makes the calibration, runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, Final

import torch

from benchmarks.quality_page import write_page
from benchmarks.scoring import accuracy, hidden_states, score_text
from compress_tool.checkpoint import Checkpoint, open_checkpoint
from compress_tool.continuation import make_questions
from compress_tool.corpus import default_calibration_text, eval_windows
from compress_tool.streaming import StreamedModel

ROOT: Final = Path(__file__).parent.parent
RATIOS: Final = (0.20, 0.25, 0.40, 0.50, 0.60)
METHODS: Final[dict[str, tuple[str, ...]]] = {
    "auto": (),
    "narrow": (),
    "latent": (),
    "svd": (),
    "shared-v": (),
    "plain SVD": ("--method", "asvd", "--alpha", "0"),
    "asvd": (),
    "svd-llm": (),
    "d2-moe": (),
    "d2-moe, Fisher base": ("--method", "d2-moe", "--base", "fisher"),
    "moe-svd": (),
    "moe-svd, k chosen": ("--method", "moe-svd", "--k", "auto"),
    "moe-svd, U merged": ("--method", "moe-svd", "--combine", "merge"),
    "drop": (),
}
"""Name in the table, and the flags where they are more than `--method NAME`."""
NUM_QUESTIONS: Final = 200
SEQ_LEN: Final = 256
RATIO_TOLERANCE: Final = 0.005


def main() -> None:
    """Fill the table cell by cell and write the page."""
    options = _options()
    # The scorer and every run have one thread: results do not depend on the number of jobs.
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    dense = open_checkpoint(options.model, allow_factored=False)
    scorer = Scorer(dense, [options.heldout, options.wikitext], options.windows)
    cells_file = options.work / "cells.json"
    cells: dict[str, Any] = json.loads(cells_file.read_text()) if cells_file.exists() else {}
    start = time.monotonic()
    asked = [(name, ratio) for ratio in options.ratios for name in options.methods]
    missing = [cell for cell in asked if _key(*cell) not in cells]

    def fill(cell: tuple[str, float]) -> None:
        found = _cell(options, dense, scorer, *cell)
        with scorer.lock:
            cells[_key(*cell)] = found
            cells_file.write_text(json.dumps(cells, indent=1))
            _say(_line(_key(*cell), found))

    if missing:
        # The calibration, by a method that needs nothing else from it.
        missing.sort(key=lambda cell: cell == ("auto", options.ratios[0]))
        fill(missing.pop(0))
        missing.sort(key=lambda cell: cell != ("auto", options.ratios[0]))
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(fill, cell) for cell in missing]:
            done.result()
    cells["dense"] = scorer.dense_scores
    cells["about"] = {
        "model": options.model.name,
        "texts": [scorer.texts[0], scorer.texts[1]],
        "windows": [len(ids) for ids in scorer.windows],
        "seq_len": SEQ_LEN,
        "calibration": f"{options.samples} sequences of {SEQ_LEN} tokens, "
        + ", ".join(file.name for file in options.calibration),
        "questions": NUM_QUESTIONS,
        "machine": f"{_cpu()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "jobs": options.jobs,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    cells_file.write_text(json.dumps(cells, indent=1))
    write_page(cells, list(options.methods), list(options.ratios), options.page)
    _say(f"wrote {options.page}")


class Scorer:
    """The texts, the questions and the dense model's answers, computed once."""

    def __init__(self, dense: Checkpoint, files: list[Path], num_windows: int) -> None:
        self.lock = Lock()
        self.texts = [file.name for file in files]
        # Windows spread over the whole text: its parts differ.
        self.windows = [_spread(eval_windows(dense.path, [f], seq_len=SEQ_LEN)[0], num_windows)
                        for f in files]  # fmt: skip
        self.questions = make_questions(files[0].read_text(encoding="utf-8"), NUM_QUESTIONS)
        self.dense = StreamedModel(dense)
        self.states = [hidden_states(self.dense, dense.num_layers, ids) for ids in self.windows]
        self.dense_scores = self._scores(dense, self.dense)

    def score(self, folder: Path) -> dict[str, Any]:
        """One at a time: the dense model's head is shared."""
        checkpoint = open_checkpoint(folder, allow_factored=True)
        with self.lock:
            return self._scores(checkpoint, StreamedModel(checkpoint))

    def _scores(self, checkpoint: Checkpoint, model: StreamedModel) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, ids_NS, dense_NSD in zip(self.texts, self.windows, self.states, strict=True):
            hidden_NSD = hidden_states(model, checkpoint.num_layers, ids_NS)
            score = score_text(model, hidden_NSD, self.dense, dense_NSD, ids_NS)
            found[name] = {
                "perplexity": score.perplexity, "kl": score.kl, "agreement": score.agreement
            }  # fmt: skip
        found["accuracy"] = accuracy(checkpoint, model, self.questions)
        return found


def _cell(
    options: argparse.Namespace, dense: Checkpoint, scorer: Scorer, name: str, ratio: float
) -> dict[str, Any]:
    """Compress once and score the result; an impossible ratio is a cell with its reason."""
    out = options.work / f"out-{get_ident()}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    asked = _nearest_drop(dense, ratio) if name == "drop" else ratio
    flags = METHODS[name] or ("--method", name)
    words = [
        *("run", str(options.model), str(out), "--ratio", repr(asked), *flags, "--json"),
        *("--samples", str(options.samples), "--seq-len", str(SEQ_LEN), "--seed", "0"),
        *("--stats", str(options.work / "stats")),
        *("--calibration", *map(str, options.calibration)),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "compress_tool", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode == 4 and "ratio" in done.stderr.strip().splitlines()[-1]:
        return {"refused": done.stderr.strip().splitlines()[-1]}
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    if name != "drop" and not ratio <= report["ratio"] <= ratio + RATIO_TOLERANCE:
        raise SystemExit(f"{name}: asked {ratio}, got {report['ratio']}")
    scores = scorer.score(out)
    shutil.rmtree(out)
    return scores | {
        "ratio": report["ratio"],
        "bytes": report["bytes_after"],
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }


def _key(name: str, ratio: float) -> str:
    return f"{name} @ {ratio:g}"


def _nearest_drop(dense: Checkpoint, ratio: float) -> float:
    """The share that whole experts can remove nearest to `ratio`, rounded down for the flag."""
    shape, layers = dense.shape, len(dense.moe_layers)
    per_expert = (3 * shape.expert_width + 1) * shape.hidden_size * layers / dense.total_params
    count = min(max(1, round(ratio / per_expert)), shape.num_experts - shape.top_k)
    return int(count * per_expert * 1e6) / 1e6


def _spread(ids_NS: torch.Tensor, count: int) -> torch.Tensor:
    if len(ids_NS) <= count:
        return ids_NS
    return ids_NS[torch.arange(count) * len(ids_NS) // count]


def _line(key: str, cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return f"{key:34} {cell['refused'][:90]}"
    texts = [value["perplexity"] for value in cell.values() if isinstance(value, dict)]
    shown = " ".join(f"{value:8.3f}" for value in texts)
    return f"{key:34} {cell['ratio']:.4f} {shown} {cell['accuracy']:.3f} {cell['seconds']:.0f} s"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add: Callable[..., Any] = parser.add_argument
    add("--model", type=Path, default=ROOT / "examples" / "pocket-mixtral")
    add("--calibration", type=Path, nargs="+", default=[default_calibration_text()])
    add("--heldout", type=Path, default=ROOT / "examples" / "texts" / "heldout.txt")
    add("--wikitext", type=Path, default=ROOT / "benchmarks" / "data" / "wikitext2-test.txt")
    add("--samples", type=int, default=256)
    add("--windows", type=int, default=128, help="of 256 tokens, per text")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--ratios", type=float, nargs="+", default=list(RATIOS))
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once, one thread each")
    add("--work", type=Path, default=ROOT / "benchmark-output" / "quality")
    add("--page", type=Path, default=ROOT / "docs" / "quality.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()

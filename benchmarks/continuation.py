"""Writes the questions of `benchmarks/tasks/continuation.jsonl`, and reads them for the bench.

The questions are those of `compress_tool eval --tasks continuation` on the bundled held-out text;
the file lets lm-evaluation-harness ask them of any model, a served one among them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from compress_tool.continuation import NUM_CHOICES, Question, questions_from_files
from compress_tool.corpus import open_tokenizer
from compress_tool.likelihood import Continuation

ROOT: Final = Path(__file__).parent.parent
TEXT: Final = ROOT / "examples" / "texts" / "heldout.txt"
JSONL: Final = ROOT / "benchmarks" / "tasks" / "continuation.jsonl"


def requests_of(checkpoint: Path, questions: Sequence[Question]) -> list[Continuation]:
    """Every choice of every question; context and choice are tokenised together."""
    tokenizer = open_tokenizer(checkpoint)
    requests = []
    for question in questions:
        context = tuple(tokenizer.encode(question.context).ids)
        for choice in question.choices:
            ids = tuple(tokenizer.encode(question.context + choice).ids)
            requests.append(Continuation(context=context, continuation=ids[len(context) :]))
    return requests


def share_right(scores: Sequence[float], questions: Sequence[Question]) -> float:
    """Share of questions whose answer has the highest of its four scores."""
    right = 0
    for index, question in enumerate(questions):
        own = scores[NUM_CHOICES * index : NUM_CHOICES * (index + 1)]
        right += own.index(max(own)) == question.answer
    return right / len(questions)


def main() -> None:
    """Write the questions of the bundled held-out text."""
    questions = questions_from_files([TEXT])
    lines = [json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions]
    JSONL.write_text("".join(lines), encoding="utf-8")
    sys.stdout.write(f"{len(lines)} questions\n")


if __name__ == "__main__":
    main()

"""Four-choice questions made of running text: which of these comes next?

Run as a program it writes `benchmarks/tasks/continuation.jsonl`, which lm-evaluation-harness reads
with the task file beside it; the bench scores the same questions in its own process.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

NUM_CHOICES: Final = 4
CONTEXT_WORDS: Final = 40
CONTINUATION_WORDS: Final = 8
NUM_QUESTIONS: Final = 200
ROOT: Final = Path(__file__).parent.parent
TEXT: Final = ROOT / "examples" / "texts" / "heldout.txt"
JSONL: Final = ROOT / "benchmarks" / "tasks" / "continuation.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A context, four continuations that start with a space, and the index of the true one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def make_questions(text: str, count: int, seed: int = 0) -> list[Question]:
    """Questions from stretches that never overlap; wrong choices come from other questions."""
    words = text.split()
    size = CONTEXT_WORDS + CONTINUATION_WORDS
    draw = random.Random(seed)
    starts = sorted(draw.sample(range(len(words) // size), count))
    spans = [words[start * size : (start + 1) * size] for start in starts]
    endings = [" " + " ".join(span[CONTEXT_WORDS:]) for span in spans]
    questions = []
    for index, span in enumerate(spans):
        others = [i for i in range(count) if i != index]
        choices = [endings[i] for i in draw.sample(others, NUM_CHOICES - 1)]
        answer = draw.randrange(NUM_CHOICES)
        choices.insert(answer, endings[index])
        questions.append(
            Question(context=" ".join(span[:CONTEXT_WORDS]), choices=tuple(choices), answer=answer)
        )
    return questions


def read_questions(file: Path = JSONL) -> list[Question]:
    """The questions of a JSONL file that `main` wrote."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Question(context=r["context"], choices=tuple(r["choices"]), answer=r["answer"])
        for r in records
    ]


def pairs(checkpoint: Path, questions: Sequence[Question]) -> list[tuple[list[int], int]]:
    """Token ids of context and choice together, and how many of them are the context's."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    requests = []
    for question in questions:
        length = len(tokenizer.encode(question.context).ids)
        for choice in question.choices:
            requests.append((tokenizer.encode(question.context + choice).ids, length))
    return requests


def pick(scores: Sequence[float], questions: Sequence[Question]) -> float:
    """Share of questions whose answer has the highest of its four scores."""
    right = 0
    for index, question in enumerate(questions):
        own = scores[NUM_CHOICES * index : NUM_CHOICES * (index + 1)]
        right += own.index(max(own)) == question.answer
    return right / len(questions)


def main() -> None:
    """Write the questions of the bundled held-out text."""
    questions = make_questions(TEXT.read_text(encoding="utf-8"), NUM_QUESTIONS)
    lines = [json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions]
    JSONL.write_text("".join(lines), encoding="utf-8")
    sys.stdout.write(f"{len(lines)} questions\n")


if __name__ == "__main__":
    main()

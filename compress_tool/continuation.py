"""Four-choice questions made of running text: which of these comes next?

They need no data set, so the tasks of lm-evaluation-harness can be tried without network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from compress_tool.corpus import read_texts
from compress_tool.errors import InputError

NUM_CHOICES: Final = 4
CONTEXT_WORDS: Final = 40
CONTINUATION_WORDS: Final = 8
NUM_QUESTIONS: Final = 200
"""A standard error of 3 % of accuracy around 70 %."""

TASK_NAME: Final = "continuation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A context, four continuations that start with a space, and the index of the true one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def make_questions(text: str, count: int, seed: int = 0) -> list[Question]:
    """Questions from stretches that never overlap; wrong choices come from other questions.

    Raises InputError when the text has no room for `count` of them, or for four.
    """
    words = text.split()
    size = CONTEXT_WORDS + CONTINUATION_WORDS
    available = len(words) // size
    if not NUM_CHOICES <= count <= available:
        raise InputError(
            f"a text of {len(words)} words gives {available} questions of {size} words each, "
            f"asked {count} of at least {NUM_CHOICES}; give more text"
        )
    draw = random.Random(seed)
    starts = sorted(draw.sample(range(available), count))
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


def questions_from_files(files: Sequence[Path]) -> list[Question]:
    """At most NUM_QUESTIONS questions from all text of `files` (text or JSONL)."""
    text = "\n".join(text for file in files for text in read_texts(file))
    available = len(text.split()) // (CONTEXT_WORDS + CONTINUATION_WORDS)
    return make_questions(text, max(NUM_CHOICES, min(NUM_QUESTIONS, available)))


def continuation_task(questions: Sequence[Question]) -> dict[str, Any]:
    """The questions as a task of lm-evaluation-harness; accuracy is that of its `acc`."""

    def data_set(**kwargs: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list([asdict(question) for question in questions])}

    return {
        "task": TASK_NAME,
        "custom_dataset": data_set,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }

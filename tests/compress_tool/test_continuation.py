"""Questions made of text: seeded, without overlap, answerable from the text alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_tool.continuation import (
    CONTEXT_WORDS,
    CONTINUATION_WORDS,
    make_questions,
    questions_from_files,
)
from compress_tool.errors import InputError

TEXT = " ".join(f"w{number}" for number in range(48 * 12))
ROOT = Path(__file__).parent.parent.parent


def test_the_answer_continues_the_context_and_the_others_do_not():
    for question in make_questions(TEXT, 10):
        context = question.context.split()
        assert len(context) == CONTEXT_WORDS
        assert len(set(question.choices)) == 4
        last = int(context[-1][1:])
        following = " " + " ".join(f"w{last + 1 + i}" for i in range(CONTINUATION_WORDS))
        assert [choice == following for choice in question.choices].index(True) == question.answer


def test_stretches_never_overlap():
    starts = [int(question.context.split()[0][1:]) for question in make_questions(TEXT, 12)]
    assert sorted(starts) == [48 * number for number in range(12)]


def test_the_seed_decides():
    assert make_questions(TEXT, 10, seed=3) == make_questions(TEXT, 10, seed=3)
    assert make_questions(TEXT, 10, seed=3) != make_questions(TEXT, 10, seed=4)


def test_answers_are_spread_over_the_places():
    places = [question.answer for question in make_questions(TEXT * 9, 100)]
    assert all(places.count(place) >= 10 for place in range(4))


def test_a_short_text_is_an_input_error(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("word " * (48 * 4 - 1))
    with pytest.raises(InputError, match="191 words gives 3 questions"):
        questions_from_files([file])
    file.write_text("word " * (48 * 4))
    assert len(questions_from_files([file])) == 4


def test_the_file_for_lm_eval_holds_the_same_questions():
    """`benchmarks/tasks/continuation.jsonl` is what `--tasks continuation` makes of the text."""
    lines = (ROOT / "benchmarks" / "tasks" / "continuation.jsonl").read_text().splitlines()
    made = questions_from_files([ROOT / "examples" / "texts" / "heldout.txt"])
    assert len(lines) == len(made) == 200
    for line, question in zip(lines, made, strict=True):
        record = json.loads(line)
        assert (record["context"], tuple(record["choices"]), record["answer"]) == (
            question.context,
            question.choices,
            question.answer,
        )

"""Scores of continuations and greedy text: transformers' numbers, however they are batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError
from compress_tool.greedy import generate_greedily
from compress_tool.likelihood import Continuation, score_continuations
from compress_tool.streaming import StreamedModel
from tests.checkpoints import tiny_mixtral

LONGEST = 64


def silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny_mixtral(tmp_path_factory.mktemp("m") / "m", max_position_embeddings=LONGEST)
    return open_checkpoint(folder, allow_factored=True)


@pytest.fixture(scope="module")
def reference(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def score(checkpoint, requests, *, batch_size=4, **options):
    model = StreamedModel(checkpoint)
    return score_continuations(
        checkpoint, model, requests, batch_size=batch_size, progress=silent, **options
    )


def requests_of_many_lengths() -> list[Continuation]:
    """Around the padding step of 32 and up to the model's length, one token more being judged."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (3, 2), (30, 1), (31, 1), (31, 2), (32, 1), (40, 20), (LONGEST, 1), (1, 64)]
    made = []
    for context, continuation in sizes:
        ids = torch.randint(0, 256, (context + continuation,), generator=draw).tolist()
        made.append(Continuation(context=tuple(ids[:context]), continuation=tuple(ids[context:])))
    return made


@torch.no_grad()
def expected(reference, request: Continuation) -> float:
    ids = torch.tensor([request.context + request.continuation])
    log_SV = reference(ids[:, :-1]).logits[0].double().log_softmax(-1)
    first = len(request.context)
    return sum(float(log_SV[at - 1, ids[0, at]]) for at in range(first, ids.shape[1]))


def test_scores_equal_transformers_at_every_length(checkpoint, reference):
    requests = requests_of_many_lengths()
    found = score(checkpoint, requests)
    for request, result in zip(requests, found, strict=True):
        wanted = expected(reference, request)
        assert result.log_likelihood == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        # A score that used the wrong target would be far away.
        moved = replace(request, continuation=(*request.continuation[:-1], 7))
        if moved != request:
            assert abs(expected(reference, moved) - result.log_likelihood) > 1e-3


def test_order_batches_and_parts_change_nothing_that_matters(checkpoint):
    requests = requests_of_many_lengths()
    one = score(checkpoint, requests, batch_size=1)
    # 4 bytes * 64 hidden * 70 tokens: a row or two at a time, several readings of the checkpoint.
    parts = score(checkpoint, requests, batch_size=3, hidden_bytes=4 * 64 * 70)
    turned = score(checkpoint, requests[::-1])[::-1]
    for other in (parts, turned):
        for left, right in zip(one, other, strict=True):
            assert left.log_likelihood == pytest.approx(right.log_likelihood, rel=1e-6, abs=1e-6)
            assert left.is_greedy == right.is_greedy


def test_the_checkpoint_is_read_once_for_all_requests_that_fit(checkpoint):
    def layers_read(hidden_bytes: int) -> int:
        calls = []
        score_continuations(
            checkpoint,
            StreamedModel(checkpoint),
            requests_of_many_lengths(),
            batch_size=2,
            progress=lambda *call: calls.append(call),
            hidden_bytes=hidden_bytes,
        )
        assert calls[-1][1] == calls[-1][2] == len(calls) - 1
        return calls[-1][2]

    assert layers_read(2**30) == 2
    # 7 of the 9 inputs take 32 or 64 padded tokens; 64 at a time need more than one reading.
    assert layers_read(4 * 64 * 64) > 4


def test_equal_inputs_are_computed_once(checkpoint, monkeypatch):
    model, embedded = StreamedModel(checkpoint), []
    real = model.embed_all
    monkeypatch.setattr(
        model, "embed_all", lambda ids, size: embedded.append(len(ids)) or real(ids, size)
    )
    context = tuple(range(10))
    requests = [Continuation(context=context, continuation=(token,)) for token in range(256)]
    found = score_continuations(checkpoint, model, requests, batch_size=4, progress=silent)
    assert embedded == [1]
    total = sum(torch.tensor([r.log_likelihood for r in found]).exp())
    # 256 of 260 tokens: nearly all of the probability, and exactly one of them is the best.
    assert 0.9 < total <= 1
    assert sum(result.is_greedy for result in found) <= 1


def test_a_long_context_loses_its_beginning(checkpoint):
    draw = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(0, 256, (100,), generator=draw).tolist())
    long = Continuation(context=ids[:-3], continuation=ids[-3:])
    cut = Continuation(context=ids[-LONGEST - 1 : -3], continuation=ids[-3:])
    assert score(checkpoint, [long]) == score(checkpoint, [cut])


def test_a_continuation_longer_than_the_model_is_an_input_error(checkpoint):
    with pytest.raises(InputError, match=r"65 tokens is to be scored, the model reads 64"):
        score(checkpoint, [Continuation(context=(1,), continuation=tuple(range(65)))])


def test_greedy_text_equals_transformers(checkpoint, reference):
    draw = torch.Generator().manual_seed(2)
    prompts = [
        tuple(torch.randint(0, 256, (size,), generator=draw).tolist()) for size in (3, 31, 7)
    ]
    found = generate_greedily(
        checkpoint,
        StreamedModel(checkpoint),
        prompts,
        max_new_tokens=[6, 6, 2],
        is_finished=lambda number, new: False,
        batch_size=2,
        progress=silent,
    )
    for prompt, new, count in zip(prompts, found, (6, 6, 2), strict=True):
        wanted = reference.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        assert new == tuple(wanted[0, len(prompt) :].tolist())
    # The greedy continuation, and no other, is the one that scoring calls greedy.
    given = Continuation(context=prompts[0], continuation=found[0])
    other = replace(given, continuation=(*found[0][:-1], (found[0][-1] + 1) % 256))
    assert [s.is_greedy for s in score(checkpoint, [given, other])] == [True, False]


def test_a_finished_text_stops_alone(checkpoint):
    found = generate_greedily(
        checkpoint,
        StreamedModel(checkpoint),
        [(1, 2), (3, 4), (5,)],
        max_new_tokens=[5, 5, 0],
        is_finished=lambda number, new: number == 0 and len(new) == 2,
        batch_size=2,
        progress=silent,
    )
    assert [len(new) for new in found] == [2, 5, 0]

"""Perplexity over all windows, and the distance between two checkpoints."""

from __future__ import annotations

import math

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.errors import InputError, UsageError
from compress_tool.evaluate import EvalResult, _score, evaluate, evaluate_windows
from tests.checkpoints import tiny_mixtral

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, 1859."


def silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


@pytest.fixture
def dense(tmp_path):
    return open_checkpoint(tiny_mixtral(tmp_path / "dense"), allow_factored=True)


@pytest.fixture
def other(tmp_path):
    return open_checkpoint(tiny_mixtral(tmp_path / "other", seed=1), allow_factored=True)


def score(checkpoint, groups, *, batch_size=2, against=None) -> EvalResult:
    return evaluate_windows(
        checkpoint, groups, batch_size=batch_size, against=against, progress=silent
    )


def random_windows(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0))


def transformers_model(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()


def test_label_shift_by_hand_on_three_tokens():
    """Logits at position 0 judge token 1, at 1 token 2; those at position 2 are not used."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [50.0, -50.0]])
    result = _score(torch.tensor([0, 1, 0]), logits, None)
    assert result.tokens == 2
    # p(token 1 | 0) = 1/2 and p(token 0 | 0, 1) = 3/4
    assert result.loss == pytest.approx(math.log(2) + math.log(4 / 3), abs=1e-7)


def test_kl_and_agreement_by_hand():
    ours = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    reference = torch.tensor([[math.log(3.0), 0.0], [0.0, 5.0], [9.0, 0.0]])
    result = _score(torch.tensor([0, 0, 0]), ours, reference)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    p, q = torch.tensor([0.0, 5.0]).softmax(0), torch.tensor([0.0, 1.0]).softmax(0)
    second = float((p * (p / q).log()).sum())
    assert result.kl == pytest.approx(first + second, abs=1e-6)
    # Equal logits have their best token at the first place, as in the reference.
    assert result.agreed == 2


def test_perplexity_equals_the_loss_of_transformers(dense):
    ids = random_windows(3, 20)
    with torch.no_grad():
        losses = [float(transformers_model(dense)(w[None], labels=w[None]).loss) for w in ids]
    result = score(dense, [ids])
    assert result.tokens == 3 * 19
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert result.kl is None
    assert result.agreement is None


def test_kl_equals_transformers_logits(dense, other):
    ids = random_windows(3, 20)
    with torch.no_grad():
        log_q = transformers_model(dense)(ids).logits[:, :-1].double().log_softmax(-1)
        log_p = transformers_model(other)(ids).logits[:, :-1].double().log_softmax(-1)
    result = score(dense, [ids], against=other)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert expected > 0.1
    assert result.kl == pytest.approx(expected, rel=1e-5)
    agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert result.agreement == pytest.approx(agreement)
    assert score(other, [ids], against=dense).kl != pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_against_itself_is_at_distance_zero(dense):
    result = score(dense, [random_windows(3, 20)], against=dense)
    assert result.kl == 0
    assert result.agreement == 1


def test_the_order_of_the_windows_changes_nothing(dense, other):
    ids = random_windows(6, 20)
    order = [3, 0, 5, 1, 4, 2]
    forward = score(dense, [ids], batch_size=1, against=other)
    assert score(dense, [ids[order]], batch_size=1, against=other) == forward
    assert score(dense, [ids[:2], ids[2:]], batch_size=1, against=other) == forward


def test_every_window_counts_by_its_tokens(dense):
    long, short = random_windows(1, 30), random_windows(1, 4)
    parts = [(29, score(dense, [long])), (3, score(dense, [short]))]
    whole = score(dense, [long, short])
    assert whole.tokens == 32
    mean = sum(tokens * math.log(part.perplexity) for tokens, part in parts) / 32
    assert math.log(whole.perplexity) == pytest.approx(mean, rel=1e-9)


def test_the_batch_size_changes_nothing_that_matters(dense, other):
    ids = random_windows(5, 20)
    one = score(dense, [ids], batch_size=1, against=other)
    many = score(dense, [ids], batch_size=4, against=other)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert many.kl == pytest.approx(one.kl, rel=1e-6)


def test_long_windows_are_scored_in_pieces(dense):
    ids = random_windows(1, 300)
    with torch.no_grad():
        loss = float(transformers_model(dense)(ids, labels=ids).loss)
    assert score(dense, [ids]).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_window_of_one_token_scores_nothing(dense):
    ids = random_windows(2, 20)
    assert score(dense, [ids, ids[:1, :1]]) == score(dense, [ids])


def test_evaluate_scores_all_tokens_of_all_files(dense, tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text(TEXT)
    files[1].write_text(TEXT[:41])
    result = evaluate(dense, files, seq_len=20, batch_size=2, against=None, progress=silent)
    windows = [20] * 4 + [len(TEXT) - 80] + [20, 20, 1]
    assert result.tokens == sum(size - 1 for size in windows)
    swapped = evaluate(dense, files[::-1], seq_len=20, batch_size=2, against=None, progress=silent)
    assert swapped == result


def test_two_tokenizers_cannot_be_compared(dense, other, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    tokenizer = other.path / "tokenizer.json"
    content = tokenizer.read_text()
    tokenizer.write_text(content.replace('"a":', '"?":').replace('"b":', '"a":'))
    assert tokenizer.read_text() != content
    with pytest.raises(InputError, match="tokenizer or vocabulary"):
        evaluate(dense, [file], seq_len=20, batch_size=2, against=other, progress=silent)


def test_two_vocabularies_cannot_be_compared(dense, tmp_path):
    larger = open_checkpoint(tiny_mixtral(tmp_path / "larger", vocab_size=300), allow_factored=True)
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    with pytest.raises(InputError, match=r"\(300 tokens\) differs"):
        evaluate(dense, [file], seq_len=20, batch_size=2, against=larger, progress=silent)


def test_windows_of_one_token_are_a_usage_error(dense, tmp_path):
    with pytest.raises(UsageError, match="at least 2"):
        evaluate(dense, [tmp_path / "a"], seq_len=1, batch_size=2, against=None, progress=silent)


def test_progress_counts_the_layers_of_both_models_then_the_windows(dense, other):
    calls = []
    evaluate_windows(
        dense,
        [random_windows(2, 8)],
        batch_size=1,
        against=other,
        progress=lambda stage, done, total, detail: calls.append((stage, done, total)),
    )
    layers = [("evaluate", done, 4) for done in range(5)]
    assert calls == layers + [("score", done, 2) for done in range(3)]
